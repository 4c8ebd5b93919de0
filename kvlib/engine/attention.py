"""The attention function of transformers models, and one of the steps it serves: a sequence read whole.

A step is the `past_key_values` of one forward, to which every layer hands its new keys and values, and what the
attention function finds while that forward runs. No hook, no patch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kvlib.errors import ConfigError

IMPLEMENTATION = "kvlib"
NEEDLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
"""Arguments that some layers pass on to attention, and that change nothing where a model evaluates."""
STEP: ContextVar[Cache] = ContextVar("step")
"""The step whose forward runs: a variable, because some layers pass on no argument that they do not know."""
CHANGING = RLock()
"""Held while a model is not as it was given: else another thread would take that for its own state, and restore it."""


@dataclass(frozen=True)
class Scoring:
    """How attention scores: q.k times scaling, then softcap * tanh(x / softcap); sinks `[HQ]`: logits without a value.

    window: how many positions back a query sees, itself included; None: all.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def slot_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **other
):
    """transformers' attention interface: query `[B, HQ, Q, D]` -> output `[B, Q, HQ, DV]`, no weights."""
    step = STEP.get(None)
    if step is None:
        raise RuntimeError("kvlib is decoding with this model at this moment; call it before or afterwards")
    unknown = sorted({name for name, given in other.items() if given is not None and given is not False} - NEEDLESS)
    if attention_mask is not None or unknown:
        what = "a mask of its own" if attention_mask is not None else f"the arguments {', '.join(unknown)}"
        raise ConfigError(f"{type(module).__name__} attends with {what}, which kvlib does not apply; use another model")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step.attend(module, query, key, value, Scoring(scaling, sliding_window, softcap, s_aux)), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)


def text_config(model: nn.Module):
    """The config of the language model; where there are others beside it, as for images, it is a part."""
    return model.config.get_text_config(decoder=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside; afterwards each module is in the mode that it was in."""
    with CHANGING:
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def through_kvlib(model: nn.Module, step: Cache) -> Iterator[None]:
    """The model evaluates with this step's attention, whatever it was loaded with; afterwards it is as before."""
    config = text_config(model)
    with evaluating(model):
        before, token = config._attn_implementation, STEP.set(step)
        try:
            config._attn_implementation = IMPLEMENTATION
            yield
        finally:
            STEP.reset(token)
            config._attn_implementation = before


def causal_mask(n: int, device: torch.device | str) -> Tensor:
    """`[n, n]` bool, True where the query (row) may see the key (column)."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""Sees a layer's index, queries `[HQ, T, D]`, keys and values `[H, T, D]` (after RoPE), and the scaling of q.k."""


class ObservedStep(Cache):
    """All tokens of one trace at once, nothing stored: shows every layer's queries, keys and values to an observer."""

    def __init__(self, observer: Observer):
        super().__init__(layers=[])
        self.observer = observer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if any(given is not None for given in (scoring.window, scoring.softcap, scoring.sinks)):
            raise ConfigError(
                f"{type(module).__name__} attends within a window, with a soft cap or with sinks; observe traces of "
                "models that do not"
            )
        self.observer(module.layer_idx, query[0], key[0], value[0], scoring.scaling)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scoring.scaling, enable_gqa=True)
        return out.transpose(1, 2)


@torch.no_grad()
def observe_trace(model: nn.Module, ids: Sequence[int] | Tensor, observer: Observer) -> Tensor:
    """Run the model over a trace, ids `[T]` from position 0; its hidden states `[T, d]` (after the final norm).

    Raises ConfigError for a model with layers that slide or keep a state, or with a soft cap or sinks.
    """
    config = text_config(model)
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ConfigError(
            f"{config.model_type} has layers without full attention; observe traces of models that do not"
        )
    ids = torch.as_tensor(ids, device=next(model.parameters()).device)[None]
    step = ObservedStep(observer)
    with through_kvlib(model, step):
        return model.base_model(input_ids=ids, past_key_values=step, use_cache=True).last_hidden_state[0]
