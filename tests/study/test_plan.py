"""What a study will take is reckoned from its file alone, by arithmetic that can be followed."""

import math
from pathlib import Path

import pytest
import yaml

from kvlib.config import Grid, load_grid, parse_grid
from kvlib.cost import SHAPES, Step, kv_bytes, minimum_bytes, model_bytes
from kvlib.errors import ConfigError
from kvlib.study.plan import Plan, load_expected, mean_live

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PROFILES = ["tiny", "smollm2", "r1-qwen", "r1-llama"]
STEP = {"gb_per_s": 2000, "efficiency": 0.5, "launch_ms": 10, "live_rows": 0.5}
QWEN = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"


def grid(**changes) -> Grid:
    expected = {"source": "made up", "prompt_tokens": 100, "output_tokens": {}, "step": STEP}
    content = {"study": "s", "datasets": ["d"], "kv_budgets": [400], "policy": "window", "n_problems": 30}
    content |= {
        "model": QWEN,
        "dtype": "bfloat16",
        "n_samples": 2,
        "batch_size": 20,
        "max_new_tokens": 1000,
        "expected": expected,
    }
    return parse_grid({**content, **changes}, Path("g.yml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_a_grid_that_can_be_reckoned(profile):
    study = load_grid(NOTEBOOKS / f"{profile}.yml")
    assert study.study == profile
    plan = Plan(study, 0)
    text = plan.text(1, 0)
    n_problems = study.shared.get("n_problems")
    if not n_problems:
        assert all(row.n_problems and 0 < row.hours < row.most_hours and row.timing_hours > 0 for row in plan.costs())
    assert " ".join(study.expected["source"].split()) in text


@pytest.mark.parametrize(("profile", "ratio"), [("r1-qwen", 0.4), ("r1-llama", 0.3)])
def test_the_r1_profiles_are_the_published_protocol(profile, ratio):
    cells = load_grid(NOTEBOOKS / f"{profile}.yml").cells()
    assert [cell.kv_budget for cell in cells[:6]] == [2500, 3000, 3500, 4000, 4500, 5000] and len(cells) == 24
    for cell in cells:
        assert (cell.n_samples, cell.temperature, cell.top_p, cell.top_k) == (5, 0.6, 0.95, 20)
        assert (cell.max_new_tokens, cell.batch_size, cell.dtype) == (16384, 20, "bfloat16")
        assert (cell.policy_options["n_recent"], cell.policy_options["ratio"]) == (2000, ratio)
        assert cell.n_problems is None and cell.model.split("@")[1].isalnum()
    predictor = Path(cells[0].policy_options["predictor"])
    assert (NOTEBOOKS / predictor).resolve().parent == NOTEBOOKS.parent / "runs" / "predictor" / profile
    assert profile in yaml.safe_load((NOTEBOOKS / "predictors.yml").read_text())


def test_a_step_is_bytes_over_bandwidth_and_a_cell_is_its_steps():
    seconds = Step(**STEP).seconds(SHAPES[QWEN], 2, 20, 1000)
    assert seconds == pytest.approx(0.010 + (14.1405e9 + 57_344 * 20 * 1000) / 1e12, rel=1e-4)
    study = grid(expected={**grid().expected, "output_tokens": {"d": 200}})
    live = mean_live(study.cells()[0], 100, 200)
    assert live == 200.5  # 101 to 300: never full
    (cost,) = Plan(study, 0).costs()
    step = 0.010 + (14.1405e9 + 57_344 * 20 * live) / 1e12
    assert cost.hours == pytest.approx(60 * 200 / (20 * 0.5) * step / 3600, rel=1e-4)
    assert cost.n_samples == 60 and cost.most_hours > 4 * cost.hours


def test_bytes_follow_from_the_shape_as_the_model_cards_say():
    qwen, llama = SHAPES.values()
    assert (kv_bytes(qwen), kv_bytes(llama)) == (57_344, 131_072)  # 28 x 4 and 32 x 8 KV heads of 128, two of 2 bytes
    assert [model_bytes(shape) / 2e9 for shape in (qwen, llama)] == pytest.approx([7.616, 8.030], abs=1e-3)
    assert minimum_bytes(qwen, 3, 5, 4) == 2 * minimum_bytes(qwen, 3, 5)


def test_hours_of_a_model_of_unknown_shape_are_not_known():
    (cost,) = Plan(grid(model="./nowhere", timing={"batch_size": 20, "n_steps": 9, "repeats": 3}), 0).costs()
    assert math.isnan(cost.hours) and math.isnan(cost.timing_hours)
    (cost,) = Plan(grid(model="tiny", dtype="float32"), 0).costs()  # its config.json is here
    assert cost.hours > 0


def test_a_comparison_is_reckoned_as_any_grid():
    plan = Plan(load_grid(NOTEBOOKS / "compare.yml"), 0)
    assert sum(row.n_cells for row in plan.costs()) == 818 and all(row.hours > 0.1 for row in plan.costs())
    text = plan.text(2, 0)
    assert (
        "818 cells" in text and "arms, KV budgets 96, 116, 136, 156, 176, 196," in text and "seeds 0, 1, 2, 3" in text
    )


def test_a_row_never_holds_more_than_its_budget_on_average():
    cell = grid().cells()[0]
    assert 390 < mean_live(cell, 100, 100_000) <= 400
    full = grid(full_cache=True).cells()[-1]
    assert mean_live(full, 100, 1000) == 600


def test_a_file_is_called_as_on_the_charts():
    text = Plan(grid(datasets=["../somewhere/sets/amc23.jsonl", "nowhere"]), 0).text(1, 0)
    assert "\nAMC23 " in text and "sets/" not in text and "\nnowhere " in text and "prompt bare" in text


def test_a_misspelt_file_is_answered_with_near_ones():
    with pytest.raises(ConfigError, match=r"r1-qwne.yml .*; did you mean r1-qwen.yml"):
        load_grid(NOTEBOOKS / "r1-qwne.yml")


def test_what_is_not_known_is_marked_and_not_guessed():
    plan = Plan(grid(n_problems=None), 0)
    text = plan.text(1, 0)
    assert math.isnan(plan.costs()[0].hours) and "?" in text and "come on top" in text
    assert "hours cannot be reckoned" in Plan(grid(expected=None), 0).text(1, 0)


def test_what_is_expected_of_datasets_that_are_not_there_is_ignored():
    expected = {**grid().expected, "output_tokens": {"d": 200, "e": 5}, "problems": {"e": 7}}
    (cost,) = Plan(grid(expected=expected), 0).costs()
    assert cost.output_tokens == 200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": None}, "needs either step, or decode_rate and, with timing, timing_rate"),
        ({"decode_rate": 5, "timing_rate": 5}, "needs either step, or decode_rate"),
        ({"sourec": "x"}, "unknown key in expected in g.yml 'sourec'; did you mean source"),
        ({"prompt_tokens": "ten"}, "prompt_tokens='ten' must be a number"),
        ({"output_tokens": 5}, "output_tokens must map datasets to numbers"),
        ({"step": {"gb_per_s": 1}}, "the key in step of expected in g.yml 'efficiency' is missing"),
    ],
)
def test_a_malformed_expectation_names_the_key(changes, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        load_expected(grid(expected={**grid().expected, **changes}))
