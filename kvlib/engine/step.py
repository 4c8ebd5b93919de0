"""The step that a model decodes with: one place that chooses it."""

from torch import nn

from kvlib.engine.fast import FastModel, why_not_fast
from kvlib.engine.general import GeneralModel
from kvlib.policies.base import Policy


def step_for(model: nn.Module, policy: Policy, n_rows: int, n_slots: int, n_positions: int) -> FastModel | GeneralModel:
    """The model beside a cache of n_rows rows and n_slots slots, ready to prefill and to step.

    n_positions: tokens of the longest prompt and all that follow it. Raises ConfigError for a model that does not
    decode through kvlib, or that the policy cannot score.
    """
    if why_not_fast(model) is None:
        return FastModel(model, policy, n_rows, n_slots)
    return GeneralModel(model, policy, n_rows, n_slots, n_positions)
