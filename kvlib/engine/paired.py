"""Arms timed side by side: they advance through the same steps in turns, and what slows the machine slows all alike.

A second full cache among the arms, the control, tells how far that holds (kvlib.stats.paired_ratio and too_busy).
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvlib.engine.decoder import Decoder, Request

WINDOW = 4
"""Steps of a turn: some tens of milliseconds of a small model, in which a machine's mood hardly changes."""


class Arm:
    """A decoder and the requests of its rows, which can be started again."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request]):
        self.decoder, self.requests = decoder, requests

    def start(self) -> None:
        """Prefill every row, whatever it held; yields the first token."""
        for row, request in enumerate(self.requests):
            self.decoder.admit(row, request)

    def advance(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.decoder.step()

    def output(self) -> Tensor:
        """Tokens `[B, n]` since the start. Raises FloatingPointError for logits or scores that are not finite."""
        self.decoder.check_finite()
        return self.decoder.output[:, : int(self.decoder.rows.n_made[0])]

    def phase_seconds(self) -> dict[str, float]:
        return self.decoder.meter.seconds()


def order_of(names: Sequence[str], turn: int) -> list[str]:
    """Who goes when: A B C, C B A, B C A, A C B, ... In 2n turns each of n stands in every place twice."""
    first = turn // 2 % len(names)
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if turn % 2 else rotated


def windows_of(n_steps: int) -> list[int]:
    """n_steps in turns of WINDOW, the last one shorter."""
    return [min(WINDOW, n_steps - start) for start in range(0, n_steps, WINDOW)]


def take_turns(
    arms: dict, windows: Sequence[int], n_round: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Advance every arm through the windows (steps in each), all arms in turn; seconds of each window by arm.

    n_round: of the rounds that are compared, so that the order goes on where the last one's ended.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i, n_steps in enumerate(windows):
        for name in order_of(list(arms), n_round * len(windows) + i):
            seconds[name].append(timed(lambda name=name, n=n_steps: arms[name].advance(n), device, clock))
    return seconds


def timed(work: Callable[[], None], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the device's work included."""
    synchronise(device)
    started = clock()
    work()
    synchronise(device)
    return clock() - started


def fill(decoder: Decoder, held: np.ndarray) -> None:
    """As if every row had decoded `held` tokens (the prompt included): random keys, values and state in the slots.

    Where max_new_tokens has no room for so many, one is left to decode.
    """
    cache, n = decoder.cache, torch.from_numpy(held).to(decoder.device)
    cache.keys.normal_()
    cache.values.normal_()
    for state in cache.state.values():
        state.uniform_()
    slot = torch.arange(cache.shape.n_slots, dtype=torch.int32, device=decoder.device)
    cache.positions.copy_(torch.where(slot < n[:, None], slot, -1)[None, :, None])
    cache.lengths.copy_(n)
    rows = decoder.rows
    rows.n_made[:] = np.minimum(held - rows.n_prompt + 1, rows.max_new_tokens - 1)
    rows.n_held[:] = held
    decoder.position.copy_(torch.from_numpy(rows.n_seen - 1))


def useful_tokens(output: Tensor, eos_ids: Sequence[int]) -> int:
    """Of outputs `[B, n]`, the tokens up to the first end of each, the end included: what goodput counts, by
    the seconds of prefill and of every step that made them."""
    ends = torch.isin(output, torch.tensor(list(eos_ids), device=output.device))
    return int(torch.where(ends.any(1), ends.int().argmax(1) + 1, output.shape[1]).sum())


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
