"""Every kernel against float64 on the device at hand: random inputs, ragged lengths, dead slots NaN.

On a CPU the torch references are what runs, which checks the checks; `make bench-gpu` runs these first.
"""

import math

import pytest
import torch
from torch import Tensor

from kvlib.kernels.append import append
from kvlib.kernels.attention import decode_attention
from kvlib.kernels.compact import compact
from kvlib.kernels.gated import gated
from kvlib.kernels.pointwise import add_rms_norm, rms_norm, silu_mul
from kvlib.kernels.redundancy import redundancy
from kvlib.kernels.sampler import sample

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Most that a kernel's output may differ from float64, as a share of its norm: two roundings of the type."""
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"))


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    torch.manual_seed(0)
    with torch.inference_mode():
        yield request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def dtype(request):
    return request.param


def apart(found: Tensor, wanted: Tensor) -> float:
    """Distance as a share of the wanted one's norm; infinite if anything is not finite."""
    distance = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return distance.item() if found.isfinite().all() else math.inf


def attention64(query: Tensor, keys: Tensor, values: Tensor, lengths: list[int], scaling: float):
    """Output and mass of every row over its live slots alone."""
    B, HQ, D = query.shape
    H, N = keys.shape[1:3]
    out, mass = torch.zeros_like(query, dtype=torch.float64), torch.zeros(B, H, N, dtype=torch.float64)
    mass = mass.to(query.device)
    for row, n in enumerate(lengths):
        q = query[row].double().view(H, HQ // H, D)
        p = (q @ keys[row, :, :n].double().mT * scaling).softmax(-1)
        out[row] = (p @ values[row, :, :n].double()).view(HQ, D)
        mass[row, :, :n] = p.sum(1)
    return out, mass


@pytest.mark.parametrize("with_mass", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize(("H", "G", "D"), [(4, 7, 128), (8, 4, 128), (3, 3, 64)])
def test_attention(device, dtype, H, G, D, with_mass):
    N, lengths = 700, [1, 63, 64, 65, 129, 511, 699, 700]
    B = len(lengths)
    query = torch.randn(B, H * G, D, device=device).to(dtype)
    # A view of a larger cache, as in the decoder.
    keys, values = (torch.randn(2, B, H, N, D, device=device).to(dtype)[1] for _ in range(2))
    for row, n in enumerate(lengths):
        keys[row, :, n:], values[row, :, n:] = torch.nan, torch.nan
    mass = torch.rand(B, H, N, device=device) if with_mass else None
    before = mass.clone() if with_mass else None
    found = decode_attention(query, keys, values, torch.tensor(lengths, device=device), D**-0.5, N, mass)
    out, wanted_mass = attention64(query, keys, values, lengths, D**-0.5)
    assert apart(found, out) <= TOLERANCE[dtype]
    if with_mass:
        assert apart(mass, before + wanted_mass) <= TOLERANCE[dtype]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "head norm"])
