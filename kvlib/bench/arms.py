"""The arms: kvlib's decode loop, transformers' own, kvpress', and matrix products alone, each told by a name."""

import copy
import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from kvlib.bench.shapes import GGUF, Sizes, Subject, bench_policy, observed
from kvlib.charts.throughput import CEILINGS, LLAMA_CPP, PARTS
from kvlib.cost import kv_bytes
from kvlib.engine.attention import IMPLEMENTATION
from kvlib.engine.decoder import Decoder, Request, decoder_for
from kvlib.engine.fast import Layer
from kvlib.engine.linear import PACKS, Int8Linear, Linear, check_int8, fuse, joined
from kvlib.engine.meter import Meter
from kvlib.engine.paired import Arm
from kvlib.errors import ConfigError
from kvlib.models import fetch_model
from kvlib.policies import Full, Policy

BASELINE = "hf-sdpa"
KVPRESS = ("knorm", "snapkv-kvpress")
"""Policies that kvpress has with the same settings."""
POLICIES = ("window", "knorm", "snapkv-kvpress", "rkv", "dynts")
WITHOUT_BUDGET = {
    "hf-eager": ("hf", "eager"),
    BASELINE: ("hf", "sdpa"),
    LLAMA_CPP: (LLAMA_CPP, ""),
    **{name: ("alone", name) for name in CEILINGS},
}
"""Kind, and what of it."""


@dataclass(frozen=True)
class Peers:
    """Programs that the caller names: the Python that has kvpress, and llama.cpp's llama-batched-bench."""

    kvpress: str | None = None
    llama_cpp: str | None = None


NO_PEERS = Peers()


class Ours(Arm):
    """kvlib's decode loop. without: one of PARTS (see without_part). settings: more of Decoder; greedy without any."""

    def __init__(
        self, subject: Subject, policy: Policy, kv_budget: int | None, n_new: int, without: str = "", **settings
    ):
        requests = [Request(str(row), tuple(prompt), row) for row, prompt in enumerate(subject.prompts.tolist())]
        settings |= {"max_new_tokens": n_new + 1, "meter": Meter(subject.model.device)}
        decoder = decoder_for(subject.model, policy, kv_budget, requests, **settings)
        super().__init__(decoder, requests)
        if without:
            without_part(decoder, without)
        self.kv_bytes = decoder.cache.nbytes()

    def live_slots(self) -> float:
        n = int(self.decoder.rows.n_made[0])
        return float(self.decoder.rows.held[:, 1:n].mean())


def without_part(decoder: Decoder, part: str) -> None:
    """again: nothing. unfused: a product per matrix of the model, joined afterwards. unpacked: products of the weights
    as they are. int8: products in 8-bit integers. eager: no CUDA graph. On a CPU unfused also leaves the matrices
    unpacked that are small alone."""
    fast = decoder.model
    made = {"unfused": apart, "unpacked": joined, "int8": Int8Linear.of}.get(part)
    if made:
        fast.layers = [Layer.of(layer, made) for layer in fast.base.layers]
        fast.head = made(fast.model.get_output_embeddings())
    elif part == "eager":
        decoder.forward, decoder.sample = Decoder._forward, Decoder._sample
        decoder.replay_round = lambda *due: decoder.evict_rows(decoder.round(*due))


def apart(*linears: nn.Linear) -> Callable[[Tensor], Tensor]:
    own = [fuse(linear) for linear in linears]
    if len(own) == 1:
        return own[0]
    return lambda x: torch.cat([linear(x) for linear in own], -1)


class HuggingFace:
    """transformers' generate with a DynamicCache, continued from where it stopped."""

    def __init__(self, subject: Subject, implementation: str, n_new: int):
        self.subject, self.implementation = subject, implementation
        self.meter = Meter(subject.model.device)
        B, P = subject.prompts.shape
        self.kv_bytes = B * (P + n_new) * kv_bytes(subject.model.config, subject.model.dtype.itemsize)

    def start(self) -> None:
        self.cache, self.sequence = DynamicCache(config=self.subject.model.config), self.subject.prompts
        self.advance(1)

    def advance(self, n: int) -> None:
        with through_transformers(self.subject.model, self.implementation) as model, clocked(model, self.meter):
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
def clocked(model: nn.Module, meter: Meter) -> Iterator[None]:
    """Time every call of the model, as forward."""
    with ExitStack() as running:
        before = model.register_forward_pre_hook(lambda *_: running.enter_context(meter.phase("forward")))
        with before, model.register_forward_hook(lambda *_: running.close()):
            yield


