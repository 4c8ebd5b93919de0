"""What the host knows of each row, by arithmetic alone: it never asks the device for a length."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvlib.policies import Policy

Kept = list[list[list[int]]]
"""Positions that survived a round, ascending, by layer and KV head; one of either where the keep set is shared."""


@dataclass(frozen=True)
class Request:
    """One sample to decode: prompt ids, and the key of its noise (kvlib.engine.noise.key)."""

    id: str
    prompt: tuple[int, ...]
    noise_key: int


@dataclass(frozen=True)
class Completion:
    """A decoded request. tokens end with the end-of-sequence id iff stop is "eos"; other stops: "length", "stopped".

    held: slots per KV head in use after each token; rounds: evictions. kept, if traced: after each round, the number
    of tokens seen and what survived.
    """

    request: Request
    tokens: tuple[int, ...]
    stop: str
    held: tuple[int, ...]
    rounds: int
    kept: tuple[tuple[int, Kept], ...] = ()


class Rows:
    """requests: what each of B rows decodes, None where it is idle; n_prompt, n_made, n_held `[B]`: tokens of the
    prompt, tokens made and slots held; limit `[B]`: a round comes when more are held; held `[B, max_new_tokens]`: slots
    after each token; rounds: tokens seen at each round of a row; kept: as Completion.kept.
    """

    def __init__(self, policy: Policy, kv_budget: int | None, n_rows: int, max_new_tokens: int):
        self.policy, self.kv_budget, self.max_new_tokens = policy, kv_budget, max_new_tokens
        self.requests: list[Request | None] = [None] * n_rows
        self.n_prompt, self.n_made, self.n_held, self.limit = (np.zeros(n_rows, dtype=np.int64) for _ in range(4))
        self.held = np.zeros((n_rows, max_new_tokens), dtype=np.int32)
        self.rounds: list[list[int]] = [[] for _ in range(n_rows)]
        self.kept: list[list[tuple[int, Kept]]] = [[] for _ in range(n_rows)]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def n_seen(self) -> np.ndarray:
        """Tokens so far `[B]`, the prompt and the one just sampled included."""
        return self.n_prompt + self.n_made

    @property
    def live(self) -> np.ndarray:
        """Bool `[B]`: the rows that a step moves on."""
        return np.array([request is not None for request in self.requests]) & (self.n_made < self.max_new_tokens)

    def admit(self, row: int, request: Request) -> None:
        """The row has read its prompt and made its first token."""
        P = len(request.prompt)
        self.requests[row] = request
        self.n_prompt[row], self.n_made[row], self.n_held[row], self.held[row, 0] = P, 1, P, P
        self.rounds[row], self.kept[row] = [], []
        self._set_limit(row)

    def due(self, live: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """The rows that hold more than their limit, together where they hold equally many: (rows `[R]`, n_live)."""
        if self.kv_budget is not None:
            due = live & (self.n_held > self.limit)
            for n_live in np.unique(self.n_held[due]):
                yield np.flatnonzero(due & (self.n_held == n_live)), int(n_live)

    def n_keep(self, rows: np.ndarray, n_live: int) -> np.ndarray:
        """Slots that a round on these rows, each holding n_live, would leave now."""
        counts = zip(self.n_prompt[rows].tolist(), self.n_seen[rows].tolist(), strict=True)
        return np.minimum([self.policy.keep(self.kv_budget, *row) for row in counts], min(n_live, self.kv_budget))

    def evicted(self, rows: np.ndarray, n_live: int, n_keep: np.ndarray) -> list[int]:
        """A round left n_keep `[R]` slots of n_live. Returns the rows that lost some."""
        self.n_held[rows] = n_keep
        for row in rows:
            self._set_limit(row)
        lost = rows[n_keep < n_live].tolist()
        for row in lost:
            self.rounds[row].append(int(self.n_seen[row]))
        return lost

    def made(self, live: np.ndarray) -> None:
        """The live rows have made a token each."""
        rows = np.flatnonzero(live)
        self.held[rows, self.n_made[rows]] = self.n_held[rows]
        self.n_made += live

    def completion(self, row: int, tokens: list[int], stop: str) -> Completion:
        """What the row has decoded, as if it had stopped after these tokens."""
        n, n_seen = len(tokens), int(self.n_prompt[row]) + len(tokens)
        return Completion(
            request=self.requests[row],
            tokens=tuple(tokens),
            stop=stop,
            held=tuple(self.held[row, :n].tolist()),
            rounds=sum(at < n_seen for at in self.rounds[row]),
            kept=tuple(kept for kept in self.kept[row] if kept[0] < n_seen),
        )

    def _set_limit(self, row: int) -> None:
        if self.kv_budget is not None:
            limit = self.policy.limit(self.kv_budget, int(self.n_prompt[row]), int(self.n_held[row]))
            self.limit[row] = min(self.kv_budget, limit)
