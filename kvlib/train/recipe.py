"""How one model's predictor is made: profiles as data, and what that takes. Knows no model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from kvlib.config import check_keys, check_names, read_yaml
from kvlib.errors import ConfigError
from kvlib.fitted import FITTED

END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class Expected:
    """What a plan reckons with, measured or assumed (source says which). Rates are in tokens per second."""

    hidden_size: int
    bytes_per_feature: int
    tokens_per_trace: int
    prompt_tokens: int
    usable: float
    decode_rate: float
    label_rate: float
    train_rate: float
    source: str


@dataclass(frozen=True)
class Profile:
    """How one model's predictor is made; the defaults are the tiny reasoner's.

    problems: see training_problems. ends_thinking: `</think>` (a token), or the words that begin the answer, which
    then runs from them on. only_right: use only traces whose answer is right. label_tokens: most thinking tokens of a
    trace to train on, None for all. Held out are the last n_held_out usable traces, always whole.
    """

    model: str = "tiny"
    problems: str = "chains"
    instruction: str = ""
    ends_thinking: str = END_OF_THINKING
    only_right: bool = True
    n_traces: int = 480
    n_held_out: int = 80
    n_rows: int = 120
    max_new_tokens: int = 768
    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    label_tokens: int | None = None
    label_power: float = 0.3
    n_epochs: int = 12
    batch_tokens: int = 1024
    lr: float = 2e-3
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def of_traces(self) -> dict:
        """What decides a trace, besides the model's weights and the problems themselves."""
        names = ["instruction", "n_traces", "n_rows", "max_new_tokens", "temperature", "top_p", "seed", "dtype"]
        settings = {name: getattr(self, name) for name in [*names, "device"]}
        return {**settings, "top_k": self.top_k} if self.top_k else settings  # traces from before it was a setting

    def of_head(self) -> dict:
        """How the head is trained on its labels."""
        names = ("label_power", "n_epochs", "batch_tokens", "lr", "seed", "device")
        return {name: getattr(self, name) for name in names}


def load_profile(path: Path, name: str) -> tuple[Profile, Expected | None]:
    """A profile of a file of profiles (YAML), and what a plan reckons with. Raises ConfigError."""
    hint = "run in the folder that holds kvlib's notebooks, or name the file with --profiles"
    profiles = read_yaml(path, "profiles", hint)
    if not isinstance(profiles, dict) or not all(isinstance(settings, dict) for settings in profiles.values()):
        raise ConfigError(f"{path} must map names of profiles to mappings of settings")
    check_names([name], list(profiles), f"profile (in {path})")
    settings = dict(profiles[name])
    expected = settings.pop("expected", None)
    profile = _typed(Profile, settings, f"{path}: {name}")
    return profile, None if expected is None else _typed(Expected, expected, f"{path}: {name}.expected")


def _typed(kind: type, given, where: str):
    """The dataclass of these fields, if they exist and are of its types; all of Expected, whose numbers are above 0."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    needed, others = (list(types), []) if kind is Expected else ([], list(types))
    check_keys(given, needed, others, f"setting of {where}")
    for name, value in given.items():
        wanted = {float: (float, int), int | None: (int, NoneType)}.get(types[name], (types[name],))
        if type(value) not in wanted:
            names = " or ".join(kind.__name__ for kind in wanted)
            raise ConfigError(f"{where}.{name}={value!r} must be of type {names}; correct it")
        if kind is Expected and not isinstance(value, str) and not value > 0:
            raise ConfigError(f"{where}.{name}={value!r} must be above 0; correct it")
    return kind(**given)


def plan(profile: Profile, expected: Expected | None, name: str, work: Path, out: Path) -> str:
    """What train_predictor would do, what it would cost and why, without a model."""
    lines = [
        f"profile {name}: model {profile.model}, {profile.n_traces} problems of {profile.problems!r}, "
        f"{profile.n_held_out} traces held out, {profile.n_epochs} epochs, on {profile.device} in {profile.dtype}",
        f"stages in {work}, head in {out / FITTED['predictor'].file}",
    ]
    if expected is None:
        return "\n".join([*lines, "the profile has no `expected`, so its cost cannot be reckoned"])
    e, d = expected, expected.hidden_size
    tokens = profile.n_traces * e.tokens_per_trace
    usable = round(profile.n_traces * e.usable)
    read = usable * (e.tokens_per_trace + e.prompt_tokens)
    kept = min(e.tokens_per_trace, profile.label_tokens or e.tokens_per_trace)
    trained = max(0, usable - profile.n_held_out) * kept
    stored = trained + min(usable, profile.n_held_out) * e.tokens_per_trace
    seconds = tokens / e.decode_rate, read / e.label_rate, profile.n_epochs * trained / e.train_rate
    hours = [each / 3600 for each in seconds]
    parameters = 2 * d * d + 2 * d * (d // 2) + d // 2
    labels = stored * (d * e.bytes_per_feature + 4)
    return "\n".join(
        [
            *lines,
            f"traces    {profile.n_traces} x {e.tokens_per_trace} tokens = {tokens / 1e6:.2f} M, at "
            f"{e.decode_rate:g} tokens/s: {hours[0]:.2f} h",
            f"labels    {usable} usable ({e.usable:.0%}) x {e.tokens_per_trace + e.prompt_tokens} tokens with prompt, "
            f"at {e.label_rate:g} tokens/s: {hours[1]:.2f} h",
            f"training  {profile.n_epochs} epochs x {trained / 1e6:.2f} M tokens (at most {kept} of a trace), a head "
            f"of {parameters / 1e6:.2f} M parameters, at {e.train_rate:g} tokens/s: {hours[2]:.2f} h",
            f"total     {sum(hours):.1f} h",
            f"disk      traces {11 * tokens / 1e9:.2f} GB, features and labels {labels / 1e9:.2f} GB, "
            f"checkpoint {12 * parameters / 1e9:.2f} GB",
            f"head      {4 * parameters / 1e6:.1f} MB",
            f"reckoned with: {' '.join(e.source.split())}",
        ]
    )
