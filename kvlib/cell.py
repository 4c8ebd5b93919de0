"""run(config) -> record: the only place that wires model, dataset, policy, decoding, grading and records together."""

import dataclasses
import functools
import gc
import inspect
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kvlib.config import RunConfig
from kvlib.engine import noise
from kvlib.engine.decoder import Completion, Decoder, Request, completions, decoder_for, planned_step
from kvlib.engine.linear import check_int8
from kvlib.engine.meter import Meter
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError, GpuMemoryError
from kvlib.files import file_state
from kvlib.fitted import check_fitted, fill
from kvlib.models import (
    Reasoner,
    check_length,
    check_model,
    checked_config,
    folder_of,
    load_reasoner,
    load_tokenizer,
    local_place,
    weights_sha256,
)
from kvlib.policies import Policy, make_policy
from kvlib.record import SampleLog, fingerprint, provenance, publish
from kvlib.stats import pass_at_1
from kvlib.tasks.datasets import Problem, content_sha256, dataset_source, load_problems
from kvlib.tasks.grade import AFTER_THINKING, verdicts
from kvlib.tasks.metrics import agreement_of

INSTRUCTIONS = {
    "math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "choice": "Please reason step by step, and put the letter of your answer within \\boxed{}.",
}


NOTEBOOK_OF_OLD = "3e0abdf0ad6c7eb5c5798437da3a4d68e1325e03398b5aa9102cc21ac594df9b"
"""Hash of the run notebook while its code was a part of the fingerprint."""


@dataclass(frozen=True)
class Prepared:
    """A cell that can run. requests: one per problem and sample, in order, whose noise depends on these and the seed
    only; step: what decodes it."""

    policy: Policy
    problems: tuple[Problem, ...]
    requests: list[Request]
    step: str
    fingerprints: tuple[str, ...]


def prepare(config: RunConfig, policy: Policy | None = None) -> Prepared:
    """Check a cell and encode its prompts, before any model is loaded.

    policy: one of your own, instead of the preset config.policy. Raises ConfigError with a line for each fault: an
    unknown or missing model, dataset, policy or setting, no such device, a prompt that the KV budget cannot hold.
    """
    faults = []

    def attempt(step: Callable, *given, **options):
        try:
            return step(*given, **options)
        except ConfigError as error:
            faults.append(str(error))

    attempt(check_model, config.model)
    attempt(problems_of, config)
    chosen = policy or attempt(make_policy, config.policy, **config.policy_options)
    if chosen:
        attempt(check_fitted, chosen, config.model)
        if config.kv_budget is not None:
            attempt(chosen.check, config.kv_budget, 0, config.dataset)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        faults.append(f"device is {config.device!r} and torch sees no CUDA GPU; use device='cpu'")
    if config.dtype == "int8":
        attempt(check_int8, config.device)
    if faults:
        raise ConfigError("\n".join(faults))
    problems, _ = problems_of(config)
    prompts = prompts_of(config.model, weights_sha256(config.model), problems, config.prompt)
    requests = [
        Request(f"{problem.id}/{sample}", prompt, noise.key(config.seed, problem.id, sample))
        for problem, prompt in zip(problems, prompts, strict=True)
        for sample in range(config.n_samples)
    ]
    longest = max(requests, key=lambda request: len(request.prompt))
    if config.kv_budget is not None:
        chosen.check(config.kv_budget, len(longest.prompt), longest.id)
    step = step_of(config.model, weights_sha256(config.model), longest.id, len(longest.prompt), config.max_new_tokens)
    return Prepared(chosen, problems, requests, step, run_fingerprints(config, policy))


@functools.cache
def step_of(model: str, weights: str, longest: str, n_prompt: int, max_new_tokens: int) -> str:
    """Which step will decode a model, as far as its config tells. Raises ConfigError if none does.

    longest: the id of the longest prompt, of n_prompt tokens.
    """
    if local_place(model) is None:
        return "step that fits, once it is downloaded"
    with folder_of(model, None) as folder:
        config = checked_config(model, folder)
    check_length(config, n_prompt, f"the prompt of {longest}")
    return planned_step(config, n_prompt + max_new_tokens)


def run_fingerprints(config: RunConfig, policy: Policy | None = None) -> tuple[str, ...]:
    """Hash of all that decides a cell's samples: config, dataset, weights and what was fitted to them.

    Of a policy that is given, its settings and its source code too. The second is how an older kvlib wrote the same.
    """
    own = {} if policy is None else {"policy": policy_source(policy)}
    policy = policy or make_policy(config.policy, **config.policy_options)
    parts = {
        "config": config.parameters(),
        "dataset": problems_of(config)[1],
        "model": weights_sha256(config.model),
        "predictor": None,
        **check_fitted(policy, config.model),
        **own,
    }
    return tuple(fingerprint({**parts, "notebook": notebook}) for notebook in ("", NOTEBOOK_OF_OLD))


def problems_of(config: RunConfig) -> tuple[tuple[Problem, ...], str]:
    """A cell's problems and the sha256 of them."""
    path = Path(config.dataset)
    return read_dataset(config.dataset, file_state(path) if path.is_file() else None, config.n_problems)


