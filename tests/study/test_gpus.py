"""However many cells start on a machine with several GPUs, no two hold the same one, and a killed one frees it."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest
from test_cell_command import alive, command, environment, wait_until

from kvlib import record
from kvlib.errors import ConfigError
from kvlib.study import gpus as lease

SIXTEEN = """
import os, sys, time
from pathlib import Path
from kvlib.study.gpus import leased_gpu

folder, journal = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
children = []
for number in range(16):
    if not (child := os.fork()):
        for _ in range(4):
            with leased_gpu(folder) as (gpu, _):
                os.write(journal, f"{os.getpid()} takes {gpu['CUDA_VISIBLE_DEVICES']}\\n".encode())
                time.sleep(0.02)
                if number % 4 == 3:
                    os.kill(os.getpid(), 9)
                os.write(journal, f"{os.getpid()} leaves {gpu['CUDA_VISIBLE_DEVICES']}\\n".encode())
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""
HOLDER = """
import subprocess, sys
from pathlib import Path
from kvlib.study.gpus import leased_gpu

with leased_gpu(Path(sys.argv[1])) as (gpu, descriptors):
    child = subprocess.Popen(["sleep", "60"], pass_fds=descriptors, stdout=subprocess.DEVNULL)
    print(gpu["CUDA_VISIBLE_DEVICES"], child.pid, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A fake nvidia-smi that lists three GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    names = ["GPU-fake-aa1", "GPU-fake-ab2", "GPU-fake-c3"]
    table = [f"echo {index}, {name}, NVIDIA, 24000, 23000\n" for index, name in enumerate(names)]
    program.write_text("#!/bin/sh\n" + "".join(table))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return names


def test_sixteen_processes_never_share_one_of_three_gpus(tmp_path, gpus):
    journal = tmp_path / "journal"
    subprocess.run([sys.executable, "-c", SIXTEEN, tmp_path / "locks", journal], env=environment(), check=True)
    holders, taken = {}, 0
    killed = set()
    lines = [line.split() for line in journal.read_text().splitlines()]
    left = {pid for pid, what, _ in lines if what == "leaves"}
    for pid, what, gpu in lines:
        if what == "takes":
            assert holders.get(gpu) in (None, *killed), f"{gpu} is leased twice"
            holders[gpu], taken = pid, taken + 1
            killed |= {pid} - left
        else:
            assert holders.pop(gpu) == pid
    assert taken == 12 * 4 + 4 and len(killed) == 4 and {gpu for *_, gpu in lines} == set(gpus)


def held(path) -> bool:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_gpu_stays_leased_until_holder_and_child_are_gone(tmp_path, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def free() -> set[str]:
        return {gpu for gpu in gpus[:2] if not held(tmp_path / "locks" / gpu)}

    words = [sys.executable, "-c", HOLDER, tmp_path / "locks"]
    holder = subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    gpu, child = holder.stdout.readline().split()
    assert free() == set(gpus[:2]) - {gpu}
    holder.kill()
    holder.communicate()
    assert alive(child) and free() == set(gpus[:2]) - {gpu}
    os.kill(int(child), signal.SIGKILL)
    wait_until(lambda: free() == set(gpus[:2]), 5)


@pytest.mark.parametrize(
    ("named", "visible"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("1, 0,1", [1, 0]),
        ("GPU-fake-c", [2]),
        ("0,-1,1", [0]),
    ],
)
def test_what_the_user_or_slurm_named_is_what_may_be_leased(gpus, monkeypatch, named, visible):
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [gpu.uuid for gpu in lease.visible_gpus()] == [gpus[i] for i in visible]


def test_unknown_names_are_taken_as_they_are(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-5/1/0,GPU-fake-a,7")
    found = [gpu.uuid for gpu in lease.visible_gpus()]
    assert found == ["MIG-GPU-5/1/0", "GPU-fake-a", "7"]  # GPU-fake-a is two


def test_nothing_is_leased_where_there_is_nothing_to_choose(tmp_path, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with lease.leased_gpu(tmp_path / "locks") as held:
        assert held == ({}, ()) and not (tmp_path / "locks").exists()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with lease.leased_gpu(tmp_path / "locks") as held:
        assert held == ({}, ())


def test_a_folder_of_somebody_else_is_refused(tmp_path, gpus):
    (tmp_path / "mine").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="belongs to somebody else"), lease.leased_gpu(tmp_path / "locks"):
        pass


def test_a_cell_on_cuda_sees_its_leased_gpu_alone(tmp_path, gpus):
    words = command(tmp_path / "cell", device="cuda")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert record.read_record(tmp_path / "cell")["provenance"]["finished"]["cuda_visible_devices"] in gpus
