"""The compaction kernels against their reference, in Triton's interpreter."""

import pytest
import torch

from kvlib.kernels.compact import compact
from kvlib.kernels.compact_triton import compact_slots

SLOTS = 41


def tensors_of(L: int, H: int, shared: bool, D: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys and values (the values a strided view), positions, two states; 5 rows."""
    draw = torch.Generator().manual_seed(D)
    slot_map = (1, 5, 1, SLOTS) if shared else (L, 5, H, SLOTS)
    keys = torch.randn(L, 5, H, SLOTS, D, generator=draw).to(dtype)
    values = torch.randn(L, 5, SLOTS, H, D, generator=draw).to(dtype).transpose(2, 3)
    positions = torch.randint(0, 10**6, slot_map, dtype=torch.int32, generator=draw)
    return [keys, values, positions, torch.randn(slot_map, generator=draw), torch.randn(slot_map, generator=draw)]


def kept(shape: tuple[int, ...], n_keep: torch.Tensor) -> torch.Tensor:
    order = torch.rand(shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return order < n_keep[None, :, None, None]


@pytest.mark.parametrize(
    ("shared", "D", "dtype", "n", "n_keep"),
    [
        (False, 5, torch.float32, 37, [5, 20, 36]),
        (False, 8, torch.float16, 33, [33, 1, 17]),
        (True, 4, torch.bfloat16, 41, [40, 21, 20]),
    ],
)
def test_survivors_move_as_in_the_reference_and_nothing_else_does(shared, D, dtype, n, n_keep):
    L, H, rows, n_keep = 2, 3, torch.tensor([4, 0, 2]), torch.tensor(n_keep)
    expected = tensors_of(L, H, shared, D, dtype)
    keep = kept((1, 3, 1, n) if shared else (L, 3, H, n), n_keep)
    for tensor in expected:  # dead slots, rows that take no part
        if tensor.is_floating_point():
            tensor[:, :, :, n:] = torch.nan
            tensor[:, 1] = torch.nan
    found = [tensor.clone(memory_format=torch.preserve_format) for tensor in expected]
    before = [tensor.clone() for tensor in expected]
    compact(expected, rows, keep, n_keep)
    compact_slots(found, rows, keep, n_keep)
    for ours, theirs, old in zip(found, expected, before, strict=True):
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
        assert not torch.equal(ours.nan_to_num(7), old.nan_to_num(7)), "the case moves something"


def test_where_nothing_or_all_of_the_tail_stays():
    rows, n_keep = torch.tensor([3]), torch.tensor([16])
    for survivors in (range(16), range(16, 32)):
        keep = torch.zeros(1, 1, 1, 32, dtype=torch.bool)
        keep[..., list(survivors)] = True
        tensor = torch.arange(SLOTS * 2.0).view(1, 1, 1, SLOTS, 2).repeat(2, 5, 1, 1, 1)
        expected = tensor.clone()
        expected[:, 3, :, :16] = tensor[:, 3, :, list(survivors)]
        compact_slots([tensor], rows, keep, n_keep)
        assert torch.equal(tensor, expected)


def test_ranks_go_on_over_the_tiles_of_a_long_row():
    n, n_keep = 2100, torch.tensor([1050])
    keep = kept((1, 1, 1, n), n_keep)
    expected = torch.arange(float(n)).view(1, 1, 1, n, 1).clone()
    found = expected.clone()
    compact([expected], torch.tensor([0]), keep, n_keep)
    compact_slots([found], torch.tensor([0]), keep, n_keep)
    assert torch.equal(found, expected)
