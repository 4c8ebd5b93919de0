"""The bench: gate, ceilings, warm-up, then all arms in turns; the record."""

import contextlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kvlib.bench.arms import NO_PEERS, KVPress, LlamaCpp, Named, Ours, Peers, build_arm, parse_arm, save_model
from kvlib.bench.gate import check_first_tokens, gate, judged
from kvlib.bench.shapes import Sizes, Subject
from kvlib.charts.throughput import CEILINGS, LLAMA_CPP
from kvlib.cost import kv_bytes, minimum_bytes
from kvlib.engine.paired import take_turns, timed, useful_tokens
from kvlib.files import write_atomically
from kvlib.record import RecordError, explained, provenance
from kvlib.stats import paired_ratio, too_busy
from kvlib.study.gpus import nvidia_smi
from kvlib.study.timing import device_name

SCHEMA = "kvlib.bench/1"


def copy_bandwidth(device: str, nbytes: int | None = None) -> float:
    """Bytes read and written per second by a plain copy, the best of several; 4 GiB on a GPU, 256 MiB on a CPU."""
    nbytes = nbytes or (2**32 if device != "cpu" else 2**28)
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(6))


def ceilings(config, copy_bandwidth: float | None, itemsize: int = 2) -> dict:
    """Of a record: the bandwidth of its roofline, and what a step moves in the dtype of the model."""
    return {
        "copy_bandwidth": copy_bandwidth,
        "weight_bytes": minimum_bytes(config, 1, 0, itemsize),
        "kv_bytes_per_token": kv_bytes(config, itemsize),
    }


def traffic(
    model,
    n_rows: int,
    live: float,
    n_steps: int,
    seconds: float,
    copy_bandwidth: float | None,
    weight_itemsize: int | None = None,
) -> dict:
    """Of an arm's row: the least that n_steps steps over `live` slots a row move, and that as bandwidth.

    weight_itemsize: bytes of a weight where they are not those of the model's dtype.
    """
    config, itemsize = model.config, model.dtype.itemsize
    moved = minimum_bytes(config, 1, 0, weight_itemsize or itemsize) + n_rows * live * kv_bytes(config, itemsize)
    bandwidth = moved * n_steps / seconds
    share = copy_bandwidth and bandwidth / copy_bandwidth
    return {"live_slots": live, "bytes_per_step": moved, "bandwidth": bandwidth, "bandwidth_share": share}


def check_writable(path: Path) -> None:
    """Make the folder of a record before anything is measured for it. Raises RecordError."""
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise RecordError(f"{path} is a folder; name a file for the record")


def write_record(path: Path, record: dict) -> None:
    """Raises RecordError where it cannot be written after all."""
    with explained(path.parent):
        write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def pairs(names: Sequence[str], sizes: Sizes) -> Iterator[tuple[str, str]]:
    """(arm, what it is compared with) for all arms that were run.

    An arm that evicts is compared with the full cache that lacks the same part, so that the ratio is eviction's alone.
    """
    arms = {name: parse_arm(name, sizes) for name in names}
    for name, arm in arms.items():
        if arm.kind != "kvlib":
            continue
        yield from ((name, peer) for peer, its in arms.items() if its.kind in ("hf", LLAMA_CPP))
        twin = "full" if arm.kv_budget is None or not arm.part else f"full-{arm.part}"
        if name != twin and twin in arms:
            yield (twin, name) if arm.kv_budget is None else (name, twin)
        same = Named("kvpress", arm.of, "", arm.kv_budget)
        yield from ((name, peer) for peer, its in arms.items() if its == same)
        yield from ((name, ceiling) for ceiling in CEILINGS if ceiling in names)


def measure(arms: dict, n_steps: int, n_rounds: int, device: str, seconds: float, say: Callable[[str], None]) -> dict:
    """Advance every arm by n_steps in each of n_rounds; fewer rounds if `seconds` would be exceeded.

    Returns by arm: seconds of each round, of prefill and of the arm's own phases.
    """
    begun = time.monotonic()
    found = {name: {"seconds": [], "prefill": timed(arm.start, device)} for name, arm in arms.items()}
    for name, arm in arms.items():  # llama.cpp's own, without the start of its process
        found[name]["prefill"] = getattr(arm, "prefill", found[name]["prefill"])
    before = {name: arm.phase_seconds() for name, arm in arms.items()}
    for number in range(n_rounds):
        round_begun = time.monotonic()
        for name, (taken,) in take_turns(arms, [n_steps], number, device).items():
            found[name]["seconds"].append(getattr(arms[name], "seconds", taken))
        now = time.monotonic()
        left = (n_rounds - number - 1) * (now - round_begun)
        say(f"round {number + 1} of {n_rounds}; about {left:.0f} s left")
        if number + 1 < n_rounds and now - begun + 1.1 * (now - round_begun) > seconds:
            say(f"stopped after {number + 1} of {n_rounds} rounds: {seconds:.0f} s would not be enough for more")
            break
    for name, arm in arms.items():
        phases = {phase: t - before[name].get(phase, 0.0) for phase, t in arm.phase_seconds().items()}
        found[name]["phases"] = phases
    return found


