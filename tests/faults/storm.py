"""Random SIGKILLs of engine, cell and kernel over a running grid, the same command typed again after each.

    python tests/faults/storm.py --kills 100

Decodes a small grid of the tiny model, kills what runs it at random until enough was killed, lets it finish, and
compares what is on disk with an undisturbed run. Prints a table; exits 1 unless nothing was lost, doubled or damaged.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil

from kvlib import record
from kvlib.config import load_grid

ROOT = Path(__file__).parents[2]
GRID = """
study: storm
datasets: [chain-a, chain-b]
policy_options: {n_recent: 16, ratio: 0.8}
kv_budgets: [96, 136]
full_cache: true
n_problems: 24
max_new_tokens: 400
batch_size: 8
timing: {batch_size: 4, n_steps: 8, repeats: 1}
"""
JOURNAL = """
import os

import kvlib.cell

def journal(what, request):
    with open(os.path.join(folder, "journal"), "a") as file:
        file.write(f"{os.getpid()} {what} {request.id}\\n")

def journaled(decoder, *given, completions=kvlib.cell.completions):
    admit = decoder.admit
    def admitted(row, request):
        journal("admitted", request)
        admit(row, request)
    decoder.admit = admitted
    for completion in completions(decoder, *given):
        journal("finished", completion.request)
        yield completion

kvlib.cell.completions = journaled
"""
KINDS = ["engine", "cell", "kernel"]


@dataclass
class Tally:
    """What a storm did and what it left. Samples are counted over all cells; `lost` and so on want to be 0."""

    kills: collections.Counter = field(default_factory=collections.Counter)
    commands: int = 0
    cells: int = 0
    samples: int = 0
    lost: int = 0
    doubled: int = 0
    damaged: int = 0
    rotated: int = 0
    torn: int = 0
    orphans: int = 0
    decoded_again: int = 0
    finished_again: int = 0
    most_repeated_by_one_kill: int = 0
    unlike_undisturbed: int = 0

    def rows(self) -> list[tuple[str, object]]:
        killed = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return [
            ("SIGKILLs", f"{self.kills.total()} ({killed})"),
            ("times the same command was typed", self.commands),
            ("cells, samples", f"{self.cells}, {self.samples}"),
            ("samples lost", self.lost),
            ("samples doubled", self.doubled),
            ("records or samples files damaged", self.damaged),
            ("files moved aside", self.rotated),
            ("torn last lines set aside", self.torn),
            ("orphans 10 s after the end", self.orphans),
            ("samples whose decoding began again", self.decoded_again),
            ("of these finished, but not yet on disk", self.finished_again),
            ("most samples begun again after one kill", self.most_repeated_by_one_kill),
            ("samples unlike the undisturbed run's", self.unlike_undisturbed),
        ]


class Storm:
    """A study at `home`/notebooks, and the hand that kills it. `pause`: seconds between two kills, from and to."""

    def __init__(self, home: Path, environment: dict[str, str], kills: int, pause: tuple[float, float], seed: int = 0):
        self.home, self.environment, self.left, self.pause = home, environment, kills, pause
        self.random = random.Random(seed)
        self.tally = Tally()
        self.processes: set[psutil.Process] = set()

    def run(self, seed: int) -> None:
        """Type the command of one study until it succeeds, killing what runs it meanwhile."""
        done = False
        while not done:
            self.tally.commands += 1
            with open(self.home / "storm.log", "ab") as log:
                command = [sys.executable, "-m", "kvlib.study", "charts", "--seed", str(seed)]
                engine = subprocess.Popen(command, cwd=self.home, env=self.environment, stdout=log, stderr=log)
            while self.left and engine.poll() is None:
                self.wait(engine)
                self.strike(engine)
            done = engine.wait() == 0

    def wait(self, engine: subprocess.Popen) -> None:
        """At times until a sample is written, so that kills fall into decoding too."""
        known, end = self.written(), time.monotonic() + 3 * self.pause[1]
        if self.random.random() < 0.3:
            while self.written() == known and engine.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(self.random.uniform(0, self.pause[0]))
        else:
            time.sleep(self.random.uniform(*self.pause))

    def written(self) -> int:
        return sum(path.stat().st_size for path in self.home.glob("runs/**/samples.jsonl"))

    def strike(self, engine: subprocess.Popen) -> None:
        """SIGKILL one process of a kind drawn at random: the study command or its Snakemake, a cell, a kernel."""
        running = collections.defaultdict(list)
        try:
            top = psutil.Process(engine.pid)
            for process in [top, *top.children(recursive=True)]:
                words = process.cmdline()
                if "ipykernel_launcher" in words:
                    running["kernel"].append(process)
                elif "kvlib.study.cell_command" in words and "--folder" in words:
                    running["cell"].append(process)
                elif process == top or "snakemake" in words:
                    running["engine"].append(process)
        except psutil.Error:
            return
        self.processes |= {process for group in running.values() for process in group}
        # The engine is always there and its restart costs most, so alone it is mostly spared.
        weights = [1 if kind == "engine" else 2 * bool(running[kind]) for kind in KINDS]
        kind = self.random.choices([*KINDS, None], [*weights, 2 * (sum(weights) == 1)])[0]
        if kind:
            victim = self.random.choice(running[kind])
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.Error:
                return
            self.left -= 1
            self.tally.kills[kind] += 1
            with open(self.home / "kills.log", "a") as log:
                log.write(f"{time.strftime('%H:%M:%S')} {kind} {victim.pid}\n")

    def judge(self, folders: list[Path], expected: list[str]) -> None:
        """Count what is on disk in these cells; `expected`: the sample ids of one cell less their dataset."""
        for folder in folders:
            dataset = folder.relative_to(self.home / "runs").parts[1]
            wanted = {f"{dataset}/{own}" for own in expected}
            self.tally.cells += 1
            try:
                record.read_record(folder)
                lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)[1:]
                found = collections.Counter(record.decode_line(line)["id"] for line in lines)
            except (record.RecordError, ValueError):
                self.tally.damaged += 1
                continue
            self.tally.samples += len(found)
            self.tally.lost += len(wanted - set(found))
            self.tally.doubled += found.total() - len(found)
            self.tally.rotated += len([*folder.glob("samples.*.jsonl"), *folder.glob("record.*.json")])
            self.tally.torn += (folder / "samples.torn").exists()
            self.count_repeated(folder)

    def count_repeated(self, folder: Path) -> None:
        if not (folder / "journal").exists():
            return
        events = [line.split() for line in (folder / "journal").read_text().splitlines()]
        begun, finished = collections.defaultdict(set), collections.defaultdict(set)
        for pid, what, name in events:
            (begun if what == "admitted" else finished)[pid].add(name)
        times = collections.Counter(name for _, what, name in events if what == "finished")
        self.tally.finished_again += times.total() - len(times)
        kernels = list(begun)
        for number, pid in enumerate(kernels):
            later = set().union(*(begun[other] for other in kernels[number + 1 :]))
            again = len(begun[pid] & later)
            self.tally.decoded_again += again
            self.tally.most_repeated_by_one_kill = max(self.tally.most_repeated_by_one_kill, again)

    def count_orphans(self) -> None:
        end = time.monotonic() + 10
        alive = self.processes
        while alive and time.monotonic() < end:
            alive = {p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE}
            time.sleep(0.2)
        self.tally.orphans = len(alive)


def make_home(home: Path, grid: str = GRID) -> None:
    """The shipped cell notebook, which also notes what it begins and finishes, a stub of the charts, and the grid."""
    (home / "notebooks").mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(ROOT / "notebooks" / "30_run.ipynb", 4)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(JOURNAL.strip()))
    nbformat.write(notebook, home / "notebooks" / "30_run.ipynb")
    stub = ROOT / "tests" / "notebooks" / "40_charts.ipynb"
    (home / "notebooks" / "40_charts.ipynb").write_bytes(stub.read_bytes())
    (home / "notebooks" / "tiny.yml").write_text(grid)


UNDISTURBED = """
import sys
from kvlib.config import load_grid
from kvlib.cell import run
for cell in load_grid(sys.argv[1]).cells(int(sys.argv[2])):
    run(cell, f"{sys.argv[3]}/{cell.cell_path}")
