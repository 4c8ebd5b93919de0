"""Whether a study's timing says the same on a busy machine: idle, beside one busy loop, beside loops on every core.

    python tests/busy_machine.py --out results/bench/busy-machine.md

Runs the timing of one dataset as a study does, several times in each state of the machine, and writes a table. On an
idle machine only: what else runs is not counted. The loops on every core are busy for random halves of the time.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from kvlib.config import load_grid
from kvlib.record import cpu_model, read_record
from kvlib.stats import Ratio

LOOP = """
import os, random, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
draw = random.Random(int(sys.argv[1]))
while True:
    end = time.monotonic() + draw.uniform(0.2, 2)
    while time.monotonic() < end:
        pass
    time.sleep(draw.uniform(0.2, 2) if sys.argv[2] == "halves" else 0)
"""
STATES = {"idle": "", "one busy loop": "always", "loops on all cores, random halves": "halves"}


@contextmanager
def busy(state: str):
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as loops:
        for core in {"": [], "always": cores[:1], "halves": cores}[STATES[state]]:
            loop = subprocess.Popen([sys.executable, "-c", LOOP, str(core), STATES[state]])
            loops.callback(loop.wait)
            loops.callback(loop.kill)
        yield


def time_once(grid: Path, dataset: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvlib.study.timing", "--grid", str(grid), "--dataset", dataset]
        subprocess.run([*command, "--folder", folder], check=True)
        return read_record(Path(folder))["timing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=Path("notebooks/tiny.yml"))
    parser.add_argument("--dataset", default="chain-b")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.repeats < 1 or (load_grid(args.grid).timing or {}).get("repeats", 0) < 2:
        sys.exit("--repeats is at least 1, and the grid's timing has at least 2 repeats, without which is no interval")
    order = [state for _ in range(args.repeats) for state in STATES]
    random.Random(0).shuffle(order)
    runs = []
    for number, state in enumerate(order):
        started = time.monotonic()
        with busy(state):
            timing = time_once(args.grid, args.dataset)
        runs.append((state, time.monotonic() - started, timing))
        print(
            f"run {number + 1} of {len(order)}: {state}, {runs[-1][1]:.0f} s, {json.dumps(timing['ends'])}", flush=True
        )
    setting = runs[0][2]
    idle = np.median([timing["ends"]["ratio"] for state, _, timing in runs if state == "idle"])
    smallest, largest = setting["ends"]["kv_budgets"]
    lines = [
        "# The timing of a study on a busy machine",
        "",
        f"Made by `python tests/busy_machine.py` on {cpu_model()}, {os.cpu_count()} processors: {args.grid.name}, "
        f"{args.dataset}, {setting['batch_size']} rows, {setting['n_steps']} steps, {setting['repeats']} rounds, by "
        f"{setting['clock']}; {args.repeats} runs in each state, in random order. Control: equal work. Ends: speed at "
        f"KV budget {smallest} over that at {largest}; the median of the idle runs is {idle:.3f}.",
        "",
        "| Machine | Wall (s) | Control, 95 % interval | Within 2 % | Ends, 95 % interval | Covers idle | Half-width |",
        "|---|---|---|---|---|---|---|",
    ]
    for state, seconds, timing in sorted(runs, key=lambda run: list(STATES).index(run[0])):
        control, ends = Ratio.of(timing["control"]), Ratio.of(timing["ends"])
        lines.append(
            f"| {state} | {seconds:.0f} | {control} | {'yes' if abs(control.ratio - 1) <= 0.02 else 'no'} | {ends} | "
            f"{'yes' if ends.low <= idle <= ends.high else 'no'} | {50 * (ends.high - ends.low) / ends.ratio:.1f} % |"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
