"""The importance predictor of DynTS (arXiv 2601.18383, section 3): its training, and its quality on held-out traces."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import trange

from kvlib.errors import ConfigError
from kvlib.fitted import save_fitted
from kvlib.models import check_model, load_reasoner
from kvlib.policies.dynts import ImportanceHead
from kvlib.record import fingerprint, locked
from kvlib.tasks.training import training_problems
from kvlib.train.labels import Labelled, label_traces
from kvlib.train.recipe import Profile
from kvlib.train.resume import restore, store
from kvlib.train.traces import stage_traces


@dataclass(frozen=True)
class HeldOut:
    """On traces never trained on: mean per-trace rank correlation, and the share of a trace's true top 20 % that lies
    in the predicted top 20 % (chance: 0.2)."""

    n_traces: int
    spearman: float
    top20_recall: float


def evaluate_head(head: ImportanceHead, held_out: Sequence[Labelled], device: str = "cpu") -> HeldOut:
    """Rank correlation (Spearman) and top-20 % recall, averaged over traces."""
    correlations, recalls = [], []
    for features, labels in held_out:
        with torch.inference_mode():
            predicted = head(features.to(device)).cpu()
        pair = pd.DataFrame({"predicted": predicted.float(), "label": labels.float()})
        correlations.append(float(pair.corr("spearman").loc["predicted", "label"]))
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
) -> ImportanceHead:
    """Fit the head to label ** label_power (scaled to mean 1) by squared error: AdamW, cosine, warm-up 10 %.

    A power is monotone, so it changes the loss and not the target ranking; 0.3 is the published one for R1-Qwen.
    checkpoint: where every epoch leaves all that the next one needs, so that a training that was interrupted ends in
    the same head; one of another mark is not continued.
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
    done = restore(checkpoint, mark, head, [optimiser], generator) if checkpoint else None
    if done:
        schedule.load_state_dict(done["schedule"])
    first = done["epoch"] if done else 0
    epochs = trange(first, n_epochs, desc="epochs", total=n_epochs, initial=first, mininterval=10)
    for epoch in epochs:
        for index in torch.randperm(len(targets), generator=generator).split(batch_tokens):
            loss = F.mse_loss(head(rows_of(parts, index).to(device)), targets[index].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the predictor's loss is {loss.item()}; its features or labels are not finite")
        if checkpoint:
            numbers = {"epoch": epoch + 1, "schedule": schedule.state_dict()}
            store(checkpoint, mark, head, [optimiser], generator, **numbers)
        epochs.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return head.eval().requires_grad_(False)


def train_predictor(profile: Profile, name: str, work: Path, out: Path) -> tuple[ImportanceHead, HeldOut]:
    """Run all stages in `work`, taking up what an earlier run left there, and write the head into `out`.

    Waits while another process works there.
    Raises ConfigError before the model is loaded for all that can be told by then.
    """
    check_model(profile.model)
    if profile.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"profile {name!r} is for device {profile.device!r} and torch sees no CUDA GPU; run it on one"
        )
    problems = training_problems(profile.problems, profile.n_traces, profile.seed)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(profile.threads)
    with locked(work / ".lock"):
        reasoner = load_reasoner(profile.model, profile.dtype, profile.device)
        traces, mark = stage_traces(profile, reasoner, problems, work / "traces")
        limits = {"most_tokens": profile.label_tokens, "n_whole": profile.n_held_out}
        data = label_traces(reasoner.model, traces, work / "labels", mark, **limits)
        n_train = len(data) - profile.n_held_out
        print(f"{sum(len(labels) for _, labels in data[:n_train])} thinking tokens to train on", flush=True)
        head = train_head(
            data[:n_train],
            **profile.of_head(),
            checkpoint=work / "training.safetensors",
            mark=fingerprint({"traces": mark, "profile": asdict(profile)}),
        )
        stored = head
        if profile.dtype != "float32":  # half the file, and no less than what its features are told in
            stored = head.bfloat16()
            head = ImportanceHead.of(stored.state_dict(), stored.shape).to(profile.device)
        held_out = evaluate_head(head, data[n_train:], profile.device)
        path = save_fitted(
            "predictor", stored, out, reasoner.sha256, held_out=asdict(held_out), profile=name,
            settings=asdict(profile), n_traces=n_train, seed=profile.seed,
        )  # fmt: skip
    print(
        f"held out, {held_out.n_traces} traces: rank correlation {held_out.spearman:.3f}, recall of the true top 20 % "
        f"{held_out.top20_recall:.3f} (chance 0.200)\nwrote {path}",
        flush=True,
    )
    return head, held_out
