"""Two groups: each run of the later one is compared with the same run of the earlier one.

Modes of the same group are not compared with each other here; `baselines` does that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dpsgd_track.comparison.audit.noise import NoiseAudit, audits_of, judge_noise
from dpsgd_track.comparison.extent import WHOLE, Extent, audits_alone, extent_of
from dpsgd_track.comparison.measure.drift import Labelled, compare_pairs
from dpsgd_track.comparison.measure.floor import floor_of
from dpsgd_track.comparison.pairing import (
    Candidate,
    Held,
    Matched,
    has_noise_regime,
    is_sound,
    labelled,
    run_of,
)
from dpsgd_track.comparison.result import (
    EnvironmentDifferences,
    RegimeComparison,
    earlier_label,
    largest_of,
)
from dpsgd_track.comparison.verdict import (
    Finding,
    Verdict,
    judge_likeness,
    judge_run,
    noise_is_matched,
)
from dpsgd_track.config import CLIP, NOISE, kind_of
from dpsgd_track.modes.table import BASELINE, REFERENCE
from dpsgd_track.record.run import Group, ModeRun, Status

_CODE = ("git_revision", "git_dirty", "dpsgd_track")
"""Facts of the environment that describe the code, whose effect a comparison of two groups is to
show. If no other fact differs, the code causes the drift."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Pairs each run of `after` with the run of `before` of the same mode and variant."""

    before: Group
    after: Group

    @property
    def regimes(self) -> Sequence[str]:
        """Regimes of the later group, then those that only the earlier one has."""
        return list(dict.fromkeys(run.regime for run in (*self.after.runs, *self.before.runs)))

    @cached_property
    def differences(self) -> EnvironmentDifferences:
        """Facts of the environment that differ, sorted by name."""
        ours, theirs = _environment(self.before), _environment(self.after)
        return tuple(
            (key, _shown(ours[key]), _shown(theirs[key]))
            for key in sorted(ours.keys() | theirs.keys())
            if ours[key] != theirs[key]
        )

    def shown(self, matched: Sequence[Matched]) -> Group:
        """Both groups: the earlier runs are plotted next to the later ones."""
        later = (candidate.run for each in matched for candidate in each.candidates)
        earlier = (run for regime in self.regimes for run in self._renamed(regime))
        name = f"{self.after.name}-vs-{self.before.name}"
        return replace(self.after, name=name, runs=(*later, *earlier), timed_runs=())

    def unmatched(self, matched: Sequence[Matched]) -> str:
        """A sentence if no run has a counterpart in the earlier group; otherwise empty."""
        if any(candidate.held for each in matched for candidate in each.candidates):
            return ""
        return f"no run has its like in group {self.before.name}"

    def agreement(self, matched: Sequence[Matched]) -> str:
        """`2 of 3 modes agree with group july to the last bit; flash was not run in july`."""
        held: dict[str, list[Held]] = {}
        new: dict[str, list[str]] = {}
        for each in matched:
            for candidate in each.candidates:
                run = candidate.run
                if run.replay:
                    continue
                held.setdefault(run.label, []).extend(candidate.held)
                if candidate.new:
                    new.setdefault(run.label, []).append(each.comparison.name)
        compared = {label: [h.pair for h in each if h.pair] for label, each in held.items()}
        equal = [
            label
            for label, pairs in compared.items()
            if pairs and all(drift.max == 0 for pair in pairs for drift in pair.drifts.values())
        ]
        close = [label for label in held if held[label] and label not in equal]
        has_floor = any(each.comparison.floors for each in matched)
        near = "as closely as rounding allows" if has_floor else "within the thresholds"
        parts = []
        for labels, how in ((equal, "to the last bit"), (close, near)):
            if labels:
                verb = "agree" if len(labels) > 1 or len(held) > 1 else "agrees"
                parts.append(
                    f"{_how_many(len(labels), len(held))} {verb} with {self._baseline} {how}"
                )
        was = "were" if len(new) > 1 else "was"
        absent = ", ".join(
            label if not held[label] else f"{label} in {' and '.join(regimes)}"
            for label, regimes in new.items()
        )
        parts += [f"{absent} {was} not run in {self.before.name}"] if absent else []
        return "; ".join(parts)

    def match(self, regime: str) -> Matched:
        """Measure each later run against its counterpart, and the replays of both groups."""
        baseline = self._baseline
        repeated = [run for run in self.before.runs if run.regime == regime]
        before = {run.label: run for run in repeated if not run.replay}
        later = [run for run in self.after.runs if run.regime == regime]
        runs = (*later, *self._missing(before, later))
        extents = {
            run.label: extent_of(base, run, is_audited=has_noise_regime(self.after, run))
            for run in runs
            if kind_of(regime) != NOISE
            and not run.replay
            and (base := before.get(run.label))
            and base.trajectory
            and run.trajectory
        }
        judged = [
            (labelled(before[run.label], baseline, extent), labelled(run, extent=extent))
            for run in runs
            if not run.replay and (extent := extents.get(run.label))
        ]
        ours, theirs = _replays(regime, repeated), _replays(regime, runs)
        pairs = compare_pairs(regime, [*judged, *ours, *theirs])
        floor = floor_of(pairs[len(judged) :])
        reference = run_of(runs, REFERENCE)
        shown = [
            extent.applied(pair) for extent, pair in zip(extents.values(), pairs, strict=False)
        ]
        comparison = RegimeComparison(
            name=regime,
            runs=(*(run for run in runs if not run.replay), *self._renamed(regime)),
            baseline=baseline,
            pairs=tuple(shown),
            replays={pair.mode: pair for pair in pairs[len(judged) + len(ours) :]},
            floors={baseline: floor} if floor else {},
            largest=largest_of(shown),
            audits=audits_of(runs, reference),
        )
        audited = audits_of(repeated, run_of(repeated, REFERENCE))
        candidates = [
            self._candidate(run, before.get(run.label), comparison, extents, audited)
            for run in runs
        ]
        return Matched(comparison=comparison, candidates=candidates, reference=reference)

    @property
    def _baseline(self) -> str:
        return f"group {self.before.name}"

    def _candidate(
        self,
        run: ModeRun,
        base: ModeRun | None,
        regime: RegimeComparison,
        extents: Mapping[str, Extent],
        audited: Mapping[str, NoiseAudit],
    ) -> Candidate:
        """A run, held against its counterpart.

        Args:
            audited: audits of the earlier runs, by label.
        """
        if run.replay:
            return Candidate(run=run)
        if base is None:
            return Candidate(
                run=run, new=f"new in {regime.name}: {regime.baseline} has no such run"
            )
        is_noise = kind_of(regime.name) == NOISE
        extent = audits_alone(regime.baseline) if is_noise else extents.get(run.label, WHOLE)
        is_settled = is_noise or extent.own_noise is not None or noise_is_matched(base, run)
        named = replace(base, mode=regime.baseline, variant="")
        unlike = [
            *judge_likeness(named, run, is_noise_settled=is_settled),
            *_unlike_settings(base, run, regime),
        ]
        at_fault = [*judge_run(base), *judge_noise(base, audited.get(base.label))]
        held = Held(
            pair=regime.pair(run.label),
            floor=regime.floor_for(run.label),
            findings=[*(_at_fault(f, regime.baseline) for f in at_fault), *unlike],
            unlike=bool(unlike),
            extent=extent,
            other_environment=[key for key, _, _ in self.differences if key not in _CODE],
        )
        return Candidate(run=run, held=[held])

    def _renamed(self, regime: str) -> list[ModeRun]:
        """The earlier group's runs under labels of their own."""
        return [
            replace(run, mode=earlier_label(run.label, self._baseline), variant="")
            for run in self.before.runs
            if run.regime == regime and not run.replay
        ]

    def _missing(self, before: Mapping[str, ModeRun], later: Sequence[ModeRun]) -> list[ModeRun]:
        """Placeholders for the runs that only the earlier group has."""
        known = {run.label for run in later if not run.replay}
        return [
            ModeRun(
                mode=run.mode,
                regime=run.regime,
                variant=run.variant,
                trajectory_missing=f"group {self.before.name} has it and "
                f"group {self.after.name} has not",
            )
            for label, run in before.items()
            if label not in known and run.status is not Status.MISSING
        ]


