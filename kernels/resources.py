"""What the Triton kernels take of a card, found by compiling them ahead of time: no GPU is needed.

`python -m kvlib.kernels.resources` prints the table.
"""

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)  # A100, H100
MODULES = (
    "kvlib.kernels.attention_triton",
    "kvlib.kernels.append_triton",
    "kvlib.kernels.pointwise_triton",
    "kvlib.kernels.compact_triton",
    "kvlib.kernels.redundancy_triton",
    "kvlib.kernels.sampler_triton",
)


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
    num_warps: int
    num_stages: int


def all_specimens() -> list[Specimen]:
    return [specimen for module in MODULES for specimen in importlib.import_module(module).specimens()]


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
