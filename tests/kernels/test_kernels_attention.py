"""Decode attention, append, norms and activation: the torch references, and what the operators say of their results."""

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from kvlib.kernels.append import append
from kvlib.kernels.attention import decode_attention
from kvlib.kernels.pointwise import add_rms_norm, rms_norm, silu_mul

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def near(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}


@DTYPES
@pytest.mark.parametrize("with_mass", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize("lengths", [(1, 11, 7), (11, 11, 11), (4, 4, 4), (13, 13, 1)], ids=str)
@pytest.mark.parametrize("n_max", [None, 13], ids=["tight", "loose"])
def test_attention_is_softmax_over_the_live_slots(lengths, n_max, with_mass, dtype):
    torch.manual_seed(0)
    B, H, G, N, D = 3, 2, 7, 13, 8
    query = torch.randn(B, H * G, D).to(dtype)
    keys, values = torch.randn(2, 3, B, H, N, D).to(dtype)[:, 1]
    for row, n in enumerate(lengths):
        keys[row, :, n:] = values[row, :, n:] = float("nan")
    before = torch.rand(B, H, N)
    mass = before.clone() if with_mass else None

    out = decode_attention(query, keys, values, torch.tensor(lengths), 0.3, n_max or max(lengths), mass)

    assert out.dtype == dtype and out.shape == query.shape
    for row, n in enumerate(lengths):
        grouped = query[row].double().view(H, G, D)
        p = (0.3 * grouped @ keys[row, :, :n].double().mT).softmax(-1)
        torch.testing.assert_close(out[row].view(H, G, D).double(), p @ values[row, :, :n].double(), **near(dtype))
        if with_mass:
            added = mass[row] - before[row]
            close = {"rtol": 0, "atol": max(G * TOLERANCE[dtype], 2e-6)}
            torch.testing.assert_close(added[:, :n].double(), p.sum(1), **close)
            assert torch.equal(mass[row, :, n:], before[row, :, n:])


@DTYPES
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_append_equals_transformers(norm, dtype):
    torch.manual_seed(1)
    B, HQ, H, D, N, W = 3, 4, 2, 8, 6, 5
    qkv = torch.randn(B, (HQ + 2 * H) * D).to(dtype)
    angles = 6 * torch.rand(B, D // 2)
    cos, sin = (torch.cat((x, x), -1).to(dtype) for x in (angles.cos(), angles.sin()))
    slots, positions = torch.tensor([5, 0, 2]), torch.tensor([12, 3, 104])
    keys, values = torch.randn(2, 2, B, H, N, D).to(dtype)
    ring = torch.randn(B, HQ, W, D).to(dtype)
    expected_keys, expected_values, expected_ring = keys.clone(), values.clone(), ring.clone()
    norms = [torch.randn(D).to(dtype) for _ in range(2)] if norm else [None, None]

    options = {"q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6, "ring": ring}
    query = append(qkv, cos, sin, keys[1], values[1], slots, positions, n_query_heads=HQ, **options)

    q, k, v = (x.unflatten(-1, (-1, D)) for x in qkv.split((HQ * D, H * D, H * D), -1))
    q, k = (x if weight is None else qwen2_norm(weight, x) for weight, x in zip(norms, (q, k), strict=True))
    q, k = (x[:, :, 0] for x in apply_rotary_pos_emb(q[:, :, None], k[:, :, None], cos[:, None], sin[:, None]))
    for row in range(B):
        expected_keys[1, row, :, slots[row]] = k[row]
        expected_values[1, row, :, slots[row]] = v[row]
        expected_ring[row, :, positions[row] % W] = q[row]
    close = {"rtol": 2 * TOLERANCE[dtype], "atol": 2 * TOLERANCE[dtype]} if norm else {"rtol": 0, "atol": 0}
    if norm and dtype == torch.float64:
        close = {"rtol": 1e-6, "atol": 1e-6}  # transformers' norm is float32
    torch.testing.assert_close(query, q, **close)
    torch.testing.assert_close(keys, expected_keys, **close)
    torch.testing.assert_close(ring, expected_ring, **close)
    assert torch.equal(values, expected_values)


def test_append_without_a_ring_and_with_float32_angles():
    torch.manual_seed(2)
    qkv = torch.randn(2, 4 * 8).bfloat16()
    keys, values = torch.zeros(2, 2, 1, 3, 8).bfloat16()
    angle = torch.rand(2, 8)
    slots = torch.tensor([2, 0])
    query = append(qkv, angle.cos(), angle.sin(), keys, values, slots, slots, n_query_heads=2)
    assert query.dtype == torch.bfloat16 and keys[0, 0, 2].any() and not keys[0, 0, :2].any()


def qwen2_norm(weight: Tensor, x: Tensor) -> Tensor:
    norm = Qwen2RMSNorm(weight.shape[0], eps=1e-6)
    norm.weight.data = weight
    return norm(x).detach()


@DTYPES
def test_norms_equal_transformers(dtype):
    torch.manual_seed(3)
    x, residual = 5 * torch.randn(2, 3, 40).to(dtype)
    weight = torch.randn(40).to(dtype)
    close = near(torch.float32 if dtype == torch.float64 else dtype)  # transformers' norm is float32
    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(normed, qwen2_norm(weight, x + residual), **close)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), qwen2_norm(weight, x), **close)


def test_norms_keep_float64():
    x, weight = torch.randn(2, 16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    assert (rms_norm(x, weight, 0.0).square().mean(-1) - 1).abs().max() < 1e-14


@DTYPES
def test_silu_mul_is_the_gated_activation(dtype):
    torch.manual_seed(4)
    gate_up = torch.randn(3, 2 * 5).to(dtype)
    before = gate_up.clone()
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(silu_mul(gate_up).double(), gate * gate.sigmoid() * up, **near(dtype))
    assert torch.equal(gate_up, before)


def block(qkv, cos, sin, keys, values, slots, lengths, mass, ring, weight, gate_up) -> tuple[Tensor, ...]:
    """Every operator once, as a decoder layer calls them."""
    query = append(qkv, cos, sin, keys, values, slots, slots, n_query_heads=4, q_norm=cos[0], k_norm=cos[0], ring=ring)
    plain = append(qkv, cos, sin, keys, values, slots, slots, n_query_heads=4)
    out = decode_attention(query, keys, values, lengths, 0.25, 5, mass)
    out = out + decode_attention(plain, keys, values, lengths, 0.25, 5)
    normed, summed = add_rms_norm(out.flatten(1), out.flatten(1), weight, 1e-6)
    return out, normed, summed, rms_norm(summed, weight, 1e-6), silu_mul(gate_up)


def block_inputs(device: str) -> tuple[Tensor, ...]:
    half = {"device": device, "dtype": torch.bfloat16}
    B, HQ, H, D, N = 3, 4, 2, 16, 5
    keys, values = torch.zeros(2, B, H, N, D, **half)
    slots = torch.zeros(B, dtype=torch.int64, device=device)
    mass, ring = torch.zeros(B, H, N, device=device), torch.zeros(B, HQ, 2, D, **half)
    cos, sin, weight = torch.zeros(B, D, **half), torch.zeros(B, D, **half), torch.zeros(HQ * D, **half)
    qkv, gate_up = torch.zeros(B, (HQ + 2 * H) * D, **half), torch.zeros(B, 2 * 11, **half)
    return qkv, cos, sin, keys, values, slots, slots + 1, mass, ring, weight, gate_up


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_operators_without_data_have_the_references_shapes(compiled):
    """On the meta device, as they are and traced as one graph without breaks."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    expected = block(*block_inputs("cpu"))
    run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    for found, reference in zip(run(*block_inputs("meta")), expected, strict=True):
        assert (found.shape, found.dtype, found.stride()) == (reference.shape, reference.dtype, reference.stride())
        assert found.device.type == "meta"
