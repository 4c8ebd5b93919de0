"""What an interrupted training is taken up from: one safetensors file, written at intervals."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from kvlib.tensors import read_tensors, write_tensors


def store(
    path: Path, mark: str, model: nn.Module, optimisers: Sequence[Optimizer], generator: Generator, **numbers
) -> None:
    """Write all that the next step needs, and numbers of the caller's (JSON). mark: says which training it is of."""
    kept = [optimiser.state_dict() for optimiser in optimisers]
    tensors = {f"model/{name}": tensor for name, tensor in model.named_parameters()}
    for k, own in enumerate(kept):
        tensors |= {f"optimiser/{k}/{i}/{name}": x for i, state in own["state"].items() for name, x in state.items()}
    tensors["generator"] = generator.get_state()
    numbers["groups"] = [own["param_groups"] for own in kept]
    write_tensors(path, tensors, {"training": mark, "numbers": json.dumps(numbers)})


def restore(
    path: Path, mark: str, model: nn.Module, optimisers: Sequence[Optimizer], generator: Generator
) -> dict | None:
    """Take up what a training of this mark stored; its numbers. None if no whole file of this mark is there."""
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, SafetensorError):
        return None
    if metadata.get("training") != mark:
        return None
    numbers = json.loads(metadata["numbers"])
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimisers]
    for name, tensor in tensors.items():
        if name.startswith("optimiser/"):
            _, k, i, own = name.split("/")
            states[int(k)].setdefault(int(i), {})[own] = tensor
    own = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    model.load_state_dict(own, strict=False)  # of tied weights one is there
    for optimiser, state, groups in zip(optimisers, states, numbers["groups"], strict=True):
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    generator.set_state(tensors["generator"])
    return numbers
