"""Profiles made of arithmetic: runs whose times and memory are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpsgd_track.config import PROFILE, Point
from dpsgd_track.modes.table import BASELINE
from dpsgd_track.record import names
from dpsgd_track.record.timings import Timings
from dpsgd_track.store.reader import MISSING, Group, PointRun
from tests.support.synthetic_group import group_of

PARAMS = {
    "model.name": "llama-tiny",
    "num_ranks": "2",
    "performance.param_dtype": "float32",
    "environment.torch": "2.13.0",
    "environment.cpu": "a CPU",
}


def timings(
    untracked: Sequence[float], tracked: Sequence[float] = (), *, gib: float = 1.0
) -> Timings:
    """Untracked and tracked steps in turn, as they are timed."""
    tracked = tracked or [1.1 * ms for ms in untracked]
    pairs = list(zip(untracked, tracked, strict=True))
    return Timings(
        step_time_ms=tuple(ms for pair in pairs for ms in pair),
        is_tracked=(False, True) * len(pairs),
        num_tokens=(256,) * (2 * len(pairs)),
        peak_memory_gib=gib,
    )


def point(mode: str, order: int, record: Timings | None = None, **more: Any) -> PointRun:
    """A finished run of a profile, at T=64 and B=2 unless said otherwise."""
    shape = more.pop("shape", (64, 2))
    settings = {"status": "FINISHED", "params": PARAMS, "run_id": "0" * 32, **more}
    place = Point(seq_length=shape[0], batch_size=shape[1], order=order)
    return PointRun(mode=mode, regime=PROFILE, point=place, timings=record, **settings)


def out_of_memory(mode: str, order: int, **more: Any) -> PointRun:
    """A run that had too little memory."""
    tags = {names.OUT_OF_MEMORY: "true"}
    reason = "out of memory at rank 1: OutOfMemoryError: tried to allocate 1 TiB"
    return point(mode, order, status="FAILED", tags=tags, reason=reason, **more)


def missing(run: PointRun) -> PointRun:
    """`run` as a group has it that never started it."""
    return replace(
        run, status=MISSING, run_id="", params={}, timings=None, timings_missing="never started"
    )


def profiled(runs: Sequence[PointRun], **more: Any) -> Group:
    """A group that holds nothing but a profile."""
    return group_of([], points=tuple(runs), **more)


RATIOS = {
    "ghost_fsdp": (7.7, 1.5),
    "flash_fsdp": (1.7, 1.29),
    "flash_fsdp_bk": (1.4, 1.2),
    "flash_fsdp_fuse": (1.6, 1.15),
    "flash_fsdp_fuse_bk": (1.15, 1.08),
}
"""Time and memory of each mode over the baseline's."""


def large(
    shapes: Sequence[tuple[int, int]] = ((1024, 2), (4096, 2), (16384, 2)),
    ratios: Mapping[str, tuple[float, float]] = RATIOS,
    lost: Sequence[tuple[str, int]] = (("ghost_fsdp", 16384), ("flash_fsdp", 16384)),
) -> list[PointRun]:
    """Runs as a machine of large GPUs might give them; `lost` ran out of memory."""
    runs: list[PointRun] = []

    def add(mode: str, shape: tuple[int, int], time: float, memory: float) -> None:
        order = len(runs) + 1
        if (mode, shape[0]) in lost:
            runs.append(out_of_memory(mode, order, shape=shape))
            return
        wobble = [1 + 0.01 * ((order * 7 + step * 3) % 5) for step in range(5)]
        base_ms = (60 + 0.05 * shape[0] * shape[1] / 2) * time
        gib = (4 + 0.0035 * shape[0] * shape[1] / 2) * memory
        plan = {
            f"{names.PLAN}model.layers.{i}.{name}": f"{how} (B={shape[1]}, T={shape[0]})"
            for i in range(3)
            for name, how in (("self_attn.q_proj", "gram"), ("mlp.down_proj", "gradient"))
            if mode != BASELINE
        }
        record = timings([base_ms * each for each in wobble], gib=gib)
        runs.append(point(mode, order, record, shape=shape, params={**PARAMS, **plan}))

    for shape in shapes:
        add(BASELINE, shape, 1.0, 1.0)
        for mode, (time, memory) in ratios.items():
            add(mode, shape, time, memory)
            add(BASELINE, shape, 1.0, 1.0)
    return runs