"""


def samples(folder: Path) -> dict[str, dict]:
    return record.load_samples(folder / "samples.jsonl")[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--pause", type=float, nargs=2, default=(1, 8), help="seconds between; default: 1 8")
    parser.add_argument("--seed", type=int, default=0, help="of the kills; default: %(default)s")
    parser.add_argument("--home", type=Path, help="where to; default: a temporary folder")
    given = parser.parse_args()
    home = given.home or Path(tempfile.mkdtemp(prefix="kvlib-storm-"))
    make_home(home)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    storm = Storm(home, environment, given.kills, tuple(given.pause), given.seed)
    grid = load_grid(home / "notebooks" / "tiny.yml")
    begun, seed = time.monotonic(), 0
    while seed == 0 or storm.left:
        storm.run(seed)
        cells = [cell.cell_path for cell in grid.cells(seed)]
        folders = [home / "runs" / "storm" / path for path in cells]
        storm.judge(folders, [f"{number}/0" for number in range(24)])
        print(f"seed {seed}: {storm.tally.kills.total()} kills, {time.monotonic() - begun:.0f} s", flush=True)
        words = [sys.executable, "-c", UNDISTURBED, str(grid.path), str(seed), str(home / "undisturbed")]
        subprocess.run(words, env=environment, check=True)
        for path, folder in zip(cells, folders, strict=True):
            ours, theirs = samples(folder), samples(home / "undisturbed" / path)
            storm.tally.unlike_undisturbed += sum(ours.get(name) != theirs[name] for name in theirs)
        seed += 1
    storm.count_orphans()
    for what, value in [*storm.tally.rows(), ("seconds", round(time.monotonic() - begun))]:
        print(f"{what:<42} {value}", flush=True)
    (home / "tally.json").write_text(json.dumps(vars(storm.tally), indent=1))
    t = storm.tally
    wrong = t.lost or t.doubled or t.damaged or t.rotated or t.orphans or t.unlike_undisturbed
    return int(bool(wrong) or t.most_repeated_by_one_kill > grid.shared["batch_size"])


if __name__ == "__main__":
    sys.exit(main())
