"""The gate: whether what will be timed is right. The full cache against transformers, and what rounds leave behind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvlib.bench.arms import Ours, greedy, parse_arm, through_transformers
from kvlib.bench.shapes import Sizes, Subject, bench_policy
from kvlib.engine.decoder import Decoder
from kvlib.kernels.rope import rotate
from kvlib.policies import Full, Policy

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2}
"""Most that our logits may differ from transformers', as a share of their norm; or twice what its own two attention
functions differ by on the same tokens, if that is more: of bfloat16 and random weights that is a tenth."""
INT8_TOLERANCE, INT8_AGREEMENT = 0.3, 0.9
"""The same of products in 8-bit integers, and the least share of greedy tokens that are transformers'."""
GATE_STEPS = 16


@dataclass(frozen=True)
class Check:
    """One line of the gate."""

    name: str
    holds: bool
    detail: str

    def __str__(self) -> str:
        return f"gate: {'ok ' if self.holds else 'RED'} {self.name}: {self.detail}"


def gate(subject: Subject, sizes: Sizes, names: Sequence[str]) -> list[Check]:
    """Is what will be timed correct: the full cache against transformers, and what every policy's rounds leave."""
    checks, seen = [check_full(subject)], []
    if any(parse_arm(name, sizes).part == "int8" for name in names):
        checks.append(check_full(subject, int8=True))
    for name in names:
        arm = parse_arm(name, sizes)
        if arm.kv_budget is None or arm.kind == "kvpress":
            continue
        kv_budget, policy = arm.kv_budget, bench_policy(arm.of, arm.kv_budget, sizes)
        # Of one policy at several budgets, the rounds are the same.
        if policy not in seen:
            checks.append(check_rounds(name, subject, policy, kv_budget, sizes))
            if subject.model.device.type == "cuda":
                checks.append(check_graphs(name, subject, policy, kv_budget, sizes))
            seen.append(policy)
    return checks


def judged(checks: Sequence[Check]) -> dict:
    """The gate of a record: whether all hold, and what was found."""
    return {"holds": all(check.holds for check in checks), "checks": [vars(check) for check in checks]}


def check_full(subject: Subject, int8: bool = False) -> Check:
    """Every logit of GATE_STEPS steps on transformers' own greedy tokens, and each greedy token but near ties; of 8-bit
    products INT8_AGREEMENT of them."""
    expected = generated(subject, "eager", GATE_STEPS + 1, output_logits=True, return_dict_in_generate=True)
    tokens = expected.sequences[:, subject.prompts.shape[1] :]
    with through_transformers(subject.model, "sdpa") as model, torch.inference_mode():
        at_once = model(expected.sequences[:, :-1]).logits[:, subject.prompts.shape[1] - 1 :]
    of_transformers = distance(at_once, torch.stack(expected.logits, 1))
    arm = Ours(subject, Full(), None, GATE_STEPS, "int8" if int8 else "")
    arm.start()
    decoder = arm.decoder
    tolerance = INT8_TOLERANCE if int8 else max(TOLERANCE[model.dtype], 2 * of_transformers)
    furthest, other, agreed = 0.0, 0, 0
    for step, wanted in enumerate(expected.logits):
        ours = decoder.token
        if step:
            ours = decoder.logits.argmax(-1)
            furthest = max(furthest, distance(decoder.logits, wanted))
        lead = wanted.amax(-1) - wanted.gather(-1, ours[:, None])[:, 0]
        other += int((lead > 2 * tolerance * wanted.abs().amax(-1)).sum())
        agreed += int((ours == tokens[:, step]).sum())
        if step < GATE_STEPS:
            decoder.token.copy_(tokens[:, step])
            decoder.step()
    right = agreed >= INT8_AGREEMENT * tokens.numel() if int8 else not other
    return Check(
        f"{'full-int8 near' if int8 else 'full cache ='} transformers",
        furthest <= tolerance and right,
        f"logits differ by {furthest:.1e} of their norm (at most {tolerance:.0e}); {agreed} of {tokens.numel()} greedy "
        f"tokens agree, {other} differ that are no near ties",
    )


def generated(subject: Subject, implementation: str, n: int, **options):
    """What transformers' own loop makes of the prompts: exactly n tokens, the likeliest each time."""
    with through_transformers(subject.model, implementation) as model:
        mask = torch.ones_like(subject.prompts)
        return model.generate(subject.prompts, attention_mask=mask, generation_config=greedy(n, **options))


