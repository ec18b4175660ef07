"""The table of modes that all report formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.drift import OBSERVABLES, Pair
from dpsgd_track.comparison.measure.finite import not_finite_in
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison, iter_not_computed
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.config import ACCURACY, TRAIN
from dpsgd_track.modes.table import BASELINE
from dpsgd_track.record.run import ModeRun, Status
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats

DRIFT_COLUMNS = {
    ObservableName.LOSS: "Δ loss",
    ObservableName.GRAD_NORM: "Δ grad norm",
    ObservableName.SAMPLE_NORM: "Δ sample norm",
    ObservableName.GRADIENT: "Δ clipped sum",
}
"""Observables with a column of their own, each with its heading."""

HEADINGS = (
    "mode",
    "verdict",
    "final loss",
    "mean grad norm",
    *DRIFT_COLUMNS.values(),
)

ABSENT = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode; None for a number that it lacks."""

    label: str
    verdict: Verdict
    status: str
    """FINISHED, or the statuses of its unfinished runs."""
    regime: str
    """Regime of the loss, the gradient norm, the time and the memory; empty if it has no run."""
    final_loss: float | None
    mean_grad_norm: float | None
    drifts: Mapping[ObservableName, float | None]
    """Largest over the regimes, against the baseline and the reference."""
    step_time_ms: float | None
    """Median, from the same regime as the losses."""
    overhead: float | None
    """Step time divided by that of no_dp."""
    peak_memory_gib: float | None
    is_replay: bool = False
    """True if it is a mode run again to measure rounding."""
    num_waived: int = 0
    """Findings that a waiver accepts."""
    has_warned: bool = False
    """True if the mode's own code warned of something."""

    @property
    def cells(self) -> tuple[str, ...]:
        """Cells as text, in the order of HEADINGS."""
        return (
            self.label,
            f"{self.verdict}{f' ({self.num_waived} waived)' * bool(self.num_waived)}"
            + " (warned)" * self.has_warned,
            ABSENT if self.final_loss is None else f"{self.final_loss:.6f}",
            _shown(self.mean_grad_norm, 5),
            *(ABSENT if v is None else number(v) for v in self.drifts.values()),
        )

    @property
    def is_floor(self) -> bool:
        """True for a replay without a finding: it measures rounding, and is no mode to show."""
        return self.is_replay and self.verdict is Verdict.PASS and not self.num_waived


def _shown(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}g}"


def rows(comparison: GroupComparison) -> tuple[Row, ...]:
    """One row for each mode, in the launcher's order."""
    return tuple(
        replace(
            _row(comparison, mode.label, mode.verdict, _runs_of(comparison, mode.label)),
            num_waived=sum(finding.waiver is not None for finding in mode.findings),
            has_warned=bool(mode.warnings),
        )
        for mode in comparison.modes
    )


def main_regime(comparison: GroupComparison) -> RegimeComparison | None:
    """The regime that losses and times are taken from: the one in which weights move."""
    order = (ACCURACY, TRAIN)
    ranked = sorted(
        comparison.regimes, key=lambda r: order.index(r.name) if r.name in order else len(order)
    )
    return ranked[0] if ranked else None


def _runs_of(comparison: GroupComparison, label: str) -> list[ModeRun]:
    return [run for run in comparison.group.runs if label == run.title]


def _row(comparison: GroupComparison, label: str, verdict: Verdict, runs: list[ModeRun]) -> Row:
    main = main_regime(comparison)
    preferred = sorted(runs, key=lambda run: main is None or run.regime != main.name)
    run = next((r for r in preferred if r.trajectory and r.trajectory.num_steps), None)
    trajectory = run.trajectory if run else None
    broken = [f"{r.regime} {r.status}" for r in runs if r.status is not Status.FINISHED]
    time = _of_finite(np.median, trajectory.step_time_ms) if trajectory else None
    base = _baseline_time(comparison, run.regime) if run else None
    return Row(
        label=label,
        verdict=verdict,
        status=", ".join(broken) or Status.FINISHED,
        regime=run.regime if run else "",
        final_loss=float(trajectory.loss[-1]) if trajectory else None,
        mean_grad_norm=float(np.mean(trajectory.grad_norm)) if trajectory else None,
        drifts={name: _largest(comparison, label, runs, name) for name in DRIFT_COLUMNS},
        step_time_ms=time,
        overhead=time / base if time and base else None,
        peak_memory_gib=_of_finite(np.max, trajectory.peak_memory_gib) if trajectory else None,
        is_replay=bool(runs) and all(run.replay for run in runs),
    )


