"""What the head learns from: hidden states of thinking tokens, and the attention the answer pays to each."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import trange

from kvlib.engine import noise
from kvlib.engine.attention import observe_trace
from kvlib.kernels.noise import uniform
from kvlib.record import fingerprint
from kvlib.tensors import read_tensors, write_tensors
from kvlib.train.traces import Trace

ANSWER_ROWS = 256
"""Answer tokens whose rows of the attention map exist at one time."""

TRACES_PER_SHARD = 32
Labelled = tuple[Tensor, Tensor]
"""Features `[T, d]` and labels `[T]` of one trace's T thinking tokens."""


@torch.inference_mode()
def features_and_labels(model: nn.Module, trace: Trace, n_rows: int = ANSWER_ROWS) -> Labelled:
    """Hidden states (after the final norm) of the thinking tokens, and the attention they get.

    The label is the mean over all layers, heads and answer tokens (compute_is_sp.py of Robin930/DynTS). Only the
    answer's rows of the attention map are ever computed, n_rows at a time: `[HQ, n_rows, N]`.
    """
    total = torch.zeros(len(trace.ids), device=next(model.parameters()).device)

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        N, H = query.shape[1], len(key)
        keys = key[:, None].transpose(-1, -2).float()
        position = torch.arange(N, device=query.device)
        for rows in position[trace.answer_at :].split(n_rows):
            logits = query[:, rows].unflatten(0, (H, -1)).float() @ keys * scaling
            logits = logits.masked_fill(position > rows[:, None], -torch.inf)
            share = len(rows) / (N - trace.answer_at)
            total.add_(logits.softmax(-1).mean((0, 1, 2)) * share)

    hidden = observe_trace(model, trace.ids, observe)
    return hidden[trace.thinking], (total / model.config.num_hidden_layers)[trace.thinking]


def label_traces(
    model: nn.Module, traces: Sequence[Trace], folder: Path, mark: str, most_tokens: int | None = None, n_whole: int = 0
) -> list[Labelled]:
    """Labelled traces, in order, in shards that are written to `folder` once and read back memory-mapped.

    mark: fingerprint of what made the traces; a shard of another mark, or a damaged one, is made again.
    most_tokens: keep a random draw of that many thinking tokens of a trace, but all of the last n_whole traces.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Labelled] = []
    for start in trange(0, len(traces), TRACES_PER_SHARD, desc="labels", unit="shard", mininterval=10):
        path = folder / f"{start // TRACES_PER_SHARD:05}.safetensors"
        shard = range(start, min(start + TRACES_PER_SHARD, len(traces)))
        limits = [None if i >= len(traces) - n_whole else most_tokens for i in shard]
        shard_mark = fingerprint({"traces": mark, "ids": [traces[i].ids for i in shard], "limits": limits})
        data = read_shard(path, shard_mark)
        if data is None:
            made = [drawn(features_and_labels(model, traces[i]), n, i) for i, n in zip(shard, limits, strict=True)]
            tensors = {
                "features": torch.cat([features for features, _ in made]),
                "labels": torch.cat([labels for _, labels in made]),
                "lengths": torch.tensor([len(labels) for _, labels in made]),
            }
            write_tensors(path, tensors, {"mark": shard_mark})
            data = read_shard(path, shard_mark)
        found += data
    return found


def drawn(labelled: Labelled, n: int | None, index: int) -> Labelled:
    """n of a trace's thinking tokens, drawn by its index, in their order."""
    T = len(labelled[1])
    if n is None or n >= T:
        return labelled
    chosen = uniform(torch.tensor(noise.key("label", index)), torch.arange(T)).topk(n).indices.sort().values
    return tuple(part[chosen.to(part.device)] for part in labelled)


def read_shard(path: Path, mark: str) -> list[Labelled] | None:
    """The shard's traces; None if there is no whole shard of this mark."""
    with suppress(OSError, SafetensorError):
        tensors, metadata = read_tensors(path)
        if metadata.get("mark") == mark:
            lengths = tensors["lengths"].tolist()
            return list(zip(tensors["features"].split(lengths), tensors["labels"].split(lengths), strict=True))
    return None
