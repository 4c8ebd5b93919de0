"""GGUF: a file is converted once into a folder in transformers' format, and from then on its weights are mapped.

transformers' own GGUF loader reads the file four times and drops what it has no name for, the frequencies of RoPE
among them. Here the file's metadata and tensor names must all be understood, else it is refused. Folders lie in
$KVLIB_CACHE/gguf (default ~/.cache/kvlib/gguf), named by the file's sha256; `python -m kvlib.gguf` lists and removes
them. Layout of a file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import contextlib
import fcntl
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, dequantize, get_tensor_name_map
from transformers import TOKENIZER_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from kvlib.checkpoint import damaged_file, stand_in
from kvlib.errors import ConfigError

CONVERSION = 1  # raised when what a folder holds changes, so that none of before is used
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OTHER_KEYS = ("vocab_size", "attention.key_length", "attention.value_length", "tensor_data_layout")
ROPE_KEYS = ("dimension_count", "freq_base", "scale_linear", "scaling.type", "scaling.factor", "scaling.attn_factor")
ROPE_KEYS += ("scaling.original_context_length", "scaling.finetuned", "scaling.yarn_beta_fast")
ROPE_KEYS += ("scaling.yarn_beta_slow", "scaling.yarn_ext_factor")
FREQUENCIES = "rope_freqs.weight"
CHUNK = 1 << 17  # elements dequantised at a time: fits a core's own cache


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: shape in torch's order, start in bytes from the beginning of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class File:
    """A GGUF file's metadata and tensors by name."""

    path: Path
    metadata: dict
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return self.metadata.get("general.architecture", "")

    def get(self, key: str, default=None):
        """The value of a key of the architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def refuse(self, why: str) -> ConfigError:
        return ConfigError(f"the model file {self.path} {why}")


def read(path: Path) -> File:
    """What a file holds, without its weights. Raises ConfigError unless it is whole."""
    said = "the model file {} {}; download it again".format
    if fault := stand_in(path):
        raise ConfigError(said(path, fault))
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            file = _parse(path, data)
            end = max((tensor.start + tensor.n_bytes for tensor in file.tensors.values()), default=0)
            size = len(data)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise ConfigError(said(path, f"is no GGUF file, or cut short ({error})")) from error
    if end > size:
        raise ConfigError(said(path, f"is cut short: it has {size} bytes and needs {end}"))
    return file


def _parse(path: Path, data: mmap.mmap) -> File:
    place = 0

    def take(form: str) -> tuple:
        nonlocal place
        found = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return found

    def text() -> str:
        nonlocal place
        n = take("Q")[0]
        place += n
        if place > len(data):
            raise ValueError("a text goes beyond its end")
        return data[place - n : place].decode(errors="replace")

    def value(kind: int):
        if kind == STRING:
            return text()
        if kind != ARRAY:
            return take(NUMBERS[kind])[0]
        of, n = take("IQ")
        return take(f"{n}{NUMBERS[of]}") if of in NUMBERS else [value(of) for _ in range(n)]

    magic, version, n_tensors, n_keys = take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    metadata = {text(): value(take("I")[0]) for _ in range(n_keys)}
    entries = []
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")[0]
        entries.append((name, take(f"{n_dims}Q")[::-1], *take("IQ")))
    align = metadata.get("general.alignment", 32)
    begin = -(-place // align) * align
    return File(
        path, metadata, {name: Tensor(s, GGMLQuantizationType(kind), begin + at) for name, s, kind, at in entries}
    )


def config_of(file: File) -> PreTrainedConfig:
    """transformers' config of a file. Raises ConfigError for one that says what is not understood here."""
    kind = file.architecture
    if kind not in ("llama", "qwen2", "qwen3"):
        raise file.refuse(
            f"is of architecture {kind!r}; of GGUF, llama, qwen2 and qwen3 are read, else use safetensors"
        )
    if file.metadata.get("split.count", 0) > 1:
        raise file.refuse("is one part of several; join them with `llama-gguf-split --merge`")
    known = {f"{kind}.{key}" for key in (*PLAIN_KEYS, *OTHER_KEYS, *(f"rope.{key}" for key in ROPE_KEYS))}
    strange = [key for key, value in file.metadata.items() if key.startswith(f"{kind}.") and key not in known and value]
    if strange:
        raise file.refuse(f"sets {', '.join(strange)}, which is not understood here; use the model's safetensors")
    given = {name: file.get(key) for key, name in PLAIN_KEYS.items()}
    given["num_key_value_heads"] = given["num_key_value_heads"] or given["num_attention_heads"]
    lacking = [key for key, name in PLAIN_KEYS.items() if not isinstance(given[name], int | float)]
    if lacking or "token_embd.weight" not in file.tensors:
        raise file.refuse(
            f"has no single {lacking[0] if lacking else 'token_embd.weight'}; use the model's safetensors"
        )
    head_dim = given["hidden_size"] // given["num_attention_heads"]
    head_dim = file.get("attention.key_length", file.get("rope.dimension_count", head_dim))
    if {file.get("attention.value_length", head_dim), file.get("rope.dimension_count", head_dim)} != {head_dim}:
        raise file.refuse("has values, or a rotated part of keys, of another width than keys; use safetensors")
    token = "tokenizer.ggml.{}_token_id"
    return AutoConfig.for_model(
        kind,
        **given,
        head_dim=head_dim,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        rope_parameters=rope_parameters(file),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get(token.format("bos")),
        eos_token_id=file.metadata.get(token.format("eos")),
        pad_token_id=file.metadata.get(token.format("padding")),
        gguf_rope_factors=rope_factors(file),  # transformers has no name for them: see load_reasoner
    )


