"""The decode step reads the model's own weights, once each, and is the model's own step."""

import pytest
import torch
from conftest import as_requests, decode, prompts, small_policy
from torch import nn

from kvlib.engine import linear
from kvlib.engine.decoder import Decoder, Request, decoder_for
from kvlib.engine.linear import fuse
from kvlib.engine.sampling import Sampling
from kvlib.invariants import random_model
from kvlib.models import FAMILIES
from kvlib.policies import Full


def test_fused_weights_are_the_models_own_storage():
    linears = [nn.Linear(6, n) for n in (4, 2, 3)]
    before = [linear.weight.clone() for linear in linears]
    fused = fuse(*linears)
    torch.testing.assert_close(fused.weight, torch.cat(before), rtol=0, atol=0)
    with torch.no_grad():
        linears[1].weight.fill_(7.0)
        linears[2].bias.fill_(5.0)
    assert (fused.weight[4:6] == 7.0).all() and (fused.bias[6:] == 5.0).all()
    assert fuse(*linears).weight.data_ptr() == fused.weight.data_ptr(), "a second call copies nothing"


@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_product(bias, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    torch.manual_seed(0)
    linears = [nn.Linear(37, n, bias=bias) for n in (64, 5, 1)]
    packed = fuse(*linears)
    assert packed.weight.is_mkldnn == linear.PACKS
    for n_rows in (1, 3, 8, 64):
        x = torch.randn(n_rows, 37)
        expected = torch.cat([linear(x) for linear in linears], -1)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-6)


def test_only_large_float32_weights_on_a_cpu_that_can_are_packed(monkeypatch):
    """A small weight would gain nothing, and another order of sums would change what was measured with it."""
    large = nn.Linear(512, linear.PACKED_FROM // 2048)
    assert not fuse(nn.Linear(512, linear.PACKED_FROM // 2048 - 1)).weight.is_mkldnn
    assert fuse(large).weight.is_mkldnn == linear.PACKS
    assert not fuse(nn.Linear(512, linear.PACKED_FROM // 2048, device="meta")).weight.is_mkldnn
    monkeypatch.setattr(linear, "PACKS", False)
    assert not fuse(large).weight.is_mkldnn
    monkeypatch.undo()
    assert not fuse(large.bfloat16()).weight.is_mkldnn and not fuse(large.double()).weight.is_mkldnn


@pytest.mark.skipif(not linear.PACKS, reason="nothing is packed on this machine")
def test_a_model_is_packed_once_and_again_when_its_weights_change(monkeypatch):
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    linears = [nn.Linear(6, n, bias=False) for n in (4, 2)]
    packed = fuse(*linears).weight
    assert fuse(*linears).weight is packed
    with torch.no_grad():
        linears[1].weight.fill_(7.0)
    assert (fuse(*linears)(torch.ones(1, 6))[0, 4:] == 42.0).all()


@pytest.mark.skipif(not linear.PACKS, reason="nothing is packed on this machine")
def test_packing_leaves_the_models_weights_where_they_are(monkeypatch):
    """Those mapped from a file stay so, and need no memory of their own."""
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    model = random_model("qwen2").float()
    before = {name: part.data_ptr() for name, part in model.named_parameters() if name.endswith("weight")}
    decoder = decoder_for(model, Full(), None, as_requests(prompts(1)), max_new_tokens=2)
    assert before == {name: part.data_ptr() for name, part in model.named_parameters() if name.endswith("weight")}
    decoder.close()


def test_a_step_over_packed_weights_is_the_same_step(monkeypatch):
    model, requests = random_model("qwen2").float(), as_requests(prompts(3))

    def decoder() -> Decoder:
        longest = max(len(request.prompt) for request in requests)
        made = Decoder(
            model, Full(), None, n_rows=3, n_prompt_max=longest, max_new_tokens=9, sampling=Sampling(0.0), eos_ids=()
        )
        for row, request in enumerate(requests):
            made.admit(row, request)
        return made

    plain = decoder()
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    packed = decoder()
    assert packed.model.head.weight.is_mkldnn == linear.PACKS
    for _ in range(8):
        packed.token.copy_(plain.token)
        plain.step()
        packed.step()
        torch.testing.assert_close(packed.logits, plain.logits, rtol=1e-4, atol=1e-4)


def test_the_memory_of_the_matrices_that_were_fused_is_given_back(monkeypatch):
    """On CUDA up to 8.5 GB of R1-Llama's stay cached otherwise."""
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    decoder_for(random_model("qwen2"), Full(), None, [Request("", (1, 2), 0)], max_new_tokens=2)
    assert given_back == [True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_whose_weights_were_fused_decodes_and_saves_as_before(family, tmp_path):
    fused, plain = random_model(family), random_model(family)
    requests = as_requests(prompts(2))
    done = decode(fused, small_policy("full"), None, requests, n_rows=2)
    for request in requests:
        ids = torch.tensor([request.prompt])
        for model in (fused, plain):
            model.set_attn_implementation("eager")
            made = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=40, do_sample=False)[
                0, ids.shape[1] :
            ]
            assert made.tolist() == list(done[request.id].tokens)
    fused.save_pretrained(tmp_path)
    again = type(fused).from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
