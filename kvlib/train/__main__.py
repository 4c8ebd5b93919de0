"""`python -m kvlib.train predictor | calibration | gate | reasoner`: make what policies need, or the tiny reasoner."""

import argparse
import dataclasses
import sys
from dataclasses import asdict
from pathlib import Path

from kvlib.config import folder_name
from kvlib.errors import ConfigError
from kvlib.fitted import save_fitted
from kvlib.models import TINY, Reasoner, load_reasoner
from kvlib.record import RecordError
from kvlib.tasks.training import training_problems
from kvlib.train.calibration import query_statistics
from kvlib.train.gate import evaluate_gate, train_gate
from kvlib.train.predictor import train_predictor
from kvlib.train.reasoner import N_STEPS, train_reasoner
from kvlib.train.recipe import Expected, Profile, load_profile, plan
from kvlib.train.traces import Trace, collect_traces, stage_traces

WORK = Path("runs/predictor")
N_CALIBRATION, N_GATE, N_GATE_HELD_OUT = 120, 240, 40
"""Problems whose right traces are read."""


def profile_of(arguments: argparse.Namespace, name: str) -> tuple[Profile, Expected | None, Path]:
    """The profile `name`, for --model if that is given; what a plan reckons with; and its folder of stages."""
    profile, expected = load_profile(arguments.profiles, name)
    if not arguments.model:
        return profile, expected, arguments.work or WORK / name
    own = f"{name}-{folder_name(arguments.model)}"
    return dataclasses.replace(profile, model=arguments.model), expected, arguments.work or WORK / own


def predictor(arguments: argparse.Namespace) -> None:
    name = arguments.profile or "tiny"
    profile, expected, work = profile_of(arguments, name)
    out = arguments.out or work
    if arguments.plan:
        print(plan(profile, expected, name, work, out))
    else:
        train_predictor(profile, name, work, out)


def traces_of(arguments: argparse.Namespace, n: int) -> tuple[Reasoner, list[Trace], Path]:
    """Those of a predictor's profile, or the right ones of n chains; and where what is fitted to them belongs."""
    if arguments.profile:
        profile, _, work = profile_of(arguments, arguments.profile)
        problems = training_problems(profile.problems, profile.n_traces, profile.seed)
        reasoner = load_reasoner(profile.model, profile.dtype, profile.device)
        return reasoner, stage_traces(profile, reasoner, problems, work / "traces")[0], arguments.out or work
    model = arguments.model or "tiny"
    out = arguments.out or (TINY if model == "tiny" else Path(model))
    if not (arguments.out or out.is_dir()):
        raise ConfigError(f"{model!r} is no folder of weights; name its --profile, or a folder to write into: --out")
    reasoner = load_reasoner(model)
    traces = collect_traces(reasoner, n)
    if not traces:
        raise ConfigError(f"{model!r} solves none of {n} chains; train it longer, or name a --profile of its problems")
    return reasoner, traces, out


def calibration(arguments: argparse.Namespace) -> None:
    reasoner, traces, out = traces_of(arguments, N_CALIBRATION)
    statistics = query_statistics(reasoner.model, [trace.ids for trace in traces])
    counts = {"n_traces": len(traces), "n_tokens": sum(len(trace.ids) for trace in traces)}
    print(f"wrote {save_fitted('calibration', statistics, out, reasoner.sha256, **counts)} of {counts}")


def gate(arguments: argparse.Namespace) -> None:
    reasoner, traces, out = traces_of(arguments, N_GATE)
    print(f"{len(traces)} usable traces, {sum(len(t.ids) for t in traces)} tokens", flush=True)
    if len(traces) <= N_GATE_HELD_OUT:
        raise ConfigError(
            f"only {len(traces)} traces are usable, and {N_GATE_HELD_OUT} are held out; train the model longer"
        )
    made = train_gate(reasoner.model, [trace.ids for trace in traces[:-N_GATE_HELD_OUT]])
    held_out = evaluate_gate(made, reasoner.model, traces[-N_GATE_HELD_OUT:])
    path = save_fitted("gate", made, out, reasoner.sha256, held_out=asdict(held_out))
    print(f"held out: {held_out}\nwrote {path}")


def reasoner(arguments: argparse.Namespace) -> None:
    train_reasoner(arguments.out, arguments.steps, arguments.seed)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlib.train", description=__doc__.split(": ")[1])
    commands = parser.add_subparsers(required=True)

    def command(run, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(run.__name__, help=text, description=text)
        own.set_defaults(run=run)
        return own

    for run, text in (
        (predictor, "the importance predictor of dynts; every stage resumes: run it again when interrupted"),
        (calibration, "the query statistics of triattention"),
        (gate, "the retention gate of trimkv"),
    ):
        own = command(run, text)
        own.add_argument("--profile", help="a name in the file of profiles, whose traces are used (default: tiny's)")
        own.add_argument("--profiles", type=Path, default=Path("notebooks/predictors.yml"), help="file of profiles")
        own.add_argument("--model", help="another model than the profile's, or the weights of another training of tiny")
        own.add_argument("--work", type=Path, help=f"folder of a profile's traces and labels (default: in {WORK})")
        own.add_argument("--out", type=Path, help="folder to write into (default: that of --work; tiny's own weights)")
        if run is predictor:
            own.add_argument("--plan", action="store_true", help="print what would be done and its cost, and stop")
    own = command(reasoner, "the tiny reasoner, from scratch (seeded, resumable, CPU)")
    own.add_argument("--out", type=Path, default=Path("runs/tiny-model"), help="folder for checkpoint and weights")
    own.add_argument("--steps", type=int, default=N_STEPS, help="default: those of the shipped weights")
    own.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args(given)
    try:
        arguments.run(arguments)
    except (ConfigError, RecordError) as error:
        print(f"kvlib.train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
