"""Promises of the policies that score by attention, beyond their oracle vectors."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import as_requests, decode, prompts
from oracle_cases import Case, kept_by, view_of

from kvlib.engine.decoder import Decoder, Request
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError
from kvlib.kernels.redundancy import redundancy
from kvlib.policies import H2O, RKV, Policy, SnapKV
from kvlib.policies.base import MASS
from kvlib.policies.caote import CAOTE
from kvlib.policies.gkv import GKV
from kvlib.policies.lazy import LAST_HIT, LONGEST_GAP, LazyEviction
from kvlib.policies.observe import attention, decoded, observe
from kvlib.policies.raas import STAMP, RaaS
from kvlib.policies.rpc import RPC
from kvlib.policies.tova import TOVA

SMALL = {
    "caote": CAOTE(base=SnapKV(n_obs=4, n_recent=4, kernel=3)),
    "gkv": GKV(n_obs=4, n_recent=4),
    "lazy": LazyEviction(alpha=0.05, n_recent=4, buffer=3),
    "observed": H2O(per_query=True),
    "raas": RaaS(alpha=0.05, top_half=True, buffer=3),
    "rkv": RKV(n_obs=4, n_recent=4),
    "rpc": RPC(n_obs=4, n_recent=4, interval=8),
    "snapkv": SnapKV(n_obs=4, n_recent=4, kernel=3, pooling="avg", group="mean", domain="all"),
    "tova": TOVA(),
}


def random_view(seed: int, R: int = 1, L: int = 1, H: int = 2, G: int = 2, N: int = 24, W: int = 4, D: int = 8, **rest):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, D, generator=generator, dtype=torch.float64)

    return view_of(normal(L, R, H, N), 2 * normal(L, R, H * G, W), normal(L, R, H, N), **rest)


def kept_sets(policy: Policy, view, scores: torch.Tensor) -> list:
    """Kept slots by layer, row and head."""
    return [[[h.nonzero()[:, 0].tolist() for h in row] for row in layer] for layer in kept_by(policy, view, scores)]


def decoder_of(model, policy: Policy, kv_budget: int, prompt: tuple[int, ...], max_new_tokens: int = 40) -> Decoder:
    decoder = Decoder(
        model, policy, kv_budget, n_rows=1, n_prompt_max=len(prompt), max_new_tokens=max_new_tokens,
        sampling=Sampling(0.0), eos_ids=(),
    )  # fmt: skip
    decoder.admit(0, Request("0", prompt, 0))
    return decoder


@pytest.mark.parametrize("name", SMALL)
def test_a_row_is_scored_as_if_it_were_alone_and_its_state_is_not_touched(name):
    policy, n_prompt = SMALL[name], torch.tensor([3, 6, 0])
    view = dataclasses.replace(random_view(1, R=3, L=2, W=max(1, policy.n_queries)), n_prompt=n_prompt)
    generator = torch.Generator().manual_seed(2)
    state = {key: torch.randint(0, 9, (2, 3, 2, 24), generator=generator).float() for key in policy.state_names}
    given = {key: tensor.clone() for key, tensor in state.items()}
    scores, after = policy.score(view, state)
    assert all(torch.equal(state[key], given[key]) for key in state)
    assert after.keys() == state.keys()
    assert all(tensor.dtype == torch.float32 and tensor.shape == (2, 3, 2, 24) for tensor in after.values())
    for row in range(3):
        one = slice(row, row + 1)
        parts = {key: getattr(view, key)[one] for key in ("n_prompt", "n_keep", "noise_key", "n_seen", "rows")}
        parts |= {key: getattr(view, key)[:, one] for key in ("positions", "_slots")}
        alone, alone_after = policy.score(
            dataclasses.replace(view, **parts), {key: tensor[:, one] for key, tensor in state.items()}
        )
        torch.testing.assert_close(alone, scores[:, one])
        for key, tensor in alone_after.items():
            torch.testing.assert_close(tensor, after[key][:, one])


def test_rkv_compares_each_row_with_itself_and_the_original_keeps_other_tokens_in_row_1():
    """The original reads the keys of batch row 0 for the redundancy of every row (rkv/utils.py, cal_similarity)."""
    policy = RKV(n_obs=4, n_recent=4, kernel=3)
    view = random_view(3, R=2, N=48, n_keep=16)
    scores, _ = policy.score(view, {})
    ours = kept_sets(policy, view, scores)
    as_row_0 = redundancy(view.keys[:, :1], policy.threshold).expand(-1, 2, -1, -1)[..., :-4]
    original = 0.1 * policy.importance(view) - 0.9 * as_row_0
    theirs = kept_sets(policy, view, torch.nn.functional.pad(original, (0, 4), value=torch.inf))
    assert theirs[0][0] == ours[0][0]
    assert theirs[0][1] != ours[0][1]


def test_lazy_timestamps_are_whole_numbers_where_the_originals_float16_merges_steps():
    """Step 4099 is 4100 in float16, and of two slots hit at 4097 and 4098 the later one must rank higher."""
    assert torch.tensor(4099.0).half() == 4100
    policy = LazyEviction(alpha=1e-6, n_recent=1, buffer=0)
    view = random_view(4, H=1, G=1, N=6, W=1, seen=4099, positions=torch.arange(4093, 4099).expand(1, 1, 1, 6))
    none = torch.zeros(1, 1, 1, 6)
    _, state = policy.score(view, {LAST_HIT: none, LONGEST_GAP: none})
    assert (state[LAST_HIT] == 4099).all()
    assert state[LONGEST_GAP].flatten().tolist() == [6, 5, 4, 3, 2, 1]

    deaf = dataclasses.replace(policy, alpha=1.0)
    later = dataclasses.replace(view, positions=torch.arange(6).expand(1, 1, 1, 6), n_seen=torch.tensor([4400]))
    hit = torch.tensor([4097.0, 4098, 4000, 4000, 4000, 4000]).expand(1, 1, 1, 6)
    gap = torch.full((1, 1, 1, 6), 300.0)

    def score(last: torch.Tensor) -> list[float]:
        return deaf.score(later, {LAST_HIT: last, LONGEST_GAP: gap})[0].flatten().tolist()

    assert score(hit)[1] > score(hit)[0]
    assert score(hit.half().float())[1] == score(hit.half().float())[0]


@dataclass(frozen=True, kw_only=True)
class ThisStepOnly(H2O):
    """The H2O baselines of R-KV's and DynTS's repositories: the accumulated attention is replaced by the step's."""

    state_names: ClassVar[tuple[str, ...]] = (MASS, "before")

    def score(self, view, state):
        return state[MASS] - state["before"], {MASS: state[MASS], "before": state[MASS]}


