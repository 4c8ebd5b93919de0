"""Two graders on a table of tricky answers; what an answer holds is never executed, and hanging is cut off."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvlib.cell import INSTRUCTIONS, prompt_of, regraded, results_of, run
from kvlib.config import RunConfig
from kvlib.errors import ConfigError
from kvlib.tasks import grade as grading
from kvlib.tasks.answers import LONGEST, last_boxed, published_answer, solution_answer, strict_answer
from kvlib.tasks.datasets import Problem
from kvlib.tasks.equality import Comparer
from kvlib.tasks.grade import grade, verdicts
from kvlib.tasks.judge import as_published, guard, strictly

TABLE = [json.loads(line) for line in (Path(__file__).parents[1] / "answers.jsonl").read_text().splitlines()]


def problem_of(gold: str) -> Problem:
    if gold in "ABCDE":
        return Problem("table/0", "?", gold, "choice", ("w", "x", "y", "z"))
    return Problem("table/0", "?", gold, "math")


@pytest.fixture(scope="module")
def comparer():
    with pytest.MonkeyPatch.context() as patch:
        comparer = Comparer(cpu_seconds=1)
        patch.setattr(grading, "comparer", lambda: comparer)
        yield comparer
        comparer.close()


def test_every_answer_of_the_table_is_extracted_and_graded_as_it_says(comparer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong, undecided = [], []
    for row in TABLE:
        found = verdicts(problem_of(row["gold"]), row["output"], row.get("truncated", False))
        asked = (row["published_answer"], row["published"], row["strict_answer"], row["strict"])
        if asked != (found["answer"], found["correct"], found["strict_answer"], found["strict_correct"]):
            wrong.append((row["note"], row["output"], asked, found))
        if found["undecided"]:
            undecided.append(row["note"])
    assert not wrong
    assert undecided == ["tower of powers"], "what hangs is cut off, and the rows after it are still graded"
    assert list(tmp_path.iterdir()) == [], "an answer wrote a file"


def test_the_table_is_large_and_asks_nothing_twice():
    asked = {(row["gold"], row["output"], row.get("truncated", False)) for row in TABLE}
    assert len(asked) == len(TABLE) >= 150
    assert {row["strict"] for row in TABLE} == {row["published"] for row in TABLE} == {True, False}


def test_neither_way_to_compare_executes_an_answer_even_without_the_guard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("7")
    for answer in (
        "__import__('os').system('touch canary')",
        "__import__('os').system('touch${IFS}canary')",
        "open('canary','w')",
        "open('secret').read()",
        "\\input{secret}",
        "\\text{__import__('pathlib').Path('canary').touch()}",
        "eval(\"open('canary','w')\")",
        "7 if open('canary','w') else 7",
        "[open('canary','w'), 7][1]",
    ):
        assert not strictly("7", answer) and not as_published("7", answer)
        assert not as_published(answer, "7") and not as_published("x", answer)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_one_process_serves_all_answers_from_any_thread(comparer):
    comparer.strictly("7", "3+4")
    process, replies = comparer.process, []
    threads = [
        threading.Thread(target=lambda i=i: replies.append(comparer.strictly(str(i), f"{i}+0"))) for i in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [True] * 4 and comparer.process is process


def test_a_process_that_was_killed_or_interrupted_does_not_answer_the_next_question(comparer, monkeypatch):
    comparer.strictly("7", "3+4")
    comparer.process.kill()
    comparer.process.wait()
    assert comparer.strictly("7", "3+4") is True

    class Interrupted:
        def __init__(self, pipe):
            self.pipe = pipe

        def readline(self):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.pipe, name)

    comparer.process.stdout = Interrupted(comparer.process.stdout)
    with pytest.raises(KeyboardInterrupt):
        comparer.strictly("7", "3+4")
    assert comparer.process is None
    assert comparer.strictly("7", "3+5") is False


def test_it_works_in_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from kvlib.tasks.equality import Comparer\nprint(Comparer().strictly('1/2', '\\\\frac{2}{4}'))\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_math_verify_that_does_not_start_is_an_error_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ConfigError, match=r"math-verify does not start.*pip install"):
        Comparer().strictly("7", "3+4")


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("open", ("/etc/passwd", "r", 0)),
        ("open", ("canary", "w", 0)),
        ("open", ("module.py", "w", 0)),
        ("os.system", (b"touch canary",)),
        ("os.remove", ("x", -1)),
        ("subprocess.Popen", ("sh", [], None, None)),
        ("socket.connect", (None, ("h", 1))),
        ("shutil.rmtree", ("/",)),
    ],
)
def test_the_process_refuses_files_programs_and_connections(event, arguments):
    with pytest.raises(PermissionError):
        guard(event, arguments)


def test_the_process_may_import():
    guard("open", ("/usr/lib/python3/sympy/core.py", "r", 0))
    guard("open", ("core.cpython-311.pyc", "rb", 0))
    guard("import", ("sympy", None, None, None, None))
    guard("os.listdir", ("/usr/lib",))


@pytest.mark.parametrize(
    "answer",
    [
        "7" * 100_000,
        "(" * 50_000 + "7" + ")" * 50_000,
        "\\boxed{" * 15_000,
        "{" * 100_000,
        "\\frac{" * 20_000,
        "\\begin{array}{" * 8_000,
        "\n" * 100_000 + "7",
        "<|" * 50_000,
        "\\text{" * 20_000,
        "answer is " * 10_000,
        "A " * 50_000,
        "9^" * 30_000 + "9",
        "-" * 100_000,
        ".1" * 50_000,
    ],
    ids=lambda answer: answer[:12].strip() or "newlines",
)
def test_answers_of_100000_characters_are_bounded_and_harmless(comparer, answer):
    for output in (answer, f"</think> \\boxed{{{answer}}}", f"</think> The answer is {answer}"):
        for gold in ("204", "C"):
            found = verdicts(problem_of(gold), output)
            assert len(found["answer"] or "") <= LONGEST and len(found["strict_answer"] or "") <= LONGEST
            assert not found["strict_correct"] and not (gold == "204" and found["correct"])


def test_boxes():
    assert last_boxed("\\boxed{a\\}b}") == "a\\}b"
    assert last_boxed("\\boxed{\\{1\\}}") == "\\{1\\}"
    assert last_boxed("\\boxed{1} } } \\boxed{2}") == "2"
    assert last_boxed("\\boxed{\\frac{1}{2}} \\boxed{3") == "\\frac{1}{2}"
    assert last_boxed("no box {here}") is None and last_boxed("\\boxed{5} so \\boxed{} \\boxed{ }") == "5"
    assert strict_answer("\\boxed{3}") is None and published_answer("\\boxed{3}", False) == "3"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{1} then \boxed{\frac{a}{b}} end", r"\frac{a}{b}"),
        (r"so $\boxed 2$.", "2"),
        (r"so $\boxed -3.5$.", "-3.5"),
        (r"\boxed\frac{1}{2}.", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\boxed 3}", "3"),
        ("20 - 5 = 15 <<20-5=15>>\n#### 1,072", "1,072"),
        (r"#### 7 \boxed{8}", "8"),
        (r"\boxed{open", None),
        (r"a \boxes{1} and \boxedup{2}", None),
        (r"\boxed{}", None),
        ("none", None),
    ],
)
def test_a_solution_states_its_answer_in_a_box_or_after_four_hashes(solution, answer):
    assert solution_answer(solution) == answer


def test_a_model_that_does_not_think_is_searched_as_a_whole_by_the_strict_rules_too(comparer):
    box, kept = "So \\boxed{12}, done.", {"strict_answer": "12", "strict_correct": True}
    whole = verdicts(problem_of("12"), box, thinks=False)
    assert whole["strict_rule"] == "whole output" and kept.items() <= whole.items()
    after = verdicts(problem_of("12"), box)
    assert "strict_rule" not in after and not after["strict_correct"], "thinking never ended"
    assert not verdicts(problem_of("12"), "So 12.", thinks=False)["strict_correct"], "only a box counts"
    assert not verdicts(problem_of("12"), box, truncated=True, thinks=False)["strict_correct"]
    assert verdicts(problem_of("C"), "\\boxed{C}", thinks=False)["strict_correct"]


def test_grade_is_the_published_verdict_of_a_benchmark(comparer):
    assert grade(problem_of("12"), "I guess 12") == ("12", True)
    assert verdicts(problem_of("12"), "I guess 12")["strict_correct"] is False


class Model:
    """Encodes to what it was asked."""

    def encode(self, text):
        return ("plain", text)

    def encode_problem(self, text, instruction=""):
        return ("chat", text, instruction)


def test_the_prompt_is_the_configs_and_a_chain_has_only_one():
    chain, math, choice = Problem("a/0", "q ?", "1"), problem_of("7"), problem_of("C")
    assert [prompt_of(it, "bare", Model()) for it in (chain, math)] == [("plain", "q ?"), ("chat", "?", "")]
    prompts = [prompt_of(it, "boxed", Model()) for it in (math, choice)]
    assert prompts == [("chat", "?", INSTRUCTIONS["math"]), ("chat", "?", INSTRUCTIONS["choice"])]
    assert all("\\boxed{}" in instruction for instruction in INSTRUCTIONS.values())
    with pytest.raises(ConfigError, match="is a chain, which has no box"):
        prompt_of(chain, "boxed", Model())


def test_a_bare_prompt_leaves_parameters_as_they_were_before_there_was_one():
    assert "prompt" not in RunConfig(kv_budget=96).parameters()
    boxed = RunConfig(kv_budget=96, prompt="boxed")
    assert boxed.parameters()["prompt"] == "boxed" and RunConfig(**boxed.parameters()) == boxed
    with pytest.raises(ConfigError, match=r"prompt='box'.*one of bare, boxed"):
        RunConfig(kv_budget=96, prompt="box")


def test_a_cell_of_a_benchmark_is_graded_twice_and_says_where_its_problems_are_from(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": f"so p {i} ; p ?", "answer": i}) + "\n" for i in range(3)))
    config = RunConfig(
        dataset=str(data),
        kv_budget=96,
        policy="streaming",
        n_samples=2,
        max_new_tokens=12,
        batch_size=6,
        temperature=1.0,
    )
    record = run(config, tmp_path / "cell")
    results = record["results"]
    lines = [json.loads(line) for line in (tmp_path / "cell" / "samples.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == results["n_samples"] == 6
    assert {"answer", "correct", "strict_answer", "strict_correct", "undecided"} <= set(lines[0])
    assert results == results_of(lines) | {"n_rounds": results["n_rounds"]}
    assert results["strict_n_correct"] == sum(line["strict_correct"] for line in lines) <= results["n_correct"]
    assert results["strict_n_unanswered"] == 6 and results["strict_pass_at_1"] == 0.0
    assert results["n_undecided"] == 0
    assert record["dataset"]["source"] == "mine.jsonl"
    assert results["strict_rule"] == "after </think>", "the tiny reasoner thinks"
    for verdict, marks in record["agreement"].items():
        assert {name: len(found) for name, found in marks.items()} == {f"mine/{i}": 2 for i in range(3)}
        answers = "answer" if verdict == "correct" else "strict_answer"
        assert all((found[0] == "-") == (lines_of(lines, name)[0][answers] is None) for name, found in marks.items())


def lines_of(lines, problem):
    return sorted((line for line in lines if line["problem"] == problem), key=lambda line: line["sample"])


class Silent:
    """A tokenizer that has no </think>."""

    answer_id = None


def test_half_done_samples_of_an_older_kvlib_are_graded_by_the_rule_that_the_record_names(comparer):
    problem = problem_of("12")
    old = {"problem": problem.id, "output": "\\boxed{12}", "stop": "eos", **verdicts(problem, "\\boxed{12}")}
    assert not old["strict_correct"]
    new = regraded(old, {problem.id: problem}, Silent())
    assert new["strict_correct"] and new["strict_rule"] == "whole output"
    assert regraded(new, {}, Silent()) is new, "once is enough"
    assert regraded({"correct": True}, {}, Silent()) == {"correct": True}, "a chain has one checker"
