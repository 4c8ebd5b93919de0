"""The engine decodes what the model says, row by row, and holds no more than its budget."""

from dataclasses import dataclass

import pytest
import torch
from conftest import as_requests, decode, prompts, small_policy

from kvlib.engine.decoder import Decoder, Request
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError
from kvlib.policies import Window

ENGINE = ["full", "window", "streaming-reindexed", "random", "h2o", "rkv", "triattention", "dynts"]
"""One of each kind: shared and own keep sets, state, queries, noise, creation scores, re-indexed positions."""
EVICTING = [name for name in ENGINE if name != "full"]
BUDGET = 28


def test_budget_no_smaller_than_the_sequence_equals_generate(any_model):
    requests = as_requests(prompts(5))
    any_model.set_attn_implementation("eager")
    expected = {
        r.id: any_model.generate(torch.tensor([r.prompt]), max_new_tokens=40, do_sample=False)[
            0, len(r.prompt) :
        ].tolist()
        for r in requests
    }
    any_model.set_attn_implementation("kvlib")
    for name in ENGINE:
        kv_budget = None if name == "full" else 12 + 40
        done = decode(any_model, small_policy(name), kv_budget, requests, n_rows=3)
        assert {i: list(c.tokens) for i, c in done.items()} == expected, name


@pytest.mark.parametrize("name", ENGINE)
def test_a_row_among_others_decodes_as_alone(any_model, name):
    requests = as_requests(prompts(5))
    policy = small_policy(name, head_dim=any_model.config.head_dim if any_model.config.model_type == "qwen3" else 4)
    kv_budget = None if name == "full" else BUDGET
    together = decode(any_model, policy, kv_budget, requests, n_rows=3, temperature=1.0, trace=True)
    for request in requests:
        alone = decode(any_model, policy, kv_budget, [request], n_rows=1, temperature=1.0, trace=True)
        assert together[request.id] == alone[request.id]


@pytest.mark.parametrize("name", EVICTING)
def test_eviction_changes_the_output(qwen2, name):
    requests = as_requests(prompts(5))
    full = decode(qwen2, small_policy("full"), None, requests, n_rows=5)
    evicted = decode(qwen2, small_policy(name), BUDGET, requests, n_rows=5)
    assert any(full[i].tokens != evicted[i].tokens for i in full)


@pytest.mark.parametrize("name", EVICTING)
def test_between_steps_no_head_holds_more_than_its_budget(qwen2, name):
    policy = small_policy(name)
    decoder = Decoder(
        qwen2, policy, BUDGET, n_rows=3, n_prompt_max=12, max_new_tokens=50, sampling=Sampling(0.0), eos_ids=()
    )
    for row, prompt in enumerate(prompts(3)):
        decoder.admit(row, Request(str(row), prompt, row))
    reached = 0
    for _ in range(49):
        decoder.step()
        held = (decoder.cache.positions >= 0).sum(-1)
        assert held.max() <= BUDGET
        assert (held == torch.from_numpy(decoder.rows.n_held)[None, :, None]).all(), "the host's mirror is exact"
        assert (decoder.cache.lengths.numpy() == decoder.rows.n_held).all()
        reached = max(reached, int(held.max()))
    assert reached == BUDGET, "the budget is used, not only respected"


@pytest.mark.parametrize("name", ENGINE)
def test_two_runs_share_no_state(qwen2, name):
    requests = as_requests(prompts(3))
    policy, kv_budget = small_policy(name), None if name == "full" else BUDGET
    first = decode(qwen2, policy, kv_budget, requests, n_rows=2, temperature=1.0)
    decode(qwen2, policy, kv_budget, as_requests(prompts(3, seed=9)), n_rows=2, temperature=1.0)
    assert decode(qwen2, policy, kv_budget, requests, n_rows=2, temperature=1.0) == first


def test_a_refilled_row_starts_clean(qwen2):
    requests = as_requests(prompts(6))
    for name in ENGINE:
        kv_budget = None if name == "full" else BUDGET
        queued = decode(qwen2, small_policy(name), kv_budget, requests, n_rows=1)
        apart = decode(qwen2, small_policy(name), kv_budget, requests, n_rows=6)
        assert queued == apart, name


