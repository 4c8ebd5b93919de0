"""The head on the last hidden state: training, its quality on held-out traces, and its file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from kvlib.tensors import load_made_for, read_tensors, write_tensors
from kvlib.train.labels import Labelled

FILE = "dynts-predictor.safetensors"
RETRAIN = "train it again with `make predictor`, or `python -m kvlib.train.predictor --help` for another model"


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


def evaluate_head(head: ImportanceHead, held_out: Sequence[Labelled], device: str = "cpu") -> HeldOut:
    """Rank correlation (Spearman) and top-20 % recall, averaged over traces."""
    correlations, recalls = [], []
    for features, labels in held_out:
        with torch.inference_mode():
            predicted = head(features.to(device)).cpu()
        pair = torch.stack([_ranks(predicted), _ranks(labels)])
        correlations.append(torch.corrcoef(pair)[0, 1].item())
        k = max(1, round(0.2 * len(labels)))
        hits = torch.isin(predicted.topk(k).indices, labels.topk(k).indices)
        recalls.append(hits.double().mean().item())
    n = len(held_out)
    return HeldOut(n, sum(correlations) / n, sum(recalls) / n)


def rows_of(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    """`torch.cat(parts)[index]` in float32, reading only those rows: parts may be larger than memory."""
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    order = index.argsort()
    counts = torch.bincount(torch.bucketize(index, ends, right=True), minlength=len(parts)).tolist()
    rows = torch.empty(len(index), parts[0].shape[1])
    for part, end, mine in zip(parts, ends.tolist(), order.split(counts), strict=True):
        if len(mine):
            rows[mine] = part[index[mine] - (end - len(part))].float()
    return rows


def train_head(
    data: Sequence[Labelled],
    seed: int = 0,
    n_epochs: int = 12,
    batch_tokens: int = 1024,
    lr: float = 2e-3,
    label_power: float = 0.3,
    device: str = "cpu",
    checkpoint: Path | None = None,
    mark: str = "",
    progress: Callable[[int, str], None] | None = None,
) -> ImportanceHead:
    """Fit the head to label ** label_power (scaled to mean 1) by squared error: AdamW, cosine, warm-up 10 %.

    A power is monotone, so it changes the loss and not the target ranking; 0.3 is the published one for R1-Qwen.
    checkpoint: where every epoch leaves all that the next one needs, so that a training that was interrupted ends in
    the same head; one of another mark is not continued. progress is called with (epochs done, loss in words).
    """
    parts = [features for features, _ in data]
    targets = torch.cat([labels for _, labels in data]) ** label_power
    targets = targets / targets.mean()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = ImportanceHead(parts[0].shape[1]).to(device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    n_steps = n_epochs * -(-len(targets) // batch_tokens)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=n_steps, pct_start=0.1)
    first = _restore(checkpoint, mark, head, optimiser, schedule, generator) if checkpoint else 0
    for epoch in range(first, n_epochs):
        for index in torch.randperm(len(targets), generator=generator).split(batch_tokens):
            loss = F.mse_loss(head(rows_of(parts, index).to(device)), targets[index].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the predictor's loss is {loss.item()}; its features or labels are not finite")
        if checkpoint:
            _store(checkpoint, mark, epoch + 1, head, optimiser, schedule, generator)
        if progress:
            progress(epoch + 1, f"loss {loss.item():.4f}")
    return head.eval().requires_grad_(False)


def _store(path: Path, mark: str, epoch: int, head, optimiser, schedule, generator: torch.Generator) -> None:
    kept = optimiser.state_dict()
    tensors = {f"head/{name}": tensor for name, tensor in head.state_dict().items()}
    tensors |= {f"optimiser/{i}/{name}": tensor for i, own in kept["state"].items() for name, tensor in own.items()}
    numbers = {"groups": kept["param_groups"], "schedule": schedule.state_dict(), "epoch": epoch}
    tensors["generator"] = generator.get_state()
    write_tensors(path, tensors, {"mark": mark, "numbers": json.dumps(numbers)})


def _restore(path: Path, mark: str, head, optimiser, schedule, generator: torch.Generator) -> int:
    """Take up what an earlier training of this mark left; epochs done, 0 if there is nothing to continue."""
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, SafetensorError):
        return 0
    if metadata.get("mark") != mark:
        return 0
    numbers = json.loads(metadata["numbers"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, *rest = name.split("/")
        if part == "optimiser":
            state.setdefault(int(rest[0]), {})[rest[1]] = tensor
    head.load_state_dict({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head/")})
    optimiser.load_state_dict({"state": state, "param_groups": numbers["groups"]})
    schedule.load_state_dict(numbers["schedule"])
    generator.set_state(tensors["generator"])
    return numbers["epoch"]


def save_predictor(
    head: ImportanceHead, path: Path, held_out: HeldOut, model_sha256: str, **made_by: str | int | dict
) -> None:
    """Head-only checkpoint, atomic; its metadata hold the weights it belongs to, its held-out quality and made_by."""
    metadata = {"d": str(head.d), "model_sha256": model_sha256, "held_out": json.dumps(asdict(held_out))}
    metadata |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in made_by.items()}
    write_tensors(path, head.state_dict(), metadata)


def load_predictor(path: Path, model_sha256: str | None = None) -> tuple[ImportanceHead, HeldOut]:
    """Raises ConfigError if the file is missing, damaged, or belongs to other weights than model_sha256."""

    def build(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[ImportanceHead, HeldOut]:
        head = ImportanceHead(int(metadata["d"]))
        head.load_state_dict(tensors)
        return head.eval().requires_grad_(False), HeldOut(**json.loads(metadata["held_out"]))

    return load_made_for(path, model_sha256, "predictor", RETRAIN, build)
