"""What stands in the way is said before anything starts: all of it, each with the next step."""

import shutil
from types import SimpleNamespace

import pytest

from kvlib.errors import ConfigError
from kvlib.record import RecordError, locked
from kvlib.study import gpus, preflight
from kvlib.study.gpus import GPU, visible_gpus
from kvlib.study.preflight import (  # fmt: skip
    check_disk,
    check_gpus,
    check_locks,
    check_toolchain,
    find_faults,
    other_process_gets,
)

SMALL, LARGE = GPU("0", "GPU-a", "A", 24.0, 20.0), GPU("1", "GPU-b", "B", 80.0, 79.0)


def refuse(message: str, kind=ConfigError):
    raise kind(message)


def test_all_faults_are_found_and_each_is_said_once():
    checks = [
        lambda: refuse("no model\nno data"),
        lambda: None,
        lambda: refuse("no data"),
        lambda: refuse("no locks", RecordError),
    ]
    assert find_faults(checks) == ["no model", "no data", "no locks"]


def test_a_full_disk(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needed"):
        check_disk(tmp_path, 1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4e9))
    check_disk(tmp_path / "not" / "yet", 3.9)
    with pytest.raises(ConfigError, match=r"disk of .* has 4.0 GB free and about 5.0 GB are needed: free some"):
        check_disk(tmp_path / "not" / "yet", 5)


def test_too_few_or_too_small_gpus():
    check_gpus(2, 20, [SMALL, LARGE])
    check_gpus(1, 30, [SMALL, LARGE])
    check_gpus(9, 9, None)
    with pytest.raises(ConfigError, match="4 GPUs are asked for and 2 can be seen: use GPUS=2"):
        check_gpus(4, None, [SMALL, LARGE])
    with pytest.raises(ConfigError, match=r"needs about 30.0 GB .* GPU 0 \(A\) 20.0 of 24.0 GB: stop what else runs"):
        check_gpus(2, 30, [SMALL, LARGE])


def test_no_gpu_at_all_says_what_hides_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES='-1' hides all GPUs: unset it"):
        check_gpus(1, None, [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match="nvidia-smi lists no GPU"):
        check_gpus(1, None, [])


@pytest.fixture
def two_gpus(monkeypatch):
    table = "0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, 81000\n1, GPU-bb22, NVIDIA H100 80GB HBM3, 81559, 10\n"
    monkeypatch.setattr(gpus, "nvidia_smi", lambda *fields: [line.split(", ") for line in table.splitlines()])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_of_unknown_memory_will_do(two_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c")  # a slice, which nvidia-smi does not list
    assert [gpu.index for gpu in visible_gpus()] == ["MIG-5c"]
    check_gpus(1, 70, visible_gpus())
    monkeypatch.setattr(gpus, "nvidia_smi", lambda *fields: [["0", "GPU-aa11", "NVIDIA GB10", "[N/A]", "[N/A]"]])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    check_gpus(1, 70, visible_gpus())
    monkeypatch.setattr(gpus, "nvidia_smi", lambda *fields: None)
    assert visible_gpus() is None


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, "01"), ("1", "1"), ("GPU-aa", "0"), ("1,0", "10"), ("", ""), ("-1", "")]
)
def test_gpus_are_those_that_the_environment_leaves(two_gpus, monkeypatch, visible, seen):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = visible_gpus()
    assert "".join(gpu.index for gpu in found) == seen
    assert all(gpu.total_gb == pytest.approx(85.5, abs=0.1) for gpu in found)


def test_locks_are_tried_by_two_processes(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with locked(path):
        assert not other_process_gets(path)
    assert other_process_gets(path)
    path.unlink()
    check_locks(tmp_path / "runs" / "tiny")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(preflight, "other_process_gets", lambda path: True)
    with pytest.raises(ConfigError, match=r"file locks do not hold in .*two processes got the same one"):
        check_locks(tmp_path)


def test_what_tritons_first_launch_needs_is_said_before_it(tmp_path, monkeypatch):
    for name in ("CC", "TRITON_LIBCUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    header, ldconfig, gcc = (tmp_path / name for name in ("Python.h", "ldconfig", "gcc"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as said:
        check_toolchain(header, ldconfig)
    lines = str(said.value).splitlines()
    assert [words in line for words, line in zip(("gcc nor clang", "Python.h", "libcuda"), lines, strict=True)]
    assert all("install" in line for line in lines), "each with the next step"
    for made in (header, ldconfig, gcc):
        made.touch(mode=0o755)
    check_toolchain(header, ldconfig)
    monkeypatch.setenv("CC", "icx")
    with pytest.raises(ConfigError, match="CC names icx, which is not there"):
        check_toolchain(header, ldconfig)
    monkeypatch.delenv("CC")
    ldconfig.unlink()
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    check_toolchain(header, ldconfig)