def test_h2o_keeps_other_tokens_than_baselines_that_do_not_accumulate(qwen2):
    requests = as_requests(prompts(1))
    ours = decode(qwen2, H2O(), 20, requests, 1, trace=True)["0"]
    theirs = decode(qwen2, ThisStepOnly(), 20, requests, 1, trace=True)["0"]
    assert len(ours.kept) == len(theirs.kept) > 0
    assert ours.kept[-1][1] != theirs.kept[-1][1]


def test_observed_attention_does_not_favour_slots_that_more_queries_saw():
    """Equal attention per query: the mass grows with age, the mean does not."""
    view = random_view(5, N=8)
    mass = (8.0 - torch.arange(8)).expand(1, 1, 2, 8)
    assert H2O(per_query=True).score(view, {MASS: mass})[0].unique().numel() == 1
    assert H2O().score(view, {MASS: mass})[0].unique().numel() == 8


def test_pooling_over_slots_out_of_order_would_keep_other_tokens():
    """Original caches compact in score order; pooled neighbours must be neighbours by position, as in a View."""
    policy = SnapKV(n_obs=4, n_recent=4, kernel=7)
    view = random_view(6, N=48, n_keep=16)
    older = torch.randperm(44, generator=torch.Generator().manual_seed(0))
    order = torch.cat([older, torch.arange(44, 48)])
    unsorted = dataclasses.replace(view, _keys=view.keys[..., order, :])
    kept = kept_sets(policy, view, policy.score(view, {})[0])[0][0]
    wrong = kept_sets(policy, unsorted, policy.score(unsorted, {})[0])[0][0]
    assert [sorted(order[torch.tensor(head)].tolist()) for head in wrong] != kept

    stored = view.positions.clone()
    stored[..., order] = torch.arange(48)
    scrambled = dataclasses.replace(view, _keys=view.keys[..., order, :], _slots=stored)
    assert kept_sets(policy, scrambled, policy.score(scrambled, {})[0])[0][0] == kept


@dataclass(frozen=True, kw_only=True)
class LazyMass(Policy):
    """Attention mass of the decoded queries, read from the ring in each round."""

    buffer: int | None = 4
    state_names: ClassVar[tuple[str, ...]] = (MASS, "prefill_mass", "lazy_mass")

    @property
    def n_queries(self) -> int:
        return self.buffer + 1

    def limit(self, kv_budget: int, n_prompt: int, n_held: int) -> int:
        return min(kv_budget, n_held + self.buffer)

    def score(self, view, state):
        def paid(logits, visible):
            of_decoded = decoded(view, logits.shape[-2])[:, None, None, :, None]
            return (attention(logits, visible) * of_decoded).sum((2, 3))

        interval = torch.stack([paid(*layer) for layer in observe(view, self.n_queries)])
        return view.uniform(), {**state, "lazy_mass": state["lazy_mass"] + interval.float()}


