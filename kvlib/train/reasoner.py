"""Train the tiny reasoner from scratch: `python -m kvlib.train reasoner` (seeded, resumable, CPU).

Every step draws its own sequences from (seed, step), so an interrupted run that continues from its
checkpoint sees exactly the data an undisturbed run sees.
"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from kvlib.errors import ConfigError
from kvlib.files import update_manifest, write_atomically
from kvlib.tasks.chains import DIGITS, VOCABULARY, definition_drill, make_chain, solution_words, value_drill
from kvlib.train.resume import restore, store

ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, EOS = ID["<pad>"], ID["<eos>"]
N_STEPS = 4500
MAX_STEPS_IN_CHAIN = 14
LEVEL_WEIGHTS = (0.7, 0.1, 0.1, 0.1)
TOKENS_PER_BATCH = 4096
LOOKUP_WEIGHT = 4.0
# Value drills alone make the look-up head within 300 steps; at a Muon rate of 0.02 or 0.002, or mixed with
# anything else from the start, it had not formed after 1,200 and 280 steps.
KINDS = ("values", "definitions", "solutions")
MIXTURES = ((0.1, (1, 0, 0)), (0.3, (0.3, 0.3, 0.4)), (0.5, (0.1, 0.1, 0.8)), (1.0, (0.03, 0.03, 0.94)))
RAMPS = {"values": (0.0, 0.16), "definitions": (0.1, 0.3), "solutions": (0.1, 0.5)}
MUON_LR, ADAMW_LR = 0.008, 3e-3
WARMUP_STEPS = 50
MODEL_CARD = """---
license: apache-2.0
library_name: transformers
---
# Tiny-0.8M, kvlib's embedded reasoner

A model of 0.8 M parameters (Qwen2 layers stored as a Llama model: 4 layers, hidden 128, 4 query and 2 KV heads) that
solves chain problems modulo 10 (`kvlib/tasks/chains.py`) with worked solutions of 100 to 500 tokens. It exists to show
what a KV budget does to a reasoning trace on a laptop; it knows nothing else, and what it shows says nothing about
larger models.

Made from scratch by `{made_by}` on two CPU cores. Trained on generated chains only, from seeds that no dataset of
kvlib uses. No data from outside.

Share of right next tokens, teacher-forced, on 64 fresh chains of 10 steps (results by operators per step):

| token | accuracy |
|---|---|
{accuracy}

Beside the weights lies what some eviction policies need to know of them, each with their hash: the importance
predictor of DynTS (`make predictor`), the query statistics of TriAttention (`python -m kvlib.train calibration`) and a
retention gate in the manner of TRIM-KV (`python -m kvlib.train gate`).
"""
CHECKPOINT_EVERY = 100

SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama model with attention biases, that of the output projection 0.

    AutoTokenizer gives every folder whose model type is qwen2 Qwen's own byte-level tokenizer, whatever it holds.
    """
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    zero = {name: torch.zeros_like(p) for name, p in llama.state_dict().items() if name.endswith("o_proj.bias")}
    llama.load_state_dict(model.state_dict() | zero)
    return llama


def sequence(rng: random.Random, n: int, kind: str) -> tuple[list[int], list[float]]:
    """Token ids and the loss weight of predicting each (0 in the question); n: names or steps; kind: see batch."""
    question: list[str] = []
    if kind == "values":
        words, is_lookup = value_drill(rng, n, 4 * n)
    else:
        chain = make_chain(rng, n, LEVEL_WEIGHTS)
        question = chain.question.split()
        words, is_lookup = solution_words(rng, chain) if kind == "solutions" else definition_drill(rng, chain, 4 * n)
    other = 1.0 if kind == "solutions" else 0.0
    weights = [LOOKUP_WEIGHT if looked_up else other for looked_up in is_lookup]
    return [ID[word] for word in question + words], [0.0] * len(question) + weights


