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
    publish(given.folder, {**record, "config": {"dataset": given.dataset}, "results": {"throughput": 1.0}})
