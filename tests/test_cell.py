"""A run measures the model, resumes to the same samples, and refuses what cannot run, in a sentence and early."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlib import cell as running
from kvlib.cell import prepare, run, run_fingerprints
from kvlib.charts.tables import measured_cells
from kvlib.config import RunConfig, load_grid
from kvlib.errors import ConfigError, GpuMemoryError
from kvlib.fitted import FITTED, held_out_of, load_fitted
from kvlib.models import TINY, load_reasoner
from kvlib.policies import Policy
from kvlib.record import RecordError, SampleLog, load_records, read_record
from kvlib.study.timing import time_dataset
from kvlib.tasks.datasets import load_problems

SMALL = {"dataset": "chain-a", "n_problems": 12, "batch_size": 6, "max_new_tokens": 400}
DYNTS = {"policy": "dynts", "kv_budget": 128, "policy_options": {"n_recent": 16, "ratio": 0.8}}


def samples_of(folder) -> dict[str, dict]:
    lines = (folder / "samples.jsonl").read_text().splitlines()[1:]
    return {sample["id"]: sample for sample in map(json.loads, lines)}


def copy_of_tiny(folder) -> str:
    for file in TINY.iterdir():
        shutil.copy(file, folder / file.name)
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(RunConfig(**SMALL, **DYNTS), folder)


def test_a_record_counts_what_its_samples_say(undisturbed):
    folder, record = undisturbed
    samples, results = samples_of(folder).values(), record["results"]
    assert read_record(folder) == record
    assert results["n_samples"] == len(samples) == 12
    assert results["n_correct"] == sum(s["correct"] for s in samples)
    assert results["n_tokens"] == sum(s["n_tokens"] for s in samples)
    assert results["peak_slots"] == max(s["peak_slots"] for s in samples) <= 128
    assert results["n_rounds"] > 0
    told = {
        f"{p}/{i}": mark == "1" for p, marks in record["verdicts"]["correct"].items() for i, mark in enumerate(marks)
    }
    assert told == {s["id"]: s["correct"] for s in samples}
    assert record["cost"]["kv_bytes"] == 4 * (2 * 4 * 6 * 2 * 129 * 32) + 4 * 2 * 6 * 129


def test_an_interrupted_run_ends_with_the_same_samples(undisturbed, tmp_path):
    class Interrupted(Exception):
        pass

    def stop_at(done, _):
        if done == 4:
            raise Interrupted

    config = RunConfig(**SMALL, **DYNTS)
    with pytest.raises(Interrupted):
        run(config, tmp_path, progress=stop_at)
    assert not (tmp_path / "record.json").exists()
    record = run(config, tmp_path)
    assert record["cost"]["resumed_samples"] == 4
    assert samples_of(tmp_path) == samples_of(undisturbed[0])
    assert record["results"] == undisturbed[1]["results"]


def test_another_seed_is_another_run(undisturbed, tmp_path):
    run(RunConfig(**SMALL, **DYNTS, seed=1), tmp_path)
    assert samples_of(tmp_path) != samples_of(undisturbed[0])


def test_a_changed_config_moves_the_old_samples_aside(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "cell")
    before = (tmp_path / "cell" / "samples.jsonl").read_bytes()
    run(RunConfig(**{**SMALL, "n_problems": 6}, **DYNTS), tmp_path / "cell")
    assert any(path.read_bytes() == before for path in (tmp_path / "cell").glob("samples*.jsonl"))
    assert len(samples_of(tmp_path / "cell")) == 6


FEW = {"n_problems": 10, "batch_size": 4, "max_new_tokens": 24}


def small_gpu(monkeypatch, most_rows: int, after: int = 0, stop_after: int = 99):
    """A GPU whose memory ends with more than so many rows, once `after` samples are made."""
    real, n_made = running.completions, 0

    def completions(decoder, *given):
        nonlocal n_made
        for completion in real(decoder, *given):
            if n_made >= after and len(decoder.rows) > most_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if n_made == stop_after:
                raise KeyboardInterrupt
            n_made += 1
            yield completion

    monkeypatch.setattr(running, "completions", completions)


def rows_of(folder) -> list[int]:
    return [sample["n_rows"] for sample in samples_of(folder).values()]


def test_out_of_gpu_memory_halves_the_batch_once_and_flags_the_record(tmp_path, monkeypatch):
    config = RunConfig(**{**DYNTS, **FEW})
    small_gpu(monkeypatch, most_rows=2, after=3)
    record = run(config, tmp_path / "halved")
    assert rows_of(tmp_path / "halved") == [4] * 3 + [2] * 7
    assert (record["cost"]["batch_halved"], record["cost"]["n_rows"], record["config"]["batch_size"]) == (True, 2, 4)
    assert record["results"]["n_samples"] == 10
    monkeypatch.undo()
    assert run(config, tmp_path / "whole")["cost"]["batch_halved"] is False
    frame = load_records(tmp_path)
    assert list(frame["batch_halved"]) == [True, False] and list(frame["batch_size"]) == [4, 4]


def test_a_halved_cell_stays_halved_when_it_is_continued(tmp_path, monkeypatch):
    config = RunConfig(**{**DYNTS, **FEW})
    small_gpu(monkeypatch, most_rows=2, after=3, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    monkeypatch.undo()
    assert run(config, tmp_path)["cost"]["batch_halved"] and rows_of(tmp_path) == [4] * 3 + [2] * 7


def test_no_room_for_half_the_batch_is_a_failure_that_scores_nothing(tmp_path, monkeypatch):
    config = RunConfig(**{**DYNTS, **FEW})
    whole = run(config, tmp_path / "whole")
    small_gpu(monkeypatch, most_rows=1, after=3)
    with pytest.raises(
        GpuMemoryError, match=r"dynts/b128/s0 at batch_size 4 nor at 2: .*the 3 finished samples are kept"
    ):
        run(config, tmp_path / "cell")
    assert not (tmp_path / "cell" / "record.json").exists() and rows_of(tmp_path / "cell") == [4] * 3
    monkeypatch.undo()
    assert run(config, tmp_path / "cell")["results"] == whole["results"]
    assert samples_of(tmp_path / "cell") == samples_of(tmp_path / "whole")


def test_a_model_that_does_not_fit_is_a_sentence(tmp_path, monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(running, "load_reasoner", load)
    with pytest.raises(GpuMemoryError, match="no room for tiny: free it"):
        run(RunConfig(**{**DYNTS, **FEW}), tmp_path)


def test_weights_of_zero_fall_to_the_guessing_floor(tmp_path):
    """The pipeline measures the model and nothing else."""
    model = tmp_path / "zero"
    model.mkdir()
    copy_of_tiny(model)
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(TINY / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = RunConfig(
        model=str(model), policy="full", dataset="chain-a", n_problems=40, batch_size=40, max_new_tokens=60
    )
    assert run(config, tmp_path / "cell")["results"]["n_correct"] <= 4


def test_several_samples_of_a_problem_differ_and_are_counted(tmp_path):
    config = RunConfig(dataset="chain-a", n_problems=3, n_samples=3, batch_size=9, policy="full", max_new_tokens=400)
    record = run(config, tmp_path)
    assert (record["results"]["n_problems"], record["results"]["n_samples"]) == (3, 9)
    assert [len(marks) for marks in record["verdicts"]["correct"].values()] == [3, 3, 3]
    samples = samples_of(tmp_path)
    assert len({samples[f"chain-a/0/{i}"]["output"] for i in range(3)}) > 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset": "chain-z"}, "unknown dataset 'chain-z'"),
        ({"model": "tinyy"}, "unknown model 'tinyy'"),
        ({"model": "./no/such/folder"}, "unknown model"),
        ({"policy": "dynst"}, "unknown policy 'dynst'; did you mean dynts"),
        ({"policy_options": {"rato": 0.4}}, "did you mean ratio"),
        ({"n_problems": 500}, "use 1 to 200"),
        ({"kv_budget": 24}, "kv_budget 24"),
        ({"kv_budget": 40}, r"small for chain-a/\d+/0 \(\d+-token prompt, .* the prompt does not fit; use \d+ or more"),
        ({"device": "cuda"}, "sees no CUDA GPU"),
        ({"dataset": "chain-a", "prompt": "boxed"}, "a chain, which has no box"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(change, sentence, tmp_path):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    with pytest.raises(ConfigError, match=sentence):
        run(RunConfig(**{**SMALL, **DYNTS, **change}), tmp_path / "cell")
    assert not (tmp_path / "cell" / "record.json").exists()


def test_a_prompt_longer_than_the_models_positions_is_refused_and_a_long_output_is_not(tmp_path):
    copy_of_tiny(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    config = RunConfig(**SMALL, model=str(tmp_path), policy="streaming", kv_budget=128)
    longest = max(len(request.prompt) for request in prepare(config).requests)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": longest}))
    prepare(config)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": longest - 1}))
    with pytest.raises(ConfigError, match=rf"prompt of chain-a/\d+/0 has {longest} tokens .* for {longest - 1} pos"):
        prepare(config)


def test_a_missing_or_damaged_weight_file_is_named(tmp_path, monkeypatch):
    copy_of_tiny(tmp_path)
    monkeypatch.setattr("kvlib.models.TINY", tmp_path)
    monkeypatch.setattr("kvlib.fitted.TINY", tmp_path)
    prepare(RunConfig(**SMALL, **DYNTS))
    for name in ("model.safetensors", FITTED["predictor"].file):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ConfigError, match=f"{name} is damaged .*git checkout"):
            prepare(RunConfig(**SMALL, **DYNTS))
        (tmp_path / name).unlink()
        with pytest.raises(ConfigError, match=f"{name} is missing"):
            prepare(RunConfig(**SMALL, **DYNTS))
        (tmp_path / name).write_bytes(whole)


def test_a_predictor_of_other_weights_is_refused():
    with pytest.raises(ConfigError, match="made for other weights"):
        load_fitted("predictor", TINY / FITTED["predictor"].file, "0" * 64)


def test_the_tiny_reasoner_loads_with_plain_auto_classes_and_no_remote_code():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    assert sum(file.stat().st_size for file in TINY.glob("*.safetensors")) < 4e6
    ids = tokenizer("a b +3 ; so a 2 ; b c +a ; c ? <think>", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :])
    assert text.endswith("ans 7 <eos>")


def test_a_timing_record_states_what_it_measured_and_fits_the_charts(tmp_path):
    grid = expand_to_grid(tmp_path)
    record = time_dataset(grid, "chain-a", 0, tmp_path / "timing")
    rows = record["results"]["throughput"]
    assert {(row["kv_budget"], row["definition"]) for row in rows} == {
        (budget, name) for budget in (96, None) for name in ("steps", "forward", "goodput")
    }
    for row in rows:
        assert len(row["repeats"]) == 2
        assert 0 < row["low"] <= row["median"] <= row["high"]
    steps, forward = rows[0]["repeats"], rows[1]["repeats"]
    assert all(all_in < forward_only for all_in, forward_only in zip(steps, forward, strict=True))
    for config in grid.cells():
        run(config, tmp_path / "records" / config.cell_path)
    shutil.copytree(tmp_path / "timing", tmp_path / "records" / "chain-a" / "timing" / "s0")
    assert len(measured_cells(grid, tmp_path / "records", 0)) == 2
    other = dataclasses.replace(grid, shared={**grid.shared, "temperature": 0.9})
    with pytest.raises(RecordError, match="other settings"):
        measured_cells(other, tmp_path / "records", 0)
    with pytest.raises(ConfigError, match="no dataset 'chain-b'"):
        time_dataset(grid, "chain-b", 0, tmp_path / "nothing")


def expand_to_grid(folder):
    (folder / "grid.yml").write_text(
        "study: small\ndatasets: [chain-a]\npolicy_options: {n_recent: 16, ratio: 0.8}\nkv_budgets: [96]\n"
        "full_cache: true\nn_problems: 3\nbatch_size: 3\nmax_new_tokens: 60\n"
        "timing: {batch_size: 4, n_steps: 80, repeats: 2}\n"
    )
    return load_grid(folder / "grid.yml")


def test_the_shipped_reasoner_is_the_one_its_predictor_was_trained_for():
    file = TINY / FITTED["predictor"].file
    load_fitted("predictor", file, load_reasoner("tiny").sha256)
    held_out = held_out_of(file)
    assert held_out["n_traces"] >= 50
    assert held_out["spearman"] > 0.4
    assert held_out["top20_recall"] > 0.5


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Exception, match="choose another"):
        SampleLog(tmp_path / "cell", {"fingerprint": "x"})


def test_an_edited_policy_of_ones_own_decodes_anew():
    def made(decay: float, sign: int):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Mine(Policy):
            decay: float = 1.0

            def score(self, view, state):
                return view.positions * sign, state

        return Mine(decay=decay)

    config = RunConfig(policy="mine", kv_budget=96)
    mark = run_fingerprints(config, made(0.5, 1))
    assert mark == run_fingerprints(config, made(0.5, 1))
    assert mark != run_fingerprints(config, made(0.6, 1))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Policy):
        decay: float = 1.0

        def score(self, view, state):
            return -view.positions, state

    assert mark != run_fingerprints(config, Mine(decay=0.5))


def test_a_model_whose_tokenizer_lacks_the_words_is_told_before_anything_is_decoded(tmp_path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"problem": "How many apples are two and two?", "answer": "4"}))
    english = RunConfig(dataset=str(tmp_path / "sums.jsonl"), policy="full")
    with pytest.raises(ConfigError, match=r"tokenizer has no words for .*use a model that reads text"):
        prepare(english)
    assert len(prepare(RunConfig(dataset="chain-a", policy="full", n_problems=3)).requests) == 3


def test_a_file_that_changes_is_another_cell(tmp_path):
    path = tmp_path / "chains.jsonl"
    config = RunConfig(model=copy_of_tiny(tmp_path), dataset=str(path), policy="full")
    path.write_text(json.dumps({"problem": "a b +3 ; so a 2 ; b ?", "answer": "5"}))
    first = prepare(config)
    path.write_text(json.dumps({"problem": "a b +4 ; so a 2 ; b ?", "answer": "6"}))
    second = prepare(config)
    assert first.fingerprints != second.fingerprints and first.requests[0].prompt != second.requests[0].prompt
    assert len(first.requests) == len(second.requests) == 1


def test_problems_are_read_once_for_all_cells_of_a_dataset(monkeypatch):
    loaded = []
    monkeypatch.setattr(running, "load_problems", lambda *given: loaded.append(given) or load_problems(*given))
    running.read_dataset.cache_clear()
    for budget in (96, 116, 136):
        prepare(RunConfig(policy="window", kv_budget=budget, n_problems=7))
    assert len(loaded) == 1