@pytest.mark.parametrize("n_prompt", [9, 26])
def test_attention_mass_read_from_the_ring_is_the_mass_collected_step_by_step(qwen2, n_prompt):
    """Also where the prompt is longer than what a round keeps, so that the first interval is short."""
    decoder = decoder_of(qwen2, LazyMass(), 28, tuple(range(n_prompt)))
    state = decoder.cache.state
    state["prefill_mass"][:] = state[MASS]
    compared = 0
    for _ in range(36):
        due = decoder.rows.n_held[0] + 1 > decoder.rows.limit[0]
        decoder.step()
        if due:
            n, compared = int(decoder.rows.n_held[0]), compared + 1
            collected = (state[MASS] - state["prefill_mass"])[..., :n]
            torch.testing.assert_close(state["lazy_mass"][..., :n], collected, rtol=1e-5, atol=1e-5)
    assert compared >= 6
    assert decoder.rows.rounds[0]


@pytest.mark.parametrize("kind", [LazyEviction, RaaS])
@pytest.mark.parametrize("n_prompt", [5, 26])
def test_no_query_is_missed_between_rounds(qwen2, kind, n_prompt):
    """The first round reads every decoded query, and each later one all since the round before."""
    steps = []

    class Recorded(kind):
        def score(self, view, state):
            steps.append(int(view.n_seen[0]))
            return super().score(view, state)

    policy = Recorded(buffer=3, n_recent=2, protect_prompt=False)
    decoder = decoder_of(qwen2, policy, 28, tuple(range(n_prompt)))
    for _ in range(30):
        decoder.step()
    assert steps[0] - n_prompt == min(policy.n_queries, 28 + 1 - n_prompt)
    assert {b - a for a, b in itertools.pairwise(steps)} == {policy.n_queries}


def test_rpc_grows_as_published_and_never_passes_the_budget(qwen2):
    """With P 8, R 3 and c 2: round m when the prompt + 3 + 4m + 8 are held, which leaves the prompt + 3 + 4 (m + 1)."""
    policy = RPC(n_obs=3, n_recent=3, interval=8, compression=2, kernel=3, buffer=5)
    requests = as_requests([tuple(range(6))])
    free = decode(qwen2, policy, 60, requests, 1, max_new_tokens=40, trace=True)["0"]
    assert [seen - 6 for seen, _ in free.kept] == [11, 19, 27, 35]
    assert [len(kept[0][0]) for _, kept in free.kept] == [6 + 3 + 4 * m for m in (1, 2, 3, 4)]
    assert all(set(range(6)) | set(range(seen - 3, seen)) <= set(kept[0][0]) for seen, kept in free.kept)

    bound = decode(qwen2, policy, 22, requests, 1, max_new_tokens=40, trace=True)["0"]
    assert bound.kept[0] == free.kept[0]
    assert [seen - 6 for seen, _ in bound.kept[1:]] == [19, 25, 31, 37]
    assert {len(kept[0][0]) for _, kept in bound.kept[1:]} == {22 - 5}
    assert max(bound.held) == 22

    slow = dataclasses.replace(policy, compression=4, buffer=1)
    bound = decode(qwen2, slow, 22, requests, 1, max_new_tokens=60, trace=True)["0"]
    left = [len(kept[0][0]) for _, kept in bound.kept]
    assert left[:4] == [11, 13, 15, 17]
    assert set(left[4:]) == {21}, "past the published growth, also in the steps where a published round would come"


def test_tova_may_evict_the_newest_token_and_a_recent_one_protects_it():
    keys = torch.eye(4, dtype=torch.float64)[None, None, None, [0, 0, 0, 1]].repeat(1, 1, 2, 1, 1)
    queries = 5 * torch.eye(4, dtype=torch.float64)[None, None, None, :1].repeat(1, 1, 4, 1, 1)
    view = view_of(keys, queries, n_keep=3)
    for policy, kept in ((TOVA(), [0, 1, 2]), (TOVA(n_recent=1), [1, 2, 3])):
        assert kept_sets(policy, view, policy.score(view, {})[0]) == [[[kept]]]


