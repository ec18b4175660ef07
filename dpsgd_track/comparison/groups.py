"""Compares two groups: each run of the later one against the same run of the earlier one.

Modes of one group are not held against each other here: `group` does that.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dpsgd_track.comparison.audit.noise import audits_of
from dpsgd_track.comparison.judge import joined, judge_against, judge_alone, passed, waive
from dpsgd_track.comparison.measure.drift import Pair, compare_pair
from dpsgd_track.comparison.measure.floor import floor_of
from dpsgd_track.comparison.result import (
    GroupComparison,
    Judged,
    ModeVerdict,
    RegimeComparison,
    earlier_label,
    group_sentence,
    largest_of,
    mode_verdict,
)
from dpsgd_track.comparison.verdict import (
    Finding,
    Verdict,
    judge_coverage,
    judge_likeness,
    judge_run,
    worst,
)
from dpsgd_track.comparison.waivers import Waiver, waiver_notes
from dpsgd_track.config import CLIP, SILENT, Thresholds, kind_of
from dpsgd_track.modes.table import BASELINE, REFERENCE
from dpsgd_track.record.run import Group, ModeRun, Status

_CODE = ("git_revision", "git_dirty", "dpsgd_track")
"""Facts of the environment that two groups are compared for; where nothing else differs, a drift
is theirs."""
_KEYS_SHOWN = 6

EnvironmentDifferences = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Sides:
    """The runs of one regime in both groups."""

    regime: str
    baseline: str
    """What the earlier group is called in sentences and tables."""
    before: Mapping[str, ModeRun]
    """By label, without replays."""
    after: tuple[ModeRun, ...]
    """With replays, and with a missing one for each that only the earlier group has."""

    @property
    def reference(self) -> ModeRun | None:
        """The later group's oracle."""
        return _run_of(self.after, REFERENCE)

    @property
    def earlier(self) -> tuple[ModeRun, ...]:
        """The earlier group's runs under names of their own."""
        return tuple(
            replace(run, mode=earlier_label(label, self.baseline), variant="")
            for label, run in self.before.items()
        )


def compare_groups(
    before: Group,
    after: Group,
    thresholds: Thresholds,
    waivers: Sequence[Waiver] = (),
    today: datetime.date | None = None,
) -> GroupComparison:
    """Hold each run of `after` against the run of `before` of the same mode, regime and variant.

    A run that is missing from `after` never passes; one that is new in it has nothing to be held
    against, and says so. A drift below the bug threshold is INCONCLUSIVE where the two were not
    made in the same environment.

    Args:
        waivers: drifts that are accepted until they expire.
        today: the day that they are asked on (default: this one).
    """
    today = today or datetime.date.today()
    differences = _environment_differences(before, after)
    regimes: list[RegimeComparison] = []
    judged: dict[str, list[Judged]] = {}
    runs: list[ModeRun] = []
    earlier: list[ModeRun] = []
    for name in dict.fromkeys(run.regime for run in (*after.runs, *before.runs)):
        sides = _sides(name, before, after)
        regime = _regime(sides, before)
        regimes.append(regime)
        runs += sides.after
        earlier += sides.earlier
        for run in sides.after:
            if run.replay == SILENT and run.status is Status.FINISHED:
                continue
            result = _judge(run, sides, regime, thresholds, differences)
            result = waive(result, run.title, regime, thresholds, waivers, today)
            judged.setdefault(run.title, []).append(result)
    modes = tuple(mode_verdict(label, results) for label, results in judged.items())
    verdict, sentence = _verdict(modes, regimes, before)
    used = {f.waiver for mode in modes for f in mode.findings if f.waiver}
    return GroupComparison(
        # The earlier runs are drawn beside the later ones.
        group=replace(
            after, name=f"{after.name}-vs-{before.name}", runs=(*runs, *earlier), timed_runs=()
        ),
        thresholds=thresholds,
        regimes=tuple(regimes),
        modes=modes,
        verdict=verdict,
        sentence=sentence,
        waiver_notes=waiver_notes(waivers, used, today),
        environment_differences=differences,
    )


def _verdict(
    modes: tuple[ModeVerdict, ...], regimes: Iterable[RegimeComparison], before: Group
) -> tuple[Verdict, str]:
    verdict = worst(mode.verdict for mode in modes)
    if verdict is Verdict.PASS and not any(regime.pairs for regime in regimes):
        verdict = Verdict.INCONCLUSIVE
        return verdict, f"{verdict}: no run has its like in group {before.name}."
    return verdict, group_sentence(verdict, modes, tuple(regimes))


def _sides(regime: str, before: Group, after: Group) -> _Sides:
    ours = {r.label: r for r in before.runs if r.regime == regime and not r.replay}
    theirs = tuple(run for run in after.runs if run.regime == regime)
    known = {run.label for run in theirs if not run.replay}
    missing = tuple(
        ModeRun(
            mode=run.mode,
            regime=regime,
            variant=run.variant,
            trajectory_missing=f"group {before.name} has it and group {after.name} has not",
        )
        for label, run in ours.items()
        if label not in known and run.status is not Status.MISSING
    )
    return _Sides(
        regime=regime,
        baseline=f"group {before.name}",
        before=ours,
        after=(*theirs, *missing),
    )


def _regime(sides: _Sides, before: Group) -> RegimeComparison:
    pairs = tuple(
        compare_pair(sides.regime, (sides.baseline, base.trajectory), (run.label, run.trajectory))
        for run in sides.after
        if not run.replay
        and (base := sides.before.get(run.label))
        and base.trajectory
        and run.trajectory
    )
    replayed = tuple(run for run in before.runs if run.regime == sides.regime)
    replays = _replays(sides.after)
    floor = floor_of([*_replays(replayed).values(), *replays.values()])
    return RegimeComparison(
        name=sides.regime,
        runs=(*(run for run in sides.after if not run.replay), *sides.earlier),
        baseline=sides.baseline,
        pairs=pairs,
        replays=replays,
        floors={sides.baseline: floor} if floor else {},
        largest=largest_of(pairs),
        audits=audits_of(sides.after, sides.reference),
    )


