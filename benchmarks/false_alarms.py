#!/usr/bin/env python
"""Launch and compare groups of correct modes, and count the alarms, which are all false.

    python benchmarks/false_alarms.py OUT.csv --folder /tmp/false-alarms

Ten configurations, each with five seeds of data, weights and noise. One CSV row for each mode that
was judged, with how near it came to a limit. Exits with 1 where any verdict is DRIFT or BUG. Groups
stay in the folder, and one that is there already is compared anew without being launched again.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "no_dp,flash_fsdp,flash_fsdp_fuse_bk"
CONFIGURATIONS = {
    "llama-W2": f"--mode {OURS},ghost_fsdp,ghost_fsdp_bk --model-name llama-tiny",
    "llama-W2-bf16": f"--mode {OURS},flash_fsdp_bk --model-name llama-tiny --param-dtype bfloat16",
    "llama-W1-K3-causal": f"--mode {OURS},ghost_fsdp --model-name llama-tiny --nproc-per-node 1 "
    "--micro-batches 3 --batch-size 3 --seq-length 33 --task causal-lm",
    "llama-W2-bf16-ragged": f"--mode {OURS} --model-name llama-tiny --param-dtype bfloat16 "
    "--task causal-lm --ragged --padding left --batch-size 3",
    "minilm-W2": f"--mode {OURS},ghost_fsdp --model-name minilm",
    "minilm-W2-bf16": f"--mode {OURS} --model-name minilm --param-dtype bfloat16",
    "qwen2-one-device": "--mode no_dp,flash,flash_fuse_bk,grad_materialize,ghost "
    "--model-name qwen2-tiny",
    "llama-W3-poisson-adamw": f"--mode {OURS} --model-name llama-tiny --nproc-per-node 3 "
    "--sampling poisson --dataset-size 40 --optimizer adamw --learning-rate 1e-3",
    "bert-masked-dropout": f"--mode {OURS},flash_fsdp_fuse --model-name bert-tiny --task masked-lm "
    "--dropout --seq-length 32 --micro-batches 3",
    "gpt2-tied-20-steps": f"--mode {OURS} --model-name gpt2-tiny --task causal-lm --num-iter 20 "
    "--learning-rate 1e-3 --sigma 1e-4",
}
FAIL = ("DRIFT", "BUG")
COLUMNS = (
    "configuration",
    "seed",
    "mode",
    "verdict",
    "nearest",
    "value",
    "times_limit",
    "device",
    "torch",
    "commit",
    "sentence",
)


def main() -> int:
    """Measure; 1 where there was an alarm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where stores are kept")
    parser.add_argument("--seeds", type=int, default=5, help="replays of each configuration")
    parser.add_argument("--only", action="append", choices=CONFIGURATIONS, help="configurations")
    parser.add_argument("--commit", default=_revision(), help="what the rows name as the commit")
    args, options = parser.parse_known_args()
    counts: Counter[str] = Counter()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in args.only or CONFIGURATIONS:
            for seed in range(args.seeds):
                for row in _judged(name, seed, args.folder, options):
                    writer.writerow(row | {"commit": args.commit, "torch": version("torch")})
                    counts[row["verdict"]] += 1
                    if row["verdict"] != "PASS":
                        print(row["sentence"], flush=True)
                file.flush()
                print(f"{name}, seed {seed}: {dict(counts)}", flush=True)
    return int(any(counts[verdict] for verdict in FAIL))


def _judged(name: str, seed: int, folder: Path, options: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each mode of one group."""
    group = f"{name}-{seed}"
    launch = ["quick", *CONFIGURATIONS[name].split(), "--random-seed", str(1000 + seed), *options]
    for command in (["launch.py", *launch, "--group", group], ["compare.py", group, "--no-png"]):
        if command[0] == "launch.py" and (folder / "results" / group).exists():
            continue
        done = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if command[0] == "launch.py" and done.returncode:
            raise RuntimeError(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    document = json.loads((folder / "results" / group / "drift.json").read_text(encoding="utf-8"))
    for mode in document["modes"]:
        rungs = [rung for ladder in mode["ladders"] for rung in ladder["stages"]]
        if rungs:
            nearest = max(rungs, key=lambda rung: (rung["value"] or 0.0) / (rung["limit"] or 1.0))
            yield {
                "configuration": name,
                "seed": seed,
                "mode": mode["label"],
                "verdict": mode["verdict"],
                "nearest": nearest["observable"],
                "value": f"{nearest['value']:.3g}",
                "times_limit": f"{(nearest['value'] or 0) / (nearest['limit'] or 1):.3g}",
                "device": _device(options),
                "sentence": mode["sentence"] if mode["verdict"] != "PASS" else "",
            }


def _device(options: list[str]) -> str:
    if "cuda" in options:
        import torch

        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _revision() -> str:
    """The checkout's commit; `unknown` outside of one."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
