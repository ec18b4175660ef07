"""A profile as a table and as CSV, and the norm plans of its modes."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from datetime import UTC, datetime

from dpsgd_track.comparison.profile import RESTLESS, Cost, Profile, Spread
from dpsgd_track.comparison.profile_rows import ProfileRow, profile_rows
from dpsgd_track.record.run import Group
from dpsgd_track.report.table import ABSENT

HEADINGS = (
    "mode",
    "T",
    "B",
    "step ms [p20–p80]",
    "× time",
    "tokens/s",
    "peak GiB",
    "× memory",
    "tracking",
    "notes",
)
NUMBERS = tuple(range(1, len(HEADINGS) - 1))
"""Numeric columns."""
LEGEND = (
    "Step time: median of the steps that were not tracked, of the slowest rank, with the 20th and "
    "80th percentile. × time, × memory: over ordinary training on as many devices, run right "
    "before and right after. Tracking: what observing loss and layer norms adds to a step. Peak "
    "memory: CUDA allocations of the recorded steps, or the process's resident set on CPU; the "
    "largest rank's."
)


def cells(cost: Cost) -> tuple[str, ...]:
    """One row, in the order of HEADINGS."""
    time, ratio, speed = cost.step_time_ms, cost.time_ratio, cost.tokens_per_second
    memory, overhead = cost.memory_ratio, cost.tracking_overhead
    is_one = cost.is_baseline and time is not None
    return (
        cost.label,
        str(cost.seq_length),
        str(cost.batch_size),
        ABSENT if time is None else _with_spread(time),
        "1" if is_one else ABSENT if ratio is None else times(ratio),
        ABSENT if speed is None else f"{speed.median:,.0f}",
        ABSENT if cost.peak_memory_gib is None else three_digits(cost.peak_memory_gib),
        "1" if is_one else ABSENT if memory is None else f"{memory:.2f}",
        ABSENT if overhead is None else f"{100 * overhead:+.1f} %",
        "; ".join(cost.notes),
    )


def times(ratio: Spread) -> str:
    """A ratio with its spread: `2.31 [2.20–2.40]`."""
    return f"{ratio.median:.2f} [{ratio.p20:.2f}–{ratio.p80:.2f}]"


def _with_spread(value: Spread) -> str:
    return f"{three_digits(value.median)} [{three_digits(value.p20)}–{three_digits(value.p80)}]"


def three_digits(value: float) -> str:
    """`value` with at least three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def rows(profile: Profile) -> list[tuple[str, ...]]:
    """The table, without its headings."""
    return [cells(cost) for cost in profile.costs]


def best(profile: Profile) -> list[str]:
    """The mode that costs least relative to its baseline, at each shape.

    None is named where the baseline moved between its runs.
    """
    sentences = []
    for shape in profile.shapes:
        costs = [cost for cost in profile.costs if cost.shape == shape]
        for label in dict.fromkeys(cost.baseline.label for cost in costs if cost.baseline):
            candidates = [
                c for c in costs if c.time_ratio and c.baseline and c.baseline.label == label
            ]
            moved = max((abs(c.baseline.moved or 0) for c in candidates if c.baseline), default=0)
            if moved >= RESTLESS:
                sentences.append(
                    f"T={shape[0]}, B={shape[1]}: no mode is ranked, as the time of {label} itself "
                    f"moved by up to {100 * moved:.0f} %."
                )
                continue
            cheapest = min(candidates, key=lambda c: c.time_ratio.median if c.time_ratio else 0.0)
            assert cheapest.time_ratio is not None
            sentences.append(
                f"T={shape[0]}, B={shape[1]}: {cheapest.label} adds least, with "
                f"{times(cheapest.time_ratio)} × the step time and {cheapest.memory_ratio:.2f} × "
                f"the memory of {label}."
            )
    return sentences


def facts(profile: Profile, group: Group) -> list[str]:
    """Model, type, ranks and device of the figures, in a few words each."""
    job, ranks = group.plan.jobs[0], group.plan.num_ranks
    devices = [run.facts.device.name for run in group.timed_runs if run.facts]
    words = [
        job.model.name,
        job.performance.param_dtype,
        f"{ranks} rank{'s' * (ranks != 1)}",
        next(filter(None, devices), "") or group.plan.environment.cpu,
    ]
    timings = [run.timings for run in group.timed_runs if run.timings]
    if timings:
        steps = max(len(t.step_time_ms) for t in timings)
        words.append(f"{steps} recorded steps a run, every second one tracked")
    return [fact for fact in words if fact]


PLAN_HEADINGS = ("mode", "layers", "how", "at")


def plans(profile: Profile) -> list[tuple[str, str, str, str]]:
    """Norm plans of the modes, in the order of PLAN_HEADINGS; like layers share a row."""
    shapes: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    shapes_of_mode: dict[str, list[tuple[int, int]]] = {}
    for cost in profile.costs:
        counts: dict[tuple[str, str], int] = {}
        for layer, how in cost.plan.items():
            # The shape has a column of its own.
            how = how.removesuffix(f" (B={cost.batch_size}, T={cost.seq_length})")
            like = re.sub(r"\d+", "*", layer), how
            counts[like] = counts.get(like, 0) + 1
        for (layers, how), count in counts.items():
            name = f"{layers} ({count})" if count > 1 else layers
            shapes.setdefault((cost.label, name, how), []).append(cost.shape)
        if counts:
            shapes_of_mode.setdefault(cost.label, []).append(cost.shape)
    return [
        (label, layers, how, "every shape" if at == shapes_of_mode[label] else _shapes(at))
        for (label, layers, how), at in shapes.items()
    ]


def _shapes(shapes: list[tuple[int, int]]) -> str:
    return ", ".join(f"T={T} B={B}" for T, B in shapes)


def started(group: Group) -> str:
    """Start of the group's launch: UTC, ISO 8601."""
    start = datetime.fromtimestamp(group.start_time_ms / 1000, tz=UTC)
    return f"{start:%Y-%m-%dT%H:%M:%SZ}"


def profile_csv(profile: Profile, group: Group) -> str:
    """A CSV of one row for each figure, each complete in itself."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(ProfileRow)]
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    for row in profile_rows(profile, started(group)):
        values = dataclasses.asdict(row)
        writer.writerow({name: _plain(value) for name, value in values.items()})
    return text.getvalue()


def _plain(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