# A grid asks for hundreds of cells of one dataset.
@functools.cache
def read_dataset(name: str, state: tuple | None, n_problems: int | None) -> tuple[tuple[Problem, ...], str]:
    problems = tuple(load_problems(name, n_problems))
    return problems, content_sha256(problems)


@functools.cache
def prompts_of(model: str, weights: str, problems: tuple[Problem, ...], prompt: str) -> tuple[tuple[int, ...], ...]:
    """The prompt of each problem. Raises ConfigError for a prompt that a problem's kind has not."""
    reasoner = load_tokenizer(model)
    return tuple(prompt_of(problem, prompt, reasoner) for problem in problems)


def policy_source(policy: Policy) -> dict:
    """What tells a policy of one's own from an edited one: its settings, and the source of the methods it defines.

    Functions that it calls are not included. Method by method, because Python knows no source of a notebook's class.
    """
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float | bool | None)}
    own = [kind for kind in type(policy).__mro__ if not kind.__module__.startswith(("kvlib.policies", "builtins"))]
    methods = {
        f"{kind.__name__}.{name}": inspect.getsource(method.fget if isinstance(method, property) else method)
        for kind in own
        for name, method in vars(kind).items()
        if (inspect.isfunction(method) or isinstance(method, property)) and not name.startswith("__")
    }
    return {"name": type(policy).__name__, "settings": plain, "methods": methods}


def prompt_of(problem: Problem, prompt: str, reasoner: Reasoner) -> tuple[int, ...]:
    """A chain's prompt is its question; a benchmark is asked through the chat template."""
    if problem.kind == "chain":
        if prompt != "bare":
            raise ConfigError(
                f"prompt is {prompt!r} and {problem.id} is a chain, which has no box; set prompt to 'bare'"
            )
        return reasoner.encode(problem.question)
    try:
        return reasoner.encode_problem(problem.question, INSTRUCTIONS[problem.kind] if prompt == "boxed" else "")
    except Exception as error:  # tokenizers raises no narrower kind
        raise ConfigError(
            f"the model's tokenizer has no words for {problem.id} ({error}); use a model that reads text, or, with "
            "'tiny', the datasets chain-a to chain-d"
        ) from error


def build_decoder(
    config: RunConfig, reasoner: Reasoner, requests: list[Request], policy: Policy | None = None, **options
) -> Decoder:
    """A decoder of config.batch_size rows. Raises ConfigError naming the first prompt that does not fit the budget."""
    policy = policy or make_policy(config.policy, **config.policy_options)
    settings = {
        "n_rows": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "sampling": Sampling(config.temperature, config.top_p, config.top_k),
        "eos_ids": reasoner.eos_ids,
        "answer_id": reasoner.answer_id,
    }
    policy = fill(policy, config.model, reasoner)
    return decoder_for(reasoner.model, policy, config.kv_budget, requests, **{**settings, **options})


def sample_entry(completion: Completion, problem: Problem, reasoner: Reasoner) -> dict:
    """One line of samples.jsonl: output, verdict and what the cache held."""
    output = reasoner.decode(completion.tokens)
    return {
        "id": completion.request.id,
        "problem": problem.id,
        "sample": int(completion.request.id.rsplit("/", 1)[1]),
        "output": output,
        **verdicts(problem, output, completion.stop == "length", reasoner.answer_id is not None),
        "n_prompt": len(completion.request.prompt),
        "n_tokens": len(completion.tokens),
        "stop": completion.stop,
        "mean_live": sum(completion.held) / len(completion.held),
        "peak_slots": max(completion.held),
        "rounds": completion.rounds,
    }


def regraded(sample: dict, by_id: dict[str, Problem], reasoner: Reasoner) -> dict:
    """A sample, graded again where an older kvlib looked for a `</think>` that the tokenizer has not."""
    if reasoner.answer_id is not None or "strict_rule" in sample or "strict_correct" not in sample:
        return sample
    return sample | verdicts(by_id[sample["problem"]], sample["output"], sample["stop"] == "length", thinks=False)


def results_of(samples: list[dict]) -> dict:
    """Counts of a finished cell, and Pass@1 in [0, 1]; its interval is computed where it is drawn, from the verdicts.

    Of a benchmark, n_correct, n_unanswered and pass_at_1 are by the published rules and strict_* by the strict ones.
    """
    first, n_tokens = samples[0], sum(s["n_tokens"] for s in samples)
    results = {
        "n_problems": len({s["problem"] for s in samples}),
        "n_samples": len(samples),
        "n_correct": sum(s["correct"] for s in samples),
        "n_unanswered": sum(s["answer"] is None for s in samples),
        "n_truncated": sum(s["stop"] == "length" for s in samples),
        "n_prompt_tokens": sum(s["n_prompt"] for s in samples),
        "n_tokens": n_tokens,
        "n_rounds": sum(s["rounds"] for s in samples),
        "mean_live_slots": sum(s["mean_live"] * s["n_tokens"] for s in samples) / n_tokens,
        "peak_slots": max(s["peak_slots"] for s in samples),
        "pass_at_1": pass_at_1((s["problem"], s["correct"]) for s in samples)[0],
    }
    if "strict_correct" in first:
        results |= {
            "strict_rule": first.get("strict_rule", AFTER_THINKING),
            "strict_n_correct": sum(s["strict_correct"] for s in samples),
            "strict_n_unanswered": sum(s["strict_answer"] is None for s in samples),
            "strict_pass_at_1": pass_at_1((s["problem"], s["strict_correct"]) for s in samples)[0],
            "n_undecided": sum(bool(s["undecided"]) for s in samples),
        }
    if "scorer_correct" in first:
        results["scorer_n_correct"] = sum(s["scorer_correct"] for s in samples)
    return results


