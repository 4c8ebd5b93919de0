"""R1-Qwen-7B's true shapes through the whole path: random weights, two rows, a round, a few dozen steps.

    python tests/true_shapes.py FOLDER                    16 GB of disk, 26 GB of memory, 15 of them the mapped weights
    python tests/true_shapes.py FOLDER --device cuda
    python tests/true_shapes.py FOLDER --layers 2 --width 512

Writes a checkpoint of the config in kvlib.cost.SHAPES as sharded bfloat16 safetensors, with the tokenizer of
Qwen2.5-Coder (from the hub's cache, or --tokenizer), a predictor of random weights, two problems of about 2,490 tokens
and a grid with KV budget 2500; then `kvlib.study plan` and `charts` as a person types them. Prints what kvlib.cost
reckons beside what was measured: disk, peak memory, bytes of the cache, and the records. On 16 cores of a Xeon with AMX
the whole took 7 minutes: weights 15.231 GB and cache 0.287 GB, both as reckoned, three rounds, two valid records. On
CUDA it was not run to its end.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from kvlib.bench.shapes import QWEN_CODER
from kvlib.cost import SHAPES, kv_bytes, model_bytes
from kvlib.fitted import save_fitted
from kvlib.models import load_tokenizer, weights_sha256
from kvlib.policies.dynts import ImportanceHead
from kvlib.record import load_records

ROOT = Path(__file__).parents[1]
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
N_PROMPT, KV_BUDGET, N_NEW = 2490, 2500, 36
SENTENCE = "A train leaves at {} and its driver counts {} sheep beside the line before the next stop. "


def write_checkpoint(folder: Path, config: Qwen2Config) -> None:
    """A shard for each layer, one for the rest, and their index; never more than one in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = f"{int(name.split('.')[2]):05}" if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    draw = torch.Generator().manual_seed(0)
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            shape = model.state_dict()[name].shape
            is_norm = name.endswith("norm.weight")
            tensors[name] = torch.ones(shape) if is_norm else torch.randn(shape, generator=draw).mul_(0.02)
            tensors[name] = tensors[name].bfloat16()
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        print(f"wrote {shard}", flush=True)
    index = {name: shard for shard, names in shards.items() for name in names}
    written = {"metadata": {"total_size": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**written, "weight_map": index}))
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    config.save_pretrained(folder)


def write_problems(path: Path, tokenizer) -> None:
    """Two problems whose prompts, chat template included, have N_PROMPT tokens or a few less."""
    rows = []
    for first in (7, 11):
        text, i = "", first
        while len(tokenizer.encode_problem(text + "How many sheep? ")) < N_PROMPT - 30:
            text += SENTENCE.format(i, 3 * i % 97)
            i += 1
        rows.append({"problem": text + "How many sheep? ", "answer": str(i)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def kvlib_study(folder: Path, *command: str) -> float:
    """Run a command of kvlib.study on the grid; its seconds. Ends this process if it failed."""
    started = time.monotonic()
    python = [sys.executable, "-m", "kvlib.study", *command, "--grid", "grid.yml"]
    done = subprocess.run(python, cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    if done.returncode:
        sys.exit(f"kvlib.study {command[0]} failed with {done.returncode}")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--width", type=int, help="a narrower model, of the same heads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokenizer", default=QWEN_CODER, help="a model whose tokenizer to take")
    args = parser.parse_args()
    shape = dict(SHAPES[MODEL])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    if args.width:
        shape |= {"hidden_size": args.width, "intermediate_size": 5 * args.width, "head_dim": 128}
    folder = args.folder.absolute()
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.tokenizer)
    eos = tokenizer.tokenizer.eos_token_id
    config = Qwen2Config(**{**shape, "max_position_embeddings": 131072, "rope_theta": 10000.0, "eos_token_id": eos})
    if not (weights / "model.safetensors.index.json").exists():
        write_checkpoint(weights, config)
        tokenizer.tokenizer.save_pretrained(weights)
    torch.manual_seed(0)
    head = ImportanceHead(shape["hidden_size"]).bfloat16()
    save_fitted("predictor", head, folder / "predictor.safetensors", weights_sha256(str(weights)))
    write_problems(folder / "sheep.jsonl", tokenizer)
    (folder / "grid.yml").write_text(
        f"""study: true-shapes
model: weights
datasets: [sheep.jsonl]
policy: dynts
policy_options: {{n_recent: 4, ratio: 0.4, predictor: predictor.safetensors}}
kv_budgets: [{KV_BUDGET}]
full_cache: true
n_samples: 1
temperature: 0.6
top_p: 0.95
top_k: 20
max_new_tokens: {N_NEW}
batch_size: 2
dtype: bfloat16
device: {args.device}
threads: {os.cpu_count()}
"""
    )
    for notebook in ("30_run.ipynb", "40_charts.ipynb"):
        (folder / notebook).write_bytes((ROOT / "notebooks" / notebook).read_bytes())
    kvlib_study(folder, "plan")
    seconds = kvlib_study(folder, "charts", "--jobs", "1")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    records = load_records(folder / "runs")
    weights_bytes = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    cache = kv_bytes(shape) * 2 * (KV_BUDGET + 1)
    print(f"charts in {seconds:.0f} s")
    print(f"weights on disk {weights_bytes / 1e9:.3f} GB, reckoned {model_bytes(shape) / 1e9:.3f} GB")
    print(f"peak memory of a process {peak / 1e9:.2f} GB, of it weights {weights_bytes / 1e9:.2f} GB")
    print(records.to_string())
    print(f"cache reckoned {cache / 1e9:.3f} GB for two rows of {KV_BUDGET + 1} slots")


if __name__ == "__main__":
    main()
