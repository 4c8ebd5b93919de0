"""The hub's client: what stands in the way is said with the next step, for models and datasets alike."""

import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvlib.errors import ConfigError
from kvlib.hub import Source
from kvlib.tasks.datasets import load_problems

RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403, url="https://huggingface.co/x")
MODEL, DATA = Source("o/n", "r"), Source("o/n", "r", "d.csv", "dataset")


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (MODEL, GatedRepoError("403", response=RESPONSE), "is gated: ask for access at https://huggingface.co/o/n"),
        (DATA, GatedRepoError("403", response=RESPONSE), "at https://huggingface.co/datasets/o/n, log"),
        (MODEL, RepositoryNotFoundError("404", response=RESPONSE), "no model 'o/n' on the hub, or it is private"),
        (DATA, RepositoryNotFoundError("404", response=RESPONSE), "no dataset 'o/n' on the hub, or it is private"),
        (MODEL, RevisionNotFoundError("404", response=RESPONSE), "no revision 'r': choose one of https://"),
        (MODEL, LocalEntryNotFoundError("x"), "could not be reached: where there is a network, run `hf"),
        (DATA, LocalEntryNotFoundError("x"), "--repo-type dataset o/n d.csv --revision r` and copy datasets--o"),
        (MODEL, OfflineModeIsEnabled("x"), "is not whole in the cache"),
        (DATA, ConnectionError("x"), "or set dataset to the path of a local file"),
        (MODEL, ImportError("Using SOCKS proxy, but"), "speaks SOCKS, which needs the package socksio"),
        (MODEL, ValueError("Unknown scheme for proxy URL URL('foo://x')"), "could not be asked (Unknown scheme"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_said_with_the_next_step(source, error, says):
    said = source.trouble(error)
    assert says in said and "\n" not in said


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "foo://127.0.0.1:9", "http://127.0.0.1:9"])
@pytest.mark.parametrize("check", ["models import check_model as check; name = 'o/n'",
                                   "tasks.datasets import load_problems as check; name = 'amc23'"])  # fmt: skip
def test_a_proxy_that_cannot_be_used_is_a_sentence(proxy, check, tmp_path):
    code = (
        f"from kvlib.errors import ConfigError\nfrom kvlib.{check}\ntry: check(name)\nexcept ConfigError as e: print(e)"
    )
    env = {**os.environ, "ALL_PROXY": proxy, "HTTPS_PROXY": proxy, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "where there is a network, run `hf download" in done.stdout, done.stderr
    assert ("socksio" in done.stdout) == ("socks5" in proxy)


def test_a_silent_network_is_waited_for_once(monkeypatch, tmp_path):
    asked = []

    def silent(*arguments, **options):
        asked.append(arguments)
        raise ConnectionError("timed out")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", silent)
    monkeypatch.setattr("kvlib.hub.time.monotonic", lambda: 1e9)
    for _ in range(3):
        with pytest.raises(ConfigError, match="could not be reached"):
            load_problems("amc23")
    assert len(asked) == 1
