"""A retention gate in the manner of TRIM-KV (arXiv 2512.03324), trained on recorded traces beside a frozen model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from kvlib.engine.attention import causal_mask, observe_trace
from kvlib.errors import ConfigError
from kvlib.policies.trimkv import RetentionGate
from kvlib.train.traces import Trace

CAPACITY = 16
"""A small one makes the gate tell tokens apart; under a large one hardly any need to decay."""
BUDGET = 64


@dataclass(frozen=True)
class Recorded:
    """A teacher-forced trace: hidden `[T, d]`; per layer causal logits `[H, G, T, T]` and values `[H, T, D]`."""

    hidden: Tensor
    logits: list[Tensor]
    values: list[Tensor]


def record(model: nn.Module, ids: Sequence[int]) -> Recorded:
    logits, values = [], []

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        grouped = query.unflatten(0, (len(key), -1)).float()
        future = ~causal_mask(query.shape[1], query.device)
        logits.append((grouped @ key.float()[:, None].transpose(-1, -2) * scaling).masked_fill(future, -torch.inf))
        values.append(value.float())

    hidden = observe_trace(model, ids, observe)
    return Recorded(hidden.float(), logits, values)


def gate_loss(gate: RetentionGate, recorded: Recorded, capacity: int) -> tuple[Tensor, Tensor]:
    """Mean over layers and heads of two terms.

    Distillation: the squared error of attention outputs when token j weighs `beta_j^(i - j)` for query i, over the
    full outputs' squares. Capacity: how far the retained tokens, `sum_j beta_j^(i - j)`, exceed `capacity`, over it.
    """
    position = torch.arange(len(recorded.hidden), device=recorded.hidden.device)
    age = position[:, None] - position
    distilled, excess = [], []
    for log_beta, logits, values in zip(gate(recorded.hidden), recorded.logits, recorded.values, strict=True):
        decay = log_beta.T[:, None] * age.clamp(min=0)
        full = logits.softmax(-1) @ values[:, None]
        gated = (logits + decay[:, None]).softmax(-1) @ values[:, None]
        distilled.append(((gated - full).square().sum((-1, -2)) / full.square().sum((-1, -2))).mean())
        retained = decay.exp().masked_fill(age < 0, 0).sum(-1)
        excess.append((retained / capacity - 1).relu().mean())
    return torch.stack(distilled).mean(), torch.stack(excess).mean()


def train_gate(
    model: nn.Module, traces: Sequence[Sequence[int]], capacity: int = CAPACITY, n_epochs: int = 6, seed: int = 0
) -> RetentionGate:
    """AdamW on the ids of one trace at a time, the learning rate falling along a cosine.

    Traces are recorded anew each epoch: their logits would take gigabytes, and one pass takes little time.
    """
    config, order = model.config, random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gate = RetentionGate(config.hidden_size, config.num_hidden_layers, config.num_key_value_heads)
    gate = gate.to(next(model.parameters()).device)
    optimiser = torch.optim.AdamW(gate.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_epochs * len(traces))
    epochs = trange(n_epochs, desc="epochs", mininterval=10)
    for _ in epochs:
        total = torch.zeros(2)
        for trace in order.sample(traces, len(traces)):
            terms = torch.stack(gate_loss(gate, record(model, trace), capacity))
            optimiser.zero_grad()
            terms.sum().backward()
            optimiser.step()
            schedule.step()
            total += terms.detach().cpu()
        distilled, excess = (total / len(traces)).tolist()
        epochs.set_postfix(distillation=f"{distilled:.4f}", capacity=f"{excess:.4f}", refresh=False)
    if not torch.isfinite(total).all():
        raise FloatingPointError(f"the gate's loss is {total.sum().item()}; the model's states are not finite")
    return gate.eval().requires_grad_(False)


@dataclass(frozen=True)
class HeldOut:
    """On traces never trained on: the share of the attention that later queries pay to the tokens so far which goes
    to the `budget` tokens kept by the gate; by age; by chance; and at best. Mean over layers, heads and rounds."""

    n_traces: int
    budget: int
    gate: float
    newest: float
    random: float
    best: float


@torch.inference_mode()
def evaluate_gate(
    gate: RetentionGate, model: nn.Module, traces: Sequence[Trace], budget: int = BUDGET, every: int = 32
) -> HeldOut:
    """Rounds of one eviction each, every `every` tokens from the first that exceeds the budget."""
    shares = []
    for trace in traces:
        recorded = record(model, trace.ids)
        log_beta = gate(recorded.hidden).transpose(1, 2)
        attention = torch.stack([logits.softmax(-1).sum(1) for logits in recorded.logits])
        for step in range(max(trace.n_prompt, budget) + every, len(trace.ids), every):
            future = attention[:, :, step:, :step].sum(2)
            position = torch.arange(step, device=future.device)
            ranked = (log_beta[..., :step] * (step + 1 - position), position.expand_as(future), future)
            kept = [future.gather(-1, rank.topk(budget).indices).sum(-1) / future.sum(-1) for rank in ranked]
            shares.append([share.mean().item() for share in kept] + [budget / step])
    if not shares:
        raise ConfigError(f"no held-out trace is {every} tokens longer than the budget of {budget}; lower the budget")
    by_gate, newest, best, chance = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return HeldOut(len(traces), budget, by_gate, newest, chance, best)
