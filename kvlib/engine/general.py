"""Prefill and decode steps of any causal LM of transformers, through the model's own modules: no patch, no copy.

A forward gets a Cache that puts each layer's new keys and values into slots, and an attention function that reads
them. What a layer caches is learned from a trial forward of one token. Layers with full attention share one SlotCache,
which policies evict; layers that slide keep a ring of their window; convolution and recurrent layers keep their state
in transformers' own layers. The attention is torch's on every device, also where the fast step runs kernels.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from kvlib.engine.attention import Scoring, text_config, through_kvlib
from kvlib.engine.cache import CacheShape, SlotCache, cache_shape
from kvlib.errors import ConfigError
from kvlib.kernels.rope import rotate
from kvlib.policies.base import MASS, Policy

LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid"}
LAYER_TYPES |= {"moe", "mlp", "sparse", "dense"}
QUERIES_AT_ONCE = 256
"""Of a prompt: bounds the memory of attention probabilities."""
SHIFT = 61
"""Positions between two trials that show how a key turns with its position."""
NOTHING = "no layer attends to all tokens, so there is nothing to evict; use another model"
STATES = ("conv_states", "recurrent_states")


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """query `[B, HQ, Q, D]`, key `[B, H, N, D]`, value `[B, H, N, DV]`, visible bool `[B or 1, Q or 1, N]`.

    Returns the output `[B, Q, HQ, DV]` and the probabilities `[B, HQ, Q, N]`, softmax in at least float32.
    """
    B, HQ, Q, _ = query.shape
    H, N = key.shape[1:3]
    logits = (query.reshape(B, H, HQ // H * Q, -1) @ key.mT).view(B, HQ, Q, N)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)) * scoring.scaling
    if scoring.softcap is not None:
        logits = scoring.softcap * torch.tanh(logits / scoring.softcap)
    logits = logits.masked_fill(~visible[:, None], float("-inf"))
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(logits.dtype)[None, :, None, None].expand(B, HQ, Q, 1)
        logits = torch.cat([logits, sinks], -1)
    probabilities = logits.softmax(-1)[..., :N]
    out = probabilities.to(value.dtype).reshape(B, H, -1, N) @ value
    return out.view(B, HQ, Q, -1).transpose(1, 2).contiguous(), probabilities


class Step(Cache):
    """One forward: what the model's layers put into the cache, and what its attention reads there.

    states: transformers' cache layers, of which convolution and recurrent layers use theirs; empty if there are none.
    """

    def __init__(self, states: list, n_before: int):
        super().__init__(layers=states)
        self.n_before, self.handed = n_before, []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        read = self.store(layer_idx, key, value)
        self.handed.append((layer_idx, read[0]))
        return read

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_before

    def layer_of(self, key: Tensor) -> int:
        """The layer that stored these keys: a borrowed tensor's own, else the last, which made them of what it read."""
        if not self.handed:
            raise ConfigError("the model attends to keys that it does not cache; use another model")
        return next((layer for layer, handed in self.handed if handed is key), self.handed[-1][0])


def same_heads(some: Tensor, others: Tensor) -> Tensor:
    """Bool `[H, H']`: which heads of `[1, H, T, D]` are equal to which of `[1, H', T', D']`."""
    if some.shape[2:] != others.shape[2:]:
        return torch.zeros(some.shape[1], others.shape[1], dtype=torch.bool, device=some.device)
    return (some[0, :, None] == others[0]).all((2, 3))


@dataclass(frozen=True)
class Read:
    """One call of attention. paired: keys and values of its heads are of one cached head; grouped: in that order."""

    n_query_heads: int
    scoring: Scoring
    paired: bool
    grouped: bool


class Trial(Step):
    """A token alone: shows what each layer caches `[1, H, 1, D]` and how it is read."""

    def __init__(self, states: list):
        super().__init__(states, 0)
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}
        self.reads: dict[int, list[Read]] = defaultdict(list)

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.cached[layer] = key, value
        return key, value

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        layer = self.layer_of(key)
        same = [same_heads(x, cached) for x, cached in zip((key, value), self.cached[layer], strict=True)]
        pairs, H = same[0] & same[1], same[0].shape[1]
        grouped = pairs.unflatten(0, (H, -1)).diagonal(dim1=0, dim2=2).all() if len(pairs) % H == 0 else False
        self.reads[layer].append(Read(query.shape[1], scoring, bool(pairs.any(1).all()), bool(grouped)))
        visible = torch.ones(1, 1, key.shape[2], dtype=torch.bool, device=key.device)
        return attention(query, key, value, visible, scoring)[0]


