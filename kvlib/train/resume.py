"""What an interrupted training is taken up from: one file, written at intervals."""

import io
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Generator, nn
from torch.optim import Optimizer

from kvlib.files import write_atomically


def store(
    path: Path, mark: str, model: nn.Module, optimisers: Sequence[Optimizer], generator: Generator, **numbers
) -> None:
    """Write all that the next step needs, and numbers of the caller's. mark: says which training it is of."""
    states = [part.state_dict() for part in (model, *optimisers)]
    content = io.BytesIO()
    torch.save({"mark": mark, "states": states, "generator": generator.get_state(), "numbers": numbers}, content)
    write_atomically(path, content.getvalue())


def restore(
    path: Path, mark: str, model: nn.Module, optimisers: Sequence[Optimizer], generator: Generator
) -> dict | None:
    """Take up what a training of this mark stored; its numbers. None if no whole file of this mark is there."""
    try:
        stored = torch.load(path, "cpu", weights_only=True)  # tensors and plain values: a file can run no code
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        return None
    if stored["mark"] != mark:
        return None
    for part, state in zip((model, *optimisers), stored["states"], strict=True):
        part.load_state_dict(state)
    generator.set_state(stored["generator"])
    return stored["numbers"]
