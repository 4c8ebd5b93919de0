"""Parameters are taken literally or refused with a sentence; a grid file is read strictly."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from kvlib.config import RULES, RunConfig, load_grid
from kvlib.errors import ConfigError

GRID = """
study: tiny
model: tiny
datasets: [chain-a, chain-b]
policy: dynts
policy_options: {n_recent: 16, ratio: 0.8}
kv_budgets: [80, 104]
full_cache: true
n_problems: 200
threads: 1
timing: {batch_size: 64, n_steps: 384, repeats: 5}
"""
POSITIVE = ["kv_budget", "n_problems", "n_samples", "max_new_tokens", "batch_size", "threads"]
INTEGERS = [*POSITIVE, "seed", "top_k"]
NUMBERS = ["temperature", "top_p"]
STRINGS = ["model", "dataset", "policy", "dtype", "device"]

literals = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]))


def refused(**parameters):
    with pytest.raises(ConfigError) as error:
        RunConfig(**{"kv_budget": 96, **parameters})
    return str(error.value)


@given(name=st.sampled_from(INTEGERS), value=literals.filter(lambda x: type(x) is not int and x is not None))
def test_an_integer_field_takes_only_integers(name, value):
    assert name in refused(**{name: value})


@given(name=st.sampled_from(NUMBERS), value=literals.filter(lambda x: type(x) not in (int, float)))
def test_a_number_field_takes_only_numbers(name, value):
    assert name in refused(**{name: value})


@given(name=st.sampled_from(STRINGS), value=literals.filter(lambda x: type(x) is not str))
def test_a_string_field_takes_only_strings(name, value):
    assert name in refused(**{name: value})


@given(name=st.sampled_from(POSITIVE), value=st.integers(max_value=0))
def test_a_count_is_positive(name, value):
    assert name in refused(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1e400])
def test_a_number_is_finite_and_in_range(value):
    for name in NUMBERS:
        assert name in refused(**{name: value})
    assert "policy_options.ratio" in refused(policy_options={"ratio": math.nan})


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"dtype": "fp32"}, "float32"),
        ({"device": "gpu"}, "cuda"),
        ({"model": " "}, "model"),
        ({"policy": "a/b"}, "policy"),
        ({"policy_options": {"a b": 1}}, "policy_options"),
        ({"policy_options": {"n_sink": [1]}}, "policy_options.n_sink"),
        ({"policy_options": None}, "policy_options"),
        ({"policy": "full"}, "kv_budget=96"),
        ({"kv_budget": None}, "kv_budget is missing"),
    ],
)
def test_what_cannot_be_is_refused_by_name(parameters, part):
    assert part in refused(**parameters)


def test_an_unknown_name_is_refused_with_the_nearest_and_all_valid_ones():
    message = refused(kv_bugdet=64)
    assert "'kv_bugdet'" in message and "did you mean kv_budget?" in message
    assert "did you mean kv_budget?" in refused(KV_BUDGET=64)
    assert all(name in message for name in RULES)


def test_parameters_survive_json():
    config = RunConfig(kv_budget=96, policy_options={"ratio": 0.8, "protect_prompt": True}, temperature=1)
    again = RunConfig(**json.loads(json.dumps(config.parameters())))
    assert again == config and type(again.temperature) is float


def test_a_config_does_not_share_its_options():
    options = {"n_sink": 4}
    config = RunConfig(kv_budget=96, policy_options=options)
    options["n_sink"] = 5
    config.parameters()["policy_options"]["n_sink"] = 6
    assert config.policy_options == {"n_sink": 4}


def test_cell_paths():
    assert RunConfig(kv_budget=96).cell_path == "chain-a/dynts/b96/s0"
    assert RunConfig(policy="full", seed=3).cell_path == "chain-a/full/bfull/s3"


def test_datasets_of_different_names_never_share_a_folder():
    names = ["org/set", "org-set", "../org-set", "..", "./x", "x", "_", "a b", "ä"]
    paths = [RunConfig(kv_budget=1, dataset=name).cell_path for name in names]
    assert len(set(paths)) == len(names)
    assert all(path.count("/") == 3 and ".." not in path for path in paths)


def test_a_grid_expands_to_budgets_and_full_cache_per_dataset(tmp_path):
    (tmp_path / "grid.yml").write_text(GRID)
    cells = load_grid(tmp_path / "grid.yml").cells(seed=2)
    assert [cell.cell_path for cell in cells] == [
        f"{dataset}/{rest}/s2"
        for dataset in ("chain-a", "chain-b")
        for rest in ("dynts/b80", "dynts/b104", "full/bfull")
    ]
    assert {cell.n_problems for cell in cells} == {200}
    assert cells[0].policy_options == {"n_recent": 16, "ratio": 0.8} and cells[2].policy_options == {}


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("kv_budgets:", "kv_bugdets:", "did you mean kv_budgets?"),
        ("study: tiny", "", "study"),
        ("study: tiny", "study: ../x", "study"),
        ("[80, 104]", "[80, '104']", "kv_budget='104'"),
        ("[80, 104]", "80", "kv_budgets=80"),
        ("[80, 104]", "[80, 80]", "twice"),
        ("[80, 104]", "[80, ]\nseed: 1", "'seed'"),
        ("full_cache: true", "full_cache: 1", "full_cache"),
        ("n_problems: 200", "n_problems: -1", "n_problems"),
        ("repeats: 5", "repeat: 5", "repeats"),
        ("repeats: 5", "repeats: 0", "timing.repeats"),
        ("study: tiny", "study: [", "YAML"),
        ("policy: dynts", "policy: full", "kv_budget=80"),
        ("study: tiny", "study: tiny\nstudy: other", "the key 'study' is given twice"),
        ("repeats: 5", "repeats: 5, repeats: 6", "the key 'repeats' is given twice"),
    ],
)
def test_a_bad_grid_is_refused_naming_file_and_key(tmp_path, old, new, part):
    path = tmp_path / "grid.yml"
    path.write_text(GRID.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_grid(path)
    assert str(path) in str(error.value) and part in str(error.value)


def test_a_missing_grid_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="check --grid"):
        load_grid(tmp_path / "none.yml")


def test_config_and_record_do_not_import_torch():
    modules = "kvlib.config, kvlib.record, kvlib.study.cell_command, kvlib.study.__main__"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_config_in_python_refuses_an_unknown_name_as_a_file_does():
    with pytest.raises(ConfigError, match="unknown parameter 'max_token'; did you mean max_new_tokens"):
        RunConfig(max_token=10, kv_budget=8)
    config = RunConfig(kv_budget=8)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config


def notebook(code: str, *injected: str) -> dict:
    """globals() of a notebook whose first cell is code, and what papermill injected behind it."""
    names = {"In": ["", code, *injected]}
    for source in names["In"]:
        exec(source, names)
    return names


CELL = "kv_budget: int = 96\nseed: int = 3\nfolder: str = 'x'"


def test_a_notebook_gives_its_config_and_what_papermill_sets_is_checked_as_in_a_grid():
    assert RunConfig.from_notebook(notebook(CELL), "folder") == RunConfig(kv_budget=96, seed=3)
    set_by_hand = notebook(CELL, '# Parameters\nkv_budget = 128\npolicy = "rkv"\n', "n = 5")
    assert RunConfig.from_notebook(set_by_hand, "folder") == RunConfig(kv_budget=128, seed=3, policy="rkv")
    with pytest.raises(ConfigError, match="unknown parameter 'kv_budgt'; did you mean kv_budget"):
        RunConfig.from_notebook(notebook(CELL, "# Parameters\nkv_budgt = 128\n"), "folder")
    with pytest.raises(ConfigError, match="unknown parameter 'kv_budgt'"):
        RunConfig.from_notebook(notebook(CELL.replace("kv_budget", "kv_budgt")), "folder")


def test_a_home_folder_is_written_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = RunConfig(model="~/model", dataset="~/d.jsonl", kv_budget=8, policy_options={"predictor": "~/p"})
    assert (config.model, config.dataset) == ("/home/ada/model", "/home/ada/d.jsonl")
    assert config.policy_options == {"predictor": "/home/ada/p"} and RunConfig(model="a~", kv_budget=8).model == "a~"


def test_a_wrong_value_in_a_notebook_is_one_sentence():
    shell = InteractiveShell()
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        shell.run_cell("from kvlib.config import RunConfig\nRunConfig(max_token=10)")
    assert "unknown parameter 'max_token'" in shown.getvalue() and "Traceback" not in shown.getvalue()
    assert len(shown.getvalue().strip().splitlines()) == 1


COMPARISON = """
study: s
decoding: {n_problems: 2, max_new_tokens: 8}
common: {buffer: 4}
arms: {r: {policy: random}}
stages: {a: {models: [tiny], arms: all, datasets: [chain-a], kv_budgets: [96], protect_prompt: [true], seeds: [0]}}
"""


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("arms: {r: {policy: random}}", "arms: [r]", "arms=.'r'. must be a mapping"),
        ("{policy: random}", "{n_recent: 3}", "arm 'r' must be a mapping with a policy"),
        ("{policy: random}", "random", "arm 'r' must be a mapping with a policy"),
        ("{r: {", "{full: {", "not be called full"),
        ("arms: all", "arms: r", "arms='r' must be a list"),
        ("arms: all", "arms: [[r]]", "names the arm .'r'.; known: r"),
        ("decoding: {n_problems: 2, max_new_tokens: 8}", "decoding:", "decoding=None must be a mapping"),
        ("{n_problems: 2", "{seed: 1", "unknown key of decoding 'seed'"),
        ("{n_problems: 2", "{policy: x", "unknown key of decoding 'policy'"),
        ("common: {buffer: 4}", "common:", "common=None must be a mapping"),
        ("models: [tiny]", "models: tiny", "models='tiny' must be a list"),
        ("datasets: [chain-a]", "datasets: chain-a", "datasets='chain-a' must be a list"),
        ("seeds: [0]", "seeds: 0", "seeds=0 must be a list"),
        ("kv_budgets: [96]", "kv_budgets: 96", "kv_budgets=96 must be a list"),
        ("protect_prompt: [true]", 'protect_prompt: ["no"]', "must list true, false or both"),
    ],
)
def test_a_bad_comparison_is_refused_naming_the_key(tmp_path, old, new, part):
    path = tmp_path / "grid.yml"
    path.write_text(COMPARISON)
    assert len(load_grid(path).cells()) == 2
    assert old in COMPARISON
    path.write_text(COMPARISON.replace(old, new))
    with pytest.raises(ConfigError, match=part):
        load_grid(path)
