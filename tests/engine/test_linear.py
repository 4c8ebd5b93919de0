"""Products in 8-bit integers: near the float ones, exact sums, and a choice that is refused where it cannot be had."""

import copy

import pytest
import torch
from conftest import as_requests, decode, prompts, small_policy
from torch import nn
from transformers import AutoModelForCausalLM

import kvlib
from kvlib.cell import prepare
from kvlib.config import RunConfig
from kvlib.engine import linear
from kvlib.engine.fast import why_not_fast
from kvlib.engine.linear import Int8Linear, fuse, to_int8
from kvlib.errors import ConfigError
from kvlib.invariants import random_model

needs_onednn = pytest.mark.skipif(not linear.PACKS, reason="8-bit products are of x86 with oneDNN")


def int8_model(family: str) -> nn.Module:
    model = random_model(family).float()
    to_int8(model)
    return model


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_within_five_percent_whatever_the_size_of_weights_and_inputs(bias):
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        plain.weight *= torch.logspace(-6, 3, 48)[:, None]
    x = torch.randn(9, 64) * torch.logspace(-6, 3, 9)[:, None]
    bias_of = 0 if plain.bias is None else plain.bias
    error = Int8Linear.of(plain)(x) - plain(x)
    assert (error.norm(dim=1) < 0.05 * (plain(x) - bias_of).norm(dim=1) + 1e-6).all()
    assert Int8Linear.of(plain)(torch.zeros(2, 64)).equal(plain(torch.zeros(2, 64))), "nothing but the bias"


@needs_onednn
def test_a_row_does_not_depend_on_the_rows_beside_it():
    torch.manual_seed(0)
    product, x = Int8Linear.of(nn.Linear(96, 32)), torch.randn(20, 96)
    whole = product(x)
    for n in (1, 3, 20):
        assert product(x[:n]).equal(whole[:n])
    assert product(x.view(4, 5, 96)).equal(whole.view(4, 5, 32))


@needs_onednn
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_products_of_one_input_are_one_without_a_change(biases):
    torch.manual_seed(0)
    holder = nn.Module()
    for name, n, bias in zip("qkv", (16, 8, 8), biases, strict=True):
        setattr(holder, f"{name}_proj", nn.Linear(32, n, bias=bias))
    apart = [Int8Linear.of(part) for part in holder.children()]
    x = torch.randn(3, 32)
    expected = [part(x) for part in apart]
    to_int8(holder)
    parts = list(holder.children())
    assert all(part(x).equal(its) for part, its in zip(parts, expected, strict=True))
    assert fuse(*parts)(x).equal(torch.cat(expected, -1)) and fuse(*parts) is fuse(*parts)
    assert fuse(apart[0]) is apart[0]


@needs_onednn
def test_an_int8_model_holds_its_weights_once_and_nothing_of_the_file(tmp_path):
    """Plain weights beside those that oneDNN reads, or pages of the float file, would double its memory."""
    model = random_model("qwen2").float()
    model.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    places = {part.untyped_storage().data_ptr() for part in mapped.parameters()}
    to_int8(mapped)
    left = dict(mapped.named_parameters())
    assert not places & {part.untyped_storage().data_ptr() for part in left.values()}
    assert {name.split(".")[-2] for name in left if left[name].dim() > 1} == {"embed_tokens"}
    assert all(tensor.dtype != torch.int8 for tensor in mapped.state_dict().values())


@needs_onednn
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_int8_model_decodes_a_row_as_alone_and_is_as_it_was(family):
    model = int8_model(family)
    assert why_not_fast(model) is None
    before = copy.deepcopy(model.state_dict())
    requests = as_requests(prompts(4))
    together = decode(model, small_policy("window"), 12, requests, n_rows=4)
    for request in requests:
        alone = decode(model, small_policy("window"), 12, [request], n_rows=1)
        assert alone[request.id].tokens == together[request.id].tokens
    after = model.state_dict()
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


@needs_onednn
def test_prefill_and_step_of_an_int8_model_are_its_own_forward():
    model = int8_model("qwen2")
    prompt = prompts(1)[0]
    made = decode(model, small_policy("full"), None, as_requests([prompt]), n_rows=1)
    (done,) = made.values()
    ids = torch.tensor([[*prompt, *done.tokens[:-1]]])
    assert model(ids).logits[0, len(prompt) - 1 :].argmax(-1).tolist() == list(done.tokens)


@needs_onednn
def test_the_tiny_reasoner_says_nearly_the_same_in_int8():
    full = [kvlib.load_model("tiny", dtype) for dtype in ("float32", "int8")]
    ids = list(full[0].encode(full[0].tokenizer.decode(list(range(8, 40)))))
    logits = [one.model(torch.tensor([ids])).logits[0] for one in full]
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() > 0.9


def test_int8_is_refused_where_it_cannot_be_had(monkeypatch):
    with pytest.raises(ConfigError, match="dtype 'int8' is of x86"):
        prepare(RunConfig(dataset="chain-a", policy="full", dtype="int8", device="cuda"))
    with pytest.raises(ConfigError, match="bfloat16"):
        kvlib.load_model("tiny", "int8", "cuda")
    monkeypatch.setattr(linear, "PACKS", False)
    with pytest.raises(ConfigError, match=r"x86.*float32"):
        kvlib.load_model("tiny", "int8")
