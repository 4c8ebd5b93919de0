from torch.nn import functional as F


def rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def silu_mul(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