def _replays(runs: tuple[ModeRun, ...]) -> dict[str, Pair]:
    """Sound replays of a group's own baseline, by title."""
    regime = runs[0].regime if runs else ""
    base = _run_of(runs, REFERENCE if kind_of(regime) == CLIP else BASELINE)
    if base is None or base.trajectory is None:
        return {}
    return {
        run.title: compare_pair(regime, (base.label, base.trajectory), (run.title, run.trajectory))
        for run in runs
        if run.replay
        and run.label == base.label
        and run.trajectory
        # An unsound replay would excuse what rounding does not explain.
        and not [*judge_run(run), *judge_likeness(base, run)]
    }


def _run_of(runs: Iterable[ModeRun], label: str) -> ModeRun | None:
    return next((run for run in runs if run.label == label and not run.replay), None)


def _judge(
    run: ModeRun,
    sides: _Sides,
    regime: RegimeComparison,
    thresholds: Thresholds,
    differences: EnvironmentDifferences,
) -> Judged:
    found, broken = judge_alone(run, regime)
    if kind_of(regime.name) == CLIP and sides.reference:
        found += judge_coverage(sides.reference)
    base = sides.before.get(run.label)
    if run.replay or base is None:
        new = f"new in {regime.name}: {sides.baseline} has no such run"
        said = passed(run, regime, thresholds, {}) if run.replay else new
        return Judged(findings=tuple(found), passed=said)
    found += [_at_fault(finding, sides) for finding in judge_run(base)]
    unlike = [*judge_likeness(replace(base, mode=sides.baseline, variant=""), run)]
    unlike += _unlike_settings(base, run, sides)
    found += unlike
    results = []
    if pair := regime.pair(run.label):
        # The oracle's replay computes in another type, so that it excuses the modes only.
        floor = None if run.label == REFERENCE else regime.floor()
        result = judge_against(base, run, pair, thresholds, floor, unlike=unlike, broken=broken)
        findings = tuple(_attributed(f, differences) for f in result.findings)
        results.append(replace(result, findings=findings))
    result = joined(results, found, "")
    return replace(result, passed=passed(run, regime, thresholds, result.ladders))


def _at_fault(finding: Finding, sides: _Sides) -> Finding:
    sentence = f"cannot be held against {sides.baseline}: there, {finding.sentence}"
    return replace(
        finding,
        verdict=Verdict.INCONCLUSIVE,
        sentence=sentence,
        against=sides.baseline,
        observable="",
        value=None,
    )


def _unlike_settings(base: ModeRun, run: ModeRun, sides: _Sides) -> list[Finding]:
    ours, theirs = _settings(base), _settings(run)
    reasons = [
        f"{name} {theirs[name]}, not {ours[name]}"
        # One that is not recorded is not known to differ.
        for name in ours.keys() & theirs.keys()
        if theirs[name] != ours[name]
    ]
    if not reasons:
        return []
    sentence = (
        f"cannot be compared with {sides.baseline} in {sides.regime}: "
        f"it ran with {' and '.join(reasons)}"
    )
    return [
        Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=sides.regime,
            sentence=sentence,
            against=sides.baseline,
        )
    ]


def _settings(run: ModeRun) -> dict[str, object]:
    """Settings that what a run computes depends on, and that its record does not show."""
    job, setup = run.job, run.setup
    if job is None or setup is None:
        return {}
    settings: dict[str, object] = {
        "task": job.model.task,
        "dropout": job.model.dropout,
        "param_dtype": job.performance.param_dtype,
        "optimizer": setup.optimizer,
        "learning_rate": setup.learning_rate,
        "seed": job.seed,
    }
    if run.mode == REFERENCE:
        settings["reference_dtype"] = job.performance.reference_dtype
    return settings


def _attributed(finding: Finding, differences: EnvironmentDifferences) -> Finding:
    """`finding`, or INCONCLUSIVE where another environment may be the cause of a drift."""
    keys = [key for key, _, _ in differences if key not in _CODE]
    if finding.verdict is not Verdict.DRIFT or not keys:
        return finding
    more = f" and {len(keys) - _KEYS_SHOWN} more" * (len(keys) > _KEYS_SHOWN)
    return replace(
        finding,
        verdict=Verdict.INCONCLUSIVE,
        sentence=f"{finding.sentence}; it cannot be attributed, since the groups also differ in "
        f"{', '.join(keys[:_KEYS_SHOWN])}{more}",
    )


def _environment_differences(before: Group, after: Group) -> EnvironmentDifferences:
    """(key, before, after) of each fact of software and machine that is not the same."""
    ours, theirs = _environment(before), _environment(after)
    return tuple(
        (key, _shown(ours[key]), _shown(theirs[key]))
        for key in sorted(ours.keys() | theirs.keys())
        if ours[key] != theirs[key]
    )


def _environment(group: Group) -> defaultdict[str, set[str]]:
    facts: defaultdict[str, set[str]] = defaultdict(set)
    environments = [run.facts.environment for run in group.runs if run.facts]
    for environment in (group.plan.environment, *environments):
        for name, value in environment.items():
            facts[name].add(value)
    for device in (run.facts.device for run in group.runs if run.facts):
        for name, value in vars(device).items():
            facts[f"device {name}"].add(str(value))
    return facts


def _shown(values: set[str]) -> str:
    return ", ".join(sorted(values)) or "not recorded"
