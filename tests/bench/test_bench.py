"""The benchmark: no speed without correctness, arms in a fair order, statistics that are right, records that can be
drawn. Nothing here judges a time."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvlib.bench import arms as bench
from kvlib.bench import gpu as gpu_bench
from kvlib.charts.throughput import load_bench, throughput_figure, throughput_table
from kvlib.engine import fast
from kvlib.errors import ConfigError

SIZES = bench.Sizes(torch.float32, 2, 24, 16, 40, 8)
ARMS = [
    "hf-eager", "hf-sdpa", "linears", "products", "full", "full-again", "knorm", "dynts@36", "full-unfused",
    "full-unpacked",
]  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    return bench.load_subject("tiny", SIZES, "cpu")


@pytest.fixture(scope="module")
def record(subject):
    return bench.bench(subject, SIZES, ARMS, n_rounds=2, say=lambda line: None)


def made_record(batch: int, budgets=(128, 256), red: bool = False, utc: str = "2026-01-01T00:00:00Z") -> dict:
    """As kvlib.bench.arms writes it; round numbers."""
    arms = [
        {"arm": "hf-sdpa", "kv_budget": None, "seconds": [2.0, 2.0], "steps": 50.0 * batch, "live_slots": 320.5},
        {"arm": "linears", "kv_budget": None, "seconds": [0.8, 0.8], "steps": 125.0 * batch},
        {"arm": "full", "kv_budget": None, "seconds": [1.3, 1.3], "steps": 77.0 * batch, "live_slots": 320.5},
    ]
    arms += [
        {
            "arm": f"{name}@{budget}",
            "kv_budget": budget,
            "seconds": [1.0 + budget / 1000 + i / 20, 0.9 + budget / 1000 + i / 20],
            "steps": batch * 200 / (1.9 + budget / 500 + i / 10),
            "live_slots": 0.8 * budget,
        }
        for i, name in enumerate(("knorm", "rkv", "kvpress-knorm"))
        for budget in budgets
    ]
    return {
        "schema": bench.SCHEMA,
        "model": "smollm2",
        "weights": "real",
        "device": "a CPU",
        "dtype": "float32",
        "batch": batch,
        "steps_per_round": 100,
        "ceilings": {"copy_bandwidth": 1e11, "weight_bytes": 5e8, "kv_bytes_per_token": 46080},
        "gate": {"holds": not red, "checks": []},
        "provenance": {"utc": utc},
        "arms": [] if red else arms,
        "ratios": [],
    }


def test_all_arms_decode_the_same_tokens_where_nothing_is_evicted(record, subject):
    """Otherwise their times would not compare: same prompts, same weights, same number of steps."""
    outputs = {}
    for name in ("hf-eager", "hf-sdpa", "full", "full-unfused", "full-unpacked", "full-eager"):
        arm = bench.build_arm(name, subject, SIZES, None, Path())
        arm.start()
        for _ in range(2):
            arm.advance(4)
        outputs[name] = arm.output()
        assert outputs[name].shape == (SIZES.batch, 9)
    assert all(torch.equal(output, outputs["full"]) for output in outputs.values())


@pytest.mark.skipif(not fast.PACKS, reason="nothing is packed on this machine")
def test_the_unpacked_arm_lacks_the_packing_and_nothing_else(monkeypatch):
    monkeypatch.setattr(fast, "PACKED_FROM", 0)
    subject, tokens = bench.load_subject("tiny", SIZES, "cpu"), {}
    for name in ("full", "full-unpacked"):
        arm = bench.build_arm(name, subject, SIZES, None, Path())
        linears = [getattr(layer, part) for layer in arm.decoder.model.layers for part in fast.Layer.products]
        assert {linear.packed is None for linear in (*linears, arm.decoder.head)} == {name == "full-unpacked"}
        arm.start()
        arm.advance(8)
        tokens[name] = arm.output()
    assert torch.equal(tokens["full"], tokens["full-unpacked"])


def test_a_peer_that_decodes_something_else_is_not_compared_with(subject, monkeypatch):
    class Peer(bench.HuggingFace):
        def output(self):
            return super().output().flip(1)

    monkeypatch.setattr(bench, "HuggingFace", Peer)
    record = bench.bench(subject, SIZES, ["hf-sdpa", "linears"], n_rounds=2, say=lambda line: None)
    assert not record["gate"]["holds"] and record["arms"] == []
    assert "hf-sdpa" in record["gate"]["checks"][-1]["detail"]


def test_an_arm_starts_again_where_it_started(subject):
    """The warm-up leaves no trace in what is measured."""
    for name in ("hf-sdpa", "full", "knorm@36"):
        arm = bench.build_arm(name, subject, SIZES, None, Path())
        first, second = [], []
        for outputs in (first, second):
            arm.start()
            arm.advance(16)
            outputs.append(arm.output())
        assert torch.equal(first[0], second[0]), name


def test_a_record_has_every_arm_three_definitions_and_the_ceilings(record):
    assert record["complete"] and record["rounds"] == 2 and record["gate"]["holds"]
    assert [row["arm"] for row in record["arms"]] == ARMS
    assert set(record["ceilings"]) == {"copy_bandwidth", "weight_bytes", "kv_bytes_per_token"}
    for row in record["arms"]:
        assert len(row["seconds"]) == 2
        assert row["steps"] == pytest.approx(2 * 16 / sum(row["seconds"]))
        if row["arm"] not in bench.CEILINGS:
            # 17 tokens: the prefill yields the first one.
            assert 0 < row["goodput"] <= row["steps"] * 17 / 16
            assert row["steps"] <= 1.001 * row["forward"]
            assert row["bandwidth_share"] == pytest.approx(row["bandwidth"] / record["ceilings"]["copy_bandwidth"])
    by_arm = {row["arm"]: row for row in record["arms"]}
    assert by_arm["full"]["live_slots"] == by_arm["hf-sdpa"]["live_slots"] == 24 + (1 + 16) / 2
    assert by_arm["dynts@36"]["kv_budget"] == 36 and by_arm["dynts@36"]["live_slots"] < by_arm["full"]["live_slots"]
    assert 0 < by_arm["dynts@36"]["round_share"] < 1 and by_arm["full"]["round_share"] is None
    assert by_arm["knorm"]["kv_bytes"] < by_arm["full"]["kv_bytes"] * 1.1
    assert record["noise"] == next(r for r in record["ratios"] if r["against"] == "full-again")
    assert {"git_commit", "versions", "cpu"} <= set(record["provenance"])
    json.dumps(record, allow_nan=False)


def test_a_red_gate_reports_no_speed(subject, monkeypatch):
    real = bench.Ours.__init__

    def wrong(self, *args, **options):
        real(self, *args, **options)
        layers = self.decoder.model.layers
        layers[0] = dataclasses.replace(layers[0], down=lambda x, down=layers[0].down: 1.01 * down(x))

    monkeypatch.setattr(bench.Ours, "__init__", wrong)
    said = []
    record = bench.bench(subject, SIZES, ["hf-sdpa", "full"], n_rounds=2, say=said.append)
    assert not record["gate"]["holds"] and record["arms"] == record["ratios"] == []
    assert any(line.startswith("gate: RED full cache = transformers") for line in said)


def test_a_red_gate_is_exit_code_1_and_a_sentence(monkeypatch, capsys):
    red = made_record(8, red=True)
    monkeypatch.setattr(bench, "bench", lambda *args, **options: red)
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "tiny"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert "the gate is red" in str(stopped.value.code)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == red


@pytest.mark.parametrize("fault", ["position", "key", "lost"])
def test_the_gate_sees_slots_that_hold_something_else(subject, fault):
    policy = subject.fit(bench.bench_policy("dynts", 36, SIZES))
    arm = bench.Ours(subject, policy, 36, 16)
    arm.start()
    arm.advance(14)
    cache = arm.decoder.cache
    assert bench.wrong_slots(arm.decoder, subject.prompts, 36) is None
    if fault == "position":
        cache.positions[:, 1, :, 3] = cache.positions[:, 1, :, 4]
    elif fault == "key":
        cache.keys[0, 0, 0, 2] *= 1.5
    else:
        cache.positions[:, 0, :, :2] += 1000
        cache.positions[:, 0, :, 1] += 1
    assert bench.wrong_slots(arm.decoder, subject.prompts, 36) is not None


def test_arms_take_turns_in_the_order_a_b_b_a():
    calls = []

    class Arm:
        def __init__(self, name):
            self.name = name

        def start(self):
            pass

        def advance(self, n):
            calls.append((self.name, n))

        def phase_seconds(self):
            return {"forward": float(len(calls))}

    arms = {name: Arm(name) for name in "AB"}
    found = bench.measure(arms, 3, 4, "cpu", 1e9, lambda line: None)
    assert calls == [(name, 3) for name in "ABBAABBA"]
    assert [len(row["seconds"]) for row in found.values()] == [4, 4]
    assert [row["phases"] for row in found.values()] == [{"forward": 8.0}] * 2, "what the warm-up took is not counted"
    calls.clear()
    found = bench.measure(arms, 3, 4, "cpu", -1.0, lambda line: None)
    assert len(calls) == 2, "without time left, one round of every arm"


def test_a_ratio_is_that_of_the_same_rounds_and_its_interval_covers_it():
    drift = np.linspace(1, 3, 30)
    noise = np.random.default_rng(1).normal(1, 0.02, 30)
    found = bench.paired_ratio(drift * noise, 1.5 * drift)
    assert found["low"] < 1.5 < found["high"] and found["high"] - found["low"] < 0.05
    assert found["low"] <= found["ratio"] <= found["high"]
    assert bench.paired_ratio([1.0, 1.0], [2.0, 4.0])["total"] == 3.0
    same = bench.paired_ratio([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same["ratio"], same["low"], same["high"]) == (1.0, 1.0, 1.0)


def test_every_arm_is_compared_with_its_peer_and_the_ceilings():
    found = list(bench.pairs(["hf-sdpa", "linears", "full", "knorm@40", "full-unfused", "kvpress-knorm@40"]))
    assert ("knorm@40", "kvpress-knorm@40") in found and ("knorm@40", "full") in found
    assert ("full", "full-unfused") in found and ("full", "linears") in found and ("full", "hf-sdpa") in found
    assert not any(arm in ("hf-sdpa", "linears", "kvpress-knorm@40") for arm, _ in found)


@pytest.mark.parametrize(
    "arms, message",
    [
        (["full", "full"], "named twice"),
        (["knorn"], "unknown policy"),
        (["full@30"], "takes no KV budget"),
        (["knorm@many"], "whole number"),
        (["kvpress-rkv"], "in kvpress for"),
        (["kvpress-knorm"], "needs --kvpress"),
        (["knorm@12"], "does not fit"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_a_model_is_loaded(arms, message):
    with pytest.raises(ConfigError, match=message):
        bench.check_arms(arms, SIZES, None)


def test_the_command_prints_the_record_last_and_refuses_in_a_sentence(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        sizes = ["--batch", "2", "--n-prompt", "24", "--n-new", "4", "--kv-budget", "40", "--interval", "8"]
        monkeypatch.setattr(sys, "argv", ["bench", "--model", "tiny", "--threads", "1", *sizes, *arguments])
        bench.main()

    out = tmp_path / "records" / "tiny.json"
    run("--rounds", "1", "--arms", "hf-sdpa,full", "--out", str(out))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert [row["arm"] for row in record["arms"]] == ["hf-sdpa", "full"]
    with pytest.raises(SystemExit, match="--n-new 4 must be a multiple of --rounds 3"):
        run("--rounds", "3")


def test_the_peer_gets_the_same_weights(subject, tmp_path):
    subject.model.config.quantization_config = {"quant_method": "gguf"}  # as GGUF leaves it
    try:
        bench.save_model(subject.model, tmp_path)
    finally:
        del subject.model.config.quantization_config
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    own = subject.model.state_dict()
    assert peer.dtype == subject.model.dtype
    assert all(torch.equal(tensor, own[name]) for name, tensor in peer.state_dict().items())
    with bench.through_transformers(subject.model, "sdpa") as model, torch.inference_mode():
        assert torch.equal(model(subject.prompts).logits, peer(subject.prompts).logits)


def test_a_peer_that_ends_is_a_sentence(subject, tmp_path):
    with pytest.raises(ConfigError, match="make bench-kvpress-env"):
        bench.KVPress("false", tmp_path, subject, "knorm", 40, SIZES)


def test_the_gpu_script_walks_all_its_parts_on_a_cpu(tmp_path):
    said = []
    path = tmp_path / "records" / "dry.json"
    scale = dataclasses.replace(gpu_bench.scales("tiny"), batches=(3,), most_rows=3, windows=(2, 2))
    record = gpu_bench.gpu_bench(scale, "cpu", 500.0, path, said.append)
    assert record["gate"]["holds"] and record["complete"], said
    assert {row["kernel"].split()[0] for row in record["kernels"]} == {
        *("attention", "append", "norms", "redundancy", "sampler", "compaction")
    }
    # Live slots as the sawtooth's mean: 22 to 25 of 25, 32 to 50 of 50.
    assert [(row["batch"], row["kv_budget"]) for row in record["arms"]] == [(3, 25), (3, 50)]
    assert [row["live_slots"] for row in record["arms"]] == pytest.approx([23.5, 41], abs=2)
    assert all(row["verdict"] == "not measured" for row in record["targets"])
    assert json.loads(path.read_text()) == record
    assert len(throughput_table(load_bench(path.parent, "dry run"))) == 2


def test_the_gpu_script_leaves_out_what_has_no_time_and_times_nothing_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "check_kernels", lambda device: [])
    scale = gpu_bench.scales("tiny")
    record = gpu_bench.gpu_bench(scale, "cpu", 0.0, tmp_path / "r.json", lambda line: None)
    assert record["arms"] == [] and len(record["left_out"]) == 6 and not record["complete"]
    red = {"kernel": "attention", "holds": False, "error": 1.0, "most": 0.1}
    monkeypatch.setattr(gpu_bench, "check_kernels", lambda device: [red])
    record = gpu_bench.gpu_bench(scale, "cpu", 100.0, tmp_path / "r.json", lambda line: None)
    assert not record["gate"]["holds"] and record["arms"] == [] and record["attention"] == []


def test_a_wrong_kernel_is_red(monkeypatch):
    real = gpu_bench.decode_attention

    def leaks(query, keys, values, lengths, scaling, n_max, mass=None):
        return real(query, keys, values, (lengths - 1).clamp(min=1), scaling, n_max, mass)

    monkeypatch.setattr(gpu_bench, "decode_attention", leaks)
    torch.manual_seed(0)
    assert gpu_bench.check_attention("cpu", torch.float32, 4, 7, 64, False) > 1e-2


def test_targets_are_met_missed_or_not_measured():
    arms = [
        {"batch": 20, "kv_budget": 2500, "steps": 3000.0, "plain": []},
        {"batch": 20, "kv_budget": 5000, "steps": 2599.0, "plain": ["sampling"]},
    ]
    attention = [{"batch": 20, "live_slots": 4100, "share_of_copy": 0.86}]
    found = gpu_bench.verdicts({"arms": arms, "attention": attention}, gpu_bench.scales("full"))
    by_target = {row["target"]: row["verdict"] for row in found}
    assert by_target["batch 20, KV budget 2500"] == "met"
    assert by_target["batch 20, KV budget 5000"] == "missed"
    assert by_target["batch 128, KV budget 2500"] == "not measured"
    assert by_target["attention, batch 20 x 4100 slots"] == "met"
    assert by_target["settings whose every piece ran as a CUDA graph"] == "missed"
    assert "attention, batch 20 x 2350 slots" not in by_target, "below 50,000 live tokens"


def write(folder: Path, **records: dict) -> Path:
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_the_chart_has_a_roofline_above_every_panel(tmp_path):
    df = load_bench(write(tmp_path, a=made_record(8), b=made_record(20)), "smollm2")
    fig = throughput_figure(df)
    assert [ax.get_title() for ax in fig.axes] == ["batch 8", "batch 20"]
    for ax, batch in zip(fig.axes, (8, 20), strict=True):
        roof = next(line for line in ax.lines if line.get_gid() == "roofline")
        wanted = [batch * 1e11 / (5e8 + 46080 * batch * 0.8 * budget) for budget in (128, 256)]
        assert list(roof.get_xdata()) == [128, 256] and list(roof.get_ydata()) == pytest.approx(wanted)
        assert min(roof.get_ydata()) > df.loc[df["batch"] == batch, "high"].max()
        names = set(ax.get_legend_handles_labels()[1])
        assert {
            "roofline",
            "HF's linear layers",
            "full cache",
            "HF generate",
            "knorm",
            "rkv",
            "knorm, by kvpress",
        } <= names
    fig.draw_without_rendering()
    page = fig.bbox
    for text in (*fig.legends[0].get_texts(), *fig.texts):
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1, f"{text.get_text()!r} leaves the page"
    table = throughput_table(df)
    assert len(table) == len(df) and table["KV budget"].iloc[-1] == "none"
    assert table.loc[0, "Of the roofline"].endswith("%")


def test_a_record_that_cannot_be_trusted_is_not_drawn(tmp_path):
    with pytest.raises(ConfigError, match="no record of smollm2"):
        load_bench(tmp_path, "smollm2")
    write(tmp_path, a=made_record(8, red=True))
    with pytest.raises(ConfigError, match="red gate"):
        load_bench(tmp_path, "smollm2")
    write(tmp_path, a=made_record(8) | {"device": "another CPU"}, b=made_record(20))
    with pytest.raises(ConfigError, match="one device per chart"):
        throughput_figure(load_bench(tmp_path, "smollm2"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match="not a record"):
        load_bench(tmp_path, "smollm2")


def test_the_newer_of_two_measurements_is_drawn(tmp_path):
    newer = made_record(8, budgets=(256,), utc="2026-02-01T00:00:00Z")
    newer["arms"][-1]["steps"] = 1.0
    df = load_bench(write(tmp_path, a=newer, b=made_record(8)), "smollm2")
    assert isinstance(df, pd.DataFrame)
    assert df.loc[df["arm"] == "kvpress-knorm@256", "tokens_per_s"].tolist() == [1.0]
