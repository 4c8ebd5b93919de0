"""A folder whose weights are not its model's is refused by name, from the headers; what is harmless still loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import MODELS, r1_tokenizer, save_model

from kvlib.checkpoint import damaged_file, headers
from kvlib.errors import ConfigError
from kvlib.models import TINY, check_model, load_reasoner, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LOST = "model.layers.1.mlp.down_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(folder, change) -> str:
    """Save the folder's weights anew, as `change` returns them."""
    content = {name: tensor.clone() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
    save_file(content, folder / WEIGHTS, {"format": "pt"})
    return str(folder)


def reconfigure(folder, **settings) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


def prefixed(prefix: str):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without(lost: str):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name != lost}


def with_more(**more):
    return lambda weights: weights | {name.replace("__", "."): torch.ones(n) for name, n in more.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(LOST), f"1 missing ({LOST})"),
        (without("model.norm.weight"), "1 missing (model.norm.weight)"),
        (without("model.layers.0.self_attn.q_proj.bias"), "1 missing (model.layers.0.self_attn.q_proj.bias)"),
        (without(HEAD), "1 missing (lm_head.weight)"),
        (prefixed("_orig_mod."), "27 missing"),
        (prefixed("module."), "27 missing"),
        (prefixed("base_model.model."), "27 missing"),
        (lambda weights: {**weights, LOST: weights[LOST][:-1]}, f"1 of another shape ({LOST})"),
        (lambda weights: {**weights, EMBEDDING: weights[EMBEDDING][:9]}, "1 of another shape"),
        (with_more(model__layers__0__self_attn__q_norm__weight=6), "1 not the model's (model.layers.0.self_attn.q_n"),
        (with_more(model__layers__2__mlp__up_proj__weight=6), "1 not the model's (model.layers.2"),
        (with_more(lm_head__bias=262), "1 not the model's (lm_head.bias)"),
        (lambda weights: {**weights, LOST: weights[LOST].to(torch.int8)}, f"weights as integers ({LOST}: I8)"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_configs_are_refused_from_the_headers(change, says, tmp_path):
    name = rewrite(save_model(tmp_path), change)
    for look in (check_model, load_tokenizer, load_reasoner):
        with pytest.raises(ConfigError) as refused:
            look(name)
        assert says in str(refused.value) and "\n" not in str(refused.value)


def test_more_or_fewer_layers_than_the_file_has_are_refused(tmp_path):
    folder = save_model(tmp_path)
    with pytest.raises(ConfigError, match=r"12 missing .model\.layers\.2"):
        check_model(reconfigure(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3))
    with pytest.raises(ConfigError, match=r"12 not the model's .model\.layers\.1"):
        check_model(reconfigure(folder, num_hidden_layers=1, layer_types=["full_attention"]))
    with pytest.raises(ConfigError, match="of another shape"):
        check_model(reconfigure(folder, num_hidden_layers=2, layer_types=["full_attention"] * 2, hidden_size=168))
    reconfigure(folder, hidden_size=84)
    check_model(str(folder))
    with pytest.raises(ConfigError, match=r"could not be made of its config.json \(KeyError: 'yarnn'"):
        check_model(reconfigure(folder, rope_parameters={"rope_type": "yarnn", "rope_theta": 1e4}))


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name.removeprefix("model."): tensor for name, tensor in weights.items()},
        with_more(model__layers__0__self_attn__rotary_emb__inv_freq=3, model__rotary_emb__inv_freq=3),
        with_more(visual__blocks__0__attn__qkv__weight=3, vision_tower__norm__bias=3),
        lambda weights: {name: tensor.half() for name, tensor in weights.items()},
    ],
    ids=["names of the base model", "frequencies of old checkpoints", "another tower", "half precision"],
)
def test_what_is_harmless_loads_as_before(change, tmp_path):
    folder = save_model(tmp_path / "model")
    expected = load_reasoner(str(folder)).model.state_dict()
    found = load_reasoner(rewrite(shutil.copytree(folder, tmp_path / "other"), change)).model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [LOST, EMBEDDING, "model.layers.0.input_layernorm.weight"])
def test_a_weight_that_is_no_number_is_refused_at_load(name, value, tmp_path):
    def spoil(weights):
        weights[name].view(-1)[3] = value
        return weights

    folder = rewrite(save_model(tmp_path), spoil)
    for dtype in ("float32", "bfloat16", "float64"):
        with pytest.raises(ConfigError, match=rf"not all finite numbers \({name}\)"):
            load_reasoner(folder, dtype)


