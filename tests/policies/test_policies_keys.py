"""What policies that score from keys, values, calibration, token ids or a gate promise beyond their oracle vectors."""

import dataclasses
import math

import pytest
import torch
from conftest import as_requests, decode, prompts
from oracle_cases import kept_by, view_of
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.files import checked_file
from kvlib.fitted import FITTED, held_out_of, load_fitted, save_fitted
from kvlib.kernels.rope import rotate
from kvlib.models import TINY, weights_sha256
from kvlib.policies.base import Policy, View
from kvlib.policies.cur import CUR
from kvlib.policies.expected import ExpectedAttention
from kvlib.policies.golden import Golden
from kvlib.policies.keydiff import KeyDiff
from kvlib.policies.knorm import KNorm
from kvlib.policies.lagkv import LagKV
from kvlib.policies.sepllm import SEPARATOR, SepLLM
from kvlib.policies.triattention import QueryStatistics, TriAttention, query_scores
from kvlib.policies.trimkv import LOG_BETA, RetentionGate, TrimKV
from kvlib.policies.vase import VaSE
from kvlib.train.calibration import query_statistics
from kvlib.train.gate import evaluate_gate, gate_loss, record, train_gate
from kvlib.train.traces import Trace

L, H, G, N, D = 2, 2, 3, 60, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(seed: int = 0) -> QueryStatistics:
    re, im = normal(2, L, H * G, D // 2, seed=seed)
    return QueryStatistics(re, im, torch.hypot(re, im) + normal(L, H * G, D // 2, seed=seed + 1).abs())


def gappy_positions(R: int, seed: int = 0) -> Tensor:
    """`[1, R, 1, N]`: the first 6, then gaps, as after some rounds."""
    generator = torch.Generator().manual_seed(seed)
    rows = [6 + torch.randperm(200, generator=generator)[: N - 6].sort().values for _ in range(R)]
    return torch.stack([torch.cat([torch.arange(6), row]) for row in rows])[None, :, None].int()


def small(R: int, seed: int = 0, n_prompt: tuple[int, ...] = ()) -> View:
    """A view of R rows of N gappy slots whose prompts differ in length."""
    view = view_of(
        normal(L, R, H, N, D, seed=seed),
        normal(L, R, H * G, 8, D, seed=seed + 1),
        normal(L, R, H, N, D, seed=seed + 2),
        positions=gappy_positions(R, seed),
        seen=206,
    )
    return dataclasses.replace(
        view,
        n_prompt=torch.tensor(n_prompt or [3 + 2 * row for row in range(R)]),
        n_keep=torch.tensor([24 + 4 * row for row in range(R)]),
        noise_key=torch.arange(R) + 11,
    )


POLICIES = {
    "knorm": KNorm(),
    "keydiff": KeyDiff(),
    "lagkv": LagKV(lag_size=8),
    "cur": CUR(),
    "cur-resample": CUR(resample=True, local_window=0),
    "vase": VaSE(n_obs=8, n_recent=8),
    "expected": ExpectedAttention(n_obs=8, n_future=16),
    "triattention": TriAttention(calibration=statistics()),
    "triattention-per-layer": TriAttention(calibration=statistics(), share="head"),
    "triattention-union": TriAttention(calibration=statistics(), share="model"),
    "trimkv": TrimKV(use_knorm=True),
    "golden": Golden(attention=normal(L, H, 220, 220).abs()),
}


def state_of(policy: Policy, R: int) -> dict[str, Tensor]:
    return {name: -normal(L, R, H, N, seed=9).abs() for name in policy.state_names}


def row_of(view: View, row: int) -> View:
    """The view that the row alone would give."""
    one = slice(row, row + 1)
    return dataclasses.replace(
        view,
        positions=view.positions[:, one],
        _slots=view._slots.expand(1, view.n_prompt.numel(), 1, N)[:, one],
        **{name: getattr(view, name)[one] for name in ("n_prompt", "n_keep", "noise_key", "n_seen", "rows")},
    )


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_is_scored_as_if_it_were_alone(name):
    """Prompt, number kept and noise key differ by row; no row may see another's."""
    policy, R = POLICIES[name], 3
    view, state = small(R), state_of(POLICIES[name], R)
    scores = policy.score(view, state)[0].expand(-1, R, -1, N)
    for row in range(R):
        alone = {key: value[:, row : row + 1] for key, value in state.items()}
        expected = policy.score(row_of(view, row), alone)[0]
        torch.testing.assert_close(scores[:, row : row + 1], expected.expand_as(scores[:, row : row + 1]))


@pytest.mark.parametrize("name", POLICIES)
def test_scores_do_not_depend_on_where_slots_are_stored(name):
    """Lags, windows and pooling follow positions, although survivors lie anywhere in the cache."""
    policy, R = POLICIES[name], 2
    view, state = small(R), state_of(POLICIES[name], R)
    place = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    moved = {key: torch.empty_like(getattr(view, key)) for key in ("_keys", "_values")}
    for key, tensor in moved.items():
        tensor[..., place, :] = getattr(view, key)
    scattered = dataclasses.replace(view, _slots=place.expand(1, R, 1, N), **moved)
    torch.testing.assert_close(policy.score(scattered, state)[0], policy.score(view, state)[0])
    if name in ("lagkv", "cur"):
        unsorted = dataclasses.replace(view, **moved)
        assert not torch.allclose(policy.score(unsorted, state)[0][..., place], policy.score(view, state)[0]), (
            "slots in storage order give other scores, so the view's order matters"
        )


def test_triattention_equals_the_trigonometric_sum_over_keys_before_rope():
    """The published formula, key by key, with positions and inverse RoPE."""
    view, calibration = small(1), statistics()
    ours = query_scores(view, calibration, 2**16, "mean")
    for layer, head, slot in ((0, 0, 0), (1, 1, 17), (0, 1, 59)):
        p, n = int(view.positions[0, 0, 0, slot]), int(view.n_seen[0])
        key = rotate(view.keys[layer, 0, head, slot], torch.tensor(-p), view.inv_freq)
        for g in range(G):
            total = 0.0
            for f in range(D // 2):
                re, im, mean_abs = (
                    float(x[layer, head * G + g, f])
                    for x in (calibration.mean_re, calibration.mean_im, calibration.mean_abs)
                )
                k = complex(key[f], key[f + D // 2])
                q, w = complex(re, im), float(view.inv_freq[f])
                phi = math.atan2(q.imag, q.real) - math.atan2(k.imag, k.real)
                mean = sum(math.cos(w * (n - p + 2**i) + phi) for i in range(17)) / 17
                total += abs(q) * abs(k) * mean + (mean_abs - abs(q)) * abs(k)
            assert ours[layer, 0, head, g, slot].item() == pytest.approx(total, rel=1e-9, abs=1e-9)


def test_triattention_standardises_over_what_is_not_prompt():
    """However large the prompt's keys, the other slots' scores stay."""
    policy, view = TriAttention(calibration=statistics(), share="head"), small(2, n_prompt=(6, 3))
    scores = policy.score(view, {})[0]
    loud = dataclasses.replace(view, _keys=torch.where(view.is_prompt[..., None], 50 * view._keys, view._keys))
    rest = ~view.is_prompt.expand_as(scores)
    torch.testing.assert_close(policy.score(loud, {})[0][rest], scores[rest])
    ranked_too = dataclasses.replace(policy, protect_prompt=False)
    assert not torch.allclose(ranked_too.score(loud, {})[0][rest], ranked_too.score(view, {})[0][rest])


def test_expected_attention_averages_true_rotations():
    """Mean and variance of the logits of observed queries, each rotated to every future position in turn."""
    policy, view = ExpectedAttention(n_obs=8, n_future=16, n_sink=2), small(1)
    n, W = int(view.n_seen[0]), 8
    before = rotate(view.queries, -torch.arange(n - W, n), view.inv_freq)
    later = sum(rotate(before, torch.tensor(n + ahead), view.inv_freq) for ahead in range(16)) / 16
    logits = later.view(L, 1, H, G, W, D) @ view.keys[:, :, :, None].transpose(-1, -2)
    expected = logits.mean(-2) / D**0.5 + logits.var(-2, correction=0) / (2 * D)
    expected = expected[..., 2:].softmax(-1).mean(3) * view.values[..., 2:, :].norm(dim=-1)
    scores = policy.score(view, {})[0]
    torch.testing.assert_close(scores[..., 2:], expected)

    # The number of buffered queries in place of the position, as in kvpress' decoding.
    wrong = dataclasses.replace(view, _ring=rotate(before, torch.arange(W), view.inv_freq), n_seen=torch.tensor([W]))
    assert not torch.equal(kept_by(policy, view, scores), kept_by(policy, view, policy.score(wrong, {})[0]))


def test_lagkv_survives_channels_that_do_not_vary():
    keys = normal(1, 1, 1, 40, D)
    keys[..., 3] = 1.0
    view = view_of(keys, n_keep=20)
    scores = LagKV(lag_size=8, cross_scoring=True).score(view, {})[0]
    assert scores.isfinite().all()
    assert (scores[..., -8:] == 1).all()


def test_cur_draws_by_request_round_layer_and_head():
    policy, view = POLICIES["cur-resample"], small(2)
    drawn = policy.projection(view)
    assert torch.equal(drawn, policy.projection(small(2, seed=3))), "neither keys nor positions matter"
    flat = drawn.flatten(0, 2).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)
    assert not torch.equal(drawn, policy.projection(dataclasses.replace(view, n_seen=view.n_seen + 1)))
    many = policy.projection(view_of(normal(4, 3, 4, 2, 64)))
    assert many.mean().item() == pytest.approx(0, abs=2e-3)
    assert many.var().item() == pytest.approx(1 / 20, rel=0.02)


def test_vase_keeps_the_largest_value_ranges_of_each_row_and_repeats_its_draw():
    policy, view = VaSE(n_obs=8, n_recent=8, n_sink=2, large=0.25), small(2)
    kept = kept_by(policy, view, policy.score(view, {})[0])
    spread = (view.values.amax(-1) - view.values.amin(-1))[..., :-8]
    for row, n_keep in enumerate(view.n_keep.tolist()):
        rank = spread[:, row, :, 2:].topk(n_keep // 4 - 2).indices + 2
        assert kept[:, row].gather(-1, rank).all()
        assert (kept[:, row].sum(-1) == n_keep).all()
    assert torch.equal(kept, kept_by(policy, view, policy.score(view, {})[0]))
    later = dataclasses.replace(view, n_seen=view.n_seen + 64)
    other = dataclasses.replace(view, noise_key=view.noise_key + 1)
    assert all(not torch.equal(kept, kept_by(policy, v, policy.score(v, {})[0])) for v in (later, other))


def test_vase_draws_in_proportion_to_attention():
    """The first of the draws: over many rows of equal content, each slot wins as often as its attention says."""
    R, n = 4000, 6
    keys, queries = normal(1, 1, 1, n + 1, 4).expand(1, R, -1, -1, -1), normal(1, 1, 1, 1, 4).expand(1, R, -1, -1, -1)
    view = dataclasses.replace(view_of(keys, queries, n_keep=2), noise_key=torch.arange(R))
    policy = VaSE(n_obs=1, n_recent=1, n_sink=0, large=0.0, kernel=1)
    kept = kept_by(policy, view, policy.score(view, {})[0])[0, :, 0, :n]
    attention = policy.importance(view)[0, 0, 0]
    torch.testing.assert_close(kept.double().mean(0), attention, rtol=0, atol=4 * 0.5 / R**0.5)


def test_sepllm_keeps_the_newest_separators():
    policy = SepLLM(n_sink=2, n_recent=4, separators=(5, 7))
    tokens = torch.tensor([5, 1, 7, 2, 5, 3, 7, 2, 5, 1, 1, 2, 3, 4, 5, 6])
    made = policy.creation_score(torch.zeros(16, 3), tokens, torch.zeros(16, dtype=torch.bool))[SEPARATOR]
    assert made.tolist() == [float(t in (5, 7)) for t in tokens.tolist()]
    state = {SEPARATOR: made[None, None, None]}

    def kept(n_keep: int) -> list[int]:
        view = view_of(normal(1, 1, 1, 16, 4), n_keep=n_keep)
        return kept_by(policy, view, policy.score(view, state)[0])[0, 0, 0].nonzero()[:, 0].tolist()

    assert kept(8) == [0, 1, 6, 8, 12, 13, 14, 15]
    assert kept(12) == [0, 1, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15], "and the newest of the rest"


def test_trimkv_orders_by_decay_and_age():
    """An old token is kept over a newer one exactly if its beta, raised to its age, is larger."""
    beta = torch.tensor([0.999, 0.5, 0.9, 0.99])
    view = view_of(normal(1, 1, 1, 4, 4), positions=torch.tensor([0, 50, 90, 99]).view(1, 1, 1, 4), seen=100)
    score = TrimKV().score(view, {LOG_BETA: beta.log().view(1, 1, 1, 4)})[0].flatten()
    torch.testing.assert_close(score.exp(), beta ** (101 - torch.tensor([0, 50, 90, 99])))


@pytest.mark.parametrize("seed", range(4))
def test_golden_keeps_at_least_the_future_mass_of_any_other_selection(seed):
    T, seen, n_keep = 90, 60, 20
    logits = normal(L, H, T, T, seed=seed).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    attention = 3 * logits.softmax(-1)
    view = view_of(normal(L, 1, H, seen, D, seed=seed), n_keep=n_keep, seen=seen)
    future = attention[:, :, seen:, :seen].sum(2)

    def mass(policy: Policy) -> Tensor:
        return (future * kept_by(policy, view, policy.score(view, {})[0])[:, 0]).sum(-1)

    best = mass(Golden(attention=attention))
    torch.testing.assert_close(best, future.topk(n_keep).values.sum(-1))
    assert all((best > mass(policy)).all() for policy in (KNorm(), KeyDiff(), LagKV(lag_size=8), CUR(n_sink=0)))


def test_calibration_is_that_of_the_queries_before_rope(any_model):
    """Against the query projections of the model, RoPE never applied."""
    traces = prompts(4, seed=2)
    projected: list[list[Tensor]] = [[] for _ in range(3)]

    def keep(layer: int):
        return lambda module, inputs, out: projected[layer].append(out.reshape(out.shape[1], 14, -1))

    hooks = [
        getattr(block.self_attn, "q_norm", block.self_attn.q_proj).register_forward_hook(keep(layer))
        for layer, block in enumerate(any_model.model.layers)
    ]
    made = query_statistics(any_model, traces)
    for hook in hooks:
        hook.remove()
    queries = torch.stack([torch.cat(layer) for layer in projected]).transpose(1, 2)
    first, second = queries.chunk(2, -1)
    torch.testing.assert_close(made.mean_re.double(), first.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.mean_im.double(), second.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.mean_abs.double(), torch.hypot(first, second).mean(2), rtol=1e-5, atol=1e-6)


def test_saved_statistics_come_back(tmp_path):
    made = statistics()
    path = save_fitted("calibration", made, tmp_path, "abc", n_traces=2)
    loaded = load_fitted("calibration", path, "abc")
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), made.buffers(), strict=True))


def test_gated_attention_is_full_attention_without_decay_and_a_window_with_much(qwen2):
    """Both terms of the loss at their ends: beta 1 copies the model and exceeds the capacity, beta 0 the reverse."""
    recorded = record(qwen2, range(40))
    gate = RetentionGate(56, 3, 2)

    def terms(bias: float) -> list[float]:
        torch.nn.init.constant_(gate.layers[2].bias, bias)
        return [term.item() for term in gate_loss(gate, recorded, capacity=4)]

    distilled, excess = terms(30.0)
    assert distilled == pytest.approx(0, abs=1e-9)
    assert excess == pytest.approx(sum(max(0, i / 4 - 1) for i in range(1, 41)) / 40)
    distilled, excess = terms(-30.0)
    assert distilled > 0.1
    assert excess == 0
    eager = (recorded.logits[1].softmax(-1) @ recorded.values[1][:, None]).flatten(0, 1)
    seen = {}
    hook = qwen2.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, x, y: seen.update(x=x[0][0]))
    record(qwen2, range(40))
    hook.remove()
    torch.testing.assert_close(eager, seen["x"].unflatten(-1, (14, -1)).transpose(0, 1).float(), rtol=1e-4, atol=1e-4)


def test_gate_loss_decays_each_key_by_its_own_beta(qwen2):
    """Both terms, summed query by query."""
    recorded = record(qwen2, range(20))
    torch.manual_seed(0)
    gate = RetentionGate(56, 3, 2)
    torch.nn.init.normal_(gate.layers[2].weight)
    beta = gate(recorded.hidden).exp()
    errors, excess = [], []
    for layer, (logits, values) in enumerate(zip(recorded.logits, recorded.values, strict=True)):
        for head in range(2):
            kept = [beta[layer, : i + 1, head] ** torch.arange(i, -1, -1) for i in range(20)]
            excess.append(sum(max(0.0, row.sum().item() / 4 - 1) for row in kept) / 20)
            for group in range(7):
                error = norm = 0.0
                for i, row in enumerate(kept):
                    weight = logits[head, group, i, : i + 1].softmax(-1)
                    gated = weight * row / (weight * row).sum()
                    full = weight @ values[head, : i + 1]
                    error += (gated @ values[head, : i + 1] - full).square().sum().item()
                    norm += full.square().sum().item()
                errors.append(error / norm)
    distilled, over = gate_loss(gate, recorded, capacity=4)
    assert distilled.item() == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    assert over.item() == pytest.approx(sum(excess) / len(excess), rel=1e-3)


def test_a_gate_learns_reproducibly_and_a_saved_one_comes_back(qwen2, tmp_path):
    ids = [torch.randint(0, 64, (48,)).tolist() for _ in range(2)]
    gate = train_gate(qwen2, ids, capacity=8, n_epochs=2)
    again = train_gate(qwen2, ids, capacity=8, n_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(gate.parameters(), again.parameters(), strict=True))
    before, after = (
        sum(sum(t.item() for t in gate_loss(g, record(qwen2, trace), 8)) for trace in ids)
        for g in (RetentionGate(56, 3, 2), gate)
    )
    assert after < before
    held_out = evaluate_gate(gate, qwen2, [Trace(tuple(trace), 3, 40) for trace in ids], budget=8, every=16)
    assert 0 < max(held_out.gate, held_out.newest, held_out.random) <= held_out.best < 1
    path = save_fitted("gate", gate, tmp_path, "abc", held_out=dataclasses.asdict(held_out))
    loaded, hidden = load_fitted("gate", path, "abc"), torch.randn(5, 56)
    assert held_out_of(path) == dataclasses.asdict(held_out)
    assert torch.equal(loaded(hidden), gate(hidden))
    assert loaded(hidden).shape == (3, 5, 2)
    assert (loaded(hidden) < 0).all()


def test_the_tiny_model_ships_its_calibration_and_gate():
    sha256 = weights_sha256("tiny")
    for need in ("calibration", "gate"):
        load_fitted(need, checked_file(TINY, FITTED[need].file), sha256)
    held_out = held_out_of(TINY / FITTED["gate"].file)
    assert held_out["random"] < held_out["gate"] <= held_out["best"]


def engine_policies() -> dict[str, Policy]:
    torch.manual_seed(0)
    frequencies = 2
    calibration = QueryStatistics(*normal(3, 3, 14, frequencies).abs())
    return {
        "knorm": KNorm(buffer=4),
        "keydiff": KeyDiff(buffer=4),
        "lagkv": LagKV(buffer=4, lag_size=8),
        "cur-resample": CUR(buffer=4, resample=True),
        "vase": VaSE(buffer=4, n_obs=8, n_recent=8),
        "expected": ExpectedAttention(buffer=4, n_obs=8, n_future=16),
        "triattention": TriAttention(buffer=4, calibration=calibration),
        "triattention-per-layer": TriAttention(buffer=4, calibration=calibration, share="head"),
        "triattention-union": TriAttention(buffer=4, calibration=calibration, share="model"),
        "sepllm": SepLLM(n_recent=8, separators=tuple(range(0, 64, 5))),
        "trimkv": TrimKV(buffer=4, gate=RetentionGate(56, 3, 2).double()),
    }


@pytest.mark.parametrize("name", engine_policies())
def test_decoding_a_request_does_not_depend_on_its_batch(name, qwen2):
    """The whole engine: rows of other prompts beside it change neither tokens nor keep sets."""
    policy, requests = engine_policies()[name], as_requests(prompts(3))
    together = decode(qwen2, policy, 28, requests, 3, trace=True)
    for request in requests:
        alone = decode(qwen2, policy, 28, [request], 1, trace=True)[request.id]
        assert alone.rounds > 0
        assert (alone.tokens, alone.kept) == (together[request.id].tokens, together[request.id].kept)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LagKV(lag_size=1), "LagKV: lag_size is 1"),
        (lambda: CUR(leverage="k"), "CUR: leverage is 'k'"),
        (lambda: VaSE(share="layer"), "VaSE: share is 'layer'"),
        (lambda: VaSE(large=1.5), "VaSE: large is 1.5"),
        (lambda: ExpectedAttention(n_future=0), "ExpectedAttention: n_future is 0"),
        (lambda: TriAttention(share="layer"), "TriAttention: share is 'layer'"),
        (lambda: TriAttention(offset_reduce="sum"), "TriAttention: offset_reduce is 'sum'"),
        (lambda: SepLLM(share="head"), "SepLLM: share is 'head'"),
        (lambda: TrimKV(share="model"), "TrimKV: share is 'model'"),
        (lambda: Golden(), "Golden: attention is missing"),
    ],
)
def test_settings_are_checked_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
