import torch


def append(
    qkv, cos, sin, keys, values, slots, positions, *, n_query_heads, q_norm=None, k_norm=None, eps=0.0, ring=None
):
    B, H, _, D = keys.shape
    heads = qkv.view(B, -1, D)
    qk = heads[:, : n_query_heads + H]
    if q_norm is not None:
        from kvlib.kernels.pointwise import rms_norm

        qk = torch.cat([rms_norm(qk[:, :n_query_heads], q_norm, eps), rms_norm(qk[:, n_query_heads:], k_norm, eps)], 1)
    a, b = qk.chunk(2, -1)
    qk = qk * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]
    rows = torch.arange(B, device=keys.device)
    keys[rows, :, slots] = qk[:, n_query_heads:]
    values[rows, :, slots] = heads[:, n_query_heads + H :]
    query = qk[:, :n_query_heads]
    if ring is not None:
        ring[rows, :, positions % ring.shape[2]] = query
    return query
