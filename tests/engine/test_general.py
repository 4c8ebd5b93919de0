"""The general step: equal to the fast one, right through what wraps a model, and refusing what it would get wrong."""

import copy
import dataclasses

import pytest
import torch
from conftest import as_requests, decode, prompts, reversed_heads, small_policy
from families import ALL_FULL, GPT2, LONGROPE, MLA, SLIDING, random_family
from torch import nn
from transformers import AutoTokenizer

import kvlib
from kvlib import invariants
from kvlib.cell import prepare, run
from kvlib.config import RunConfig
from kvlib.engine import attention, general
from kvlib.engine.fast import why_not_fast
from kvlib.engine.general import GeneralModel
from kvlib.engine.probe import probe
from kvlib.errors import ConfigError
from kvlib.invariants import check_policy, random_model
from kvlib.models import TINY
from kvlib.policies import PRESETS, Full, KNorm, View, make_policy


def hooked(family: str = "qwen2") -> nn.Module:
    """A plain model that the general step decodes, because of a hook that does nothing."""
    model = random_model(family)
    model.lm_head.register_forward_hook(lambda *_: None)
    assert "hook" in why_not_fast(model)
    return model


def alone(model, prompt: tuple[int, ...], n_new: int) -> tuple[int, ...]:
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())


def step_of(model, policy=None, n: int = 32) -> GeneralModel:
    return GeneralModel(model, policy or Full(), 2, n, n)


BY_NORM = {"knorm", "cur", "vase", "caote-snapkv"}
"""They score a token that repeats equally in the first layer, so that rounding decides which one stays."""


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, "qwen2") for name in PRESETS if name not in BY_NORM]
    + [(name, family) for name in ("h2o", "snapkv", "streaming-reindexed") for family in ("llama", "qwen3")],
)
def test_the_general_step_decodes_and_evicts_as_the_fast_one(name, family):
    policy, requests = small_policy(name, head_dim=8 if family == "qwen3" else 4), as_requests(prompts(3))
    kv_budget = None if name == "full" else 28
    fast, slow = (
        decode(model, policy, kv_budget, requests, n_rows=2, trace=True, max_new_tokens=30)
        for model in (random_model(family), hooked(family))
    )
    assert fast == slow and all(done.rounds or name == "full" for done in fast.values())


@pytest.mark.parametrize(
    "name", ["h2o", *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if name not in ("full", "h2o"))]
)
def test_every_preset_obeys_the_invariants_on_the_general_step(name, monkeypatch):
    monkeypatch.setattr(invariants, "random_model", hooked)
    policy = small_policy(name)
    report = check_policy(policy, permuted=reversed_heads(policy))
    assert report["holds"].all(), report[~report["holds"]].to_dict("records")


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "lfm2", "falcon_h1", "deepseek_v3", "gemma4_text, shared"])
def test_a_row_that_takes_the_next_request_starts_anew(name):
    """Rings, recurrent and convolution states are those of the new prompt."""
    model, requests = random_family(name), as_requests(prompts(5))
    done = decode(model, Full(), None, requests, n_rows=2, max_new_tokens=12)
    assert {request.id: done[request.id].tokens for request in requests} == {
        request.id: alone(model, request.prompt, 12) for request in requests
    }
    held = decode(model, make_policy("window"), 16, requests, n_rows=2, max_new_tokens=12)
    assert max(max(one.held) for one in held.values()) == 16


