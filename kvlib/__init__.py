"""How much KV cache does a reasoning model need? Policies that evict tokens under a KV budget, an engine, studies."""

import importlib

PUBLIC = {
    "generate": "kvlib.api",
    "fit": "kvlib.api",
    "Generation": "kvlib.api",
    "custom_generate": "kvlib.transformers_entry",
    "load_model": "kvlib.api",
    "make_policy": "kvlib.policies",
    "Policy": "kvlib.policies",
    "View": "kvlib.policies",
    "check_policy": "kvlib.invariants",
    "RunConfig": "kvlib.config",
    "run": "kvlib.cell",
    "load_records": "kvlib.record",
}
"""The public names, by the module that is imported where one is first used (PEP 562): the charts need no torch."""

__all__ = list(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module 'kvlib' has no attribute {name!r}; it has {', '.join(PUBLIC)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
