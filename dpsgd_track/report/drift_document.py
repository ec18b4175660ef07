"""The types of `drift.json`; codec and JSON schema are generated from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dpsgd_track.comparison.diagnose.ladder import StageStatus
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.comparison.waivers import Waiver
from dpsgd_track.config import Thresholds
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.stages import ObservableName, Stage

Number = float | Literal["Infinity", "-Infinity"] | None
"""A number in strict JSON, which has no literals for infinities and NaN: an infinity is a string;
null stands for NaN or a value that was not measured."""


def number(value: float | None) -> Number:
    """`value` in strict JSON."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of the table of modes."""

    label: str
    """`mode` or `mode@variant`, with its replay in brackets."""
    verdict: Verdict
    status: str
    """FINISHED, or the statuses of its unfinished runs."""
    final_loss: Number
    """Loss at the last step of the regime in which weights move."""
    mean_grad_norm: Number
    """Mean gradient norm over the steps of that regime."""
    drifts: Mapping[str, Number]
    """Largest drift over all regimes, by observable; relative, or of losses absolute."""
    step_time_ms: Number
    """Median step time, in milliseconds."""
    overhead: Number
    """Step time divided by that of no_dp."""
    peak_memory_gib: Number
    """Peak memory of the largest rank, in GiB."""
    num_waived: int
    """Findings that a waiver accepts."""


@dataclass(frozen=True, kw_only=True)
class CulpritEntry:
    """The first error of a run, found by one comparison or in the run's own numbers."""

    regime: str
    against: str
    """Label of the run it was compared with; empty where its own numbers show the error."""
    stage: Stage
    step: int | None
    """null before the first step, or if unknown."""
    places: tuple[str, ...]
    """Layers or parameters in which the error arose, worst first."""
    inherited: tuple[str, ...]
    """Layers or parameters that only propagated it."""
    samples: tuple[int, ...]
    """Global sample indices; empty for all, or if the stage is not per sample."""
    ranks: tuple[int, ...]
    """Ranks affected; empty for all."""
    observable: ObservableName | None
    """Observable that showed the error."""
    value: Number | None
    """Largest error of that step."""
    limit: Number | None
    """Limit for the value."""
    floor: Number | None
    """Error of the observable due to rounding alone; null if not measured."""
    cause: str
    """The mistake that explains the error, as a clause; empty if none is known."""
    sentence: str
    """The whole culprit as a predicate of the mode's name, without a full stop."""


@dataclass(frozen=True, kw_only=True)
class FindingEntry:
    """One reason for a verdict other than PASS."""

    verdict: Verdict
    regime: str
    sentence: str
    against: str
    """Label of the baseline; empty where none is involved."""
    observable: ObservableName | None
    value: Number
    """Measured value, in the unit of the observable."""
    threshold: Number
    """Threshold that the value was compared with."""
    floor: Number
    """Value due to rounding alone."""
    step: int | None
    where: str
    """Layer, parameter or sample; empty for a scalar."""
    culprit: CulpritEntry | None
    """Culprit that the finding shows by itself, if it needs no baseline."""
    waiver: Waiver | None
    """The waiver that accepts the finding for now, if any."""


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of one comparison: its first failure, or its nearest approach to one."""

    stage: Stage
    status: StageStatus
    observable: ObservableName | None
    value: Number
    limit: Number
    """Limit that the value was compared with."""
    floor: Number
    step: int | None
    where: str
    items: tuple[str, ...]
    """All layers or parameters over the limit in that step, worst first."""


@dataclass(frozen=True, kw_only=True)
class LadderEntry:
    """Every stage of one comparison, in the order of a step."""

    regime: str
    against: str
    stages: tuple[StageEntry, ...]


@dataclass(frozen=True, kw_only=True)
class ModeEntry:
    """One mode over all its regimes."""

    label: str
    verdict: Verdict
    sentence: str
    findings: tuple[FindingEntry, ...]
    """Worst first; those of a PASS are all waived."""
    ladders: tuple[LadderEntry, ...]
    culprits: tuple[CulpritEntry, ...]
    """Culprit of each comparison in which a stage went wrong and is not accepted."""
    culprit: CulpritEntry | None
    """Culprit over all comparisons; null if no stage is known to have gone wrong."""
    warnings: tuple[str, ...] = ()
    """Warnings of the mode's own code."""


@dataclass(frozen=True, kw_only=True)
class FloorEntry:
    """Numerical floor of one run: its error due to rounding alone."""

    measured_on: tuple[str, ...]
    """Replays that the floor was measured on."""
    values: Mapping[str, Number]
    """Floor by observable, in its unit."""


@dataclass(frozen=True, kw_only=True)
class DriftSummary:
    """One observable of one pair of runs, over all steps."""

    max: Number
    """Largest difference: relative where `is_relative`, else in the unit of the observable."""
    mean: Number
    """Mean of each step's largest difference."""
    std: Number
    """Standard deviation of each step's largest difference."""
    step: int
    """Step of the largest difference."""
    where: str
    """Layer, parameter or sample of the largest difference."""
    baseline_value: Number
    """Value of the baseline there; null for a distance."""
    mode_value: Number
    relative: Number
    """Largest difference as a fraction of the baseline's value."""
    is_relative: bool
    is_estimate: bool
    """True if it is estimated from sketches."""


