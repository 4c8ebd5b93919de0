"""The benchmark: no speed without correctness, arms in a fair order, statistics that are right, records that can be
drawn. Nothing here judges a time."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvlib.bench import __main__ as command
from kvlib.bench import arms, gate, measure, shapes
from kvlib.engine import fast, linear
from kvlib.errors import ConfigError

SIZES = shapes.Sizes(torch.float32, 2, 24, 16, 40, 8)
ARMS = [
    "hf-eager", "hf-sdpa", "linears", "products", "full", "full-again", "knorm", "dynts@36", "full-unfused",
    "full-unpacked",
]  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    return shapes.load_subject("tiny", SIZES, "cpu")


@pytest.fixture(scope="module")
def record(subject):
    return measure.bench(subject, SIZES, ARMS, n_rounds=2, say=lambda line: None)


def made_record(batch: int, budgets=(128, 256), red: bool = False, utc: str = "2026-01-01T00:00:00Z") -> dict:
    """As kvlib.bench writes it; round numbers."""
    rows = [
        {"arm": "hf-sdpa", "kv_budget": None, "seconds": [2.0, 2.0], "steps": 50.0 * batch, "live_slots": 320.5},
        {"arm": "linears", "kv_budget": None, "seconds": [0.8, 0.8], "steps": 125.0 * batch},
        {"arm": "full", "kv_budget": None, "seconds": [1.3, 1.3], "steps": 77.0 * batch, "live_slots": 320.5},
    ]
    rows += [
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
    for row in rows:
        row["bytes_per_step"] = 5e8 + 46080 * batch * row.get("live_slots", 0)
    return {
        "schema": measure.SCHEMA,
        "model": "smollm2",
        "weights": "real",
        "device": "a CPU",
        "dtype": "float32",
        "batch": batch,
        "steps_per_round": 100,
        "ceilings": {"copy_bandwidth": 1e11, "weight_bytes": 5e8, "kv_bytes_per_token": 46080},
        "gate": {"holds": not red, "checks": []},
        "provenance": {"utc": utc},
        "arms": [] if red else rows,
        "ratios": [],
    }


def test_all_arms_decode_the_same_tokens_where_nothing_is_evicted(record, subject):
    """Otherwise their times would not compare: same prompts, same weights, same number of steps."""
    outputs = {}
    for name in ("hf-eager", "hf-sdpa", "full", "full-unfused", "full-unpacked", "full-eager"):
        arm = arms.build_arm(name, subject, SIZES, arms.Peers(), Path())
        arm.start()
        for _ in range(2):
            arm.advance(4)
        outputs[name] = arm.output()
        assert outputs[name].shape == (SIZES.batch, 9)
    assert all(torch.equal(output, outputs["full"]) for output in outputs.values())


@pytest.mark.skipif(not linear.PACKS, reason="nothing is packed on this machine")
def test_the_unpacked_arm_lacks_the_packing_and_nothing_else(monkeypatch):
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    subject, tokens = shapes.load_subject("tiny", SIZES, "cpu"), {}
    for name in ("full", "full-unpacked", "knorm-unpacked@36"):
        arm = arms.build_arm(name, subject, SIZES, arms.Peers(), Path())
        linears = [getattr(layer, part) for layer in arm.decoder.model.layers for part in fast.Layer.products]
        assert {linear.weight.is_mkldnn for linear in (*linears, arm.decoder.model.head)} == {name == "full"}
        arm.start()
        arm.advance(8)
        tokens[name] = arm.output()
    assert torch.equal(tokens["full"], tokens["full-unpacked"])


@pytest.mark.skipif(not linear.PACKS, reason="8-bit products are of x86 with oneDNN")
def test_the_int8_arm_has_the_products_of_an_int8_model(subject):
    tokens = {}
    for name in ("full", "full-int8", "knorm-int8@36"):
        arm = arms.build_arm(name, subject, SIZES, arms.Peers(), Path())
        products = [getattr(layer, part) for layer in arm.decoder.model.layers for part in fast.Layer.products]
        rounded = {isinstance(product, linear.Int8Linear) for product in (*products, arm.decoder.model.head)}
        assert rounded == {name != "full"}
        arm.start()
        arm.advance(8)
        tokens[name] = arm.output()
    assert (tokens["full"] == tokens["full-int8"]).float().mean() > 0.8


def test_a_peer_that_decodes_something_else_is_not_compared_with(subject, monkeypatch):
    class Peer(arms.HuggingFace):
        def output(self):
            return super().output().flip(1)

    monkeypatch.setattr(arms, "HuggingFace", Peer)
    record = measure.bench(subject, SIZES, ["hf-sdpa", "linears"], n_rounds=2, say=lambda line: None)
    assert not record["gate"]["holds"] and record["arms"] == []
    assert "hf-sdpa" in record["gate"]["checks"][-1]["detail"]


def test_an_arm_starts_again_where_it_started(subject):
    """The warm-up leaves no trace in what is measured."""
    for name in ("hf-sdpa", "full", "knorm@36"):
        arm = arms.build_arm(name, subject, SIZES, arms.Peers(), Path())
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
        if row["arm"] not in arms.CEILINGS:
            # 17 tokens: the prefill yields the first one.
            assert 0 < row["goodput"] <= row["steps"] * 17 / 16
            assert row["steps"] <= 1.001 * row["forward"]
            assert row["bandwidth_share"] == pytest.approx(row["bandwidth"] / record["ceilings"]["copy_bandwidth"])
    by_arm = {row["arm"]: row for row in record["arms"]}
    assert by_arm["full"]["live_slots"] == by_arm["hf-sdpa"]["live_slots"] == 24 + (1 + 16) / 2
    assert by_arm["dynts@36"]["kv_budget"] == 36 and by_arm["dynts@36"]["live_slots"] < by_arm["full"]["live_slots"]
    assert 0 < by_arm["dynts@36"]["round_share"] < 1 and by_arm["full"]["round_share"] is None
    assert by_arm["knorm"]["kv_bytes"] < by_arm["full"]["kv_bytes"] * 1.1
    again = next(r for r in record["ratios"] if r["against"] == "full-again")
    assert record["noise"] == {**again, "too_busy": record["noise"]["too_busy"]}
    assert {"low", "high", "too_busy"} <= set(record["noise"])
    assert {"git_commit", "versions", "cpu"} <= set(record["provenance"])
    json.dumps(record, allow_nan=False)


def test_a_red_gate_reports_no_speed(subject, monkeypatch):
    real = arms.Ours.__init__

    def wrong(self, *args, **options):
        real(self, *args, **options)
        layers = self.decoder.model.layers
        layers[0] = dataclasses.replace(layers[0], down=lambda x, down=layers[0].down: 1.01 * down(x))

    monkeypatch.setattr(arms.Ours, "__init__", wrong)
    said = []
    record = measure.bench(subject, SIZES, ["hf-sdpa", "full"], n_rounds=2, say=said.append)
    assert not record["gate"]["holds"] and record["arms"] == record["ratios"] == []
    assert any(line.startswith("gate: RED full cache = transformers") for line in said)


def test_a_red_gate_is_exit_code_1_and_a_sentence(monkeypatch, capsys):
    red = made_record(8, red=True)
    monkeypatch.setattr(command, "bench", lambda *args, **options: red)
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "tiny"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert "the gate is red" in str(stopped.value.code)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == red


@pytest.mark.parametrize("fault", ["position", "key", "lost"])
def test_the_gate_sees_slots_that_hold_something_else(subject, fault):
    policy = subject.fit(shapes.bench_policy("dynts", 36, SIZES))
    arm = arms.Ours(subject, policy, 36, 16)
    arm.start()
    arm.advance(14)
    cache = arm.decoder.cache
    assert gate.wrong_slots(arm.decoder, subject.prompts, 36) is None
    if fault == "position":
        cache.positions[:, 1, :, 3] = cache.positions[:, 1, :, 4]
    elif fault == "key":
        cache.keys[0, 0, 0, 2] *= 1.5
    else:
        cache.positions[:, 0, :, :2] += 1000
        cache.positions[:, 0, :, 1] += 1
    assert gate.wrong_slots(arm.decoder, subject.prompts, 36) is not None


def test_every_round_is_the_same_steps_of_every_arm_and_time_that_runs_out_ends_them():
    calls = []

    class FakeArm:
        def __init__(self, name):
            self.name = name

        def start(self):
            pass

        def advance(self, n):
            calls.append((self.name, n))

        def phase_seconds(self):
            return {"forward": float(len(calls))}

    fakes = {name: FakeArm(name) for name in "AB"}
    found = measure.measure(fakes, 3, 4, "cpu", 1e9, lambda line: None)
    assert calls == [(name, 3) for name in "ABBABAAB"], "each first in half of the rounds"
    assert [len(row["seconds"]) for row in found.values()] == [4, 4]
    assert [row["phases"] for row in found.values()] == [{"forward": 8.0}] * 2, "what the warm-up took is not counted"
    calls.clear()
    measure.measure(fakes, 3, 4, "cpu", -1.0, lambda line: None)
    assert len(calls) == 2, "without time left, one round of every arm"


def test_every_arm_is_compared_with_its_peer_the_ceilings_and_what_differs_in_one_thing():
    names = [
        "hf-sdpa",
        "linears",
        "full",
        "knorm@40",
        "full-unfused",
        "full-unpacked",
        "knorm-unpacked@40",
        "full-again",
        "llama.cpp",
    ]
    found = list(measure.pairs([*names, "kvpress-knorm@40", "kvpress-knorm@36"], SIZES))
    assert ("knorm@40", "kvpress-knorm@40") in found and ("knorm@40", "full") in found
    assert ("knorm-unpacked@40", "kvpress-knorm@40") in found, "both have plain products"
    assert ("knorm-unpacked@40", "full-unpacked") in found and ("knorm-unpacked@40", "full") not in found
    assert ("full", "full-unfused") in found and ("full", "linears") in found and ("full", "hf-sdpa") in found
    assert ("full", "llama.cpp") in found
    assert ("full", "full-again") in found and not any("kvpress-knorm@36" in pair for pair in found)
    assert not any(arm in ("hf-sdpa", "linears", "kvpress-knorm@40", "llama.cpp") for arm, _ in found)
    assert len(set(found)) == len(found)


def test_a_name_says_what_an_arm_is():
    def parse(name):
        return arms.parse_arm(name, SIZES)

    assert parse("knorm-unpacked@36") == arms.Named("kvlib", "knorm", "unpacked", 36)
    assert parse("snapkv-kvpress") == arms.Named("kvlib", "snapkv-kvpress", "", SIZES.kv_budget)
    assert parse("kvpress-snapkv-kvpress@36") == arms.Named("kvpress", "snapkv-kvpress", "", 36)
    assert parse("hf-eager") == arms.Named("hf", "eager", "", None)
    assert parse("full-eager") == arms.Named("kvlib", "full", "eager", None)
    assert parse("llama.cpp") == arms.Named("llama.cpp", "", "", None)
    assert parse("products") == arms.Named("alone", "products", "", None)


@pytest.mark.parametrize(
    "names, message",
    [
        (["full", "full"], "named twice"),
        (["knorn"], "unknown policy"),
        (["full@30"], "takes no KV budget"),
        (["knorm@many"], "whole number"),
        (["kvpress-rkv"], "in kvpress for"),
        (["kvpress-knorm"], "needs --kvpress"),
        (["llama.cpp"], "on GGUF files of the hub, with --model qwen-coder"),
        (["llama.cpp@40"], "takes no KV budget"),
        (["knorm@12"], "does not fit"),
        (["full-again@30"], "takes no KV budget"),
        (["knorm@40", "window@64"], "would never evict"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_a_model_is_loaded(names, message):
    with pytest.raises(ConfigError, match=message):
        arms.check_arms(names, "tiny", SIZES, arms.Peers())


def test_the_command_writes_the_record_and_refuses_in_a_sentence(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        sizes = ["--batch", "2", "--n-prompt", "24", "--n-new", "4", "--kv-budget", "40", "--interval", "8"]
        monkeypatch.setattr(sys, "argv", ["bench", "--model", "tiny", "--threads", "1", *sizes, *arguments])
        command.main()

    out = tmp_path / "records" / "tiny.json"
    run("--rounds", "1", "--arms", "hf-sdpa,full", "--out", str(out))
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    assert said.endswith(f"the record: {out}\n") and "{" not in said, "no screens of JSON where a file was asked for"
    assert "too few rounds for an interval" in said and all(r["low"] is None for r in record["ratios"])
    assert [row["arm"] for row in record["arms"]] == ["hf-sdpa", "full"]
    with pytest.raises(SystemExit, match="--n-new 4 must be a multiple of --rounds 3"):
        run("--rounds", "3")
    with pytest.raises(SystemExit, match="--threads are whole numbers from 1 on"):
        run("--rounds", "1", "--threads", "0")
    monkeypatch.setattr(command, "bench", lambda *args, **options: pytest.fail("measured for nothing"))
    for place, why in ((out / "below.json", "a file is where a folder must be"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit, match=why):
            run("--rounds", "1", "--arms", "full", "--out", str(place))


def test_the_peer_gets_the_same_weights(subject, tmp_path):
    subject.model.config.quantization_config = {"quant_method": "gguf"}  # as GGUF leaves it
    try:
        arms.save_model(subject.model, tmp_path)
    finally:
        del subject.model.config.quantization_config
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    own = subject.model.state_dict()
    assert peer.dtype == subject.model.dtype
    assert all(torch.equal(tensor, own[name]) for name, tensor in peer.state_dict().items())
    with arms.through_transformers(subject.model, "sdpa") as model, torch.inference_mode():
        assert torch.equal(model(subject.prompts).logits, peer(subject.prompts).logits)


def test_a_peer_that_ends_is_a_sentence(subject, tmp_path):
    for python in ("false", str(tmp_path / "no python")):
        with pytest.raises(ConfigError, match="make bench-kvpress-env"):
            arms.KVPress(python, tmp_path, subject, "knorm", 40, SIZES)


PROGRAM = """#!{python}
import json, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert (args["-npl"], args["-npp"], args["-c"], args["--output-format"]) == ("2", "24", "80", "jsonl"), args
print("what it says before")
print(json.dumps({{"pl": 2, "t_pp": 0.5, "t_tg": int(args["-ntg"]) / 100}}))
"""


def test_llama_cpp_is_timed_by_what_it_reports_and_without_its_start(tmp_path):
    program = tmp_path / "llama-batched-bench"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    arm = arms.LlamaCpp(str(program), tmp_path / "model.gguf", SIZES)
    found = measure.measure({"llama.cpp": arm}, 8, 2, "cpu", 1e9, lambda line: None)["llama.cpp"]
    assert found["seconds"] == [0.08, 0.08] and found["prefill"] == 0.5
    row = measure.describe("llama.cpp", arm, found, None, SIZES, 8, 1e9)
    assert row["steps"] == pytest.approx(2 * 16 / 0.16) and row["live_slots"] == 28


def test_a_record_has_llama_cpp_beside_our_arms(subject, tmp_path, monkeypatch):
    program = tmp_path / "llama-batched-bench"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(arms, "GGUF", {"tiny": "model.gguf"})
    monkeypatch.setattr(arms, "fetch_model", lambda name: tmp_path / name)
    peers, names = arms.Peers(llama_cpp=str(program)), ["full", "llama.cpp"]
    found = measure.bench(subject, SIZES, names, n_rounds=2, peers=peers, say=lambda line: None)
    assert [row["arm"] for row in found["arms"]] == names
    assert [(r["arm"], r["against"]) for r in found["ratios"]] == [("full", "llama.cpp")]


@pytest.mark.parametrize(
    "program, message",
    [
        ("no program", "cannot be started"),
        ("false", "ended with 1 and said: nothing"),
        ("true", "ended with 0"),
        ("echo", "reported no times"),
    ],
)
def test_a_llama_cpp_that_cannot_run_is_a_sentence(tmp_path, program, message):
    with pytest.raises(ConfigError, match=message):
        arms.LlamaCpp(program, tmp_path / "model.gguf", SIZES).start()


@pytest.mark.skipif(not linear.PACKS, reason="8-bit products are of x86 with oneDNN")
def test_8_bit_arms_are_held_to_their_logits(subject, monkeypatch):
    checks = gate.gate(subject, SIZES, ["full", "full-int8"])
    assert [check.name for check in checks] == ["full cache = transformers", "full-int8 near transformers"]
    assert all(check.holds for check in checks)
    monkeypatch.setattr(gate, "INT8_TOLERANCE", 1e-6)
    assert not gate.gate(subject, SIZES, ["knorm-int8@40"])[1].holds