def test_a_tied_head_that_differs_in_the_file_is_refused(tmp_path):
    folder = save_model(tmp_path, "llama")
    name = rewrite(folder, lambda weights: weights | {HEAD: weights[EMBEDDING]})
    assert load_reasoner(name, "bfloat16").model.lm_head.weight.shape == (262, 40)
    rewrite(folder, lambda weights: weights | {HEAD: weights[EMBEDDING] + 1})
    with pytest.raises(ConfigError, match=r"a head of its own in model\.safetensors and a config\.json that ties it"):
        load_reasoner(name)
    rewrite(folder, lambda weights: {HEAD: weights[EMBEDDING]} | without(EMBEDDING)(weights))
    load_reasoner(name)  # the head alone is the embedding too


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "no-such"])
def test_quantised_folders_are_a_sentence(method, tmp_path):
    name = reconfigure(
        save_model(tmp_path), quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True}
    )
    for look in (check_model, load_reasoner):
        with pytest.raises(
            ConfigError, match=rf"is quantised \({method}\), which kvlib does not decode; use"
        ) as refused:
            look(name)
        assert "\n" not in str(refused.value)


def test_an_adapter_is_not_taken_for_the_model_it_adapts(tmp_path):
    folder = save_model(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter; merge it"):
        check_model(str(folder))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: LFS, "is a Git LFS pointer"),
        (lambda whole: whole[: len(whole) // 2], "is damaged"),
        (lambda whole: whole[:5], "is damaged"),
        (lambda whole: whole[:-2], "is damaged"),
        (lambda whole: b"<!DOCTYPE html><html>not found</html>", "is damaged"),
    ],
    ids=["empty", "pointer", "half", "head", "end", "html"],
)
def test_files_that_are_not_whole_are_named(file, spoil, says, tmp_path):
    folder = save_model(tmp_path)
    check_model(str(folder))
    (folder / file).write_bytes(spoil((folder / file).read_bytes()))
    for look in (check_model, load_tokenizer, load_reasoner):
        with pytest.raises(ConfigError, match=f"{file} {says}") as refused:
            look(str(folder))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_folder_where_a_file_must_be_is_a_file_that_is_missing(file, tmp_path):
    folder = save_model(tmp_path)
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(ConfigError, match=f"lacks {file}"):
        check_model(str(folder))


def test_one_cut_shard_among_whole_ones_is_named(tmp_path):
    folder = save_model(tmp_path, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    check_model(str(folder))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=rf"{shard.name} is damaged \(incomplete metadata"):
        check_model(str(folder))


@pytest.mark.parametrize("index", ["", "{", "[]", '{"weight_map": []}', "{}"])
def test_an_index_that_cannot_be_read_is_named(index, tmp_path):
    folder = save_model(tmp_path, max_shard_size="20KB")
    (folder / INDEX).write_text(index)
    with pytest.raises(ConfigError, match=f"a readable {INDEX}"):
        check_model(str(folder))


def test_headers_are_read_as_safetensors_writes_them(tmp_path):
    save_file(
        {"a": torch.ones(2, 3), "b": torch.ones(()), "c": torch.ones(0, 4)}, tmp_path / "x.safetensors", {"k": "v"}
    )
    assert headers(tmp_path / "x.safetensors") == {"a": ((2, 3), "F32"), "b": ((), "F32"), "c": ((0, 4), "F32")}
    for content in (b"\x02" + b"\0" * 7 + b"[]", b"\x0f" + b"\0" * 7 + b'{"a": {"b": 1}}', b"\xff" * 20):
        (tmp_path / WEIGHTS).write_bytes(content)
        assert "model.safetensors is damaged" in damaged_file(tmp_path)


def test_the_shipped_model_and_each_family_are_sound(tmp_path):
    check_model("tiny")
    assert damaged_file(TINY) is None
    for family in MODELS:
        check_model(str(save_model(tmp_path / family, family)))


def test_words_without_a_token_are_named(tmp_path):
    tiny = load_tokenizer("tiny")
    question = "so m 8 ; m ? <think>"
    assert len(tiny.encode(question)) == 7
    told = "has no token for 'How', 'are', 'many'; ask in its words, or choose a dataset in them"
    with pytest.raises(ConfigError, match=told):
        tiny.encode_problem("How many are m ?")
    r1_tokenizer().save_pretrained(save_model(tmp_path))
    assert load_tokenizer(str(tmp_path)).encode("Zoë, 日本?")
