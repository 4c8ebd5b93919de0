"""What the Triton kernels take of a card, found by compiling their launches ahead of time: no GPU is needed.

`python -m kvlib.kernels.resources` prints the table.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvlib.kernels.append_triton import append
from kvlib.kernels.attention_triton import decode_attention
from kvlib.kernels.compact_triton import compact_slots
from kvlib.kernels.gated_triton import MOST_ROWS, gated
from kvlib.kernels.pointwise_triton import add_rms_norm, rms_norm, silu_mul
from kvlib.kernels.redundancy_triton import mean_cosine_by_tiles
from kvlib.kernels.sampler_triton import LARGEST_TOP_K, sample_ids

ARCHITECTURES = (80, 90)  # A100, H100
B, N, BFLOAT16 = 20, 5001, torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, operator, arguments): batch 20, 5001 slots, the shapes of R1-Qwen-7B (D 128, G 7, hidden 3584,
    intermediate 18944), and of a smaller model most of them."""
    rows = empty(B, dtype=torch.int64)
    for H, G, D in ((4, 7, 128), (3, 3, 64)):
        query, cache = empty(B, H * G, D), empty(B, H, N, D)
        for mass in (None, empty(B, H, N, dtype=torch.float32)):
            name = f"D{D} G{G}" + (" mass" if mass is not None else "")
            yield name, decode_attention, (query, cache, cache, rows, D**-0.5, mass)
    for HQ, H, norm, ring in ((28, 4, None, None), (28, 4, None, 8), (32, 8, empty(128), 8)):
        name = f"HQ{HQ} H{H}" + (" norm" if norm is not None else "") + (" ring" if ring else "")
        cache, angle, ring = empty(B, H, N, 128), empty(B, 128), ring and empty(B, HQ, ring, 128)
        qkv = empty(B, (HQ + 2 * H) * 128)
        yield name, append, (qkv, angle, angle, cache, cache, rows, rows, HQ, norm, norm, 1e-6, ring)
    x, weight = empty(B, 3584), empty(3584)
    yield "3584 + residual", add_rms_norm, (x, x, weight, 1e-6)
    yield "3584", rms_norm, (x, weight, 1e-6)
    yield "18944", silu_mul, (empty(B, 2 * 18944),)
    for n_rows in (B, MOST_ROWS):
        yield f"{n_rows} x 3584 -> 18944", gated, (empty(n_rows, 3584), empty(2 * 18944, 3584))
    for dtype, D in ((BFLOAT16, 128), (torch.float32, 64)):
        cache = empty(28, B, 4, N, D, dtype=dtype)
        positions, state = (empty(28, B, 4, N, dtype=kind) for kind in (torch.int32, torch.float32))
        keep = empty(28, B, 4, N, dtype=torch.bool)
        yield f"{dtype} D{D}", compact_slots, ([cache, cache, positions, state], rows, keep, rows)
    for dtype in (BFLOAT16, torch.float16, torch.float32):
        for D in (64, 128):
            yield f"{dtype} D{D}", mean_cosine_by_tiles, (empty(28, 1, 4, N, D, dtype=dtype), 0.5)
    for dtype, k in ((BFLOAT16, 20), (torch.float32, 20), (torch.float32, LARGEST_TOP_K), (BFLOAT16, 0),
                     (torch.float32, 0)):  # fmt: skip
        arguments = (empty(B, 152064, dtype=dtype), rows, rows, 0.6, 0.95 if k else 1.0, k)
        yield f"{dtype} " + (f"top-{k}" if k else "whole vocabulary"), sample_ids, arguments


@contextlib.contextmanager
def compiled_only(arch: int) -> Iterator[list[tuple[str, CompiledKernel]]]:
    """Inside, a launch compiles its kernel for compute capability `arch` (90 is sm_90) and does nothing else.

    Yields what was compiled.
    """
    found, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options) -> None:
        found.append((self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    card = SimpleNamespace(  # Triton's driver of a card that is not there; what was compiled is kept by device
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    driver.set_active(card)
    try:
        yield found
    finally:
        JITFunction.run = run
        driver.set_active(None)


def resources(arch: int) -> list[dict[str, Any]]:
    """One row per kernel launched: registers per thread, bytes of shared memory per program, stack bytes per thread.

    `spills` counts 4-byte words, as Triton's own `n_spills`: zero only if nothing left the registers.
    """
    rows = {}
    for name, operator, arguments in launches():
        with compiled_only(arch) as found:
            operator._init_fn(*arguments)  # the operator itself returns an empty result on tensors without memory
        for kernel, compiled in found:
            row = {"kernel": f"{kernel.removesuffix('_kernel')} {name}", "arch": f"sm_{arch}"}
            rows.setdefault(compiled.hash, row | used_by(compiled))
    return list(rows.values())


def used_by(compiled: CompiledKernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "shared_bytes": max(used["SHARED"], compiled.metadata.shared),
        "stack_bytes": used["STACK"],
        "spills": (used["STACK"] + used["LOCAL"]) // 4,
        "warps": compiled.metadata.num_warps,
    }


if __name__ == "__main__":
    table = [row for arch in ARCHITECTURES for row in resources(arch)]
    widths = {key: max(len(key), *(len(str(row[key])) for row in table)) for key in table[0]}
    for row in ({key: key for key in table[0]}, *table):
        print("  ".join(f"{row[key]!s:{'<' if key == 'kernel' else '>'}{width}}" for key, width in widths.items()))
