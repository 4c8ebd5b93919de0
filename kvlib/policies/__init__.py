"""Eviction policies: one file each. `make_policy` builds a named preset, pinned to its source."""

import dataclasses
import difflib
import functools

from kvlib.errors import ConfigError
from kvlib.policies.base import Policy, View
from kvlib.policies.dynts import DynTS
from kvlib.policies.full import Full
from kvlib.policies.h2o import H2O
from kvlib.policies.random import Random
from kvlib.policies.rkv import RKV
from kvlib.policies.snapkv import SnapKV
from kvlib.policies.streaming import StreamingLLM
from kvlib.policies.window import Window

PRESETS = {
    "full": Full,
    "window": Window,
    "streaming": StreamingLLM,
    "random": Random,
    "h2o": H2O,
    "snapkv": SnapKV,
    "rkv": RKV,
    "dynts": DynTS,
    "dynts-published": functools.partial(DynTS, prompt_in_share=True, protect_prompt=False),
}

__all__ = [
    "H2O",
    "PRESETS",
    "RKV",
    "DynTS",
    "Full",
    "Policy",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "View",
    "Window",
    "make_policy",
]


def make_policy(name: str, **options) -> Policy:
    """The preset `name` with some of its settings replaced.

    Raises ConfigError for an unknown preset or setting, and for a setting of another type than its default.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise ConfigError(
            f"unknown policy {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(PRESETS)})"
        )
    preset = PRESETS[name]
    fields = {f.name: f for f in dataclasses.fields(getattr(preset, "func", preset))}
    for option, value in options.items():
        if option not in fields:
            near = difflib.get_close_matches(option, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"policy {name!r} has no setting {option!r}{hint} (known: {', '.join(fields)})")
        default = fields[option].default
        wanted = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (
            not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ConfigError(
                f"setting {option!r} of policy {name!r} is {value!r}; it must be of type {type(default).__name__}"
            )
    return preset(**options)