@dataclass(frozen=True, kw_only=True)
class DriftEntry(DriftSummary):
    """One observable of one pair of runs, step by step."""

    steps: tuple[int, ...]
    """Steps listed: all, or some of a long series, its extremes among them."""
    per_step: tuple[Number, ...]
    """Largest difference of each of `steps`."""
    by_item: Mapping[str, Number]
    """Largest difference over all steps, by layer or parameter."""


@dataclass(frozen=True, kw_only=True)
class LargestEntry(DriftSummary):
    """The largest drift of one observable over all pairs of modes, judged or not."""

    modes: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class PairEntry:
    """One mode against one baseline."""

    mode: str
    baseline: str
    drifts: Mapping[str, DriftEntry]
    """By observable."""
    not_computed: Mapping[str, str]
    """Observables left out, and why."""
    gaps: tuple[str, ...]
    """Data that one side lacks, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class NoiseCheckEntry:
    """One property of a mode's noise, with the interval that its estimate leaves open."""

    name: str
    title: str
    value: Number
    """Value of the cell farthest out; null if nothing was tested."""
    low: Number
    high: Number
    expected: Number
    is_ok: bool
    where: str
    """Parameter, rank or step of the worst cell; empty for all together."""
    sentence: str
    num_cells: int
    """Cells tested: parameters, ranks, steps or pairs."""
    num_failed: int
    """Cells out of bounds."""
    explains_others: bool
    """True if it is the best explanation of several failed checks."""
    resolution: Number
    """Smallest deviation from `expected` that fails with a probability of 95 %; null if unknown."""
    is_of_draws: bool
    """True if it rests on the sums of noise-only steps rather than on single elements."""


@dataclass(frozen=True, kw_only=True)
class ParameterNoise:
    """Estimated standard deviation of one parameter's noise in units of sigma C."""

    parameter: str
    ratio: Number
    low: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class NoiseAuditEntry:
    """All checks of one mode's own noise."""

    mode: str
    checks: tuple[NoiseCheckEntry, ...]
    by_parameter: tuple[ParameterNoise, ...]
    source: Literal["samples", "sketches", ""]
    """Data behind the checks: samples of the noise's elements, sketches, or nothing."""
    num_draws: int
    """Elements of noise-only steps."""
    untested: str
    """Reason why the noise could not be audited at all; empty if it was."""


@dataclass(frozen=True, kw_only=True)
class RegimeEntry:
    """All measurements of one regime."""

    name: str
    baseline: str
    """Label of the baseline; empty if there is none."""
    floors: Mapping[str, FloorEntry]
    """Numerical floors, by the run that others are compared with."""
    pairs: tuple[PairEntry, ...]
    noise_audits: tuple[NoiseAuditEntry, ...]
    largest_of_all_pairs: Mapping[str, LargestEntry]
    """By observable."""


@dataclass(frozen=True, kw_only=True)
class ResolutionEntry:
    """Smallest relative errors that are found in one model with a probability of 95 %."""

    mode: str
    """Label; empty for any mode."""
    model: str
    """`the model` or `the probe`."""
    quantity: Literal["norms", "sums"]
    one: Number
    """In any one parameter that is no exception."""
    exceptions: tuple[str, ...]
    """Parameters in which only far larger errors are found."""
    every: Number
    """In all parameters at once."""


@dataclass(frozen=True, kw_only=True)
class SeenEntry:
    """Errors that the comparison would have seen, and those that no regime exercised."""

    sentence: str
    resolutions: tuple[ResolutionEntry, ...]
    noise_std: Number
    """Smallest relative error found of the std of a mode's own noise; null if not audited."""
    unseen: tuple[str, ...]
    """Kinds of faults that could not show, each to follow the word `faults`."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentDifference:
    """A setting in which the two groups compared differ."""

    setting: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One run of the comparison."""

    mode: str
    regime: str
    variant: str
    replay: str
    """Kind of replay; empty for a run of its own."""
    run_id: str
    """Id on the tracking server; empty when the run is missing."""
    status: str
    reason: str
    """Reason that it failed."""
    trajectory_missing: str
    """Reason for no trajectory, or only one rebuilt from metrics; empty when it is exact."""


@dataclass(frozen=True, kw_only=True)
class DriftDocument:
    """Every number of the comparison of a run group, as strict JSON.

    A number for which JSON has no literal is a string ("Infinity", "-Infinity") or null (NaN).
    """

    group: str
    """Name of the run group."""
    group_run_id: str
    """Id of the group's run on the tracking server."""
    verdict: Verdict
    sentence: str
    """The verdict in one sentence."""
    thresholds: Thresholds
    table: tuple[TableRow, ...]
    """One row for each mode."""
    modes: tuple[ModeEntry, ...]
    """Verdict and findings of each mode over all its regimes."""
    regimes: tuple[RegimeEntry, ...]
    not_compared: tuple[str, ...] = ()
    """Parts that the launch left out, as a mode does not take them: a sentence each."""
    waiver_notes: tuple[str, ...]
    """Notes on waivers that have expired or were not needed."""
    environment_differences: tuple[EnvironmentDifference, ...]
    runs: tuple[RunEntry, ...]
    """All runs, missing ones included."""
    seen: SeenEntry


DRIFT = Codec(DriftDocument, "dpsgd-track/drift", 5)
"""Writes and reads `drift.json`; `DRIFT.json_schema()` is its JSON schema."""