@pytest.mark.parametrize("name", ENGINE)
def test_bytes_held_are_the_formula_and_never_change(qwen2, name):
    kv_budget = None if name == "full" else BUDGET
    decoder = Decoder(
        qwen2,
        small_policy(name),
        kv_budget,
        n_rows=2,
        n_prompt_max=12,
        max_new_tokens=60,
        sampling=Sampling(0.0),
        eos_ids=(),
    )
    n_slots = 12 + 60 if kv_budget is None else BUDGET + 1
    L, B, H, HQ, D = 3, 2, 2, 14, 4
    policy = decoder.policy
    maps = {"model": 1, "head": L * H, "head_across_layers": H}[policy.share] if name != "full" else 1
    expected = 8 * (2 * L * B * H * n_slots * D + L * B * HQ * policy.n_queries * D)
    expected += 4 * maps * B * n_slots * (1 + len(policy.state_names))
    assert decoder.cache.nbytes() == expected
    pointers = [t.data_ptr() for t in (decoder.cache.keys, decoder.cache.values, decoder.cache.positions)]
    for row, prompt in enumerate(prompts(2)):
        decoder.admit(row, Request(str(row), prompt, row))
    for _ in range(59):
        decoder.step()
    assert pointers == [t.data_ptr() for t in (decoder.cache.keys, decoder.cache.values, decoder.cache.positions)]
    assert decoder.cache.nbytes() == expected


def test_outputs_stop_at_the_end_of_sequence_and_at_the_limit(qwen2):
    requests = as_requests(prompts(8))
    free = decode(qwen2, small_policy("full"), None, requests, n_rows=3, temperature=1.0)
    eos = free["0"].tokens[17]
    stopped = decode(qwen2, small_policy("full"), None, requests, n_rows=3, temperature=1.0, eos_ids=(eos,))
    for i, completion in free.items():
        if eos in completion.tokens:
            n = completion.tokens.index(eos) + 1
            assert (stopped[i].tokens, stopped[i].stop, len(stopped[i].held)) == (completion.tokens[:n], "eos", n)
        else:
            assert (stopped[i].tokens, stopped[i].stop) == (completion.tokens, "length")
            assert len(completion.tokens) == 40


def test_a_prompt_that_does_not_fit_is_refused_by_name(qwen2):
    request = Request("chain-d/12", tuple(range(30)), 0)
    with pytest.raises(
        ConfigError,
        match=r"for chain-d/12 \(30-token prompt, .*: the prompt does not fit; use 30 or more",
    ):
        decode(qwen2, small_policy("window"), BUDGET, [request], n_rows=1)
    with pytest.raises(
        ConfigError, match=r"p \(20-token prompt, .*: 28 slots stay after a round, and 29 are protected; use 29 or more"
    ):
        decode(
            qwen2,
            small_policy("window", protect_prompt=True, n_recent=9),
            BUDGET,
            [Request("p", tuple(range(20)), 0)],
            1,
        )


def test_numbers_that_are_not_finite_are_an_error(qwen2):
    broken = type(qwen2)(qwen2.config).double().eval()
    broken.set_attn_implementation("kvlib")
    broken.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        decode(broken, small_policy("full"), None, as_requests(prompts(1)), n_rows=1)


def test_a_score_that_is_nan_is_an_error(qwen2):
    @dataclass(frozen=True, kw_only=True)
    class Broken(Window):
        def score(self, view, state):
            return view.positions.float().masked_fill(view.positions == 20, torch.nan), state

    with pytest.raises(FloatingPointError, match="policy's scores are not finite"):
        decode(qwen2, Broken(), BUDGET, as_requests(prompts(1)), n_rows=1)


def test_a_policy_that_would_keep_more_than_the_budget_is_held_to_it(qwen2):
    @dataclass(frozen=True, kw_only=True)
    class Greedy(Window):
        def limit(self, kv_budget, n_prompt, n_held):
            return 2 * kv_budget

        def keep(self, kv_budget, n_prompt, n_seen):
            return kv_budget if n_seen == kv_budget + 1 else n_seen

    done = decode(qwen2, Greedy(), BUDGET, as_requests(prompts(3)), n_rows=3)
    assert max(max(completion.held) for completion in done.values()) == BUDGET


def test_reindexing_in_a_dtype_whose_rounding_adds_up_is_refused(qwen2):
    low = type(qwen2)(qwen2.config).to(torch.bfloat16).eval()
    with pytest.raises(ConfigError, match="use dtype float32, or reindex=False"):
        decode(low, small_policy("streaming-reindexed"), BUDGET, as_requests(prompts(1)), n_rows=1)
