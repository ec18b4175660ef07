#!/usr/bin/env python
"""Run tiny architectures privately on two ranks under FSDP2, and hold them against plain autograd.

    python benchmarks/coverage_ranks.py benchmarks/coverage_ranks.csv

Two processes on CPUs, one launch. Every model of `ARCHITECTURES` takes three steps in each of
`MODES`: on batches of which the ranks have unequal parts, and of which one rank, then the other,
has none. Norms and clipped sums are compared with those of one sample at a time on one device. One
CSV row for each architecture and mode. Exits with 1 where anything was wrong or crashed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpsgd_track  # noqa: E402
from benchmarks.coverage_judge import (  # noqa: E402
    CRASH,
    EXACT,
    FAILURES,
    NORM_LIMITS,
    OUTCOMES,
    REFUSED,
    SUM_LIMIT,
    WRONG,
    Judged,
    Truth,
    flat,
    is_refusal,
    revision,
    true_batch,
)
from benchmarks.coverage_zoo import ARCHITECTURES, Architecture, Samples  # noqa: E402

NUM_RANKS = 2
NAMES = (
    "bert",
    "roberta",
    "deberta-v3",
    "distilbert",
    "albert",
    "electra",
    "mpnet",
    "modernbert",
    "gpt2",
    "gpt-neox",
    "opt",
    "bloom",
    "falcon",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi",
    "mixtral",
    "qwen2-moe",
    "mamba",
    "mamba2",
    "t5",
    "bart",
    "vit",
    "clip-pairs",
    "convnext",
    "swin",
    "wav2vec2",
    "whisper",
    "lstm",
    "torch-encoder",
)
MODES = ("flash_fsdp_bk", "flash_fsdp", "flash_fsdp_fuse_bk")
PARTS = ((3, 2), (4, 0), (0, 2))
"""Samples of each rank in each step."""
TIMEOUT_S = 120.0
"""After which a rank that waits for the other gives up."""


@dataclass(kw_only=True)
class Row(Judged):
    """Outcome of one architecture in one mode, the worse of both ranks."""

    architecture: str
    mode: str
    dtype: str = ""
    outcome: str = EXACT
    norm_error: float = 0.0
    """Largest relative error of a sample's norm."""
    sum_error: float = 0.0
    """Norm of the clipped sum's error over that of the sum, in the worst step."""
    seconds: float = 0.0
    sentence: str = ""
    torch: str = field(default_factory=lambda: version("torch"))
    transformers: str = field(default_factory=lambda: version("transformers"))
    commit: str = field(default_factory=revision)

    def join(self, other: Row) -> None:
        """Take over what is worse on another rank."""
        self.fail(other.outcome, other.sentence)
        self.norm_error = max(self.norm_error, other.norm_error)
        self.sum_error = max(self.sum_error, other.sum_error)


def main() -> int:
    """Judge; 1 where something was wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--only", action="append", choices=ARCHITECTURES, metavar="NAME")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = tuple(args.only or NAMES)
        torch.multiprocessing.spawn(run_rank, (names, Path(folder), args.csv), nprocs=NUM_RANKS)
    with args.csv.open(encoding="utf-8", newline="") as file:
        outcomes = [row["outcome"] for row in csv.DictReader(file)]
    print(", ".join(f"{outcomes.count(o)} {o}" for o in OUTCOMES if o in outcomes))
    return int(any(outcome in FAILURES for outcome in outcomes))


def run_rank(rank: int, names: tuple[str, ...], folder: Path, out: Path) -> None:
    """Judge on one rank; the first writes the rows."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    file = out.open("w", newline="", encoding="utf-8") if rank == 0 else None
    writer = (
        csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n") if file else None
    )
    if writer:
        writer.writeheader()
    for name in names:
        size = max(sum(parts) for parts in PARTS)
        dtype, samples, truth = find_truth(ARCHITECTURES[name], size)
        for mode in MODES:
            row = Row(architecture=name, mode=mode, dtype=str(dtype).removeprefix("torch."))
            started = time.monotonic()
            # A group of its own: a rank that failed alone leaves the other's unusable.
            with _group(rank, folder / f"{name}-{mode}"):
                judge(row, rank, ARCHITECTURES[name], dtype, samples, truth)
            row.seconds = time.monotonic() - started
            joined = _join(row, rank, folder / f"{name}-{mode}-rows")
            if writer and file:
                writer.writerow(_cells(joined))
                file.flush()
                if joined.outcome in FAILURES:
                    print(f"{joined.outcome}: {name}, {mode}: {joined.sentence}", flush=True)


