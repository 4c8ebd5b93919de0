"""The redundancy kernels against their reference, in Triton's interpreter."""

import pytest
import torch

from kvlib.kernels.redundancy import mean_cosine
from kvlib.kernels.redundancy_triton import mean_cosine_by_tiles

CASES = [
    ((2, 1, 70, 24), torch.float32, 0.5),
    ((1, 75, 16), torch.float16, 0.3),
    ((2, 33, 8), torch.bfloat16, 0.9),
    ((1, 64, 8), torch.float32, None),
    ((3, 22, 8), torch.float32, 2.0),
    ((1, 22, 8), torch.float32, -0.1),  # more similar than the threshold: the diagonal, and what pads a tile
]


@pytest.mark.parametrize(("shape", "dtype", "threshold"), CASES)
def test_equal_to_the_reference_with_duplicates_in_other_tiles(shape, dtype, threshold):
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    keys[..., [5, 20, -2], :] = 1.5 * keys[..., 3:4, :]
    keys[..., 8:12, :] = keys[..., -1:, :]
    expected = mean_cosine(keys.float(), threshold)
    torch.testing.assert_close(mean_cosine_by_tiles(keys, threshold), expected, rtol=1e-5, atol=1e-6)
    strided = torch.stack([keys, torch.full_like(keys, torch.nan)], -1)[..., 0]
    torch.testing.assert_close(mean_cosine_by_tiles(strided, threshold), expected, rtol=1e-5, atol=1e-6)