@pytest.mark.parametrize("top_half", [False, True])
def test_raas_stamps_are_those_of_a_loop_over_the_queries(top_half):
    policy = RaaS(alpha=0.12, top_half=top_half, buffer=4)
    view = random_view(8, H=1, G=1, N=12, W=5, n_prompt=9)
    scores, state = policy.score(view, {STAMP: torch.zeros(1, 1, 1, 12)})
    stamps = list(range(12))
    for w, position in enumerate(range(7, 12)):
        if position < 9:
            continue
        paid = (view.keys[0, 0, 0, : position + 1] @ view.queries[0, 0, 0, w] * 8**-0.5).softmax(-1)
        top = set(paid.argsort(descending=True)[: (position + 2) // 2].tolist()) if top_half else set()
        for slot in range(position + 1):
            if paid[slot] >= 0.12 or slot in top:
                stamps[slot] = position
    assert state[STAMP].flatten().tolist() == scores.flatten().tolist() == stamps
    assert len(set(stamps)) > 3


def test_caote_of_the_newest_querys_attention_is_the_error_of_dropping_a_slot():
    policy = CAOTE(base=TOVA())
    view = random_view(9, H=2, G=1, N=10, W=1)
    scores, _ = policy.score(view, {})
    logits = (view.keys @ view.queries.mT)[..., 0] * 8**-0.5

    def output(held: list[int]) -> torch.Tensor:
        return (logits[..., held].softmax(-1)[..., None] * view.values[..., held, :]).sum(-2)

    for slot in range(10):
        error = output(list(range(10))) - output([s for s in range(10) if s != slot])
        torch.testing.assert_close(scores[..., slot], error.norm(dim=-1))


def test_caote_is_its_base_in_all_but_the_score(qwen2):
    base = RPC(n_obs=3, n_recent=3, interval=8, compression=2, kernel=3, buffer=5)
    requests = as_requests([tuple(range(6))])
    plain = decode(qwen2, base, 22, requests, 1, trace=True)["0"]
    weighed = decode(qwen2, CAOTE(base=base), 22, requests, 1, trace=True)["0"]
    assert (weighed.held, weighed.rounds) == (plain.held, plain.rounds)
    assert weighed.kept != plain.kept
    policy = CAOTE(base="snapkv", n_recent=3, protect_prompt=True)
    assert (policy.n_queries, policy.n_recent, policy.protect_prompt, policy.buffer) == (8, 3, True, 128)
    assert CAOTE(base=H2O()).state_names == (MASS,)
    assert CAOTE(base=H2O()).recent(40) == 20


def test_caote_leaves_the_observing_window_unranked():
    policy = SMALL["caote"]
    view = random_view(10)
    scores, _ = policy.score(view, {})
    assert (scores[..., -4:] == torch.inf).all()
    assert scores[..., :-4].isfinite().all()


def test_snapkv_with_vases_settings_keeps_what_vase_kept_by_attention():
    case = Case("vase", "case0")
    p = case.params
    policy = SnapKV(n_obs=p["recent"], n_recent=p["recent"], kernel=5, pooling="avg", group="mean")
    view = view_of(case.double("k")[None, None], case.double("queries")[None, None], n_keep=p["budget"])
    assert p["mode"] == "attn"
    assert kept_sets(policy, view, policy.score(view, {})[0])[0][0] == case["kept"].tolist()


def test_a_fully_masked_query_pays_nothing():
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert attention(torch.randn(1, 3), none).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("kind", "wrong", "sentence"),
    [
        (SnapKV, {"pooling": "sum"}, "pooling is 'sum'"),
        (SnapKV, {"group": "none"}, "group is 'none'"),
        (SnapKV, {"domain": "window"}, "domain is 'window'"),
        (SnapKV, {"kernel": -1}, "kernel is -1"),
        (RPC, {"compression": 0}, "compression is 0"),
        (RPC, {"kernel": 2}, "kernel is 2"),
        (GKV, {"smooth": "min"}, "smooth is 'min'"),
        (GKV, {"decay": 1.5}, "decay is 1.5"),
        (GKV, {"share": "layer"}, "share is 'layer'"),
        (LazyEviction, {"alpha": 0.0}, "alpha is 0.0"),
        (LazyEviction, {"share": "model"}, "share is 'model'"),
        (RaaS, {"alpha": 2.0}, "alpha is 2.0"),
        (H2O, {"recent_ratio": float("nan")}, "H2O: recent_ratio is nan; use a share from 0 to 1"),
        (H2O, {"recent_ratio": -0.5}, "recent_ratio is -0.5"),
        (H2O, {"n_sink": "4"}, "n_sink is '4'; use a whole number, 0 or more"),
        (H2O, {"n_recent": -1}, "n_recent is -1"),
        (RKV, {"mix_lambda": 1.5}, "RKV: mix_lambda is 1.5"),
        (RKV, {"n_obs": 0}, "RKV: n_obs is 0; use a whole number, 1 or more"),
        (CAOTE, {"base": "rkv"}, "base is 'rkv'; use a policy that scores by attention"),
        (CAOTE, {"base": "snapkv", "n_recent": 1.5}, "n_recent is 1.5"),
        (CAOTE, {"base": "h2o", "share": "layer"}, "H2O: share is 'layer'"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        kind(**wrong)
