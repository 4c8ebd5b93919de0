"""The head on the last hidden state: training, its quality on held-out traces, and its file."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.predictor.labels import Labelled

FILE = "dynts-predictor.safetensors"
RETRAIN = "train it again with `make predictor`, or `python -m kvlib.predictor --help` for another model"


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
    stateful = {"head": head, "optimiser": optimiser, "schedule": schedule}
    first, found = 0, _checkpoint(checkpoint, mark)
    if found:
        first = found["epoch"]
        generator.set_state(found["generator"])
        for name, part in stateful.items():
            part.load_state_dict(found[name])
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
            state = {name: part.state_dict() for name, part in stateful.items()}
            content = io.BytesIO()
            torch.save({**state, "generator": generator.get_state(), "epoch": epoch + 1, "mark": mark}, content)
            write_atomically(checkpoint, content.getvalue())
        if progress:
            progress(epoch + 1, f"loss {loss.item():.4f}")
    return head.eval().requires_grad_(False)


def _checkpoint(path: Path | None, mark: str) -> dict | None:
    """What an earlier training of this mark left; None if there is nothing to continue."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True) if path and path.exists() else None
    except (OSError, RuntimeError, UnpicklingError, EOFError):
        return None
    return found if found and found["mark"] == mark else None


def save_predictor(
    head: ImportanceHead, path: Path, held_out: HeldOut, model_sha256: str, **made_by: str | int | dict
) -> None:
    """Head-only checkpoint, atomic; its metadata hold the weights it belongs to, its held-out quality and made_by."""
    metadata = {"d": str(head.d), "model_sha256": model_sha256, "held_out": json.dumps(asdict(held_out))}
    metadata |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in made_by.items()}
    content = save({name: tensor.cpu() for name, tensor in head.state_dict().items()}, metadata)
    # safetensors writes the metadata in random order; the same head must be the same file, whose hash runs record.
    n = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + n]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, len(header).to_bytes(8, "little") + header + content[8 + n :])


def load_predictor(path: Path, model_sha256: str | None = None) -> tuple[ImportanceHead, HeldOut]:
    """Raises ConfigError if the file is missing, damaged, or belongs to other weights than model_sha256."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head = ImportanceHead(int(metadata["d"]))
        head.load_state_dict(state)
    except Exception as error:
        raise ConfigError(f"predictor {path} could not be loaded ({error}); {RETRAIN}") from error
    if model_sha256 and metadata["model_sha256"] != model_sha256:
        raise ConfigError(f"predictor {path} was trained for other weights; {RETRAIN}")
    return head.eval().requires_grad_(False), HeldOut(**json.loads(metadata["held_out"]))
