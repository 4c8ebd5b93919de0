"""Speed against Hugging Face's own loop, kvpress and the machine's ceilings; correctness first. `make bench`.

All arms decode the same prompts with the same weights. Each is a run of its own that stays alive and advances by the
same number of steps in every round, in the order A B B A, so that a ratio compares runs at the same place, moments
apart. Whatever is measured is printed with its interval, next to what two equal arms differ by.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from kvlib.bench.count import minimum_bytes
from kvlib.bench.shapes import r1_llama_config, r1_qwen_config, random_model
from kvlib.charts.throughput import CEILINGS
from kvlib.engine.attention import IMPLEMENTATION
from kvlib.engine.decoder import Decoder, Request, decoder_for
from kvlib.engine.fast import Layer, fuse
from kvlib.engine.meter import Meter
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.fitted import fit
from kvlib.kernels.rope import rotate
from kvlib.models import load_reasoner
from kvlib.policies import Full, Policy, make_policy
from kvlib.record import provenance
from kvlib.study.timing import device_name, synchronise
from kvlib.tasks.datasets import load_problems
from kvlib.train.head import ImportanceHead

SCHEMA = "kvlib.bench/1"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2}
"""Most that our logits may differ from transformers', as a share of their norm; or twice what its own two attention
functions differ by on the same tokens, if that is more: of bfloat16 and random weights that is a tenth."""
GATE_STEPS = 16
BASELINE = "hf-sdpa"
KVPRESS = ("knorm", "snapkv-kvpress")
"""Policies that kvpress has with the same settings."""
WITHOUT_BUDGET = ("hf-eager", BASELINE, *CEILINGS, "full", "full-again", "full-unfused", "full-unpacked", "full-eager")


@dataclass(frozen=True)
class Sizes:
    """Rows, tokens per prompt and to decode, KV budget (slots), tokens between rounds of eviction."""

    dtype: torch.dtype
    batch: int
    n_prompt: int
    n_new: int
    kv_budget: int
    interval: int


SIZES = {
    "tiny": Sizes(torch.float32, 8, 64, 256, 128, 32),
    "smollm2": Sizes(torch.float32, 8, 64, 512, 256, 64),
    "r1-qwen": Sizes(torch.bfloat16, 20, 1024, 1024, 1280, 128),
    "r1-llama": Sizes(torch.bfloat16, 20, 1024, 1024, 1280, 128),
}
CONFIGS = {"r1-qwen": r1_qwen_config, "r1-llama": r1_llama_config}
POLICIES = ("window", "knorm", "snapkv-kvpress", "rkv", "dynts")


@dataclass(frozen=True)
class Subject:
    """What is measured: a model in transformers' form and the prompts `[B, P]`. fit fills in what a policy needs."""

    name: str
    weights: str
    model: nn.Module
    prompts: Tensor
    eos_ids: tuple[int, ...]
    fit: Callable[[Policy], Policy]


