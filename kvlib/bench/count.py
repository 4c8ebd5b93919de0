"""What a decode step costs on any GPU, counted without one: bytes, host syncs and graph breaks. `make bench-count`.

The policy is DynTS, whose predictor runs in every step. Rounds of eviction are not counted.

The step runs on meta tensors, which have shapes and no memory, at the true shapes of the models. Every operation that
is dispatched is counted: the bytes it reads and writes, those of our own kernels as the kernel does it, over live
slots only.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvlib.bench.shapes import R1, r1_config, random_model
from kvlib.cost import minimum_bytes
from kvlib.engine.decoder import Decoder, Request, decoder_for
from kvlib.engine.sampling import Sampling
from kvlib.policies import Policy, make_policy
from kvlib.policies.dynts import ImportanceHead

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::item")
LIVE_SLOTS = (2350, 4100)
"""Mean live slots of DynTS as published at KV budgets 2500 and 5000."""
BATCHES = (1, 20, 64, 128)


def nbytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements, those that broadcasting repeats counted once."""
    own = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
    return math.prod(own) * tensor.element_size()


def _all(inputs: list[Tensor], outputs: list[Tensor], live: int) -> int:
    return sum(map(nbytes, inputs)) + sum(map(nbytes, outputs))


def _rows_read(inputs: list[Tensor], outputs: list[Tensor], live: int) -> int:
    """A gather: the indices, and each element that it picks, read and written."""
    return sum(map(nbytes, inputs[1:])) + 2 * sum(map(nbytes, outputs))


def _rows_written(inputs: list[Tensor], outputs: list[Tensor], live: int) -> int:
    """A scatter in place: the indices and the values, read and written."""
    return sum(map(nbytes, inputs[1:])) + nbytes(inputs[-1])


def _attention(inputs: list[Tensor], outputs: list[Tensor], live: int) -> int:
    """Live keys and values once, query and output, and the scratch between split and merge, written and read.

    The scratch is each split's partial output and its log-sum-exp; with mass also the logits of live slots, and their
    sums are read and written.
    """
    from kvlib.kernels.attention_triton import n_splits

    query, keys, _, lengths, *mass = inputs
    B, H, N, D = keys.shape
    HQ = query.shape[1]
    scratch = 4 * B * HQ * n_splits(B, H, N) * (D + 1) + 4 * B * HQ * live * len(mass)
    slots = 2 * B * H * live * D * keys.element_size() + 2 * 4 * B * H * live * len(mass)
    return slots + 2 * scratch + nbytes(query) + nbytes(outputs[0]) + nbytes(lengths)


def _append(inputs: list[Tensor], outputs: list[Tensor], live: int) -> int:
    """The projections read, the query, one key and one value per row written, the query once more into a ring."""
    qkv, cos, sin = inputs[:3]
    ring = any(tensor.dim() == 4 for tensor in inputs[5:])
    return 2 * nbytes(qkv) + nbytes(cos) + nbytes(sin) + nbytes(outputs[0]) * ring


COUNTED: dict[str, Callable[[list[Tensor], list[Tensor], int], int]] = {
    "aten::embedding": _rows_read,
    "aten::index": _rows_read,
    "aten::gather": _rows_read,
    "aten::index_put_": _rows_written,
    "aten::scatter_": _rows_written,
    "kvlib::decode_attention": _attention,
    "kvlib::append": _append,
}
"""Operations that do not touch all of their tensors; every other one reads its inputs and writes its outputs."""


class Counting(TorchDispatchMode):
    """Counts what is dispatched inside it: bytes by operation, host syncs, operations. live: live slots of every row.

    A sync on a meta tensor has no value to return and raises.
    """

    def __init__(self, live: int):
        super().__init__()
        self.live = live
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.syncs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in SYNCS:
            self.syncs += 1
        outputs = function(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in made) and any(t.device.type != "cpu" for t in given):
            self.syncs += 1
        if not function.is_view:
            self.bytes[name] += COUNTED.get(name, _all)(given, made, self.live)
            self.calls[name] += 1
        return outputs


def meta_decoder(config, policy: Policy, batch: int, live: int) -> Decoder:
    """A decoder of `batch` rows, none of whose tensors has memory, before a step at which every row holds `live`."""
    decoder = decoder_for(
        random_model(config, torch.bfloat16, torch.device("meta")),
        policy,
        live,
        [Request("", (0,), 0)],
        n_rows=batch,
        max_new_tokens=16384,
        sampling=Sampling(0.6, 0.95, 20),
        eos_ids=(0,),
    )
    decoder.rows.n_held[:] = live - 1
    decoder.n_max = live
    return decoder


def count_step(config, policy: Policy, batch: int, live: int) -> dict:
    """Bytes, host syncs, operations and graph breaks of one step, sampling included, at `live` slots in every row."""
    decoder = meta_decoder(config, policy, batch, live)
    with torch.inference_mode(), Counting(live) as counting:
        decoder.forward(decoder)
        decoder.sample(decoder)
    with torch.inference_mode():
        breaks = sum(torch._dynamo.explain(work)().graph_break_count for work in (decoder._forward, decoder._sample))
    return {
        "bytes_per_step": sum(counting.bytes.values()),
        "host_syncs": counting.syncs,
        "operations": sum(counting.calls.values()),
        "graph_breaks": breaks,
        "by_operation": dict(counting.bytes.most_common()),
    }


def dynts(config) -> Policy:
    """The policy of the published charts, with a predictor of the model's width in float32, as one is loaded."""
    with torch.device("meta"):
        return make_policy("dynts", predictor=ImportanceHead(config.hidden_size))


def main() -> None:
    argparse.ArgumentParser(prog="python -m kvlib.bench.count", description=__doc__.splitlines()[0]).parse_args()
    rows = []
    print("model     batch  live  GB/step  minimum  ratio syncs breaks operations")
    for model in R1:
        for batch in BATCHES:
            for live in LIVE_SLOTS:
                config = r1_config(model)
                counted = count_step(config, dynts(config), batch, live)
                minimum = minimum_bytes(config, batch, live)
                row = {"model": model, "batch": batch, "live_slots": live, **counted, "minimum_bytes": minimum}
                row.pop("by_operation")
                rows.append(row)
                print(
                    f"{model:9} {batch:5} {live:5} {row['bytes_per_step'] / 1e9:8.3f} {minimum / 1e9:8.3f} "
                    f"{row['bytes_per_step'] / minimum:6.4f} {row['host_syncs']:5} {row['graph_breaks']:6} "
                    f"{row['operations']}",
                    flush=True,
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
