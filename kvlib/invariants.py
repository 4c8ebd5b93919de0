"""What every eviction policy must obey, checked by one call on a small random model: `check_policy(policy)`."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvlib.engine.decoder import Completion, Decoder, Request, completions, decoder_for
from kvlib.engine.evict import Round, evict, look
from kvlib.policies import Full, Policy, View

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 56,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
N_NEW = 44
PROMPT_LENGTHS = (5, 12, 12, 9)
"""Two of a length, so that rounds of several rows take place too."""


def random_model(family: str = "qwen2") -> torch.nn.Module:
    """Three layers, two KV heads, group size 7 (that of R1-Qwen), float64, decoding through kvlib."""
    config = AutoConfig.for_model(family, **SHAPE, **({"head_dim": 8} if family == "qwen3" else {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double().eval()


def check_policy(
    policy: Policy, kv_budget: int = 28, permuted: Policy | None = None, model: torch.nn.Module | None = None
) -> pd.DataFrame:
    """Decode with the policy on a small random model and say which invariants hold, one row each.

    policy: settings for budgets of a few dozen slots, every field it needs filled in. kv_budget: 20 to 36 slots.
    permuted: for a policy that holds numbers per KV head, the same policy with the KV heads (and their query heads)
    in reverse order. model: another than random_model(), small and in float64, with 64 token ids or more; of any kind
    that kvlib decodes. Columns: invariant, holds, detail (what broke it). Raises ConfigError where the policy cannot
    decode under this budget at all.
    """
    checks = _Checks(policy, kv_budget, permuted or policy, random_model() if model is None else model)
    policy.check(kv_budget, max(PROMPT_LENGTHS), "the longest prompt of check_policy")
    rows = []
    for name, check in checks.all():
        try:
            problem = check()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        rows.append({"invariant": name, "holds": problem is None, "detail": problem or ""})
    return pd.DataFrame(rows)


class _Checks:
    """Each check returns None, or in a few words what broke it."""

    def __init__(self, policy: Policy, kv_budget: int, permuted: Policy, model: torch.nn.Module):
        self.policy, self.kv_budget, self.permuted, self.model = policy, kv_budget, permuted, model
        draw = torch.Generator().manual_seed(0)
        prompts = [tuple(torch.randint(0, 64, (n,), generator=draw).tolist()) for n in PROMPT_LENGTHS]
        self.requests = [Request(str(i), prompt, 1000 + i) for i, prompt in enumerate(prompts)]

    def all(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        yield "a frozen dataclass, so that it holds no state", self.frozen
        yield "never more slots than the KV budget, and rounds take place", self.budget
        yield "the same seed gives the same keep sets", self.deterministic
        yield "a row decodes among others as alone", self.solo
        yield "the order of slots does not matter", self.slot_order
        yield "a budget that is never reached changes nothing", self.full
        yield "sinks, prompt and recent tokens survive when protected", self.protection
        yield "score changes neither what it sees nor the state", self.pure
        yield "state moves with its slot", self.state
        yield "KV heads in another order keep the same tokens", self.heads

    def decoder(self, policy: Policy, kv_budget: int | None, requests: list[Request]) -> Decoder:
        return decoder_for(self.model, policy, kv_budget, requests, max_new_tokens=N_NEW, trace=True)

    def decode(self, policy: Policy, kv_budget: int | None, requests: list[Request]) -> dict[str, Completion]:
        decoder = self.decoder(policy, kv_budget, requests)
        return {done.request.id: done for done in completions(decoder, requests)}

    def frozen(self) -> str | None:
        try:
            self.policy.n_sink = self.policy.n_sink
        except dataclasses.FrozenInstanceError:
            return None
        return "declare it with @dataclass(frozen=True, kw_only=True)"

    def budget(self) -> str | None:
        for done in self.decode(self.policy, self.kv_budget, self.requests).values():
            if max(done.held) > self.kv_budget:
                return f"request {done.request.id} held {max(done.held)} slots of {self.kv_budget}"
            if self.policy.evicts and not done.kept:
                return f"request {done.request.id} wrote {len(done.tokens)} tokens and nothing was evicted"
        return None

    def deterministic(self) -> str | None:
        first, second = (self.decode(self.policy, self.kv_budget, self.requests) for _ in range(2))
        return _first_difference(first, second)

    def solo(self) -> str | None:
        together = self.decode(self.policy, self.kv_budget, self.requests)
        for request in self.requests[1:3]:
            problem = _first_difference(self.decode(self.policy, self.kv_budget, [request]), together)
            if problem:
                return problem
        return None

    def slot_order(self) -> str | None:
        def run(scramble: bool) -> dict[str, Completion]:
            decoder = self.decoder(self.policy, self.kv_budget, self.requests[:2])
            for row, request in enumerate(self.requests[:2]):
                decoder.admit(row, request)
            cache = decoder.cache
            for step in range(N_NEW - 1):
                for row, n in enumerate(decoder.rows.n_held if scramble and step % 5 == 0 else ()):
                    order = torch.randperm(int(n), generator=torch.Generator().manual_seed(step))
                    for tensor in (cache.keys, cache.values, cache.positions, *cache.state.values()):
                        tensor[:, row, :, :n] = tensor[:, row][:, :, order]
                decoder.step()
            return {done.request.id: done for _, done in decoder.finished()}

        return _first_difference(run(scramble=False), run(scramble=True))

    def full(self) -> str | None:
        roomy = max(PROMPT_LENGTHS) + N_NEW + (self.policy.buffer or 0)
        free = self.decode(Full(), None, self.requests)
        kept = self.decode(self.policy, 2 * roomy, self.requests)
        wrong = [name for name in free if free[name].tokens != kept[name].tokens]
        return f"request {wrong[0]} wrote other tokens than with the full cache" if wrong else None

    def protection(self) -> str | None:
        policy = dataclasses.replace(self.policy, n_sink=2, protect_prompt=True)
        n_prompt = max(PROMPT_LENGTHS)
        budgets = range(self.kv_budget, n_prompt + N_NEW)
        kv_budget = next((budget for budget in budgets if policy.trouble(budget, n_prompt) is None), None)
        if kv_budget is None:
            return "no budget below the length of the trace can hold what is protected"
        for done in self.decode(policy, kv_budget, self.requests).values():
            for seen, kept in done.kept:
                wanted = set(policy.protected(kv_budget, len(done.request.prompt), seen))
                for layer, heads in enumerate(kept):
                    for head, positions in enumerate(heads):
                        if not wanted <= set(positions):
                            lost = min(wanted - set(positions))
                            return f"position {lost} of request {done.request.id} is gone in layer {layer} head {head}"
        return None

    def due(self) -> tuple[Decoder, Round, View, dict[str, Tensor]]:
        """A decoder whose rows have all had a round, halfway to the next one; a round on them; what its score sees."""
        same_length = [dataclasses.replace(request, prompt=self.requests[1].prompt) for request in self.requests[:2]]
        decoder = self.decoder(self.policy, self.kv_budget, same_length)
        for row, request in enumerate(same_length):
            decoder.admit(row, request)
        keep = self.policy.keep(self.kv_budget, len(same_length[0].prompt), self.kv_budget + 1)
        while not decoder.rows.rounds[0] or decoder.rows.n_held[0] <= min(keep, self.kv_budget - 1):
            decoder.step()
            if decoder.rows.n_made[0] >= N_NEW - 1:
                break
        rows, n = np.arange(2), int(decoder.rows.n_held[0])
        n_keep = np.minimum(decoder.rows.n_keep(rows, n), n - 1)
        # The ring and the state are those of before the step that a round follows.
        due = dataclasses.replace(decoder.round(rows, n, n_keep), n_seen=decoder.position)
        view, state, _ = look(decoder.cache, due)
        return decoder, due, view, state

    @torch.inference_mode()
    def pure(self) -> str | None:
        _, _, view, state = self.due()
        seen = [view.keys, view.values, view.queries, view.positions, *state.values()]
        before = [tensor.clone() for tensor in seen]
        scores, new_state = self.policy.score(view, state)
        if not all(torch.equal(a, b) for a, b in zip(before, seen, strict=True)):
            return "a tensor of view or state was written to; work on a copy"
        if scores.isnan().any():
            return "a score is NaN"
        if set(new_state) != set(state):
            return f"the state returned holds {sorted(new_state)}, declared are {sorted(state)}"
        full = torch.broadcast_shapes(scores.shape, view.keys.shape[:-1])
        return None if full == view.keys.shape[:-1] else f"scores of shape {tuple(scores.shape)} do not broadcast"

    @torch.inference_mode()
    def state(self) -> str | None:
        decoder, due, view, state = self.due()
        _, expected = self.policy.score(view, state)
        kept, _ = evict(decoder.cache, self.policy, due)
        n = int(due.n_keep[0])
        positions, order = decoder.cache.positions[:, :, :, :n].sort(-1)
        if not torch.equal(positions.flatten(), view.positions[kept]):
            return "the positions that stayed are not those that were selected"
        for name, tensor in decoder.cache.state.items():
            held = tensor[:, :, :, :n].gather(-1, order)
            if not torch.equal(held.flatten(), expected[name].expand(kept.shape)[kept].float()):
                return f"state {name!r} of a surviving slot changed"
        return None

    @torch.inference_mode()
    def heads(self) -> str | None:
        _, _, view, state = self.due()
        scores, _ = self.policy.score(view, state)
        flipped_state = {name: tensor.flip(2) for name, tensor in state.items()}
        flipped, _ = self.permuted.score(_reversed_heads(view), flipped_state)
        if torch.allclose(scores.flip(2), flipped, rtol=1e-9, atol=1e-12, equal_nan=True):
            return None
        return "scores depend on the order of heads"


class _ReversedHeads(View):
    """A view with its heads reversed, each with its own noise."""

    def heads(self, n: int) -> Tensor:
        return super().heads(n).flip(0)


def _reversed_heads(view: View) -> View:
    same = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    by_head = ("positions", "_slots", "_keys", "_values", "_ring")
    return _ReversedHeads(**(same | {name: same[name].flip(2) for name in by_head}))


def _first_difference(some: dict[str, Completion], others: dict[str, Completion]) -> str | None:
    for name, one in some.items():
        other = others[name]
        for (seen, kept), (_, kept_too) in zip(one.kept, other.kept, strict=False):
            if kept != kept_too:
                return f"request {name} kept other tokens after {seen} of them"
        if one.tokens != other.tokens:
            return f"request {name} wrote other tokens"
        if len(one.kept) != len(other.kept):
            return f"request {name} had another number of rounds"
    return None
