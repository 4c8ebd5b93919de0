"""What a policy needs to know of a model: made once, stored beside the weights, filled into the policy's fields."""

import dataclasses
import hashlib
import json
from pathlib import Path

from safetensors.torch import save
from torch import nn

from kvlib.errors import ConfigError
from kvlib.files import MANIFEST, checked_file, file_sha256, update_manifest
from kvlib.models import TINY, Reasoner
from kvlib.policies import Policy
from kvlib.policies.dynts import ImportanceHead
from kvlib.policies.triattention import QueryStatistics
from kvlib.policies.trimkv import RetentionGate
from kvlib.tensors import read_tensors, write_tensors

SEPARATORS = frozenset(".,?!;:\n\t")
"""What a separator token consists of (SepLLM, arXiv 2412.12094, section 4.1)."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A field's file in a weights folder, the preset that needs it, and the module that the file holds."""

    file: str
    preset: str
    kind: type[ImportanceHead | QueryStatistics | RetentionGate]


FITTED = {
    "predictor": Fitted("dynts-predictor.safetensors", "dynts", ImportanceHead),
    "calibration": Fitted("triattention-calibration.safetensors", "triattention", QueryStatistics),
    "gate": Fitted("trimkv-gate.safetensors", "trimkv", RetentionGate),
}


def save_fitted(need: str, module: nn.Module, out: Path, model_sha256: str, **made_by: object) -> Path:
    """Write a field's module, the weights that it belongs to and what it was made by; atomic. Returns the file.

    out: a folder, whose manifest is brought up to date if it has one, or a path that ends in .safetensors.
    """
    path = out if out.suffix == ".safetensors" else out / FITTED[need].file
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in made_by.items()}
    write_tensors(path, module.state_dict(), {**module.shape, "model_sha256": model_sha256, **metadata})
    if (path.parent / MANIFEST).exists():
        update_manifest(path.parent, [path.name])
    return path


def load_fitted(need: str, path: Path, model_sha256: str | None = None) -> nn.Module:
    """Raises ConfigError if the file is missing, damaged, or belongs to other weights than model_sha256."""
    again = f"make it again with `python -m kvlib.train {need}`"
    try:
        tensors, metadata = read_tensors(path)
        module, made_for = FITTED[need].kind.of(tensors, metadata), metadata["model_sha256"]
    except Exception as error:
        raise ConfigError(f"{need} {path} could not be loaded ({error}); {again}") from error
    if model_sha256 and made_for != model_sha256:
        raise ConfigError(f"{need} {path} was made for other weights; {again}")
    return module.eval().requires_grad_(False)


def held_out_of(path: Path) -> dict:
    """What a fitted file says of its quality on traces that it was not trained on."""
    return json.loads(read_tensors(path)[1]["held_out"])


def separator_ids(tokenizer) -> tuple[int, ...]:
    """Ids of the tokens that consist of punctuation and white space only."""
    words = [word.replace(" ", "") for word in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
    special = set(tokenizer.all_special_ids)
    return tuple(i for i, word in enumerate(words) if word and set(word) <= SEPARATORS and i not in special)


def fitted_path(need: str, policy: Policy, model: str) -> Path:
    """The file of a field that is fitted: the one its setting names, else the one beside the model's weights.

    Raises ConfigError where there is none.
    """
    fitted, given = FITTED[need], getattr(policy, need)
    if given is None and model == "tiny":
        return checked_file(TINY, fitted.file)
    path = Path(given) if given else Path(model) / fitted.file
    if not path.is_file():
        place = path if given or path.parent.is_dir() else path.name  # a hub id is no folder to write into
        how = f'`kvlib.fit("{fitted.preset}", model, texts, out="{place}")`'
        if need == "predictor" and path.parent.parent.name == "predictor":  # where a profile's predictor is made
            profile = path.parent.name
            plan = f"`python -m kvlib.train predictor --profile {profile} --plan`"
            how = f"`make predictor PROFILE={profile}` ({plan} says what that takes), or with {how}"
        raise ConfigError(
            f"policy {type(policy).__name__} needs the {need} of model {model!r}, and there is no {path}; make it "
            f"with {how}, name its file in policy_options.{need}, or use another policy"
        )
    return path


def check_fitted(policy: Policy, model: str) -> dict[str, str]:
    """sha256 of what is fitted, by the policy's field: of its file, or of the module given in its place.

    Raises ConfigError where there is neither.
    """
    marks = {}
    for need in FITTED.keys() & policy.needs:
        given = getattr(policy, need)
        if isinstance(given, nn.Module):
            marks[need] = hashlib.sha256(save(given.state_dict())).hexdigest()
        elif callable(given):
            raise ConfigError(
                f"the {need} of policy {type(policy).__name__} is {given!r}, of which a record could not say what it "
                "does; give a torch module, or the path of its file"
            )
        else:
            marks[need] = file_sha256(fitted_path(need, policy, model))
    return marks


def fill(policy: Policy, model: str, reasoner: Reasoner) -> Policy:
    """The policy with the fields it needs filled in for this model. Raises ConfigError for a file of other weights."""
    filled = {}
    for need in policy.needs:
        given = getattr(policy, need)
        if need == "separators":
            filled[need] = given or separator_ids(reasoner.tokenizer)
        elif given is None or isinstance(given, str):
            module = load_fitted(need, fitted_path(need, policy, model), reasoner.sha256)
            filled[need] = module.to(reasoner.model.device)
    return dataclasses.replace(policy, **filled)
