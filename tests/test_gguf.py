"""GGUF: what is loaded is all that the file says, converted once; a file that is not whole is refused."""

import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gguf")

import numpy as np
from conftest import as_requests, decode
from gguf_files import D, write_gguf
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlib import gguf
from kvlib.errors import ConfigError
from kvlib.files import file_sha256
from kvlib.models import check_model, load_reasoner, load_tokenizer, weights_sha256
from kvlib.policies import make_policy

PROMPT = torch.tensor([[256, 10, 20, 30, 40, 50, 258, 60]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def logits(model) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_weights_and_tokenizer_are_those_that_transformers_reads(kind, quant, tmp_path):
    pytest.importorskip("accelerate")  # transformers' own loader needs it
    path = write_gguf(tmp_path / "model.gguf", kind, quant=quant, tied=kind == "llama")
    reasoner = load_reasoner(str(path))
    own = {"head_dim": D} if kind == "qwen3" else {}  # which transformers does not read from the file
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32, **own)
    assert torch.equal(logits(reasoner.model), logits(theirs))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("ab abab\n ba", "Zoë <think>3.14</think> x", "<|begin|>a<|end|>"):
        assert reasoner.encode(text) == tuple(tokenizer.encode(text))
    assert (reasoner.eos_ids, reasoner.answer_id, reasoner.sha256) == ((257,), 259, file_sha256(path))


def test_a_gguf_model_decodes_as_transformers_does(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", factors=[1, 1, 1, 1, 2, 4, 8, 8])
    model = load_reasoner(str(path), "float64").model
    prompt = tuple(PROMPT[0].tolist())
    done = decode(model, make_policy("full"), None, as_requests([prompt]), 1, 12)
    model.set_attn_implementation("sdpa")
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert list(done["0"].tokens) == expected[0, len(prompt) :].tolist()


def plain_frequencies() -> torch.Tensor:
    return torch.tensor([500_000.0 ** (-2 * f / D) for f in range(D // 2)])


def yarn_frequencies(factor: float, original: int, fast: float = 32, slow: float = 1) -> torch.Tensor:
    """ggml's rope_yarn, written from its formulas: the ramp runs over pairs, between two corrected dimensions."""

    def pair(turns):
        return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(500_000.0))

    low, high = max(0, math.floor(pair(fast))), min(D - 1, math.ceil(pair(slow)))
    ramp = torch.tensor([1 - min(1, max(0, (f - low) / max(0.001, high - low))) for f in range(D // 2)])
    return plain_frequencies() * ((1 - ramp) / factor + ramp)


FACTORS = [1, 1, 1, 1.5, 2, 4, 8, 8]
LONGER = {"type": "yarn", "factor": 4.0, "original_context_length": 1024}


@pytest.mark.parametrize(
    ("options", "expected", "scaling"),
    [
        ({}, plain_frequencies(), 1.0),
        ({"scaling": {"type": "none", "factor": 4.0}}, plain_frequencies(), 1.0),
        ({"factors": FACTORS}, plain_frequencies() / torch.tensor(FACTORS), 1.0),
        ({"scaling": {"type": "linear", "factor": 4.0}}, plain_frequencies() / 4, 1.0),
        ({"scaling": {"factor": 4.0}}, plain_frequencies() / 4, 1.0),  # without a type, llama.cpp takes linear
        ({"keys": [("{}.rope.scale_linear", 4.0)]}, plain_frequencies() / 4, 1.0),
        ({"scaling": LONGER}, yarn_frequencies(4.0, 1024), 0.1 * math.log(4) + 1),
        ({"scaling": {"type": "yarn", "factor": 4.0}}, yarn_frequencies(4.0, 4096), 0.1 * math.log(4) + 1),
        ({"scaling": LONGER | {"attn_factor": 0.5}}, yarn_frequencies(4.0, 1024), 0.5 * (0.1 * math.log(4) + 1)),
        (
            {"scaling": LONGER | {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}},
            yarn_frequencies(4.0, 1024, 16, 2),
            0.1 * math.log(4) + 1,
        ),
        (
            {"scaling": LONGER, "factors": FACTORS},
            yarn_frequencies(4.0, 1024) / torch.tensor(FACTORS),
            0.1 * math.log(4) + 1,
        ),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_frequencies_are_those_that_llama_cpp_computes(kind, options, expected, scaling, tmp_path):
    options = options | {"keys": [(key.format(kind), value) for key, value in options.get("keys", ())]}
    rotary = load_reasoner(str(write_gguf(tmp_path / "model.gguf", kind, **options))).model.base_model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-5, atol=0)
    assert rotary.attention_scaling == pytest.approx(scaling)


ODD = np.ones(D, np.float32)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "gemma2"}, "is of architecture 'gemma2'"),
        ({"drop": ["blk.1.ffn_down.weight"]}, "1 tensors missing: model.layers.1.mlp.down_proj.weight"),
        ({"drop": ["token_embd.weight"]}, "has no single token_embd.weight"),
        ({"extra": {"blk.0.attn_q_norm.weight": ODD}}, "1 not known: blk.0.attn_q_norm.weight of shape"),
        ({"extra": {"blk.2.ffn_norm.weight": ODD}}, "1 not known: blk.2.ffn_norm.weight"),
        ({"extra": {"blk.1.ffn_norm.weight": ODD}}, "1 tensors missing.*1 not known"),
        ({"extra": {"rope_factors_long.weight": ODD}}, "not known: rope_factors_long.weight"),
        ({"keys": [("llama.attention.sliding_window", 512)]}, "sets llama.attention.sliding_window, which is not"),
        ({"keys": [("llama.expert_count", 4)]}, "sets llama.expert_count"),
        ({"keys": [("llama.logit_scale", 0.5)]}, "sets llama.logit_scale"),
        ({"keys": [("split.count", 3)]}, "is one part of several"),
        ({"scaling": {"type": "longrope", "factor": 4.0}}, "scales RoPE by 'longrope'"),
        ({"keys": [("llama.attention.value_length", 8)]}, "of another width than keys"),
    ],
)
def test_a_file_that_says_more_than_is_understood_is_refused_before_it_is_loaded(options, says, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", **options)
    for look in (check_model, load_tokenizer, load_reasoner):
        with pytest.raises(ConfigError, match=says) as refused:
            look(str(path))
        assert "\n" not in str(refused.value)


def test_what_says_nothing_new_is_no_reason_to_refuse(tmp_path):
    keys = [("llama.expert_count", 0), ("llama.attention.key_length", D), ("llama.attention.value_length", D)]
    check_model(str(write_gguf(tmp_path / "model.gguf", keys=keys, scaling={"finetuned": 1})))


def test_a_file_that_is_not_whole_is_refused_at_every_length(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    for n in [0, 3, 4, 20, 24, 30, 100, 1000, 3000, len(whole) // 4, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(ConfigError, match=r"empty|cut short") as refused:
            gguf.read(path)
        assert "\n" not in str(refused.value)
    path.write_bytes(whole)
    gguf.read(path)
    for content, says in (
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
        (b"a" * 999, "no GGUF file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            check_model(str(path))


def test_a_weight_that_is_no_number_is_refused(tmp_path):
    spoilt = np.ones(64, np.float32)
    spoilt[5] = np.nan
    path = write_gguf(tmp_path / "model.gguf", extra={"blk.1.ffn_norm.weight": spoilt})
    with pytest.raises(ConfigError, match="not all finite numbers"):
        load_reasoner(str(path))


def test_a_file_is_converted_once_per_dtype_and_by_its_content(tmp_path, cache, capfd):
    path = write_gguf(tmp_path / "model.gguf")
    first = load_reasoner(str(path)).model
    assert "converting" in capfd.readouterr().out
    again = load_reasoner(str(path)).model
    assert "converting" not in capfd.readouterr().out
    assert torch.equal(logits(first), logits(again))
    assert load_reasoner(str(path), "bfloat16").model.dtype == torch.bfloat16
    for old, new in zip(first.parameters(), load_reasoner(str(path), "bfloat16").model.parameters(), strict=True):
        assert torch.equal(old.to(torch.bfloat16), new)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 2
    write_gguf(path, extra={"output_norm.weight": np.full(64, 2, np.float32)})  # other weights by the same name
    assert not torch.equal(logits(first), logits(load_reasoner(str(path)).model))
    assert weights_sha256(str(path)) == file_sha256(path)


def test_a_folder_of_the_cache_that_is_cut_is_converted_again(tmp_path, cache, capfd):
    path = write_gguf(tmp_path / "model.gguf")
    expected = logits(load_reasoner(str(path)).model)
    (weights,) = cache.glob("*-float32-1/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    left = cache / f".{weights.parent.name}-killed"
    left.mkdir()
    capfd.readouterr()
    assert torch.equal(logits(load_reasoner(str(path)).model), expected)
    assert "converting" in capfd.readouterr().out and not left.exists()


def test_cells_side_by_side_convert_a_file_once(tmp_path, cache, monkeypatch):
    converted = []

    def slowly(path, folder, dtype):
        converted.append(folder)
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")

    def cell(_):
        with gguf.as_folder(tmp_path / "model.gguf", "0" * 64, torch.float32) as folder:
            return folder, (folder / "config.json").exists()

    monkeypatch.setattr(gguf, "convert", slowly)
    with ThreadPoolExecutor(4) as cells:
        found = set(cells.map(cell, range(4)))
    assert found == {(cache / f"{'0' * 64}-float32-1", True)} and len(converted) == 1


def test_a_type_that_the_reader_cannot_dequantise_is_a_sentence(tmp_path, monkeypatch):
    def unknown(data, kind):
        raise NotImplementedError("Dequantization for Q9_9 is not yet implemented")

    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(gguf, "dequantize", unknown)
    with pytest.raises(ConfigError, match=r"Q9_9 is not yet implemented\); use another quantisation"):
        load_reasoner(str(path))


def test_a_file_of_the_hub_comes_from_the_cache_without_a_network(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--owner--small-GGUF"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    path = write_gguf(repo / "snapshots" / commit / "small-q8_0.gguf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in ("", f"@{commit}", "@main"):
        name = f"owner/small-GGUF/small-q8_0.gguf{revision}"
        check_model(name)
        assert load_reasoner(name).sha256 == weights_sha256(name) == file_sha256(path)
    for name in ("owner/small-GGUF/other.gguf", "owner/small-GGUF/small-q8_0.gguf@v2"):
        for ask in (check_model, weights_sha256, load_tokenizer):
            with pytest.raises(
                ConfigError, match=r"is not whole in the cache .*`hf download owner/small-GGUF \w.*gguf"
            ):
                ask(name)


def test_the_hub_states_the_hash_of_a_file_before_it_is_downloaded(tmp_path, monkeypatch):
    stored = [
        SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=f"hash of {name}")) for name in ("a.gguf", "b.gguf")
    ]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("kvlib.hub._answer", lambda source, period: SimpleNamespace(siblings=stored))
    check_model("owner/x-GGUF/b.gguf")
    assert weights_sha256("owner/x-GGUF/b.gguf") == "hash of b.gguf"
    with pytest.raises(ConfigError, match=r"is no file of .*owner/x-GGUF; there are a\.gguf, b\.gguf"):
        check_model("owner/x-GGUF/c.gguf")


def test_a_cache_that_cannot_be_written_fails_no_run(tmp_path, monkeypatch, capfd):
    path = write_gguf(tmp_path / "model.gguf")
    expected = logits(load_reasoner(str(path)).model)
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVLIB_CACHE", str(tmp_path / "file"))
    passing = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else None
    assert torch.equal(logits(load_reasoner(str(path)).model), expected)
    assert load_tokenizer(str(path)).encode("ab") == (260,)
    assert "is converted in memory" in capfd.readouterr().out
    assert passing is None or sorted(os.listdir("/dev/shm")) == passing


def test_the_cache_is_listed_and_emptied_by_a_command(tmp_path, cache):
    load_reasoner(str(write_gguf(tmp_path / "model.gguf")))
    command = [sys.executable, "-m", "kvlib.gguf"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "float32-1 0.00 GB" in listed and any(cache.iterdir())
    subprocess.run([*command, "--clean"], check=True, stdout=subprocess.DEVNULL)
    assert not [folder for folder in cache.iterdir() if folder.is_dir()]
