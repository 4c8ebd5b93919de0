"""One call on a model that one has: generate's own tokens, under a budget the policy's, and nothing left behind."""

import copy
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import prompts, small_policy
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.activations import ACT2FN
from transformers.generation import MinLengthLogitsProcessor

import kvlib
from kvlib import api
from kvlib.engine import fast, linear
from kvlib.errors import ConfigError
from kvlib.invariants import SHAPE, random_model
from kvlib.models import FAMILIES
from kvlib.policies import PRESETS, Window
from kvlib.policies.h2o import H2O

EVICTING = [name for name, preset in PRESETS.items() if getattr(preset, "func", preset).evicts]
N = 30
PROMPTS = [list(prompt) for prompt in prompts(5)]


def ordinary(family: str = "qwen2", dtype: torch.dtype = torch.float64, implementation: str = "sdpa") -> nn.Module:
    model = random_model(family).to(dtype)
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(scope="module")
def model():
    return ordinary()


@pytest.fixture(scope="module")
def tokenizer():
    """Words w0 .. w63, split at white space, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w1")
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
    )
    return made


def alone(model, prompt: list[int], n: int = N, **settings) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **settings)
    return made[0, len(prompt) :].tolist()


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    P = max(map(len, rows))
    pads = [[0] * (P - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    seen = [[0] * len(pad) + [1] * len(row) for row, pad in zip(rows, pads, strict=True)]
    seen = seen if side == "left" else [row[::-1] for row in seen]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_room_for_all_it_is_generate_token_for_token(family, implementation):
    model = ordinary(family, implementation=implementation)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    for policy in ("full", "window", "h2o", small_policy("rkv")):
        made = kvlib.generate(model, PROMPTS, policy=policy, max_new_tokens=N, n_rows=3)
        assert [list(one.tokens) for one in made] == expected
        assert {one.stop for one in made} == {"length"} and all(len(one.held) == N for one in made)
    for side in ("left", "right"):
        batch = kvlib.generate(model, padded(PROMPTS, side), policy="window", max_new_tokens=N)
        assert [list(one.tokens) for one in batch] == expected, side
    inputs = padded(PROMPTS, "left")
    model.set_attn_implementation("sdpa")  # transformers' eager attention makes NaN of padding in float64
    whole = model.generate(**inputs, max_new_tokens=N)
    model.set_attn_implementation(implementation)
    ours = model.generate(**inputs, max_new_tokens=N, custom_generate=kvlib.custom_generate(policy="window"))
    assert torch.equal(ours, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes_it_decodes_as_a_model_that_kvlib_loaded(dtype):
    made = [
        kvlib.generate(
            ordinary(dtype=dtype, implementation=implementation), PROMPTS, policy="h2o", kv_budget=20, max_new_tokens=N
        )
        for implementation in ("eager", "sdpa", "kvlib")
    ]
    assert made[0] == made[1] == made[2]


def test_an_end_of_sequence_ends_and_pads_as_in_generate(model):
    eos = alone(model, PROMPTS[0])[11]
    inputs = padded(PROMPTS, "left")
    for eos_ids in (eos, [eos, 63]):
        expected = model.generate(**inputs, max_new_tokens=N, eos_token_id=eos_ids, pad_token_id=0)
        entry = kvlib.custom_generate(policy="window")
        ours = model.generate(**inputs, max_new_tokens=N, eos_token_id=eos_ids, pad_token_id=0, custom_generate=entry)
        assert torch.equal(ours, expected)
        made = kvlib.generate(model, PROMPTS, policy="window", max_new_tokens=N, eos_ids=eos_ids)
        assert [list(one.tokens) for one in made] == [
            alone(model, p, eos_token_id=eos_ids, pad_token_id=0) for p in PROMPTS
        ]
        assert made[0].stop == "eos" and len(made[0].tokens) == 12


def test_window_is_transformers_sliding_window():
    budget = 9
    settings = {**SHAPE, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Qwen2ForCausalLM(Qwen2Config(**settings)).double().eval()
    sliding = Qwen2Config(**settings, use_sliding_window=True, sliding_window=budget + 1, max_window_layers=0)
    reference = Qwen2ForCausalLM(sliding).double().eval()
    reference.load_state_dict(plain.state_dict())
    for implementation in ("eager", "sdpa"):
        reference.set_attn_implementation(implementation)
        short = [prompt[:budget] for prompt in PROMPTS]
        made = kvlib.generate(plain, short, policy="window", kv_budget=budget, max_new_tokens=N)
        assert [list(one.tokens) for one in made] == [alone(reference, prompt) for prompt in short]
        assert max(max(one.held) for one in made) == budget
    assert [list(one.tokens) for one in made] != [alone(plain, prompt) for prompt in short]


@pytest.mark.parametrize("name", EVICTING)
def test_under_a_budget_a_row_of_a_batch_is_the_row_alone(model, name):
    settings = {"policy": small_policy(name), "kv_budget": 28, "max_new_tokens": 40, "trace": True}
    settings |= {"temperature": 1.0, "seed": 3}
    together = kvlib.generate(model, PROMPTS, n_rows=3, **settings)
    assert all(one.kept and max(one.held) == 28 for one in together)
    assert kvlib.generate(model, PROMPTS[1], **settings) == together[1]
    assert kvlib.generate(model, PROMPTS[4:2:-1], **settings) == together[4:2:-1], "and calls share no state"


def test_thirty_two_prompts_on_eight_rows_come_in_order(model):
    many = [list(prompt) for prompt in prompts(32, seed=4)]
    made = kvlib.generate(model, many, policy="window", max_new_tokens=8, n_rows=8)
    assert [list(one.tokens) for one in made] == [alone(model, prompt, 8) for prompt in many]


def test_samples_differ_repeat_by_seed_and_come_by_prompt(model):
    settings = {"policy": "window", "max_new_tokens": 12, "temperature": 1.0}
    made = kvlib.generate(model, PROMPTS[:2], n_samples=3, **settings)
    assert [len(samples) for samples in made] == [3, 3]
    assert len({one.tokens for samples in made for one in samples}) == 6
    assert kvlib.generate(model, PROMPTS[1], n_samples=3, n_rows=2, **settings) == made[1]
    assert kvlib.generate(model, PROMPTS[1], **settings) == made[1][0]
    assert kvlib.generate(model, PROMPTS[1], seed=1, **settings) != made[1][0]
    twice = kvlib.generate(model, [PROMPTS[0]] * 2, **settings)
    assert twice == made[0][:2], "a prompt asked twice is two samples of it"


def test_prompts_of_every_form_are_the_same_prompt(model, tokenizer):
    ids, text = [5, 9, 33], "w5 w9 w33"
    settings = {"policy": "window", "max_new_tokens": 6, "tokenizer": tokenizer}
    one = kvlib.generate(model, text, **settings)
    assert one.text == "".join(f"w{i}" for i in one.tokens)
    for single in (ids, torch.tensor(ids), tuple(ids), list(np.array(ids)), tokenizer(text)):
        assert kvlib.generate(model, single, **settings) == one
    for several in (
        [text, ids],
        torch.tensor([ids, ids]),
        tokenizer([text, text]),
        tokenizer([text] * 2, return_tensors="pt"),
    ):
        assert kvlib.generate(model, several, **settings) == [one, kvlib.generate(model, [text] * 2, **settings)[1]]
    chat = [{"role": "user", "content": text}]
    last = one.tokens[2]
    for eos in (last, torch.tensor(last), np.array([last]), list(np.array([last]))):
        ended = kvlib.generate(model, text, eos_ids=eos, **settings)
        assert ended.tokens == one.tokens[: one.tokens.index(last) + 1] and ended.stop == "eos"
    asked = kvlib.generate(model, [*ids, 7], **settings)
    assert kvlib.generate(model, chat, **settings) == asked
    assert kvlib.generate(model, [chat], **settings) == [asked]


def test_the_tokenizer_is_looked_for_where_the_model_came_from(tokenizer, tmp_path):
    ordinary("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"policy": "window", "max_new_tokens": 6}
    bare = kvlib.generate(model, [5, 9, 33], **settings)
    assert bare.text is None, "ids need no tokenizer"
    with pytest.raises(ConfigError, match=r"there is no tokenizer in .*, where the model came from; pass tokenizer="):
        kvlib.generate(model, "w5 w9 w33", **settings)
    tokenizer.save_pretrained(tmp_path)
    made = kvlib.generate(model, "w5 w9 w33", **settings)
    assert made.tokens == bare.tokens and made.text == "".join(f"w{i}" for i in made.tokens)


def test_stop_strings_end_a_sample_and_a_stream_tells_all_of_its_text(model, tokenizer):
    settings = {"policy": "window", "max_new_tokens": N, "tokenizer": tokenizer}
    free = kvlib.generate(model, PROMPTS, **settings)
    stop = f"w{free[2].tokens[9]}w{free[2].tokens[10]}"
    told = [""] * len(PROMPTS)

    def tell(i: int, piece: str) -> None:
        told[i] += piece

    made = kvlib.generate(model, PROMPTS, stop_strings=["never", stop], stream=tell, n_rows=2, **settings)
    assert told == [one.text for one in made]
    for one, before in zip(made, free, strict=True):
        cut = before.text.find(stop)
        assert one.text == (before.text if cut < 0 else before.text[: cut + len(stop)])
        assert one.stop == ("length" if cut < 0 else stop) and one.tokens == before.tokens[: len(one.tokens)]
    assert made[2].stop == stop
    special = free[2].tokens[12]
    with_special = copy.deepcopy(tokenizer)
    with_special.add_special_tokens({"additional_special_tokens": [f"w{special}"]})
    settings["tokenizer"] = with_special
    once = kvlib.generate(model, PROMPTS[2], stop_strings=f"w{special}", **settings)
    first = free[2].tokens.index(special) + 1
    assert (once.tokens, once.stop) == (free[2].tokens[:first], f"w{special}"), (
        "a token that text leaves out ends it too"
    )
    by_default = ordinary()
    by_default.generation_config.stop_strings = [f"w{special}"]
    assert kvlib.generate(by_default, PROMPTS[2], **settings) == once


def test_a_notebook_shows_the_text_and_what_the_cache_held(model, tokenizer):
    one = kvlib.generate(model, PROMPTS[0], policy="window", kv_budget=20, max_new_tokens=N, tokenizer=tokenizer)
    shown = one._repr_html_()
    assert one.text in shown and "at most 20 slots held" in shown and f"{one.rounds} rounds" in shown
    assert "&lt;b&gt;" in kvlib.Generation("<b>", (1,), "eos", (3,), 0)._repr_html_()


def state_of(model: nn.Module) -> dict:
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        logits = model(ids).logits
    return {
        "logits": logits,
        "attention": model.config._attn_implementation,
        "training": [module.training for module in model.modules()],
        "parameters": {
            n: (id(p), p.requires_grad, p.shape, p.untyped_storage().nbytes()) for n, p in model.named_parameters()
        },
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "config": model.config.to_dict(),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }


def assert_same(before: dict, after: dict) -> None:
    assert torch.equal(before.pop("logits"), after.pop("logits"))
    assert before == after


class Stop(Exception):
    pass


def raise_at_a_piece(kind: type[BaseException]):
    def stream(i: int, piece: str) -> None:
        raise kind

    return stream


@pytest.mark.parametrize("ends", [None, Stop, KeyboardInterrupt])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_it_was_however_the_call_ends(family, ends, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    model = ordinary(family, torch.float32, "eager")
    if family == "llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.train().requires_grad_(True)
    before = state_of(model)
    settings = {"policy": "h2o", "kv_budget": 20, "max_new_tokens": N, "tokenizer": tokenizer}
    if ends is None:
        kvlib.generate(model, PROMPTS, **settings)
        model.generate(
            **padded(PROMPTS, "left"), max_new_tokens=9, custom_generate=kvlib.custom_generate(policy="window")
        )
    else:
        with pytest.raises(ends):
            kvlib.generate(model, PROMPTS, stream=raise_at_a_piece(ends), **settings)
    assert_same(before, state_of(model))
    copied = copy.deepcopy(model)
    ids = torch.tensor([PROMPTS[0]])
    for one in (model, copied):
        one(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in one.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (
        sum(p.nbytes for p in model.parameters())
        <= (tmp_path / "model.safetensors").stat().st_size
        < 1.2 * sum(p.nbytes for p in model.parameters())
    )


def test_a_fuse_that_fails_midway_is_undone(monkeypatch):
    model = ordinary(dtype=torch.float32)
    before, layers = state_of(model), []

    def interrupted(layer):
        layers.append(layer)
        if len(layers) == 3:
            raise KeyboardInterrupt
        return real(layer)

    real = fast.Layer.of
    monkeypatch.setattr(fast.Layer, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvlib.generate(model, PROMPTS[0], policy="full", max_new_tokens=3)
    assert_same(before, state_of(model))


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.delta = nn.Linear(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.delta(x)


def adapted(model):
    model.model.layers[1].mlp.down_proj = LoRA(model.model.layers[1].mlp.down_proj)


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, given, made: made)


def patched(model):
    model.model.norm.forward = lambda x: x


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.o_proj)


def mixed(model):
    model.lm_head.to(torch.float32)


def flat(model):
    attention = model.model.layers[0].self_attn
    buffer = torch.cat([attention.v_proj.weight.flatten(), attention.q_proj.weight.flatten()]).detach()
    attention.v_proj.weight.data, attention.q_proj.weight.data = (
        part.view(-1, 56) for part in buffer.split([attention.v_proj.weight.numel(), attention.q_proj.weight.numel()])
    )


def flat_biases(model):
    attention = model.model.layers[0].self_attn
    buffer = torch.cat([attention.v_proj.bias, attention.q_proj.bias]).detach()
    sizes = len(attention.v_proj.bias), len(attention.q_proj.bias)
    attention.v_proj.bias.data, attention.q_proj.bias.data = buffer.split(sizes)


def unbiased(model):
    model.model.layers[1].self_attn.k_proj.bias = None


def gelu(model):
    model.model.layers[0].mlp.act_fn = ACT2FN["gelu"]


def epsilon(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 3.0


def scaled(model):
    model.model.layers[1].self_attn.scaling = 2.0


def pruned(model):
    model.model.layers = model.model.layers[1:]


WHY = {
    adapted: "LoRA",
    hooked: "hook",
    patched: "forward of its own",
    parametrised: "Parametrized",
    mixed: "differ in device or dtype",
    flat: "share a storage",
    flat_biases: "share a storage",
    unbiased: "whether they have a bias",
    gelu: "GELU",
    epsilon: "epsilon of its own",
    scaled: "scale attention differently",
    pruned: "numbered",
}


@pytest.mark.parametrize("change", WHY, ids=lambda change: change.__name__)
def test_what_the_fast_step_would_read_wrongly_takes_the_general_one_or_is_refused(change):
    model = ordinary()
    assert fast.why_not_fast(model) is None
    change(model)
    assert WHY[change] in fast.why_not_fast(model)
    settings = {"policy": "window", "max_new_tokens": N}
    if change in (mixed, pruned):
        with pytest.raises(ConfigError, match="use another model"):
            kvlib.generate(model, PROMPTS, **settings)
        return
    before = state_of(model)
    assert [list(one.tokens) for one in kvlib.generate(model, PROMPTS, **settings)] == [
        alone(model, p) for p in PROMPTS
    ]
    assert_same(before, state_of(model))


def test_a_hook_on_all_modules_is_seen():
    model = ordinary()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, made: 1.3 * made if type(module) is nn.Linear else None
    )
    try:
        made = kvlib.generate(model, PROMPTS, policy="window", max_new_tokens=N)
        assert [list(one.tokens) for one in made] == [alone(model, p) for p in PROMPTS]
    finally:
        hook.remove()


@pytest.mark.parametrize("change", [lambda model: None, hooked], ids=["fast step", "general step"])
def test_threads_that_share_a_model_do_not_meet(change):
    model = ordinary().train()
    change(model)
    wanted, before = [alone(model.eval(), p) for p in PROMPTS], state_of(model.train())

    def call(_) -> list:
        made = kvlib.generate(model, PROMPTS, policy="window", max_new_tokens=N, progress=False)
        return [list(one.tokens) for one in made]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(made == wanted for made in pool.map(call, range(12)))
    finally:
        sys.setswitchinterval(interval)
    assert_same(before, state_of(model))


WRONG = [
    ({"policy": "rkvv"}, "did you mean rkv"),
    ({"policy": 3}, "name of a preset"),
    ({"policy_options": {"bufer": 3}}, "did you mean buffer"),
    ({"policy": Window, "policy_options": {"bufer": 3}}, "did you mean buffer"),
    ({"policy": Window(), "policy_options": {"bufer": 3}}, "did you mean buffer"),
    ({"policy": Window(), "policy_options": {"buffer": "3"}}, "must be of type int"),
    ({"kv_budgt": 3}, "use kv_budget"),
    ({"do_sample": True}, "use temperature"),
    ({"num_return_sequences": 2}, "use n_samples"),
    ({"max_length": 9}, "use max_new_tokens"),
    ({"num_beams": 4}, "has no setting 'num_beams'"),
    ({"kv_budget": True}, "kv_budget=True ("),
    ({"kv_budget": 64.0}, "kv_budget=64.0 ("),
    ({"kv_budget": 0}, "kv_budget=0 ("),
    ({"kv_budget": None}, "needs a kv_budget"),
    ({"policy": Window(), "kv_budget": None}, "needs a kv_budget"),
    ({"policy": "full", "kv_budget": 64}, "takes no kv_budget"),
    ({"policy": "full", "kv_budget": 0}, "takes no kv_budget"),
    ({"policy": "window", "kv_budget": 4}, "the prompt does not fit; use 12 or more"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 ("),
    ({"max_new_tokens": None}, "pass e.g. 512"),
    ({"n_samples": 2}, "at temperature 0"),
    ({"n_rows": 0}, "n_rows=0 ("),
    ({"top_p": 0.9}, "change nothing at temperature 0"),
    ({"temperature": -1}, "temperature=-1 ("),
    ({"temperature": 1.0, "top_p": 0}, "top_p=0 ("),
    ({"stop_strings": "x"}, "pass tokenizer"),
    ({"eos_ids": "</s>"}, "eos_ids is '</s>'"),
    ({"policy": "triattention"}, 'kvlib.fit("triattention", model, texts)'),
    ({"policy": "sepllm"}, "pass tokenizer"),
    ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2'"),
    ({"policy_options": 3}, "policy_options is 3"),
    ({"stop_strings": [""]}, "stop_strings is ['']"),
    ({"seed": "a"}, "seed='a' ("),
]


@pytest.mark.parametrize(("settings", "told"), WRONG, ids=lambda x: str(x)[:40])
def test_a_wrong_setting_is_told_in_a_sentence(model, settings, told):
    with pytest.raises(ConfigError) as error:
        kvlib.generate(model, PROMPTS[:2], **{"policy": "window", "max_new_tokens": 4, **settings})
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "prompts is []"),
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        (None, "prompts is None"),
        ([3.5], "prompt 0 is 3.5"),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 3)},
            "of the shape of input",
        ),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(4)}, "of the shape of input"),
        ([[1, 64]], "token id 64"),
        ([[1, -1]], "prompt 0 has the token id -1,"),
        ("w5", "pass tokenizer"),
        ({"text": "w5"}, "prompts is"),
    ],
)
def test_a_wrong_prompt_is_told_in_a_sentence(model, asked, told):
    with pytest.raises(ConfigError) as error:
        kvlib.generate(model, asked, policy="window", max_new_tokens=4)
    assert told in str(error.value)


def test_a_thing_that_is_no_model_and_a_model_that_is_not_plain_are_refused():
    with pytest.raises(ConfigError, match="model is a dict"):
        kvlib.generate({}, [1], max_new_tokens=4)
    with pytest.raises(ConfigError, match="model is a Linear"):
        kvlib.generate(nn.Linear(2, 2), [1], max_new_tokens=4)


def test_a_policy_may_be_an_object_or_a_class_of_ones_own(model):
    class Mine(Window):
        pass

    class Fixed(Window):
        def __init__(self):
            super().__init__(n_sink=2)

    expected = kvlib.generate(
        model, PROMPTS, policy="window", kv_budget=20, max_new_tokens=N, policy_options={"n_sink": 2}
    )
    for settings in (
        {"policy": Mine(n_sink=2)},
        {"policy": Fixed()},
        {"policy": Fixed},
        {"policy": Mine, "policy_options": {"n_sink": 2}},
        {"policy": Mine(), "policy_options": {"n_sink": 2}},
    ):
        assert kvlib.generate(model, PROMPTS, kv_budget=20, max_new_tokens=N, **settings) == expected


def test_a_tokenizer_of_ones_own_decides_which_token_ends_thinking(tokenizer):
    loaded = kvlib.load_model("tiny")
    assert loaded.answer_id is not None and api.entered(loaded, None, needs_tokenizer=False) is loaded
    entered = api.entered(loaded, tokenizer, needs_tokenizer=False)
    assert (entered.tokenizer, entered.answer_id, entered.sha256) == (tokenizer, None, loaded.sha256)


@pytest.mark.parametrize("name", ["triattention", "sepllm"])
def test_what_a_policy_needs_is_made_by_the_call_that_its_sentence_names(tokenizer, name):
    model = ordinary(dtype=torch.float32, implementation="eager").train()
    before = state_of(model)
    policy = kvlib.fit(name, model, [" ".join(f"w{i}" for i in prompt) for prompt in PROMPTS], tokenizer=tokenizer)
    settings = {"kv_budget": 28, "max_new_tokens": N, "policy_options": {"n_recent": 4, "buffer": 4}}
    made = kvlib.generate(model, PROMPTS, policy=policy, **settings)
    assert max(max(one.held) for one in made) == 28 and made[0].rounds > 0
    if name == "sepllm":
        again = kvlib.generate(model, PROMPTS, policy=name, tokenizer=tokenizer, **settings)
        assert [one.tokens for one in made] == [one.tokens for one in again]
    assert_same(before, state_of(model))


def test_a_short_call_shows_no_bar(model, capsys):
    kvlib.generate(model, PROMPTS[0], policy="window", max_new_tokens=3)
    assert capsys.readouterr() == ("", "")


def test_defaults_are_those_of_the_generation_config_and_what_kvlib_lacks_is_said():
    model = ordinary()
    asked = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 9}
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = kvlib.generate(model, PROMPTS, policy="window")
        given = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 9}
        assert made == kvlib.generate(ordinary(), PROMPTS, policy="window", **given)
        assert made != kvlib.generate(model, PROMPTS, policy="window", temperature=0.0)
    model.generation_config.repetition_penalty = 1.1
    with pytest.warns(UserWarning, match=r"repetition_penalty=1.1, which kvlib does not apply") as said:
        assert kvlib.generate(model, PROMPTS, policy="window") == made
    assert len(said) == 1


class AfterToken(StoppingCriteria):
    """True for a row once it has said a token; a batch is seen whole, with one more column each time."""

    def __init__(self, token: int):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(tuple(input_ids.shape))
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("eos", [None, 63])
def test_criteria_see_what_generate_shows_them_and_end_what_it_ends(model, eos):
    token = alone(model, PROMPTS[0])[10]
    inputs = padded(PROMPTS, "left")
    made = []
    for entry in ({}, {"custom_generate": kvlib.custom_generate(policy="window")}):
        criterion = AfterToken(token)
        criteria = StoppingCriteriaList([criterion])
        out = model.generate(
            **inputs, max_new_tokens=N, stopping_criteria=criteria, eos_token_id=eos, pad_token_id=0, **entry
        )
        made.append((out.tolist(), criterion.seen))
    assert made[0] == made[1]
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    stopped = model.generate(
        **one, max_new_tokens=N, stopping_criteria=StoppingCriteriaList([AfterToken(token)]),
        custom_generate=kvlib.custom_generate(policy="window"),
    )  # fmt: skip
    assert stopped[0, -1] == token and stopped.shape[1] < one["input_ids"].shape[1] + N


def test_a_streamer_gets_every_token_and_its_end(model, tokenizer):
    ids = torch.tensor([PROMPTS[0]])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=9)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=N, streamer=streamer,
        custom_generate=kvlib.custom_generate(policy="window"),
    )  # fmt: skip
    assert "".join(streamer).split() == tokenizer.decode(made[0, ids.shape[1] :]).split()


def test_a_pipeline_decodes_through_the_policy(model, tokenizer):
    asked = ["w5 w9 w33", "w40 w2"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    settings = {"max_new_tokens": N, "do_sample": False, "return_full_text": False}
    entry = kvlib.custom_generate(policy="window", kv_budget=8)
    made = [out[0]["generated_text"] for out in pipe(asked, custom_generate=entry, **settings)]
    expected = kvlib.generate(model, asked, policy="window", kv_budget=8, max_new_tokens=N, tokenizer=tokenizer)
    assert [one.split() for one in made] == [one.text.split() for one in expected]


def test_torchs_seed_fixes_the_samples_of_custom_generate(model):
    entry = kvlib.custom_generate(policy="window")

    def sampled(seed: int) -> list:
        torch.manual_seed(seed)
        return model.generate(
            **padded(PROMPTS[:2], "left"),
            max_new_tokens=9,
            do_sample=True,
            num_return_sequences=2,
            custom_generate=entry,
        ).tolist()

    first = sampled(1)
    assert first == sampled(1) != sampled(2) and first[0] != first[1]


REFUSED = [
    ({"num_beams": 2}, "beam search"),
    ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(20, 3)])}, "MinLengthLogitsProcessor"),
    ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
]


@pytest.mark.parametrize(("settings", "told"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_custom_generate_cannot_do_is_refused_by_name(model, settings, told):
    with pytest.raises(ConfigError, match=told):
        model.generate(
            **padded(PROMPTS[:1], "left"),
            max_new_tokens=4,
            custom_generate=kvlib.custom_generate(policy="window"),
            **settings,
        )


def test_custom_generate_itself_or_with_a_wrong_setting_is_refused(model):
    with pytest.raises(ConfigError, match=r"custom_generate=kvlib\.custom_generate\(policy=\.\.\., kv_budget=\.\.\.\)"):
        model.generate(**padded(PROMPTS[:1], "left"), max_new_tokens=4, custom_generate=kvlib.custom_generate)
    with pytest.raises(ConfigError, match=r"unknown setting of kvlib.custom_generate 'budget'; did you mean kv_budget"):
        kvlib.custom_generate(budget=3)


def test_a_score_that_loses_state_is_told_by_name(model):
    class Forgetful(H2O):
        def score(self, view, state):
            return super().score(view, state)[0], {}

    with pytest.raises(ConfigError, match=r"Forgetful.score returned no state 'mass'"):
        kvlib.generate(model, PROMPTS, policy=Forgetful, kv_budget=20, max_new_tokens=N)


def test_an_assistant_is_refused(model):
    with pytest.raises(ConfigError, match="assisted generation"):
        model.generate(
            **padded(PROMPTS[:1], "left"), max_new_tokens=4, assistant_model=ordinary(),
            custom_generate=kvlib.custom_generate(policy="window"),
        )  # fmt: skip


def test_kvlib_is_imported_without_torch_and_its_names_are_not_modules():
    code = "import sys, kvlib; dir(kvlib); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for name in kvlib.PUBLIC:
        assert getattr(kvlib, name).__name__ in (name, "load_reasoner")
        assert f"kvlib.{name}" not in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        kvlib.generat  # noqa: B018
