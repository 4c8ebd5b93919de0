"""Speed against Hugging Face's own loop, kvpress and the machine's ceilings; correctness first. `make bench`.

All arms but llama.cpp decode the same prompts with the same weights. Each is a run of its own that stays alive and
advances by the same number of steps in every round, in a balanced order, so that a ratio compares runs at the same
place, moments apart. Whatever is measured is printed with its interval, next to what two equal arms differ by.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from transformers.utils.logging import disable_progress_bar

from kvlib.bench.arms import BASELINE, Peers, check_arms, default_arms
from kvlib.bench.measure import bench, check_writable, write_record
from kvlib.bench.shapes import SIZES, Sizes, load_subject
from kvlib.errors import ConfigError
from kvlib.record import RecordError
from kvlib.stats import Ratio

COLUMNS = {
    "KV budget": ("kv_budget", 1, ".0f"),
    "tokens/s": ("steps", 1, ".1f"),
    "forward only": ("forward", 1, ".1f"),
    "goodput": ("goodput", 1, ".1f"),
    "x HF sdpa": (BASELINE, 1, ".2f"),
    "of linears": ("linears", 1, ".2f"),
    "of products": ("products", 1, ".2f"),
    "in rounds": ("round_share", 1, ".1%"),
    "live slots": ("live_slots", 1, ".0f"),
    "KV MB": ("kv_bytes", 1e6, ".1f"),
    "peak MB": ("peak_bytes", 1e6, ".0f"),
    "GB/s": ("bandwidth", 1e9, ".1f"),
    "of copy": ("bandwidth_share", 1, ".0%"),
}
"""Of the table: what an arm's row, or its ratio to another arm, is called; what it is divided by; how it is written."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvlib.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--arms", help="e.g. hf-sdpa,linears,full,full-again,knorm@128,knorm@256,kvpress-knorm")
    for name in ("batch", "n_prompt", "n_new", "kv_budget", "interval"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=420.0, help="wall time for the rounds (default 420)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kvpress", metavar="PYTHON", help="a Python that has kvpress (make bench-kvpress-env)")
    parser.add_argument("--llama-cpp", metavar="PROGRAM", help="llama.cpp's llama-batched-bench, for a model in GGUF")
    parser.add_argument("--out", type=Path, help="write the record to this file, instead of as the last line")
    given = parser.parse_args()
    disable_progress_bar()
    own = {name: value for name in Sizes.__dataclass_fields__ if (value := getattr(given, name, None)) is not None}
    sizes = replace(SIZES[given.model], **own)
    peers = Peers(given.kvpress, given.llama_cpp)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if min(*own.values(), given.rounds, given.threads) < 1:
            raise ConfigError("sizes, --rounds and --threads are whole numbers from 1 on")
        if sizes.n_new % given.rounds:
            raise ConfigError(f"--n-new {sizes.n_new} must be a multiple of --rounds {given.rounds}")
        names = given.arms.split(",") if given.arms else default_arms(given.model, device, peers)
        check_arms(names, given.model, sizes, peers)
        if given.out:
            check_writable(given.out)
        torch.set_num_threads(given.threads)
        record = bench(
            load_subject(given.model, sizes, device),
            sizes,
            names,
            n_rounds=given.rounds,
            seconds=given.seconds,
            peers=peers,
            say=lambda line: print(line, flush=True),
        )
    except (ConfigError, RecordError) as error:
        sys.exit(f"kvlib.bench: {error}")
    report(record)
    if given.out:
        write_record(given.out, record)
        print(f"the record: {given.out}")
    else:
        print(json.dumps(record, allow_nan=False))
    if not record["gate"]["holds"]:
        sys.exit("kvlib.bench: the gate is red, so nothing was timed; see the checks above")


def table(record: dict) -> str:
    """The arms as text for people."""
    rows = []
    for row in record["arms"]:
        known = row | {r["against"]: r["ratio"] for r in record["ratios"] if r["arm"] == row["arm"]}
        cells = {
            column: f"{known[key] / unit:{form}}" if known.get(key) is not None else ""
            for column, (key, unit, form) in COLUMNS.items()
        }
        rows.append({"arm": row["arm"], **cells})
    return pd.DataFrame(rows).to_string(index=False)


def report(record: dict) -> None:
    """The table, and what to read it by."""
    if not record["gate"]["holds"]:
        return
    print(f"\n{record['model']} ({record['weights']}), {record['device']}, {record['threads']} threads, batch "
          f"{record['batch']}, {record['dtype']}, {record['n_prompt']} + {record['n_new']} tokens, a round every "
          f"{record['interval']}; {record['rounds']} rounds of {record['steps_per_round']} steps\n")  # fmt: skip
    print(table(record))
    print("\nlinears: the model's linear layers alone. products: what kvlib's step makes of them, fused and packed.\n"
          "tokens/s: rows x steps / wall time of the steps, everything included. forward only: the model's calls.\n"
          "goodput: tokens up to the end of each output / wall time with prefill. in rounds: time spent evicting.\n"
          "of copy: least bytes / time, as a share of a copy's bandwidth in this call.\n")  # fmt: skip
    for r in record["ratios"]:
        print(f"{r['arm']:>22} / {r['against']:<22} {Ratio.of(r)}")
    if record["noise"]:
        print(f"\nfull and full-again are the same work: their ratio, {Ratio.of(record['noise'])}, is this run's "
              "noise; smaller differences say nothing")  # fmt: skip
        if record["noise"]["too_busy"]:
            print("the machine was too busy for these numbers to mean anything; repeat this on an idle one")
    print(f"peak memory of the process: {record['peak_rss_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
