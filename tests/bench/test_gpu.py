"""The GPU script: its blocks walked on a CPU; what is red or fails is marked and nothing stops. No time is judged."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlib.bench import gpu, gpu_timing
from kvlib.charts.throughput import load_bench, throughput_table
from kvlib.errors import ConfigError
from kvlib.policies import PRESETS

BLOCKS = ["machine", "kernels", "captures", "outputs", "copy", "step", "products", "attention", "rounds", "sampler"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """(record, its path, what was said); the kernels' tests are replaced by one line, since they run by themselves."""
    path, said = tmp_path_factory.mktemp("gpu") / "records" / "dry.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "check_kernels", lambda device: [{"kernel": "attention", "holds": True, "reason": ""}])
        record = gpu.gpu_bench(gpu_timing.scales("tiny"), "cpu", 500.0, path, said.append)
    return record, path, said


def test_all_blocks_run_in_the_order_of_the_plan(dry):
    record, path, said = dry
    assert list(record["blocks"])[: len(BLOCKS)] == BLOCKS
    assert record["gate"]["holds"] and record["complete"], said
    assert json.loads(path.read_text()) == record
    assert len(throughput_table(load_bench(path.parent, "dry run"))) == 2


def test_every_preset_is_probed_with_graphs_beside_calls(dry):
    rows = {row["preset"]: row for row in dry[0]["captures"]}
    assert list(rows) == list(PRESETS) and all(row["holds"] for row in rows.values()), rows
    refused = [name for name, row in rows.items() if row["reason"].startswith("refused")]
    assert refused == ["streaming-reindexed"], "whose turned keys bfloat16 is too coarse for"


def test_the_steady_state_is_the_sawtooths_mean(dry):
    """Live slots 22 to 25 of 25, 32 to 50 of 50."""
    record = dry[0]
    assert [(row["batch"], row["kv_budget"]) for row in record["arms"]] == [(3, 25), (3, 50)]
    assert [row["live_slots"] for row in record["arms"]] == pytest.approx([23.5, 41], abs=2)
    assert all(row["verdict"] == "not measured" for row in record["targets"])
    assert record["step"]["kernels"] and record["step"]["sum_us"] > 0
    assert {row["product"] for row in record["products"]} == {"qkv", "output", "gate_up", "down", "head"}
    assert [(row["policy"], row["rows"]) for row in record["rounds"]] == [
        ("DynTS", 1), ("DynTS", 3), ("RKV", 1), ("RKV", 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("load", "used", "idle"),
    [("0", "700", True), ("[N/A]", "[N/A]", True), ("40", "700", False), ("0", "9000", False)],
)
def test_a_card_that_works_for_another_is_red_and_one_that_cannot_tell_is_not(monkeypatch, load, used, idle):
    """A MIG slice has no load of its own."""
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *_: [["580.65.06", load, used]])
    assert gpu.check_machine("cpu")[0]["holds"] == idle
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *_: [["570.1", load, used]])
    assert not gpu.check_machine("cpu")[0]["holds"]


def run_with(monkeypatch, tmp_path, **replaced) -> tuple[dict, list[str]]:
    """The script where some blocks are replaced and the others, for speed, find nothing."""
    lists = ["check_machine", "check_kernels", "probe_captures", "check_outputs", "time_attention", "time_products"]
    nothing = {**{name: [] for name in [*lists, "time_rounds", "time_sampler"]}, "profile_step": {}}
    for name, found in nothing.items():
        room = gpu if hasattr(gpu, name) else gpu_timing
        monkeypatch.setattr(room, name, replaced.get(name, lambda *_, found=found: found))
    said, path = [], tmp_path / "r.json"
    record = gpu.gpu_bench(gpu_timing.scales("tiny"), "cpu", replaced.get("seconds", 100.0), path, said.append)
    assert json.loads(path.read_text()) == record
    return record, said


def test_a_red_check_marks_the_record_and_everything_is_timed_all_the_same(monkeypatch, tmp_path):
    red = [{"kernel": "attention float16", "holds": False, "reason": "0.1 apart"}]
    record, said = run_with(monkeypatch, tmp_path, check_kernels=lambda device: red)
    assert not record["gate"]["holds"] and len(record["arms"]) == 2
    assert "  RED attention float16: 0.1 apart" in said
    with pytest.raises(ConfigError, match="red gate"):
        load_bench(tmp_path, "dry run")


