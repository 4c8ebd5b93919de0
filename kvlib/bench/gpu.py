"""What a CUDA GPU is needed for, in one run of nine minutes: kernels against float64, then R1-Qwen's shapes.

`python -m kvlib.bench.gpu` (make bench-gpu). Weights are random, so text and accuracy mean nothing; eviction is DynTS
as published with a random predictor. `--device cpu --scale tiny` walks the same way through the torch references.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from kvlib.bench.arms import (  # fmt: skip
    Linears,
    Sizes,
    bench_policy,
    check_full,
    check_graphs,
    check_rounds,
    copy_bandwidth,
    driver,
    judged,
    kv_bytes_per_token,
    random_subject,
)
from kvlib.bench.count import minimum_bytes
from kvlib.bench.shapes import r1_qwen_config, random_model
from kvlib.engine.decoder import Decoder, Request, decoder_for
from kvlib.engine.graph import Graph
from kvlib.engine.meter import Meter
from kvlib.engine.sampling import Sampling
from kvlib.files import write_atomically
from kvlib.kernels.append import append
from kvlib.kernels.attention import decode_attention
from kvlib.kernels.compact import compact
from kvlib.kernels.pointwise import add_rms_norm, rms_norm, silu_mul
from kvlib.kernels.redundancy import redundancy
from kvlib.kernels.sampler import sample
from kvlib.policies import make_policy
from kvlib.policies.dynts import IMPORTANCE
from kvlib.record import provenance, utc_now
from kvlib.study.timing import device_name, synchronise

SCHEMA = "kvlib.gpu-bench/1"
N_PROMPT = 8
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
"""Most that a kernel's output may differ from float64, as a share of its norm: two roundings of the type."""
TARGETS = {(20, 2500): 2900, (20, 5000): 2600, (128, 2500): 9800, (128, 5000): 6900}
"""Tokens/s on an H100, by batch and KV budget."""
ATTENTION_TARGET = 0.85
"""Share of copy bandwidth, from ATTENTION_FROM live tokens (batch x slots) on."""
ATTENTION_FROM = 50_000


@dataclass(frozen=True)
class Scale:
    """What is run. windows: (how many, steps in each). attention: (batch, live slots) of the attention kernel alone."""

    config: Qwen2Config
    kv_budgets: tuple[int, ...]
    n_recent: int
    batches: tuple[int, ...]
    most_rows: int
    windows: tuple[int, int]
    attention: tuple[tuple[int, int], ...]
    copy_bytes: int


