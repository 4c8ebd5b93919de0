"""What is counted of a step is what it moves, and at R1-Qwen's shapes that is near the least it could move."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvlib
from kvlib.bench.count import Counting, count_step, dynts, meta_decoder, minimum_bytes
from kvlib.bench.shapes import r1_config
from kvlib.config import load_grid
from kvlib.cost import SHAPES, Step
from kvlib.engine.evict import Round
from kvlib.policies import make_policy
from kvlib.study.plan import WORKSPACE_GB

triton = pytest.importorskip("triton")


class Memory(TorchDispatchMode):
    """The most bytes that tensors made inside it hold at one time."""

    def __init__(self):
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = function(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.held |= {StorageWeakRef(x): x.nbytes() for x in made if StorageWeakRef(x) not in given}
        self.peak = max(self.peak, sum(self.held.values()))
        return outputs


def count_round(config, policy, n_rows: int, kv_budget: int) -> int:
    """The most bytes that a round of n_rows, each one slot over the budget, holds beside the cache."""
    decoder = meta_decoder(config, policy, n_rows, kv_budget)
    row = torch.empty(n_rows, dtype=torch.int64, device="meta")
    inv_freq = torch.empty(decoder.cache.shape.head_dim // 2, device="meta")
    due = Round(kv_budget, row, kv_budget + 1, row, row, row, row, 1.0, inv_freq)
    with torch.inference_mode(), Memory() as memory:
        decoder.evict_rows(due)
    return memory.peak


META = {"device": "meta", "dtype": torch.bfloat16}


def counted(work, live: int = 1) -> Counting:
    with torch.inference_mode(), Counting(live) as counting:
        work()
    return counting


def test_a_product_reads_its_inputs_and_writes_its_output_once():
    x, w = torch.empty(4, 8, **META), torch.empty(16, 8, **META)
    assert sum(counted(lambda: torch.nn.functional.linear(x, w)).bytes.values()) == 2 * (4 * 8 + 16 * 8 + 4 * 16)


def test_views_move_nothing_and_repeated_elements_are_read_once():
    x = torch.empty(4, 8, **META)
    assert not counted(lambda: x.view(2, 16)[:, None].transpose(0, 1)).bytes
    row = torch.empty(1, 8, **META)
    assert sum(counted(lambda: x + row.expand(4, 8)).bytes.values()) == 2 * (4 * 8 + 8 + 4 * 8)


def test_a_gather_reads_what_it_picks_and_a_scatter_writes_what_it_is_given():
    table, ids = torch.empty(1000, 8, **META), torch.empty(4, dtype=torch.int64, device="meta")
    assert sum(counted(lambda: torch.nn.functional.embedding(ids, table)).bytes.values()) == 4 * 8 + 2 * (2 * 4 * 8)
    rows = torch.empty(4, 8, **META)

    def put():
        table[ids] = rows

    assert sum(counted(put).bytes.values()) == 4 * 8 + 2 * (2 * 4 * 8)


def test_a_wait_for_the_device_is_counted():
    x = torch.ones(3)
    assert counted(lambda: x.sum().item()).syncs == 1
    assert counted(lambda: x.nonzero()).syncs == 1
    assert counted(lambda: x + 1).syncs == 0


@pytest.mark.parametrize("live", [2350, 4100])
def test_a_step_of_r1_qwen_moves_at_most_a_twentieth_more_than_the_least(live):
    config = r1_config("r1-qwen")
    step, least = count_step(config, dynts(config), 20, live), minimum_bytes(config, 20, live)
    assert least == pytest.approx(14.141e9 + 57_344 * 20 * live, rel=1e-4)
    assert least < step["bytes_per_step"] <= 1.05 * least
    assert step["host_syncs"] == step["graph_breaks"] == 0
    kv = step["by_operation"]["kvlib::decode_attention"]
    assert kv >= 57_344 * 20 * live, "the live slots are in the count"


@pytest.mark.parametrize("name", ["h2o", "rkv", "dynts"])
def test_no_kind_of_policy_makes_a_step_wait_or_leave_the_graph(name):
    policy = make_policy(name, **({"predictor": lambda hidden: hidden[:, 0]} if name == "dynts" else {}))
    step = count_step(r1_config("r1-qwen"), policy, 20, 2500)
    assert step["host_syncs"] == step["graph_breaks"] == 0


@pytest.mark.parametrize("name", ["lagkv", "expected", "cur", "rkv", "dynts-published"])
def test_a_round_of_many_rows_holds_no_more_than_the_plan_reckons(name):
    """The hungriest policies at R1-Llama's shape; scored whole, 20 rows of expected's held 60 GB."""
    policy = make_policy(name, **({"predictor": lambda hidden: hidden[:, 0]} if name.startswith("dynts") else {}))
    few, many = (count_round(r1_config("r1-llama"), policy, n_rows, 5000) for n_rows in (1, 20))
    assert few <= many <= 1.1 * few and many < 3.4e9 < WORKSPACE_GB * 1e9


def test_memory_is_what_lives_together():
    with Memory() as memory:
        a = torch.empty(100, **META)
        b = a + 1
        del a
        c = b.view(10, 10)[:5]
        del b
        c = c * 2
    assert memory.peak == 2 * (100 + 100) and sum(memory.held.values()) <= 2 * 150


def test_a_step_is_reckoned_as_the_card_was_measured():
    """Within 5 % at every batch and KV budget of the committed record."""
    root = Path(kvlib.__file__).parents[1]
    step = Step(**load_grid(root / "notebooks" / "r1-qwen.yml").expected["step"])
    record = json.loads((root / "results" / "bench" / "h100" / "r1-qwen.json").read_text())
    shape = SHAPES["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"]
    for arm in record["arms"]:
        reckoned = arm["batch"] / step.seconds(shape, 2, arm["batch"], arm["live_slots"])
        assert reckoned == pytest.approx(arm["steps"], rel=0.05)
    assert record["gate"]["holds"] and len(record["arms"]) == 7


@pytest.mark.slow
def test_the_command_ends_with_one_json_list():
    run = subprocess.run([sys.executable, "-m", "kvlib.bench.count"], capture_output=True, text=True, check=True)
    rows = json.loads(run.stdout.splitlines()[-1])
    wanted = {"model", "batch", "live_slots", "bytes_per_step", "minimum_bytes", "host_syncs", "graph_breaks"}
    assert rows and all(wanted <= set(row) for row in rows)
    at_20 = [row for row in rows if row["model"] == "r1-qwen" and row["batch"] == 20]
    assert {row["live_slots"] for row in at_20} == {2350, 4100}
