"""SlotCache: preallocated keys, values and positions. A slot is a storage index, a position a token index."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.engine.attention import causal_mask
from kvlib.kernels.attention import attention_probabilities
from kvlib.kernels.compact import compact
from kvlib.policies.base import MASS, Policy


@dataclass(frozen=True)
class CacheShape:
    """What decides the memory of a cache. `shared_layers` and `shared_heads`: one slot map for all of them.

    head_dim: of keys and queries, and of values unless they have a value_dim of their own.
    """

    n_layers: int
    n_rows: int
    n_kv_heads: int
    n_query_heads: int
    n_slots: int
    head_dim: int
    shared_layers: bool = False
    shared_heads: bool = False
    n_queries: int = 0
    state_names: tuple[str, ...] = ()
    value_dim: int | None = None

    @property
    def slot_map(self) -> tuple[int, int, int, int]:
        """Shape of everything kept per slot: `[L or 1, B, H or 1, N]`."""
        layers = 1 if self.shared_layers else self.n_layers
        heads = 1 if self.shared_heads else self.n_kv_heads
        return layers, self.n_rows, heads, self.n_slots


def cache_shape(policy: Policy, n_rows: int, n_slots: int, **of_model: int) -> CacheShape:
    """The cache that a policy needs; of_model: CacheShape's layers, heads and widths."""
    return CacheShape(
        n_rows=n_rows,
        n_slots=n_slots,
        shared_layers=policy.share in ("head_across_layers", "model") or not policy.evicts,
        shared_heads=policy.share in ("layer", "model") or not policy.evicts,
        n_queries=policy.n_queries,
        state_names=policy.state_names,
        **of_model,
    )


class SlotCache:
    """Static storage of B rows with up to N slots each; memory never grows and evicted slots are reused.

    keys, values `[L, B, H, N, D]`, positions int32 `[L or 1, B, H or 1, N]` (-1 = empty), state: named float32
    tensors of the same shape, ring `[L, B, HQ, W, D]`: the last W queries, that of position p at p mod W.
    lengths `[B]`: live slots, the same in every layer and head; live slots are 0 .. length - 1, in any order.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device | str):
        self.shape = shape
        L, B, H, N, D = shape.n_layers, shape.n_rows, shape.n_kv_heads, shape.n_slots, shape.head_dim
        self.keys = torch.zeros(L, B, H, N, D, dtype=dtype, device=device)
        self.values = self.keys.new_zeros(L, B, H, N, shape.value_dim or D)
        self.positions = torch.full(shape.slot_map, -1, dtype=torch.int32, device=device)
        self.state = {name: torch.zeros(shape.slot_map, device=device) for name in shape.state_names}
        self.ring = torch.zeros(L, B, shape.n_query_heads, shape.n_queries, D, dtype=dtype, device=device)
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.rows = torch.arange(B, device=device)
        self.zero = torch.zeros((), device=device)  # a number of Python's would be sent from the host at every step
        self.layer_keys, self.layer_values = self.keys.unbind(0), self.values.unbind(0)

    def begin(self, row: int, n_prompt: int) -> None:
        """Give the first slots of a row to the tokens of a prompt, whatever it held before; their state is 0."""
        self.positions[:, row] = -1
        self.positions[:, row, :, :n_prompt] = torch.arange(n_prompt, dtype=torch.int32, device=self.keys.device)
        for state in self.state.values():
            state[:, row] = 0
        self.lengths[row] = n_prompt

    def store_prompt(self, row: int, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
        """Store a layer of the prompt that a row began with: queries `[HQ, P, D]`, keys and values `[H, P, D]`."""
        P, W = keys.shape[1], self.shape.n_queries
        self.keys[layer, row, :, :P], self.values[layer, row, :, :P] = keys, values
        if W:
            recent = torch.arange(max(0, P - W), P, device=keys.device)
            self.ring[layer, row][:, recent % W] = queries[:, recent]
        if MASS in self.state:
            wide = torch.promote_types(keys.dtype, torch.float32)
            grouped = queries.unflatten(0, (len(keys), -1)).to(wide)
            mask = causal_mask(P, keys.device)
            probabilities = attention_probabilities(grouped, keys[:, None].to(wide), mask, scaling)
            self.state[MASS][layer, row, :, :P] = probabilities.sum((1, 2))

    def claim(self, positions: Tensor) -> None:
        """Give each row's next free slot to the token at positions `[B]`, its state 0. The caller advances lengths."""
        self.positions[:, self.rows, :, self.lengths] = positions.to(torch.int32)[:, None, None]
        for state in self.state.values():
            state[:, self.rows, :, self.lengths] = self.zero

    def nbytes(self) -> int:
        """Bytes held: keys, values, positions, the query ring and policy state."""
        tensors = (self.keys, self.values, self.positions, self.ring, *self.state.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def keep(self, rows: Tensor, mask: Tensor, n_keep: Tensor) -> None:
        """Free the slots of `rows [R]` that are False in `mask [L or 1, R, H or 1, n]`; n_keep `[R]` are True per head.

        All rows hold n live slots. Afterwards row r holds n_keep[r], at slots 0 .. n_keep[r] - 1.
        """
        compact((self.keys, self.values, self.positions, *self.state.values()), rows, mask, n_keep)
        freed = torch.arange(self.shape.n_slots, device=mask.device) >= n_keep[:, None]
        self.positions[:, rows] = self.positions[:, rows].masked_fill(freed[None, :, None, :], -1)
        self.lengths[rows] = n_keep.to(self.lengths.dtype)
