#!/usr/bin/env python
"""Measure time and memory of a private step against the memory that one pass may keep.

    python benchmarks/memory_budget.py OUT.csv

One model with gradient checkpointing, bfloat16 on a GPU, is trained in turn without privacy and by
`flash_bk` within budgets of 0, 1/8, 1/4, 1/2 and all of what it would keep. Memory is the most that
was allocated during a step, weights and optimizer included: as torch counts it on a GPU, and on a
CPU of all tensors that were alive, in a step that is not timed. A picture is drawn beside the CSV.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Also as a file, from the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.svg import BLUE, GREY, RED, WIDTH, Picture
from dpsgd_track.config import ModelConfig, PrivacyConfig
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import LOSSES
from dpsgd_track.privacy.noise import NoiseSource
from dpsgd_track.training.model import build_model

BASELINE, MODE = "no_dp_single", "flash_bk"
SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)
NUM_WARM_UP = 2
"""Steps of each contestant that are not timed: the first measures the sizes of a budget."""
GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """A model, and the shape of a batch."""

    model: str
    task: str
    batch_size: int
    seq_length: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def build(self) -> nn.Module:
        config = ModelConfig(name=self.model, task=self.task, gradient_checkpointing=True)
        return build_model(config, num_labels=2, seed=0, device=self.device)

    def batch(self, model: Any) -> Batch:
        shape = self.batch_size, self.seq_length
        tokens = torch.randint(1, model.config.vocab_size, shape, device=self.device)
        has_classes = self.task == "sequence-classification"
        classes = torch.randint(2, shape[:1], device=self.device)
        return Batch({"input_ids": tokens}, classes if has_classes else tokens)

    def mode(self, name: str, model: nn.Module, budget: int | None) -> Mode:
        is_private = name != BASELINE
        context = ModeContext(
            privacy=PrivacyConfig(
                noise_multiplier=1.0 if is_private else 0.0,
                max_grad_norm=1.0,
                expected_batch_size=self.batch_size,
            ),
            device=self.device,
            param_dtype=self.dtype,
            make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5),
            loss=LOSSES[self.task],
            memory_budget=budget,
        )
        return build_mode(name, model, context)


@dataclass
class Contestant:
    """A way to take a step with the common model."""

    name: str
    mode: Mode
    share: float | None = None
    """Budget as a fraction of what one pass keeps; None without a budget."""
    budget: int | None = None
    times_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def step(self, batch: Batch) -> None:
        self.mode.accumulate(batch)
        source = NoiseSource("1/benchmark", len(self.times_ms))
        self.mode.privatize(self.mode.clipped_sum(), source)
        self.mode.step()
        self.mode.zero_grad()

    @property
    def num_dropped(self) -> int:
        """Parameters whose gradients took a second backward."""
        capture = getattr(self.mode, "engine").capture  # noqa: B009
        if capture is None:
            return 0
        return len(capture.split.dropped) if capture.keep else len(capture.shapes)


class AliveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, those of a model included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._seen: set[int] = set()
        self.now = self.peak = 0
        for parameter in model.parameters():
            self._note(parameter.untyped_storage())

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if type(each) is Tensor:
                self._note(each.untyped_storage())
        return result


def contestants(workload: Workload, model: nn.Module) -> list[Contestant]:
    """The baseline, and one for each budget."""
    probe = workload.mode(MODE, model, 1 << 60)
    probe.accumulate(workload.batch(model))
    probe.zero_grad()
    everything = probe.engine.capture.budget.most_measured  # type: ignore[attr-defined]
    made = [Contestant(BASELINE, workload.mode(BASELINE, model, None))]
    for share in SHARES:
        budget = int(share * everything)
        made.append(Contestant(MODE, workload.mode(MODE, model, budget), share, budget))
    return made


def measure(workload: Workload, num_rounds: int) -> list[Contestant]:
    """Time all contestants in turn."""
    torch.manual_seed(0)
    model = workload.build()
    entered = contestants(workload, model)
    on_gpu = workload.device.type == "cuda"
    for number in range(NUM_WARM_UP + num_rounds):
        for each in entered:
            batch = workload.batch(model)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            each.step(batch)
            if on_gpu:
                torch.cuda.synchronize()
            if number >= NUM_WARM_UP:
                each.times_ms.append(1000 * (time.perf_counter() - started))
                if on_gpu:
                    each.peak_bytes = max(each.peak_bytes, torch.cuda.max_memory_allocated())
    if not on_gpu:
        for each in entered:
            with AliveBytes(model) as alive:
                each.step(workload.batch(model))
            each.peak_bytes = alive.peak
    return entered


def rows(workload: Workload, measured: Sequence[Contestant]) -> list[dict[str, object]]:
    """A row for each contestant."""
    base = statistics.median(measured[0].times_ms)
    on_gpu = workload.device.type == "cuda"
    found: list[dict[str, object]] = []
    for each in measured:
        p20, *_, p80 = statistics.quantiles(each.times_ms, n=5)
        found.append(
            {
                "model": workload.model,
                "batch_size": workload.batch_size,
                "seq_length": workload.seq_length,
                "dtype": str(workload.dtype).removeprefix("torch."),
                "mode": each.name,
                "share": "" if each.share is None else each.share,
                "budget_gib": "" if each.budget is None else round(each.budget / GIB, 6),
                "num_dropped": each.num_dropped,
                "ms": round(statistics.median(each.times_ms), 2),
                "p20": round(p20, 2),
                "p80": round(p80, 2),
                "ratio": round(statistics.median(each.times_ms) / base, 3),
                "peak_gib": round(each.peak_bytes / GIB, 6),
                "memory_ratio": round(each.peak_bytes / measured[0].peak_bytes, 3),
                "rounds": len(each.times_ms),
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "torch": torch.__version__,
            }
        )
    return found


def draw(found: Sequence[dict[str, Any]]) -> str:
    """Step time and peak memory over ordinary training's, against the budget, as SVG."""
    title = f"Step time and memory against the budget, {found[0]['model']}"
    picture = Picture(title=title, left=40, top=34, width=WIDTH - 60, height=220, bottom=56)
    within = found[1:]
    highest = 1.1 * max(max(row["ratio"], row["memory_ratio"]) for row in within)
    bottom = picture.top + picture.height

    def x_of(share: float) -> float:
        return picture.left + picture.width * share

    def y_of(ratio: float) -> float:
        return bottom - picture.height * ratio / highest

    picture.frame()
    for share, words in zip(SHARES, ("0", "1/8", "1/4", "1/2", "all"), strict=True):
        picture.text(x_of(share), bottom + 18, words, anchor="middle")
    for ratio in range(1, int(highest) + 1):
        picture.text(picture.left - 10, y_of(ratio) + 5, f"{ratio}", anchor="end")
    words = "budget, as a share of what one pass keeps"
    picture.text(picture.left + picture.width / 2, bottom + 40, words, anchor="middle")
    picture.line((x_of(0), y_of(1)), (x_of(1), y_of(1)), color=GREY, dashes="4 4")
    for number, (key, what, color) in enumerate(
        (("ratio", "step time, × no_dp", BLUE), ("memory_ratio", "memory, × no_dp", RED))
    ):
        places = [(x_of(row["share"]), y_of(row[key])) for row in within]
        picture.line(*places, color=color)
        for place in places:
            picture.dot(*place, color)
        picture.text(picture.left + 220 * number, 20, what, color=color)
    return picture.svg()


def main() -> int:
    """Measure, and write the CSV and the picture."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--model", default="llama-3.2-1b" if has_gpu else "llama-tiny")
    parser.add_argument("--task", default="sequence-classification", choices=LOSSES)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=1024 if has_gpu else 256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    workload = Workload(args.model, args.task, args.batch_size, args.seq_length, device)
    found = rows(workload, measure(workload, args.rounds))
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    args.output.with_suffix(".svg").write_text(draw(found), encoding="utf-8")
    for row in found:
        print(*(f"{key}={row[key]}" for key in ("mode", "share", "ratio", "memory_ratio", "ms")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
