"""What bench.gpu times: a step by kernel, products, attention, rounds, the sampler, and decoding at a steady length."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config

from kvlib.bench.arms import Ours, products_of
from kvlib.bench.measure import traffic
from kvlib.bench.shapes import Subject, r1_config
from kvlib.engine.decoder import Decoder
from kvlib.engine.graph import Graph
from kvlib.engine.paired import fill, synchronise, timed
from kvlib.engine.sampling import Sampling
from kvlib.kernels.attention import decode_attention
from kvlib.policies import Policy, make_policy

N_PROMPT = 8
SAMPLING = Sampling(0.6, 0.95, 20)
PROGRAMS, STAGES = (128, 256, 512, 1024), (2, 3, 4)
"""What the attention kernel is tried with."""


@dataclass(frozen=True)
class Scale:
    """What is run. step: (batch, live slots) of the step that is profiled. windows: (how many, steps in each)."""

    config: Qwen2Config
    n_recent: int
    settings: tuple[tuple[int, int], ...]
    """(batch, KV budget), what matters most first."""
    step: tuple[int, int]
    windows: tuple[int, int]
    attention: tuple[tuple[int, int], ...]
    """(batch, live slots) of the attention kernel alone; of the first three, its settings too."""
    products: tuple[int, ...]
    """Rows of the matrix products."""
    probe_steps: int
    copy_bytes: int


def scales(name: str) -> Scale:
    if name == "full":
        return Scale(
            config=r1_config("r1-qwen"),
            n_recent=2000,
            settings=((20, 2500), (20, 5000), (128, 2500), (128, 5000), (64, 2500), (64, 5000), (1, 5000)),
            step=(20, 2350),
            windows=(5, 200),
            attention=((20, 2350), (20, 4100), (128, 2350), (128, 4100), (64, 2350), (1, 5000)),
            products=(1, 20, 64, 128),
            probe_steps=200,
            copy_bytes=2**32,
        )
    small = Qwen2Config(
        vocab_size=256, hidden_size=224, intermediate_size=64, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return Scale(small, 20, ((3, 25), (3, 50)), (3, 40), (2, 4), ((3, 23),), (1, 3), 66, 2**20)


def seconds_of(work: Callable[[], None], device: str, repeats: int) -> float:
    """Median seconds of one call, of 5 batches of `repeats` calls."""

    def batch() -> None:
        for _ in range(repeats):
            work()

    return float(np.median([timed(batch, device) for _ in range(5)])) / repeats


def captured(name: str, work: Callable[[], None], device: str) -> Graph:
    """The work as a graph that is ready to be replayed."""
    graph = Graph(name, work, torch.device(device))
    graph(), graph()
    return graph


def reserved(device: str) -> int | None:
    return torch.cuda.memory_reserved() if device != "cpu" else None


def release(device: str) -> None:
    """Give back the memory of decoders that are no longer used."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def reasons(decoder: Decoder) -> dict[str, str]:
    """Why a piece of a decoder's work runs without a graph, by piece."""
    graphs = [decoder.forward, decoder.sample, *(graph for _, _, graph in decoder.round_graphs.values())]
    return {graph.name: graph.reason or "never called twice" for graph in graphs if graph.captured is None}


def steady_arm(subject: Subject, policy: Policy, kv_budget: int | None, n_rows: int, n_new: int, without="") -> Ours:
    """Sampling, as a study does, after a prompt of N_PROMPT tokens in every row."""
    few = replace(subject, prompts=torch.arange(1, N_PROMPT + 1).expand(n_rows, -1))
    return Ours(few, policy, kv_budget, n_new, without, sampling=SAMPLING)


def published(subject: Subject, n_recent: int) -> Policy:
    return subject.fit(make_policy("dynts-published", n_recent=n_recent))


