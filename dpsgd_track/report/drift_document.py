"""What `drift.json` holds, field by field; codec and JSON schema are generated from here."""

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
"""A number in strict JSON, which has no literal for some: an infinity is a string, and NaN is null,
as is what was not measured."""


def number(value: float | None) -> Number:
    """`value` as strict JSON has it."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One mode, as in the table that every form of the report shows."""

    label: str
    """`mode` or `mode@variant`, with its replay in brackets."""
    verdict: Verdict
    status: str
    """FINISHED, or what became of its runs that did not finish."""
    final_loss: Number
    """At the last step of the regime in which weights move."""
    mean_grad_norm: Number
    """Over the steps of that regime."""
    drifts: Mapping[str, Number]
    """Largest drift over all regimes, by observable; relative, or of losses absolute."""
    step_time_ms: Number
    """Median, in milliseconds."""
    overhead: Number
    """Step time over that of no_dp."""
    peak_memory_gib: Number
    """The largest rank's, in GiB."""
    num_waived: int
    """Findings that a waiver accepts."""


@dataclass(frozen=True, kw_only=True)
class CulpritEntry:
    """Where a run first went wrong: in one comparison, in its own numbers, or in all together."""

    regime: str
    against: str
    """Label of what the run was compared with; empty where its own numbers show it."""
    stage: Stage
    step: int | None
    """null before the first step, or where it is not known."""
    places: tuple[str, ...]
    """Layers or parameters in which the error arose, worst first."""
    inherited: tuple[str, ...]
    """Layers or parameters that only passed it on."""
    samples: tuple[int, ...]
    """Global indices; empty for all, or where the stage is not per sample."""
    ranks: tuple[int, ...]
    """Empty for all."""
    observable: ObservableName | None
    """What showed it."""
    value: Number | None
    """Largest error of that step."""
    limit: Number | None
    """What the value was held against."""
    floor: Number | None
    """What rounding makes of the observable; null where it was not measured."""
    cause: str
    """A known ratio between mode and baseline, and what it suggests."""
    sentence: str
    """All of it, as it follows the mode's name, without the last full stop."""


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
    """What was measured, in the unit of the observable."""
    threshold: Number
    """What it was held against."""
    floor: Number
    """What rounding alone makes of it."""
    step: int | None
    where: str
    """Layer, parameter or sample; empty for a scalar."""
    culprit: CulpritEntry | None
    """Of a finding that no baseline is needed for, what it shows to have gone wrong."""
    waiver: Waiver | None
    """Why it fails nothing, where it is accepted for now."""


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of one comparison: where it first failed, or where it came nearest to failing."""

    stage: Stage
    status: StageStatus
    observable: ObservableName | None
    value: Number
    limit: Number
    """What the value was held against."""
    floor: Number
    step: int | None
    where: str
    items: tuple[str, ...]
    """All layers or parameters that were over the limit in that step, worst first."""


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
    """Worst first; a PASS has none but waived ones."""
    ladders: tuple[LadderEntry, ...]
    culprits: tuple[CulpritEntry, ...]
    """What each comparison shows; only where a stage went wrong and is not accepted."""
    culprit: CulpritEntry | None
    """What all of it comes down to; null where no stage is known to have gone wrong."""


@dataclass(frozen=True, kw_only=True)
class FloorEntry:
    """What rounding alone makes of one run."""

    measured_on: tuple[str, ...]
    """Replays that it is taken from."""
    values: Mapping[str, Number]
    """By observable, in its unit."""


@dataclass(frozen=True, kw_only=True)
class DriftSummary:
    """One observable of one pair of runs, over all steps."""

    max: Number
    """Largest difference: relative where `is_relative`, else in the unit of the observable."""
    mean: Number
    """Of each step's largest difference."""
    std: Number
    """Of each step's largest difference."""
    step: int
    """Step of the largest."""
    where: str
    """Layer, parameter or sample of the largest."""
    baseline_value: Number
    """What the baseline has there; null for a distance."""
    mode_value: Number
    relative: Number
    """The largest as a fraction of the baseline's value."""
    is_relative: bool
    is_estimate: bool
    """Whether it is estimated from sketches."""


@dataclass(frozen=True, kw_only=True)
class DriftEntry(DriftSummary):
    """One observable of one pair of runs, step by step."""

    steps: tuple[int, ...]
    """Of a long series only some, its extremes among them."""
    per_step: tuple[Number, ...]
    """Largest difference of each of `steps`."""
    by_item: Mapping[str, Number]
    """Largest over all steps, by layer or parameter."""


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
    """What one side lacks, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class NoiseCheckEntry:
    """One property of a mode's noise, with the interval that its estimate leaves open."""

    name: str
    title: str
    value: Number
    """Of several cells, the one farthest out; null where nothing was tested."""
    low: Number
    high: Number
    expected: Number
    is_ok: bool
    where: str
    """Parameter, rank or step of the worst; empty for all together."""
    sentence: str
    num_cells: int
    """Parameters, ranks, steps or pairs that were looked at one by one."""
    num_failed: int
    """How many of them were out of bounds."""
    explains_others: bool
    """Whether it says best what several checks see."""


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
    """What the noise is known from: samples of its elements, sketches, or nothing."""


@dataclass(frozen=True, kw_only=True)
class RegimeEntry:
    """Everything that was measured in one regime."""

    name: str
    baseline: str
    """Empty when there is none."""
    floors: Mapping[str, FloorEntry]
    """By the run that others are held against."""
    pairs: tuple[PairEntry, ...]
    noise_audits: tuple[NoiseAuditEntry, ...]
    largest_of_all_pairs: Mapping[str, LargestEntry]
    """By observable."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentDifference:
    """A setting in which two groups that are compared differ."""

    setting: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One run that was compared."""

    mode: str
    regime: str
    variant: str
    replay: str
    """What it repeats of another run; empty for a run of its own."""
    run_id: str
    """On the tracking server; empty when the run is missing."""
    status: str
    reason: str
    """Why it failed."""
    trajectory_missing: str
    """Why there is no trajectory, or only one rebuilt from metrics; empty when it is exact."""


@dataclass(frozen=True, kw_only=True)
class DriftDocument:
    """Every number of the comparison of a run group, as strict JSON.

    A number for which JSON has no literal is a string ("Infinity", "-Infinity") or null (NaN).
    """

    group: str
    """Name of the run group."""
    group_run_id: str
    """Its run on the tracking server."""
    verdict: Verdict
    sentence: str
    """The verdict in one sentence."""
    thresholds: Thresholds
    table: tuple[TableRow, ...]
    """One row for each mode."""
    modes: tuple[ModeEntry, ...]
    """What is said of each mode over all its regimes."""
    regimes: tuple[RegimeEntry, ...]
    waiver_notes: tuple[str, ...]
    """Waivers that have expired, or that nothing needed."""
    environment_differences: tuple[EnvironmentDifference, ...]
    runs: tuple[RunEntry, ...]
    """Missing ones included."""


DRIFT = Codec(DriftDocument, "dpsgd-track/drift", 3)
"""Writes and reads `drift.json`; `DRIFT.json_schema()` is its JSON schema."""
