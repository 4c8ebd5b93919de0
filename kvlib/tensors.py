"""Named tensors in a safetensors file: atomic, and the same bytes for the same content."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kvlib.files import write_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors, and strings about them; every name in both is sorted, so that a hash of the file means much.

    safetensors itself writes metadata in a random order.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(ready, dict(metadata))
    n = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + n]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, len(header).to_bytes(8, "little") + header + content[8 + n :])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises OSError or safetensors.SafetensorError for a file that is missing or damaged."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