def products_of(model: nn.Module) -> dict[str, list[Linear]]:
    """The products of kvlib's step by name, one per layer."""
    layers = [Layer.of(layer) for layer in model.base_model.layers]
    found = {name: [getattr(layer, name) for layer in layers] for name in Layer.products}
    return {**found, "head": [fuse(model.get_output_embeddings())]}


class Linears:
    """Matrix products alone, one after the other: the model's linear layers (`linears`), or what kvlib's step makes of
    them (`products`)."""

    def __init__(self, subject: Subject, kind: str = "linears"):
        model, B = subject.model, len(subject.prompts)
        if kind == "linears":
            self.linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        else:
            self.linears = list(itertools.chain(*products_of(model).values()))
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
    """kvpress' DecodingPress with the same weights, in a process of another Python (kvlib/bench/kvpress_peer.py)."""

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
        command = [python, "-I", str(Path(__file__).with_name("kvpress_peer.py"))]  # -I: nothing of kvlib on its path
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise ConfigError(
                f"--kvpress {python} cannot be started ({error.strerror}); name the Python that has kvpress, made with "
                "`make bench-kvpress-env`"
            ) from error
        self.forward = 0.0
        self.kv_bytes = sizes.batch * kv_budget * kv_bytes(subject.model.config, subject.model.dtype.itemsize)
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


