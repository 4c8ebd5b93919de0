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
from kvlib.train.reasoner import train_reasoner
from kvlib.train.recipe import load_profile, plan
from kvlib.train.traces import Trace, collect_traces, stage_traces

WORK = Path("runs/predictor")
N_CALIBRATION, N_GATE, N_GATE_HELD_OUT = 120, 240, 40
"""Problems whose right traces are read."""


def predictor(arguments: argparse.Namespace) -> None:
    profile, expected = load_profile(arguments.profiles, arguments.profile)
    own = arguments.profile
    if arguments.model:
        profile = dataclasses.replace(profile, model=arguments.model)
        own = f"{own}-{folder_name(arguments.model)}"
    work = arguments.work or WORK / own
    out = arguments.out or work
    if arguments.plan:
        print(plan(profile, expected, arguments.profile, work, out))
    else:
        train_predictor(profile, arguments.profile, work, out)


def traces_of(arguments: argparse.Namespace, n: int) -> tuple[Reasoner, list[Trace]]:
    """Those of a predictor's profile, or the right ones of n chains."""
    if not arguments.profile:
        reasoner = load_reasoner(arguments.model)
        return reasoner, collect_traces(reasoner, n)
    profile, _ = load_profile(arguments.profiles, arguments.profile)
    problems = training_problems(profile.problems, profile.n_traces, profile.seed)
    reasoner = load_reasoner(profile.model, profile.dtype, profile.device)
    return reasoner, stage_traces(profile, reasoner, problems, WORK / arguments.profile / "traces")[0]


def calibration(arguments: argparse.Namespace) -> None:
    reasoner, traces = traces_of(arguments, N_CALIBRATION)
    statistics = query_statistics(reasoner.model, [trace.ids for trace in traces])
    counts = {"n_traces": len(traces), "n_tokens": sum(len(trace.ids) for trace in traces)}
    print(f"wrote {save_fitted('calibration', statistics, arguments.out, reasoner.sha256, **counts)} of {counts}")


def gate(arguments: argparse.Namespace) -> None:
    reasoner, traces = traces_of(arguments, N_GATE)
    print(f"{len(traces)} usable traces, {sum(len(t.ids) for t in traces)} tokens", flush=True)
    if len(traces) <= N_GATE_HELD_OUT:
        raise ConfigError(
            f"only {len(traces)} traces are usable, and {N_GATE_HELD_OUT} are held out; train the model longer"
        )
    made = train_gate(reasoner.model, [trace.ids for trace in traces[:-N_GATE_HELD_OUT]])
    held_out = evaluate_gate(made, reasoner.model, traces[-N_GATE_HELD_OUT:])
    path = save_fitted("gate", made, arguments.out, reasoner.sha256, held_out=asdict(held_out))
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

    own = command(predictor, "the importance predictor of dynts; every stage resumes: run it again when interrupted")
    own.add_argument("--profile", default="tiny", help="a name in the file of profiles (default: tiny)")
    own.add_argument("--profiles", type=Path, default=Path("notebooks/predictors.yml"), help="file of profiles")
    own.add_argument("--model", help="another model for the profile, e.g. the weights of another training seed")
    own.add_argument("--work", type=Path, help=f"folder of traces, labels and checkpoint (default: in {WORK})")
    own.add_argument("--out", type=Path, help="folder to write the head into (default: that of --work)")
    own.add_argument("--plan", action="store_true", help="print what would be done and its cost, and stop")
    for run, text in ((calibration, "the query statistics of triattention"), (gate, "the retention gate of trimkv")):
        own = command(run, text)
        own.add_argument("--model", default="tiny", help="or the weights folder of another training of it")
        own.add_argument("--profile", help="for another model: a profile of its predictor, whose traces are used")
        own.add_argument("--profiles", type=Path, default=Path("notebooks/predictors.yml"), help="file of profiles")
        own.add_argument("--out", type=Path, default=TINY, help="folder to write the file into")
    own = command(reasoner, "the tiny reasoner, from scratch (seeded, resumable, CPU)")
    own.add_argument("--out", type=Path, default=Path("runs/tiny-model"), help="folder for checkpoint and weights")
    own.add_argument("--steps", type=int, help="default: those of the shipped weights")
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
