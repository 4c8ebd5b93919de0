"""A round and a draw never wait for the device, nor send anything to it, so that a CUDA graph can hold them."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from conftest import fitted_fields, small_policy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvlib.engine.cache import CacheShape, SlotCache
from kvlib.engine.decoder import Decoder
from kvlib.engine.evict import Round, evict
from kvlib.engine.sampling import Sampling
from kvlib.invariants import random_model
from kvlib.policies import PRESETS

pytest.importorskip("triton", reason="Triton has no build for this platform")
EVICTING = [name for name, preset in PRESETS.items() if getattr(preset, "func", preset).evicts]


class HostTensors(TorchDispatchMode):
    """Fails where a tensor of the host takes part; a value asked of a tensor without data fails by itself."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        of_the_host = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        assert not of_the_host, f"{operator} sends a tensor to the device"
        return operator(*args, **kwargs)


class Numbers(TorchFunctionMode):
    """Fails where a tensor is made of Python numbers, which a device without data would not show."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.asarray), f"{function} sends numbers to the device"
        if function is torch.Tensor.__setitem__:
            places, value = args[1] if isinstance(args[1], tuple) else (args[1],), args[2]
            by_tensor = any(isinstance(place, torch.Tensor) for place in places)
            assert isinstance(value, torch.Tensor) or not by_tensor, f"{value} is sent to the places on the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def on_the_device():
    with HostTensors(), Numbers():
        yield


def on_device(value):
    return value.to("meta") if isinstance(value, torch.nn.Module | torch.Tensor) else value


def evict_on_device(policy) -> SlotCache:
    shape = CacheShape(
        3, 4, 2, 14, 29, 4, policy.share in ("head_across_layers", "model"), policy.share in ("layer", "model"),
        policy.n_queries, policy.state_names,
    )  # fmt: skip
    cache = SlotCache(shape, torch.float32, "meta")
    row = torch.empty(2, dtype=torch.int64, device="meta")
    due = Round(28, row, 29, row, row, row, row, 0.5, torch.empty(2, device="meta"))
    with on_the_device():
        kept, finite = evict(cache, policy, due)
    assert kept.shape == (shape.slot_map[0], 2, shape.slot_map[2], 29) and finite.shape == ()
    return cache


@pytest.mark.parametrize("name", EVICTING)
def test_a_round_waits_for_nothing(name):
    policy = small_policy(name)
    needed = {need: on_device(fitted_fields()[need]) for need in policy.needs}
    evict_on_device(dataclasses.replace(policy, **needed))


def test_a_round_that_asks_the_device_is_found():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Asks(type(small_policy("window"))):
        def score(self, view, state):
            return view.positions.float() + int(view.positions.max()), state

    with pytest.raises(RuntimeError, match="meta"):
        evict_on_device(Asks())

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Sends(type(small_policy("window"))):
        def score(self, view, state):
            return view.positions.float() * torch.tensor([1.0], device=view.positions.device), state

    with pytest.raises(AssertionError, match="sends numbers"):
        evict_on_device(Sends())


@pytest.mark.parametrize("settings", [(0.0, 1.0, 0), (0.6, 1.0, 0), (0.6, 0.95, 20), (0.6, 0.95, 0)])
def test_a_draw_waits_for_nothing(settings):
    logits, row = torch.empty(3, 1000, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with on_the_device():
        drawn = Sampling(*settings)(logits, row, row)
    assert (drawn.shape, drawn.dtype) == ((3,), torch.int64)


@pytest.mark.parametrize("name", ["sepllm", "dynts", "trimkv"])
def test_a_score_at_creation_waits_for_nothing(name):
    policy, row = small_policy(name), torch.empty(3, dtype=torch.int64, device="meta")
    if name == "trimkv":
        policy = dataclasses.replace(policy, gate=lambda hidden: hidden[None, :, :2])
    policy.creation_score(row[:, None] * 0.5, row, row > 0)  # what a policy may make once per device
    with on_the_device():
        policy.creation_score(torch.empty(3, 9, device="meta"), row, row > 0)


def test_the_operators_have_fakes_and_run_in_one_graph():
    from kvlib.kernels.compact import compact
    from kvlib.kernels.redundancy import redundancy

    def step(keys, rows, keep, n_keep, logits):
        compact([keys], rows, keep, n_keep)
        return redundancy(keys, 0.5), Sampling(0.6, 0.95, 20)(logits, rows, rows)

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = meta(3, dtype=torch.int64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    repeated, drawn = compiled(meta(2, 3, 2, 9, 4), rows, meta(2, 3, 2, 9, dtype=torch.bool), rows, meta(3, 1000))
    assert (repeated.shape, drawn.shape) == ((2, 3, 2, 9), (3,))


@pytest.mark.parametrize("name", EVICTING)
def test_a_step_waits_for_nothing(name):
    policy = small_policy(name)
    fields = {**fitted_fields(), "gate": lambda hidden: hidden.new_zeros(3, len(hidden), 2)}
    needed = {need: on_device(fields[need]) for need in policy.needs}
    decoder = Decoder(
        random_model().float().to("meta"), dataclasses.replace(policy, **needed), 28, n_rows=3, n_prompt_max=12,
        max_new_tokens=40, sampling=Sampling(0.6, 0.95, 20), eos_ids=(1, 2), answer_id=3,
    )  # fmt: skip
    with torch.inference_mode():
        decoder.forward(decoder)  # the first, plain call may send what is then kept
    with torch.inference_mode(), on_the_device():
        decoder.forward(decoder)
        decoder.sample(decoder)


def test_a_number_put_to_places_on_the_device_is_found():
    x, places = torch.empty(4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(AssertionError, match="is sent to the places"), on_the_device():
        x[places] = 0.0