@torch.inference_mode()
def profile_step(subject: Subject, scale: Scale) -> dict:
    """Microseconds of one step by kernel, over 20 steps of DynTS without a round, and their sum against wall time."""
    (batch, live), device = scale.step, str(subject.model.device)
    arm = steady_arm(subject, published(subject, scale.n_recent), live + 40, batch, live + 80)
    arm.start()
    fill(arm.decoder, np.full(batch, live - 10))
    arm.advance(4)
    wall = timed(lambda: arm.advance(20), device) / 20
    kind = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    fill(arm.decoder, np.full(batch, live - 10))
    with profile(activities=[kind]) as seen:
        arm.advance(20)
        synchronise(device)
    rows = []
    for event in seen.key_averages():
        total = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        if total:
            rows.append({"kernel": event.key[:160], "calls": event.count / 20, "us": total / 20})
    rows.sort(key=lambda row: -row["us"])
    return {"batch": batch, "live_slots": live, "wall_us": 1e6 * wall, "sum_us": sum(row["us"] for row in rows),
            "kernels": rows[:40]}  # fmt: skip


@torch.inference_mode()
def time_products(subject: Subject, scale: Scale) -> Iterator[dict]:
    """Microseconds of each product, by cuBLAS, at several numbers of rows, over all layers, so that no cache helps."""
    model, repeats = subject.model, max(1, scale.windows[1] // 20)
    products, device = products_of(model), str(model.device)
    for batch in scale.products:
        for name, linears in products.items():
            x = torch.randn(batch, linears[0].weight.shape[1], dtype=model.dtype, device=device)
            graph = captured(name, lambda x=x, own=linears: [linear(x) for linear in own] and None, device)
            seconds = seconds_of(graph, device, repeats) / len(linears)
            size = linears[0].weight.nbytes
            yield {"product": name, "rows": batch, "us": 1e6 * seconds, "bandwidth": size / seconds}


@torch.inference_mode()
def time_attention(scale: Scale, copy: float | None, device: str) -> Iterator[dict]:
    """The attention kernel alone on as many layers as 2 GB of keys hold; with other settings in the first three.

    copy: a plain copy's bandwidth, if it was measured.
    """
    variants = [(shape, None, None) for shape in scale.attention]
    if device != "cpu":
        variants += [(shape, n, k) for shape in scale.attention[:3] for n in PROGRAMS for k in STAGES]
    for (batch, live), programs, stages in variants:
        bandwidth = attention_bandwidth(scale, device, batch, live, programs, stages)
        row = {"batch": batch, "live_slots": live, "bandwidth": bandwidth, "share_of_copy": copy and bandwidth / copy}
        yield row if programs is None else {**row, "programs": programs, "stages": stages}


def attention_bandwidth(
    scale: Scale, device: str, batch: int, live: int, programs: int | None, stages: int | None
) -> float:
    """Bytes per second of the attention kernel alone, with its own settings where programs and stages are None."""
    config = scale.config
    H, HQ = config.num_key_value_heads, config.num_attention_heads
    D = config.hidden_size // HQ
    one = 2 * batch * H * live * D * 2
    n_layers = max(2, min(config.num_hidden_layers, 2**31 // one))
    keys, values = (torch.randn(n_layers, batch, H, live, D, dtype=torch.bfloat16, device=device) for _ in "kv")
    query = torch.randn(batch, HQ, D, dtype=torch.bfloat16, device=device)
    lengths = torch.full((batch,), live, device=device)

    def all_layers() -> None:
        for k, v in zip(keys, values, strict=True):
            if programs is None:
                decode_attention(query, k, v, lengths, D**-0.5, live)
            else:
                from kvlib.kernels import attention_triton  # Triton has no build for every platform

                attention_triton.decode_attention(query, k, v, lengths, D**-0.5, None, programs, stages)

    graph = captured("attention", all_layers, device)
    return n_layers * one / seconds_of(graph, device, max(1, scale.windows[1] // 4))


@torch.inference_mode()
def time_rounds(subject: Subject, scale: Scale) -> Iterator[dict]:
    """A round of one row and of all, at the largest budget: milliseconds, and the memory that its graph keeps."""
    n_rows, kv_budget = max(scale.settings[:2], key=lambda setting: setting[1])
    device = str(subject.model.device)
    for policy in (published(subject, scale.n_recent), make_policy("rkv", n_obs=8, n_recent=8, buffer=kv_budget // 4)):
        arm = steady_arm(subject, policy, kv_budget, n_rows, kv_budget + 2)
        arm.start()
        for due in (np.arange(1), np.arange(n_rows)):
            fill(arm.decoder, np.full(n_rows, kv_budget + 1))
            its = arm.decoder.round(due, kv_budget + 1, arm.decoder.rows.n_keep(due, kv_budget + 1))
            before = reserved(device)
            graph = captured("round", lambda its=its, arm=arm: arm.decoder.evict_rows(its), device)
            taken = reserved(device)
            row = {"policy": type(policy).__name__, "rows": len(due), "slots": kv_budget + 1}
            row |= {"ms": 1e3 * seconds_of(graph, device, 5), "reserved_bytes": taken and taken - before}
            yield row | {"plain": graph.reason}
        del arm
        release(device)


@torch.inference_mode()
def time_sampler(scale: Scale, device: str) -> Iterator[dict]:
    for batch in scale.products:
        logits = torch.randn(batch, scale.config.vocab_size, dtype=torch.bfloat16, device=device)
        row = torch.arange(batch, device=device)
        graph = captured("sampling", lambda logits=logits, row=row: SAMPLING(logits, row, row) is None, device)
        yield {"rows": batch, "us": 1e6 * seconds_of(graph, device, 5)}


@torch.inference_mode()
def time_decode(subject: Subject, scale: Scale, batch: int, kv_budget: int, copy: float | None) -> dict:
    """Tokens/s of DynTS as published in its steady state: rows spread evenly over the sawtooth from keep to budget.

    A window is some hundred steps, with the rounds that fall into it. Graphs are captured before. copy: as in
    time_attention.
    """
    policy, (n_windows, n_steps) = published(subject, scale.n_recent), scale.windows
    keep, steps = policy.keep(kv_budget, N_PROMPT, kv_budget), n_windows * n_steps + 16
    device = str(subject.model.device)
    arm = steady_arm(subject, policy, kv_budget, batch, kv_budget + steps + 2)
    decoder, sizes = arm.decoder, [1 << i for i in range(batch.bit_length()) if 1 << i < batch]
    arm.start()
    for n_due in (*sizes, batch):
        for _ in range(3):
            fill(decoder, np.where(np.arange(batch) < n_due, kv_budget, keep))
            arm.advance(1)
    fill(decoder, (keep + (np.arange(batch) + 0.5) / batch * (kv_budget - keep)).astype(np.int64))
    arm.advance(8)
    before, rounds = arm.phase_seconds()["forward"], sum(map(len, decoder.rows.rounds))
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    live, windows = [], []
    for _ in range(n_windows):
        windows.append(timed(lambda: arm.advance(n_steps), device))
        live.append(decoder.rows.n_held.mean())
    if not decoder.finite:
        raise FloatingPointError("logits or scores are not finite")
    rates = [batch * n_steps / seconds for seconds in windows]
    return {
        "arm": "dynts-published",
        "batch": batch,
        "kv_budget": kv_budget,
        "seconds": windows,
        "steps_per_round": n_steps,
        "steps": float(np.median(rates)),
        "low": min(rates),
        "high": max(rates),
        "forward": batch * n_steps * n_windows / (arm.phase_seconds()["forward"] - before),
        "rounds": sum(map(len, decoder.rows.rounds)) - rounds,
        "plain": reasons(decoder) if device != "cpu" else None,
        "kv_bytes": arm.kv_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        **traffic(subject.model, batch, float(np.mean(live)), n_steps * n_windows, sum(windows), copy),
    }
