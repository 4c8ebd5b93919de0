"""Eviction policies: one file each. `make_policy` builds a named preset, pinned to its source."""

import dataclasses
from collections.abc import Mapping
from functools import partial

from kvlib.config import check_names
from kvlib.errors import ConfigError
from kvlib.policies.base import Policy
from kvlib.policies.base import View as View
from kvlib.policies.caote import CAOTE
from kvlib.policies.cur import CUR
from kvlib.policies.dynts import DynTS
from kvlib.policies.expected import ExpectedAttention
from kvlib.policies.full import Full
from kvlib.policies.gkv import GKV
from kvlib.policies.golden import Golden as Golden
from kvlib.policies.h2o import H2O
from kvlib.policies.keydiff import KeyDiff
from kvlib.policies.knorm import KNorm
from kvlib.policies.lagkv import LagKV
from kvlib.policies.lazy import LazyEviction
from kvlib.policies.raas import RaaS
from kvlib.policies.random import Random
from kvlib.policies.rkv import RKV
from kvlib.policies.rpc import RPC
from kvlib.policies.sepllm import SepLLM
from kvlib.policies.snapkv import SnapKV
from kvlib.policies.streaming import StreamingLLM
from kvlib.policies.tova import TOVA
from kvlib.policies.triattention import TriAttention
from kvlib.policies.trimkv import TrimKV
from kvlib.policies.vase import VaSE
from kvlib.policies.window import Window

PRESETS = {
    "full": Full,
    "window": Window,
    "recency-prompt": partial(Window, protect_prompt=True),
    "random": Random,
    "random-prompt": partial(Random, protect_prompt=True, n_recent=64, buffer=64),
    "streaming": StreamingLLM,
    "streaming-reindexed": partial(StreamingLLM, reindex=True),
    "h2o": H2O,
    "observed": partial(H2O, per_query=True, recent_ratio=0.0),
    "tova": TOVA,
    "snapkv": SnapKV,
    "snapkv-paper": partial(SnapKV, n_obs=32, n_recent=32, kernel=5, pooling="avg", group="mean", domain="all"),
    "snapkv-kvpress": partial(
        SnapKV, n_obs=64, n_recent=64, kernel=5, pooling="avg", group="mean", domain="all", buffer=512
    ),
    "snapkv-vase": partial(SnapKV, n_obs=64, n_recent=64, kernel=5, pooling="avg", group="mean", buffer=64),
    "morphkv": partial(SnapKV, n_obs=32, n_recent=32, kernel=1, group="mean", domain="all", buffer=0),
    "rkv": RKV,
    "rpc": RPC,
    "rpc-qwen2": partial(RPC, last_query_twice=True),
    "gkv": GKV,
    "lazy": LazyEviction,
    "raas": RaaS,
    "caote": CAOTE,
    "caote-snapkv": partial(CAOTE, base="snapkv"),
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "lagkv": LagKV,
    "cur": CUR,
    "cur-resample": partial(CUR, resample=True, local_window=0, n_recent=64, buffer=64),
    "vase": VaSE,
    "expected": ExpectedAttention,
    "triattention": TriAttention,
    "triattention-per-layer": partial(TriAttention, share="head"),
    "triattention-union": partial(TriAttention, share="model"),
    "sepllm": SepLLM,
    "trimkv": TrimKV,
    "dynts": DynTS,
    "dynts-published": partial(DynTS, prompt_in_share=True, protect_prompt=False),
}
"""Golden is none of them: it needs the trace that it replays."""


def make_policy(name: str, **options) -> Policy:
    """The preset `name` with some of its settings replaced.

    Raises ConfigError for an unknown preset or setting, and for a setting of another type than its default.
    """
    check_names([name], list(PRESETS), "policy")
    preset = PRESETS[name]
    check_options(getattr(preset, "func", preset), options, name)
    return preset(**options)


def check_options(kind: type[Policy], options: Mapping, name: str) -> None:
    """Raise ConfigError for a setting that a kind of policy does not have, or of another type than its default."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    check_names(options, list(fields), f"setting of policy {name!r}")
    for option, value in options.items():
        default = fields[option].default
        wanted = (int, float) if isinstance(default, float) else type(default)
        if default not in (None, dataclasses.MISSING) and (
            not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ConfigError(
                f"setting {option!r} of policy {name!r} is {value!r}; it must be of type {type(default).__name__}"
            )
