"""Drivers of the official vectors for policies that score from keys, values, calibration or a gate."""

from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace

import torch
from oracle_cases import Case, assert_scores, kept_by, view_of
from torch import Tensor

from kvlib.kernels.redundancy import redundancy
from kvlib.kernels.rope import rotate
from kvlib.policies.base import Policy, View
from kvlib.policies.cur import CUR
from kvlib.policies.expected import ExpectedAttention
from kvlib.policies.keydiff import KeyDiff
from kvlib.policies.knorm import KNorm
from kvlib.policies.lagkv import LagKV
from kvlib.policies.observe import keep_window
from kvlib.policies.triattention import TriAttention, query_scores
from kvlib.policies.trimkv import LOG_BETA, TrimKV
from kvlib.policies.vase import VaSE, value_magnitude


def slots(mask: Tensor) -> list:
    """Kept slot indices of a bool mask `[..., N]`, ascending."""
    if mask.dim() == 1:
        return mask.nonzero()[:, 0].tolist()
    return [slots(row) for row in mask]


def check_batch(case: Case, policy: Policy) -> None:
    """A press: keys (and values) with a batch axis in, scores and kept out."""
    keys = case.double("k")[None]
    values = keys if policy_reads_keys_only(policy) else case.double("v")[None]
    view = view_of(keys, values=values, n_keep=case.params["keep"])
    scores, _ = policy.score(view, {})
    scores = scores.expand(keys.shape[:-1])
    assert_scores(scores[0][..., policy.n_sink :], case["scores"][..., policy.n_sink :])
    assert slots(kept_by(policy, view, scores)[0]) == case["kept"].tolist()


def policy_reads_keys_only(policy: Policy) -> bool:
    return isinstance(policy, KNorm | KeyDiff)


@dataclass(frozen=True, kw_only=True)
class GivenProjection(CUR):
    """CUR whose draw is the recorded one."""

    columns: Tensor
    resample: bool = True

    def projection(self, view):
        return self.columns


def check_cur(case: Case) -> None:
    p = case.params
    window, local = p.get("local_window_size", 16), p.get("use_local_approximation", True)
    settings = {
        "n_sink": p.get("num_sinks", 4),
        "leverage": p.get("leverage_type", "kv_product"),
        "local_window": window if local else 0,
    }
    if p.get("use_random_leverage"):
        check_batch(case, GivenProjection(columns=case.double("projection"), **settings))
    else:
        check_batch(case, CUR(**settings))


def check_lagkv(case: Case) -> None:
    p = case.params
    check_batch(case, LagKV(n_sink=p["n_sink"], lag_size=p["lag_size"], cross_scoring=p.get("cross_scoring", False)))


def check_expected(case: Case) -> None:
    p = case.params
    n_sink, n = p.get("n_sink", 4), p["N"]
    policy = ExpectedAttention(
        n_sink=n_sink,
        n_obs=n - n_sink,
        n_future=p["n_future_positions"],
        use_covariance=p.get("use_covariance", True),
        use_vnorm=p.get("use_vnorm", True),
        epsilon=p.get("epsilon", 0.0),
    )
    frequencies = case.double("inv_freq")
    queries = rotate(case.double("q_prerope")[:, n_sink:], torch.arange(n_sink, n), frequencies)
    view = view_of(
        case.double("k")[None, None], queries[None, None], case.double("v")[None, None],
        n_keep=p["keep"], frequencies=frequencies,
    )  # fmt: skip
    scores, _ = policy.score(view, {})
    assert_scores(scores[0, 0, :, n_sink:], case["scores"][:, n_sink:])
    assert slots(kept_by(policy, view, scores)[0, 0]) == case["kept"].tolist()


def check_triattention(case: Case) -> None:
    p = case.params
    modes = {"per_layer_per_head": "head", "per_head": "head_across_layers", "union": "model"}
    # Cached keys, and the queries that kvlib calibrates on, carry RoPE's own scale.
    scale = case.double("freq_scale_sq").sqrt()
    re, im, mean_abs = (scale * case.double(name) for name in ("q_mean_re", "q_mean_im", "q_abs_mean"))
    if {"abs_minus_mean": False, "abs_only": True}[p["norm_term"]]:
        mean_abs = mean_abs + torch.hypot(re, im)
    statistics = SimpleNamespace(mean_re=re, mean_im=im, mean_abs=mean_abs)
    policy = TriAttention(
        share=modes[p["mode"]],
        normalise=p["normalise"],
        group_reduce=p["layer_head_reduce"],
        max_offset=int(case["offsets"].max()),
        offset_reduce=p["offset_reduce"],
        calibration=statistics,
    )
    # Prompt slots are those of position < n_prompt; the recorded positions count the rest on.
    assert p["rope_style"] == "half"
    positions, prefix = torch.from_numpy(case["positions"])[None, None], p["prefix"]
    assert positions.shape[2] == (p["H"] if p["positions_per_head"] else 1)
    n_prompt = int(positions[..., prefix - 1].max()) + 1 if prefix else 0
    view = view_of(
        case.double("k")[:, None], n_keep=p["budget"], positions=positions, seen=p["round_start"], n_prompt=n_prompt,
        frequencies=torch.from_numpy(case["inv_freq"]).double(),
    )  # fmt: skip
    assert int(view.is_prompt.sum()) == prefix * positions.shape[2]
    raw = query_scores(view, statistics, policy.max_offset, p["offset_reduce"])[:, 0, ..., prefix:].flatten(1, 2)
    assert_scores(raw, case["scores64"])
    scores, _ = policy.score(view, {})
    kept = kept_by(policy, view, scores)[:, 0]
    if p["mode"] == "per_layer_per_head":
        ranked = scores[:, 0, :, prefix:].flatten(0, 1)
    elif p["mode"] == "per_head":
        ranked, kept = scores[:, 0, :, prefix:].mean(0), kept[0]
    else:
        assert slots(kept[0, 0]) == case["kept"].tolist()
        return
    # The original ranks in float32, with the error that it reports.
    torch.testing.assert_close(ranked, case.double("selection_scores"), rtol=1e-4, atol=2 * p["max_abs_fp32_error"])
    assert slots(kept) == case["kept"].tolist()


