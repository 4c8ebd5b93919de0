"""What each policy promises beyond its oracle vectors, and that its settings are checked."""

import dataclasses
import inspect
import re

import pytest
import torch
from conftest import as_requests, decode, prompts, small_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.engine.decoder import Decoder, Request
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError
from kvlib.kernels.redundancy import redundancy
from kvlib.kernels.rope import rotate
from kvlib.policies import PRESETS, DynTS, Policy, View, Window, make_policy
from kvlib.policies.base import MASS


def test_h2o_mass_of_a_full_run_is_the_eager_attention_column_sum(qwen2):
    """Attention mass collected step by step equals the column sums of one full attention map."""
    decoder = Decoder(
        qwen2, small_policy("h2o"), 60, n_rows=1, n_prompt_max=12, max_new_tokens=30, sampling=Sampling(0.0), eos_ids=()
    )
    decoder.admit(0, Request("0", prompts(1)[0], 0))
    for _ in range(29):
        decoder.step()
    n = int(decoder.rows.n_held[0])
    ids = torch.cat([torch.tensor(prompts(1)[0]), decoder.output[0, :29]])[None]
    qwen2.set_attn_implementation("eager")
    attentions = qwen2(ids, output_attentions=True).attentions
    qwen2.set_attn_implementation("kvlib")
    for layer, attention in enumerate(attentions):
        expected = attention[0].unflatten(0, (2, 7)).sum((1, 2))
        torch.testing.assert_close(decoder.cache.state[MASS][layer, 0, :, :n].double(), expected, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 40), at_once=st.sampled_from([1, 60, 700]))
@settings(max_examples=40, deadline=None)
def test_rkv_redundancy_in_parts_equals_the_published_matrix(seed, n, at_once):
    keys = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    cosine = (unit @ unit.mT).masked_fill(torch.eye(n, dtype=torch.bool), 0.0)
    spared = torch.where(cosine > 0.5, torch.arange(n), 0).amax(-1, keepdim=True)
    expected = cosine.scatter(-1, spared, 0.0).mean(-2).softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvlib.kernels.redundancy.AT_ONCE", at_once)
        torch.testing.assert_close(redundancy(keys, 0.5), expected)


def test_sound_dynts_never_evicts_the_prompt_and_the_published_one_does(qwen2):
    requests = as_requests([tuple(range(14))])
    sound = decode(qwen2, small_policy("dynts"), 28, requests, 1, trace=True)["0"]
    published = decode(qwen2, small_policy("dynts-published"), 28, requests, 1, trace=True)["0"]
    assert all(set(range(14)) <= set(kept[0][0]) for _, kept in sound.kept)
    assert not all(set(range(14)) <= set(kept[0][0]) for _, kept in published.kept)


@pytest.mark.parametrize(
    ("kv_budget", "kept"), [(2500, 2200), (3000, 2400), (3500, 2600), (4000, 2800), (4500, 3000), (5000, 3200)]
)
def test_published_dynts_keeps_the_published_numbers(kv_budget, kept):
    assert make_policy("dynts-published").keep(kv_budget, 150, kv_budget + 1) == kept


def test_dynts_keeps_every_token_of_the_answer(qwen2):
    """From the answer token on, tokens outrank all thinking tokens."""
    requests = as_requests(prompts(1))
    free = decode(qwen2, small_policy("full"), None, requests, 1, max_new_tokens=40)["0"]
    policy = dataclasses.replace(small_policy("dynts", n_recent=2, ratio=0.9), predictor=lambda hidden: hidden[..., 0])
    done = decode(qwen2, policy, 28, requests, 1, trace=True, answer_id=free.tokens[3])["0"]
    assert done.tokens[3] == free.tokens[3]
    answer_from = len(requests[0].prompt) + 3
    for seen, kept in done.kept:
        answer = set(range(answer_from, seen))
        kept = kept[0][0]
        thinking_kept = [p for p in kept if len(requests[0].prompt) <= p < answer_from]
        assert answer <= set(kept) or not thinking_kept


def test_random_draws_repeat_by_key_and_differ_between_keys(qwen2):
    requests = as_requests(prompts(1))
    others = [dataclasses.replace(requests[0], noise_key=7)]
    one, again, other = (
        decode(qwen2, small_policy("random"), 28, asked, 1, trace=True)["0"] for asked in (requests, requests, others)
    )
    assert one.kept == again.kept
    assert one.kept != other.kept


