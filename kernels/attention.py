"""Attention of one new query per row over the live slots of a static cache."""

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scaling: float,
    n_max: int,
    mass: Tensor | None = None,
) -> Tensor:
    """Attend over the live slots of every row; query heads that share a KV head are handled together.

    query `[B, HQ, D]`, keys and values `[B, H, N, D]` (views of a larger cache are fine, the last axis contiguous)
    -> `[B, HQ, D]` in the query's dtype. lengths `[B]` int64 on the device: slots 0 .. length - 1 are live, at
    least one; n_max: an upper bound of them that the host knows. Dead slots weigh exactly 0, whatever they hold.

    mass float32 `[B, H, N]`, if given: the probability each slot received, summed over its group's query heads,
    is added to it in place.
    """
    if query.device.type != "cpu":
        from kvlib.kernels.attention_triton import decode_attention as kernel

        return kernel(query, keys, values, lengths, scaling, mass)
    # In plain torch: two batched products, in at least float32, faster on a CPU than torch's own attention.
    B, HQ, D = query.shape
    H = keys.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = query.reshape(B * H, HQ // H, D).to(wide) * scaling
    keys, values = (x[:, :, :n_max].flatten(0, 1).to(wide) for x in (keys, values))
    n_all = int(lengths.min())  # slots that are live in every row need no mask
    ragged, bias = n_all < n_max, None
    if ragged:
        dead = torch.arange(n_all, n_max, device=lengths.device) >= lengths[:, None]
        bias = torch.zeros(dead.shape, dtype=wide, device=lengths.device).masked_fill_(dead, float("-inf"))[:, None]
    out, probabilities = _attend(queries, keys, values, bias)
    if ragged and out.isnan().any():  # 0 does not multiply away what a dead slot holds; rare, so found afterwards
        dead = torch.arange(n_max, device=lengths.device) >= lengths[:, None]
        dead = dead.repeat_interleave(H, 0)[..., None]
        out, probabilities = _attend(queries, keys.masked_fill(dead, 0), values.masked_fill(dead, 0), bias)
    if mass is not None:
        mass[..., :n_max] += probabilities.view(B, H, HQ // H, n_max).sum(2)
    return out.view(B, HQ, D).to(query.dtype)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and probabilities of `[B H, G, D]`, `[B H, N, D]`; bias `[B, 1, n]` adds to each row's last n logits."""
    logits = torch.bmm(queries, keys.mT)
    if bias is not None:
        B, _, n = bias.shape
        logits.view(B, -1, logits.shape[-1])[..., -n:] += bias
    probabilities = logits.softmax(-1)
    return torch.bmm(probabilities, values), probabilities


def attention_probabilities(query: Tensor, keys: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """softmax over the slots of scaling * q.k, in at least float32: `[..., Q, D]`, `[..., N, D]` -> `[..., Q, N]`."""
    logits = (query @ keys.transpose(-1, -2)) * scaling
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide).masked_fill(~visible, float("-inf"))
    return logits.softmax(-1).to(keys.dtype)
