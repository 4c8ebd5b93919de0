"""The files of a model in transformers' format, looked at without reading weights: what is missing, cut or damaged."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs"


def missing_files(folder: Path) -> list[str]:
    """What a folder lacks to be loaded: files by name, among them shards of the weights."""
    lacks = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        lacks.append("tokenizer.json")
    return lacks + [shard for shard in shards(folder) if not (folder / shard).is_file()]


def shards(folder: Path) -> list[str]:
    """The files that hold the weights; the index itself, if it cannot be read, is said to be missing."""
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return [f"a readable {INDEX}"]


def stand_in(path: Path) -> str | None:
    """What lies where a file that was not downloaded should be, in a clause; None if it is neither empty nor LFS's."""
    with path.open("rb") as file:
        begins = file.read(len(LFS))
    if begins == LFS:
        return "is a Git LFS pointer, not the file itself (`git lfs pull` fetches it)"
    return None if begins else "is empty"


def damaged_file(folder: Path) -> str | None:
    """The first file that is not what its name says, in a clause; None if all are. Reads headers only."""
    files = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json", *shards(folder))]
    for path in files:
        if not path.is_file():
            continue
        if fault := stand_in(path):
            return f"{path.name} {fault}"
        try:
            headers(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"{path.name} is damaged ({error})"
    return None


def headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype as safetensors writes it, "F32") of the tensors of a file; ValueError if it is not whole."""
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except SafetensorError as error:
        raise ValueError(str(error).removeprefix("Error while deserializing header: ")) from error