def verdicts_of(samples: list[dict]) -> dict[str, dict[str, str]]:
    """By verdict ("correct", ...) and problem, a 1 or 0 per sample: what pairwise comparison needs, without a text."""
    found = defaultdict(lambda: defaultdict(str))
    for sample in samples:
        for name in ("correct", "strict_correct", "scorer_correct"):
            if name in sample:
                found[name][sample["problem"]] += str(int(sample[name]))
    return found


def run(
    config: RunConfig,
    folder: Path | str,
    progress: Callable[[int, int], None] | None = None,
    policy: Policy | None = None,
) -> dict:
    """Decode and grade one cell into `folder`, sample by sample, and publish its record last.

    policy: one of your own, instead of the preset config.policy, which then only names it.

    Finished samples in the folder are kept and not decoded again; a change of anything that decides the samples
    moves them aside. progress is called with (samples done, samples in all). Returns the record.
    Raises ConfigError before the first token if the config cannot run.
    """
    cell = prepare(config, policy)
    torch.set_num_threads(config.threads)
    try:
        reasoner = load_reasoner(config.model, config.dtype, config.device)
    except torch.OutOfMemoryError as error:
        raise GpuMemoryError(f"the GPU has no room for {config.model}: free it, or use a larger one") from error
    by_id = {problem.id: problem for problem in cell.problems}
    requests = cell.requests
    meter = Meter(config.device)
    mark, *older = cell.fingerprints
    header = {"fingerprint": mark, "config": config.parameters()}
    header["provenance"] = {**provenance(), "model": reasoner.sha256}
    started = time.monotonic()
    with SampleLog(folder, header, older) as log:
        n_before = len(log.done)

        def decoded(n_rows: int) -> Decoder:
            decoder = build_decoder(config, reasoner, requests, cell.policy, meter=meter, n_rows=n_rows)
            for completion in completions(decoder, requests, set(log.done)):
                problem = by_id[completion.request.id.rsplit("/", 1)[0]]
                log.append({**sample_entry(completion, problem, reasoner), "n_rows": n_rows})
                if progress:
                    progress(len(log.done), len(requests))
            return decoder

        decoder = halved_once(config, log.done, decoded)
        samples = [regraded(log.done[request.id], by_id, reasoner) for request in requests]
        n_rows = len(decoder.rows)
        return publish(
            folder,
            {
                "kind": "cell",
                "fingerprint": log.header["fingerprint"],
                "config": config.parameters(),
                "provenance": {"finished": provenance(), "started": log.header["provenance"]},
                "dataset": dataset_source(config.dataset),
                "results": results_of(samples),
                "verdicts": verdicts_of(samples),
                "agreement": agreement_of(samples),
                "cost": {
                    "step": decoder.model.name,
                    "kv_bytes": decoder.cache.nbytes(),
                    "bytes_by_layer": decoder.model.nbytes(),
                    "slots_per_row": decoder.cache.shape.n_slots,
                    "n_rows": n_rows,
                    "batch_halved": n_rows < config.batch_size,
                    "seconds": time.monotonic() - started,
                    "phase_seconds": meter.seconds(),
                    "resumed_samples": n_before,
                },
            },
        )


def halved_once(config: RunConfig, done: dict[str, dict], decoded: Callable[[int], Decoder]) -> Decoder:
    """decoded(config.batch_size), or, once the GPU runs out of memory, with half the rows: for the rest of the cell.

    done: samples by id; those of an earlier attempt that was halved say so in n_rows. Costs of a halved cell are not
    comparable with others, and its samples round differently: its record says cost.batch_halved. Raises
    GpuMemoryError if there is no room for half the rows either.
    """
    half = max(1, config.batch_size // 2)
    halved = any(sample.get("n_rows") == half for sample in done.values())
    sizes = [half] if halved else list(dict.fromkeys([config.batch_size, half]))
    for n_rows in sizes:
        try:
            return decoded(n_rows)
        except torch.OutOfMemoryError as error:
            print(f"out of GPU memory at {n_rows} rows: {str(error).splitlines()[0]}", flush=True)
        # Only now is the failed decoder free: the error's traceback held it.
        gc.collect()
        torch.cuda.empty_cache()
    tried = " nor at ".join(map(str, sizes))
    raise GpuMemoryError(f"the GPU has no room for {config.cell_path} at batch_size {tried}: lower batch_size, or free "
                         f"the GPU; the {len(done)} finished samples are kept")  # fmt: skip
