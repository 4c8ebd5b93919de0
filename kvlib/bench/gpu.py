"""The first ten minutes on a CUDA GPU, block by block, each in the record as soon as it ends. `make bench-gpu`.

A block that fails, or is red, is said and marked, and the next one runs: what was timed beside a red gate is invalid.
Weights are random, so text and accuracy mean nothing. `--device cpu --scale tiny` walks the same way through the torch
references.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import torch
from transformers import Qwen2Config

import kvlib
from kvlib.bench import gpu_timing
from kvlib.bench.gate import Check, check_full, check_graphs, check_rounds, same_run
from kvlib.bench.gpu_timing import N_PROMPT, Scale, reasons, release, reserved, scales, steady_arm
from kvlib.bench.measure import ceilings, check_writable, copy_bandwidth, driver, write_record
from kvlib.bench.shapes import Sizes, Subject, bench_policy, random_model, random_subject
from kvlib.errors import ConfigError
from kvlib.kernels.pointwise import rms_norm
from kvlib.policies import PRESETS, Policy, make_policy
from kvlib.record import RecordError, provenance, utc_now
from kvlib.study.gpus import nvidia_smi
from kvlib.study.preflight import check_toolchain
from kvlib.study.timing import device_name

SCHEMA = "kvlib.gpu-bench/1"
LEAST_DRIVER = 580
TARGETS = {(20, 2500): 2900, (20, 5000): 2600, (128, 2500): 9800, (128, 5000): 6900}
"""Tokens/s on an H100, by batch and KV budget."""
ATTENTION_TARGET = 0.85
"""Share of copy bandwidth, from ATTENTION_FROM live tokens (batch x slots) on."""
ATTENTION_FROM = 50_000


def check_machine(device: str) -> list[dict]:
    """A row per thing that a first launch needs: driver, an idle card, a compiler, one operation, one Triton launch."""

    def fresh_enough() -> None:
        for version, load, used in nvidia_smi("driver_version", "utilization.gpu", "memory.used") or []:
            if int(version.split(".")[0]) < LEAST_DRIVER:
                raise ConfigError(f"driver {version} is older than {LEAST_DRIVER}; install a newer one")
            if any(had.isdecimal() and int(had) > most for had, most in ((load, 5), (used, 2000))):  # [N/A] on MIG
                raise ConfigError(f"the card is not idle: {load} % busy, {used} MiB used; stop what else runs on it")

    x = torch.ones(4, 64, device=device)
    work = {
        "driver and idle card": fresh_enough,
        "compiler, Python.h, ldconfig": check_toolchain if device != "cpu" else lambda: None,
        "one operation": lambda: (x + x).sum().item(),
        "one Triton launch": lambda: rms_norm(x, x[0], 1e-6).sum().item(),
    }
    return [tried(name, check) for name, check in work.items()]


def tried(name: str, check: Callable[[], object]) -> dict:
    try:
        check()
    except Exception as error:
        return {"check": name, "holds": False, "reason": first_line(error)}
    return {"check": name, "holds": True, "reason": ""}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def check_kernels(device: str, tests: Path | None = None) -> list[dict]:
    """A row per test of tests/gpu: every kernel against float64, by name. Under compute-sanitizer too, if it is there.

    Raises ConfigError where the tests are not, in an installation without them.
    """
    tests = tests or Path(kvlib.__file__).parents[1] / "tests" / "gpu"
    if not tests.is_dir():
        raise ConfigError(f"there is no {tests}: run this from a clone of the repository")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    rows = outcomes([*command, "-k", device])
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and device != "cpu":
        few = f"{device} and (attention or compaction or gated or sampler) and bfloat16"
        rows += outcomes([sanitizer, "--error-exitcode", "1", *command, "-k", few], "under compute-sanitizer: ")
    return rows


def outcomes(pytest: list[str], prefix: str = "") -> list[dict]:
    """Run pytest; a row per test, and one for the run itself where it ends badly without a red test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        done = subprocess.run([*pytest, f"--junitxml={path}"], capture_output=True, text=True, timeout=300)
        cases = list(ElementTree.parse(path).iter("testcase")) if path.exists() else []
    rows = []
    for case in cases:
        failed = [child for child in case if child.tag in ("failure", "error")]
        if not any(child.tag == "skipped" for child in case):
            reason = failed[0].get("message", "").splitlines()[0][:300] if failed else ""
            rows.append({"kernel": prefix + case.get("name"), "holds": not failed, "reason": reason})
    if not rows or (done.returncode and all(row["holds"] for row in rows)):
        rows.append({"kernel": prefix + "the run", "holds": False, "reason": (done.stdout + done.stderr)[-300:]})
    return rows


