"""Launches stay within a grid's axes, of which only the first takes more than 65,535 programs."""

import pytest
import torch

from kvlib.kernels import redundancy_triton, sampler_triton


class Launched(Exception):
    pass


class Grid:
    """Stands in for a kernel: raises the grid that it is launched with."""

    def __getitem__(self, grid):
        raise Launched(grid)


def test_the_redundancy_of_more_heads_than_an_axis_takes(monkeypatch):
    """R1-Llama: 32 layers x 256 rows x 8 heads."""
    heads = 32 * 256 * 8
    assert heads > 65_535
    monkeypatch.setattr(redundancy_triton, "spare_kernel", Grid())
    monkeypatch.setattr(redundancy_triton, "total_kernel", {(heads,): lambda *_, **__: None})
    with pytest.raises(Launched) as launched:
        redundancy_triton.mean_cosine_by_tiles._init_fn(torch.zeros(1, 1, 1, 1).expand(32, 256, 8, 1, 1), 0.5)
    grid = launched.value.args[0]
    assert grid[0] == heads and all(extent <= 65_535 for extent in grid[1:])


def test_one_rows_slice_is_copied_to_an_aligned_address():
    rows = torch.arange(8)
    assert rows.data_ptr() % 16 == 0
    for row in range(8):
        found = sampler_triton.aligned(rows[row, None])
        assert found.data_ptr() % 16 == 0 and found.item() == row
    assert sampler_triton.aligned(rows) is rows, "no copy where none is needed"
