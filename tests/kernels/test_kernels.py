"""The Triton kernels without a GPU: their results in Triton's interpreter, what they take of a card, their fakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

import kvlib.kernels

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
HERE = Path(__file__).parent


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="the interpreter of Triton 3.6 cannot take a loop's bounds from numpy 2.4",
)
def test_every_kernel_equals_its_reference_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--confcutdir=interpreted", "interpreted"]  # without tests/conftest.py, which imports transformers
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_nothing_leaves_the_registers(arch):
    from kvlib.kernels.resources import resources

    rows = resources(arch)
    source = "".join(path.read_text() for path in Path(kvlib.kernels.__file__).parent.glob("*_triton.py"))
    assert {row["kernel"].split()[0] for row in rows} == set(re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE))
    assert {row["kernel"]: row["spills"] for row in rows if row["spills"]} == {}
    # Two programs of any kernel fit a multiprocessor: 164 KiB of shared memory on sm_80, 64 Ki registers.
    assert {row["kernel"] for row in rows if 2 * row["shared_bytes"] > 164 * 1024} == set()
    assert {row["kernel"] for row in rows if 2 * 32 * row["warps"] * row["registers"] > 2**16} == set()
