"""From a model to its head: profiles as data, and the stages traces, labels and training, each of which resumes."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType

import torch

from kvlib.config import check_names, read_yaml
from kvlib.engine import noise
from kvlib.engine.decoder import Completion, Request, completions, decoder_for
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError
from kvlib.models import MANIFEST, Reasoner, check_model, load_reasoner, update_manifest
from kvlib.policies import make_policy
from kvlib.record import SampleLog, fingerprint, locked, provenance
from kvlib.tasks.datasets import Problem, content_sha256
from kvlib.tasks.training import right_answer, training_problems
from kvlib.train.head import FILE, HeldOut, ImportanceHead, evaluate_head, save_predictor, train_head
from kvlib.train.labels import Labelled, Trace, label_traces

END_OF_THINKING = "</think>"
MIN_THINKING = 5
"""Thinking tokens that a usable trace has at least: a fifth of them is a token."""


@dataclass(frozen=True)
class Expected:
    """What a plan reckons with, measured or assumed (source says which). Rates are in tokens per second."""

    hidden_size: int
    bytes_per_feature: int
    tokens_per_trace: int
    prompt_tokens: int
    usable: float
    decode_rate: float
    label_rate: float
    train_rate: float
    source: str


@dataclass(frozen=True)
class Profile:
    """How one model's predictor is made; the defaults are the tiny reasoner's.

    problems: see training_problems. ends_thinking: `</think>` (a token), or the words that begin the answer, which
    then runs from them on. only_right: use only traces whose answer is right. label_tokens: most thinking tokens of a
    trace to train on, None for all. Held out are the last n_held_out usable traces, always whole.
    """

    model: str = "tiny"
    problems: str = "chains"
    instruction: str = ""
    ends_thinking: str = END_OF_THINKING
    only_right: bool = True
    n_traces: int = 480
    n_held_out: int = 80
    n_rows: int = 120
    max_new_tokens: int = 768
    temperature: float = 0.6
    top_p: float = 1.0
    label_tokens: int | None = None
    label_power: float = 0.3
    n_epochs: int = 12
    batch_tokens: int = 1024
    lr: float = 2e-3
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def of_traces(self) -> dict:
        """What decides a trace, besides the model's weights and the problems themselves."""
        names = (
            "instruction",
            "n_traces",
            "n_rows",
            "max_new_tokens",
            "temperature",
            "top_p",
            "seed",
            "dtype",
            "device",
        )
        return {name: getattr(self, name) for name in names}

    def of_head(self) -> dict:
        """How the head is trained on its labels."""
        names = ("label_power", "n_epochs", "batch_tokens", "lr", "seed", "device")
        return {name: getattr(self, name) for name in names}


class Progress:
    """Lines such as `traces 40/200, 3 min, 12 min to go`; at most one in ten seconds, and one at the end."""

    def __init__(self, what: str, n: int, before: int = 0):
        self.what, self.n, self.before, self.started, self.said = what, n, before, time.monotonic(), -10.0

    def __call__(self, done: int, note: str = "") -> None:
        elapsed = time.monotonic() - self.started
        if done < self.n and elapsed - self.said < 10:
            return
        self.said = elapsed
        times = f"{elapsed / 60:.1f} min"
        new = done - self.before
        if done < self.n and new >= (self.n - self.before) / 20:  # before, mostly the wait for the first
            times += f", {elapsed / new * (self.n - done) / 60:.1f} min to go"
        print(f"{self.what} {done}/{self.n}, {times}{', ' if note else ''}{note}", flush=True)


