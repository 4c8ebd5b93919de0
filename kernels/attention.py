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
    return decode_attention_reference(query, keys, values, lengths, scaling, n_max, mass)


def decode_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scaling: float,
    n_max: int,
    mass: Tensor | None = None,
) -> Tensor:
    """decode_attention in plain torch. Slots that are live in every row need no mask: only the rest is masked."""
    B, HQ, D = query.shape
    H = keys.shape[1]
    n_all = int(lengths.min())
    ragged = slice(n_all, n_max)
    keys, values = keys[:, :, :n_max], values[:, :, :n_max]
    logits = torch.bmm(query.reshape(B * H, HQ // H, D), keys.flatten(0, 1).mT)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(scaling)
    if n_all < n_max:
        dead = torch.arange(n_all, n_max, device=lengths.device) >= lengths[:, None]
        logits.view(B, HQ, n_max)[..., ragged].masked_fill_(dead[:, None], float("-inf"))
    probabilities = logits.softmax(-1)
    if mass is not None:
        mass[..., :n_max] += probabilities.view(B, H, HQ // H, n_max).sum(2)
    weights = probabilities.to(values.dtype)
    out = torch.bmm(weights[..., :n_all], values[:, :, :n_all].flatten(0, 1))
    if n_all < n_max:
        out.baddbmm_(weights[..., ragged], values[:, :, ragged].masked_fill(dead[:, None, :, None], 0).flatten(0, 1))
    return out.view(B, HQ, D)


def attention_probabilities(query, keys, visible, scaling):
    logits = (query @ keys.transpose(-1, -2)) * scaling
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide).masked_fill(~visible, float("-inf"))
    return logits.softmax(-1).to(keys.dtype)
