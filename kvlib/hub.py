"""The one client of the hub: what its cache holds, what it answers, and in a sentence what stands in the way."""

import functools
import re
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

from kvlib.checkpoint import missing_files
from kvlib.errors import ConfigError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
INSTEAD = {"model": "use a folder or file that holds the model", "dataset": "set dataset to the path of a local file"}
TROUBLE = (OSError, errors.HTTPError, ImportError, ValueError)
"""The last two: proxies that httpx cannot use, and impossible names."""


@dataclass(frozen=True)
class Source:
    """What is wanted of a repository of the hub: one file, or (file None) all of a model in transformers' format.

    repo: owner/name. revision: a branch, tag or commit; None for the newest, or what the cache has of it.
    """

    repo: str
    revision: str | None = None
    file: str | None = None
    kind: str = "model"

    def __str__(self) -> str:
        return f"{self.kind} {'/'.join(filter(None, (self.repo, self.file)))!r}"

    def cached(self) -> Path | None:
        """The file, or the model's folder (its name is the commit), if the cache has it whole. No network."""
        try:
            found = self._download(local_files_only=True)
        except (errors.LocalEntryNotFoundError, ValueError):
            return None
        return found if self.file or not missing_files(found) else None

    def ask(self):
        """What the hub says of the repository, if what is wanted can be downloaded. Raises ConfigError."""
        try:
            info = _answer(self, int(time.monotonic() // 120))
        except TROUBLE as error:
            raise ConfigError(self.trouble(error)) from error
        if isinstance(info, Exception):
            raise ConfigError(self.trouble(info)) from info
        names = [entry.rfilename for entry in info.siblings or ()]
        if self.file and self.file not in names:
            like = [name for name in names if Path(name).suffix == Path(self.file).suffix]
            raise ConfigError(f"{self} is no file of {self.url}; there are {', '.join(like) or 'none of its kind'}")
        if not self.file and not any(name.endswith(".safetensors") for name in names):
            raise ConfigError(f"{self} has no .safetensors, and other forms can hold code; use a model that has")
        return info

    def fetch(self) -> Path:
        """The file, or the model's folder; downloaded, and said so, if the cache lacks it. Raises ConfigError."""
        if found := self.cached():
            return found
        self.ask()
        print(f"downloading {self} into {constants.HF_HUB_CACHE}", flush=True)
        try:
            return self._download()
        except TROUBLE as error:
            raise ConfigError(self.trouble(error)) from error

    def _download(self, **options) -> Path:
        options |= {"revision": self.revision, "repo_type": self.kind}
        if self.file:
            return Path(hf_hub_download(self.repo, self.file, **options))
        return Path(snapshot_download(self.repo, allow_patterns=MODEL_FILES, **options))

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    def trouble(self, error: Exception) -> str:
        """What an error of the hub, or of the way to it, means and what to do about it, in a sentence."""
        if isinstance(error, errors.GatedRepoError):
            return f"{self} is gated: ask for access at {self.url}, log in with `hf auth login`, then run this again"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"there is no {self.kind} {self.repo!r} on the hub, or it is private: check the name at {self.url}; "
                "for a private one log in with `hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self} has no revision {self.revision!r}: choose one of {self.url}/commits/main"
        words = ["hf download", "--repo-type dataset" if self.kind == "dataset" else "", self.repo, self.file or ""]
        command = " ".join(filter(None, [*words, f"--revision {self.revision}" if self.revision else ""]))
        why = "the hub could not be reached"
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE is set"
        elif isinstance(error, errors.HfHubHTTPError) and not isinstance(error, errors.LocalEntryNotFoundError):
            why = f"the hub refused it ({str(error).splitlines()[0]})"
        elif isinstance(error, ImportError) and "SOCKS" in str(error):
            why = (
                "the proxy of ALL_PROXY or HTTPS_PROXY speaks SOCKS, which needs the package socksio (pip install "
                "socksio, or unset it)"
            )
        elif isinstance(error, ValueError | ImportError) and not isinstance(error, OSError):
            why = f"the hub could not be asked ({str(error).splitlines()[0]})"
        folder = f"{self.kind}s--{self.repo.replace('/', '--')}"
        return (
            f"{self} is not whole in the cache {constants.HF_HUB_CACHE} and {why}: where there is a network, run "
            f"`{command}` and copy {folder} from the cache there into this one; or {INSTEAD[self.kind]}"
        )


def model_source(name: str) -> Source | None:
    """Of owner/name or owner/name/file.gguf, either with @revision; None for another name, or what is a path here."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*?)(?:/([\w./-]+\.gguf))?(?:@([\w./-]+))?", name)
    if not found or Path(name).exists() or (found[1].endswith(".gguf") and not found[2]):
        return None
    return Source(found[1], found[3], found[2])


@functools.cache
def _answer(source: Source, period: int):
    """What the hub says of a repository, or the network's error; raises what the hub refuses.

    Asked once a period: every cell asks, and behind a firewall that swallows packets each question takes 15 s.
    """
    try:
        info = HfApi().repo_info(
            source.repo, repo_type=source.kind, revision=source.revision, timeout=15, files_metadata=True
        )
        HfApi().auth_check(source.repo, repo_type=source.kind)  # a gated repository's information is public
    except errors.HfHubHTTPError:
        raise
    except (OSError, errors.HTTPError) as error:
        return error
    return info