def rope_parameters(file: File) -> dict:
    """transformers' rope_parameters. As llama.cpp reads them: a factor without a type is linear; YaRN's attention
    factor is attn_factor (0.1 ln factor + 1), its original length the model's own if none is given."""
    rope = {"rope_type": "default", "rope_theta": file.get("rope.freq_base", 10_000.0)}
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear") or 0.0
    kind = file.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor == 0.0 or file.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise file.refuse(f"scales RoPE by {kind!r}, which is not computed here from GGUF; use the model's safetensors")
    return {
        **rope,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.get(
            "rope.scaling.original_context_length", file.get("context_length")
        ),
        "beta_fast": file.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.get("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": file.get("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(max(factor, 1.0)) + 1.0),
    }


def rope_factors(file: File) -> list[float] | None:
    """What each frequency is divided by (`[D / 2]`), as Llama 3.1's files say in a tensor; None if they do not."""
    tensor = file.tensors.get(FREQUENCIES)
    if tensor is None:
        return None
    raw = np.memmap(file.path, np.uint8, "r", tensor.start, tensor.n_bytes)
    return dequantize(raw, tensor.kind).tolist()


def names_of(file: File, config: PreTrainedConfig) -> dict[str, str]:
    """GGUF names to transformers'. Raises ConfigError unless they, and the shapes, are exactly the model's."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    known = get_tensor_name_map(MODEL_ARCH[file.architecture.upper()], config.num_hidden_layers)
    of_file = {f"{known[part]}.{kind}": f"{part}.{kind}" for part, kind in (name.rsplit(".", 1) for name in wanted)}
    names, strange = {}, []
    for name, tensor in file.tensors.items():
        if name in of_file and wanted[of_file[name]] == tensor.shape:
            names[name] = of_file[name]
        elif name != FREQUENCIES:
            strange.append(f"{name} of shape {list(tensor.shape)}")
    missing = sorted(wanted.keys() - set(names.values()))
    if missing or strange:
        raise file.refuse(
            f"does not hold the model that its metadata says ({len(missing)} tensors missing{listed(missing)}, "
            f"{len(strange)} not known{listed(strange)}); download it again, or use the model's safetensors"
        )
    return names


def listed(names: list[str]) -> str:
    return f": {', '.join(names[:2])}{' …' if len(names) > 2 else ''}" if names else ""


def write_weights(file: File, config: PreTrainedConfig, path: Path, dtype: torch.dtype) -> None:
    """The weights as a .safetensors file, dequantised some rows at a time: needs no memory for the whole of them."""
    header, jobs, end = {}, [], 0
    for name, new in names_of(file, config).items():
        tensor = file.tensors[name]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        jobs.append((tensor, heads if file.architecture == "llama" else None, end))
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        header[new] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [start, end]}
    head = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    head += b" " * (-len(head) % 8)
    data = np.memmap(file.path, np.uint8, "r")
    with path.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        out.truncate(8 + len(head) + end)

        def write(job: tuple[Tensor, int | None, int]) -> None:
            tensor, heads, at = job
            rows = math.prod(tensor.shape[:-1])
            raw = data[tensor.start : tensor.start + tensor.n_bytes].reshape(rows, -1)
            if heads:  # llama.cpp keeps the two halves of what RoPE turns side by side
                raw = raw.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
            step = max(1, CHUNK // tensor.shape[-1])
            for first in range(0, rows, step):
                some = np.array(raw[first : first + step]).reshape(1, -1)
                chunk = torch.from_numpy(dequantize(some, tensor.kind)).to(dtype)
                offset = at + first * tensor.shape[-1] * dtype.itemsize
                os.pwrite(out.fileno(), chunk.view(torch.uint8).numpy(), 8 + len(head) + offset)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, jobs))
        out.flush()
        os.fsync(out.fileno())


def convert(path: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Write config, tokenizer and, with a dtype, weights of a GGUF file into a folder. Raises ConfigError, OSError."""
    file = read(path)
    config = config_of(file)
    if dtype is not None:
        try:
            write_weights(file, config, folder / "model.safetensors", dtype)
        except NotImplementedError as error:  # of the package gguf, which knows fewer types than llama.cpp
            raise file.refuse(f"cannot be read ({error}); use another quantisation of it") from error
    config.save_pretrained(folder)
    kind = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    try:
        tokenizer = kind.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise file.refuse(
            f"has a tokenizer that transformers cannot make ({error}); use the model's safetensors"
        ) from error
    tokenizer.save_pretrained(folder)


def cache_folder() -> Path:
    base = os.environ.get("KVLIB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kvlib")
    return Path(base).expanduser() / "gguf"


@contextlib.contextmanager
def as_folder(path: Path, sha256: str, dtype: torch.dtype | None) -> Iterator[Path]:
    """A folder in transformers' format with what a GGUF file of this sha256 holds: in the cache, converted once.

    dtype: float32 or bfloat16; None for config and tokenizer alone. Where the cache cannot be written, a folder in
    memory, which is gone afterwards (weights that were mapped from it stay). Raises ConfigError.
    """
    name = f"{sha256}-{str(dtype).removeprefix('torch.') if dtype else 'tokenizer'}-{CONVERSION}"
    folder = cache_folder() / name
    try:
        if not is_whole(folder):
            convert_once(path, folder, dtype)
    except OSError as error:
        print(f"{folder.parent} cannot be written ({error}); {path.name} is converted in memory", flush=True)
    else:
        yield folder
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as passing:
        try:
            convert(path, Path(passing), dtype)
        except OSError as error:
            raise ConfigError(
                f"there is no room to convert {path} ({error}); set KVLIB_CACHE to a disk that has"
            ) from error
        yield Path(passing)


def convert_once(path: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """convert into a folder of the cache, whole or not at all, once for cells that ask at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_whole(folder):
            return
        print(f"converting {path} into {folder}", flush=True)
        for left in (folder, *folder.parent.glob(f".{folder.name}-*")):  # damaged, or of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
            convert(path, Path(unfinished), dtype)
            os.chmod(unfinished, 0o755)
            os.rename(unfinished, folder)


def is_whole(folder: Path) -> bool:
    return folder.is_dir() and damaged_file(folder) is None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvlib.gguf", description="Models converted from GGUF files.")
    parser.add_argument("--clean", action="store_true", help="remove them; they are converted again when needed")
    clean = parser.parse_args().clean
    for folder in sorted(cache_folder().glob("*")):
        if folder.is_dir():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            print(f"{'removed ' if clean else ''}{folder} {size / 1e9:.2f} GB")
            if clean:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