def probe_policy(name: str) -> Policy:
    """A preset for budgets of 64 slots."""
    most = {"n_recent": 16, "buffer": 8, "n_obs": 8, "lag_size": 8, "n_sink": 4, "interval": 16}
    preset = make_policy(name)
    own = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    options = {key: min(own[key], n) for key, n in most.items() if type(own.get(key)) is int}
    return make_policy(name, **options)


def probe_captures(device: str, n_steps: int) -> Iterator[dict]:
    """A row per preset on a model of two layers: what was not captured and why, and whether graphs decode as calls do.

    Head dimension 128, bfloat16, 3 rows, 64 slots. reserved_bytes: what the graphs' decoder took and kept.
    """
    config = Qwen2Config(
        vocab_size=1000, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    sizes = Sizes(torch.bfloat16, 3, N_PROMPT, n_steps, 64, 16)
    subject = random_subject("two layers", random_model(config, torch.bfloat16, device), sizes)
    for name in PRESETS:
        try:
            policy, before, arms = subject.fit(probe_policy(name)), reserved(device), []
            for part in ("", "eager"):
                arms.append(steady_arm(subject, policy, 64 if policy.evicts else None, 3, n_steps, part))
                arms[-1].start()
                arms[-1].advance(n_steps)
                if not part:
                    taken = reserved(device)
            same = same_run(*arms)
            plain = {} if device == "cpu" else reasons(arms[0].decoder)
            row = {"holds": same and not plain, "reason": "" if same else "graphs and calls decode differently"}
            row |= {"plain": plain, "reserved_bytes": taken and taken - before}
        except ConfigError as error:  # e.g. reindex, which bfloat16 is too coarse for
            row = {"holds": True, "reason": f"refused: {first_line(error)}"}
        except Exception as error:
            row = {"holds": False, "reason": first_line(error)}
        release(device)
        yield {"preset": name, **row}


def check_outputs(subject: Subject) -> list[dict]:
    """The full checks at R1-Qwen's shapes: the full cache against transformers, DynTS' rounds, graphs against calls."""
    sizes = Sizes(torch.bfloat16, 2, 64, 64, 128, 32)
    few = replace(subject, prompts=subject.prompts[: sizes.batch, : sizes.n_prompt])
    policy = ("dynts", few, bench_policy("dynts", sizes.kv_budget, sizes), sizes.kv_budget, sizes)
    checks = [check_full(few), check_rounds(*policy), check_graphs(*policy)]
    return [{**vars(check), "reason": check.detail} for check in checks]


class Run:
    """The blocks, in turn: what each found is in the record, and on disk, before the next one starts."""

    def __init__(self, scale: Scale, device: str, seconds: float, path: Path, say: Callable[[str], None]):
        self.scale, self.device, self.path, self.say = scale, device, path, say
        check_writable(path)
        self.ends = time.monotonic() + seconds
        self.record = {
            "schema": SCHEMA,
            "model": "r1-qwen" if scale.config.num_hidden_layers == 28 else "dry run",
            "weights": "random weights",
            "device": device_name(device),
            "dtype": "bfloat16",
            "policy": "dynts-published, random predictor in float32",
            "n_prompt": N_PROMPT,
            "provenance": {**provenance(), **driver(device)},
            "gate": {"holds": True, "checks": []},
            "blocks": {},
            "attention": [],
            "arms": [],
            "left_out": [],
            "targets": [],
            "complete": False,
        }

    def left(self) -> float:
        return self.ends - time.monotonic()

    def block(self, name: str, work: Callable[[], object]):
        """Run one; None where there is no time left for it, or it raised: the record says which, and has what rows
        it yielded until then."""
        found, error, started = None, None, time.monotonic()
        if self.left() <= 0:
            error = "no time left"
        else:
            try:
                found = work()
                if isinstance(found, Iterator):
                    rows = self.record[name] = []
                    rows.extend(found)
                    found = rows
                self.record[name] = found
            except Exception as raised:
                found, error = None, first_line(raised)
        self.record["blocks"][name] = {"seconds": time.monotonic() - started, "error": error}
        if error:
            self.record["left_out"].append({"block": name, "reason": error})
        write_record(self.path, self.record)
        self.say(f"{name}: {error or 'done'} ({self.left():.0f} s left)")
        release(self.device)
        return found

    def check(self, name: str, work: Callable[[], object]) -> None:
        """A block of checks. Say what is red of it; it makes the gate red, and nothing stops."""
        rows = self.block(name, work)
        red = [row for row in rows or [] if not row["holds"]]
        for row in red:
            self.say(f"  RED {next(iter(row.values()))}: {row['reason']}")
        holds = rows is not None and not red
        check = Check(name, holds, f"{len(rows or [])} checks, {len(red)} of them red")
        self.record["gate"]["checks"].append(vars(check))
        self.record["gate"]["holds"] &= holds
        write_record(self.path, self.record)


def gpu_bench(scale: Scale, device: str, seconds: float, path: Path, say: Callable[[str], None]) -> dict:
    """All blocks within `seconds` of wall time, the record on disk after each; it lists what failed or did not fit."""
    run = Run(scale, device, seconds, path, say)
    record, block = run.record, run.block
    run.check("machine", lambda: check_machine(device))
    run.check("kernels", lambda: check_kernels(device))
    run.check("captures", lambda: probe_captures(device, scale.probe_steps))

    sizes = Sizes(torch.bfloat16, 2, 64, 64, 128, 32)
    try:
        subject = random_subject("r1-qwen", random_model(scale.config, torch.bfloat16, device), sizes)
    except RuntimeError as error:  # a card that is too small
        row = {"check": "the model", "holds": False, "reason": first_line(error)}
        run.check("model", lambda: [row])
        return record
    run.check("outputs", lambda: check_outputs(subject))
    copy = block("copy", lambda: copy_bandwidth(device, scale.copy_bytes))
    record["ceilings"] = ceilings(scale.config, copy)
    block("step", lambda: gpu_timing.profile_step(subject, scale))
    block("products", lambda: gpu_timing.time_products(subject, scale))
    block("attention", lambda: gpu_timing.time_attention(scale, copy, device))
    block("rounds", lambda: gpu_timing.time_rounds(subject, scale))
    block("sampler", lambda: gpu_timing.time_sampler(scale, device))

    def decode(batch: int, kv_budget: int) -> dict:
        record["arms"].append(gpu_timing.time_decode(subject, scale, batch, kv_budget, copy))
        return {"tokens/s": record["arms"][-1]["steps"]}

    for batch, kv_budget in scale.settings:
        block(f"batch {batch}, KV budget {kv_budget}", lambda b=batch, n=kv_budget: decode(b, n))
    record["targets"] = verdicts(record, scale)
    record["complete"] = not record["left_out"]
    write_record(path, record)
    return record


def verdict(target: str, value: float | None, wanted: float, unit: str = "tokens/s") -> dict:
    state = "not measured" if value is None else "met" if value >= wanted else "missed"
    return {"target": target, "wanted": wanted, "measured": value, "unit": unit, "verdict": state}


def verdicts(record: dict, scale: Scale) -> list[dict]:
    """Every target: met, missed or not measured."""
    found = {(row["batch"], row["kv_budget"]): row["steps"] for row in record["arms"]}
    rows = [
        verdict(f"batch {batch}, KV budget {budget}", found.get((batch, budget)), wanted)
        for (batch, budget), wanted in TARGETS.items()
    ]
    done = {
        (row["batch"], row["live_slots"]): row["share_of_copy"] for row in record["attention"] if "stages" not in row
    }
    rows += [
        verdict(f"attention, batch {batch} x {live} slots", done.get((batch, live)), ATTENTION_TARGET, "of copy")
        for batch, live in scale.attention
        if batch * live >= ATTENTION_FROM
    ]
    plain = [row["plain"] for row in record["arms"] if row["plain"] is not None]
    captured = sum(not reasons for reasons in plain) / len(plain) if plain else None
    rows.append(verdict("settings whose every piece ran as a CUDA graph", captured, 1.0, "of all"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvlib.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--seconds", type=float, default=580.0, help="wall time of all blocks together")
    parser.add_argument("--folder", type=Path, required=True, help="where the record is written")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("kvlib.bench.gpu: torch sees no CUDA GPU; a dry run on the CPU: --device cpu --scale tiny")
    if given.device == "cpu" and given.scale == "full":
        sys.exit("kvlib.bench.gpu: 7 billion parameters are not run on a CPU; use --scale tiny for a dry run")
    card = device_name(given.device).lower().replace(" ", "-").replace("/", "-")
    path = given.folder / f"r1-qwen-{card}-{utc_now().replace(':', '')}.json"
    try:
        record = gpu_bench(scales(given.scale), given.device, given.seconds, path, lambda line: print(line, flush=True))
    except RecordError as error:
        sys.exit(f"kvlib.bench.gpu: {error}")
    for row in record["targets"]:
        measured = "" if row["measured"] is None else f"{row['measured']:,.2f} "
        print(f"{row['verdict']:12} {row['target']}: {measured}(at least {row['wanted']:,} {row['unit']})")
    for row in record["left_out"]:
        print(f"left out: {row['block']} ({row['reason']})")
    print(f"record: {path}")
    if not record["gate"]["holds"]:
        sys.exit("kvlib.bench.gpu: something is red, see RED above, so what was timed is invalid")


if __name__ == "__main__":
    main()