class _group:
    """Context with a process group over the ranks."""

    def __init__(self, rank: int, path: Path) -> None:
        self.rank, self.path = rank, path

    def __enter__(self) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.path}",
            rank=self.rank,
            world_size=NUM_RANKS,
            timeout=timedelta(seconds=TIMEOUT_S),
        )

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _join(row: Row, rank: int, path: Path) -> Row:
    """The worse of the ranks' rows."""
    with _group(rank, path):
        rows: list[Row | None] = [None] * NUM_RANKS
        dist.all_gather_object(rows, row)
    for other in rows:
        if other is not None:
            row.join(other)
    return row


def find_truth(architecture: Architecture, size: int) -> tuple[torch.dtype, Samples, Truth]:
    """Gradients of each sample on one device, in float64 where the model can."""
    for dtype in NORM_LIMITS:
        model = architecture.make().to(dtype)
        try:
            samples, truth = true_batch(model, size, architecture)
        except RuntimeError:
            # Some have parts that are made for float32.
            continue
        return dtype, samples, truth
    raise RuntimeError("the plain model runs neither in float64 nor in float32")


def judge(
    row: Row,
    rank: int,
    architecture: Architecture,
    dtype: torch.dtype,
    samples: Samples,
    truth: Truth,
) -> None:
    """Take all steps in one mode, and fill in the row."""
    model = architecture.make().to(dtype)
    names = {*dict(model.named_modules()), *dict(model.named_parameters())}
    try:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        C = 0.7 * float(truth.norm_B.median())
        private = dpsgd_track.make_private(
            model,
            optimizer,
            noise_multiplier=0.0,
            max_grad_norm=C,
            expected_batch_size=1,
            mode=row.mode,
            loss=architecture.loss,
        )
        for parts in PARTS:
            firsts = [sum(parts[:r]) for r in range(NUM_RANKS)]
            own = list(range(firsts[rank], firsts[rank] + parts[rank]))
            clipped = truth.take(list(range(sum(parts)))).clipped_sum(C)
            batch = samples.take(own)
            before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            private.backward(batch.inputs, batch.targets)
            optimizer.step()
            optimizer.zero_grad()
            found = _whole(before) - _whole(_trained(model))
            _put_back(model, before)
            assert private.last is not None
            assert private.last.norm_B is not None
            compare(row, private.last.norm_B, truth.take(own), found, clipped, parts)
    except ValueError as error:
        outcome = REFUSED if is_refusal(str(error), names) else CRASH
        row.fail(outcome, f"ValueError: {error}")
    except Exception as error:
        row.fail(CRASH, f"{type(error).__name__}: {error}")


def compare(
    row: Row, norm_B: Tensor, truth: Truth, found: Tensor, clipped: Tensor, parts: tuple[int, ...]
) -> None:
    """Hold one step's norms and clipped sum against the truth."""
    limit = NORM_LIMITS[torch.float32]
    sum_error = float((found - clipped).norm() / clipped.norm())
    errors_B = (norm_B.double() - truth.norm_B).abs() / truth.norm_B
    norm_error = float(errors_B.max()) if len(errors_B) else 0.0
    row.norm_error = max(row.norm_error, norm_error)
    row.sum_error = max(row.sum_error, sum_error)
    # A NaN is above every limit.
    if not norm_error <= limit:
        row.fail(WRONG, f"a norm is {norm_error:.1e} off with {parts} samples")
    if not sum_error <= SUM_LIMIT:
        row.fail(WRONG, f"the clipped sum is {sum_error:.1e} off with {parts} samples")


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _whole(tensors: dict[str, Tensor]) -> Tensor:
    return flat({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()})


@torch.no_grad()
def _put_back(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.copy_(before[name])


def _cells(row: Row) -> dict[str, object]:
    return {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in asdict(row).items()}


if __name__ == "__main__":
    sys.exit(main())
