"""What the Triton kernels take of a card, found by compiling them ahead of time: no GPU is needed.

`python -m kvlib.kernels.resources` prints the table.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvlib.kernels import append_triton, attention_triton, compact_triton, pointwise_triton, redundancy_triton
from kvlib.kernels import sampler_triton as sampler

ARCHITECTURES = (80, 90)  # A100, H100


@dataclass(frozen=True)
class Specimen:
    """One kernel at one configuration that runs use.

    signature: the type of each argument that is no constant, in order: "*bf16", "i64", "fp32"; a suffix ":16"
    says that the address or number is a multiple of 16, as launches find out by themselves.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


def typed(*lines: str) -> dict[str, str]:
    """Types of arguments, from lines of a type and the names that have it."""
    return {name: kind for kind, *names in map(str.split, lines) for name in names}


def all_specimens() -> list[Specimen]:
    """Every kernel at R1-Qwen-7B's shapes (D 128, G 7, hidden 3584, intermediate 18944), most at a smaller model's."""
    return [*attention(), *append(), *pointwise(), *compaction(), *redundancy(), *sampling()]


def attention() -> Iterator[Specimen]:
    """Batch 20, so 16 splits."""
    own = attention_triton
    split = typed(
        "*bf16:16 query keys values", "*i64:16 lengths", "*fp32:16 partial lse logits", "fp32 scaling",
        "i32:16 keys_b keys_h keys_n values_b values_h values_n", "i32 n_slots n_heads",
    )  # fmt: skip
    merge = typed(
        "*fp32:16 partial lse logits mass", "*i64:16 lengths", "*bf16:16 out", "i32 mass_b mass_h n_slots n_heads"
    )
    tile = {"GROUP": 16, "BLOCK": own.BLOCK, "COMPUTE": tl.bfloat16}
    for D, G, mass in ((128, 7, False), (128, 7, True), (64, 3, False), (64, 3, True)):
        name, shared = f"D{D} G{G}{' mass' if mass else ''}", {"G": G, "D": D, "SPLITS": 16, "MASS": mass}
        yield Specimen(f"attention split {name}", own.split_kernel, split, shared | tile, num_stages=own.STAGES)
        yield Specimen(f"attention merge {name}", own.merge_kernel, merge, shared | {"BLOCK": own.MASS_BLOCK})


def append() -> Iterator[Specimen]:
    """With a ring of queries, and with a Qwen3 model's norm of each head."""
    types = typed(
        "*bf16:16 qkv cos sin keys values q_norm k_norm ring query", "*i64:16 slots positions", "fp32 eps",
        "i32:16 keys_b keys_h keys_n values_b values_h values_n ring_b ring_h ring_w", "i32 n_ring",
    )  # fmt: skip
    for HQ, H, norm, ring in ((28, 4, False, False), (28, 4, False, True), (32, 8, True, True)):
        name = f"append HQ{HQ} H{H}{' norm' if norm else ''}{' ring' if ring else ''}"
        constants = {"HQ": HQ, "H": H, "D": 128, "NORM": norm, "RING": ring}
        yield Specimen(name, append_triton.append_kernel, types, constants, num_warps=1)


def pointwise() -> Iterator[Specimen]:
    own, types = pointwise_triton, typed("*bf16:16 x residual weight normed summed", "fp32 eps", "i32:16 n")
    for add in (True, False):
        name = f"{'add + ' if add else ''}RMSNorm 3584"
        yield Specimen(name, own.rms_norm_kernel, types, {"ADD": add, "BLOCK": 4096}, num_warps=8)
    types = typed("*bf16:16 gate_up out", "i32:16 n")
    yield Specimen("silu * up 18944", own.silu_mul_kernel, types, {"BLOCK": own.SILU_BLOCK})


def compaction() -> Iterator[Specimen]:
    own, index = compact_triton, "*i32:16 source target n_moves"
    plan = typed("*i1:16 keep", "*i64:16 n_keep", index, "i32 n capacity", "i64 keep_layer keep_row keep_head")
    yield Specimen("compact plan", own.plan_kernel, plan, {"SLOTS": own.PLAN_SLOTS})
    for a, b, size, stride in (
        ("bf16", "bf16", 128, "i64:16"),
        ("fp32", "fp32", 64, "i64:16"),
        ("i32", "fp32", 1, "i64"),
    ):
        strides = " ".join(f"{tensor}_{axis}" for tensor in "ab" for axis in ("layer", "row", "head", "slot"))
        move = typed(
            f"*{a}:16 a", f"*{b}:16 b", "*i64:16 rows", index, "i32 n_heads capacity",
            "i64 pair_layer pair_row pair_head", f"{stride} {strides}",
        )  # fmt: skip
        sizes = {"SIZE": size, "PADDED": size, "TWO": True, "SLOTS": own.MOVE_SLOTS}
        yield Specimen(f"compact move {a}, {b} x {size}", own.move_kernel, move, sizes)