def without_replays(table: Sequence[Row]) -> tuple[tuple[Row, ...], str]:
    """The rows of modes, and a sentence on the replays that are left out; empty for none."""
    replays = [row.label for row in table if row.is_floor]
    many = "s" * (len(replays) != 1)
    said = f"The floor of rounding is that of {len(replays)} replay{many}: {', '.join(replays)}."
    return tuple(row for row in table if not row.is_floor), said if replays else ""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Spread of one number over all modes."""

    mean: float
    std: float
    """Of all modes, not of a sample of them."""
    max_diff: float
    """Largest less smallest."""

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value; NaN where one is."""
        with np.errstate(invalid="ignore"):  # The difference of two infinities is NaN.
            return Spread(
                mean=float(np.mean(values)),
                std=float(np.std(values)),
                max_diff=float(np.ptp(values)),
            )


def spreads(comparison: GroupComparison) -> dict[str, Spread]:
    """Spread of final loss and average gradient norm over the modes of the main regime.

    Replays measure rounding and are no modes. Empty if no mode has a record in that regime.
    """
    main = main_regime(comparison)
    modes = [
        row for row in rows(comparison) if main and row.regime == main.name and not row.is_replay
    ]
    columns = {
        "Final loss": [row.final_loss for row in modes],
        "Average gradient norm": [row.mean_grad_norm for row in modes],
    }
    return {
        name: Spread.of([value for value in column if value is not None])
        for name, column in columns.items()
        if column
    }


def _largest(
    comparison: GroupComparison, label: str, runs: list[ModeRun], observable: ObservableName
) -> float | None:
    titles = {run.title for run in runs if run.replay}
    pairs = [
        pair
        for regime in comparison.regimes
        for pair in (
            *(pair for pair in regime.pairs if pair.mode == label),
            *(pair for pair in regime.replays.values() if pair.mode in titles),
        )
    ]
    if any(_is_not_finite(comparison, pair, observable) for pair in pairs):
        return float("nan")
    return max((p.drifts[observable].max for p in pairs if observable in p.drifts), default=None)


def _is_not_finite(comparison: GroupComparison, pair: Pair, observable: ObservableName) -> bool:
    """True if the mode has a NaN or an infinity that its baseline lacks."""
    regime = next(each for each in comparison.regimes if each.name == pair.regime)
    mode = next((r.trajectory for r in regime.runs if r.label == pair.mode), None)
    base = regime.base_of(pair.mode, pair.baseline)
    return bool(mode and base and not_finite_in(observable, mode, base))


def _baseline_time(comparison: GroupComparison, regime: str) -> float | None:
    for run in comparison.group.runs:
        if run.label == BASELINE and run.regime == regime and not run.replay and run.trajectory:
            return _of_finite(np.median, run.trajectory.step_time_ms)
    return None


def _of_finite(summary: Callable[[Floats], float], values: Floats) -> float | None:
    """`summary` of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    return float(summary(finite)) if finite.size else None


def waived(comparison: GroupComparison) -> list[str]:
    """A sentence for each waived finding, then notes on expired and unused waivers."""
    accepted = [
        f"{mode.label}: {finding.verdict}, waived until {finding.waiver.expires} "
        f"({finding.waiver.reason}): {finding.sentence}."
        for mode in comparison.modes
        for finding in mode.findings
        if finding.waiver
    ]
    return [*accepted, *comparison.waiver_notes]


def consistency(comparison: GroupComparison) -> list[tuple[str, str, str, str, str, str]]:
    """(regime, mode against baseline, observable, mean, std, max) of every pair's main drifts."""
    return [
        (
            regime.name,
            f"{pair.mode} vs {pair.baseline}",
            OBSERVABLES[name].title,
            number(drift.mean),
            number(drift.std),
            number(drift.max),
        )
        for regime in comparison.regimes
        for pair in regime.pairs
        for name in DRIFT_COLUMNS
        if (drift := pair.drifts.get(name))
    ]


def not_computed(comparison: GroupComparison) -> list[tuple[str, str, str, str]]:
    """(regime, mode against baseline, observable, reason) of observables that one side lacks."""
    return [
        (regime, f"{pair.mode} vs {pair.baseline}", name, why)
        for regime, pair in iter_not_computed(comparison)
        for name, why in pair.not_computed.items()
    ]


def floors(comparison: GroupComparison) -> list[tuple[str, str, str, str, str]]:
    """(regime, observable, floor, threshold, largest drift over all pairs and its pair)."""
    return [
        (
            regime.name,
            OBSERVABLES[name].title,
            number(floor.of(name) if (floor := regime.floor()) else None),
            number(getattr(comparison.thresholds, OBSERVABLES[name].threshold)),
            f"{number(largest.drift.max)} ({largest.second} vs {largest.first})",
        )
        for regime in comparison.regimes
        for name, largest in regime.largest.items()
    ]
