"""Matrix products of a step: weights that read the same input as one, packed as the processor reads them fastest."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvlib.errors import ConfigError

PACKED_FROM = 2**20
"""Bytes of a weight. Smaller ones stay in the CPU's cache, and a step gains nothing from packing them."""
PACKS = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
"""Where packing was measured; elsewhere oneDNN's float32 products may be no faster, or missing."""


@dataclass(frozen=True)
class Linear:
    """weight `[outputs, inputs]`, bias `[outputs]` or None; packed: the weight as oneDNN reads it fastest, or None."""

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer in 8-bit integers: weights by output, inputs by token, each as its largest part over 127.

    The sums are exact, so a token's output does not depend on what is computed beside it. weight int8
    `[outputs, inputs]`, scale float32 `[outputs]`, bias float32 `[outputs]` or None; x float32 `[..., inputs]`.
    """

    ZERO = 128
    """Of an input: oneDNN is fast on unsigned ones only."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        for name, held in (("weight", weight), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, held)
        self.out_features, self.in_features = weight.shape
        self.ready: Tensor | None = None  # the weights as oneDNN reads them

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        scale = linear.weight.detach().abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
        weight = (linear.weight.detach() / scale[:, None]).round_().to(torch.int8)
        return cls(weight, scale, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.ready is None:
            self.ready = torch.ops.onednn.qlinear_prepack(self.weight, [1])
            self.zeros = torch.zeros(self.out_features, dtype=torch.int32)
        step = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
        rounded = (x / step).round_().add_(self.ZERO).to(torch.uint8)
        weights, as_it_is = (self.ready, self.scale, self.zeros), (None, 1.0, 0, torch.float32, "none", [], "")
        out = torch.ops.onednn.qlinear_pointwise(rounded, 1.0, self.ZERO, *weights, *as_it_is).mul_(step)
        return out if self.bias is None else out.add_(self.bias)


def check_int8(device: str) -> None:
    """Raise ConfigError where products in 8-bit integers are not to be had."""
    if not PACKS or device != "cpu":
        raise ConfigError(
            f"dtype 'int8' is of x86 processors with oneDNN, which {device if PACKS else 'this machine'} is not; use "
            "'bfloat16' on a GPU, else 'float32'"
        )


def to_int8(model: nn.Module) -> None:
    """Make every linear layer of a model one in 8-bit integers, in place."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if type(part) is nn.Linear:
                setattr(module, name, Int8Linear.of(part))


def fuse(*linears: nn.Linear | Int8Linear) -> Linear | Int8Linear:
    """The linears of one input as one, sharing storage with them. A second call finds what the first one made.

    A packed copy is of the weights as they are now, and one of integers is always a copy; it is kept on the first
    linear, for all decoders of the model.
    """
    if isinstance(linears[0], Int8Linear):
        return _fused_int8(linears)
    bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
    weight = _joined([linear.weight for linear in linears])
    return Linear(weight, bias, _packed(weight, linears))


def _fused_int8(linears: Sequence[Int8Linear]) -> Int8Linear:
    """One layer of all; the separate ones become slices of it."""
    first = linears[0]
    if len(linears) > 1 and not hasattr(first, "packed"):
        held = [[getattr(linear, name) for linear in linears] for name in ("weight", "scale", "bias")]
        first.packed = None, Int8Linear(*(None if parts[0] is None else torch.cat(parts) for parts in held))
        for linear, own in zip(linears, first.packed[1].weight.split([len(part) for part in held[0]]), strict=True):
            linear.weight = own
    return first if len(linears) == 1 else first.packed[1]


def _packed(weight: Tensor, linears: Sequence[nn.Linear]) -> Tensor | None:
    """A copy in oneDNN's blocked layout, where it pays: products of a few rows then take half the time."""
    if not PACKS or weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.nbytes < PACKED_FROM:
        return None
    made_of = weight.data_ptr(), weight.shape, [linear.weight._version for linear in linears]
    kept = getattr(linears[0], "packed", None)
    if kept is None or kept[0] != made_of:
        kept = linears[0].packed = made_of, torch.ops.mkldnn._reorder_linear_weight(weight)
    return kept[1]


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """The parameters as slices, along their first dimension, of the tensor returned."""
    if not adjacent(parts):
        with torch.inference_mode(False), torch.no_grad():  # of inference tensors no gradient could be taken again
            joined = torch.cat([part.detach() for part in parts])
            for part, own in zip(parts, joined.split([len(part) for part in parts]), strict=True):
                part.data = own
    first = parts[0]
    size = (sum(map(len, parts)), *first.shape[1:])
    return first.detach().as_strided(size, first.stride(), first.storage_offset())


def adjacent(parts: list[nn.Parameter]) -> bool:
    """Whether they follow one another in one storage."""
    first, start = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != start or not part.is_contiguous():
            return False
        start += part.numel()
    return True


def alone(part: nn.Parameter) -> bool:
    return part.untyped_storage().nbytes() <= part.nbytes
