"""Problems of reasoning-gym's generators, by name and settings: reasoning-gym/gsm_symbolic?seed=1&size=100.

The generator runs in the process that also scores (`kvlib.tasks.judge`): nothing of reasoning-gym is imported here.
"""

import functools
import json

import yaml

from kvlib.errors import ConfigError
from kvlib.tasks.equality import Comparer

PREFIX = "reasoning-gym/"
SEED, SIZE = 0, 500  # without a seed, a generator draws one


def parsed(name: str) -> tuple[str, dict]:
    """The generator and the settings of a dataset's name; values as in YAML. Raises ConfigError."""
    generator, _, settings = name.removeprefix(PREFIX).partition("?")
    pairs = [pair.partition("=") for pair in settings.split("&") if pair]
    try:
        given = {key: yaml.safe_load(value) for key, _, value in pairs}
        if len(given) < len(pairs) or not all(equals for _, equals, _ in pairs):
            raise ValueError("each setting is written once, as name=value")
        json.dumps(given)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(
            f"dataset {name!r} cannot be read ({' '.join(str(error).split())}); write it as "
            f"{PREFIX}{generator}?seed=1&size=100"
        ) from error
    return generator, {"seed": SEED, "size": SIZE} | given


@functools.cache
def generated(name: str) -> tuple[Comparer, list, dict]:
    """The judge of a dataset, its (question, answer) pairs and all of its settings. Raises ConfigError.

    The answer is None where a generator has many right ones, which only its scorer knows.
    """
    generator, settings = parsed(name)
    judge = Comparer(generator=(generator, json.dumps(settings)))
    said = judge.opening()
    if "problems" in said:
        return judge, said["problems"], said["settings"]
    judge.close()
    raise ConfigError(f"dataset {name!r}: {said['fault']}")
