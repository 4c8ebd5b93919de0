"""A real one-node Slurm with two fake GPUs, the shipped Snakefile on it, and a cell that is cancelled half-way.

    make test-slurm        needs root, and Debian's slurmctld slurmd slurm-client munge

Everything of it (configuration, keys, daemons, records) lives in a temporary folder and is stopped at the end.
Exits 0 also where Slurm is not there, saying so; 1 if a sample was lost, doubled or made in the wrong place.
"""

import argparse
import collections
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvlib import record
from kvlib.config import load_grid

ROOT = Path(__file__).parents[2]
SYSTEM = Path("/etc/slurm/slurm.conf")
FOUND = Path("/run/slurm/conf")  # where srun looks next; Snakemake's jobs call it without SLURM_CONF
DAEMONS = ["munged", "slurmctld", "slurmd"]
CLIENTS = ["sbatch", "squeue", "scancel", "sinfo"]
GRID = """
study: slurm
datasets: [chain-a]
policy_options: {n_recent: 16, ratio: 0.8}
kv_budgets: [96, 136]
full_cache: true
n_problems: 24
max_new_tokens: 400
batch_size: 8
"""
CONFIG = """
ClusterName=kvlib
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
NodeName={host} CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why Slurm cannot be tried here, None if it can."""
    lacks = [name for name in [*DAEMONS, *CLIENTS] if not shutil.which(name, path=search_path())]
    if lacks:
        return f"{', '.join(lacks)} not found; on Debian: apt-get install slurmctld slurmd slurm-client munge"
    if SYSTEM.exists() or FOUND.exists():
        return f"this machine has a Slurm of its own ({SYSTEM if SYSTEM.exists() else FOUND})"
    if os.geteuid() != 0:
        return "its daemons want root"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "Snakemake has no Slurm plugin here: pip install 'kvlib[slurm]'"
    return None


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


@contextlib.contextmanager
def cluster(folder: Path):
    """Start munged, slurmctld and slurmd out of `folder`, and always stop them; yields the environment of clients."""
    host = socket.gethostname().split(".")[0]
    free = [socket.create_server(("", 0)) for _ in range(2)]
    ports = [server.getsockname()[1] for server in free]
    for server in free:
        server.close()
    folder.chmod(0o755)  # munged refuses a socket where not everyone may go
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for number in range(2):
        os.mknod(folder / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))  # null devices
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=ports))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = os.environ | {"PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munge = [f"--{option}={folder / name}" for option, name in files.items()]
    commands = [
        ["munged", "--foreground", "--force", f"--log-file={folder}/munge.log", *munge],
        ["slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-N", host, "-f", str(folder / "slurm.conf")],
    ]
    running = []
    FOUND.parent.mkdir(exist_ok=True)
    FOUND.symlink_to(folder)
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as output:
                running.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            time.sleep(1)
        wait_until(lambda: "idle" in said(environment, "sinfo", "-h", "-o", "%t"), 60, f"no idle node; see {folder}")
        yield environment
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment, capture_output=True)
        time.sleep(1)
        for daemon in reversed(running):
            daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()
            daemon.wait()
        FOUND.unlink()


def said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def wait_until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.1)


def header_and_samples(folder: Path) -> tuple[dict | None, dict]:
    header, done, _ = record.load_samples(folder / "samples.jsonl")
    return header, done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    given = parser.parse_args()
    why = missing()
    if why:
        print(f"Slurm was not tried: {why}")
        return 0
    home = Path(tempfile.mkdtemp(prefix="kvlib-slurm-"))
    try:
        with cluster(home) as environment:
            return study(home, environment)
    finally:
        if given.keep:
            print(f"kept {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)


def study(home: Path, environment: dict[str, str]) -> int:
    (home / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "30_run.ipynb", home / "notebooks")
    (home / "notebooks" / "tiny.yml").write_text(GRID)
    grid = load_grid(home / "notebooks" / "tiny.yml")
    folders = [home / "runs" / grid.study / cell.cell_path for cell in grid.cells(0)]
    # A cell decodes on the CPU and is counted as a GPU job.
    options = """--executor slurm --jobs 2 --retries 2 --rerun-incomplete --keep-going --latency-wait 20 --nocolor
        --profile none --workflow-profile none --set-resources cell:gpu=1 cell:slurm_partition=main --slurm-no-account
        --slurm-status-command squeue --slurm-init-seconds-before-status-checks 3"""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), *options.split()]
    command += ["--config", f"grid={grid.path}", f"runs={home / 'runs'}", "seed=0"]
    environment = environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    print(said(environment, "sinfo", "-o", "%N %t %c cpus %G"), flush=True)
    victim = folders[0]
    with open(home / "snakemake.log", "wb") as log:
        engine = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_until(
            lambda: engine.poll() is not None or len(header_and_samples(victim)[1]) >= 5,
            900,
            f"no sample in {victim}; see {home}/snakemake.log",
        )
        if engine.poll() is not None:
            print((home / "snakemake.log").read_text()[-3000:])
            return 1
        job = header_and_samples(victim)[0]["provenance"]["slurm_job"]
        print(said(environment, "squeue", "-o", "%i %T %C cpus %b %N"), flush=True)
        subprocess.run(["scancel", job], env=environment, check=True)
        wait_until(lambda: said(environment, "squeue", "-h", "-j", job) == "", 60, f"job {job} survived scancel")
        time.sleep(2)
        kept = len(header_and_samples(victim)[1])
        print(f"scancel {job}: {victim.relative_to(home)} had {kept} samples", flush=True)
        code = engine.wait()
    print(f"snakemake ended with {code}", flush=True)
    if code:
        print((home / "snakemake.log").read_text()[-3000:])
        return 1
    wrong = 0
    for folder in folders:
        found = record.read_record(folder)
        lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)[1:]
        times = collections.Counter(record.decode_line(line)["id"] for line in lines)
        started, finished = (found["provenance"][at] for at in ("started", "finished"))
        print(
            f"{folder.relative_to(home / 'runs')}: {len(times)} samples, {times.total() - len(times)} doubled, "
            f"jobs {started['slurm_job']} to {finished['slurm_job']}, GPU {finished['cuda_visible_devices']}, "
            f"resumed {found['cost']['resumed_samples']}"
        )
        wanted = {f"chain-a/{number}/0" for number in range(24)}
        wrong += set(times) != wanted or times.total() != 24 or finished["cuda_visible_devices"] not in ("0", "1")
        if folder == victim:
            wrong += started["slurm_job"] == finished["slurm_job"] or found["cost"]["resumed_samples"] != kept
    print("all samples once, the cancelled cell resumed" if not wrong else f"{wrong} things are wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
