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
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linear layers that read the same input."""


@dataclass(frozen=True)
class Linear:
    """weight `[outputs, inputs]`, plain or as oneDNN reads it fastest (`is_mkldnn`); bias `[outputs]` or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer in 8-bit integers: weights by output, inputs by token, each as its largest part over 127.

    The sums are exact, so a token's output does not depend on what is computed beside it. weight int8
    `[outputs, inputs]`, held as oneDNN reads it fastest only; scale float32 `[outputs]`, bias float32 `[outputs]` or
    None; x float32 `[..., inputs]`.
    """

    ZERO = 128
    """Of an input: oneDNN is fast on unsigned ones only."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features = len(weight)
        self.weight = torch.ops.onednn.qlinear_prepack(weight, [1])
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.last: tuple[Tensor | None, Tensor | None] = None, None
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)

    @classmethod
    def of(cls, *linears: nn.Linear) -> "Int8Linear":
        """One layer of those that read the same input."""
        smallest = torch.finfo(torch.float32).tiny
        weights = [linear.weight.detach() for linear in linears]
        scales = [weight.abs().amax(1).clamp_min_(smallest) / 127 for weight in weights]
        rounded = [
            (weight / scale[:, None]).round_().to(torch.int8) for weight, scale in zip(weights, scales, strict=True)
        ]
        bias = None
        if any(linear.bias is not None for linear in linears):
            zeros = [weight.new_zeros(len(weight)) for weight in weights]
            bias = torch.cat(
                [z if own.bias is None else own.bias.detach() for own, z in zip(linears, zeros, strict=True)]
            )
        return cls(torch.cat(rounded), torch.cat(scales), bias)

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
        rounded = (x / step).round_().add_(self.ZERO).to(torch.uint8)
        weights, as_it_is = (self.weight, self.scale, self.zeros), (None, 1.0, 0, torch.float32, "none", [], "")
        out = torch.ops.onednn.qlinear_pointwise(rounded, 1.0, self.ZERO, *weights, *as_it_is).mul_(step)
        return out if self.bias is None else out.add_(self.bias)


class Int8Part(nn.Module):
    """Some outputs of a layer in 8-bit integers, in the place of the linear layer that they are of.

    The whole is computed once for the parts that read the same tensor one after the other; the last lets go of it.
    """

    def __init__(self, whole: Int8Linear, outputs: slice):
        super().__init__()
        self.whole, self.outputs = whole, outputs

    def forward(self, x: Tensor) -> Tensor:
        read, out = self.whole.last
        if read is not x:
            out = self.whole(x)
        self.whole.last = (None, None) if self.outputs.stop == self.whole.out_features else (x, out)
        return out[..., self.outputs]


def check_int8(device: str) -> None:
    """Raise ConfigError where products in 8-bit integers are not to be had."""
    if not PACKS or device != "cpu":
        raise ConfigError(
            f"dtype 'int8' is of x86 processors with oneDNN, which {device if PACKS else 'this machine'} is not; use "
            "'bfloat16' on a GPU, else 'float32'"
        )


def to_int8(model: nn.Module) -> None:
    """Make every linear layer of a model one in 8-bit integers, in place; nothing stays mapped from a file."""
    for module in list(model.modules()):
        apart = {name: part for name, part in module.named_children() if type(part) is nn.Linear}
        for names in ONE_INPUT:
            if apart.keys() >= set(names):
                linears, start = [apart.pop(name) for name in names], 0
                whole = Int8Linear.of(*linears)
                for name, linear in zip(names, linears, strict=True):
                    setattr(module, name, Int8Part(whole, slice(start, start + linear.out_features)))
                    start += linear.out_features
        for name, linear in apart.items():
            setattr(module, name, Int8Linear.of(linear))
    for part in model.parameters():
        part.data = part.data.clone()


def fuse(*linears: nn.Linear | Int8Linear | Int8Part) -> Linear | Int8Linear:
    """The linears of one input as one, sharing storage with them, or packed."""
    first = linears[0]
    if isinstance(first, Int8Linear | Int8Part):
        return first if isinstance(first, Int8Linear) else first.whole
    packed = _packed(linears)
    return joined(*linears) if packed is None else Linear(packed, _joined_biases(linears))


def joined(*linears: nn.Linear) -> Linear:
    """The linears of one input as one that is not packed; they become slices of it."""
    return Linear(_joined([linear.weight for linear in linears]), _joined_biases(linears))


def _joined_biases(linears: Sequence[nn.Linear]) -> Tensor | None:
    return None if linears[0].bias is None else _joined([linear.bias for linear in linears])


def _packed(linears: Sequence[nn.Linear]) -> Tensor | None:
    """The weights as one in oneDNN's blocked layout, where it pays: products of a few rows then take half the time.

    A copy of the weights as they are now, kept on the first linear for all decoders of the model. The plain ones are
    not read again, so that those of a file need no memory.
    """
    weights = [linear.weight.detach() for linear in linears]
    first = weights[0]
    large = sum(weight.nbytes for weight in weights) >= PACKED_FROM
    if not PACKS or first.device.type != "cpu" or first.dtype != torch.float32 or not large:
        return None
    made_of = [
        (weight.data_ptr(), weight.shape, linear.weight._version)
        for weight, linear in zip(weights, linears, strict=True)
    ]
    kept = getattr(linears[0], "packed", None)
    if kept is None or kept[0] != made_of:
        whole = first if len(weights) == 1 else torch.cat(weights)
        kept = linears[0].packed = made_of, torch.ops.mkldnn._reorder_linear_weight(whole)
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
