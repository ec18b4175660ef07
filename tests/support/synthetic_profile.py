"""Profiles made of arithmetic: runs whose times and memory are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpsgd_track.config import PROFILE, DataConfig
from dpsgd_track.modes.table import BASELINE
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.timings import Timings
from tests.support.synthetic_group import FACTS, failed, group_of, job, setup


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


def timed_run(mode: str, order: int, record: Timings | None = None, **more: Any) -> ModeRun:
    """A finished run of a profile, at T=64 and B=2 unless said otherwise."""
    shape = more.pop("shape", (64, 2))
    regime = setup(PROFILE, order=order, noise_matched=False, optimizer="sgd")
    data = DataConfig(seq_length=shape[0], batch_size=shape[1])
    settings = {
        "status": Status.FINISHED,
        "job": job(mode, regime, data=data, variant=more.get("variant", "")),
        "setup": regime,
        "facts": FACTS,
        "run_id": "0" * 32,
        **more,
    }
    return ModeRun(mode=mode, regime=PROFILE, order=order, timings=record, **settings)


def out_of_memory(mode: str, order: int, **more: Any) -> ModeRun:
    """A run that had too little memory."""
    failure = failed("OutOfMemoryError: tried to allocate 1 TiB", FailureKind.OUT_OF_MEMORY)
    return timed_run(mode, order, status=Status.FAILED, failure=failure, **more)


def missing(run: ModeRun) -> ModeRun:
    """`run` as a group has it that never started it."""
    return replace(
        run,
        status=Status.MISSING,
        run_id="",
        facts=None,
        timings=None,
        timings_missing="never started",
    )


def profiled(runs: Sequence[ModeRun], **more: Any) -> Group:
    """A group that holds nothing but a profile."""
    return group_of([], timed_runs=tuple(runs), **more)


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
) -> list[ModeRun]:
    """Runs as a machine of large GPUs might give them; `lost` ran out of memory."""
    runs: list[ModeRun] = []

    def add(mode: str, shape: tuple[int, int], time: float, memory: float) -> None:
        order = len(runs) + 1
        if (mode, shape[0]) in lost:
            runs.append(out_of_memory(mode, order, shape=shape))
            return
        wobble = [1 + 0.01 * ((order * 7 + step * 3) % 5) for step in range(5)]
        base_ms = (60 + 0.05 * shape[0] * shape[1] / 2) * time
        gib = (4 + 0.0035 * shape[0] * shape[1] / 2) * memory
        plan = {
            f"model.layers.{i}.{name}": f"{how} (B={shape[1]}, T={shape[0]})"
            for i in range(3)
            for name, how in (("self_attn.q_proj", "gram"), ("mlp.down_proj", "gradient"))
            if mode != BASELINE
        }
        record = timings([base_ms * each for each in wobble], gib=gib)
        facts = replace(FACTS, norm_plan=plan)
        runs.append(timed_run(mode, order, record, shape=shape, facts=facts))

    for shape in shapes:
        add(BASELINE, shape, 1.0, 1.0)
        for mode, (time, memory) in ratios.items():
            add(mode, shape, time, memory)
            add(BASELINE, shape, 1.0, 1.0)
    return runs
