"""Finished outputs of a model on problems of its own, decoded under the full cache: what everything is fitted to."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from kvlib.cell import build_decoder
from kvlib.config import RunConfig
from kvlib.engine import noise
from kvlib.engine.decoder import Request, completions
from kvlib.errors import ConfigError
from kvlib.models import Reasoner
from kvlib.record import SampleLog, fingerprint, provenance
from kvlib.tasks.datasets import Problem, content_sha256
from kvlib.tasks.training import right_answer, training_problems
from kvlib.train.recipe import END_OF_THINKING, Profile

MIN_THINKING = 5
"""Thinking tokens that a usable trace has at least: a fifth of them is a token."""


@dataclass(frozen=True)
class Trace:
    """A finished output that gave an answer: n_prompt tokens of prompt, thinking, and the answer from answer_at on.

    n_between: tokens that belong to neither: 1 where `</think>` ends thinking, 0 where the answer's own words do.
    """

    ids: tuple[int, ...]
    n_prompt: int
    answer_at: int
    n_between: int = 1

    @property
    def thinking(self) -> slice:
        return slice(self.n_prompt, self.answer_at - self.n_between)


def decode_traces(
    profile: Profile, reasoner: Reasoner, problems: list[Problem], done: Collection[str] = ()
) -> Iterator[dict]:
    """Decode one output per problem that is not done, full cache, and yield each as a line of samples.jsonl."""
    names = ("model", "max_new_tokens", "temperature", "top_p", "top_k")
    config = RunConfig(policy="full", **{name: getattr(profile, name) for name in names})
    requests = [
        Request(
            problem.id,
            reasoner.encode_problem(problem.question, profile.instruction),
            noise.key("predictor", profile.seed, problem.id.rpartition("/")[2]),
        )
        for problem in problems
    ]
    decoder = build_decoder(config, reasoner, requests, n_rows=min(profile.n_rows, len(requests)))
    by_id = {problem.id: problem for problem in problems}
    for completion in completions(decoder, requests, done):
        prompt, problem = completion.request.prompt, by_id[completion.request.id]
        output = reasoner.decode(completion.tokens)
        yield {
            "id": problem.id,
            "problem": problem.id,
            "sample": 0,
            "output": output,
            "answer": problem.answer,
            "correct": right_answer(problem, output),
            "prompt": list(prompt),
            "tokens": list(completion.tokens),
            "n_prompt": len(prompt),
            "n_tokens": len(completion.tokens),
            "stop": completion.stop,
        }


def as_trace(entry: dict, profile: Profile, reasoner: Reasoner) -> Trace | None:
    """The trace of an output; None if it gives no answer, or hardly thinks before it."""
    tokens, n_prompt = entry["tokens"], entry["n_prompt"]
    if profile.ends_thinking == END_OF_THINKING:
        if reasoner.answer_id not in tokens:
            return None
        begins, n_between = tokens.index(reasoner.answer_id) + 1, 1
    else:
        begins, n_between = words_begin(tokens, profile.ends_thinking, reasoner), 0
    if begins is None or begins - n_between < MIN_THINKING or begins >= len(tokens):
        return None
    return Trace((*entry["prompt"], *tokens), n_prompt, n_prompt + begins, n_between)


def words_begin(tokens: list[int], words: str, reasoner: Reasoner) -> int | None:
    """Index of the token that the first occurrence of `words` begins in."""
    at = reasoner.decode(tokens).find(words)
    if at < 0:
        return None
    return bisect_right(range(len(tokens)), at, key=lambda i: len(reasoner.decode(tokens[: i + 1])))


def usable_traces(profile: Profile, reasoner: Reasoner, entries: Iterable[dict]) -> list[Trace]:
    """The traces to learn from, in the order of entries."""
    traces = [as_trace(entry, profile, reasoner) for entry in entries if entry["correct"] or not profile.only_right]
    return [trace for trace in traces if trace]


def collect_traces(reasoner: Reasoner, n_traces: int, seed: int = 0) -> list[Trace]:
    """Right outputs of the tiny reasoner, or of another training of it, on chains of its own, in memory."""
    profile = Profile(n_traces=n_traces, seed=seed)
    problems = training_problems(profile.problems, n_traces, seed)
    entries = {entry["id"]: entry for entry in decode_traces(profile, reasoner, problems)}
    return usable_traces(profile, reasoner, [entries[problem.id] for problem in problems])


def stage_traces(
    profile: Profile, reasoner: Reasoner, problems: list[Problem], folder: Path
) -> tuple[list[Trace], str]:
    """Usable traces and the fingerprint of all decoded ones, kept in folder/samples.jsonl.

    Finished ones are not decoded again; those of other weights or settings are moved aside.
    """
    asked = content_sha256(problems, kinds=False)  # how a problem is graded decides no trace
    mark = fingerprint({"model": reasoner.sha256, "problems": asked, "profile": profile.of_traces()})
    with SampleLog(folder, {"fingerprint": mark, "profile": asdict(profile), "provenance": provenance()}) as log:
        if len(log.done) < len(problems):
            left = decode_traces(profile, reasoner, problems, log.done)
            for entry in tqdm(left, "traces", len(problems), initial=len(log.done), mininterval=10):
                log.append(entry)
        entries = [log.done[problem.id] for problem in problems]
    traces = usable_traces(profile, reasoner, entries)
    thought = [as_trace(entry, profile, reasoner) is not None for entry in entries]
    print(
        f"{len(traces)} usable traces of {len(entries)}: {sum(thought)} with thinking and an answer, "
        f"{sum(entry['correct'] for entry in entries)} right, "
        f"{sum(entry['stop'] == 'length' for entry in entries)} cut off at {profile.max_new_tokens} tokens",
        flush=True,
    )
    if len(traces) <= profile.n_held_out:
        raise ConfigError(
            f"only {len(traces)} of {len(entries)} traces are usable, and {profile.n_held_out} are held out; raise "
            "n_traces, lower n_held_out, or use a model that solves more of these problems"
        )
    return traces, mark