def test_append_with_a_ring(device, dtype, norm):
    B, HQ, H, D, N, W = 5, 28, 4, 128, 40, 8
    qkv = torch.randn(B, (HQ + 2 * H) * D, device=device).to(dtype)
    angle = torch.rand(B, D // 2, device=device).repeat(1, 2) * 6.28
    keys, values = (torch.full((B, H, N, D), torch.nan, dtype=dtype, device=device) for _ in range(2))
    ring = torch.full((B, HQ, W, D), torch.nan, dtype=dtype, device=device)
    slots, positions = torch.arange(B, device=device) * 7, torch.arange(B, device=device) * 1001
    norms = [torch.rand(D, device=device).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    options = {"n_query_heads": HQ, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6, "ring": ring}
    found = append(qkv, angle.cos().to(dtype), angle.sin().to(dtype), keys, values, slots, positions, **options)
    heads = qkv.double().view(B, -1, D)
    query, key = heads[:, :HQ], heads[:, HQ : HQ + H]
    if norm:
        query, key = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
            for x, w in zip((query, key), norms, strict=True)
        )
    cos, sin = (x.to(dtype).double()[:, None] for x in (angle.cos(), angle.sin()))
    query, key = (x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin for x in (query, key))
    rows = torch.arange(B, device=device)
    written = keys[rows, :, slots], values[rows, :, slots], ring[rows, :, positions % W]
    assert int(keys.isnan().sum()) == B * H * (N - 1) * D and int(ring.isnan().sum()) == B * HQ * (W - 1) * D
    pairs = [(found, query), (written[0], key), (written[1], heads[:, HQ + H :]), (written[2], query)]
    assert max(apart(*pair) for pair in pairs) <= TOLERANCE[dtype]


def test_norms_and_activation(device, dtype):
    x, residual = (torch.randn(5, 3584, device=device).to(dtype) for _ in range(2))
    weight, gate_up = (
        torch.rand(3584, device=device).to(dtype) + 0.5,
        torch.randn(5, 2 * 18944, device=device).to(dtype),
    )

    def norm64(y: Tensor) -> Tensor:
        return y.double() * (y.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    gate, up = gate_up.double().chunk(2, -1)
    errors = (
        apart(rms_norm(x, weight, 1e-6), norm64(x)),
        apart(summed, x.double() + residual.double()),
        apart(normed, norm64(x + residual)),
        apart(silu_mul(gate_up), gate * gate.sigmoid() * up),
    )
    assert max(errors) <= TOLERANCE[dtype]


@pytest.mark.parametrize("n_rows", [1, 5, 20, 32, 33, 128])
def test_gated_products(device, dtype, n_rows):
    x = torch.randn(n_rows, 3584, device=device).to(dtype)
    weight = (torch.randn(2 * 512, 3584, device=device) / 60).to(dtype)
    gate, up = (x.double() @ weight.double().mT).chunk(2, -1)
    assert apart(gated(x, weight), gate * gate.sigmoid() * up) <= TOLERANCE[dtype]


def test_redundancy(device, dtype):
    """Keys in clusters, so that the threshold is passed by some and missed by others, never closely."""
    N, centres = 300, torch.randn(2, 3, 20, 64, device=device)
    keys = centres[:, :, torch.arange(N, device=device) % 20] + 0.1 * torch.randn(2, 3, N, 64, device=device)
    keys = keys.to(dtype)

    def centred(x: Tensor) -> Tensor:
        """The similarities before the softmax, which hardly differ after it."""
        logs = x.double().cpu().log()
        return logs - logs.mean(-1, keepdim=True)

    found, wanted = redundancy(keys, 0.7), redundancy(keys.double().cpu(), 0.7)
    assert apart(centred(found), centred(wanted)) <= TOLERANCE[dtype]


def test_sampler(device, dtype):
    """One draw in a hundred may be a tie in float32 and differ from float64's."""
    B, V = 64, 2000  # 32 blocks, of which top-20 looks at 20
    # No two logits of a row are equal: which of equals wins is anyone's choice.
    values = (3 * torch.randn(100_000)).to(dtype).unique()
    assert len(values) >= V
    logits = values[torch.rand(B, len(values)).argsort(-1)[:, :V]].to(device)
    request, step = torch.arange(B, device=device) * 7919, torch.arange(B, device=device)
    wrong = 0
    for settings in ((0.0, 1.0, 0), (0.6, 0.95, 20), (1.0, 1.0, 0)):
        found = sample(logits, request, step, *settings).cpu()
        wrong += int((found != sample(logits.double().cpu(), request.cpu(), step.cpu(), *settings)).sum())
    assert wrong <= 0.01 * 3 * B


def test_compaction(device, dtype):
    """No kept slot is lost and no row that is not due changes, in keys and in positions."""
    L, B, H, N, n, D = 3, 4, 4, 90, 81, 128
    rows, n_keep = torch.tensor([3, 1], device=device), torch.tensor([60, 17], device=device)
    keys = torch.randn(L, B, H, N, D, device=device).to(dtype)
    positions = torch.randperm(N, device=device).to(torch.int32).expand(L, B, H, N).contiguous()
    order = torch.rand(L, 2, H, n, device=device).argsort(-1)
    keep = order < n_keep.view(1, 2, 1, 1)
    old_keys, old_positions = keys.clone(), positions.clone()
    compact((keys, positions), rows, keep, n_keep)
    wrong = int((keys[:, [0, 2]] != old_keys[:, [0, 2]]).sum())
    for layer in range(L):
        for i, row in enumerate(rows.tolist()):
            for head in range(H):
                kept = keep[layer, i, head].nonzero()[:, 0]
                want = old_positions[layer, row, head, kept].argsort()
                have = positions[layer, row, head, : int(n_keep[i])].argsort()
                was, now = old_keys[layer, row, head, kept][want], keys[layer, row, head][have]
                wrong += int((was != now).sum())
    assert wrong == 0


@pytest.mark.parametrize("wrong_by", [1, -1])
def test_attention_over_one_slot_too_few_or_too_many_is_found(wrong_by):
    """Of the checks themselves: a kernel that leaks is not within the tolerance."""
    torch.manual_seed(0)
    query, keys = torch.randn(1, 28, 128), torch.randn(1, 4, 40, 128)
    wanted, _ = attention64(query, keys, keys, [30], 128**-0.5)
    found = decode_attention(query, keys, keys, torch.tensor([30 + wrong_by]), 128**-0.5, 40, None)
    assert apart(found, wanted) > 2 * max(TOLERANCE.values())
    right = decode_attention(query, keys, keys, torch.tensor([30]), 128**-0.5, 40, None)
    assert apart(right, wanted) < min(TOLERANCE.values())
