"""`drift.json`: every number of the comparison, as `drift_document.py` types it.

A long series is thinned (thinning.py), its extremes kept; every other number covers all steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dpsgd_track.comparison.audit.noise import NoiseAudit
from dpsgd_track.comparison.diagnose.culprit import Culprit
from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict, RegimeComparison
from dpsgd_track.comparison.verdict import Finding
from dpsgd_track.report.drift_document import (
    DRIFT,
    CulpritEntry,
    DriftDocument,
    DriftEntry,
    DriftSummary,
    EnvironmentDifference,
    FindingEntry,
    FloorEntry,
    LadderEntry,
    LargestEntry,
    ModeEntry,
    NoiseAuditEntry,
    NoiseCheckEntry,
    PairEntry,
    ParameterNoise,
    RegimeEntry,
    ResolutionEntry,
    RunEntry,
    SeenEntry,
    StageEntry,
    TableRow,
    number,
)
from dpsgd_track.report.table import rows
from dpsgd_track.report.thinning import kept

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Entry = TypeVar("Entry", bound="DataclassInstance")


def drift_json(comparison: GroupComparison) -> str:
    """The comparison as JSON text."""
    return DRIFT.dumps(drift_document(comparison), indent=1) + "\n"


def drift_document(comparison: GroupComparison) -> DriftDocument:
    """The contents of `drift.json`."""
    group = comparison.group
    return _copied(
        DriftDocument,
        comparison,
        group=group.name,
        group_run_id=group.run_id,
        table=tuple(_copied(TableRow, row) for row in rows(comparison)),
        modes=tuple(map(_mode, comparison.modes)),
        regimes=tuple(map(_regime, comparison.regimes)),
        environment_differences=tuple(
            EnvironmentDifference(setting=setting, before=before, after=after)
            for setting, before, after in comparison.environment_differences
        ),
        runs=tuple(_copied(RunEntry, run) for run in group.runs),
        seen=_seen(comparison),
    )


def _seen(comparison: GroupComparison) -> SeenEntry:
    every = [("", comparison.seen.resolutions)]
    every += [(mode.label, mode.resolutions) for mode in comparison.modes]
    return _copied(
        SeenEntry,
        comparison.seen,
        resolutions=tuple(
            ResolutionEntry(
                mode=label,
                model=model,
                quantity=quantity,
                one=number(sight.any_one),
                exceptions=sight.exceptions,
                every=number(sight.all),
            )
            for label, resolutions in every
            for model, resolution in resolutions.items()
            for quantity, sight in resolution.sights
        ),
    )


def _copied(entry: type[Entry], source: object, **fields: Any) -> Entry:
    """An `entry` made of `fields` and of the attributes of `source` named like the other fields."""
    names = [field.name for field in dataclasses.fields(entry)]
    copied = {name: _strict(getattr(source, name)) for name in names if name not in fields}
    return entry(**fields, **copied)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return number(value) if isinstance(value, float) else value


def _mode(mode: ModeVerdict) -> ModeEntry:
    return _copied(
        ModeEntry,
        mode,
        findings=tuple(map(_finding, mode.findings)),
        ladders=tuple(
            LadderEntry(
                regime=regime,
                against=against,
                stages=tuple(_copied(StageEntry, rung) for rung in rungs),
            )
            for (regime, against), rungs in mode.ladders.items()
        ),
        culprits=tuple(map(_culprit, mode.culprits.values())),
        culprit=mode.culprit and _culprit(mode.culprit),
    )


def _culprit(culprit: Culprit) -> CulpritEntry:
    return _copied(CulpritEntry, culprit, cause=culprit.cause.sentence)


def _finding(finding: Finding) -> FindingEntry:
    culprit = finding.culprit
    return _copied(FindingEntry, finding, culprit=culprit and _culprit(culprit))


def _regime(regime: RegimeComparison) -> RegimeEntry:
    return _copied(
        RegimeEntry,
        regime,
        floors={label: _copied(FloorEntry, floor) for label, floor in regime.floors.items()},
        pairs=tuple(map(_pair, regime.pairs)),
        noise_audits=tuple(map(_audit, regime.audits.values())),
        largest_of_all_pairs={
            name: _drift(LargestEntry, largest.drift, modes=(largest.first, largest.second))
            for name, largest in regime.largest.items()
        },
    )


def _audit(audit: NoiseAudit) -> NoiseAuditEntry:
    return _copied(
        NoiseAuditEntry,
        audit,
        checks=tuple(
            _copied(NoiseCheckEntry, check, where=check.place.text) for check in audit.checks
        ),
        by_parameter=tuple(
            ParameterNoise(parameter=name, ratio=number(ratio), low=number(low), high=number(high))
            for name, ratio, low, high in audit.by_parameter
        ),
    )


def _pair(pair: Pair) -> PairEntry:
    drifts = {}
    for name, drift in pair.drifts.items():
        listed = kept(drift.per_step)
        drifts[name] = _drift(
            DriftEntry,
            drift,
            steps=tuple(drift.steps[listed].tolist()),
            per_step=tuple(map(number, drift.per_step[listed].tolist())),
        )
    gaps = tuple(gap.sentence for gap in pair.gaps)
    return _copied(PairEntry, pair, drifts=drifts, gaps=gaps)


Summary = TypeVar("Summary", bound=DriftSummary)


def _drift(entry: type[Summary], drift: Drift, **fields: Any) -> Summary:
    return _copied(
        entry,
        drift,
        mode_value=number(drift.other_value),
        relative=number(drift.relative_max),
        is_relative=drift.observable.is_relative,
        is_estimate=drift.observable.is_estimate,
        **fields,
    )
