"""Benchmarks: every way to load one gives the same problems, and what is wrong with data is said in a sentence."""

import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace

import huggingface_hub
import pytest

from kvlib.errors import ConfigError
from kvlib.tasks import datasets
from kvlib.tasks.datasets import (
    BENCHMARKS,
    Problem,
    content_sha256,
    dataset_source,
    dataset_title,
    load_problems,
    row_sha256,
)

ROWS_OF_SUMS = [{"problem": f"What is {i} + {i}, Zoë?", "answer": str(2 * i)} for i in range(30)]
GPQA_HEADER = ["Record ID", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2"]
GPQA_HEADER += ["Incorrect Answer 3", "Explanation"]
SUMS = [Problem(f"sums/{i}", row["problem"], row["answer"], "math") for i, row in enumerate(ROWS_OF_SUMS)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gpqa_csv(path, n):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(GPQA_HEADER)
        for i in range(n):
            table.writerow([f"rec{i}", f"Which is {i},\nexactly?\n", f" {i} ", f"{i + 1}", f"{i + 2}", f"{i + 3}", "x"])
    return str(path)


@pytest.mark.parametrize("question", ["problem", "question", "Prompt"])
@pytest.mark.parametrize("answer", ["answer", "expected_answer", "final_answer"])
def test_common_columns_of_jsonl_give_the_same_problems(tmp_path, question, answer):
    rows = [{"id": 7, question: row["problem"], answer: row["answer"]} for row in ROWS_OF_SUMS]
    assert load_problems(jsonl(tmp_path / "sums.jsonl", rows)) == SUMS


def test_json_csv_and_parquet_give_the_same_problems_as_jsonl(tmp_path):
    (tmp_path / "sums.json").write_text(json.dumps(ROWS_OF_SUMS))
    with (tmp_path / "sums.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["problem", "answer"])
        table.writeheader()
        table.writerows(ROWS_OF_SUMS)
    assert load_problems(str(tmp_path / "sums.json")) == load_problems(str(tmp_path / "sums.csv")) == SUMS
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS_OF_SUMS), tmp_path / "sums.parquet")
    assert load_problems(str(tmp_path / "sums.parquet")) == SUMS


def test_answers_are_text_whatever_the_column_holds(tmp_path):
    rows = [
        {"problem": "a", "answer": 27.0},
        {"problem": "b", "answer": 5},
        {"problem": "c", "answer": 0.5},
        {"problem": "d", "answer": "025"},
        {"problem": "e", "answer": "So \\boxed{\\frac{1}{2}}."},
    ]
    loaded = load_problems(jsonl(tmp_path / "x.jsonl", rows))
    assert [problem.answer for problem in loaded] == ["27", "5", "0.5", "025", "\\frac{1}{2}"]
    boxed = [{"question": "a", "solution": "By \\boxed{3} hence \\boxed{4}."}]
    assert load_problems(jsonl(tmp_path / "y.jsonl", boxed))[0].answer == "4"


@pytest.mark.parametrize(
    "sign", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\n", "\r", "\r\n"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_signs_that_python_takes_for_line_ends_stay_in_their_cell(tmp_path, sign, kind):
    rows = [{"problem": f"Find {sign}rac12 of {n}", "answer": str(n)} for n in (54, 56)]
    path = tmp_path / f"ff.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["problem", "answer"])
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    assert [problem.question for problem in load_problems(str(path))] == [row["problem"] for row in rows]


def test_a_cell_needs_no_quotes_for_a_form_feed(tmp_path):
    (tmp_path / "ff.csv").write_bytes(b"problem,answer\nFind \x0crac12 of 54,27\n")
    assert load_problems(str(tmp_path / "ff.csv"))[0].question == "Find \x0crac12 of 54"


def test_worked_answers_are_read_for_what_they_end_in(tmp_path):
    gsm8k = [
        {"question": "q", "answer": "20 - 5 = 15 <<20-5=15>>15\n#### 72"},
        {"question": "r", "answer": "#### 1,200"},
    ]
    assert [p.answer for p in load_problems(jsonl(tmp_path / "x.jsonl", gsm8k))] == ["72", "1,200"]
    boxes = [{"problem": "a", "solution": r"so $\boxed 2$."}, {"problem": "b", "solution": r"\fbox{2}"}]
    boxes += [{"problem": "c", "solution": r"\boxed{7}", "answer": "8"}, {"problem": "d", "answer": r"\fbox{9}"}]
    assert [p.answer for p in load_problems(jsonl(tmp_path / "y.jsonl", boxes))] == ["2", "2", "8", "9"]


def test_a_benchmark_without_a_seen_revision_is_read_from_a_file_only(tmp_path):
    for name, title in (("math-500", "MATH-500"), ("gsm8k", "GSM8K"), ("aime26", "AIME26"), ("hmmt25", "HMMT25")):
        with pytest.raises(ConfigError, match=f"{name} is read from a file only.*data/{name}.jsonl"):
            load_problems(name)
        assert dataset_title(f"data/{name}.jsonl") == title
    path = jsonl(tmp_path / "AIME26.JSONL", ROWS_OF_SUMS)
    assert load_problems(path)[3].answer == "6" and dataset_title(path) == "AIME26"
    assert dataset_source(path)["rows_as_pinned"] is None
    with pytest.raises(ConfigError, match="has 3 problems and HMMT25 has 30"):
        load_problems(jsonl(tmp_path / "hmmt25.jsonl", ROWS_OF_SUMS[:3]))


def test_letters_alone_are_choices(tmp_path):
    rows = [{"question": f"{i}?\nA) x\nB) y", "answer": letter} for i, letter in enumerate("ABBA")]
    assert {problem.kind for problem in load_problems(jsonl(tmp_path / "x.jsonl", rows))} == {"choice"}
    both = [{**row, "options": ["x", "y"]} for row in rows]
    assert {problem.kind for problem in load_problems(jsonl(tmp_path / "y.jsonl", both))} == {"choice"}


def test_gpqas_own_csv_is_shuffled_by_a_seed_that_the_hash_knows(tmp_path, monkeypatch):
    path = gpqa_csv(tmp_path / "gpqa_diamond.csv", 198)
    problems = load_problems(path)
    for i, problem in enumerate(problems):
        assert problem.kind == "choice" and sorted(problem.choices) == sorted(str(i + k) for k in range(4))
        assert problem.choices["ABCD".index(problem.answer)] == str(i)
        assert problem.question.startswith(f"Which is {i},\nexactly?\n\nA) {problem.choices[0]}\nB) ")
    assert load_problems(path) == problems, "the same every time"
    counts = Counter(problem.answer for problem in problems)
    assert set(counts) == set("ABCD") and max(counts.values()) < 75, "no letter is right more often than chance"
    monkeypatch.setattr(datasets, "CHOICE_SEED", 1)
    assert load_problems(path) != problems
    assert content_sha256(load_problems(path)) != content_sha256(problems)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.jsonl", b"", "has no rows"),
        ("x.jsonl", b'{"problem": "a", "answer": "1"}\n{"problem": \n', "x.jsonl:2 is not valid JSON"),
        ("x.jsonl", b"[1, 2]\n", "one object a line"),
        ("x.json", b'{"problem": "a"}', "a list of objects"),
        ("x.json", b"[" * 10_000, "not valid JSON"),
        ("x.jsonl", b'{"problem": "caf\xe9", "answer": "1"}\n', "not UTF-8"),
        ("x.jsonl", b'{"text": "a", "answer": "1"}\n', "has the columns text, answer; needed are one of problem"),
        ("x.jsonl", b'{"problem": "a", "gold": "1"}\n', "one of answer, expected_answer"),
        ("x.jsonl", b'{"problem": "a", "answer": " "}\n', "row 1 is empty in the column answer"),
        ("x.jsonl", b'{"problem": "a", "answer": null}\n', "row 1 has no text in the column answer but None"),
        ("x.jsonl", b'{"problem": "a", "answer": NaN}\n', "no text in the column answer"),
        ("x.jsonl", b'{"problem": "a", "answer": -Infinity}\n', "no text in the column answer but -inf"),
        ("x.jsonl", b'{"problem": ["a"], "answer": "1"}\n', "no text in the column problem"),
        ("x.jsonl", b'{"problem": "a", "answer": "1"}\n{"problem": "b"}\n', "row 2 has no text in the column answer"),
        ("x.jsonl", b'{"problem": "a", "answer": "1"}\n{"problem": "a ", "answer": "1"}\n', "the same as row 1"),
        ("x.jsonl", b'{"problem": "a", "solution": "it is 3"}\n', "boxes no answer"),
        (
            "x.csv",
            b"question,options,answer\na?,[w; x],B\nb?,[y; z],A\n",
            "the column options is not asked; list the options in question",
        ),
        ("x.csv", b"problem,answer\na,1,2\n", "not as many fields"),
        ("x.csv", b"problem,answer\na\n", "not as many fields"),
        ("x.csv", b"problem,answer,answer\na,1,2\n", "'answer' is given twice"),
        ("x.jsonl", b'{"problem": "a", "answer": "1", "answer": "2"}\n', "x.jsonl:1 .* .'answer' is given twice"),
        ("x.csv", b'problem,answer\n"a,1\n', "not valid CSV"),
        ("aime24.jsonl", b'{"problem": "a", "answer": "1"}\n', "has 1 problems and AIME24 has 30"),
        ("gpqa_diamond.csv", b"question,answer\na,1\n", "GPQA-D has 198"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_problems(str(tmp_path / name))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400 + len(str(tmp_path))


def test_a_broken_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="not valid Parquet"):
        load_problems(str(tmp_path / "x.parquet"))


def test_unknown_names_missing_files_and_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown dataset 'aime2024'; did you mean aime24"):
        load_problems("aime2024")
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.jsonl"):
        load_problems("nowhere.jsonl")
    path = jsonl(tmp_path / "sums.jsonl", ROWS_OF_SUMS)
    with pytest.raises(ConfigError, match="use 1 to 30"):
        load_problems(path, 31)
    assert load_problems(path, 3) == SUMS[:3]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache, offline, that holds AIME25 as pinned: made-up problems under its name, revision and file."""
    spec = BENCHMARKS["aime25"]
    folder = tmp_path / f"datasets--{spec.hub_id.replace('/', '--')}" / "snapshots" / spec.revision
    folder.mkdir(parents=True)
    jsonl(folder / spec.file, ROWS_OF_SUMS)
    sha256 = hashlib.sha256((folder / spec.file).read_bytes()).hexdigest()
    monkeypatch.setitem(BENCHMARKS, "aime25", replace(spec, sha256=sha256))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder / spec.file


def test_a_benchmark_is_read_from_the_hubs_cache_offline(hub):
    spec = BENCHMARKS["aime25"]
    assert [(p.question, p.answer) for p in load_problems("aime25")] == [(p.question, p.answer) for p in SUMS]
    assert dataset_source("aime25")["source"] == f"{spec.hub_id}@{spec.revision}"
    with pytest.raises(ConfigError, match=r"is not whole in the cache .* `hf download"):
        load_problems("aime24")


def test_a_changed_file_in_the_cache_is_refused(hub):
    hub.write_bytes(hub.read_bytes().replace(b"What", b"how "))
    with pytest.raises(ConfigError, match=r"its sha256 differs.*; delete it"):
        load_problems("aime25")


def test_pins_are_whole_and_row_hashes_are_as_many_as_rows():
    pinned = [spec for spec in BENCHMARKS.values() if spec.hub_id]
    for spec in pinned:
        assert len(bytes.fromhex(spec.revision)) == 20 and len(bytes.fromhex(spec.sha256)) == 32
    assert [len(set(spec.rows)) for spec in pinned] == [30, 30, 40, 0]


def test_a_record_says_how_much_of_a_local_copy_is_the_pinned_text(tmp_path, monkeypatch):
    rows = [row_sha256(problem) for problem in SUMS]
    monkeypatch.setitem(BENCHMARKS, "amc23", replace(BENCHMARKS["amc23"], rows=rows))
    rows = [*ROWS_OF_SUMS[:20], *({"problem": f"{i}?", "answer": "1"} for i in range(20))]
    source = dataset_source(jsonl(tmp_path / "amc23.jsonl", rows))
    assert (source["source"], source["rows_as_pinned"], source["choice_seed"]) == ("amc23.jsonl", 20, 0)
    assert dataset_source(jsonl(tmp_path / "mine.jsonl", rows))["rows_as_pinned"] is None
    assert dataset_source("chain-b-tune") == {"source": "kvlib"}


def test_titles_need_no_data():
    names = ["aime24", "aime25", "amc23", "gpqa-diamond", "no/such/AIME24.jsonl", "gpqa_diamond.csv", "mine.csv"]
    assert [dataset_title(name) for name in names] == [
        "AIME24",
        "AIME25",
        "AMC23",
        "GPQA-D",
        "AIME24",
        "GPQA-D",
        "mine",
    ]


def test_the_hash_of_problems_knows_kind_and_choices_but_not_for_chains():
    problem = Problem("x/0", "q", "A", "choice", ("1", "2"))
    hashes = {
        content_sha256([p]) for p in (problem, replace(problem, kind="math"), replace(problem, choices=("2", "1")))
    }
    assert len(hashes) == 3
    chain = json.dumps([{"id": "x/0", "question": "q", "answer": "A"}], sort_keys=True)
    assert content_sha256([Problem("x/0", "q", "A")]) == hashlib.sha256(chain.encode()).hexdigest()
