"""Teacher-forced replay: what a policy loses on a trace that the full cache wrote, round by round.

Every policy reads the same tokens, so that keep sets, attention and predictions can be compared where free-running
outputs would have parted. One recorded trace of T tokens takes 4 * L * H * T * T bytes of attention.
"""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm, trange

from kvlib.cell import build_decoder, prepare
from kvlib.config import Cell, RunConfig
from kvlib.engine import noise
from kvlib.engine.attention import causal_mask, observe_trace
from kvlib.engine.decoder import Decoder, Request, completions, decoder_for
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.fitted import fill
from kvlib.kernels.attention import attention_probabilities
from kvlib.models import Reasoner, load_reasoner
from kvlib.policies import Full, Golden, Policy, make_policy
from kvlib.policies.base import wide
from kvlib.record import explained
from kvlib.stats import wilson_interval
from kvlib.tasks.chains import DIGITS, NAMES, value_drill

N_FACTS, N_ASKED = 14, 56
DISTANCES = (0, 16, 32, 64, 128, 256, 512, 1024)

Kept = Sequence[Sequence[Sequence[int]]]
"""Positions that stayed in a round, by layer and KV head (one where the keep set is shared), as Completion.kept."""


@dataclass(frozen=True)
class Recording:
    """A trace of T tokens, prompt and output, and what the full cache computed on it; float32, on the model's device.

    queries `[L, HQ, T, D]`, keys `[L, H, T, D]` (after RoPE), values `[L, H, T, D]`. attention `[L, H, T, T]`: what
    each query (row) pays to each position (column), summed over the query heads of a KV head, so that a row sums to G.
    """

    request: Request
    tokens: tuple[int, ...]
    queries: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor
    scaling: float

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.tokens)


@torch.inference_mode()
def record_trace(reasoner: Reasoner, request: Request, tokens: Sequence[int]) -> Recording:
    """One pass of the full cache over the request's prompt and its output `tokens`. Raises ConfigError without output.

    The request's noise drives the policies that draw, such as random eviction, in every replay.
    """
    if not tokens:
        raise ConfigError(f"the output of {request.id} is empty, so nothing can be replayed; record a finished output")
    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    scales: list[float] = []

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        grouped, visible = query.unflatten(0, (len(key), -1)), causal_mask(query.shape[1], query.device)
        attention = attention_probabilities(grouped, key[:, None], visible, scaling).sum(1)
        layers.append((query.float(), key.float(), value.float(), attention.float()))
        scales.append(scaling)

    observe_trace(reasoner.model, (*request.prompt, *tokens), observe)
    tensors = [torch.stack(several) for several in zip(*layers, strict=True)]
    return Recording(request, tuple(tokens), *tensors, scaling=scales[0])


class TeacherForcing:
    """The `sampling` of a Decoder that returns the recordings' tokens and notes what the model would have said.

    against: that of the full cache, whose rows stand in the same places and which was asked first; None: this is it.
    predicted int64, logprob and divergence float64, agrees bool, `[B, T]`; see Replay.
    """

    def __init__(self, recordings: Sequence[Recording], against: "TeacherForcing | None" = None):
        device, outputs = recordings[0].keys.device, [torch.tensor(recording.tokens) for recording in recordings]
        self.keys = torch.tensor([recording.request.noise_key for recording in recordings], device=device)
        self.tokens = nn.utils.rnn.pad_sequence(outputs, batch_first=True).to(device)
        self.predicted = torch.zeros_like(self.tokens)
        self.agrees = torch.ones_like(self.tokens, dtype=torch.bool)
        self.logprob = torch.zeros_like(self.tokens, dtype=torch.float64)
        self.divergence = torch.zeros_like(self.logprob)
        self.against, self.said = against, torch.zeros(0, device=device)

    def __call__(self, logits: Tensor, request: Tensor, step: Tensor) -> Tensor:
        row = (request[:, None] == self.keys).int().argmax(1)
        token, said = self.tokens[row, step], wide(logits).log_softmax(-1)
        self.predicted[row, step] = said.argmax(-1)
        self.logprob[row, step] = said.gather(-1, token[:, None])[:, 0].double()
        if self.against:
            full = self.against
            theirs = (self.keys[row, None] == full.keys).int().argmax(1)
            self.agrees[row, step] = said.argmax(-1) == full.predicted[theirs, step]
            expected = full.said[theirs]
            self.divergence[row, step] = (expected.exp() * (expected - said)).sum(-1).double()
        else:
            self.said = self.said if len(self.said) else said.new_zeros(len(self.keys), said.shape[-1])
            self.said[row] = said
        return token