def warmed(arm, n_steps: int, device: str) -> int | None:
    """Run an arm once, untimed; returns the bytes of CUDA memory that it needed on top of what was there."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    arm.start()
    arm.advance(n_steps)
    return torch.cuda.max_memory_allocated() - before if device != "cpu" else None


def describe(name: str, arm, found: dict, subject: Subject, sizes: Sizes, n_steps: int, copy_bandwidth: float) -> dict:
    """One arm's row: tokens/s by three definitions, memory, and the bandwidth that the step's least bytes amount to."""
    rounds, total, B = len(found["seconds"]), sum(found["seconds"]), sizes.batch
    steps = rounds * n_steps
    named = parse_arm(name, sizes)
    row = {
        "arm": name,
        "kv_budget": named.kv_budget,
        "seconds": found["seconds"],
        "prefill_seconds": found["prefill"],
        "steps": B * steps / total,
        "ms_per_step": 1000 * statistics.median(found["seconds"]) / n_steps,
    }
    if name in CEILINGS:
        return row
    if isinstance(arm, LlamaCpp):
        return row | {"live_slots": arm.live_slots()}
    return row | {
        "forward": B * steps / found["phases"]["forward"],
        "round_share": found["phases"]["evict"] / total if named.kv_budget and "evict" in found["phases"] else None,
        "goodput": useful_tokens(arm.output(), subject.eos_ids) / (total + found["prefill"]),
        "kv_bytes": arm.kv_bytes,
        **traffic(
            subject.model, B, arm.live_slots(), steps, total, copy_bandwidth, 1 if named.part == "int8" else None
        ),
    }


def bench(
    subject: Subject,
    sizes: Sizes,
    names: Sequence[str],
    *,
    n_rounds: int = 8,
    seconds: float = 480.0,
    peers: Peers = NO_PEERS,
    say: Callable[[str], None] = print,
) -> dict:
    """Gate, ceilings, warm-up, rounds. Returns the record; with a red gate it holds no measurement at all.

    seconds: of wall time for the rounds; those that do not fit are left out and the record says complete: false.
    """
    device, n_steps = str(subject.model.device), sizes.n_new // n_rounds
    on_gpu = device != "cpu"
    record = {
        "schema": SCHEMA,
        "model": subject.name,
        "weights": subject.weights,
        "device": device_name(device),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "batch": sizes.batch,
        "n_prompt": sizes.n_prompt,
        "n_new": sizes.n_new,
        "interval": sizes.interval,
        "steps_per_round": n_steps,
        "threads": torch.get_num_threads(),
        "provenance": {**provenance(), **driver(device)},
        "complete": False,
        "arms": [],
        "ratios": [],
    }
    say(f"{subject.name} ({subject.weights}), {record['device']}, batch {sizes.batch}, {record['dtype']}")
    checks = gate(subject, sizes, names)
    for check in checks:
        say(str(check))
    record["gate"] = judged(checks)
    if not record["gate"]["holds"]:
        return record
    copy = copy_bandwidth(device)
    record["ceilings"] = ceilings(subject.model.config, copy, subject.model.dtype.itemsize)
    say(f"copy bandwidth {copy / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        if any(name.startswith("kvpress-") for name in names):
            save_model(subject.model, Path(folder))
        arms = {name: build_arm(name, subject, sizes, peers, Path(folder)) for name in names}
        for arm in arms.values():
            if isinstance(arm, KVPress):
                closing.callback(arm.close)
        # On a GPU our whole run, so that every graph is captured.
        peaks = {
            name: warmed(arm, sizes.n_new if on_gpu and isinstance(arm, Ours) else min(n_steps, 8), device)
            for name, arm in arms.items()
        }
        # In 8 bits another token comes now and then, and all after it are others: the gate compared their logits.
        other = [*CEILINGS, LLAMA_CPP, *(name for name in names if parse_arm(name, sizes).part == "int8")]
        decoding = {name: arm for name, arm in arms.items() if name not in other}
        if decoding and not on_gpu:  # on a GPU the warm-up was a whole run, rounds and all
            checks.append(check_first_tokens(subject, decoding))
            say(str(checks[-1]))
            record["gate"] = judged(checks)
            if not record["gate"]["holds"]:
                return record
        found = measure(arms, n_steps, n_rounds, device, seconds, say)
        record["arms"] = [
            describe(name, arm, found[name], subject, sizes, n_steps, copy) | {"peak_bytes": peaks[name]}
            for name, arm in arms.items()
        ]
        record["kvpress"] = next((arm.versions for arm in arms.values() if isinstance(arm, KVPress)), None)
    return record | compared(found, names, sizes) | {"complete": len(found[names[0]]["seconds"]) == n_rounds}


def compared(found: dict, names: Sequence[str], sizes: Sizes) -> dict:
    """Of a record: every pair's ratio, and what two arms of equal work (the control) differ by."""
    ratios = {}
    for pair in pairs(names, sizes):
        seconds, against = ([[taken] for taken in found[name]["seconds"]] for name in pair)
        ratios[pair] = paired_ratio(seconds, against)
    control = ratios.get(("full", "full-again"))
    rounds = len(found[names[0]]["seconds"])
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "ratios": [{"arm": arm, "against": against, **asdict(ratio)} for (arm, against), ratio in ratios.items()],
        "noise": control and {"arm": "full", "against": "full-again", **asdict(control), "too_busy": too_busy(control)},
        "rounds": rounds,
        "peak_rss_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def driver(device: str) -> dict:
    """Of the GPU."""
    if device == "cpu":
        return {}
    fields = ("driver_version", "clocks.sm", "power.draw", "temperature.gpu")
    found = nvidia_smi(*fields) or []
    return {"cuda": torch.version.cuda, "gpus": [dict(zip(fields, gpu, strict=True)) for gpu in found]}