def batch(seed: int, step: int, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of one kind and similar length, right-padded to about TOKENS_PER_BATCH: ids, loss weights `[B, T]`.

    progress, 0 to 1, decides the mixture of kinds (drills of values, of definitions, solutions) and their lengths.
    """
    rng = random.Random(f"train {seed} {step}")
    mixture = next(shares for until, shares in MIXTURES if progress < until)
    kind = rng.choices(KINDS, mixture)[0]
    start, end = RAMPS[kind]
    ramp = min(1.0, max(0.0, (progress - start) / (end - start)))
    n = rng.randint(2, 2 + round(ramp * (MAX_STEPS_IN_CHAIN - 2)))
    rows = []
    while not rows or (len(rows) + 1) * max(len(ids) for ids, _ in rows) <= TOKENS_PER_BATCH:
        rows.append(sequence(rng, n, kind))
    ids, weights = ([torch.tensor(row) for row in column] for column in zip(*rows, strict=True))
    return pad_sequence(ids, batch_first=True, padding_value=PAD), pad_sequence(weights, batch_first=True)


class Trainer:
    """Model, optimisers and step counter; `save` and `load` move all of it through a file."""

    def __init__(self, seed: int, n_steps: int = N_STEPS):
        torch.manual_seed(seed)
        self.seed, self.n_steps, self.step = seed, n_steps, 0
        self.model = Qwen2ForCausalLM._from_config(Qwen2Config(**SHAPE), attn_implementation="sdpa")
        matrices, rest = [], []
        for name, parameter in self.model.named_parameters():
            (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
        self.optimisers = [
            torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def train_step(self) -> float:
        ids, weights = batch(self.seed, self.step, self.step / self.n_steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(ids[:, :-1]).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        targets = weights[:, 1:].flatten()
        loss = (losses * targets).sum() / targets.sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.step}; restart with another --seed")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # Warm-up, constant to half of the run, then linear to 0.
        factor = min(1.0, (self.step + 1) / WARMUP_STEPS, 2 * (1 - self.step / self.n_steps))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * factor
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return loss.item()

    @property
    def _parts(self) -> tuple:
        mark = f"{self.n_steps} steps with seed {self.seed}"
        return mark, self.model, self.optimisers, torch.default_generator

    def save(self, path: Path) -> None:
        store(path, *self._parts, step=self.step)

    def load(self, path: Path) -> None:
        numbers = restore(path, *self._parts)
        if numbers is None:
            raise ConfigError(f"{path} is damaged, or not of {self._parts[0]}; delete it or choose another --out")
        self.step = numbers["step"]


@torch.no_grad()
def teacher_forced_accuracy(
    model: torch.nn.Module, seed: int, n_steps: int = 10, n_chains: int = 8
) -> dict[str, float]:
    """Share of right next tokens on fresh chains: looked-up definitions, values, and results by operators per step."""
    rng = random.Random(f"validate {seed}")
    hits: dict[str, list[bool]] = {}
    for _ in range(n_chains):
        chain = make_chain(rng, n_steps, (0.4, 0.2, 0.2, 0.2))
        words, is_lookup = solution_words(rng, chain)
        question = chain.question.split()
        ids = torch.tensor([[ID[w] for w in question + words]])
        guesses = model(ids).logits[0, len(question) - 1 : -1].argmax(-1).tolist()
        levels = {step.target: len(step.operators) for step in chain.steps}
        level = 0
        for i, word in enumerate(words):
            if word == "use" and words[i + 2] != "?":
                level = levels[words[i + 2]]
            if not is_lookup[i]:
                continue
            calculated = words[i - 1] == "=" and words[i - 2] != ":"
            kind = f"{level} operators" if calculated else "value" if word in DIGITS else "definition"
            hits.setdefault(kind, []).append(guesses[i] == ID[word])
    return {name: sum(hit) / len(hit) for name, hit in sorted(hits.items())}


def export(model: Qwen2ForCausalLM, folder: Path, accuracy: dict[str, float], made_by: str) -> None:
    """Write weights (float16), config, tokenizer, model card and manifest so that plain Auto classes load them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    as_llama(model).half().save_pretrained(folder)
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in accuracy.items())
    write_atomically(folder / "README.md", MODEL_CARD.format(made_by=made_by, accuracy=rows).encode())
    shipped = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in shipped:
        (folder / name).chmod(0o644)
    update_manifest(folder, shipped)


def train_reasoner(out: Path, n_steps: int, seed: int) -> None:
    """Train for n_steps, from the checkpoint in `out` if there is one, and export the weights."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"
    trainer = Trainer(seed, n_steps)
    if checkpoint.exists():
        trainer.load(checkpoint)
    steps, mean_loss = trange(trainer.step, trainer.n_steps, initial=trainer.step, total=trainer.n_steps), None
    for _ in steps:
        loss = trainer.train_step()
        mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
        if trainer.step % CHECKPOINT_EVERY == 0 or trainer.step == trainer.n_steps:
            trainer.save(checkpoint)
            accuracy = "  ".join(f"{k} {v:.2f}" for k, v in teacher_forced_accuracy(trainer.model, 0).items())
            steps.write(f"step {trainer.step}  loss {mean_loss:.3f}  {accuracy}")
    accuracy = teacher_forced_accuracy(trainer.model, 1, n_chains=64)
    made_by = f"python -m kvlib.train reasoner --steps {trainer.n_steps} --seed {seed}"
    export(trainer.model, out / "weights", accuracy, made_by)
    print(f"wrote {out / 'weights'}: " + "  ".join(f"{k} {v:.3f}" for k, v in accuracy.items()))
    print(
        "to ship them, copy that folder over kvlib/tiny/weights and run `make predictor`, "
        "`python -m kvlib.train calibration` and `python -m kvlib.train gate`"
    )