@dataclass(frozen=True)
class Replay:
    """A recording of n output tokens read under one policy.

    predicted int64 `[n]`: the model's argmax in place of each output token; agrees bool `[n]`: whether the full cache's
    is the same; logprob `[n]`: that of the recorded token, in nats; divergence `[n]`: KL from the full cache's
    distribution of the next token, in nats; kept: as Completion.kept. rounds has one row per round that queries follow,
    and row 0 for the time before the first: round, n_seen (tokens so far), n_queries (until the next round), recall
    (attention_recall) and error (output_error).
    """

    recording: Recording
    predicted: Tensor
    agrees: Tensor
    logprob: Tensor
    divergence: Tensor
    kept: tuple[tuple[int, Kept], ...]
    rounds: pd.DataFrame

    @property
    def accuracy(self) -> float:
        """The share of the output's tokens that the model would have said."""
        return (self.predicted == torch.tensor(self.recording.tokens).to(self.predicted)).double().mean().item()

    def mean(self, column: str) -> float:
        """Of recall (1 before the first round) or error (0 before it), over the output's queries; NaN without one."""
        n = self.rounds["n_queries"].sum()
        return float((self.rounds[column] * self.rounds["n_queries"]).sum() / n) if n else math.nan


Replays = Mapping[tuple[str, int | None], Sequence[Replay]]
"""Replays of the same recordings by (arm, KV budget); an arm is a policy with its settings."""


def replay(
    reasoner: Reasoner,
    policies: Mapping[str, Policy | Callable[[Recording], Policy]],
    kv_budgets: Sequence[int | None],
    recordings: Sequence[Recording],
) -> Replays:
    """The recordings read by the full cache ("full", None), and under every policy at each budget, side by side.

    All decoders go through the same tokens in step. A policy that is a function of the recording reads each alone.
    Raises ConfigError where the decoder does: a prompt, or what is protected, that does not fit into the budget.
    """
    reference = TeacherForcing(recordings)
    reads = [("full", None, Full(), recordings, reference)]
    for kv_budget, (name, policy) in itertools.product(kv_budgets, policies.items()):
        if isinstance(policy, Policy):
            reads.append((name, kv_budget, policy, recordings, TeacherForcing(recordings, reference)))
        else:
            alone = ([recording] for recording in recordings)
            reads += [(name, kv_budget, policy(one[0]), one, TeacherForcing(one, reference)) for one in alone]
    with ExitStack() as stack:
        decoders = []
        for _, kv_budget, policy, group, forcing in reads:
            settings = {"max_new_tokens": forcing.tokens.shape[1], "answer_id": reasoner.answer_id, "trace": True}
            requests = [recording.request for recording in group]
            decoders.append(decoder_for(reasoner.model, policy, kv_budget, requests, sampling=forcing, **settings))
            stack.callback(decoders[-1].close)
            for row, request in enumerate(requests):
                decoders[-1].admit(row, request)
        for step in trange(1, reference.tokens.shape[1], desc="replay", unit="token", delay=3, mininterval=10):
            for decoder in decoders:
                if step < decoder.rows.max_new_tokens:
                    decoder.step()
        replays = defaultdict(list)
        read = tqdm(zip(reads, decoders, strict=True), desc="compare", total=len(reads), unit="policy", delay=3)
        for (name, kv_budget, _, group, forcing), decoder in read:
            replays[name, kv_budget] += _replays(decoder, group, forcing)
    return dict(replays)


def _replays(decoder: Decoder, group: Sequence[Recording], forcing: TeacherForcing) -> Iterator[Replay]:
    """Of a decoder that went through all tokens of these recordings."""
    n_tokens = {recording.request.id: len(recording.tokens) for recording in group}
    done = dict(decoder.finished(lambda seen: {request.id: n_tokens[request.id] for request, _ in seen}))
    for row, recording in enumerate(group):
        noted = (forcing.predicted, forcing.agrees, forcing.logprob, forcing.divergence)
        noted = [one[row, : len(recording.tokens)] for one in noted]
        yield Replay(recording, *noted, done[row].kept, _fidelity_by_round(recording, done[row].kept))


def golden_like(policy: Policy) -> Callable[[Recording], Policy]:
    """Keep what the recording itself will attend to, under the protection and trigger of a policy."""
    terms = {name: getattr(policy, name) for name in ("n_sink", "n_recent", "buffer", "protect_prompt")}
    return lambda recording: Golden(attention=recording.attention, **terms)


def record_outputs(reasoner: Reasoner, config: RunConfig, n: int) -> list[Recording]:
    """Decode the first n problems of a config of the full cache, and record their outputs."""
    requests = prepare(replace(config, n_problems=n)).requests[:n]
    decoder = build_decoder(config, reasoner, requests, n_rows=n)
    done = {completion.request.id: completion for completion in completions(decoder, requests)}
    return [record_trace(reasoner, request, done[request.id].tokens) for request in requests]