def scales(name: str) -> Scale:
    if name == "full":
        return Scale(
            config=r1_qwen_config(),
            kv_budgets=(2500, 5000, 3000, 3500, 4000, 4500),
            n_recent=2000,
            batches=(20, 128, 64, 1),
            most_rows=512,
            windows=(5, 200),
            attention=((1, 5000), (20, 2350), (20, 4100), (64, 2350), (64, 4100), (128, 2350), (128, 4100)),
            copy_bytes=2**32,
        )
    small = Qwen2Config(
        vocab_size=256,
        hidden_size=224,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return Scale(small, (25, 50), 20, (3, 1), 4, (2, 4), ((1, 50), (3, 23)), 2**20)


# Kernels against float64


def apart(found: Tensor, wanted: Tensor) -> float:
    """Distance as a share of the wanted one's norm; infinite if anything is not finite."""
    distance = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return distance.item() if found.isfinite().all() else math.inf


def attention64(query: Tensor, keys: Tensor, values: Tensor, lengths: list[int], scaling: float):
    """Output and mass of every row over its live slots alone."""
    B, HQ, D = query.shape
    H, N = keys.shape[1:3]
    out, mass = torch.zeros_like(query, dtype=torch.float64), torch.zeros(B, H, N, dtype=torch.float64)
    mass = mass.to(query.device)
    for row, n in enumerate(lengths):
        q = query[row].double().view(H, HQ // H, D)
        p = (q @ keys[row, :, :n].double().mT * scaling).softmax(-1)
        out[row] = (p @ values[row, :, :n].double()).view(HQ, D)
        mass[row, :, :n] = p.sum(1)
    return out, mass


def kernel_checks(device: str) -> Iterator[tuple[str, Callable[[], float], float]]:
    """(name, check -> error, most that it may be) of every kernel: random inputs, ragged lengths, dead slots NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        short, most = str(dtype).removeprefix("torch."), TOLERANCE[dtype]
        for heads in ((4, 7, 128), (8, 4, 128), (3, 3, 64)):
            for mass in (False, True):
                name = f"attention {short} G{heads[1]} D{heads[2]}{' mass' if mass else ''}"
                yield name, partial(check_attention, device, dtype, *heads, mass), most
        for norm in (False, True):
            name = f"append {short}{' head norm' if norm else ''} with ring"
            yield name, partial(check_append, device, dtype, norm), most
        yield f"norms and activation {short}", partial(check_pointwise, device, dtype), most
        yield f"redundancy {short}", partial(check_redundancy, device, dtype), most
        # One draw in a hundred may be a tie in float32.
        yield f"sampler {short}", partial(check_sampler, device, dtype), 0.01
        yield f"compaction {short}", partial(check_compact, device, dtype), 0.0


def check_attention(device: str, dtype: torch.dtype, H: int, G: int, D: int, with_mass: bool) -> float:
    N, lengths = 700, [1, 63, 64, 65, 129, 511, 699, 700]
    B = len(lengths)
    query = torch.randn(B, H * G, D, device=device).to(dtype)
    # A view of a larger cache, as in the decoder.
    keys, values = (torch.randn(2, B, H, N, D, device=device).to(dtype)[1] for _ in range(2))
    for row, n in enumerate(lengths):
        keys[row, :, n:], values[row, :, n:] = torch.nan, torch.nan
    mass = torch.rand(B, H, N, device=device) if with_mass else None
    before = mass.clone() if with_mass else None
    found = decode_attention(query, keys, values, torch.tensor(lengths, device=device), D**-0.5, N, mass)
    out, wanted_mass = attention64(query, keys, values, lengths, D**-0.5)
    return max(apart(found, out), apart(mass, before + wanted_mass) if with_mass else 0.0)


def check_append(device: str, dtype: torch.dtype, norm: bool) -> float:
    B, HQ, H, D, N, W = 5, 28, 4, 128, 40, 8
    qkv = torch.randn(B, (HQ + 2 * H) * D, device=device).to(dtype)
    angle = torch.rand(B, D // 2, device=device).repeat(1, 2) * 6.28
    keys, values = (torch.full((B, H, N, D), torch.nan, dtype=dtype, device=device) for _ in range(2))
    ring = torch.full((B, HQ, W, D), torch.nan, dtype=dtype, device=device)
    slots, positions = torch.arange(B, device=device) * 7, torch.arange(B, device=device) * 1001
    norms = [torch.rand(D, device=device).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    options = {"n_query_heads": HQ, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6, "ring": ring}
    found = append(qkv, angle.cos().to(dtype), angle.sin().to(dtype), keys, values, slots, positions, **options)
    heads = qkv.double().view(B, -1, D)
    query, key = heads[:, :HQ], heads[:, HQ : HQ + H]
    if norm:
        query, key = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
            for x, w in zip((query, key), norms, strict=True)
        )
    cos, sin = (x.to(dtype).double()[:, None] for x in (angle.cos(), angle.sin()))
    query, key = (x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin for x in (query, key))
    rows = torch.arange(B, device=device)
    written = keys[rows, :, slots], values[rows, :, slots], ring[rows, :, positions % W]
    if int(keys.isnan().sum()) != B * H * (N - 1) * D or int(ring.isnan().sum()) != B * HQ * (W - 1) * D:
        return math.inf
    pairs = [(found, query), (written[0], key), (written[1], heads[:, HQ + H :]), (written[2], query)]
    return max(apart(*pair) for pair in pairs)


def check_pointwise(device: str, dtype: torch.dtype) -> float:
    x, residual = (torch.randn(5, 3584, device=device).to(dtype) for _ in range(2))
    weight, gate_up = (
        torch.rand(3584, device=device).to(dtype) + 0.5,
        torch.randn(5, 2 * 18944, device=device).to(dtype),
    )

    def norm64(y: Tensor) -> Tensor:
        return y.double() * (y.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    gate, up = gate_up.double().chunk(2, -1)
    return max(
        apart(rms_norm(x, weight, 1e-6), norm64(x)),
        apart(summed, x.double() + residual.double()),
        apart(normed, norm64(x + residual)),
        apart(silu_mul(gate_up), gate * gate.sigmoid() * up),
    )


def check_redundancy(device: str, dtype: torch.dtype) -> float:
    """Keys in clusters, so that the threshold is passed by some and missed by others, never closely."""
    N, centres = 300, torch.randn(2, 3, 20, 64, device=device)
    keys = centres[:, :, torch.arange(N, device=device) % 20] + 0.1 * torch.randn(2, 3, N, 64, device=device)
    keys = keys.to(dtype)

    def centred(x: Tensor) -> Tensor:
        """The similarities before the softmax, which hardly differ after it."""
        logs = x.double().cpu().log()
        return logs - logs.mean(-1, keepdim=True)

    return apart(centred(redundancy(keys, 0.7)), centred(redundancy(keys.double().cpu(), 0.7)))


def check_sampler(device: str, dtype: torch.dtype) -> float:
    """Share of draws that differ from those of float64."""
    B, V = 64, 1000
    # No two logits of a row are equal: which of equals wins is anyone's choice.
    values = (3 * torch.randn(100_000)).to(dtype).unique()
    logits = values[torch.rand(B, len(values)).argsort(-1)[:, :V]].to(device)
    request, step = torch.arange(B, device=device) * 7919, torch.arange(B, device=device)
    wrong = 0
    for settings in ((0.0, 1.0, 0), (0.6, 0.95, 20), (1.0, 1.0, 0)):
        found = sample(logits, request, step, *settings).cpu()
        wrong += int((found != sample(logits.double().cpu(), request.cpu(), step.cpu(), *settings)).sum())
    return wrong / (3 * B)


def check_compact(device: str, dtype: torch.dtype) -> float:
    """Share of kept slots that are lost, of rows not due that changed, over keys and positions."""
    L, B, H, N, n, D = 3, 4, 4, 90, 81, 128
    rows, n_keep = torch.tensor([3, 1], device=device), torch.tensor([60, 17], device=device)
    keys = torch.randn(L, B, H, N, D, device=device).to(dtype)
    positions = torch.randperm(N, device=device).to(torch.int32).expand(L, B, H, N).contiguous()
    order = torch.rand(L, 2, H, n, device=device).argsort(-1)
    keep = order < n_keep.view(1, 2, 1, 1)
    old_keys, old_positions = keys.clone(), positions.clone()
    compact((keys, positions), rows, keep, n_keep)
    wrong = int((keys[:, [0, 2]] != old_keys[:, [0, 2]]).sum())
    for layer in range(L):
        for i, row in enumerate(rows.tolist()):
            for head in range(H):
                kept = keep[layer, i, head].nonzero()[:, 0]
                want = old_positions[layer, row, head, kept].argsort()
                have = positions[layer, row, head, : int(n_keep[i])].argsort()
                was, now = old_keys[layer, row, head, kept][want], keys[layer, row, head][have]
                wrong += int((was != now).sum())
    return wrong / keys.numel()


def check_kernels(device: str) -> list[dict]:
    """A row per kernel: name, error, most, holds. A kernel that raises does not hold, and the others still run."""
    rows = []
    for name, check, most in kernel_checks(device):
        try:
            with torch.inference_mode():
                error = check()
            rows.append({"kernel": name, "holds": error <= most, "error": min(error, 1e9), "most": most})
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            rows.append({"kernel": name, "holds": False, "error": None, "most": None, "reason": reason})
    return rows


# Speed


def seconds_of(work: Callable[[], None], device: str, repeats: int) -> float:
    """Median seconds of one call, of 5 batches of `repeats` calls."""
    taken = []
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronise(device)
        taken.append((time.perf_counter() - started) / repeats)
    return float(np.median(taken))


@torch.inference_mode()
def time_attention(config: Qwen2Config, batch: int, live: int, copy: float, device: str, repeats: int) -> dict:
    """The attention kernel alone on as many layers as 2 GB of keys hold, so that no cache of the GPU holds them."""
    H, HQ = config.num_key_value_heads, config.num_attention_heads
    D = config.hidden_size // HQ
    one = 2 * batch * H * live * D * 2
    layers = max(2, min(config.num_hidden_layers, 2**31 // one))
    keys, values = (torch.randn(layers, batch, H, live, D, dtype=torch.bfloat16, device=device) for _ in range(2))
    query = torch.randn(batch, HQ, D, dtype=torch.bfloat16, device=device)
    lengths = torch.full((batch,), live, device=device)

    def all_layers() -> None:
        for k, v in zip(keys, values, strict=True):
            decode_attention(query, k, v, lengths, D**-0.5, live)

    graph = Graph("attention", all_layers, torch.device(device))
    graph(), graph()
    bandwidth = layers * one / seconds_of(graph, device, repeats)
    return {"batch": batch, "live_slots": live, "bandwidth": bandwidth, "share_of_copy": bandwidth / copy}


def fill(decoder: Decoder, held: np.ndarray) -> None:
    """As if every row had decoded `held` tokens (the prompt included): random keys, values and scores in the slots."""
    cache, n = decoder.cache, torch.from_numpy(held).to(decoder.device)
    cache.keys.normal_()
    cache.values.normal_()
    cache.state[IMPORTANCE].uniform_()
    slot = torch.arange(cache.shape.n_slots, dtype=torch.int32, device=decoder.device)
    cache.positions.copy_(torch.where(slot < n[:, None], slot, -1)[None, :, None])
    cache.lengths.copy_(n)
    decoder.position.copy_(n)
    decoder.rows.n_held[:], decoder.rows.n_made[:] = held, held - decoder.rows.n_prompt + 1


@torch.inference_mode()
def time_decode(model: nn.Module, head: nn.Module, scale: Scale, batch: int, kv_budget: int, device: str) -> dict:
    """Tokens/s of DynTS as published in its steady state: rows spread evenly over the sawtooth from keep to budget.

    A window is some hundred steps, with the rounds that fall into it. Graphs are captured before.
    """
    policy = replace(make_policy("dynts-published", n_recent=scale.n_recent), predictor=head)
    keep = policy.keep(kv_budget, N_PROMPT, kv_budget)
    n_windows, n_steps = scale.windows
    steps = n_windows * n_steps + 16
    meter = Meter(device)
    requests = [Request(str(row), tuple(range(1, N_PROMPT + 1)), row) for row in range(batch)]
    decoder = decoder_for(
        model,
        policy,
        kv_budget,
        requests,
        max_new_tokens=kv_budget + steps + 2,
        sampling=Sampling(0.6, 0.95, 20),
        meter=meter,
    )
    for row, request in enumerate(requests):
        decoder.admit(row, request)
    one_due = np.where(np.arange(batch) == 0, kv_budget, keep)
    for held in (np.full(batch, kv_budget), one_due):
        for _ in range(3):
            fill(decoder, held)
            decoder.step()
    spread = keep + (np.arange(batch) + 0.5) / batch * (kv_budget - keep)
    fill(decoder, spread.astype(np.int64))
    for _ in range(8):
        decoder.step()
    synchronise(device)
    forward = -meter.seconds()["forward"]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    windows, live = [], []
    for _ in range(n_windows):
        rounds = sum(map(len, decoder.rows.rounds))
        started = time.perf_counter()
        for _ in range(n_steps):
            decoder.step()
            live.append(decoder.rows.n_held.mean())
        synchronise(device)
        windows.append(time.perf_counter() - started)
        rounds = sum(map(len, decoder.rows.rounds)) - rounds
    forward += meter.seconds()["forward"]
    if not decoder.finite:
        raise FloatingPointError("logits or scores are not finite")
    rates = [batch * n_steps / seconds for seconds in windows]
    graphs = [decoder.forward, decoder.sample, *(graph for _, _, graph in decoder.round_graphs.values())]
    moved = minimum_bytes(model.config, batch, float(np.mean(live)), model.dtype.itemsize)
    return {
        "arm": "dynts-published",
        "batch": batch,
        "kv_budget": kv_budget,
        "seconds": windows,
        "steps_per_round": n_steps,
        "steps": float(np.median(rates)),
        "low": min(rates),
        "high": max(rates),
        "forward": batch * n_steps * n_windows / forward,
        "live_slots": float(np.mean(live)),
        "rounds_in_last_window": rounds,
        "plain": [graph.name for graph in graphs if graph.captured is None] if device != "cpu" else None,
        "kv_bytes": decoder.cache.nbytes(),
        "peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "bytes_per_step": moved,
        "bandwidth": moved * n_steps * n_windows / sum(windows),
    }


def largest_batch(model: nn.Module, kv_budget: int, most: int, device: str) -> int:
    """Rows whose cache fits beside the weights, with 4 GiB and a tenth of the rest left for the work itself."""
    if device == "cpu":
        return most
    free = torch.cuda.mem_get_info()[0] - 2**32
    rows = int(0.9 * free / ((kv_budget + 1) * kv_bytes_per_token(model)))
    return min(most, rows // 8 * 8 or rows)


def release(device: str) -> None:
    """Give back the memory of decoders that are no longer used."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


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
    done = {(row["batch"], row["live_slots"]): row["share_of_copy"] for row in record["attention"]}
    rows += [
        verdict(f"attention, batch {batch} x {live} slots", done.get((batch, live)), ATTENTION_TARGET, "of copy")
        for batch, live in scale.attention
        if batch * live >= ATTENTION_FROM
    ]
    plain = [row["plain"] for row in record["arms"] if row["plain"] is not None]
    captured = plain.count([]) / len(plain) if plain else None
    rows.append(verdict("settings whose every piece ran as a CUDA graph", captured, 1.0, "of all"))
    return rows


def settings(scale: Scale, largest: Sequence[int]) -> list[tuple[int, int]]:
    """(batch, KV budget) in the order of what matters: the ends of the range first; the largest batch per budget."""
    ends, between = scale.kv_budgets[:2], scale.kv_budgets[2:]
    most = dict(zip(scale.kv_budgets, largest, strict=True))
    found = []
    for budgets in (ends, between):
        found += [(batch, budget) for batch in scale.batches for budget in budgets if batch <= most[budget]]
        found += [(most[budget], budget) for budget in budgets]
    return list(dict.fromkeys(found))


def gpu_bench(scale: Scale, device: str, seconds: float, path: Path, say: Callable[[str], None]) -> dict:
    """All parts within `seconds` of wall time; the record is written after each, and lists what did not fit."""
    begun = time.monotonic()
    record = {
        "schema": SCHEMA,
        "model": "r1-qwen" if scale.config.num_hidden_layers == 28 else "dry run",
        "weights": "random weights",
        "device": device_name(device),
        "dtype": "bfloat16",
        "policy": "dynts-published, random predictor",
        "n_prompt": N_PROMPT,
        "provenance": {**provenance(), **driver(device)},
        "kernels": [],
        "attention": [],
        "arms": [],
        "left_out": [],
        "targets": [],
        "complete": False,
    }

    def left() -> float:
        return seconds - (time.monotonic() - begun)

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())

    say(f"{record['device']}: kernels against float64 ({left():.0f} s left)")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        record["kernels"] = check_kernels(device)
    for row in record["kernels"]:
        found = row.get("reason") or f"{row['error']:.1e} (at most {row['most']:.0e})"
        say(f"  {'ok ' if row['holds'] else 'RED'} {row['kernel']}: {found}")
    save()

    model = random_model(scale.config, torch.bfloat16, device)
    sizes = Sizes(torch.bfloat16, 2, 64, 64, 128, 32)
    subject = random_subject("r1-qwen", model, sizes)
    policy = bench_policy("dynts", sizes.kv_budget, sizes)
    checks = [check_full(subject)]
    checks += [check("dynts", subject, policy, sizes.kv_budget, sizes) for check in (check_rounds, check_graphs)]
    for check in checks:
        say(str(check))
    record["gate"] = judged(checks)
    record["gate"]["holds"] &= all(row["holds"] for row in record["kernels"])
    if not record["gate"]["holds"]:
        save()
        return record

    copy = copy_bandwidth(device, scale.copy_bytes)
    record["ceilings"] = {
        "copy_bandwidth": copy,
        "weight_bytes": minimum_bytes(scale.config, 1, 0),
        "kv_bytes_per_token": kv_bytes_per_token(model),
    }
    say(f"copy {copy / 1e9:.0f} GB/s ({left():.0f} s left)")
    repeats = max(1, scale.windows[1] // 4)
    for batch, live in scale.attention:
        row = time_attention(scale.config, batch, live, copy, device, repeats)
        record["attention"].append(row)
        say(f"attention, batch {batch:3} x {live} slots: {row['share_of_copy']:.0%} of copy bandwidth")
    release(device)
    largest = [largest_batch(model, budget, scale.most_rows, device) for budget in scale.kv_budgets]
    head = subject.fit(make_policy("dynts-published", n_recent=scale.n_recent)).predictor
    took: dict[int, float] = {}
    for batch, budget in settings(scale, largest):
        # As long as the settings of a batch at least as large took, or in proportion to the largest so far.
        at_least = [t for rows, t in took.items() if rows >= batch]
        scaled = [t * batch / rows for rows, t in took.items()]
        expected = max(at_least or scaled, default=0.0) * 1.5
        if left() < expected + 5:
            record["left_out"].append({"batch": batch, "kv_budget": budget, "reason": "no time left"})
            continue
        started = time.monotonic()
        try:
            row = time_decode(model, head, scale, batch, budget, device)
        except (FloatingPointError, RuntimeError) as error:
            record["left_out"].append({"batch": batch, "kv_budget": budget, "reason": str(error).splitlines()[0]})
            say(f"batch {batch:3}, KV budget {budget}: {record['left_out'][-1]['reason']}")
        else:
            linears = Linears(replace(subject, prompts=torch.zeros(batch, 1)))
            row["linears"] = batch / seconds_of(lambda: linears.advance(1), device, 2)  # noqa: B023
            row["bandwidth_share"] = row["bandwidth"] / copy
            record["arms"].append(row)
            say(f"batch {batch:3}, KV budget {budget}: {row['steps']:,.0f} tokens/s ({row['low']:,.0f} to "
                f"{row['high']:,.0f}), {row['live_slots']:.0f} live, {row['bandwidth_share']:.0%} of copy bandwidth, "
                f"{left():.0f} s left")  # fmt: skip
        took[batch] = time.monotonic() - started
        release(device)
        save()
    record["targets"] = verdicts(record, scale)
    record["complete"] = not record["left_out"]
    record["seconds"] = time.monotonic() - begun
    save()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--seconds", type=float, default=500.0, help="wall time of all parts together")
    parser.add_argument("--folder", type=Path, required=True, help="where the record is written")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("kvlib.bench.gpu: torch sees no CUDA GPU; a dry run on the CPU: --device cpu --scale tiny")
    if given.device == "cpu" and given.scale == "full":
        sys.exit("kvlib.bench.gpu: 7 billion parameters are not run on a CPU; use --scale tiny for a dry run")
    card = device_name(given.device).lower().replace(" ", "-").replace("/", "-")
    path = given.folder / f"r1-qwen-{card}-{utc_now().replace(':', '')}.json"
    record = gpu_bench(scales(given.scale), given.device, given.seconds, path, lambda line: print(line, flush=True))
    for row in record["targets"]:
        measured = "" if row["measured"] is None else f"{row['measured']:,.2f} "
        print(f"{row['verdict']:12} {row['target']}: {measured}(at least {row['wanted']:,} {row['unit']})")
    for row in record["left_out"]:
        print(f"left out: batch {row['batch']}, KV budget {row['kv_budget']} ({row['reason']})")
    print(f"record: {path}")
    print(json.dumps(record, allow_nan=False))
    if not record["gate"]["holds"]:
        sys.exit("kvlib.bench.gpu: a kernel or the model's output is wrong, so nothing was timed; see RED above")


if __name__ == "__main__":
    main()
