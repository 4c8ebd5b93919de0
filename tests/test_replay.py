"""Replays see what the full cache saw: exact without eviction, brute force with it, bounded by the golden policy."""

import math

import pandas as pd
import pytest
import torch
from conftest import prompts, small_policy

from kvlib.config import load_grid
from kvlib.engine.decoder import Request, decoder_for
from kvlib.errors import ConfigError
from kvlib.models import Reasoner, load_reasoner
from kvlib.policies.golden import Golden
from kvlib.replay import (
    attention_recall,
    fact_accuracy,
    fact_drills,
    fact_probe,
    fidelity,
    golden_like,
    measure_fidelity,
    once_stated,
    output_error,
    record_trace,
    replay,
)

P, N = 9, 40


def recorded(model):
    reasoner = Reasoner(model, None)
    generator = torch.Generator().manual_seed(3)
    prompt, tokens = (torch.randint(0, 64, (n,), generator=generator).tolist() for n in (P, N))
    return reasoner, record_trace(reasoner, Request("r", tuple(prompt), 7), tokens)


def one_replay(reasoner, policy, kv_budget, recording):
    return replay(reasoner, {"arm": policy}, [kv_budget], [recording])["arm", kv_budget][0]


@pytest.fixture(scope="module")
def qwen2_recording(qwen2):
    return recorded(qwen2)


@pytest.fixture(scope="module")
def tiny():
    return load_reasoner("tiny")


def test_a_recording_is_the_models_own_attention(any_model):
    _, recording = recorded(any_model)
    any_model.set_attn_implementation("eager")
    out = any_model(torch.tensor([recording.ids]), output_attentions=True)
    any_model.set_attn_implementation("kvlib")
    expected = torch.stack([layer[0].unflatten(0, (2, -1)).sum(1) for layer in out.attentions])
    assert recording.attention.dtype == recording.keys.dtype == torch.float32
    assert recording.attention.shape == (3, 2, P + N, P + N)
    torch.testing.assert_close(recording.attention, expected.float())


@pytest.mark.parametrize("name, kv_budget", [("full", None), ("snapkv", P + N), ("random", P + N)])
def test_without_eviction_nothing_is_lost_and_predictions_are_the_plain_forwards(any_model, name, kv_budget):
    reasoner, recording = recorded(any_model)
    replayed = one_replay(reasoner, small_policy(name), kv_budget, recording)
    any_model.set_attn_implementation("eager")
    logits = any_model(torch.tensor([recording.ids])).logits[0, P - 1 : -1]
    any_model.set_attn_implementation("kvlib")
    tokens = torch.tensor(recording.tokens)
    assert (replayed.predicted == logits.argmax(-1)).all()
    assert replayed.accuracy == (logits.argmax(-1) == tokens).double().mean()
    # The eager attention takes its softmax in float32.
    expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(replayed.logprob, expected, rtol=1e-5, atol=1e-5)
    assert replayed.mean("recall") == pytest.approx(1, abs=1e-6) and replayed.mean("error") == 0 and replayed.kept == ()
    assert replayed.rounds["n_queries"].tolist() == [N - 1]


