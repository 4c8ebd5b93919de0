"""Every clock and every synchronisation."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import torch

MOST_EVENTS = 6000
"""Pairs of CUDA events that are held, 2,000 steps, before the clock waits for the device and adds them up."""


class Meter:
    """Seconds per phase ("prefill", "forward", "evict", "sample"), by the clock; on CUDA by events, read at the end."""

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._cuda = clock, torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str):
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            if len(self._events) >= MOST_EVENTS:
                self.seconds()
        else:
            started = self._clock()
            yield
            self._seconds[name] += self._clock() - started

    def seconds(self) -> dict[str, float]:
        """Totals so far; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
