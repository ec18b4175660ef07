"""`drift.json`: every number of the comparison, as strict JSON with a versioned schema.

The schema is published beside this file: `schema/drift.schema.json`, JSON Schema draft 2020-12.

A number that JSON has no literal for is a string ("Infinity", "-Infinity") or null (NaN). Of a
long series only some steps are listed (thinning.py), its extremes among them; every other number
is that of all steps.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpsgd_track.comparison.audit.noise import NoiseAudit
from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict, RegimeComparison
from dpsgd_track.comparison.verdict import Finding
from dpsgd_track.report.table import rows
from dpsgd_track.report.thinning import kept

SCHEMA = "dpsgd-track/drift"
SCHEMA_VERSION = 2


def drift_json(comparison: GroupComparison) -> str:
    """The comparison as JSON text."""
    group = comparison.group
    document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "group": group.name,
        "group_run_id": group.run_id,
        "verdict": comparison.verdict,
        "sentence": comparison.sentence,
        "thresholds": dataclasses.asdict(comparison.thresholds),
        "table": [dataclasses.asdict(row) for row in rows(comparison)],
        "modes": [_mode(mode) for mode in comparison.modes],
        "regimes": [_regime(regime) for regime in comparison.regimes],
        "waiver_notes": comparison.waiver_notes,
        "environment_differences": [
            {"setting": setting, "before": before, "after": after}
            for setting, before, after in comparison.environment_differences
        ],
        "runs": [
            {
                key: getattr(run, key)
                for key in (
                    "mode",
                    "regime",
                    "variant",
                    "replay",
                    "run_id",
                    "status",
                    "reason",
                    "trajectory_missing",
                )
            }
            for run in group.runs
        ],
    }
    return json.dumps(strict(document), indent=1, allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    """`value` with arrays as lists and without numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        is_plain = value.dtype.kind in "biu" or (
            value.dtype.kind == "f" and np.isfinite(value).all()
        )
        return value.tolist() if is_plain else strict(value.tolist())
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    return value


def _mode(mode: ModeVerdict) -> dict[str, Any]:
    return {
        "label": mode.label,
        "verdict": mode.verdict,
        "sentence": mode.sentence,
        "findings": [_finding(finding) for finding in mode.findings],
        "ladders": [
            {
                "regime": regime,
                "against": against,
                "stages": [dataclasses.asdict(rung) for rung in rungs],
            }
            for (regime, against), rungs in mode.ladders.items()
        ],
        "culprits": [dataclasses.asdict(culprit) for culprit in mode.culprits.values()],
        "culprit": mode.culprit and dataclasses.asdict(mode.culprit),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    found = dataclasses.asdict(finding)
    if finding.waiver:
        found["waiver"]["expires"] = finding.waiver.expires.isoformat()
    return found


def _regime(regime: RegimeComparison) -> dict[str, Any]:
    return {
        "name": regime.name,
        "baseline": regime.baseline,
        "floors": {
            label: {"measured_on": floor.measured_on, "values": floor.values}
            for label, floor in regime.floors.items()
        },
        "pairs": [_pair(pair) for pair in regime.pairs],
        "noise_audits": [_audit(audit) for audit in regime.audits.values()],
        "largest_of_all_pairs": {
            name: {"modes": [largest.first, largest.second], **_drift(largest.drift, steps=False)}
            for name, largest in regime.largest.items()
        },
    }


def _audit(audit: NoiseAudit) -> dict[str, Any]:
    return {
        "mode": audit.mode,
        "source": audit.source,
        "checks": [dataclasses.asdict(check) for check in audit.checks],
        "by_parameter": [
            {"parameter": name, "ratio": ratio, "low": low, "high": high}
            for name, ratio, low, high in audit.by_parameter
        ],
    }


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "mode": pair.mode,
        "baseline": pair.baseline,
        "drifts": {name: _drift(drift) for name, drift in pair.drifts.items()},
        "not_computed": pair.not_computed,
        "gaps": [gap.sentence for gap in pair.gaps],
    }


def _drift(drift: Drift, *, steps: bool = True) -> dict[str, Any]:
    listed = kept(drift.per_step) if steps else np.arange(0)
    series = {
        "steps": drift.steps[listed],
        "per_step": drift.per_step[listed],
        "by_item": drift.by_item,
    }
    return {
        "max": drift.max,
        "mean": drift.mean,
        "std": drift.std,
        "step": drift.step,
        "where": drift.where,
        "baseline_value": drift.baseline_value,
        "mode_value": drift.other_value,
        "relative": drift.relative_max,
        "is_relative": drift.observable.is_relative,
        "is_estimate": drift.observable.is_estimate,
        **(series if steps else {}),
    }