def _how_many(some: int, every: int) -> str:
    """`all 3 modes`, or `2 of 3 modes`."""
    modes = f"mode{'s' * (every != 1)}"
    everybody = f"all {every} {modes}" if every > 1 else "the one mode"
    return everybody if some == every else f"{some} of {every} {modes}"


def _replays(regime: str, runs: Sequence[ModeRun]) -> list[tuple[Labelled, Labelled]]:
    """Sound replays of a group's own baseline, each paired with the run it repeats."""
    base = run_of(runs, REFERENCE if kind_of(regime) == CLIP else BASELINE)
    if base is None or base.trajectory is None:
        return []
    return [
        (labelled(base), labelled(run, run.title))
        for run in runs
        if run.replay and run.label == base.label and run.trajectory and is_sound(base, run)
    ]


def _at_fault(finding: Finding, baseline: str) -> Finding:
    return replace(
        finding,
        verdict=Verdict.INCONCLUSIVE,
        sentence=f"cannot be held against {baseline}: there, {finding.sentence}",
        against=baseline,
        observable=None,
        value=None,
        culprit=None,
    )


def _unlike_settings(base: ModeRun, run: ModeRun, regime: RegimeComparison) -> list[Finding]:
    ours, theirs = _settings(base), _settings(run)
    reasons = [
        f"{name} {theirs[name]}, not {value}"
        for name, value in ours.items()
        # A setting that was not recorded is not known to differ.
        if theirs.get(name, value) != value
    ]
    if not reasons:
        return []
    return [
        Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=regime.name,
            sentence=f"cannot be compared with {regime.baseline} in {regime.name}: "
            f"it ran with {' and '.join(reasons)}",
            against=regime.baseline,
        )
    ]


_SHOWN_OR_EQUAL = ("name", "vocab_size", "num_labels", "gradient_checkpointing")
"""Fields of the model that the record shows by the hash of its weights, or that change no number.
Every other field, a new one too, has to be equal."""


def _settings(run: ModeRun) -> dict[str, object]:
    """Settings that affect the result of a run and that its record does not show."""
    job, setup = run.job, run.setup
    if job is None or setup is None:
        return {}
    settings: dict[str, object] = {
        **{name: value for name, value in vars(job.model).items() if name not in _SHOWN_OR_EQUAL},
        "param_dtype": job.performance.param_dtype,
        "optimizer": setup.optimizer,
        "learning_rate": setup.learning_rate,
        "seed": job.seed,
    }
    if run.mode == REFERENCE:
        settings["reference_dtype"] = job.performance.reference_dtype
    return settings


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
