import torch
from torch.nn import functional as F


def decode_attention(query, keys, values, lengths, scaling, n_max, mass=None):
    B, HQ, D = query.shape
    H = keys.shape[1]
    keys, values = keys[:, :, :n_max], values[:, :, :n_max]
    live = torch.arange(n_max, device=keys.device) < lengths[:, None]
    grouped = query.reshape(B, H, HQ // H, D)
    if mass is None:
        mask = live[:, None, None, :].expand(B, 1, HQ // H, n_max)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling).reshape(B, HQ, D)
    p = attention_probabilities(grouped, keys, live[:, None, None, :], scaling)
    mass[:, :, :n_max] += p.sum(2)
    return (p @ values).reshape(B, HQ, D)


def attention_probabilities(query, keys, visible, scaling):
    logits = (query @ keys.transpose(-1, -2)) * scaling
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide).masked_fill(~visible, float("-inf"))
    return logits.softmax(-1).to(keys.dtype)