class Prefill(Step):
    """The prompt of one row, unpadded, from position 0: fills slots 0 .. P-1 of that row, and the ends of its rings."""

    def __init__(self, of: "GeneralModel", row: int, n_prompt: int):
        super().__init__(of.fresh_states(), 0)
        self.of, self.row, self.n_prompt = of, row, n_prompt
        self.positions = torch.arange(n_prompt, device=of.cache.keys.device)
        of.cache.begin(row, n_prompt)

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.of.slots[layer]
        last = self.positions[-keys.shape[2] :]
        keys[self.row][:, last % keys.shape[2]] = key[0][:, last]
        values[self.row][:, last % keys.shape[2]] = value[0][:, last]
        return key, value

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        P, Q, cache = self.n_prompt, query.shape[2], self.of.cache
        evicted = self.of.evicted.get(self.layer_of(key))
        outs = []
        for asked, queries in zip(
            self.positions[P - Q :].split(QUERIES_AT_ONCE), query.split(QUERIES_AT_ONCE, 2), strict=True
        ):
            gap = asked[:, None] - self.positions
            visible = (gap >= 0) & (gap < (scoring.window or P))
            out, probabilities = attention(queries, key, value, visible[None], scoring)
            outs.append(out)
            if evicted is not None and MASS in cache.state:
                mass = cache.state[MASS][evicted, self.row, :, :P]
                mass += probabilities[0].unflatten(0, (len(mass), -1)).sum((1, 2))
        if evicted is not None and cache.shape.n_queries:
            last = self.positions[-cache.shape.n_queries :]
            cache.ring[evicted, self.row][:, last % cache.shape.n_queries] = query[0][:, last]
        return torch.cat(outs, 1)


class Decode(Step):
    """One token of every row, at positions `[B]`, into the row's next free slot and over the oldest of its rings."""

    def __init__(self, of: "GeneralModel", positions: Tensor, n_max: int):
        super().__init__(of.states, n_max - 1)
        self.of, self.positions, self.n_max = of, positions, n_max
        self.live = torch.arange(n_max, device=positions.device) <= of.cache.lengths[:, None]
        of.cache.claim(positions)

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.of.slots[layer]
        cache, N = self.of.cache, keys.shape[2]
        at, n = (cache.lengths, self.n_max) if layer in self.of.evicted else (self.positions % N, N)
        keys[cache.rows, :, at] = key[:, :, 0]
        values[cache.rows, :, at] = value[:, :, 0]
        return keys[:, :, :n], values[:, :, :n]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        cache, evicted = self.of.cache, self.of.evicted.get(self.layer_of(key))
        live = self.live
        if evicted is None:
            live = torch.arange(key.shape[2], device=key.device) <= self.positions[:, None]
        out, probabilities = attention(query, key, value, live[:, None], scoring)
        if evicted is not None and MASS in cache.state:
            mass = cache.state[MASS][evicted, :, :, : self.n_max]
            mass += probabilities.unflatten(1, (mass.shape[1], -1)).sum((2, 3))
        if evicted is not None and cache.shape.n_queries:
            cache.ring[evicted][cache.rows, :, self.positions % cache.shape.n_queries] = query[:, :, 0]
        return out