def load_profile(path: Path, name: str) -> tuple[Profile, Expected | None]:
    """A profile of a file of profiles (YAML), and what a plan reckons with. Raises ConfigError."""
    hint = "run in the folder that holds kvlib's notebooks, or name the file with --profiles"
    profiles = read_yaml(path, "profiles", hint)
    if not isinstance(profiles, dict) or not all(isinstance(settings, dict) for settings in profiles.values()):
        raise ConfigError(f"{path} must map names of profiles to mappings of settings")
    check_names([name], list(profiles), f"profile (in {path})")
    settings = dict(profiles[name])
    expected = settings.pop("expected", None)
    types = {field.name: field.type for field in dataclasses.fields(Profile)}
    check_names(settings, list(types), f"setting of profile {name!r} in {path}")
    for setting, value in settings.items():
        wanted = {float: (float, int), int | None: (int, NoneType)}.get(types[setting], (types[setting],))
        if type(value) not in wanted:
            names = " or ".join(kind.__name__ for kind in wanted)
            raise ConfigError(f"{path}: {name}.{setting}={value!r} must be of type {names}; correct it")
    if expected is None:
        return Profile(**settings), None
    known = [field.name for field in dataclasses.fields(Expected)]
    if not isinstance(expected, dict) or set(expected) != set(known):
        raise ConfigError(f"{path}: {name}.expected must have exactly the keys {', '.join(known)}; or leave it out")
    return Profile(**settings), Expected(**expected)


def decode_traces(
    profile: Profile, reasoner: Reasoner, problems: list[Problem], done: Collection[str] = ()
) -> Iterator[dict]:
    """Decode one output per problem that is not done, full cache, and yield each as a line of samples.jsonl."""
    requests = [
        Request(
            problem.id,
            reasoner.encode_problem(problem.question, profile.instruction),
            noise.key("predictor", profile.seed, problem.id.rpartition("/")[2]),
        )
        for problem in problems
    ]
    decoder = decoder_for(
        reasoner.model,
        make_policy("full"),
        None,
        requests,
        n_rows=min(profile.n_rows, len(requests)),
        max_new_tokens=profile.max_new_tokens,
        sampling=Sampling(profile.temperature, profile.top_p),
        eos_ids=reasoner.eos_ids,
        answer_id=reasoner.answer_id,
    )
    by_id = {problem.id: problem for problem in problems}
    for completion in completions(decoder, requests, done):
        yield trace_entry(completion, by_id[completion.request.id], profile, reasoner)


def trace_entry(completion: Completion, problem: Problem, profile: Profile, reasoner: Reasoner) -> dict:
    output = reasoner.decode(completion.tokens)
    return {
        "id": problem.id,
        "problem": problem.id,
        "sample": 0,
        "output": output,
        "answer": problem.answer,
        "correct": right_answer(problem, output),
        "prompt": list(completion.request.prompt),
        "tokens": list(completion.tokens),
        "n_prompt": len(completion.request.prompt),
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
    low, high = 0, len(tokens) - 1
    while low < high:
        middle = (low + high) // 2
        if len(reasoner.decode(tokens[: middle + 1])) > at:
            high = middle
        else:
            low = middle + 1
    return low


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
    profile: Profile,
    reasoner: Reasoner,
    problems: list[Problem],
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Trace], str]:
    """Usable traces and the fingerprint of all decoded ones, kept in folder/samples.jsonl.

    Finished ones are not decoded again; those of other weights or settings are moved aside.
    """
    asked = content_sha256(problems, kinds=False)  # how a problem is graded decides no trace
    mark = fingerprint({"model": reasoner.sha256, "problems": asked, "profile": profile.of_traces()})
    with SampleLog(folder, {"fingerprint": mark, "profile": asdict(profile), "provenance": provenance()}) as log:
        progress = progress or Progress("traces", len(problems), len(log.done))
        if len(log.done) < len(problems):
            for entry in decode_traces(profile, reasoner, problems, log.done):
                log.append(entry)
                progress(len(log.done))
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


def stage_labels(profile: Profile, reasoner: Reasoner, traces: list[Trace], folder: Path, mark: str) -> list[Labelled]:
    """Features and labels of every trace, from shards in `folder`."""
    data: list[Labelled] = []
    progress = Progress("labelled", len(traces))
    shards = label_traces(reasoner.model, traces, folder, mark, profile.label_tokens, profile.n_held_out)
    for shard in shards:
        data += shard
        progress(len(data))
    return data


