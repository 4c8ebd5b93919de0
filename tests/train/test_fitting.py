"""fit makes what a preset needs from texts and a model object loaded the ordinary way, which stays as it was."""

import pytest
import torch
from conftest import as_requests, decode
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlib.errors import ConfigError
from kvlib.fitted import FITTED, check_fitted, fill, load_fitted
from kvlib.models import TINY, load_reasoner, weights_sha256
from kvlib.policies import make_policy
from kvlib.train.fitting import fit

TEXTS = ["a b +3 ; so a 2 ; b c +a ; c ? <think> so a 2 . use b a +3 so b 5 . </think> ans 5 <eos>"] * 3


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    ), AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("policy", ["triattention", "trimkv", "dynts"])
def test_a_plain_model_gets_its_policy_and_stays_as_it_was(plain, policy, tmp_path):
    model, tokenizer = plain
    ids = torch.arange(20)[None]
    before, names, where = model(ids).logits, list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    model.train()
    options = {"buffer": 4, "n_recent": 8}
    made = fit(policy, model, tokenizer, TEXTS, tmp_path, **options)
    assert model.training
    model.eval()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, before)
    assert (list(model.state_dict()), [p.data_ptr() for p in model.parameters()]) == (names, where)
    (need,) = made.needs
    assert (made.buffer, made.n_recent) == (4, 8)
    # The file is the one that a study finds, for the weights that it loads, and decodes the same.
    path = tmp_path / FITTED[need].file
    again = load_fitted(need, path, weights_sha256(str(TINY)))
    assert all(torch.equal(again.state_dict()[name], part) for name, part in getattr(made, need).state_dict().items())
    reasoner, named = load_reasoner("tiny"), make_policy(policy, **options, **{need: str(path)})
    requests = as_requests([tuple(range(3, 15))])
    outputs = [
        decode(reasoner.model, one, 40, requests, 1, max_new_tokens=60, trace=True)["0"]
        for one in (made, fill(named, "tiny", reasoner), fill(made, "tiny", reasoner))
    ]
    assert outputs[0].rounds and outputs[0] == outputs[1] == outputs[2]
    assert check_fitted(made, "tiny").keys() == {need}


def test_statistics_of_a_plain_model_are_those_of_kvlibs_own(plain):
    from kvlib.train.calibration import query_statistics

    model, tokenizer = plain
    made = fit("triattention-union", model, tokenizer, TEXTS).calibration
    ours = query_statistics(load_reasoner("tiny").model, [tokenizer(TEXTS[0])["input_ids"]])
    for name, part in ours.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], part)


def test_separators_come_from_the_tokenizer(plain):
    model, tokenizer = plain
    words = tokenizer.convert_ids_to_tokens(fit("sepllm", model, tokenizer, []).separators)
    assert "." in words and ";" in words and "a" not in words


@pytest.mark.parametrize(
    ("policy", "texts", "message"),
    [
        ("rkv", TEXTS, "'rkv' needs nothing fitted"),
        ("triattention", [], "cannot be fitted to an empty text"),
        ("dynts", [TEXTS[0], "a b +3 ; so a 2"], "text 1 is no finished trace: .* the token </think>"),
        ("dynts", ["<think> so </think> ans 5"], "text 0 is no finished trace"),
        ("trimkw", TEXTS, "did you mean trimkv"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(plain, policy, texts, message):
    with pytest.raises(ConfigError, match=message):
        fit(policy, *plain, texts)


def test_a_model_without_a_name_is_fitted_and_not_written(plain, tmp_path):
    _, tokenizer = plain
    nameless = AutoModelForCausalLM.from_config(plain[0].config)
    nameless.config._name_or_path = nameless.name_or_path = ""
    assert fit("triattention", nameless, tokenizer, TEXTS).calibration
    with pytest.raises(ConfigError, match="name_or_path is empty"):
        fit("triattention", nameless, tokenizer, TEXTS, tmp_path)


def test_a_missing_fit_names_the_call_that_makes_it(tmp_path):
    with pytest.raises(ConfigError, match=r'kvlib.fit\("trimkv", model, texts, out="trimkv-gate.safete'):
        check_fitted(make_policy("trimkv"), "someone/model")
    with pytest.raises(ConfigError, match=rf'out="{tmp_path}/triattention-calibration.safetensors"'):
        check_fitted(make_policy("triattention"), str(tmp_path))
    with pytest.raises(ConfigError, match="of which a record could not say what it does"):
        check_fitted(make_policy("dynts", predictor=lambda hidden: hidden[..., 0]), "tiny")
