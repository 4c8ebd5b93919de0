"""What a policy needs to know of a model: made once, stored beside the weights, filled into the policy's fields."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from kvlib.errors import ConfigError
from kvlib.models import TINY, Reasoner, checked_file, file_sha256
from kvlib.policies import Policy
from kvlib.train import calibration as calibrate
from kvlib.train import gate, load_predictor

SEPARATORS = frozenset(".,?!;:\n\t")
"""What a separator token consists of (SepLLM, arXiv 2412.12094, section 4.1)."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A field's file in a weights folder, the command that makes it, and how it is loaded: (path, weights hash)."""

    file: str
    command: str
    load: Callable[[Path, str], object]


FITTED = {
    "predictor": Fitted(
        "dynts-predictor.safetensors",
        "python -m kvlib.train.predictor",
        lambda path, sha256: load_predictor(path, sha256)[0],
    ),
    "calibration": Fitted(calibrate.FILE, calibrate.COMMAND, calibrate.load_statistics),
    "gate": Fitted(gate.FILE, gate.COMMAND, lambda path, sha256: gate.load_gate(path, sha256)[0]),
}


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
        how = f"`{fitted.command} --model {model} --out {path.parent}`"
        if need == "predictor" and path.parent.parent.name == "predictor":  # where a profile's predictor is made
            profile = path.parent.name
            plan = f"`python -m kvlib.train.predictor --profile {profile} --plan`"
            how = f"`make predictor PROFILE={profile}` ({plan} says what that takes)"
        elif not path.parent.is_dir():  # no folder of weights
            how = f"`{fitted.command} --model {model}`"
        raise ConfigError(
            f"policy {type(policy).__name__} needs the {need} of model {model!r}, and there is no {path}; make it "
            f"with {how}, name its file in policy_options.{need}, or use another policy"
        )
    return path


def check_fitted(policy: Policy, model: str) -> dict[str, str]:
    """sha256 of the fitted files that the policy needs, by field. Raises ConfigError where one is missing."""
    return {need: file_sha256(fitted_path(need, policy, model)) for need in policy.needs if need in FITTED}


def fit(policy: Policy, model: str, reasoner: Reasoner) -> Policy:
    """The policy with the fields it needs filled in for this model. Raises ConfigError for a file of other weights."""
    filled = {}
    for need in policy.needs:
        if need in FITTED:
            made = FITTED[need].load(fitted_path(need, policy, model), reasoner.sha256)
            filled[need] = made.to(reasoner.model.device)
        elif getattr(policy, need) is None:
            filled[need] = separator_ids(reasoner.tokenizer)
    return dataclasses.replace(policy, **filled)
