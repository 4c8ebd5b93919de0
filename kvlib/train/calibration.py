"""Statistics of a model's queries before RoPE, for TriAttention (arXiv 2604.04921), from teacher-forced traces."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kvlib.engine.attention import observe_trace
from kvlib.errors import ConfigError
from kvlib.kernels.rope import rotate
from kvlib.models import MANIFEST, TINY, load_reasoner, update_manifest
from kvlib.policies.triattention import QueryStatistics
from kvlib.tasks.training import training_problems
from kvlib.tensors import load_made_for, write_tensors
from kvlib.train import Trace, collect_traces, load_profile, stage_traces

FILE = "triattention-calibration.safetensors"
COMMAND = "python -m kvlib.train.calibration"
N_TRACES = 120


def query_statistics(model: nn.Module, traces: Sequence[Trace]) -> QueryStatistics:
    """Statistics over all tokens of the traces, accumulated in float64."""
    config, inv_freq = model.config, model.base_model.rotary_emb.inv_freq
    shape = (3, config.num_hidden_layers, config.num_attention_heads, len(inv_freq))
    total = torch.zeros(shape, dtype=torch.float64, device=inv_freq.device)

    def accumulate(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        position = torch.arange(query.shape[1], device=query.device)
        re, im = rotate(query.double(), -position, inv_freq).chunk(2, -1)
        total[:, layer] += torch.stack([re, im, torch.hypot(re, im)]).sum(2)

    for trace in traces:
        observe_trace(model, trace.ids, accumulate)
    return QueryStatistics(*(total / sum(len(trace.ids) for trace in traces)).float())


def save_statistics(statistics: QueryStatistics, path: Path, model_sha256: str, n_traces: int, n_tokens: int) -> None:
    """The statistics, the weights they belong to and what they were made from; atomic."""
    metadata = {"model_sha256": model_sha256, "n_traces": str(n_traces), "n_tokens": str(n_tokens)}
    write_tensors(path, statistics.state_dict(), metadata)


def load_statistics(path: Path, model_sha256: str | None = None) -> QueryStatistics:
    """Raises ConfigError if the file is missing, damaged, or belongs to other weights than model_sha256."""

    def build(tensors: dict[str, Tensor], metadata: dict[str, str]) -> QueryStatistics:
        return QueryStatistics(**tensors)

    return load_made_for(path, model_sha256, "calibration", f"make it again with `{COMMAND}`", build)


def main() -> int:
    parser = argparse.ArgumentParser(description="Calibrate TriAttention: query statistics of a model.")
    parser.add_argument("--model", default="tiny", help="or the weights folder of another training of it")
    parser.add_argument("--profile", help="for another model: a profile of its predictor, whose traces are used")
    parser.add_argument("--profiles", type=Path, default=Path("notebooks/predictors.yml"), help="file of profiles")
    parser.add_argument("--out", type=Path, default=TINY, help="folder to write the file into")
    arguments = parser.parse_args()
    try:
        if arguments.profile:
            profile, _ = load_profile(arguments.profiles, arguments.profile)
            problems = training_problems(profile.problems, profile.n_traces, profile.seed)
            reasoner = load_reasoner(profile.model, profile.dtype, profile.device)
            traces, _ = stage_traces(profile, reasoner, problems, Path("runs/predictor") / arguments.profile / "traces")
        else:
            reasoner = load_reasoner(arguments.model)
            traces = collect_traces(reasoner, N_TRACES)
    except ConfigError as error:
        print(f"kvlib.train.calibration: {error}", file=sys.stderr)
        return 2
    n_tokens = sum(len(trace.ids) for trace in traces)
    statistics = query_statistics(reasoner.model, traces)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_statistics(statistics, arguments.out / FILE, reasoner.sha256, len(traces), n_tokens)
    if (arguments.out / MANIFEST).exists():
        update_manifest(arguments.out, [FILE])
    print(f"wrote {arguments.out / FILE} ({len(traces)} traces, {n_tokens} tokens)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
