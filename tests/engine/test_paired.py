"""Timing by pairs: who goes when, what a window is, what counts as useful. Clocks are fakes; no time is judged."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import prompts, small_policy
from hypothesis import given
from hypothesis import strategies as st

from kvlib.engine.decoder import Decoder, Request
from kvlib.engine.paired import Arm, fill, order_of, take_turns, useful_tokens, windows_of
from kvlib.engine.sampling import Sampling
from kvlib.stats import paired_ratio


@given(st.integers(1, 9), st.integers(0, 50))
def test_every_arm_stands_in_every_place_equally_often_and_before_every_other_half_the_time(n, start):
    names = [str(i) for i in range(n)]
    orders = [order_of(names, turn) for turn in range(2 * start, 2 * (start + n))]
    assert all(sorted(order) == names for order in orders)
    assert set(Counter((name, order.index(name)) for order in orders for name in order).values()) == {2}
    before = Counter((a, b) for order in orders for i, a in enumerate(order) for b in order[i + 1 :])
    assert set(before.values()) <= {n}
    assert order_of(names, 2 * start + 1) == order_of(names, 2 * start)[::-1], "a drift hits both ends alike"


@given(st.integers(1, 1000))
def test_windows_are_short_and_make_up_all_steps(n_steps):
    windows = windows_of(n_steps)
    assert sum(windows) == n_steps and max(windows) <= 12 and min(windows) >= 1


class FakeArm:
    """Each step takes `cost`, times what the machine does to whoever runs at that moment."""

    def __init__(self, clock, cost):
        self.clock, self.cost, self.steps = clock, cost, 0

    def advance(self, n):
        self.steps += n
        for _ in range(n):
            self.clock.now += self.cost * (1 + self.clock.now // 100 % 3)


class FakeClock:
    now = 0.0

    def __call__(self):
        return self.now


def test_arms_take_the_same_steps_in_turn_and_a_drifting_machine_drops_out_of_their_ratio():
    clock = FakeClock()
    arms = {"full": FakeArm(clock, 2.0), "96": FakeArm(clock, 1.0), "control": FakeArm(clock, 2.0)}
    seconds = {name: [] for name in arms}
    for number in range(8):
        for name, windows in take_turns(arms, [3, 3, 1], number, "cpu", clock).items():
            seconds[name].append(windows)
    assert {arm.steps for arm in arms.values()} == {8 * 7}
    assert all(len(windows) == 3 for rounds in seconds.values() for windows in rounds)
    twice, same = paired_ratio(seconds["96"], seconds["full"]), paired_ratio(seconds["control"], seconds["full"])
    assert twice.low <= 2 <= twice.high and same.low <= 1 <= same.high
    assert 1.5 < twice.ratio < 2.5 and 0.75 < same.ratio < 1.33


def test_goodput_counts_tokens_up_to_the_first_end_of_each_row_and_the_end_itself():
    output = torch.tensor([[5, 1, 7, 1], [5, 6, 7, 8], [1, 1, 1, 1], [5, 6, 7, 2]])
    assert useful_tokens(output, (1, 2)) == 2 + 4 + 1 + 4
    assert useful_tokens(output, ()) == 16


def arm(model, name: str, n_rows: int = 2) -> Arm:
    requests = [Request(str(row), prompt, row) for row, prompt in enumerate(prompts(n_rows))]
    decoder = Decoder(
        model, small_policy(name), 28, n_rows=n_rows, n_prompt_max=12, max_new_tokens=41, sampling=Sampling(1.0),
        eos_ids=(),
    )  # fmt: skip
    return Arm(decoder, requests)


@pytest.mark.parametrize("name", ["window", "h2o", "rkv", "dynts"])
def test_an_arm_starts_again_where_it_started_whatever_its_cache_was_filled_with(qwen2, name):
    its = arm(qwen2, name)
    its.start()
    for _ in range(3):
        fill(its.decoder, np.full(2, 28))
        its.advance(1)
    assert all(its.decoder.rows.rounds), "a full row has a round in its next step"
    outputs = []
    for _ in range(2):
        its.start()
        its.advance(40)
        outputs.append(its.output().clone())
    fresh = arm(qwen2, name)
    fresh.start()
    fresh.advance(40)
    assert torch.equal(outputs[0], fresh.output()) and torch.equal(outputs[0], outputs[1])


def test_an_output_that_is_not_finite_is_refused(qwen2):
    its = arm(qwen2, "window")
    its.start()
    its.decoder.finite.fill_(False)
    with pytest.raises(FloatingPointError, match="not finite"):
        its.output()