def check_trimkv(case: Case) -> None:
    p = case.params
    log_beta = case.double("log_beta")[None]
    positions = torch.from_numpy(case["positions"])[None]
    use_knorm = {"alpha": False, "knorm_alpha": True}[p["strategy"]]
    keys = case.double("k")[None] if use_knorm else torch.ones(*log_beta.shape, p["D"], dtype=torch.float64)
    policy = TrimKV(n_recent=p["sliding_window"], use_knorm=use_knorm)
    view = view_of(keys, n_keep=p["memory"], positions=positions, seen=p["seen"])
    scores, _ = policy.score(view, {LOG_BETA: log_beta})
    ranked = p["N"] - p["sliding_window"]
    assert_scores(scores[0][..., :ranked], case["scores"][..., :ranked])
    assert slots(kept_by(policy, view, scores)[0]) == case["kept"].tolist()


@dataclass(frozen=True)
class GivenNoise(View):
    """A view whose exponential noise is the recorded one."""

    exponential: Tensor = field(default=None, repr=False)

    def uniform(self):
        return torch.exp(-self.exponential)


VASE_MODES = {
    "attn", "attn_rkv", "range_attn", "range_sample_attn", "range_sink_sample_attn", "var_sink_sample_attn",
    "l2_sink_sample_attn", "cur_fixed_gauss", "cur_resample_gauss", "evict_large_range",
}  # fmt: skip
"""With the recorded draw, a projection drawn once is one drawn afresh."""


def check_vase(case: Case) -> None:
    p = case.params
    keys, values = case.double("k")[None, None], case.double("v")[None, None]
    budget, recent = p["budget"], p["recent"]
    older = slice(0, p["N"] - recent)
    mode, lam, temperature, kernel = p["mode"], p["lam"], p["temperature"], 5 if p["smooth"] else 1
    n_large, sinks = p["n_large"] * (mode != "attn"), p["sinks"] * ("sink" in mode or "cur" in mode)
    assert mode in VASE_MODES
    if mode.startswith("cur_"):
        policy = GivenProjection(
            n_sink=sinks, n_recent=recent, local_window=0, columns=case.double("projection") / 20**0.5
        )
        view = view_of(keys, values=values, n_keep=budget)
        scores, _ = policy.score(view, {})
        ranked = scores[0, 0, :, older]
        ranked = ranked / ranked.sum(-1, keepdim=True)
        assert_scores(ranked[:, sinks:], case["topk0_scores"][:, sinks:])
        assert slots(kept_by(policy, view, scores)[0, 0]) == case["kept"].tolist()
        return
    sampled = "sample" in mode
    policy = VaSE(
        n_obs=recent, n_recent=recent, n_sink=sinks, kernel=kernel, large=n_large / budget, draw=sampled,
        magnitude={"var": "variance", "l2": "l2"}.get(mode.split("_")[0], "range"),
    )  # fmt: skip
    if mode == "evict_large_range":
        smallest = -value_magnitude(values[0, 0, :, older], "range")
        view = view_of(keys, values=values, n_keep=budget)
        kept = kept_by(policy, view, keep_window(smallest[None, None], recent))
        assert slots(kept[0, 0]) == case["kept"].tolist()
        return
    view = view_of(keys, case.double("queries")[None, None], values, n_keep=budget)
    view = replace(view, scaling=view.scaling / temperature)
    attention = policy.importance(view)[0, 0]
    if mode == "attn_rkv":
        repeated = redundancy(keys[0, 0, :, older], None)
        mixed = lam * attention - (1 - lam) * repeated
        assert_scores(mixed, case["topk0_scores"])
        kept = kept_by(policy, view, keep_window(mixed[None, None], recent))
        assert slots(kept[0, 0]) == case["kept"].tolist()
        return
    if mode == "attn":
        assert_scores(attention, case["topk0_scores"])
    else:
        magnitude = value_magnitude(view.values[0, 0, :, older], policy.magnitude)
        assert_scores(magnitude[:, policy.n_sink :], case["topk0_scores"][:, policy.n_sink :])
    if sampled:
        weights = case.double("sample_weights")
        torch.testing.assert_close(attention[weights > 0], weights[weights > 0], rtol=1e-4, atol=1e-7)
        # The window draws nothing, whatever its noise.
        exponential = torch.nn.functional.pad(case.double("noise"), (0, recent), value=1.0)[None, None]
        view = GivenNoise(**{f.name: getattr(view, f.name) for f in fields(view)}, exponential=exponential)
    scores, _ = policy.score(view, {})
    assert slots(kept_by(policy, view, scores)[0, 0]) == case["kept"].tolist()


CHECKS = {
    "kvpress_cur": check_cur,
    "kvpress_expectedattention": check_expected,
    "kvpress_keydiff": lambda case: check_batch(case, KeyDiff()),
    "kvpress_knorm": lambda case: check_batch(case, KNorm()),
    "kvpress_lagkv": check_lagkv,
    "triattention": check_triattention,
    "trimkv": check_trimkv,
    "vase": check_vase,
}