def test_unknown_names_and_settings_are_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean dynts"):
        make_policy("dynst")
    with pytest.raises(ConfigError, match="unknown setting of policy 'window' 'n_sinks'; did you mean n_sink"):
        make_policy("window", n_sinks=4)
    for wrong in (
        {"buffer": -1},
        {"buffer": "1"},
        {"buffer": True},
        {"n_recent": -1},
        {"share": "row"},
        {"n_sink": 1.5},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make_policy("window", **wrong)


def test_protection_and_trigger_can_be_set_on_every_preset():
    for name in PRESETS:
        policy = make_policy(name, n_sink=3, protect_prompt=True, n_recent=5, buffer=2)
        assert (policy.n_sink, policy.protect_prompt) == (3, True)
        assert policy.recent(40) >= 5
        assert policy.keep(40, 10, 41) == 38


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("dynts", {"ratio": 1.5}, "ratio is 1.5"),
        ("dynts", {"buffer": 1.5}, "buffer is 1.5"),
        ("snapkv", {"n_obs": 0}, "n_obs is 0"),
        ("rkv", {"kernel": 4}, "kernel is 4"),
        ("h2o", {"share": "model"}, "share is 'model'"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_policy(name, **wrong)


def test_a_budget_that_leaves_nothing_to_do_or_to_observe_is_refused():
    with pytest.raises(ConfigError, match=r"kv_budget 40 .* 41 slots stay after a round; no kv_budget will do"):
        make_policy("dynts-published", n_recent=8, ratio=1.0).check(40, 5, "p")
    with pytest.raises(ConfigError, match="8 queries observe, and 5 slots stay after a round; use 19 or more"):
        make_policy("rkv", n_recent=4, buffer=11).check(16, 5, "p")


def least_budget(policy: Policy, kv_budget: int, n_prompt: int) -> int:
    """What the policy's own message says to use; kv_budget where that will do already."""
    try:
        policy.check(kv_budget, n_prompt, "p")
    except ConfigError as error:
        return int(re.search(r"; use (\d+) or more", str(error))[1])
    return kv_budget


@given(data=st.data(), name=st.sampled_from([name for name in PRESETS if name != "full"]))
@settings(max_examples=200, deadline=None)
def test_the_budget_that_a_message_names_will_do_and_no_smaller_one(data, name):
    small = data.draw(st.booleans())
    options = {} if small else {"n_sink": data.draw(st.integers(0, 40)), "protect_prompt": data.draw(st.booleans())}
    policy = small_policy(name) if small else make_policy(name, **options)
    kv_budget, n_prompt = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 400))
    least = least_budget(policy, kv_budget, n_prompt)
    for more in (0, 1, data.draw(st.integers(2, 3000))):
        policy.check(least + more, n_prompt, "p")
    if least > kv_budget:
        with pytest.raises(ConfigError):
            policy.check(least - 1, n_prompt, "p")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "full"])
def test_the_least_budget_decodes(qwen2, name):
    policy, requests = small_policy(name, protect_prompt=True), as_requests([tuple(range(7))])
    kv_budget = least_budget(policy, 7, 7)
    done = decode(qwen2, policy, kv_budget, requests, 1, max_new_tokens=kv_budget + 12)["0"]
    assert done.rounds and max(done.held) <= kv_budget


def test_noise_of_a_round_differs_by_layer_head_position_and_round():
    def uniform(step: int) -> torch.Tensor:
        positions = torch.arange(6, dtype=torch.int32).expand(2, 1, 3, 6)
        one, empty = torch.tensor([5]), torch.zeros(0)
        return View(9, one, 6, one, one, one, one * step, 1.0, empty, positions, empty, empty, empty, empty).uniform()

    assert uniform(7).unique().numel() == 2 * 3 * 6
    assert torch.equal(uniform(7), uniform(7))
    assert not (uniform(7) == uniform(8)).any()


def test_a_policy_holds_no_state():
    for name in PRESETS:
        policy = make_policy(name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.n_sink = 1


def test_every_policy_names_its_source():
    for preset in PRESETS.values():
        module = inspect.getmodule(getattr(preset, "func", preset))
        if module.__name__.rsplit(".")[-1] not in ("full", "window"):
            assert "arXiv" in module.__doc__
    assert DynTS.__doc__ and Window.__doc__


def test_reindexed_keys_are_the_keys_before_rope_turned_to_their_place_in_the_cache(qwen2):
    """StreamingLLM's own positions: contiguous inside the cache, here ending at the newest token's true position."""
    policy = small_policy("streaming-reindexed", n_sink=2, buffer=3)
    decoder = Decoder(
        qwen2, policy, 20, n_rows=1, n_prompt_max=12, max_new_tokens=45, sampling=Sampling(0.0), eos_ids=()
    )
    decoder.admit(0, as_requests(prompts(1))[0])
    cache, inv_freq = decoder.cache, decoder.model.inv_freq
    before_rope = {}

    def note(positions: range) -> None:
        for position in positions:
            slot = (cache.positions[0, 0, 0] == position).nonzero()[0, 0]
            before_rope[position] = rotate(cache.keys[:, 0, :, slot], torch.tensor(-position), inv_freq)

    note(range(int(decoder.rows.n_held[0])))
    for _ in range(44):
        decoder.step()
        newest = int(decoder.position[0]) - 1
        note(range(newest, newest + 1))
    n, seen = int(decoder.rows.n_held[0]), int(decoder.position[0])
    positions, slots = cache.positions[0, 0, 0, :n].sort()
    assert positions[:3].tolist() != [0, 1, 2], "something was evicted behind the sinks"
    for rank, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        expected = rotate(before_rope[position], torch.tensor(seen - n + rank), inv_freq)
        torch.testing.assert_close(cache.keys[:, 0, :, slot], expected, rtol=1e-9, atol=1e-9)
