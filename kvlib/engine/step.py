"""The step that a model decodes with: one place that chooses it."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvlib.engine.attention import CHANGING
from kvlib.engine.fast import FastModel, why_not_fast
from kvlib.engine.general import GeneralModel, check_decodes
from kvlib.policies.base import Policy


def step_for(model: nn.Module, policy: Policy, n_rows: int, n_slots: int, n_positions: int) -> FastModel | GeneralModel:
    """The model beside a cache of n_rows rows and n_slots slots, ready to prefill and to step.

    n_positions: tokens of the longest prompt and all that follow it. Raises ConfigError for a model that does not
    decode through kvlib, or that the policy cannot score.
    """
    with CHANGING:
        if why_not_fast(model) is None:
            return FastModel(model, policy, n_rows, n_slots)
    return GeneralModel(model, policy, n_rows, n_slots, n_positions)


def planned_step(config: PreTrainedConfig, n_positions: int) -> str:
    """Which step will decode a model of this config, which is made without weights; and why, if it is the general one.

    Raises ConfigError for what is known of it that does not decode.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    reason = why_not_fast(model)
    if reason is None:
        return "fast step"
    check_decodes(model, n_positions)
    return f"general step ({reason}): transformers' own modules, and torch's attention on every device"
