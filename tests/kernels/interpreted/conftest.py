"""Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process that starts with it.

tests/kernels/test_kernels.py starts one.
"""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory is NaN (integers: the largest), so that what a kernel reads or leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert all(x.isnan().all() for x in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(3)))
    yield
    torch.use_deterministic_algorithms(False)
