"""Prefill and decode under a KV budget: the loop, the eviction clock, sampling and row refill."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvlib.engine.attention import CHANGING
from kvlib.engine.evict import evict, split
from kvlib.engine.fast import FastModel, why_not_fast
from kvlib.engine.general import GeneralModel, check_decodes
from kvlib.engine.graph import Graph, Pool
from kvlib.engine.meter import Meter
from kvlib.engine.rows import Completion, Request, Rows
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError
from kvlib.policies import Policy
from kvlib.policies.base import Round

ROUND_BYTES = 2**29
"""Of the keys, in float32, that a policy looks at together in a round; what it makes of them is a few times that."""
FINISH_LAG = 8
"""Steps between two looks at the end-of-sequence flags, for which the host waits."""


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


class Decoder:
    """Rows that decode side by side. The host mirrors every length arithmetically and never asks the device for one.

    A step is two pieces of work on tensors that stay where they are, forward and sampling, and rounds between them;
    on CUDA each is captured as a graph. What changes from step to step is on the device; the host writes to it when a
    row starts, stops or has a round, and waits for it in `finished` only. Prefill is plain: once per problem, of any
    length, it is a ten-thousandth of a run.
    """

    def __init__(
        self,
        model,
        policy: Policy,
        kv_budget: int | None,
        *,
        n_rows: int,
        n_prompt_max: int,
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Sequence[int],
        answer_id: int | None = None,
        meter: Meter | None = None,
        trace: bool = False,
    ):
        """kv_budget: most slots a KV head holds between steps; None exactly for a policy that never evicts.

        answer_id: the token (`</think>`) from which on a row is answering. trace: record Completion.kept.
        """
        if policy.evicts != (kv_budget is not None):
            raise ConfigError(
                f"{type(policy).__name__} needs a kv_budget" if policy.evicts else "policy 'full' takes no kv_budget"
            )
        if policy.reindex and torch.finfo(model.dtype).bits < 32:
            raise ConfigError(
                f"reindex turns stored keys again in each round, and in {model.dtype} their rounding adds up to noise; "
                "use dtype float32, or reindex=False"
            )
        self.policy, self.kv_budget, self.sampling, self.trace = policy, kv_budget, sampling, trace
        self.rows = Rows(policy, kv_budget, n_rows, max_new_tokens)
        n_positions = n_prompt_max + max_new_tokens
        n_slots = n_positions if kv_budget is None else kv_budget + 1
        self.model = step_for(model, policy, n_rows, n_slots, n_positions)
        self.cache = self.model.cache
        self.device = self.cache.keys.device
        self.meter = meter or Meter(self.device)
        self.answer_id = answer_id
        try:
            self._allocate(n_rows, max_new_tokens, eos_ids)
        except BaseException:
            self.close()
            raise

    def _allocate(self, n_rows: int, max_new_tokens: int, eos_ids: Sequence[int]) -> None:
        self.eos_ids = frozenset(eos_ids)
        self.eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=self.device)

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(n_rows, dtype=dtype, device=self.device)

        self.token, self.position, self.noise_key = zeros(torch.int64), zeros(torch.int64), zeros(torch.int64)
        self.first = zeros(torch.int64)
        self.done, self.answering, self.live = zeros(torch.bool), zeros(torch.bool), zeros(torch.bool)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.output = torch.zeros(n_rows, max_new_tokens + 1, dtype=torch.int64, device=self.device)
        self.was_live = np.zeros(n_rows, dtype=bool)
        self.logits = torch.zeros(n_rows, self.model.vocab_size, dtype=self.cache.keys.dtype, device=self.device)
        self.n_max = 1
        # Their replays follow one another on one stream, so they can share what they allocate inside.
        self.pool = Pool() if self.device.type == "cuda" else None
        self.forward = Decoder._forward  # of the general step n_max is a part, and its modules may wait for the device
        if self.model.name == "fast":
            self.forward = Graph("forward", Decoder._forward, self.device, self.pool)
        self.sample = Graph("sampling", Decoder._sample, self.device, self.pool)
        self.round_graphs: dict[int, tuple[Tensor, Round, Graph]] = {}

    @torch.inference_mode()
    def admit(self, row: int, request: Request) -> None:
        """Prefill the prompt alone, unpadded, into `row`, and sample its first token."""
        P = len(request.prompt)
        if self.kv_budget is not None:
            self.policy.check(self.kv_budget, P, request.id)
        with self.meter.phase("prefill"):
            ids = torch.tensor(request.prompt, device=self.device)
            hidden, logits = self.model.prefill(row, ids)
            self._check(logits)
            self.answering[row] = False
            for name, score in self._creation_scores(hidden, ids, torch.zeros_like(ids, dtype=torch.bool)):
                self.cache.state[name][:, row, :, :P] = score.transpose(1, 2)
            self.noise_key[row], self.done[row] = request.noise_key, False
            self.position[row] = self.first[row] = P
            self.token[row] = self.sampling(
                logits[None], self.noise_key[row, None], torch.zeros_like(self.position[row, None])
            )[0]
            self.output[row, 0] = self.token[row]
            self.done[row] = torch.isin(self.token[row], self.eos)
        self.rows.admit(row, request)

    @torch.inference_mode()
    def step(self) -> None:
        """Feed every row's last token, evict where a row is over its budget, sample the next token."""
        rows = self.rows
        live = rows.live
        if (live != self.was_live).any():
            self.live.copy_(torch.from_numpy(live))
            self.was_live = live
        self.n_max = int(rows.n_held.max()) + 1
        with self.meter.phase("forward"):
            self.forward(self)
        with self.meter.phase("evict"):
            rows.n_held += live
            for due, n_live in rows.due(live):
                self._evict(due, n_live)
        with self.meter.phase("sample"):
            self.sample(self)
        rows.made(live)

    def _forward(self) -> None:
        """The logits after every row's last token, which takes the row's next slot."""
        cache = self.cache
        hidden, logits = self.model.step(self.token, self.position, self.n_max)
        self._check(logits)
        if self.answer_id is not None:
            self.answering |= self.token == self.answer_id
        for name, score in self._creation_scores(hidden, self.token, self.answering):
            cache.state[name][:, cache.rows, :, cache.lengths] = score.transpose(0, 1)
        cache.lengths += self.live
        self.logits.copy_(logits)

    def _sample(self) -> None:
        made = self.position - self.first + 1
        self.token.copy_(self.sampling(self.logits, self.noise_key, made))
        self.position += self.live
        self.output.scatter_(1, made[:, None], self.token[:, None])
        self.done |= torch.isin(self.token, self.eos)

    def finished(self, watch: "Watch | None" = None) -> list[tuple[int, Completion]]:
        """Rows that ended, as (row, Completion), now idle. Waits for the device."""
        self.check_finite()
        rows, eos = self.rows, self.eos_ids
        ended = self.done.cpu().numpy() | (rows.n_made >= rows.max_new_tokens)
        seen = [row for row, request in enumerate(rows.requests) if request is not None and (watch or ended[row])]
        made = {}
        for row in seen:
            tokens = self.output[row, : rows.n_made[row]].tolist()
            made[row] = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in eos), None)]
        stops = watch([(rows.requests[row], made[row]) for row in seen]) if watch and seen else {}
        completions = []
        for row in seen:
            n, tokens = stops.get(rows.requests[row].id), made[row]
            if n is not None:
                completions.append((row, rows.completion(row, tokens[:n], "stopped")))
            elif ended[row]:
                completions.append((row, rows.completion(row, tokens, "eos" if tokens[-1] in eos else "length")))
        for row, _ in completions:
            rows.requests[row] = None
        return completions

    def check_finite(self) -> None:
        """Raise FloatingPointError if logits or scores were not finite. Waits for the device."""
        if not self.finite.item():
            raise FloatingPointError(
                "the model's logits or a policy's scores are not finite; use dtype bfloat16 or float32"
            )

    def close(self) -> None:
        """Leave the model as it was before; no step may follow."""
        self.model.close()

    def _evict(self, due: np.ndarray, n_live: int) -> None:
        """A round on the rows `due`, each holding n_live slots."""
        n_keep = self.rows.n_keep(due, n_live)
        if self.device.type != "cuda":
            self.evict_rows(self.round(due, n_live, n_keep))
        else:
            for part in graph_sizes(len(due), len(self.rows)):
                self.replay_round(due[part], n_live, n_keep[part])
        for row in self.rows.evicted(due, n_live, n_keep):
            if self.trace:
                positions = self.cache.positions[:, row, :, : self.rows.n_held[row]].sort(-1).values
                self.rows.kept[row].append((self.rows.rounds[row][-1], positions.tolist()))

    def evict_rows(self, due: Round) -> None:
        """A round, in slices of as many rows as leave its memory small, whatever the policy reads of them."""
        shape = self.cache.shape
        row = 4 * shape.n_layers * shape.n_kv_heads * due.n_live * shape.head_dim
        for part in split(due, max(1, ROUND_BYTES // row)):
            _, finite = evict(self.cache, self.policy, part)
            self.finite &= finite

    def replay_round(self, due: np.ndarray, n_live: int, n_keep: np.ndarray) -> None:
        """A round of a number of rows that has a graph (graph_sizes); below the budget, a plain round."""
        if n_live != self.kv_budget + 1:
            self.evict_rows(self.round(due, n_live, n_keep))
            return
        if len(due) not in self.round_graphs:
            packed = self._packed(due, n_keep)
            graph = Graph(f"a round of {len(due)}", Decoder.evict_rows, self.device, self.pool)
            self.round_graphs[len(due)] = packed, self._round_of(packed, n_live), graph
        packed, fixed, graph = self.round_graphs[len(due)]
        packed.copy_(self._packed(due, n_keep))
        graph(self, fixed)

    def round(self, due: np.ndarray, n_live: int, n_keep: np.ndarray) -> Round:
        """What a round on the rows `due`, each holding n_live slots, would be now."""
        return self._round_of(self._packed(due, n_keep), n_live)

    def _packed(self, due: np.ndarray, n_keep: np.ndarray) -> Tensor:
        """int64 `[5, R]`, sent to the device in one piece: what a round knows by row (Round.by_row)."""
        rows = self.rows
        noise = [rows.requests[row].noise_key for row in due]
        packed = torch.from_numpy(np.array([due, rows.n_prompt[due], n_keep, noise, rows.n_seen[due]], dtype=np.int64))
        return packed.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else packed

    def _round_of(self, packed: Tensor, n_live: int) -> Round:
        by_row = dict(zip(Round.by_row, packed.unbind(0), strict=True))
        model = self.model
        return Round(self.kv_budget, n_live=n_live, scaling=model.scaling, inv_freq=model.inv_freq, **by_row)

    def _check(self, logits: Tensor) -> None:
        """Note it if a logit is not finite, in one pass: a sum is finite only where every term is."""
        self.finite &= logits.sum(dtype=torch.promote_types(logits.dtype, torch.float32)).isfinite()

    def _creation_scores(self, hidden: Tensor, token_ids: Tensor, answering: Tensor) -> list[tuple[str, Tensor]]:
        """(name, score `[L or 1, B, H or 1]`) of B new tokens."""
        scores = self.policy.creation_score(hidden, token_ids, answering)
        return [(name, score if score.dim() == 3 else score[None, :, None]) for name, score in scores.items()]


def graph_sizes(n_due: int, n_rows: int) -> list[slice]:
    """n_due rows in parts of all rows, or of 1, 2, 4, 8, ... rows, so that few graphs serve whatever is due."""
    parts, start = [], 0
    while start < n_due:
        n = n_rows if n_due == n_rows else 1 << ((n_due - start).bit_length() - 1)
        parts.append(slice(start, start + n))
        start += n
    return parts


Watch = Callable[[list[tuple[Request, list[int]]]], dict[str, int]]
"""Sees what every row has made so far, and says by request id after how many of these tokens one stops."""


def decoder_for(
    model, policy: Policy, kv_budget: int | None, requests: Sequence[Request], *, n_rows: int | None = None, **settings
) -> Decoder:
    """A decoder with room for these requests, in a row each or in n_rows; settings: those of Decoder.

    Greedy, and to the last token, unless settings say otherwise. Raises ConfigError naming the first prompt, longest
    first, that does not fit into the budget.
    """
    by_length = {len(request.prompt): request.id for request in reversed(requests)}
    if policy.evicts and kv_budget is not None:
        for n in sorted(by_length, reverse=True):
            policy.check(kv_budget, n, by_length[n])
    settings = {"sampling": Sampling(0.0), "eos_ids": (), **settings}
    return Decoder(model, policy, kv_budget, n_rows=n_rows or len(requests), n_prompt_max=max(by_length), **settings)


def completions(
    decoder: Decoder, requests: Sequence[Request], done: Collection[str] = (), watch: Watch | None = None
) -> Iterator[Completion]:
    """Decode the requests but those done (ids), and yield completions as rows end.

    A row that ends takes the next request, whichever it is: what a row decodes does not depend on where it stands.
    watch is called every FINISH_LAG steps.
    """
    waiting = deque(request for request in requests if request.id not in done)
    for row in range(min(len(decoder.rows), len(waiting))):
        decoder.admit(row, waiting.popleft())
    while any(request is not None for request in decoder.rows.requests):
        for _ in range(FINISH_LAG):
            decoder.step()
        for row, completion in decoder.finished(watch):
            yield completion
            if waiting:
                decoder.admit(row, waiting.popleft())