class LlamaCpp:
    """llama.cpp's llama-batched-bench on the model's GGUF file, as many rows, threads and tokens.

    Every round is a run of its own, which reports the seconds of prefill and of all steps, with tokens that it makes up
    and samples none of; it begins at the prompt, so that its caches are the shorter ones. seconds: of the last run's
    n_steps steps.
    """

    def __init__(self, program: str, file: Path, sizes: Sizes):
        n_threads = str(torch.get_num_threads())
        slots = sizes.batch * (sizes.n_prompt + sizes.n_new)
        self.command = [program, "-m", str(file), "-t", n_threads, "-tb", n_threads, "-c", str(slots)]
        self.command += ["-npp", str(sizes.n_prompt), "-npl", str(sizes.batch), "--output-format", "jsonl"]
        self.n_prompt = sizes.n_prompt

    def _run(self, n: int) -> tuple[float, float]:
        """Seconds of prefill and of n steps."""
        try:
            done = subprocess.run([*self.command, "-ntg", str(n)], capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise ConfigError(
                f"--llama-cpp {self.command[0]} cannot be started ({error.strerror}); name the program "
                "llama-batched-bench of llama.cpp"
            ) from error
        reported = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
        try:
            found = json.loads(reported or "")
            return found["t_pp"], found["t_tg"]
        except (ValueError, KeyError) as error:
            said = (done.stderr.splitlines() or ["nothing"])[-1]
            raise ConfigError(
                f"--llama-cpp {self.command[0]} reported no times; it ended with {done.returncode} and said: {said}"
            ) from error

    def start(self) -> None:
        self.prefill, _ = self._run(1)

    def advance(self, n: int) -> None:
        self.n_steps = n
        _, self.seconds = self._run(n)

    def live_slots(self) -> float:
        return self.n_prompt + self.n_steps / 2

    def phase_seconds(self) -> dict[str, float]:
        return {}


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


@dataclass(frozen=True)
class Named:
    """What an arm's name says. kind: "kvlib", "hf", "kvpress", "llama.cpp" or "alone"; of: the policy, HF's attention,
    or what is alone; part: what a kvlib arm is without. kv_budget: None where nothing is evicted."""

    kind: str
    of: str
    part: str
    kv_budget: int | None


def parse_arm(name: str, sizes: Sizes) -> Named:
    """knorm@128, full-unpacked, knorm-unpacked@128, hf-sdpa, kvpress-knorm, linears. Raises ConfigError."""
    own, _, budget = name.partition("@")
    if own.startswith("kvpress-"):
        kind, of, part = "kvpress", own.removeprefix("kvpress-"), ""
    elif own in WITHOUT_BUDGET:
        (kind, of), part = WITHOUT_BUDGET[own], ""
    else:
        part = next((part for part in PARTS if own.endswith(f"-{part}")), "")
        kind, of = "kvlib", own.removesuffix(f"-{part}")
    if own in WITHOUT_BUDGET or of == "full":
        if budget:
            raise ConfigError(f"arm {name!r} evicts nothing and takes no KV budget")
        return Named(kind, of, part, None)
    if budget and not budget.isdecimal():
        raise ConfigError(f"the KV budget of arm {name!r} must be a whole number of slots")
    return Named(kind, of, part, int(budget) if budget else sizes.kv_budget)


def default_arms(name: str, device: str, peers: Peers) -> list[str]:
    arms = ["hf-eager", BASELINE, *CEILINGS, "full", "full-again"]
    arms += [policy for policy in POLICIES if policy != "dynts" or name not in ("smollm2", "qwen-coder")]
    arms += ["full-unfused"] + ["full-eager"] * (device != "cpu")
    if device == "cpu" and PACKS and name != "tiny":  # of the tiny model nothing is packed
        arms += ["full-unpacked", "knorm-unpacked", "full-int8", "knorm-int8"]
    return arms + [f"kvpress-{policy}" for policy in KVPRESS if peers.kvpress] + [LLAMA_CPP] * bool(peers.llama_cpp)


def check_arms(names: Sequence[str], model: str, sizes: Sizes, peers: Peers) -> None:
    """Raise ConfigError for an arm that does not exist or cannot run, before any model is loaded."""
    if len(set(names)) != len(names):
        raise ConfigError(f"an arm is named twice in {','.join(names)}; a second full cache is called full-again")
    for name in names:
        arm = parse_arm(name, sizes)
        if arm.part == "int8":
            check_int8("cuda" if torch.cuda.is_available() else "cpu")
        if arm.kind == LLAMA_CPP and model not in GGUF:
            raise ConfigError(f"arm {name!r} is measured on GGUF files of the hub, with --model {' or '.join(GGUF)}")
        if arm.kind == LLAMA_CPP and peers.llama_cpp is None:
            raise ConfigError(f"arm {name!r} needs --llama-cpp and the program llama-batched-bench of llama.cpp")
        if arm.kind == LLAMA_CPP and not shutil.which(peers.llama_cpp):
            raise ConfigError(f"--llama-cpp {peers.llama_cpp} is no program; name llama.cpp's llama-batched-bench")
        if arm.kv_budget is None:
            continue
        if arm.kind == "kvpress" and arm.of not in KVPRESS:
            raise ConfigError(f"arm {name!r}: the same settings exist in kvpress for {', '.join(KVPRESS)} only")
        if arm.kind == "kvpress" and peers.kvpress is None:
            raise ConfigError(f"arm {name!r} needs --kvpress and the Python that kvpress is installed in")
        bench_policy(arm.of, arm.kv_budget, sizes).check(arm.kv_budget, sizes.n_prompt, f"arm {name!r}")
        if arm.kv_budget >= sizes.n_prompt + sizes.n_new:
            raise ConfigError(
                f"arm {name!r} would never evict: {sizes.n_prompt} + {sizes.n_new} tokens fit into {arm.kv_budget} "
                "slots; lower its KV budget or raise --n-new"
            )


def build_arm(name: str, subject: Subject, sizes: Sizes, peers: Peers, folder: Path):
    """folder: where the weights are saved for kvpress."""
    arm = parse_arm(name, sizes)
    if arm.kind == "hf":
        return HuggingFace(subject, arm.of, sizes.n_new)
    if arm.kind == "alone":
        return Linears(subject, arm.of)
    if arm.kind == LLAMA_CPP:
        return LlamaCpp(peers.llama_cpp, fetch_model(GGUF[subject.name]), sizes)
    if arm.kind == "kvpress":
        return KVPress(peers.kvpress, folder, subject, arm.of, arm.kv_budget, sizes)
    policy = Full() if arm.kv_budget is None else subject.fit(bench_policy(arm.of, arm.kv_budget, sizes))
    return Ours(subject, policy, arm.kv_budget, sizes.n_new, arm.part)