class Adapted(nn.Module):
    """A linear and a low-rank change of it, as adapters do it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = (nn.Linear(n, m, bias=False).double() for n, m in ((linear.in_features, 2), (2, 56)))

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj)
    return model


def doubled(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    return model


def in_int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::DeprecationWarning")
@pytest.mark.parametrize("changed", [adapted, doubled, in_int8])
def test_what_wraps_a_model_takes_part(changed):
    plain, requests = random_model("llama"), as_requests(prompts(2))
    before = {request.id: alone(plain, request.prompt, 16) for request in requests}
    model = changed(copy.deepcopy(plain))
    expected = {request.id: alone(model, request.prompt, 16) for request in requests}
    assert expected != before, "the change did not matter"
    # One row, because dynamic int8 takes its scale from all rows of a step.
    done = decode(model, Full(), None, requests, n_rows=1, max_new_tokens=16)
    assert {name: one.tokens for name, one in done.items()} == expected


@torch.inference_mode()
def test_a_model_is_as_it_was_after_a_forward_and_after_one_that_fails(monkeypatch):
    model = random_family("gpt_oss").train()
    model.config._attn_implementation = "eager"
    step = step_of(model)
    step.prefill(0, torch.tensor([1, 2, 3]))
    monkeypatch.setattr(general, "attention", None)
    with pytest.raises(TypeError):
        step.prefill(0, torch.tensor([1, 2, 3]))
    assert model.config._attn_implementation == "eager" and model.training and attention.STEP.get(None) is None


def test_a_call_from_elsewhere_finds_no_step():
    model = random_family("mistral")
    model.config._attn_implementation = attention.IMPLEMENTATION
    with pytest.raises(RuntimeError, match="decoding with this model at this moment"):
        model(torch.tensor([[1, 2]]))


@torch.inference_mode()
def test_a_long_prompt_is_read_in_blocks(monkeypatch):
    model, prompt = random_family("gemma3_text"), torch.arange(30)
    policy = make_policy("h2o", buffer=2)
    whole, parts = step_of(model, policy), step_of(model, policy)
    expected = whole.prefill(1, prompt)[1]
    monkeypatch.setattr(general, "QUERIES_AT_ONCE", 7)
    torch.testing.assert_close(parts.prefill(1, prompt)[1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.cache.state["mass"], whole.cache.state["mass"])


def test_bytes_are_reported_by_kind_of_layer():
    held = step_of(random_family("gemma3_text", num_hidden_layers=4, layer_types=SLIDING["layer_types"] * 2)).nbytes()
    assert held["full_attention"] == 2 * 2 * 2 * 32 * (8 + 8) * 8 + 4 * 2 * 32  # layers, rows, heads, slots, K and V
    assert (held["sliding_attention"], held["state"]) == (2 * 2 * 2 * 8 * (8 + 8) * 8, 0)
    held = step_of(random_family("lfm2")).nbytes()
    assert (held["sliding_attention"], held["state"]) == (0, 2 * 32 * 3 * 8)


def changes_at(n: int) -> dict:
    """LongRoPE that takes other factors beyond n tokens."""
    return {"rope_parameters": LONGROPE, "original_max_position_embeddings": n}


REFUSED = {
    "mistral": ({"sliding_window": 8}, "no layer attends to all tokens"),
    "mamba": ({"state_size": 8}, "no layer attends to all tokens"),
    "llama4_text": ({"layer_types": ["chunked_attention", "full_attention"]}, "layers of type chunked_attention"),
    "deepseek_v32": (MLA, "layers of type indexed_attention"),
    "doge": ({}, "a mask of its own"),
    "bloom": (GPT2, "an attention that transformers lets nobody set"),
    "falcon": ({"head_dim": ...}, "an attention that transformers lets nobody set"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "an attention that transformers lets nobody set"),
    "gptj": (GPT2 | {"rotary_dim": 4}, "an attention that transformers lets nobody set"),
    "minimax": ({"layer_types": ["linear_attention", "full_attention"]}, "uses cache of its own"),
    "bert": ({"is_decoder": False}, "decodes in another way through kvlib than alone"),
    "gpt2": (GPT2 | {"n_positions": 8, "max_position_embeddings": 8}, "no positions beyond 8 tokens"),
    "phi3": (ALL_FULL | changes_at(8), "another RoPE beyond 8 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_decodes_in_a_way_of_its_own_is_refused(name):
    given, reason = REFUSED[name]
    model = random_family(name, **given)
    with pytest.raises(ConfigError, match=reason):
        probe(model)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma2", "gpt2", "phi3, longrope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_passes_what_decodes_as_alone(name, dtype):
    probe(random_family(name, dtype, **(ALL_FULL | changes_at(12) if name == "phi3, longrope" else {})))


@pytest.mark.parametrize("forgotten", [{"softcap": None}, {"scaling": 1.0}])
def test_the_probe_sees_what_an_attention_forgets(forgotten, monkeypatch):
    model, right = random_family("gemma2"), general.attention
    probe(model)

    def forgetful(query, key, value, visible, scoring):
        return right(query, key, value, visible, dataclasses.replace(scoring, **forgotten))

    monkeypatch.setattr(general, "attention", forgetful)
    with pytest.raises(ConfigError, match="decodes in another way through kvlib than alone"):
        probe(model)


def test_the_probe_sees_a_dead_slot_that_is_read(monkeypatch):
    model, right = random_family("qwen2"), general.attention

    def blind(query, key, value, visible, scoring):
        return right(query, key, value, visible | (query.shape[2] == 1), scoring)

    monkeypatch.setattr(general, "attention", blind)
    with pytest.raises(ConfigError, match="decodes in another way through kvlib than alone"):
        probe(model)


def test_the_one_call_decodes_a_family_and_refuses_what_decodes_wrongly():
    model, prompt = random_family("gpt_oss"), prompts(1)[0]
    done = kvlib.generate(model, prompt, policy="full", kv_budget=None, max_new_tokens=12, temperature=0.0)
    assert done.tokens == alone(model, prompt, 12)
    with pytest.raises(ConfigError, match="decodes in another way"):
        kvlib.generate(random_family("bert", is_decoder=False), prompt, max_new_tokens=12, temperature=0.0)


def test_the_plan_and_the_record_say_which_step_decodes(tmp_path):
    tiny = RunConfig(model="tiny", n_problems=1, max_new_tokens=8, kv_budget=None, policy="full")
    assert prepare(tiny).step == "fast step"
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    for name, given in (("lfm2", {}), ("mistral", {"sliding_window": 8})):
        random_family(name, torch.float32, **ends, **given).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    config = dataclasses.replace(tiny, model=str(tmp_path / "lfm2"))
    assert prepare(config).step.startswith("general step (the model is a Lfm2ForCausalLM)")
    cost = run(config, tmp_path / "run")["cost"]
    assert (cost["step"], cost["kv_bytes"]) == ("general", cost["bytes_by_layer"]["full_attention"])
    assert cost["bytes_by_layer"]["state"] == config.batch_size * 32 * 3 * 4
    with pytest.raises(ConfigError, match="no layer attends to all tokens, so there is nothing to evict"):
        prepare(dataclasses.replace(tiny, model=str(tmp_path / "mistral")))


@pytest.mark.parametrize("name", ["lfm2", "gemma2", "gpt_oss"])
def test_no_trace_is_observed_of_what_an_observer_would_not_see(name):
    with pytest.raises(ConfigError, match="observe traces of models that do not"):
        attention.observe_trace(random_family(name), [1, 2, 3], lambda *_: None)
    attention.observe_trace(random_family("olmo2"), [1, 2, 3], lambda *_: None)


@pytest.mark.parametrize(
    ("family", "policy", "reason"),
    [
        ("deepseek_v3", KNorm(), "KNorm cannot score deepseek_v3: it tells heads apart"),
        ("deepseek_v3", small_policy("snapkv"), "tells heads apart"),
        ("deepseek_v3", small_policy("h2o"), None),
        ("diffllama", make_policy("random"), "tells heads apart"),
        ("diffllama", make_policy("random", share="layer"), None),
        ("diffllama", small_policy("h2o"), "tells heads apart"),
        ("jetmoe", small_policy("h2o"), "does not read each slot once by the query heads of its group"),
        ("jetmoe", KNorm(), None),
        ("gemma4_text, shared", small_policy("h2o"), "does not read each slot once"),
        ("gpt2", make_policy("streaming-reindexed"), "turns keys or queries by RoPE"),
        ("smollm3", small_policy("expected"), "turns keys or queries by RoPE"),
        ("glm4", small_policy("expected"), "turns keys or queries by RoPE"),
        ("gpt2", small_policy("h2o"), None),
        ("gemma3_text", small_policy("expected"), None),
        ("gemma2", small_policy("snapkv"), None),
    ],
)
def test_a_policy_that_cannot_score_a_family_says_so(family, policy, reason):
    model = random_family(family)
    if reason is None:
        step_of(model, policy)
    else:
        with pytest.raises(ConfigError, match=reason):
            step_of(model, policy)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "full"])
def test_what_a_policy_says_that_it_reads_is_what_it_reads(name, qwen2, monkeypatch):
    read = set()

    policy, own = small_policy(name), View.__getattribute__
    monkeypatch.setattr(View, "__getattribute__", lambda view, field: (read.add(field), own(view, field))[1])
    decode(qwen2, policy, 28, as_requests(prompts(1)), n_rows=1, max_new_tokens=30)
    assert policy.reads_rope == ("inv_freq" in read)
    assert policy.reads_heads or not read & {"keys", "values", "queries"}
