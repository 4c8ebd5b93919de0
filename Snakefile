# The cells of one grid; `make charts` calls it through kvlib.study. On a Slurm cluster:
#   make plan PROFILE=r1-qwen     first: what is missing
#   snakemake --executor slurm --jobs 20 --retries 2 --rerun-incomplete --keep-going \
#       --config grid=notebooks/r1-qwen.yml seed=0
#   make sweep PROFILE=r1-qwen    afterwards, on a GPU node: timing and charts
# grid=, runs= and seed= after --config change the defaults; paths are relative to this file. On a machine with
# several GPUs each cell leases one (kvlib.study.gpus); KVLIB_TIME_LIMIT=3600 stops a kernel after an hour.
# The cell command, not Snakemake, decides what is done: it skips, resumes and locks. Snakemake only starts it again
# where what decides a cell's samples changed; a damaged record it does not see: `make verify` finds those. Samples are
# no declared output, because Snakemake deletes those; retries stand on the command line, because a rule's own would
# multiply with the cluster's.
import contextlib
import functools
import json
import os
import re
import sys
from pathlib import Path

from kvlib.config import load_grid
from kvlib.errors import ConfigError

ROOT = Path(workflow.basedir)
ASKED = {**json.loads(os.environ.get("KVLIB_STUDY", "{}")), **config}
GRID = load_grid(ROOT / ASKED.get("grid", "notebooks/tiny.yml"))
RUNS = ROOT / ASKED.get("runs", "runs") / GRID.study
NOTEBOOK = GRID.path.parent / "30_run.ipynb"
CELLS = GRID.folders(int(ASKED.get("seed", 0)))

RUNS.mkdir(parents=True, exist_ok=True)
workdir: str(RUNS)

@functools.cache
def fingerprints() -> dict[str, str]:
    """What decides each cell's samples: config, data, weights, predictor. Asked for before any job runs."""
    from kvlib.cell import run_fingerprints  # torch, seconds

    found = {}
    with contextlib.chdir(GRID.path.parent):  # a relative path in a grid is relative to the grid
        for path, cell in CELLS.items():
            try:
                found[path] = run_fingerprints(cell)[0]
            except ConfigError as error:  # the cell command says it too, and the other cells go on
                found[path] = str(error)
    return found

wildcard_constraints:
    cell="|".join(re.escape(path) for path in CELLS)

rule all:
    input: [f"{path}/record.json" for path in CELLS]

rule cell:
    output: update("{cell}/record.json")
    threads: lambda wildcards: CELLS[wildcards.cell].threads
    resources:
        gpu=lambda wildcards: int(CELLS[wildcards.cell].device.startswith("cuda")),
        mem_mb=lambda wildcards: 32000 if CELLS[wildcards.cell].device.startswith("cuda") else 3000,
        attempt=lambda wildcards, attempt: attempt,
    params:  # functions, because braces in a plain string would be wildcards
        python=lambda wildcards: sys.executable,
        notebook=lambda wildcards: str(NOTEBOOK),
        fingerprint=lambda wildcards: fingerprints()[wildcards.cell],
        folder=lambda wildcards: str(RUNS / wildcards.cell),
        config=lambda wildcards: json.dumps(CELLS[wildcards.cell].parameters()),
    # exec, so that the cell command is Snakemake's own child and dies with it
    shell:
        "exec {params.python:q} -m kvlib.study.cell_command --notebook {params.notebook:q} --folder {params.folder:q}"
        " --config {params.config:q} --parent $PPID --attempt {resources.attempt}"
        " > {params.folder:q}/run.log 2>&1"
