"""Every preset obeys the invariants, and the check that says so goes red on policies that break them."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import reversed_heads, small_policy

from kvlib.invariants import check_policy, random_model
from kvlib.policies import PRESETS, Policy


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "full"])
def test_every_preset_obeys_the_invariants(name):
    policy = small_policy(name)
    report = check_policy(policy, permuted=reversed_heads(policy))
    assert report["holds"].all(), report[~report["holds"]].to_dict("records")


@pytest.mark.parametrize("name", ["snapkv", "h2o", "streaming-reindexed", "lazy"])
def test_the_invariants_hold_on_the_general_step_too(name):
    """A model that the fast step does not take: its projections are those of Phi-3."""
    report = check_policy(small_policy(name), model=random_model("phi3"))
    assert report["holds"].all(), report[~report["holds"]].to_dict("records")


@dataclass(frozen=True, kw_only=True)
class Good(Policy):
    """Scores by key norm; the broken ones below differ in one point each."""

    buffer: int | None = 4

    def score(self, view, state):
        return view.keys.norm(dim=-1), state


@dataclass(frozen=True, kw_only=True)
class Writes(Good):
    def score(self, view, state):
        return view.keys.mul_(2).norm(dim=-1), state


@dataclass(frozen=True, kw_only=True)
class MixesRows(Good):
    def score(self, view, state):
        norms = view.keys.norm(dim=-1)
        return (norms - norms.mean(1, keepdim=True)).abs(), state


@dataclass(frozen=True, kw_only=True)
class CountsRounds(Good):
    calls: list = dataclasses.field(default_factory=list)

    def score(self, view, state):
        self.calls.append(1)
        return view.keys.norm(dim=-1) * (-1) ** len(self.calls), state


@dataclass(frozen=True, kw_only=True)
class ReadsSlots(Good):
    def score(self, view, state):
        return view._slots.float(), state


@dataclass(frozen=True, kw_only=True)
class KnowsItsHead(Good):
    def score(self, view, state):
        norms = view.keys.norm(dim=-1)
        return norms * torch.tensor([1.0, -1.0])[:, None], state


@dataclass(frozen=True, kw_only=True)
class IsNaN(Good):
    def score(self, view, state):
        return view.keys[..., 0].sqrt(), state


@dataclass(frozen=True, kw_only=True)
class ForgetsState(Good):
    state_names: ClassVar[tuple[str, ...]] = ("age",)

    def score(self, view, state):
        return view.keys.norm(dim=-1), {}


@pytest.mark.parametrize(
    ("policy", "invariant"),
    [
        (Writes(), "score changes neither what it sees nor the state"),
        (MixesRows(), "a row decodes among others as alone"),
        (CountsRounds(), "the same seed gives the same keep sets"),
        (ReadsSlots(), "the order of slots does not matter"),
        (KnowsItsHead(), "KV heads in another order keep the same tokens"),
        (IsNaN(), "score changes neither what it sees nor the state"),
        (ForgetsState(), "score changes neither what it sees nor the state"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_a_policy_that_breaks_an_invariant_is_told_which(policy, invariant):
    report = check_policy(policy).set_index("invariant")
    assert not report.loc[invariant, "holds"]
    assert report.loc[invariant, "detail"]


def test_a_sound_policy_passes():
    assert check_policy(Good())["holds"].all()