def check_first_tokens(subject: Subject, arms: dict) -> Check:
    """The first greedy tokens of every arm, kvpress' too, before any round: transformers', but for near ties."""
    outputs = {name: arm.output() for name, arm in arms.items()}
    n = min(output.shape[1] for output in outputs.values())
    wanted = generated(subject, "sdpa", n)[:, -n:]
    agreed = {name: (output[:, :n] == wanted).float().mean().item() for name, output in outputs.items()}
    worst = min(agreed, key=agreed.get)
    return Check(
        "first tokens of every arm",
        agreed[worst] >= 0.9,
        f"{n} tokens of {len(wanted)} rows; fewest agree with transformers' in {worst}, {agreed[worst]:.0%} (at least "
        "90 %)",
    )


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest distance of two vectors of logits as a share of the wanted one's norm; infinite if one is not finite."""
    apart = (found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    return apart.max().item() if apart.isfinite().all() else float("inf")


def check_graphs(name: str, subject: Subject, policy: Policy, kv_budget: int, sizes: Sizes) -> Check:
    """Tokens and slots over four rounds: graphs against plain calls, which run the same kernels and must be equal."""
    n = kv_budget - sizes.n_prompt + 4 * (sizes.interval + 1)
    arms = [Ours(subject, subject.fit(policy), kv_budget, n, without) for without in ("", "eager")]
    for arm in arms:
        arm.start()
        arm.advance(n)
    same = same_run(*arms)
    detail = f"{n} steps, {len(arms[0].decoder.rows.rounds[0])} rounds of each row: tokens and slots "
    return Check(f"{name}: graphs = plain calls", same, detail + ("are equal" if same else "differ"))


def same_run(some: Ours, other: Ours) -> bool:
    """Whether two arms wrote the same tokens, had the same rounds and hold the same positions."""
    first, second = some.decoder, other.decoder
    slots = torch.equal(first.cache.positions, second.cache.positions) and first.rows.rounds == second.rows.rounds
    return slots and torch.equal(some.output(), other.output())


def check_rounds(name: str, subject: Subject, policy: Policy, kv_budget: int, sizes: Sizes) -> Check:
    """Two rows past their first round: which positions are held, and whether their slots hold those tokens' keys."""
    P = sizes.n_prompt
    budgets = range(min(P + sizes.interval, kv_budget), kv_budget)
    budget = next((budget for budget in budgets if policy.trouble(budget, P) is None), kv_budget)
    few = replace(subject, prompts=subject.prompts[:2])
    arm = Ours(few, subject.fit(policy), budget, budget - P + 2)
    arm.start()
    arm.advance(budget - P + 2)
    decoder = arm.decoder
    problem = wrong_slots(decoder, few.prompts, budget)
    detail = f"KV budget {budget}, {len(decoder.rows.rounds[0])} round, {int(decoder.rows.n_held[0])} slots held"
    return Check(f"{name}: slots after a round", problem is None, problem or detail)


@torch.inference_mode()
def wrong_slots(decoder: Decoder, prompts: Tensor, kv_budget: int) -> str | None:
    """What is wrong with the slots that the rows hold after a round; None if nothing is."""
    P, n_made, policy, cache = prompts.shape[1], int(decoder.rows.n_made[0]), decoder.policy, decoder.cache
    seen, at = P + n_made - 1, decoder.rows.rounds
    if not decoder.finite:
        return "logits or scores are not finite"
    for row, tokens in enumerate(torch.cat([prompts, decoder.output[:, : n_made - 1]], 1)):
        n = int(decoder.rows.n_held[row])
        if n != int(cache.lengths[row]) or n > kv_budget or not at[row]:
            return f"row {row} holds {int(cache.lengths[row])} slots (counted {n}, KV budget {kv_budget})"
        held = cache.positions[:, row, :, :n].sort(-1).values
        if (held.diff(dim=-1) < 1).any() or held.min() < 0 or held.max() != seen - 1:
            return f"row {row} holds a position twice, an empty slot, or not its newest token"
        wanted = {*policy.protected(kv_budget, P, at[row][-1]), *range(at[row][-1], seen)}
        for held_by_head in held.flatten(0, 1).tolist():
            if not wanted <= set(held_by_head):
                return f"row {row} lost position {min(wanted - set(held_by_head))}, which is protected"
        keys, values = first_layer(decoder.model.model, tokens)
        positions = cache.positions[0, row, :, :n].long().expand(keys.shape[0], -1)
        for what, stored, own in (("key", cache.keys, keys), ("value", cache.values, values)):
            own = own.gather(1, positions[..., None].expand(-1, -1, own.shape[-1]))
            apart = ((stored[0, row, :, :n] - own).double().norm() / own.double().norm()).item()
            if not policy.reindex and not apart <= TOLERANCE[own.dtype]:
                return f"row {row}: the first layer's {what}s are not those of the positions held ({apart:.1e} apart)"
    return None


def first_layer(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[H, T, D]` of the first layer, which depend on each token and its position only."""
    base = model.base_model
    attention = base.layers[0].self_attn
    x = base.layers[0].input_layernorm(base.embed_tokens(tokens))
    keys, values = (part(x).unflatten(-1, (-1, attention.head_dim)) for part in (attention.k_proj, attention.v_proj))
    keys = getattr(attention, "k_norm", nn.Identity())(keys).transpose(0, 1)
    positions = torch.arange(len(tokens), device=tokens.device)
    return rotate(keys, positions, base.rotary_emb.inv_freq), values.transpose(0, 1)
