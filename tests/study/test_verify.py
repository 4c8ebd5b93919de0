"""Verification finds one changed byte, a lost cell, a sample too many, a record in the wrong place, and names each."""

import json
import shutil
from pathlib import Path

import pytest
from test_status import SAMPLE

from kvlib.config import RunConfig, load_grid
from kvlib.record import SampleLog, publish
from kvlib.study.verify import owner, verdict_text, verify, verify_benches, verify_published

ROOT = Path(__file__).parents[2]
CELLS = {config.cell_path: config for config in (RunConfig(kv_budget=budget, n_problems=3) for budget in (8, 16))}


@pytest.fixture
def runs(tmp_path):
    for name, config in CELLS.items():
        with SampleLog(tmp_path / name, {"fingerprint": "m", "config": config.parameters()}) as log:
            for i in range(3):
                log.append({"id": f"p/{i}/0", "problem": f"p/{i}", "sample": 0, **SAMPLE})
        publish(
            tmp_path / name,
            {"kind": "cell", "fingerprint": "m", "config": config.parameters(), "results": {"n_samples": 3}},
        )
    return tmp_path


def folder(runs, number=0):
    return runs / list(CELLS)[number]


def test_a_whole_folder(runs):
    found = verify(runs, CELLS, [], {})
    assert found.whole and (found.n_records, found.n_samples) == (2, 6)
    assert verdict_text(runs, found) == f"{runs}: 2 records and 6 samples are whole"


@pytest.mark.parametrize("name", ["record.json", "samples.jsonl"])
def test_every_single_byte_counts(runs, name):
    path = folder(runs) / name
    content = path.read_bytes()
    for at in range(0, len(content), 37):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found = verify(runs, CELLS, [], {})
        assert len(found.bad) == 1 and str(path) in found.bad[0], at
    path.write_bytes(content)
    assert verify(runs, CELLS, [], {}).whole


def test_a_lost_record_a_lost_sample_and_a_repeated_one(runs):
    path = folder(runs) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert "is not the file that" in verify(runs, CELLS, [], {}).bad[0]
    path.write_bytes(b"".join([*lines, lines[-1]]))
    assert "repeats the sample p/2/0" in verify(runs, CELLS, [], {}).bad[0]
    (folder(runs, 1) / "record.json").unlink()
    found = verify(runs, CELLS, ["chain-a/timing/s0"], {})
    assert found.missing == [list(CELLS)[1], "chain-a/timing/s0"] and "1 bad, 2 missing" in verdict_text(runs, found)


def test_a_copied_cell_and_other_settings(runs):
    shutil.copytree(folder(runs), runs / "chain-a" / "dynts" / "b8" / "s1")
    found = verify(runs, CELLS, [], {})
    assert len(found.bad) == 1 and "b8/s1/record.json is the record of chain-a/dynts/b8/s0" in found.bad[0]
    shutil.rmtree(runs / "chain-a" / "dynts" / "b8" / "s1")
    other = {**CELLS, next(iter(CELLS)): RunConfig(kv_budget=8, n_problems=4)}
    assert "with other settings than the grid asks for" in verify(runs, other, [], {}).bad[0]


def test_a_benchmark_has_every_problem_and_a_verdict_on_every_sample(tmp_path):
    config = RunConfig(dataset="amc23", kv_budget=8, n_samples=2)
    whole = {f"amc23/{i}": "01" for i in range(40)}

    def bad(verdicts: dict, n_samples: int = 80) -> str:
        results = {"n_samples": n_samples}
        body = {
            "fingerprint": "m",
            "config": config.parameters(),
            "results": results,
            "verdicts": {"correct": verdicts},
        }
        publish(tmp_path / config.cell_path, body)
        return "".join(verify(tmp_path, {config.cell_path: config}, [], {"amc23": 40}).bad)

    assert bad(whole) == ""
    assert "states 78 samples and its config asks for 80" in bad(whole, 78)
    assert "verdicts on 40 problems, 1 of them on other than 2 samples" in bad(whole | {"amc23/7": "0"})
    assert "verdicts on 39 problems" in bad({name: own for name, own in whole.items() if name != "amc23/7"})


def test_the_committed_results_are_whole():
    grid = load_grid(ROOT / "notebooks" / "tiny.yml")
    cells = {cell.cell_path: cell for cell in grid.cells()}
    found = verify(ROOT / "results/tiny/records", cells, [f"{name}/timing/s0" for name in grid.datasets], {})
    assert found.whole and found.n_records == 32, found.bad


def test_records_are_told_to_be_whose_they_are_and_another_grid_is_not_asked(tmp_path, runs):
    grid, seeds, whose = owner(ROOT / "results/tiny/records", ROOT / "notebooks")
    assert (grid.study, seeds, whose) == ("tiny", {0}, "of study tiny (tiny.yml)")
    grid, seeds, whose = owner(ROOT / "results/smollm2/records", ROOT / "notebooks")
    assert grid is None and whose.startswith("of full, rkv with smollm2 on ../data/amc23.jsonl, which no grid in")
    assert owner(ROOT / "results/compare", ROOT / "notebooks")[2] == "of study compare (compare.yml)"
    folder(runs).joinpath("record.json").write_text("{")  # a damaged one does not hide the others
    assert owner(runs, tmp_path)[1] == {0}


def test_a_published_comparison_is_whole_or_the_line_is_named(tmp_path):
    grid = load_grid(ROOT / "notebooks" / "compare.yml")
    cells = grid.folders()
    found = verify_published(ROOT / "results" / "compare" / "cells.jsonl", cells)
    assert found.whole and (found.n_records, found.n_samples) == (818, 163_600), found.bad[:3]
    lines = (ROOT / "results" / "compare" / "cells.jsonl").read_text().splitlines(keepends=True)[:3]

    def bad(*changed: str) -> str:
        (tmp_path / "cells.jsonl").write_text("".join(changed))
        return "\n".join(verify_published(tmp_path / "cells.jsonl", cells).bad)

    assert bad(*lines) == ""
    flipped = json.loads(lines[1])
    flipped["correct"][7] ^= 1
    assert "cells.jsonl:2 states counts that its verdicts do not add up to" in bad(lines[0], json.dumps(flipped))
    hotter = json.loads(lines[1])
    hotter["config"]["temperature"] = 0.7
    assert "cells.jsonl:1 was made with other settings" in bad(json.dumps(hotter))
    assert "cells.jsonl:2 repeats" in bad(lines[0], lines[0])
    assert "cells.jsonl:2 is damaged" in bad(lines[0], lines[1][:-9] + "\n")
    assert len(verify_published(tmp_path / "cells.jsonl", cells).missing) == 817


def test_a_bench_is_whole_if_complete_and_behind_its_gate(tmp_path):
    shipped = ROOT / "results" / "bench" / "smollm2.json"
    assert verify_benches([shipped]).whole
    for change in ({"complete": False}, {"gate": {"holds": False}}, {"rounds": 9}):
        (tmp_path / "b.json").write_text(json.dumps({**json.loads(shipped.read_text()), **change}))
        assert "no whole record of a bench" in verify_benches([tmp_path / "b.json"]).bad[0]
