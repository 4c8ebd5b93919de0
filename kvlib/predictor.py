"""The DynTS importance predictor (arXiv 2601.18383, section 3): labels from answer attention, head, training."""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from kvlib import noise
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.generate import Decoder, Request, generate
from kvlib.models import TINY, Reasoner, load_reasoner, update_manifest
from kvlib.policies import make_policy
from kvlib.sampling import Sampling
from kvlib.tiny.tasks import extract_answer, make_chain

FILE = "dynts-predictor.safetensors"
LABEL_POWER = 0.3
N_TRACES, N_HELD_OUT = 480, 80
LEVEL_WEIGHTS = (0.7, 0.1, 0.1, 0.1)


@dataclass(frozen=True)
class Trace:
    """A finished output that ended in an answer. n_prompt tokens of prompt; the answer starts at index answer_at."""

    ids: tuple[int, ...]
    n_prompt: int
    answer_at: int


class AnswerAttention(Cache):
    """A teacher-forced step that sums, over layers and heads, the attention answer tokens pay to each token.

    Only the answer's rows of the attention map are ever computed: `[HQ, K, N]` for one layer at a time.
    """

    def __init__(self, answer_at: int):
        super().__init__(layers=[])
        self.answer_at, self.n_layers, self.total = answer_at, 0, 0.0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        HQ, N, H = query.shape[1], query.shape[2], key.shape[1]
        rows = query[0, :, self.answer_at :].unflatten(0, (H, HQ // H))
        logits = (rows @ key[0, :, None].transpose(-1, -2)).float() * scaling
        position = torch.arange(N, device=query.device)
        logits = logits.masked_fill(position > position[self.answer_at :, None], -torch.inf)
        self.total = self.total + logits.softmax(-1).mean((0, 1, 2))
        self.n_layers += 1
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)


@torch.inference_mode()
def features_and_labels(model: nn.Module, trace: Trace) -> tuple[Tensor, Tensor]:
    """Hidden states `[T, d]` (after the final norm) of the T thinking tokens, and the attention `[T]` they get.

    The label is the mean over all layers, heads and answer tokens, those after `</think>`
    (compute_is_sp.py of Robin930/DynTS).
    """
    ids = torch.tensor([trace.ids], device=next(model.parameters()).device)
    step = AnswerAttention(trace.answer_at)
    hidden = model.base_model(input_ids=ids, past_key_values=step, use_cache=True, kv_step=step).last_hidden_state[0]
    thinking = slice(trace.n_prompt, trace.answer_at - 1)
    return hidden[thinking].float(), (step.total / step.n_layers)[thinking]


class ImportanceHead(nn.Module):
    """d -> 2d -> d/2 -> 1 with softplus between and after, no biases (section 3.2)."""

    def __init__(self, d: int):
        super().__init__()
        self.d = d
        self.layers = nn.Sequential(
            nn.Linear(d, 2 * d, bias=False),
            nn.Softplus(),
            nn.Linear(2 * d, d // 2, bias=False),
            nn.Softplus(),
            nn.Linear(d // 2, 1, bias=False),
            nn.Softplus(),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., d]` -> `[...]`."""
        return self.layers(hidden.to(self.layers[0].weight.dtype))[..., 0]


@dataclass(frozen=True)
class HeldOut:
    """On traces never trained on: mean per-trace rank correlation, and the share of a trace's true top 20 % that lies
    in the predicted top 20 % (chance: 0.2)."""

    n_traces: int
    spearman: float
    top20_recall: float


def _ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def evaluate_head(head: ImportanceHead, held_out: Sequence[tuple[Tensor, Tensor]]) -> HeldOut:
    """Rank correlation (Spearman) and top-20 % recall, averaged over traces."""
    correlations, recalls = [], []
    for features, labels in held_out:
        with torch.inference_mode():
            predicted = head(features)
        pair = torch.stack([_ranks(predicted), _ranks(labels)])
        correlations.append(torch.corrcoef(pair)[0, 1].item())
        k = max(1, round(0.2 * len(labels)))
        hits = torch.isin(predicted.topk(k).indices, labels.topk(k).indices)
        recalls.append(hits.double().mean().item())
    n = len(held_out)
    return HeldOut(n, sum(correlations) / n, sum(recalls) / n)


def train_head(
    data: Sequence[tuple[Tensor, Tensor]], seed: int = 0, n_epochs: int = 12, batch_size: int = 1024
) -> ImportanceHead:
    """Fit the head to label ** 0.3 (scaled to mean 1) by squared error: AdamW, cosine, warm-up 10 %.

    The power is the published transform for R1-Qwen; it is monotone, so it changes the loss and not the target ranking.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.cat([f for f, _ in data])
    targets = torch.cat([labels for _, labels in data]) ** LABEL_POWER
    targets = targets / targets.mean()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = ImportanceHead(features.shape[1])
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    n_steps = n_epochs * -(-len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=n_steps, pct_start=0.1)
    for _ in range(n_epochs):
        for index in torch.randperm(len(features), generator=generator).split(batch_size):
            loss = F.mse_loss(head(features[index]), targets[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the predictor's loss is {loss.item()}; its features or labels are not finite")
    return head.eval().requires_grad_(False)


def collect_traces(reasoner: Reasoner, n_traces: int, seed: int = 0, n_rows: int = 120) -> list[Trace]:
    """Right outputs of the tiny reasoner on chains of its own ("predictor" seeds, used nowhere else), full cache."""
    questions, answers = {}, {}
    for i in range(n_traces):
        rng = random.Random(f"predictor {seed} {i}")
        chain = make_chain(rng, rng.randint(4, 13), LEVEL_WEIGHTS)
        questions[str(i)], answers[str(i)] = chain.question, chain.answer
    requests = [Request(i, reasoner.encode(q), noise.key("predictor", seed, i)) for i, q in questions.items()]
    decoder = Decoder(
        reasoner.model,
        make_policy("full"),
        None,
        n_rows=min(n_rows, n_traces),
        n_prompt_max=max(len(request.prompt) for request in requests),
        max_new_tokens=768,
        sampling=Sampling(0.6),
        eos_ids=reasoner.eos_ids,
        answer_id=reasoner.answer_id,
    )
    queues = [requests[row :: min(n_rows, n_traces)] for row in range(min(n_rows, n_traces))]
    traces = {}
    for done in generate(decoder, queues):
        if extract_answer(reasoner.decode(done.tokens)) == answers[done.request.id]:
            ids = (*done.request.prompt, *done.tokens)
            traces[int(done.request.id)] = Trace(ids, len(done.request.prompt), ids.index(reasoner.answer_id) + 1)
    return [traces[i] for i in sorted(traces)]


def save_predictor(head: ImportanceHead, path: Path, held_out: HeldOut, model_sha256: str) -> None:
    """Head-only checkpoint with the weights it belongs to and its held-out quality in the metadata; atomic."""
    metadata = {"d": str(head.d), "model_sha256": model_sha256, "held_out": json.dumps(asdict(held_out))}
    write_atomically(path, save(head.state_dict(), metadata))


def load_predictor(path: Path, model_sha256: str | None = None) -> tuple[ImportanceHead, HeldOut]:
    """Raises ConfigError if the file is missing, damaged, or belongs to other weights than model_sha256."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head = ImportanceHead(int(metadata["d"]))
        head.load_state_dict(state)
    except Exception as error:
        raise ConfigError(
            f"predictor {path} could not be loaded ({error}); train it again with `make predictor`"
        ) from error
    if model_sha256 and metadata["model_sha256"] != model_sha256:
        raise ConfigError(f"predictor {path} was trained for other weights; train it again with `make predictor`")
    return head.eval().requires_grad_(False), HeldOut(**json.loads(metadata["held_out"]))


def train_predictor(
    reasoner: Reasoner, n_traces: int = N_TRACES, n_held_out: int = N_HELD_OUT, seed: int = 0
) -> tuple[ImportanceHead, HeldOut]:
    """Collect traces, label them, train on all but the last n_held_out, and evaluate on those."""
    started = time.monotonic()
    traces = collect_traces(reasoner, n_traces, seed)
    print(f"{len(traces)} right traces of {n_traces} ({time.monotonic() - started:.0f} s)")
    if len(traces) <= n_held_out:
        raise ConfigError(
            f"only {len(traces)} of {n_traces} traces are right, and {n_held_out} are held out; raise n_traces, "
            "or train the reasoner longer"
        )
    data = [features_and_labels(reasoner.model, trace) for trace in traces]
    print(f"labelled {sum(len(labels) for _, labels in data)} thinking tokens ({time.monotonic() - started:.0f} s)")
    head = train_head(data[:-n_held_out], seed)
    held_out = evaluate_head(head, data[-n_held_out:])
    print(f"held out: {held_out} ({time.monotonic() - started:.0f} s)")
    return head, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the DynTS predictor of the tiny reasoner.")
    parser.add_argument(
        "--out", type=Path, default=TINY, help="folder with a manifest.json to write the predictor into"
    )
    arguments = parser.parse_args()
    reasoner = load_reasoner("tiny")
    head, held_out = train_predictor(reasoner)
    save_predictor(head, arguments.out / FILE, held_out, reasoner.sha256)
    update_manifest(arguments.out, [FILE])
    print(f"wrote {arguments.out / FILE}")


if __name__ == "__main__":
    main()