def test_a_block_that_raises_is_left_out_with_its_reason_and_the_next_one_runs(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    record, _ = run_with(monkeypatch, tmp_path, time_rounds=broken, probe_captures=broken)
    reason = "RuntimeError: CUDA error: an illegal memory access"
    assert record["left_out"] == [{"block": name, "reason": reason} for name in ("captures", "rounds")]
    assert record["blocks"]["sampler"]["error"] is None and len(record["arms"]) == 2 and not record["complete"]
    assert not record["gate"]["holds"], "a gate that could not be asked does not hold"


def test_rows_that_a_block_found_before_it_raised_are_kept(monkeypatch, tmp_path):
    def half():
        yield {"batch": 20, "live_slots": 4100, "share_of_copy": 0.9}
        raise RuntimeError("out of shared memory")

    record, _ = run_with(monkeypatch, tmp_path, time_attention=lambda *_: half())
    assert record["attention"] == [{"batch": 20, "live_slots": 4100, "share_of_copy": 0.9}]
    assert record["left_out"] == [{"block": "attention", "reason": "RuntimeError: out of shared memory"}]


def test_without_time_every_block_is_named_as_left_out(monkeypatch, tmp_path):
    record, _ = run_with(monkeypatch, tmp_path, seconds=0.0)
    assert record["arms"] == [] and {row["reason"] for row in record["left_out"]} == {"no time left"}
    assert len(record["left_out"]) == len(record["blocks"]) > len(BLOCKS)


def test_the_record_is_on_disk_after_every_block(monkeypatch, tmp_path):
    seen = []
    run = gpu.Run(gpu_timing.scales("tiny"), "cpu", 100.0, tmp_path / "r.json", lambda line: None)

    def work():
        seen.append(sorted(json.loads(run.path.read_text())["blocks"]) if run.path.exists() else [])
        return 1

    for name in "abc":
        run.block(name, work)
    assert seen == [[], ["a"], ["a", "b"]]


def test_kernels_are_told_by_the_names_of_their_tests(tmp_path):
    tests = tmp_path / "gpu"
    tests.mkdir()
    (tests / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('device', ['cpu', 'cuda'])\n"
        "@pytest.mark.parametrize('kernel', ['right', 'wrong'])\n"
        "def test(kernel, device):\n    assert kernel == 'right', 'two apart'\n"
    )
    rows = {row["kernel"]: row for row in gpu.check_kernels("cpu", tests)}
    assert {name: row["holds"] for name, row in rows.items()} == {"test[right-cpu]": True, "test[wrong-cpu]": False}
    assert "two apart" in rows["test[wrong-cpu]"]["reason"]
    (tests / "test_some.py").write_text("import nothing_of_that_name\n")
    assert [row["holds"] for row in gpu.check_kernels("cpu", tests)] == [False]
    with pytest.raises(ConfigError, match="run this from a clone"):
        gpu.check_kernels("cpu", tmp_path / "not there")


def test_the_kernels_tests_skip_without_a_card():
    here = Path(__file__).parents[1] / "gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda and append", str(here)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "passed" in done.stdout if torch.cuda.is_available() else "4 skipped" in done.stdout


def test_targets_are_met_missed_or_not_measured():
    arms = [
        {"batch": 20, "kv_budget": 2500, "steps": 3000.0, "plain": {}},
        {"batch": 20, "kv_budget": 5000, "steps": 2599.0, "plain": {"sampling": "why"}},
    ]
    attention = [
        {"batch": 20, "live_slots": 4100, "share_of_copy": 0.86},
        {"batch": 20, "live_slots": 4100, "share_of_copy": 0.5, "programs": 512, "stages": 2},
    ]
    found = gpu.verdicts({"arms": arms, "attention": attention}, gpu_timing.scales("full"))
    by_target = {row["target"]: row["verdict"] for row in found}
    assert by_target["batch 20, KV budget 2500"] == "met"
    assert by_target["batch 20, KV budget 5000"] == "missed"
    assert by_target["batch 128, KV budget 2500"] == "not measured"
    assert by_target["attention, batch 20 x 4100 slots"] == "met"
    assert by_target["settings whose every piece ran as a CUDA graph"] == "missed"


def test_fitted_numbers_have_the_dtype_of_real_ones():
    """A predictor is loaded in float32, whatever the model computes in."""
    from kvlib.bench.shapes import SIZES, random_model, random_subject

    scale = gpu_timing.scales("tiny")
    model = random_model(scale.config, torch.bfloat16, "cpu")
    policy = random_subject("dry run", model, dataclasses.replace(SIZES["r1-qwen"], batch=2, n_prompt=4)).fit(
        PRESETS["dynts"]()
    )
    assert {parameter.dtype for parameter in policy.predictor.parameters()} == {torch.float32}
