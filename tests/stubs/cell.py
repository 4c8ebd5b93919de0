"""A kvlib.cell without a model: a sample is a string and a sleep of STUB_SLEEP seconds."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

from kvlib.errors import ConfigError, GpuMemoryError
from kvlib.record import SampleLog, fingerprint, provenance, publish


def prepare(config):
    if config.dataset == "nowhere":
        raise ConfigError("unknown dataset 'nowhere'; valid: chain-a, chain-b")
    return SimpleNamespace(fingerprints=run_fingerprints(config), step="stub")


def run_fingerprints(config):
    return (fingerprint({"config": config.parameters()}),)


def run(config, folder):
    (mark,) = run_fingerprints(config)
    if config.dataset == "broken":
        raise ValueError("the stub was asked to fail")
    if config.dataset == "killed":
        os.kill(os.getpid(), 9)
    header = {"fingerprint": mark, "config": config.parameters(), "provenance": provenance()}
    with SampleLog(folder, header) as log:
        for problem in range(config.n_problems):
            name = f"{config.dataset}/{problem}/0"
            if name not in log.done:
                time.sleep(float(os.environ.get("STUB_SLEEP", "0")))
                sample = {"id": name, "problem": problem, "sample": 0, "output": f"{os.getpid()}"}
                sample |= {
                    "answer": "1",
                    "correct": True,
                    "n_prompt": 3,
                    "n_tokens": 5,
                    "stop": "eos",
                    "rounds": 1,
                }
                log.append(sample)
                if config.dataset == "hung":
                    time.sleep(3600)
                if config.dataset == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if config.dataset == "full-gpu":
                    with open(Path(folder) / "tries", "a") as file:
                        file.write("x")
                    raise GpuMemoryError("the GPU has no room, not even for half")
        n = len(log.done)
        results = {"n_problems": config.n_problems, "n_correct": n, "n_samples": n, "n_tokens": 5 * n, "n_truncated": 0}
        if config.dataset == "silent":
            return None
        record = {
            "fingerprint": mark,
            "config": config.parameters(),
            "provenance": {"finished": log.header["provenance"]},
            "verdicts": {"correct": dict.fromkeys(log.done, "1")},
            "cost": {},
        }
        return publish(folder, {**record, "results": results})
