"""A kvlib.study.timing without a model."""

import argparse

from kvlib.record import fingerprint, publish


def timing_fingerprint(grid, dataset, seed):
    return fingerprint({"timing": grid.timing, "dataset": dataset, "seed": seed})


if __name__ == "__main__":
    from kvlib.config import load_grid

    parser = argparse.ArgumentParser()
    for name in ("--grid", "--dataset", "--seed", "--folder"):
        parser.add_argument(name)
    given = parser.parse_args()
    grid = load_grid(given.grid)
    record = {"fingerprint": timing_fingerprint(grid, given.dataset, int(given.seed)), "kind": "timing"}
    speed = {"definition": "steps", "median": 1.0, "low": 1.0, "high": 1.0, "repeats": [1.0]}
    rows = [{"kv_budget": cell.kv_budget, **speed} for cell in grid.cells()]
    timing = {**grid.timing, "definition": "stub", "device": "none"}
    body = {"config": {"dataset": given.dataset}, "timing": timing, "results": {"throughput": rows}}
    publish(given.folder, {**record, **body})
