#!/usr/bin/env python
"""Launch and compare groups of correct modes, and count the alarms, which are all false.

    python benchmarks/false_alarms.py OUT.csv --folder /tmp/false-alarms --jobs 2

Twenty-two configurations, each with five seeds of data, weights and noise. One CSV row for each
mode that was judged, with how near it came to a limit. Exits with 1 where any verdict is DRIFT or
BUG, or a launch fails. A mode that clips by another rule than the baseline differs from it: it is
an alarm where the sentence does not say so. Groups stay in the folder, and one that is there
already is compared anew without being launched again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "no_dp,flash_fsdp,flash_fsdp_fuse_bk"
OWN_NOISE, PER_LAYER = "faults:HealthyOwnNoise", "rules:PerLayer"
WRITTEN = ",".join(
    f"faults:Healthy{name}"
    for name in ("Reversed", "Batched", "Formula", "LateReduce", "ScaledBackward")
)
"""Users' modes, in `unseen/`."""
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
    "own-noise-W2": f"--mode {OURS},{OWN_NOISE} --model-name llama-tiny",
    "own-noise-W2-bf16": f"--mode {OURS},{OWN_NOISE} --model-name llama-tiny "
    "--param-dtype bfloat16",
    "own-noise-W3-bert": f"--mode {OURS},{OWN_NOISE} --model-name bert-tiny --nproc-per-node 3",
    "per-layer-W2": f"--mode {OURS},{PER_LAYER} --model-name llama-tiny",
    "per-layer-W1-bert": f"--mode {OURS},{PER_LAYER} --model-name bert-tiny --nproc-per-node 1",
    "small-C-W2": f"--mode {OURS},ghost_fsdp --model-name llama-tiny --max-grad-norm 1",
    "tiny-C-W1": f"--mode {OURS},{WRITTEN} --model-name llama-tiny --max-grad-norm 1e-3 "
    "--nproc-per-node 1 --micro-batches 2",
    "small-C-W2-bf16": f"--mode {OURS} --model-name qwen2-tiny --param-dtype bfloat16 "
    "--max-grad-norm 0.5",
    "users-W2": f"--mode {OURS},{WRITTEN} --model-name llama-tiny",
    "users-W3-ragged": f"--mode {OURS},{WRITTEN} --model-name bert-tiny --nproc-per-node 3 "
    "--ragged --task masked-lm --batch-size 3",
    "no-noise-W3": f"--mode {OURS},flash_fsdp_bk --model-name llama-tiny --nproc-per-node 3 "
    "--sigma 0",
    "gpt2-W1-bf16": f"--mode {OURS} --model-name gpt2-tiny --nproc-per-node 1 "
    "--param-dtype bfloat16",
}
OTHER_RULE = {PER_LAYER: "each layer is clipped by itself"}
"""Modes that are right and yet are no DP-SGD with flat clipping; words that say so."""
NOT_RUN, TOLD = "NOT RUN", "TOLD"
FAIL = ("DRIFT", "BUG", NOT_RUN)
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
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first replay")
    parser.add_argument("--jobs", type=int, default=1, help="launches at a time")
    parser.add_argument("--only", action="append", choices=CONFIGURATIONS, help="configurations")
    parser.add_argument(
        "--without", action="append", default=[], choices=CONFIGURATIONS, help="left out"
    )
    parser.add_argument("--commit", default=_revision(), help="what the rows name as the commit")
    args, options = parser.parse_known_args()
    counts: Counter[str] = Counter()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        names = args.only or [name for name in CONFIGURATIONS if name not in args.without]
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        groups = [(name, seed) for seed, name in product(seeds, names)]
        with ThreadPoolExecutor(args.jobs) as pool:
            every = pool.map(partial(_judged, folder=args.folder, options=options), groups)
            for (name, seed), rows in zip(groups, every, strict=True):
                for row in rows:
                    writer.writerow(row | {"commit": args.commit, "torch": version("torch")})
                    counts[row["verdict"]] += 1
                    if row["verdict"] != "PASS":
                        print(row["sentence"], flush=True)
                file.flush()
                print(f"{name}, seed {seed}: {dict(counts)}", flush=True)
    return int(any(counts[verdict] for verdict in FAIL))


def _judged(which: tuple[str, int], folder: Path, options: list[str]) -> list[dict[str, Any]]:
    """Launch and compare the group of a configuration and a seed; one row for each mode."""
    name, seed = which
    group = f"{name}-{seed}"
    place = folder / group
    place.mkdir(exist_ok=True)
    launch = ["quick", *CONFIGURATIONS[name].split(), "--random-seed", str(1000 + seed), *options]
    path = os.pathsep.join([str(ROOT / "benchmarks" / "unseen"), os.environ.get("PYTHONPATH", "")])
    for command in (["launch.py", *launch, "--group", group], ["compare.py", group, "--no-png"]):
        if command[0] == "launch.py" and (place / "results" / group).exists():
            continue
        done = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            cwd=place,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if command[0] == "launch.py" and done.returncode:
            said = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            return [{"configuration": name, "seed": seed, "verdict": NOT_RUN, "sentence": said}]
    document = json.loads((place / "results" / group / "drift.json").read_text(encoding="utf-8"))
    return [_row(name, seed, mode, _device(options)) for mode in document["modes"] if _counts(mode)]


def _counts(mode: dict[str, Any]) -> bool:
    # The reference and silent replays are compared with nothing.
    return bool(mode["ladders"]) or mode["verdict"] != "PASS"


def _row(name: str, seed: int, mode: dict[str, Any], device: str) -> dict[str, Any]:
    rungs = [rung for ladder in mode["ladders"] for rung in ladder["stages"]]
    times = [_share(rung) for rung in rungs]
    at = times.index(max(times)) if times else None
    rule = OTHER_RULE.get(mode["label"])
    is_told = rule is not None and mode["verdict"] == "BUG" and rule in mode["sentence"]
    return {
        "configuration": name,
        "seed": seed,
        "mode": mode["label"],
        "verdict": TOLD if is_told else mode["verdict"],
        "nearest": rungs[at]["observable"] if at is not None else "",
        "value": f"{rungs[at]['value'] or 0.0:.3g}" if at is not None else "",
        "times_limit": f"{times[at]:.3g}" if at is not None else "",
        "device": device,
        "sentence": mode["sentence"] if mode["verdict"] != "PASS" else "",
    }


def _share(rung: dict[str, Any]) -> float:
    """The largest value of a rung over its limit, which is text where it is not finite."""
    share = float(rung["value"] or 0.0) / float(rung["limit"] or 1.0)
    return 0.0 if math.isnan(share) else share


def _device(options: list[str]) -> str:
    import torch

    # A launch takes a GPU where there is one.
    if "cpu" not in options and torch.cuda.is_available():
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