def fitted_arms(cells: Sequence[Cell], model: str, reasoner: Reasoner) -> dict[str, Policy]:
    """The policies of a comparison's cells by arm, fitted to the model: those with the prompt protected."""
    configs = {cell.arm: cell.config for cell in cells if cell.protected}
    return {
        arm: fill(make_policy(config.policy, **config.policy_options), model, reasoner)
        for arm, config in configs.items()
    }


def measure_fidelity(cells: Sequence[Cell], results: Path, n_traces: int = 30) -> None:
    """Replay the first n_traces outputs of a comparison's full cache under all its arms; write results/replays.csv.

    Of its first model and dataset, at every KV budget, the prompt protected; columns as `fidelity` has them.
    """
    full = next(cell.config for cell in cells if cell.arm == "full")
    ours = [cell for cell in cells if cell.protected and cell.config.model == full.model]
    reasoner, kv_budgets = load_reasoner(full.model, full.dtype, full.device), {cell.config.kv_budget for cell in ours}
    recordings = record_outputs(reasoner, full, n_traces)
    rows = fidelity(replay(reasoner, fitted_arms(ours, full.model, reasoner), sorted(kv_budgets), recordings))
    with explained(results):
        write_atomically(results / "replays.csv", rows.to_csv(index=False).encode())
    print(f"wrote {results / 'replays.csv'}")


def _fidelity_by_round(recording: Recording, kept: Sequence[tuple[int, Kept]]) -> pd.DataFrame:
    # The last output token is predicted and never read, so it asks nothing of the cache.
    P, end = recording.n_prompt, len(recording.ids) - 1
    starts = [(P, [[list(range(P))]]), *kept]
    rows = []
    for i, (n_seen, positions) in enumerate(starts):
        until = starts[i + 1][0] if i + 1 < len(starts) else end
        if until > n_seen:
            recall = attention_recall(recording.attention, positions, n_seen, until)
            error = output_error(recording, positions, n_seen, until)
            rows.append((i, n_seen, until - n_seen, recall, error))
    return pd.DataFrame(rows, columns=["round", "n_seen", "n_queries", "recall", "error"])


def _held(kept: Kept, n_seen: int, until: int, device: torch.device) -> Tensor:
    """Bool `[L or 1, H or 1, until - n_seen, until]`: what the queries n_seen .. until - 1 still see."""
    mask = torch.zeros(len(kept), len(kept[0]), until, dtype=torch.bool)
    for layer, heads in enumerate(kept):
        for head, positions in enumerate(heads):
            mask[layer, head, positions] = True
    mask[..., n_seen:] = True
    return mask.to(device)[:, :, None] & causal_mask(until, device)[n_seen:]


def attention_recall(attention: Tensor, kept: Kept, n_seen: int, until: int) -> float:
    """Share of the full cache's attention by queries n_seen .. until - 1 that falls on slots still held, in [0, 1].

    attention `[L, H, T, T]`; kept: what the round at n_seen tokens left; slots appended since then are held. Mean over
    layers and KV heads.
    """
    mass = attention[:, :, n_seen:until, :until]
    held = (mass * _held(kept, n_seen, until, attention.device)).sum((2, 3))
    return (held / mass.sum((2, 3))).mean().item()


def output_error(recording: Recording, kept: Kept, n_seen: int, until: int) -> float:
    """||o - o'|| / ||o|| of queries n_seen .. until - 1: o of the full cache, o' of its queries over held slots only.

    The norms are over the round's queries and the head's dimensions, per layer and query head, so that one query whose
    output is near zero cannot dominate; then the mean over layers and query heads.
    """
    H = recording.keys.shape[1]
    queries = recording.queries[:, :, n_seen:until].unflatten(1, (H, -1))
    keys, values = recording.keys[:, :, None, :until], recording.values[:, :, None, :until]
    device = queries.device

    def output(visible: Tensor) -> Tensor:
        return attention_probabilities(queries, keys, visible, recording.scaling) @ values

    full = output(causal_mask(until, device)[n_seen:])
    held = output(_held(kept, n_seen, until, device)[:, :, None])
    return ((full - held).norm(dim=(-2, -1)) / full.norm(dim=(-2, -1))).mean().item()