def test_a_replay_keeps_what_the_policy_keeps_and_rounds_tile_the_output(qwen2_recording):
    reasoner, recording = qwen2_recording
    replayed = one_replay(reasoner, small_policy("streaming", protect_prompt=True, buffer=4), 24, recording)
    seen, kept = replayed.kept[0]
    assert seen == 25 and kept[0][0] == [*range(P), *range(25 - 11, 25)]
    rounds = replayed.rounds
    assert rounds["n_seen"].tolist() == [P, *(s for s, _ in replayed.kept if s < P + N - 1)]
    assert (rounds["n_seen"] + rounds["n_queries"]).tolist() == [*rounds["n_seen"][1:], P + N - 1]
    assert (
        rounds["recall"][0] == pytest.approx(1) and (rounds["recall"][1:] < 1).all() and (rounds["error"][1:] > 0).all()
    )
    row = rounds.iloc[2]
    kept = dict(replayed.kept)[row["n_seen"]]
    assert row["recall"] == attention_recall(
        recording.attention, kept, int(row["n_seen"]), int(row["n_seen"] + row["n_queries"])
    )


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (3, 1), (1, 1)], ids=["head", "across layers", "layer", "model"])
def test_recall_and_error_equal_a_brute_force_loop(qwen2_recording, shape):
    _, recording = qwen2_recording
    generator = torch.Generator().manual_seed(1)
    seen, until, group = 20, 26, 7
    kept = [[sorted(torch.randperm(seen, generator=generator)[:8].tolist()) for _ in range(shape[1])]
            for _ in range(shape[0])]  # fmt: skip
    recalls, errors = [], []
    for layer in range(3):
        for head in range(2):
            held = set(kept[layer % shape[0]][head % shape[1]])
            mass = total = 0.0
            for query in range(seen, until):
                for position in range(query + 1):
                    share = recording.attention[layer, head, query, position].item()
                    total += share
                    mass += share if position in held or position >= seen else 0.0
            recalls.append(mass / total)
            for one in range(head * group, (head + 1) * group):
                change = norm = 0.0
                for query in range(seen, until):
                    visible = [p for p in range(query + 1) if p in held or p >= seen]
                    outputs = []
                    for positions in (list(range(query + 1)), visible):
                        logits = recording.keys[layer, head, positions] @ recording.queries[layer, one, query]
                        weights = (logits * recording.queries.shape[-1] ** -0.5).softmax(0)
                        outputs.append(weights @ recording.values[layer, head, positions])
                    change += (outputs[0] - outputs[1]).square().sum().item()
                    norm += outputs[0].square().sum().item()
                errors.append(math.sqrt(change / norm))
    assert attention_recall(recording.attention, kept, seen, until) == pytest.approx(sum(recalls) / 6, rel=1e-5)
    assert output_error(recording, kept, seen, until) == pytest.approx(sum(errors) / 42, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_golden_reaches_at_least_the_attention_that_other_policies_reach(qwen2_recording, seed):
    reasoner, recording = qwen2_recording
    options = {"buffer": 6, "protect_prompt": True, "n_recent": 2}
    golden = one_replay(reasoner, Golden(attention=recording.attention, **options), 24, recording)
    for name in ("random", "window", "snapkv"):
        other = one_replay(reasoner, small_policy(name, **options), 24, recording)
        assert [seen for seen, _ in other.kept] == [seen for seen, _ in golden.kept]
        assert golden.mean("recall") >= other.mean("recall"), name
    # The bound itself: no keep set of the same size reaches more of what comes after the first round.
    seen = golden.kept[0][0]
    free = Golden(attention=recording.attention, buffer=6)
    best = one_replay(reasoner, free, 24, recording).kept[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = [[torch.randperm(seen, generator=generator)[: len(best[1][0][0])].tolist() for _ in range(2)]
             for _ in range(3)]  # fmt: skip
    end = P + N
    assert attention_recall(recording.attention, best[1], seen, end) >= attention_recall(
        recording.attention, drawn, seen, end
    )


def test_the_requests_noise_decides_random_eviction(qwen2_recording):
    reasoner, recording = qwen2_recording
    again = [one_replay(reasoner, small_policy("random"), 24, recording).kept for _ in range(2)]
    assert again[0] == again[1]


def test_replays_side_by_side_are_those_alone_whatever_the_length(qwen2):
    """Rows of unequal length, several arms, one that sees the recording: KL is 0 exactly where nothing was evicted."""
    reasoner, generator = Reasoner(qwen2, None), torch.Generator().manual_seed(5)
    recordings = []
    for i, n in enumerate((40, 23, 31)):
        tokens = torch.randint(0, 64, (n,), generator=generator).tolist()
        recordings.append(record_trace(reasoner, Request(f"r{i}", tuple(prompts(3)[i]), 11 + i), tokens))
    options = {"buffer": 6, "protect_prompt": True}
    arms = {name: small_policy(name, **options) for name in ("random", "snapkv")}
    arms["golden"] = golden_like(arms["random"])
    together = replay(reasoner, arms, [24, 96], recordings)
    assert set(together) == {("full", None), *((arm, budget) for arm in arms for budget in (24, 96))}
    for (arm, budget), replays in together.items():
        for recording, one in zip(recordings, replays, strict=True):
            assert one.recording is recording and len(one.predicted) == len(recording.tokens)
            if arm == "full" or budget == 96:
                assert one.agrees.all() and one.divergence.abs().max() < 1e-9 and one.kept == ()
            else:
                alone = replay(reasoner, {arm: arms[arm]}, [budget], [recording])[arm, budget][0]
                assert alone.kept == one.kept and torch.equal(alone.predicted, one.predicted)
                torch.testing.assert_close(alone.divergence, one.divergence)
                evicted = len(one.kept) > 0
                assert evicted == (one.divergence.max().item() > 1e-6) and (one.divergence > -1e-9).all()


def test_divergence_is_the_kl_of_the_distributions(qwen2_recording):
    reasoner, recording = qwen2_recording
    found = {}
    for arm, policy, budget in (("full", small_policy("full"), None), ("window", small_policy("window"), 24)):
        decoder = decoder_for(reasoner.model, policy, budget, [recording.request], max_new_tokens=N)
        said, tokens = [], torch.tensor(recording.tokens)
        decoder.sampling = lambda logits, request, step, said=said, tokens=tokens: (
            said.append(logits.double().log_softmax(-1)[0].clone()),
            tokens[step],
        )[1]
        decoder.admit(0, recording.request)
        for _ in range(N - 1):
            decoder.step()
        found[arm] = torch.stack(said)
    expected = (found["full"].exp() * (found["full"] - found["window"])).sum(-1)
    replayed = one_replay(reasoner, small_policy("window"), 24, recording)
    torch.testing.assert_close(replayed.divergence, expected, rtol=1e-6, atol=1e-9)


def test_an_empty_output_is_refused(qwen2):
    with pytest.raises(ConfigError, match="the output of x is empty"):
        record_trace(Reasoner(qwen2, None), Request("x", prompts(1)[0], 0), ())


def test_fidelity_has_a_row_per_trace(qwen2_recording):
    reasoner, recording = qwen2_recording
    full = one_replay(reasoner, small_policy("full"), None, recording)
    window = one_replay(reasoner, small_policy("window"), 24, recording)
    table = fidelity({("full", None): [full], ("mix", 24): [full, window]})
    assert table["recall"].tolist() == pytest.approx([1, 1, window.mean("recall")])
    assert table["trace"].tolist() == [0, 0, 1] and table["error"][0] == 0 < table["error"][2]


@pytest.mark.parametrize(
    "output, found",
    [
        ("use m f +2 get m 5", [(11, 3)]),
        ("so f 7 . use f k +1 get f 7", [(15, 7)]),
        ("so f 7 . check : 5 +2 = 7 . get f 7", []),
        ("so f 7 . get f 7 get f 7", [(11, 7)]),
        ("so f 7 . so f 8 . get f 7", []),
        ("get c 1 get c 1", []),
    ],
    ids=["from the prompt", "from the trace", "checked", "asked before", "told twice", "never told"],
)
def test_a_fact_counts_only_when_told_once(output, found):
    words = f"; so m 5 <think> {output}".split()
    assert once_stated(words, 5) == found


def test_the_probe_finds_what_a_window_has_lost(tiny):
    drills = fact_drills(tiny, 2)
    replays = replay(tiny, {"window": small_policy("window")}, [32], drills)
    facts = fact_probe(tiny, replays)
    full, window = (facts[facts["arm"] == arm] for arm in ("full", "window"))
    assert full["distance"].tolist() == window["distance"].tolist() and full["distance"].max() > 64
    assert full["right"].mean() > 0.95
    assert window["right"][window["distance"] > 32].mean() < 0.5 < window["right"][window["distance"] < 28].mean()
    table = fact_accuracy(facts, (0, 28, 512))
    assert table["n"].sum() == len(facts)
    row = table[(table["arm"] == "window") & (table["distance_low"] == 28)].iloc[0]
    assert row["low"] < row["right"] < row["high"] and row["distance_high"] == 512


def test_distances_outside_the_edges_and_traces_without_facts_are_refused(tiny, qwen2_recording):
    facts = pd.DataFrame({"arm": "a", "kv_budget": 8, "trace": "t", "distance": [3, 70], "right": True})
    with pytest.raises(ConfigError, match="outside the edges 0 to 64"):
        fact_accuracy(facts, (0, 16, 64))
    with pytest.raises(ConfigError, match="no look-up of a value told once"):
        fact_probe(tiny, {})


def test_the_outputs_of_a_comparisons_full_cache_are_read_under_its_arms(tmp_path):
    grid = tmp_path / "two.yml"
    grid.write_text(
        "study: two\ndecoding: {n_problems: 9, temperature: 0.6, max_new_tokens: 300, batch_size: 9, threads: 1}\n"
        "common: {n_sink: 4, n_recent: 16, buffer: 8}\n"
        "arms: {random: {policy: random}, lagkv: {policy: lagkv, lag_size: 16}}\n"
        "stages: {grid: {models: [tiny], arms: all, datasets: [chain-a], kv_budgets: [96, 400], protect_prompt: [true],"
        " seeds: [0]}}\n"
    )
    measure_fidelity(load_grid(grid).comparison.cells, tmp_path, n_traces=3)
    rows = pd.read_csv(tmp_path / "replays.csv").set_index(["arm", "kv_budget"])
    assert len(rows) == 3 * (1 + 2 * 2) and set(rows["trace"]) == {0, 1, 2}
    for arm in ("random", "lagkv"):
        assert (rows.loc[arm, 400]["divergence"].abs() < 1e-6).all() and (rows.loc[arm, 400]["agreement"] == 1).all()
        assert (rows.loc[arm, 96]["divergence"] > 1e-6).all() and (rows.loc[arm, 96]["recall"] < 1).all()
    assert rows.loc["lagkv", 96]["divergence"].mean() < rows.loc["random", 96]["divergence"].mean()