def train_predictor(profile: Profile, name: str, work: Path, out: Path) -> tuple[ImportanceHead, HeldOut]:
    """Run all stages in `work`, taking up what an earlier run left there, and write the head into `out`.

    Waits while another process works there. The manifest of `out` is brought up to date if there is one.
    Raises ConfigError before the model is loaded for all that can be told by then.
    """
    check_model(profile.model)
    if profile.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"profile {name!r} is for device {profile.device!r} and torch sees no CUDA GPU; run it on one"
        )
    problems = training_problems(profile.problems, profile.n_traces, profile.seed)
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(profile.threads)
    with locked(work / ".lock"):
        reasoner = load_reasoner(profile.model, profile.dtype, profile.device)
        traces, mark = stage_traces(profile, reasoner, problems, work / "traces")
        data = stage_labels(profile, reasoner, traces, work / "labels", mark)
        n_train = len(data) - profile.n_held_out
        print(f"{sum(len(labels) for _, labels in data[:n_train])} thinking tokens to train on", flush=True)
        head = train_head(
            data[:n_train],
            **profile.of_head(),
            checkpoint=work / "training.safetensors",
            mark=fingerprint({"traces": mark, "profile": asdict(profile)}),
            progress=Progress("epochs", profile.n_epochs),
        )
        held_out = evaluate_head(head, data[n_train:], profile.device)
        save_predictor(
            head, out / FILE, held_out, reasoner.sha256, profile=name, settings=asdict(profile), n_traces=n_train,
            seed=profile.seed,
        )  # fmt: skip
    if (out / MANIFEST).exists():
        update_manifest(out, [FILE])
    print(
        f"held out, {held_out.n_traces} traces: rank correlation {held_out.spearman:.3f}, recall of the true top 20 % "
        f"{held_out.top20_recall:.3f} (chance 0.200)\nwrote {out / FILE}",
        flush=True,
    )
    return head, held_out


def plan(profile: Profile, expected: Expected | None, name: str, work: Path, out: Path) -> str:
    """What train_predictor would do, what it would cost and why, without a model."""
    lines = [
        f"profile {name}: model {profile.model}, {profile.n_traces} problems of {profile.problems!r}, "
        f"{profile.n_held_out} traces held out, {profile.n_epochs} epochs, on {profile.device} in {profile.dtype}",
        f"stages in {work}, head in {out / FILE}",
    ]
    if expected is None:
        return "\n".join([*lines, "the profile has no `expected`, so its cost cannot be reckoned"])
    e, d = expected, expected.hidden_size
    tokens = profile.n_traces * e.tokens_per_trace
    usable = round(profile.n_traces * e.usable)
    read = usable * (e.tokens_per_trace + e.prompt_tokens)
    kept = min(e.tokens_per_trace, profile.label_tokens or e.tokens_per_trace)
    trained = max(0, usable - profile.n_held_out) * kept
    stored = trained + min(usable, profile.n_held_out) * e.tokens_per_trace
    hours = [
        tokens / e.decode_rate / 3600,
        read / e.label_rate / 3600,
        profile.n_epochs * trained / e.train_rate / 3600,
    ]
    parameters = 2 * d * d + 2 * d * (d // 2) + d // 2
    disk = {"traces": 11 * tokens, "labels": stored * (d * e.bytes_per_feature + 4), "training": 12 * parameters}
    return "\n".join(
        [
            *lines,
            f"traces    {profile.n_traces} x {e.tokens_per_trace} tokens = {tokens / 1e6:.2f} M, at "
            f"{e.decode_rate:g} tokens/s: {hours[0]:.2f} h",
            f"labels    {usable} usable ({e.usable:.0%}) x {e.tokens_per_trace + e.prompt_tokens} tokens with prompt, "
            f"at {e.label_rate:g} tokens/s: {hours[1]:.2f} h",
            f"training  {profile.n_epochs} epochs x {trained / 1e6:.2f} M tokens (at most {kept} of a trace), a head "
            f"of {parameters / 1e6:.2f} M parameters, at {e.train_rate:g} tokens/s: {hours[2]:.2f} h",
            f"total     {sum(hours):.1f} h",
            f"disk      traces {disk['traces'] / 1e9:.2f} GB, features and labels {disk['labels'] / 1e9:.2f} GB, "
            f"checkpoint {disk['training'] / 1e9:.2f} GB",
            f"head      {4 * parameters / 1e6:.1f} MB",
            f"reckoned with: {' '.join(e.source.split())}",
        ]
    )