def fidelity(replays: Replays) -> pd.DataFrame:
    """One row per arm, budget and trace, which counts the arm's replays from 0.

    recall, error, accuracy and agreement (with the full cache's argmax) are shares; logprob and divergence are means
    over output tokens, in nats.
    """
    return pd.DataFrame(
        {
            "arm": arm,
            "kv_budget": kv_budget,
            "trace": i,
            "recall": one.mean("recall"),
            "error": one.mean("error"),
            "accuracy": one.accuracy,
            "agreement": one.agrees.double().mean().item(),
            "logprob": one.logprob.mean().item(),
            "divergence": one.divergence.mean().item(),
        }
        for (arm, kv_budget), several in replays.items()
        for i, one in enumerate(several)
    )


def once_stated(words: Sequence[str], n_prompt: int) -> list[tuple[int, int]]:
    """Look-ups of values told once, as (index of the asked value, index of the told one).

    A look-up is `get NAME VALUE` in the output; the value was told by one `so NAME VALUE` before, and not restated:
    neither by an earlier `get` nor by the `check` that repeats the calculation.
    """
    found, told, times = [], defaultdict(list), Counter()
    for i in range(len(words) - 2):
        verb, name, value = words[i : i + 3]
        if verb not in ("so", "get") or name not in NAMES or value not in DIGITS:
            continue
        if verb == "get" and i + 2 >= n_prompt and times[name] == 1 and told[name]:
            found.append((i + 2, told[name][0]))
        times[name] += 1
        if verb == "so":
            told[name].append(i + 2)
            times[name] += list(words[i + 3 : i + 5]) == [".", "check"]
    return found


def fact_drills(reasoner: Reasoner, n_traces: int, seed: int = 0) -> list[Recording]:
    """Recordings of value drills, which the tiny reasoner learned on: 14 values told once, then asked 56 times.

    For fact_probe at long distances: in its own solutions a value is looked up or checked soon after it is told, so
    that a trace has two or three look-ups that count, few of them far. The prompt is one word, so protecting it keeps
    no value.
    """
    recordings = []
    for i in range(n_traces):
        words, _ = value_drill(random.Random(f"fact drill {seed} {i}"), N_FACTS, N_ASKED)
        first, *rest = reasoner.encode(" ".join(words))
        request = Request(f"fact-drill/{i}", (first,), noise.key("fact drill", seed, i))
        recordings.append(record_trace(reasoner, request, rest))
    return recordings


def fact_probe(reasoner: Reasoner, replays: Replays) -> pd.DataFrame:
    """Whether values told once are still known when they are looked up; traces of chain problems only.

    One row per arm, budget and look-up: arm, kv_budget, trace (request id), distance (tokens from the told value to
    the asked one), right (the model's argmax is the told value). Raises ConfigError if no trace has such a look-up.
    """
    rows = []
    for (arm, kv_budget), several in replays.items():
        for replayed in several:
            recording = replayed.recording
            words = [reasoner.decode([token]).strip() for token in recording.ids]
            for asked, told in once_stated(words, recording.n_prompt):
                predicted = replayed.predicted[asked - recording.n_prompt].item()
                rows.append((arm, kv_budget, recording.request.id, asked - told, predicted == recording.ids[told]))
    if not rows:
        raise ConfigError(
            "no look-up of a value told once in these traces; the probe reads chain problems of the tiny reasoner "
            "(`so NAME VALUE`, then `get NAME VALUE`), replay more of those"
        )
    return pd.DataFrame(rows, columns=["arm", "kv_budget", "trace", "distance", "right"])


def fact_accuracy(facts: pd.DataFrame, edges: Sequence[int] = DISTANCES) -> pd.DataFrame:
    """fact_probe's rows by arm, budget and distance: bins from distance_low to below distance_high, edges in tokens.

    Columns arm, kv_budget, distance_low, distance_high, n (look-ups), right, low, high (percent; 95 % Wilson interval,
    which takes look-ups for independent though several come from one trace). Empty bins are left out.
    Raises ConfigError for a distance outside the edges.
    """
    if (facts["distance"] < edges[0]).any() or (facts["distance"] >= edges[-1]).any():
        raise ConfigError(f"a distance lies outside the edges {edges[0]} to {edges[-1]}; give wider edges")
    bins = pd.cut(facts["distance"], list(edges), right=False, labels=list(edges)[:-1]).astype(int)
    high = dict(itertools.pairwise(edges))
    rows = []
    for (arm, kv_budget, low), group in facts.groupby(["arm", "kv_budget", bins], dropna=False, sort=False):
        n, n_right = len(group), int(group["right"].sum())
        interval = [100 * share for share in wilson_interval(n_right, n)]
        rows.append((arm, kv_budget, low, high[low], n, 100 * n_right / n, *interval))
    columns = ["arm", "kv_budget", "distance_low", "distance_high", "n", "right", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("distance_low", kind="stable", ignore_index=True)
