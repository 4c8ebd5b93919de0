"""The decode step reads the model's own weights, once each, and is the model's own step."""

import pytest
import torch
from conftest import as_requests, decode, prompts, small_policy
from torch import nn

from kvlib.errors import ConfigError
from kvlib.invariants import FAMILIES, random_model
from kvlib.layers import DecodeLayers, fuse


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


def test_linears_of_which_some_have_a_bias_are_refused():
    with pytest.raises(ConfigError, match="bias"):
        fuse(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))


def test_another_activation_is_refused():
    model = random_model("llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match="gelu"):
        DecodeLayers(model)


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
