"""The figures of a profile as self-contained rows: measurement, subject and circumstances."""

from __future__ import annotations

from dataclasses import dataclass

from dpsgd_track.comparison.profile import Cost, CostStatus, Profile, Spread
from dpsgd_track.record.run import ModeRun


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One figure, with everything needed to interpret it."""

    mode: str
    variant: str
    status: CostStatus
    model: str
    task: str
    seq_length: int
    batch_size: int
    micro_batches: str
    world_size: int | None
    quantity: str
    unit: str
    median: float | None
    p20: float | None
    p80: float | None
    num_steps: int | None
    baseline: str
    """Label of the ratio's denominator; empty for a baseline itself."""
    baseline_median: float | None
    ratio: float | None
    device: str
    param_dtype: str
    optimizer: str
    torch: str
    cuda: str
    triton: str
    transformers: str
    opacus: str
    dpsgd_track: str
    git_revision: str
    git_dirty: str
    date: str
    """Start of the group, UTC."""


_Figure = tuple[str, str, Spread | None, float | None, float | None]
"""Quantity, unit, value, baseline's value, and ratio."""


def profile_rows(profile: Profile, date: str) -> tuple[ProfileRow, ...]:
    """A row per figure; a run that was not measured gets one row, with its status and no value."""
    found = []
    for cost in profile.costs:
        for quantity, unit, value, base, ratio in _figures(cost):
            found.append(
                ProfileRow(
                    mode=cost.mode,
                    variant=cost.variant,
                    status=cost.status,
                    seq_length=cost.seq_length,
                    batch_size=cost.batch_size,
                    world_size=cost.num_ranks,
                    quantity=quantity,
                    unit=unit,
                    median=value.median if value else None,
                    p20=value.p20 if value else None,
                    p80=value.p80 if value else None,
                    num_steps=value.num_steps if value else None,
                    baseline=cost.baseline.label if cost.baseline and ratio is not None else "",
                    baseline_median=base,
                    ratio=ratio,
                    date=date,
                    **_circumstances(cost.run),
                )
            )
    return tuple(found)


def _figures(cost: Cost) -> list[_Figure]:
    time, memory = cost.step_time_ms, cost.peak_memory_gib
    if cost.status is not CostStatus.MEASURED or time is None or memory is None:
        return [("step_time", "ms", None, None, None)]
    base, ratio = cost.baseline, cost.time_ratio
    num_steps = time.num_steps + (cost.tracked_time_ms.num_steps if cost.tracked_time_ms else 0)
    peak = Spread(median=memory, p20=memory, p80=memory, num_steps=num_steps)
    figures: list[_Figure] = [
        (
            "step_time",
            "ms",
            time,
            base.step_time_ms if base else None,
            ratio.median if ratio else None,
        ),
        ("step_time_tracked", "ms", cost.tracked_time_ms, None, None),
        ("tokens_per_second", "tokens/s", cost.tokens_per_second, None, None),
        (
            "peak_memory",
            "GiB",
            peak,
            base.peak_memory_gib if base else None,
            cost.memory_ratio,
        ),
    ]
    if (overhead := cost.tracking_overhead) is not None:
        alone = Spread(median=overhead, p20=overhead, p80=overhead, num_steps=num_steps)
        figures.append(("tracking_overhead", "1", alone, None, None))
    return figures


def _circumstances(run: ModeRun) -> dict[str, str]:
    """Settings, software and hardware of a run."""
    job, setup, facts = run.job, run.setup, run.facts
    planned = {
        "model": job.model.name if job else "",
        "task": job.model.task if job else "",
        "micro_batches": str(setup.micro_batches) if setup else "",
        "param_dtype": job.performance.param_dtype if job else "",
        "optimizer": setup.optimizer if setup else "",
    }
    if facts is None:
        return planned | dict.fromkeys(("device", "cuda", *_VERSIONS), "")
    environment = dict(facts.environment.items())
    return {
        **planned,
        "device": facts.device.name or facts.environment.cpu,
        "cuda": facts.device.cuda,
        **{name: environment[name] for name in _VERSIONS},
    }


_VERSIONS = (
    "torch",
    "triton",
    "transformers",
    "opacus",
    "dpsgd_track",
    "git_revision",
    "git_dirty",
)