def load_subject(name: str, sizes: Sizes, device: str) -> Subject:
    """A model by the name of its sizes, with prompts cut from the embedded problems, or of random ids where the weights
    are random. Raises ConfigError."""
    if name not in CONFIGS:
        reasoner = load_reasoner(name, str(sizes.dtype).removeprefix("torch."), device)
        ids = [i for problem in load_problems("chain-a") for i in reasoner.encode(problem.question)]
        need = sizes.batch * sizes.n_prompt
        ids = (ids * (need // len(ids) + 1))[:need]
        prompts = torch.tensor(ids, device=device).view(sizes.batch, sizes.n_prompt)
        return Subject(name, "real", reasoner.model, prompts, reasoner.eos_ids, lambda p: fit(p, name, reasoner))
    if device == "cpu":
        raise ConfigError(f"{name} has 7 billion parameters and is measured on a CUDA GPU; torch sees none here")
    model = random_model(CONFIGS[name](), sizes.dtype, device)
    return random_subject(name, model, sizes)


def random_subject(name: str, model: nn.Module, sizes: Sizes) -> Subject:
    """Random ids as prompts, and a random head as the predictor of dynts."""
    device, draw = next(model.parameters()).device, torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (sizes.batch, sizes.n_prompt), generator=draw).to(device)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        head = ImportanceHead(model.config.hidden_size).to(sizes.dtype).requires_grad_(False)
    return Subject(name, "random weights", model, prompts, (), lambda p: replace(p, predictor=head) if p.needs else p)


def bench_policy(name: str, kv_budget: int, sizes: Sizes) -> Policy:
    """A preset whose rounds come every sizes.interval tokens and leave kv_budget - interval slots."""
    options = {"buffer": sizes.interval}
    if name == "snapkv-kvpress":
        options |= {"n_obs": observed(sizes), "n_recent": observed(sizes)}
    if name.startswith("dynts"):
        options["n_recent"] = max(0, kv_budget - sizes.interval - sizes.n_prompt) // 2
    return make_policy(name, **options)


def observed(sizes: Sizes) -> int:
    """SnapKV's window. kvpress buffers the hidden states of one interval only, and asks for more of them than this."""
    return min(64, sizes.interval // 2)


class Ours:
    """kvlib's decode loop. without: a part that it leaves out, `unfused`, `unpacked` or `eager` (see without_part)."""

    def __init__(self, subject: Subject, policy: Policy, kv_budget: int | None, n_new: int, without: str = ""):
        self.subject, self.meter = subject, Meter(subject.model.device)
        self.requests = [Request(str(row), tuple(prompt), row) for row, prompt in enumerate(subject.prompts.tolist())]
        self.decoder = decoder_for(
            subject.model, policy, kv_budget, self.requests, max_new_tokens=n_new + 1, meter=self.meter
        )
        if without:
            without_part(self.decoder, without)
        self.kv_bytes = self.decoder.cache.nbytes()

    def start(self) -> None:
        for row, request in enumerate(self.requests):
            self.decoder.admit(row, request)

    def advance(self, n: int) -> None:
        for _ in range(n):
            self.decoder.step()

    def output(self) -> Tensor:
        if not self.decoder.finite:
            raise FloatingPointError("the model's logits or a policy's scores are not finite; use another dtype")
        return self.decoder.output[:, : int(self.decoder.rows.n_made[0])]

    def live_slots(self) -> float:
        n = int(self.decoder.rows.n_made[0])
        return float(self.decoder.rows.held[:, 1:n].mean())

    def phase_seconds(self) -> dict[str, float]:
        return self.meter.seconds()


def without_part(decoder: Decoder, part: str) -> None:
    """unfused: a product per matrix of the model, joined afterwards. unpacked: products of the weights as they are.
    eager: no CUDA graph. On a CPU unfused also leaves the matrices unpacked that are small alone."""
    fast = decoder.model
    if part == "unfused":
        fast.layers = [
            replace(
                own,
                qkv=apart(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                gate_up=apart(layer.mlp.gate_proj, layer.mlp.up_proj),
            )
            for own, layer in zip(fast.layers, fast.base.layers, strict=True)
        ]
    elif part == "unpacked":
        fast.layers = [
            replace(own, **{name: replace(getattr(own, name), packed=None) for name in Layer.products})
            for own in fast.layers
        ]
        fast.head = replace(fast.head, packed=None)
    else:
        decoder.forward, decoder.sample = Decoder._forward, Decoder._sample
        decoder.replay_round = lambda *due: decoder.evict_rows(decoder.round(*due))


def apart(*linears: nn.Linear) -> Callable[[Tensor], Tensor]:
    own = [fuse(linear) for linear in linears]
    return lambda x: torch.cat([linear(x) for linear in own], -1)


class HuggingFace:
    """transformers' generate with a DynamicCache, continued from where it stopped."""

    def __init__(self, subject: Subject, implementation: str, n_new: int):
        self.subject, self.implementation = subject, implementation
        self.meter = Meter(subject.model.device)
        B, P = subject.prompts.shape
        self.kv_bytes = B * (P + n_new) * kv_bytes_per_token(subject.model)

    def start(self) -> None:
        self.cache, self.sequence = DynamicCache(config=self.subject.model.config), self.subject.prompts
        self._generate(1, "prefill")

    def advance(self, n: int) -> None:
        self._generate(n, "forward")

    def _generate(self, n: int, phase: str) -> None:
        with through_transformers(self.subject.model, self.implementation) as model, clocked(model, self.meter, phase):
            self.sequence = model.generate(
                self.sequence,
                attention_mask=torch.ones_like(self.sequence),
                past_key_values=self.cache,
                generation_config=greedy(n),
            )

    def output(self) -> Tensor:
        return self.sequence[:, self.subject.prompts.shape[1] :]

    def live_slots(self) -> float:
        P, T = self.subject.prompts.shape[1], self.sequence.shape[1]
        return (P + T) / 2

    def phase_seconds(self) -> dict[str, float]:
        return self.meter.seconds()


def greedy(n: int, **options) -> GenerationConfig:
    """Exactly n tokens, the likeliest each time."""
    return GenerationConfig(
        max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True, **options
    )


@contextmanager
def through_transformers(model: nn.Module, implementation: str) -> Iterator[nn.Module]:
    """The model as it is without kvlib: its own attention, and no defaults that would end or change generate."""
    own = model.generation_config
    model.set_attn_implementation(implementation)
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield model
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
        model.generation_config = own


@contextmanager
def clocked(model: nn.Module, meter: Meter, phase: str) -> Iterator[None]:
    """Time every call of the model."""
    running = []

    def before(*_) -> None:
        running.append(meter.phase(phase))
        running[-1].__enter__()

    def after(*_) -> None:
        running.pop().__exit__(None, None, None)

    hooks = model.register_forward_pre_hook(before), model.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Linears:
    """Matrix products alone, one after the other: the model's linear layers (`linears`), or what kvlib's step makes of
    them (`products`)."""

    def __init__(self, subject: Subject, kind: str = "linears"):
        model, B = subject.model, len(subject.prompts)
        if kind == "linears":
            self.linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        else:
            layers = [Layer.of(layer) for layer in model.base_model.layers]
            self.linears = [getattr(layer, name) for layer in layers for name in Layer.products]
            self.linears.append(fuse(model.get_output_embeddings()))
        sizes = {linear.weight.shape[1] for linear in self.linears}
        self.inputs = {n: torch.randn(B, n, dtype=model.dtype, device=model.device) for n in sizes}

    def start(self) -> None:
        pass

    @torch.inference_mode()
    def advance(self, n: int) -> None:
        for _ in range(n):
            for linear in self.linears:
                linear(self.inputs[linear.weight.shape[1]])

    def phase_seconds(self) -> dict[str, float]:
        return {}


class KVPress:
    """kvpress' DecodingPress with the same weights, in a process of another Python (kvlib/bench_kvpress.py)."""

    def __init__(self, python: str, folder: Path, subject: Subject, policy: str, kv_budget: int, sizes: Sizes):
        settings = {
            "model": str(folder),
            "policy": policy,
            "n_obs": observed(sizes),
            "keep": kv_budget - sizes.interval,
            "interval": sizes.interval,
            "threads": torch.get_num_threads(),
            "prompts": subject.prompts.tolist(),
        }
        script = Path(__file__).with_name("kvpress_peer.py")
        # -I: this folder's select.py must not stand in for Python's own.
        self.process = subprocess.Popen(
            [python, "-I", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.forward = 0.0
        self.kv_bytes = sizes.batch * kv_budget * kv_bytes_per_token(subject.model)
        self.versions = self._ask(settings)["versions"]

    def _ask(self, message: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the kvpress process {self.process.args[0]} ended (its own message is above); make its environment "
                "with `make bench-kvpress-env`, or leave the kvpress arms out"
            ) from error

    def start(self) -> None:
        self._ask({"do": "start"})

    def advance(self, n: int) -> None:
        self.forward += self._ask({"do": "advance", "n": n})["forward"]

    def output(self) -> Tensor:
        return torch.tensor(self._ask({"do": "output"})["tokens"])

    def live_slots(self) -> float:
        return self._ask({"do": "output"})["live"]

    def phase_seconds(self) -> dict[str, float]:
        return {"forward": self.forward}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def kv_bytes_per_token(model: nn.Module) -> int:
    """Of keys and values, all layers."""
    itemsize = model.dtype.itemsize
    return minimum_bytes(model.config, 1, 1, itemsize) - minimum_bytes(model.config, 1, 0, itemsize)


def default_arms(name: str, device: str, kvpress: bool) -> list[str]:
    arms = ["hf-eager", BASELINE, *CEILINGS, "full", "full-again"]
    arms += [policy for policy in POLICIES if policy != "dynts" or name != "smollm2"]
    arms += ["full-unfused"] + ["full-eager"] * (device != "cpu")
    # Of the tiny model nothing is packed.
    arms += ["full-unpacked"] * (device == "cpu" and name != "tiny")
    return arms + [f"kvpress-{policy}" for policy in KVPRESS if kvpress]


def split_arm(name: str, sizes: Sizes) -> tuple[str, int | None]:
    """(policy or kind, KV budget) of an arm's name, e.g. knorm@128; None where nothing is evicted."""
    kind, _, budget = name.partition("@")
    if kind in WITHOUT_BUDGET:
        if budget:
            raise ConfigError(f"arm {name!r} evicts nothing and takes no KV budget")
        return kind, None
    if budget and not budget.isdecimal():
        raise ConfigError(f"the KV budget of arm {name!r} must be a whole number of slots")
    return kind, int(budget) if budget else sizes.kv_budget


def check_arms(names: Sequence[str], sizes: Sizes, kvpress: str | None) -> None:
    """Raise ConfigError for an arm that does not exist or cannot run, before any model is loaded."""
    if len(set(names)) != len(names):
        raise ConfigError(f"an arm is named twice in {','.join(names)}; a second full cache is called full-again")
    for name in names:
        kind, kv_budget = split_arm(name, sizes)
        if kv_budget is None:
            continue
        policy = kind.removeprefix("kvpress-")
        if kind != policy and policy not in KVPRESS:
            raise ConfigError(f"arm {name!r}: the same settings exist in kvpress for {', '.join(KVPRESS)} only")
        if kind != policy and kvpress is None:
            raise ConfigError(f"arm {name!r} needs --kvpress and the Python that kvpress is installed in")
        bench_policy(policy, kv_budget, sizes).check(kv_budget, sizes.n_prompt, f"arm {name!r}")


def build_arm(name: str, subject: Subject, sizes: Sizes, kvpress: str | None, folder: Path):
    kind, kv_budget = split_arm(name, sizes)
    if kind.startswith("hf-"):
        return HuggingFace(subject, kind.removeprefix("hf-"), sizes.n_new)
    if kind in CEILINGS:
        return Linears(subject, kind)
    if kv_budget is None:
        part = kind.partition("-")[2]
        return Ours(subject, Full(), None, sizes.n_new, part if part != "again" else "")
    if kind.startswith("kvpress-"):
        return KVPress(kvpress, folder, subject, kind.removeprefix("kvpress-"), kv_budget, sizes)
    return Ours(subject, subject.fit(bench_policy(kind, kv_budget, sizes)), kv_budget, sizes.n_new)


@dataclass(frozen=True)
class Check:
    """One line of the gate."""

    name: str
    holds: bool
    detail: str

    def __str__(self) -> str:
        return f"gate: {'ok ' if self.holds else 'RED'} {self.name}: {self.detail}"


def gate(subject: Subject, sizes: Sizes, names: Sequence[str]) -> list[Check]:
    """Is what will be timed correct: the full cache against transformers, and what every policy's rounds leave."""
    checks, seen = [check_full(subject)], []
    for name in names:
        kind, kv_budget = split_arm(name, sizes)
        if kv_budget is None or kind.startswith("kvpress-"):
            continue
        policy = bench_policy(kind, kv_budget, sizes)
        # Of one policy at several budgets, the rounds are the same.
        if policy not in seen:
            checks.append(check_rounds(name, subject, policy, kv_budget, sizes))
            if subject.model.device.type == "cuda":
                checks.append(check_graphs(name, subject, policy, kv_budget, sizes))
            seen.append(policy)
    return checks


def judged(checks: Sequence[Check]) -> dict:
    """The gate of a record: whether all hold, and what was found."""
    return {"holds": all(check.holds for check in checks), "checks": [vars(check) for check in checks]}


def check_full(subject: Subject) -> Check:
    """Every logit of GATE_STEPS steps on transformers' own greedy tokens, and each greedy token but near ties."""
    with through_transformers(subject.model, "eager") as model:
        expected = model.generate(
            subject.prompts,
            attention_mask=torch.ones_like(subject.prompts),
            generation_config=greedy(GATE_STEPS + 1, output_logits=True, return_dict_in_generate=True),
        )
        tokens = expected.sequences[:, subject.prompts.shape[1] :]
    with through_transformers(subject.model, "sdpa") as model, torch.inference_mode():
        at_once = model(expected.sequences[:, :-1]).logits[:, subject.prompts.shape[1] - 1 :]
    of_transformers = distance(at_once, torch.stack(expected.logits, 1))
    arm = Ours(subject, Full(), None, GATE_STEPS)
    arm.start()
    decoder = arm.decoder
    tolerance, furthest, other, agreed = max(TOLERANCE[model.dtype], 2 * of_transformers), 0.0, 0, 0
    for step, wanted in enumerate(expected.logits):
        ours = decoder.token
        if step:
            ours = decoder.logits.argmax(-1)
            furthest = max(furthest, distance(decoder.logits, wanted))
        lead = wanted.amax(-1) - wanted.gather(-1, ours[:, None])[:, 0]
        other += int((lead > 2 * tolerance * wanted.abs().amax(-1)).sum())
        agreed += int((ours == tokens[:, step]).sum())
        if step < GATE_STEPS:
            decoder.token.copy_(tokens[:, step])
            decoder.step()
    return Check(
        "full cache = transformers",
        furthest <= tolerance and not other,
        f"logits differ by {furthest:.1e} of their norm (at most {tolerance:.0e}); {agreed} of {tokens.numel()} greedy "
        f"tokens agree, {other} differ that are no near ties",
    )


def check_first_tokens(subject: Subject, arms: dict) -> Check:
    """The first greedy tokens of every arm, kvpress' too, before any round: transformers', but for near ties."""
    outputs = {name: arm.output() for name, arm in arms.items()}
    n = min(output.shape[1] for output in outputs.values())
    with through_transformers(subject.model, "sdpa") as model:
        wanted = model.generate(
            subject.prompts, attention_mask=torch.ones_like(subject.prompts), generation_config=greedy(n)
        )[:, -n:]
    agreed = {name: (output[:, :n] == wanted).float().mean().item() for name, output in outputs.items()}
    worst = min(agreed, key=agreed.get)
    return Check(
        "first tokens of every arm",
        agreed[worst] >= 0.9,
        f"{n} tokens of {len(wanted)} rows; fewest agree with transformers' in {worst}, {agreed[worst]:.0%} (at least "
        "90 %)",
    )


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest distance of two vectors of logits as a share of the wanted one's norm; infinite if one is not finite."""
    apart = (found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    return apart.max().item() if apart.isfinite().all() else float("inf")


def check_graphs(name: str, subject: Subject, policy: Policy, kv_budget: int, sizes: Sizes) -> Check:
    """Tokens and slots over four rounds: graphs against plain calls, which run the same kernels and must be equal."""
    n = kv_budget - sizes.n_prompt + 4 * (sizes.interval + 1)
    arms = [Ours(subject, subject.fit(policy), kv_budget, n, without) for without in ("", "eager")]
    for arm in arms:
        arm.start()
        arm.advance(n)
    first, second = (arm.decoder for arm in arms)
    same = torch.equal(arms[0].output(), arms[1].output())
    same = (
        same and torch.equal(first.cache.positions, second.cache.positions) and first.rows.rounds == second.rows.rounds
    )
    detail = f"{n} steps, {len(first.rows.rounds[0])} rounds of each row: tokens and slots "
    return Check(f"{name}: graphs = plain calls", same, detail + ("are equal" if same else "differ"))


def check_rounds(name: str, subject: Subject, policy: Policy, kv_budget: int, sizes: Sizes) -> Check:
    """Two rows past their first round: which positions are held, and whether their slots hold those tokens' keys."""
    P = sizes.n_prompt
    for budget in range(min(P + sizes.interval, kv_budget), kv_budget + 1):
        try:
            policy.check(budget, P, name)
            break
        except ConfigError:
            continue
    few = replace(subject, prompts=subject.prompts[:2])
    arm = Ours(few, subject.fit(policy), budget, budget - P + 2)
    arm.start()
    arm.advance(budget - P + 2)
    decoder = arm.decoder
    problem = wrong_slots(decoder, few.prompts, budget)
    detail = f"KV budget {budget}, {len(decoder.rows.rounds[0])} round, {int(decoder.rows.n_held[0])} slots held"
    return Check(f"{name}: slots after a round", problem is None, problem or detail)


@torch.inference_mode()
def wrong_slots(decoder: Decoder, prompts: Tensor, kv_budget: int) -> str | None:
    """What is wrong with the slots that the rows hold after a round; None if nothing is."""
    P, n_made, policy, cache = prompts.shape[1], int(decoder.rows.n_made[0]), decoder.policy, decoder.cache
    seen, at = P + n_made - 1, decoder.rows.rounds
    if not decoder.finite:
        return "logits or scores are not finite"
    for row, tokens in enumerate(torch.cat([prompts, decoder.output[:, : n_made - 1]], 1)):
        n = int(decoder.rows.n_held[row])
        if n != int(cache.lengths[row]) or n > kv_budget or not at[row]:
            return f"row {row} holds {int(cache.lengths[row])} slots (counted {n}, KV budget {kv_budget})"
        held = cache.positions[:, row, :, :n].sort(-1).values
        if (held.diff(dim=-1) < 1).any() or held.min() < 0 or held.max() != seen - 1:
            return f"row {row} holds a position twice, an empty slot, or not its newest token"
        wanted = {*range(policy.n_sink), *range(P if policy.protect_prompt else 0)}
        wanted |= set(range(at[row][-1] - policy.recent(kv_budget), seen))
        for held_by_head in held.flatten(0, 1).tolist():
            if not wanted <= set(held_by_head):
                return f"row {row} lost position {min(wanted - set(held_by_head))}, which is protected"
        keys, values = first_layer(decoder.model.model, tokens)
        positions = cache.positions[0, row, :, :n].long().expand(keys.shape[0], -1)
        for what, stored, own in (("key", cache.keys, keys), ("value", cache.values, values)):
            own = own.gather(1, positions[..., None].expand(-1, -1, own.shape[-1]))
            apart = ((stored[0, row, :, :n] - own).double().norm() / own.double().norm()).item()
            if not policy.reindex and not apart <= TOLERANCE[own.dtype]:
                return f"row {row}: the first layer's {what}s are not those of the positions held ({apart:.1e} apart)"
    return None


def first_layer(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[H, T, D]` of the first layer, which depend on each token and its position only."""
    base = model.base_model
    attention = base.layers[0].self_attn
    x = base.layers[0].input_layernorm(base.embed_tokens(tokens))
    keys, values = (part(x).unflatten(-1, (-1, attention.head_dim)) for part in (attention.k_proj, attention.v_proj))
    keys = getattr(attention, "k_norm", nn.Identity())(keys).transpose(0, 1)
    return rotate(keys, torch.arange(len(tokens), device=tokens.device), base.rotary_emb.inv_freq), values.transpose(
        0, 1
    )


def copy_bandwidth(device: str, nbytes: int | None = None) -> float:
    """Bytes read and written per second by a plain copy, the best of several; 4 GiB on a GPU, 256 MiB on a CPU."""
    nbytes = nbytes or (2**32 if device != "cpu" else 2**28)
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * nbytes / best


def order_of(names: Sequence[str], round_number: int) -> list[str]:
    """A B C, then C B A, and so on: a slow drift of the machine hits all arms alike."""
    return list(names) if round_number % 2 == 0 else list(names)[::-1]


def paired_ratio(seconds: Sequence[float], against: Sequence[float]) -> dict[str, float]:
    """How much faster the first is: the rounds' median ratio with a 95 % bootstrap interval; and of all time."""
    ratios = np.asarray(against) / np.asarray(seconds)
    draws = np.random.default_rng(0).integers(len(ratios), size=(4000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return {
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "total": float(np.sum(against) / np.sum(seconds)),
    }


def pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(arm, what it is compared with) for all arms that were run."""
    peers = [name for name in names if name.startswith(("hf-", "kvpress-"))]
    for name in names:
        if name in peers or name in CEILINGS:
            continue
        yield from ((name, peer) for peer in peers if peer.startswith("hf-"))
        if name.startswith("full-"):
            yield "full", name
        elif name != "full":
            yield name, "full"
        yield from ((name, peer) for peer in peers if peer == f"kvpress-{name}")
        yield from ((name, ceiling) for ceiling in CEILINGS if ceiling in names)


def measure(arms: dict, n_steps: int, n_rounds: int, device: str, seconds: float, say: Callable[[str], None]) -> dict:
    """Advance every arm by n_steps in each of n_rounds; fewer rounds if `seconds` would be exceeded.

    Returns by arm: seconds of each round, of prefill and of the arm's own phases, and bytes of CUDA memory that it
    needed on top of what was there.
    """
    begun = time.monotonic()
    found = {name: {"seconds": [], "phases": arm.phase_seconds(), "peak_bytes": None} for name, arm in arms.items()}

    def timed(name: str, work: Callable[[], None]) -> float:
        synchronise(device)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        work()
        synchronise(device)
        taken = time.perf_counter() - started
        if device != "cpu":
            grown = torch.cuda.max_memory_allocated() - before
            found[name]["peak_bytes"] = max(grown, found[name]["peak_bytes"] or 0)
        return taken

    for name, arm in arms.items():
        found[name]["prefill"] = timed(name, arm.start)
    for number in range(n_rounds):
        round_begun = time.monotonic()
        for name in order_of(list(arms), number):
            found[name]["seconds"].append(timed(name, lambda name=name: arms[name].advance(n_steps)))
        now = time.monotonic()
        left = (n_rounds - number - 1) * (now - round_begun)
        say(f"round {number + 1} of {n_rounds}; about {left:.0f} s left")
        if number + 1 < n_rounds and now - begun + 1.1 * (now - round_begun) > seconds:
            say(f"stopped after {number + 1} of {n_rounds} rounds: {seconds:.0f} s would not be enough for more")
            break
    for name, arm in arms.items():
        before = found[name]["phases"]
        found[name]["phases"] = {phase: t - before.get(phase, 0.0) for phase, t in arm.phase_seconds().items()}
    return found


def describe(name: str, arm, found: dict, subject: Subject, sizes: Sizes, n_steps: int, ceilings: dict) -> dict:
    """One arm's row: tokens/s by three definitions, memory, and the bandwidth that the step's least bytes amount to."""
    rounds, total, B = len(found["seconds"]), sum(found["seconds"]), sizes.batch
    steps = rounds * n_steps
    _, kv_budget = split_arm(name, sizes)
    row = {
        "arm": name,
        "kv_budget": kv_budget,
        "seconds": found["seconds"],
        "prefill_seconds": found["prefill"],
        "steps": B * steps / total,
        "ms_per_step": 1000 * statistics.median(found["seconds"]) / n_steps,
    }
    if name in CEILINGS:
        return row
    output = arm.output()
    ends = torch.isin(output, torch.tensor(subject.eos_ids, device=output.device))
    useful = torch.where(ends.any(1), ends.int().argmax(1) + 1, output.shape[1]).sum().item()
    live = arm.live_slots()
    moved = minimum_bytes(subject.model.config, B, live, subject.model.dtype.itemsize)
    return row | {
        "forward": B * steps / found["phases"]["forward"],
        "round_share": found["phases"]["evict"] / total if kv_budget and "evict" in found["phases"] else None,
        "goodput": useful / (total + found["prefill"]),
        "live_slots": live,
        "kv_bytes": arm.kv_bytes,
        "peak_bytes": found["peak_bytes"],
        "bytes_per_step": moved,
        "bandwidth": moved * steps / total,
        "bandwidth_share": moved * steps / total / ceilings["copy_bandwidth"],
    }


def table(record: dict) -> str:
    """The arms as text for people."""
    ratios = {(r["arm"], r["against"]): r["ratio"] for r in record["ratios"]}

    def ratio(arm: str, against: str) -> str:
        return f"{ratios[arm, against]:.2f}" if (arm, against) in ratios else ""

    rows = [
        {
            "arm": row["arm"],
            "KV budget": row["kv_budget"] or "",
            "tokens/s": f"{row['steps']:.1f}",
            "forward only": f"{row['forward']:.1f}" if "forward" in row else "",
            "goodput": f"{row['goodput']:.1f}" if "goodput" in row else "",
            "x HF sdpa": ratio(row["arm"], BASELINE),
            "of linears": ratio(row["arm"], "linears"),
            "of products": ratio(row["arm"], "products"),
            "in rounds": f"{row['round_share']:.1%}" if row.get("round_share") is not None else "",
            "live slots": f"{row['live_slots']:.0f}" if "live_slots" in row else "",
            "KV MB": f"{row['kv_bytes'] / 1e6:.1f}" if "kv_bytes" in row else "",
            "peak MB": f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") else "",
            "GB/s": f"{row['bandwidth'] / 1e9:.1f}" if "bandwidth" in row else "",
            "of copy": f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else "",
        }
        for row in record["arms"]
    ]
    return pd.DataFrame(rows).to_string(index=False)


def bench(
    subject: Subject,
    sizes: Sizes,
    names: Sequence[str],
    *,
    n_rounds: int = 8,
    seconds: float = 480.0,
    kvpress: str | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Gate, ceilings, warm-up, rounds. Returns the record; with a red gate it holds no measurement at all.

    seconds: of wall time for the rounds; those that do not fit are left out and the record says complete: false.
    """
    device = str(subject.model.device)
    n_steps = sizes.n_new // n_rounds
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
    record["ceilings"] = {
        "copy_bandwidth": copy_bandwidth(device),
        "weight_bytes": minimum_bytes(subject.model.config, 1, 0, subject.model.dtype.itemsize),
        "kv_bytes_per_token": kv_bytes_per_token(subject.model),
    }
    say(f"copy bandwidth {record['ceilings']['copy_bandwidth'] / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        if any(name.startswith("kvpress-") for name in names):
            save_model(subject.model, Path(folder))
        arms = {name: build_arm(name, subject, sizes, kvpress, Path(folder)) for name in names}
        try:
            for arm in arms.values():
                arm.start()
                # On a GPU our whole run, so that every graph is captured.
                whole = device != "cpu" and isinstance(arm, Ours)
                arm.advance(sizes.n_new if whole else min(n_steps, 8))
            if device == "cpu":  # on a GPU the warm-up was a whole run, rounds and all
                decoding = {name: arm for name, arm in arms.items() if name not in CEILINGS}
                checks += [check_first_tokens(subject, decoding)] if decoding else []
                say(str(checks[-1]))
                record["gate"] = judged(checks)
                if not record["gate"]["holds"]:
                    return record
            found = measure(arms, n_steps, n_rounds, device, seconds, say)
            record["arms"] = [
                describe(name, arm, found[name], subject, sizes, n_steps, record["ceilings"])
                for name, arm in arms.items()
            ]
            record["kvpress"] = next((arm.versions for arm in arms.values() if isinstance(arm, KVPress)), None)
        finally:
            for arm in arms.values():
                if isinstance(arm, KVPress):
                    arm.close()
    record["ratios"] = [
        {"arm": a, "against": b, **paired_ratio(found[a]["seconds"], found[b]["seconds"])} for a, b in pairs(names)
    ]
    record["noise"] = next((r for r in record["ratios"] if (r["arm"], r["against"]) == ("full", "full-again")), None)
    rounds = len(found[names[0]]["seconds"])
    record |= {"complete": rounds == n_rounds, "rounds": rounds, "steps_per_round": n_steps}
    unit = 1 if sys.platform == "darwin" else 1024
    record["peak_rss_bytes"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return record


def save_model(model: nn.Module, folder: Path) -> None:
    """The weights for another process: each in a storage of its own, not as slices of fused ones."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    # A model that was read from GGUF says that it is quantized still.
    vars(config).pop("quantization_config", None)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def driver(device: str) -> dict:
    """Of the GPU."""
    if device == "cpu":
        return {}
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        smi = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        smi = None
    return {"cuda": torch.version.cuda, "driver, SM clock, power, temperature": smi}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--arms", help="e.g. hf-sdpa,linears,full,full-again,knorm@128,knorm@256,kvpress-knorm")
    for name in ("batch", "n_prompt", "n_new", "kv_budget", "interval"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=420.0, help="wall time for the rounds (default 420)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kvpress", metavar="PYTHON", help="a Python that has kvpress (make bench-kvpress-env)")
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    given = parser.parse_args()
    disable_progress_bar()
    own = {name: value for name in Sizes.__dataclass_fields__ if (value := getattr(given, name, None)) is not None}
    sizes = replace(SIZES[given.model], **own)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if min(own.values(), default=1) < 1 or given.rounds < 1:
            raise ConfigError("sizes and --rounds are whole numbers from 1 on")
        if sizes.n_new % given.rounds:
            raise ConfigError(f"--n-new {sizes.n_new} must be a multiple of --rounds {given.rounds}")
        names = given.arms.split(",") if given.arms else default_arms(given.model, device, bool(given.kvpress))
        check_arms(names, sizes, given.kvpress)
        torch.set_num_threads(given.threads)
        record = bench(
            load_subject(given.model, sizes, device),
            sizes,
            names,
            n_rounds=given.rounds,
            seconds=given.seconds,
            kvpress=given.kvpress,
            say=lambda line: print(line, flush=True),
        )
    except ConfigError as error:
        sys.exit(f"kvlib.bench.arms: {error}")
    report(record)
    line = json.dumps(record, allow_nan=False)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    print(line)
    if not record["gate"]["holds"]:
        sys.exit("kvlib.bench.arms: the gate is red, so nothing was timed; see the checks above")


def report(record: dict) -> None:
    """The table, and what to read it by."""
    if not record["gate"]["holds"]:
        return
    print(f"\n{record['model']} ({record['weights']}), {record['device']}, {record['threads']} threads, batch "
          f"{record['batch']}, {record['dtype']}, {record['n_prompt']} + {record['n_new']} tokens, a round every "
          f"{record['interval']}; {record['rounds']} rounds of {record['steps_per_round']} steps\n")  # fmt: skip
    print(table(record))
    print("\nlinears: the model's linear layers alone. products: what kvlib's step makes of them, fused and packed.\n"
          "tokens/s: rows x steps / wall time of the steps, everything included. forward only: the model's calls.\n"
          "goodput: tokens up to the end of each output / wall time with prefill. in rounds: time spent evicting.\n"
          "of copy: least bytes / time, as a share of a copy's bandwidth in this call.\n")  # fmt: skip
    for r in record["ratios"]:
        print(f"{r['arm']:>22} / {r['against']:<22} {r['ratio']:.3f}  ({r['low']:.3f} to {r['high']:.3f})  "
              f"of all time {r['total']:.3f}")  # fmt: skip
    if record["noise"]:
        print(f"\nfull and full-again are the same work: their ratio, {record['noise']['low']:.3f} to "
              f"{record['noise']['high']:.3f}, is this run's noise; smaller differences say nothing")  # fmt: skip
    print(f"peak memory of the process: {record['peak_rss_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
