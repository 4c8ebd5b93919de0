"""The step that a model decodes with: one place that chooses it."""

from torch import nn

from kvlib.engine.fast import FastModel, why_not_fast
from kvlib.errors import ConfigError
from kvlib.policies.base import Policy


def step_for(model: nn.Module, policy: Policy, n_rows: int, n_slots: int) -> FastModel:
    """The model beside a cache of n_rows rows and n_slots slots, ready to prefill and to step.

    Raises ConfigError naming what is not plain about a model that the fast step would read wrongly.
    """
    reason = why_not_fast(model)
    if reason:
        raise ConfigError(f"{reason}; kvlib decodes plain Llama, Qwen2 and Qwen3 models with full attention")
    return FastModel(model, policy, n_rows, n_slots)