def redundancy() -> Iterator[Specimen]:
    own = redundancy_triton
    for keys, compute, tile in (
        ("bf16", tl.bfloat16, own.TILE),
        ("fp16", tl.float16, own.TILE),
        ("fp32", tl.float32, own.TILE_FLOAT32),
    ):
        for D in (64, 128):
            size = {"SIZE": D, "PADDED": D}
            tiled = {"ROWS": tile[0], "COLUMNS": tile[1], "COMPUTE": compute, "FIXED": own.FIXED}
            shape = (f"*{keys}:16 keys", "*fp32:16 inverse_norm", "i32 n", "i32:16 key_slot")
            total, spare = typed(*shape, "*fp32:16 total"), typed(*shape, "*i64:16 spared", "fp32 threshold")
            summed = size | {"SLOTS": own.SUMMED}
            yield Specimen(f"redundancy total {keys} D={D}", own.total_kernel, total, summed)
            yield Specimen(f"redundancy spare {keys} D={D}", own.spare_kernel, spare, size | tiled)


def sampling() -> Iterator[Specimen]:
    """Of R1-Qwen-7B's vocabulary; k 0 is all of it."""
    for logits, k in (("bf16", 20), ("fp32", 20), ("fp32", sampler.LARGEST_TOP_K), ("bf16", 0), ("fp32", 0)):
        wide, name = ("fp32", f"top-{k}") if k else ("fp64", "whole vocabulary")
        found = ("*i64:16 request step", f"*{wide}:16 best", "*i32:16 best_id", "i32:16 n_vocabulary")
        best, draw = (
            typed(*found, f"*{logits}:16 logits", "i64:16 logits_row"),
            typed(*found, "*i64:16 drawn", "i32 n_candidates"),
        )
        k, whole, n_candidates = max(k, 1), not k, triton.cdiv(152064, sampler.BLOCK) * max(k, 1)
        block = {"TEMPERATURE": 0.6, "K": k, "NOISE": whole, "BLOCK": sampler.BLOCK}
        row = {"TEMPERATURE": 0.6, "TOP_P": 1.0 if whole else 0.95, "K": k, "K_PADDED": sampler.padded(k)}
        row["CANDIDATES"] = sampler.padded(n_candidates)
        yield Specimen(f"sampler best {logits} {name}", sampler.best_kernel, best, block)
        yield Specimen(f"sampler draw {logits} {name}", sampler.draw_kernel, draw, row, num_warps=sampler.DRAW_WARPS)


def compile_specimen(specimen: Specimen, arch: int) -> triton.compiler.CompiledKernel:
    """Compile for compute capability `arch` (90 is sm_90)."""
    names = specimen.kernel.arg_names
    types = {name: specimen.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        specimen.kernel,
        {name: kind.removesuffix(":16") for name, kind in types.items()},
        {(names.index(name),): value for name, value in specimen.constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].endswith(":16")},
    )
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(arch: int) -> list[dict[str, Any]]:
    """One row per specimen: registers per thread, bytes of shared memory per program, stack bytes per thread.

    `spills` counts 4-byte words, as Triton's own `n_spills`: zero only if nothing left the registers.
    """
    rows = []
    for specimen in all_specimens():
        compiled = compile_specimen(specimen, arch)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        rows.append(
            {
                "kernel": specimen.name,
                "arch": f"sm_{arch}",
                "registers": used["REG"],
                "shared_bytes": max(used["SHARED"], compiled.metadata.shared),
                "stack_bytes": used["STACK"],
                "spills": (used["STACK"] + used["LOCAL"]) // 4,
                "warps": specimen.num_warps,
            }
        )
    return rows


if __name__ == "__main__":
    table = [row for arch in ARCHITECTURES for row in resources(arch)]
    widths = {key: max(len(key), *(len(str(row[key])) for row in table)) for key in table[0]}
    print("  ".join(f"{key:{width}}" for key, width in widths.items()))
    for row in table:
        print(
            "  ".join(
                f"{row[key]!s:>{width}}" if key != "kernel" else f"{row[key]:{width}}" for key, width in widths.items()
            )
        )
