"""Decode attention, append, norms and activation: the Triton kernels in the interpreter against float64."""

import pytest
import torch
from torch import Tensor

from kvlib.kernels import append as torch_append
from kvlib.kernels import attention_triton, pointwise
from kvlib.kernels.append_triton import append
from kvlib.kernels.attention_triton import BLOCK, decode_attention, n_splits
from kvlib.kernels.gated_triton import MOST_ROWS, fits, gated
from kvlib.kernels.pointwise_triton import add_rms_norm, rms_norm, silu_mul

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def exact(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Output `[B, HQ, D]` and mass `[B, H, N]` in float64, one row at a time, dead slots never read."""
    (B, HQ, D), (H, N) = query.shape, keys.shape[1:3]
    out, mass = torch.zeros(B, HQ, D, dtype=torch.float64), torch.zeros(B, H, N, dtype=torch.float64)
    for row, n in enumerate(lengths.tolist()):
        grouped = query[row].double().view(H, HQ // H, D)
        p = (grouped @ keys[row, :, :n].double().mT * scaling).softmax(-1)
        out[row] = (p @ values[row, :, :n].double()).reshape(HQ, D)
        mass[row, :, :n] = p.sum(1)
    return out, mass


def cache(B: int, H: int, N: int, D: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Layer 1 of a cache of three, NaN everywhere but in its live slots; slots are two vectors apart."""
    whole = torch.full((3, B, H, N, 2 * D), float("nan"), dtype=dtype)
    live = torch.arange(N) < lengths[:, None]
    layer = whole[1, ..., :D]
    layer[live[:, None].expand(B, H, N)] = torch.randn(int(live.sum()) * H, D).to(dtype)
    return layer


@DTYPES
@pytest.mark.parametrize("with_mass", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize(
    ("H", "G", "D", "N", "lengths", "splits"),
    [
        (1, 7, 128, 2 * BLOCK + 2, (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 2), 2),
        (2, 3, 64, 4 * BLOCK + 1, (1, 4 * BLOCK + 1, 2 * BLOCK), 4),
        (3, 1, 64, BLOCK - 3, (BLOCK - 3, 5), 1),
        (1, 17, 32, 9, (9, 1), 1),
    ],
)
def test_attention_is_softmax_over_the_live_slots(H, G, D, N, lengths, splits, with_mass, dtype):
    torch.manual_seed(0)
    lengths, B, scaling = torch.tensor(lengths), len(lengths), D**-0.5
    assert n_splits(B, H, N) == splits
    query = 3 * torch.randn(B, H * G, D).to(dtype)
    keys, values = cache(B, H, N, D, lengths, dtype), cache(B, H, N, D, lengths, dtype)
    before = torch.rand(2, B, H, N)
    mass = before.clone()[1] if with_mass else None

    out = decode_attention(query, keys, values, lengths, scaling, mass)

    expected, received = exact(query, keys, values, lengths, scaling)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if with_mass:
        added = mass.double() - before[1].double()
        torch.testing.assert_close(added, received, rtol=0, atol=3e-6)
        torch.testing.assert_close(added.sum(-1), torch.full((B, H), float(G), dtype=torch.float64), rtol=0, atol=1e-4)
        dead = torch.arange(N) >= lengths[:, None, None]
        assert torch.equal(mass[dead.expand_as(mass)], before[1][dead.expand_as(mass)])


def test_more_slots_than_one_program_of_mass_takes():
    torch.manual_seed(1)
    N = attention_triton.MASS_BLOCK + 9
    lengths = torch.tensor([N])
    query, keys = torch.randn(1, 2, 16), cache(1, 1, N, 16, lengths, torch.float32)
    mass = torch.zeros(1, 1, N)
    out = decode_attention(query, keys, keys, lengths, 0.5, mass)
    expected, received = exact(query, keys, keys, lengths, 0.5)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(mass.double(), received, rtol=0, atol=3e-6)


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    torch.manual_seed(2)
    N, D = 2 * BLOCK + 1, 16
    lengths = torch.tensor([N, N])
    keys = torch.randn(2, 1, N, D)
    query = torch.stack((keys[0, 0, 3], -keys[1, 0, 61]))[:, None] * 300
    out = decode_attention(query, keys, keys, lengths, 1.0, None)
    torch.testing.assert_close(out.double(), exact(query, keys, keys, lengths, 1.0)[0], rtol=1e-5, atol=1e-5)


def test_splits_depend_on_shapes_alone_and_fill_a_card():
    assert [n_splits(B, 4, 2628) for B in (1, 20, 64, 128, 256)] == [64, 4, 1, 1, 1]
    assert n_splits(1, 1, 10**6) == attention_triton.MAX_SPLITS and n_splits(1, 1, 1) == 1


def test_what_the_kernel_cannot_take_is_named():
    query, keys, lengths = torch.randn(1, 2, 24), torch.randn(1, 1, 4, 24), torch.tensor([4])
    with pytest.raises(AssertionError, match="head_dim 24"):
        decode_attention(query, keys, keys, lengths, 1.0, None)
    query, keys = torch.randn(1, 2, 16), torch.randn(1, 1, 16, 4).mT
    with pytest.raises(AssertionError, match="last axis"):
        decode_attention(query, keys, keys, lengths, 1.0, None)


@DTYPES
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("HQ", "H", "D", "W"), [(7, 1, 128, 3), (6, 2, 64, 0)])
def test_append_rotates_and_writes_only_its_slot(HQ, H, D, W, norm, dtype):
    torch.manual_seed(3)
    B, N = 3, 5
    qkv = torch.randn(B, (HQ + 2 * H) * D).to(dtype)
    angles = torch.rand(B, D // 2) * 6
    cos, sin = (torch.cat((x, x), -1).to(dtype) for x in (angles.cos(), angles.sin()))
    slots, positions = torch.tensor([4, 0, 2]), torch.tensor([100, 7, 2])
    weights = {"q_norm": torch.randn(D).to(dtype), "k_norm": torch.randn(D).to(dtype)}
    options = {**(weights if norm else dict.fromkeys(weights)), "eps": 1e-6}
    stores = [torch.randn(2, *shape, D).to(dtype) for shape in ((B, H, N), (B, H, N), (B, HQ, W))]
    written = [store.clone() for store in stores]
    layers = [store[1] for store in written]

    query = append(qkv, cos, sin, *layers[:2], slots, positions, HQ, **options, ring=layers[2] if W else None)

    double = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    layers = [store[1].double() for store in stores]
    double |= {"n_query_heads": HQ, "ring": layers[2] if W else None}
    expected = torch_append.append(qkv.double(), cos.double(), sin.double(), *layers[:2], slots, positions, **double)
    close = {"rtol": 3 * TOLERANCE[dtype], "atol": 3 * TOLERANCE[dtype]}
    torch.testing.assert_close(query.double(), expected, **close)
    for store, layer, old in zip(written, layers, stores, strict=True):
        torch.testing.assert_close(store[1].double(), layer, **close)
        assert torch.equal(store[0], old[0])
    assert torch.equal(written[1][1, 1, :, 0], qkv.view(B, -1, D)[1, HQ + H :])
    untouched = torch.arange(N) != slots[:, None]
    for store, old in zip(written[:2], stores[:2], strict=True):
        assert torch.equal(store[1].transpose(1, 2)[untouched], old[1].transpose(1, 2)[untouched])


@DTYPES
@pytest.mark.parametrize("n", [1, 96, 257])
def test_norms(n, dtype):
    torch.manual_seed(4)
    x, residual, weight = (torch.randn(3, n).to(dtype) for _ in range(3))
    weight = weight[0]
    close = {"rtol": 2 * TOLERANCE[dtype], "atol": 2 * TOLERANCE[dtype]}
    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(normed.double(), pointwise.rms_norm(summed.double(), weight.double(), 1e-6), **close)
    expected = pointwise.rms_norm(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), expected, **close)
    assert rms_norm(torch.zeros(1, n, dtype=dtype), weight, 1e-6).eq(0).all()


@DTYPES
@pytest.mark.parametrize("n", [3, 1025])
def test_silu_mul(n, dtype):
    torch.manual_seed(5)
    gate_up = torch.randn(2, 2 * n).to(dtype) * 4
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate * gate.sigmoid() * up
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(silu_mul(gate_up).double(), expected, **close)


@pytest.mark.parametrize("n_rows", [1, 20, MOST_ROWS])
def test_gated_is_both_products_and_the_activation(n_rows):
    torch.manual_seed(7)
    x, weight = torch.randn(n_rows, 256).half(), torch.randn(2 * 64, 256).half() / 16
    gate, up = (x.double() @ weight.double().mT).chunk(2, -1)
    torch.testing.assert_close(gated(x, weight).double(), gate * gate.sigmoid() * up, rtol=4e-3, atol=4e-3)


def test_gated_refuses_what_it_would_read_beyond():
    """Whole tiles of few rows: what does not fit goes the plain way."""
    x, weight = torch.zeros(2, 256), torch.zeros(128, 256)
    assert fits(x, weight) and not fits(torch.zeros(MOST_ROWS + 1, 256), weight)
    assert not fits(torch.zeros(2, 192), torch.zeros(128, 192)) and not fits(x, torch.zeros(96, 256))
    with pytest.raises(AssertionError):
        gated(torch.zeros(2, 192, dtype=torch.half), torch.zeros(128, 192, dtype=torch.half))


def test_bfloat16_is_within_a_rounding_of_float64():
    """The interpreter truncates where a card rounds: one unit in the last place is 2^-7."""
    torch.manual_seed(6)
    lengths = torch.tensor([70])
    query = torch.randn(1, 7, 128).bfloat16()
    keys, values = (cache(1, 1, 72, 128, lengths, torch.bfloat16) for _ in range(2))
    out = decode_attention(query, keys, values, lengths, 128**-0.5, None)
    expected, _ = exact(query, keys, values, lengths, 128**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=1e-4)
    x, weight = torch.randn(2, 96).bfloat16(), torch.randn(96).bfloat16()
    expected = pointwise.rms_norm(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), expected, rtol=2**-6, atol=1e-4)
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(silu_mul(x).double(), gate * gate.sigmoid() * up, rtol=2**-6, atol=1e-4)