class GeneralModel:
    """A causal LM beside the cache of a policy: n_rows rows of n_slots slots, for positions below n_positions.

    cache: SlotCache of the full-attention layers. scaling: of q.k. inv_freq `[D / 2]`: RoPE's, radians per position, by
    which their keys turn; None where they turn in another way or not at all. Policies that ask queries again score
    scaling * q.k, without a model's soft cap and sinks; the attention mass is what was paid. Raises ConfigError, with
    the reason, for a model that decodes in a way of its own, and for a policy that cannot score it.
    """

    name: ClassVar = "general"

    def __init__(self, model: nn.Module, policy: Policy, n_rows: int, n_slots: int, n_positions: int):
        self.model, self.config = model, text_config(model)
        self.family = self.config.model_type
        check_decodes(model, n_positions)
        self.reads_hidden = type(policy).creation_score is not Policy.creation_score
        self.options = {"output_hidden_states": True} if self.reads_hidden else {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self.options["logits_to_keep"] = 1
        trial, self.vocab_size = self._try(0)
        windows = self._windows(trial)
        self.evicted = {layer: i for i, layer in enumerate(layer for layer in windows if windows[layer] is None)}
        if not self.evicted:
            raise ConfigError(f"{self.family}: {NOTHING}")
        self.inv_freq = self._rotation(trial, min(SHIFT, n_positions - 1)) if policy.evicts else None
        key = trial.cached[next(iter(self.evicted))][0]
        self.scaling = trial.reads[next(iter(self.evicted))][0].scoring.scaling
        self.cache = SlotCache(self._shape(policy, trial, n_rows, n_slots), key.dtype, key.device)
        self._refuse(policy, trial)
        self.slots, self.rings = {}, []
        for layer, (key, value) in trial.cached.items():
            if layer in self.evicted:
                i = self.evicted[layer]
                self.slots[layer] = self.cache.layer_keys[i], self.cache.layer_values[i]
            else:
                n = min(windows[layer], n_positions)
                self.slots[layer] = tuple(x.new_zeros(n_rows, x.shape[1], n, x.shape[3]) for x in (key, value))
                self.rings += self.slots[layer]
        self.states = trial.layers
        for layer, name, i, state in states_of(self.states):
            getattr(layer, name)[i] = state.new_zeros(n_rows, *state.shape[1:])

    def fresh_states(self) -> list:
        """transformers' cache layers for one forward, if one of them keeps a state."""
        layers = DynamicCache(config=self.config).layers
        return layers if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers) else []

    def prefill(self, row: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read one unpadded prompt `[P]` into `row`: hidden states `[P, d]` (after the final norm), last logits `[V]`.

        Hidden states have d = 0 where the policy reads none.
        """
        step = Prefill(self, row, len(ids))
        hidden, logits = self._forward(step, ids[None], step.positions[None])
        for (_, _, _, state), (_, _, _, own) in zip(states_of(self.states), states_of(step.layers), strict=True):
            state[row] = own[0]
        return hidden[0], logits[0]

    def step(self, tokens: Tensor, positions: Tensor, n_max: int) -> tuple[Tensor, Tensor]:
        """As `kvlib.engine.fast.FastModel.step`."""
        hidden, logits = self._forward(Decode(self, positions, n_max), tokens[:, None], positions[:, None])
        return hidden[:, 0], logits

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by kind of layer; state: of convolution and recurrent layers."""
        states = [state for *_, state in states_of(self.states)]
        sliding, state = (sum(x.numel() * x.element_size() for x in held) for held in (self.rings, states))
        return {"full_attention": self.cache.nbytes(), "sliding_attention": sliding, "state": state}

    def close(self) -> None:
        """Nothing: between forwards the model is as it was."""

    def _forward(self, step: Step, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        with through_kvlib(self.model, step):
            out = self.model(
                input_ids=ids, position_ids=positions, past_key_values=step, use_cache=True, **self.options
            )
        logits = out.logits[:, -1]
        return (out.hidden_states[-1] if self.reads_hidden else logits.new_empty(*ids.shape, 0)), logits

    @torch.inference_mode()
    def _try(self, position: int) -> tuple[Trial, int]:
        """A token alone at this position, and the size of the vocabulary."""
        devices = [parameter.device for parameter in self.model.parameters() if parameter.device.type != "meta"]
        device = devices[0] if devices else "cpu"
        trial, ids = Trial(self.fresh_states()), torch.full((1, 1), self.config.vocab_size // 3, device=device)
        with in_a_sentence(self.family):
            _, logits = self._forward(trial, ids, torch.full_like(ids, position))
        if set(trial.reads) != set(trial.cached):
            raise ConfigError(f"{self.family} caches keys that it does not attend to by kvlib; use another model")
        return trial, logits.shape[-1]

    def _windows(self, trial: Trial) -> dict[int, int | None]:
        """The window of each layer that caches, None for full attention; it must be what transformers caches for it."""
        known, windows = DynamicCache(config=self.config).is_sliding, {}
        for layer, reads in sorted(trial.reads.items()):
            sliding = {read.scoring.window for read in reads}
            windows[layer] = sliding.pop()
            if sliding or (layer < len(known) and known[layer] != (windows[layer] is not None)):
                raise ConfigError(
                    f"{self.family}: layer {layer} limits what its attention sees in a way that does not reach kvlib; "
                    "use another model"
                )
        return windows

    def _rotation(self, trial: Trial, shift: int) -> Tensor | None:
        """The inverse frequencies by which all keys that are evicted turn with their position, if there are such."""
        later = self._try(shift)[0]
        pairs = [(trial.cached[layer][0], later.cached[layer][0]) for layer in self.evicted]

        def turns(key: Tensor, turned: Tensor, inv_freq: Tensor) -> bool:
            if 2 * len(inv_freq) != key.shape[-1]:
                return False
            expected = rotate(key, torch.full(key.shape[:-1], shift, device=key.device), inv_freq.to(key.device))
            return bool((expected - turned).norm() < max(1e-3, 4 * torch.finfo(key.dtype).eps) * key.norm())

        known = [buffer for name, buffer in self.model.named_buffers() if name.endswith("inv_freq")]
        return next((buffer for buffer in known if all(turns(*pair, buffer) for pair in pairs)), None)

    def _refuse(self, policy: Policy, trial: Trial) -> None:
        """Raise ConfigError for a policy that cannot score this model, by name."""
        reads = [read for layer in self.evicted for read in trial.reads[layer]]
        scores_attention = policy.n_queries or MASS in policy.state_names
        one_head = self.cache.shape.n_kv_heads == 1
        by_head = policy.reads_heads or not (self.cache.shape.shared_heads or one_head)
        if not policy.evicts:
            reason = None
        elif by_head and not all(read.paired for read in reads):
            reason = "tells heads apart, and the attention of this model mixes what it caches by head"
        elif self.inv_freq is None and (policy.reindex or policy.reads_rope):
            reason = "turns keys or queries by RoPE, and not all layers that are evicted turn theirs that way"
        elif scores_attention and (len(reads) > len(self.evicted) or not (one_head or all(r.grouped for r in reads))):
            reason = "scores by attention, and this model does not read each slot once by the query heads of its group"
        elif policy.n_queries and len({read.scoring.scaling for read in reads}) > 1:
            reason = "scores by attention, and the layers of this model scale theirs differently"
        else:
            reason = None
        if reason:
            raise ConfigError(f"{type(policy).__name__} cannot score {self.family}: it {reason}; use another policy")

    def _shape(self, policy: Policy, trial: Trial, n_rows: int, n_slots: int) -> CacheShape:
        kinds = {
            (key.shape[1], key.shape[3], value.shape[3], trial.reads[layer][0].n_query_heads)
            for layer, (key, value) in trial.cached.items()
            if layer in self.evicted
        }
        if len(kinds) > 1:
            raise ConfigError(f"{self.family}: its full-attention layers differ in heads or width; use another model")
        of_model = zip(("n_kv_heads", "head_dim", "value_dim", "n_query_heads"), kinds.pop(), strict=True)
        return cache_shape(policy, n_rows, n_slots, n_layers=len(self.evicted), **dict(of_model))


def states_of(layers: list) -> list[tuple[object, str, int, Tensor]]:
    """(layer, name, index, tensor) of every convolution and recurrent state that these cache layers hold."""
    return [
        (layer, name, i, state)
        for layer in layers
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        for name in STATES
        for i, state in getattr(layer, name).items()
        if state is not None
    ]


@contextmanager
def in_a_sentence(family: str) -> Iterator[None]:
    """Make a ConfigError of what a model's forward raises, but of a lack of memory."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
        raise ConfigError(f"{family} does not decode through kvlib ({reason}); use another model") from error


def check_decodes(model: nn.Module, n_positions: int) -> None:
    """Raise ConfigError for what is known without a forward: kinds of attention and layers, the end of positions."""
    config = text_config(model)
    if not model._can_set_attn_implementation():
        raise ConfigError(f"{config.model_type} has an attention that transformers lets nobody set; use another model")
    sliding = DynamicCache(config=config).is_sliding
    if sliding and all(sliding):
        raise ConfigError(f"{config.model_type}: {NOTHING}")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if odd:
        raise ConfigError(f"{config.model_type} has layers of type {', '.join(odd)}, which kvlib does not decode")
    most = getattr(config, "max_position_embeddings", n_positions)
    ropes = getattr(config, "rope_parameters", None) or {}
    ends = [] if ropes else [most]
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, dict) and any(kind in str(rope.get("rope_type")) for kind in ("dynamic", "longrope")):
            original = getattr(config, "original_max_position_embeddings", most)
            ends.append(rope.get("original_max_position_embeddings") or original)
    if n_positions > min(ends, default=n_positions):
        raise ConfigError(
            f"{config.model_type} has {'another RoPE' if ropes else 'no positions'} beyond {min(ends)} tokens, and "
            f"prompt and new tokens make {n_positions}; lower max_new_tokens"
        )
