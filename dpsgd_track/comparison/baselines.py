"""One group: each mode is compared with the baseline of each regime, and with the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from dpsgd_track.comparison.audit.noise import audits_of
from dpsgd_track.comparison.extent import WHOLE, Extent, extent_of, first_clipped
from dpsgd_track.comparison.measure.drift import Pair, compare_pairs
from dpsgd_track.comparison.measure.floor import Floor, floor_of
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
    LargestDrift,
    RegimeComparison,
    largest_of,
)
from dpsgd_track.comparison.verdict import Finding, Verdict, judge_gaps, judge_likeness, judge_run
from dpsgd_track.config import CLIP, NOISE, PLAIN, kind_of
from dpsgd_track.modes.table import BASELINE, REFERENCE, is_private
from dpsgd_track.record.run import Group, ModeRun
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Pairs each run of `group` with the baseline and the oracle of its regime."""

    group: Group
    all_pairs: bool
    """Compare every two modes, including pairs without a baseline."""
    differences: EnvironmentDifferences = ()

    @property
    def regimes(self) -> Sequence[str]:
        """Names of the regimes, in the order in which the launcher ran them."""
        return list(dict.fromkeys(run.regime for run in self.group.runs))

    def shown(self, matched: Sequence[Matched]) -> Group:
        """The group itself."""
        return self.group

    def unmatched(self, matched: Sequence[Matched]) -> str:
        """Always empty: each run reports its own lack of a baseline."""
        return ""

    def agreement(self, matched: Sequence[Matched]) -> str:
        """`all 4 modes agree as closely as rounding allows`."""
        regimes = [each.comparison for each in matched]
        has_floor = any(regime.floors for regime in regimes)
        how = "as closely as rounding allows" if has_floor else "within the thresholds"
        labels = {run.label for regime in regimes for run in regime.runs}
        return f"all {len(labels)} modes agree {how}"

    def match(self, regime: str) -> Matched:
        """Measure each pair of one regime, reading each record once."""
        runs = tuple(run for run in self.group.runs if run.regime == regime)
        plain, reference = _bases(regime, runs)
        clipped = first_clipped(runs)
        # Where samples are clipped, ordinary training is no measure of modes that clip.
        baseline = reference or plain if clipped else plain
        bases = _distinct(baseline, reference)
        # Runs of the noise regime differ by design, since each has its own noise.
        recorded = [r for r in runs if r.trajectory and not r.replay]
        recorded = [] if kind_of(regime) == NOISE else recorded
        # The oracle is never judged: if it and no_dp differ, no_dp is at fault.
        extents = {
            (base.label, run.label): extent_of(
                base, run, clipped, is_audited=has_noise_regime(self.group, run)
            )
            for base in bases
            for run in recorded
            if run.label not in (base.label, REFERENCE)
        }
        repeats = [
            (base, run)
            for base in _distinct(plain, reference)
            for run in runs
            if run.replay and run.label == base.label and run.trajectory
        ]
        shown, replays, rest = self._measured(regime, recorded, extents, repeats)
        comparison = RegimeComparison(
            name=regime,
            runs=tuple(r for r in runs if not r.replay),
            baseline=baseline.label if baseline else "",
            pairs=shown,
            replays={pair.mode: pair for pair in replays},
            floors=_floors(repeats, replays),
            largest=_largest(recorded, (*shown, *rest)) if self.all_pairs else {},
            audits=audits_of(runs, reference),
        )
        in_type = _in_type(repeats, replays)
        candidates = [
            Candidate(
                run=run,
                held=[
                    _held(
                        run,
                        base,
                        comparison,
                        extents.get((base.label, run.label), WHOLE),
                        in_type if base is reference else None,
                    )
                    for base in (_distinct(plain, reference) if run.replay else bases)
                    if base is not run and run is not reference
                ],
                findings=_lacking(run, baseline, comparison),
            )
            for run in runs
        ]
        return Matched(comparison=comparison, candidates=candidates, reference=reference)

    def _measured(
        self,
        regime: str,
        recorded: Sequence[ModeRun],
        extents: Mapping[tuple[str, str], Extent],
        repeats: Sequence[tuple[ModeRun, ModeRun]],
    ) -> tuple[tuple[Pair, ...], list[Pair], list[Pair]]:
        """The pairs of `extents`, those of replays, and all others; each record is read once."""
        by_label = {run.label: run for run in recorded}
        judged = [
            (labelled(by_label[base], extent=extent), labelled(by_label[mode], extent=extent))
            for (base, mode), extent in extents.items()
        ]
        replayed = [(labelled(base), labelled(run, run.title)) for base, run in repeats]
        known = set(map(frozenset, extents))
        rest = [
            (labelled(first), labelled(second))
            for first, second in combinations(recorded, 2)
            if self.all_pairs and frozenset((first.label, second.label)) not in known
        ]
        num_detailed = len(judged) + len(replayed)
        pairs = compare_pairs(regime, [*judged, *replayed, *rest], num_detailed)
        shown = [
            extent.applied(pair) for extent, pair in zip(extents.values(), pairs, strict=False)
        ]
        return tuple(shown), pairs[len(judged) : num_detailed], pairs[num_detailed:]


def _distinct(*runs: ModeRun | None) -> list[ModeRun]:
    return list({run.label: run for run in runs if run}.values())


def _held(
    run: ModeRun,
    base: ModeRun,
    regime: RegimeComparison,
    extent: Extent,
    in_type: Trajectory | None,
) -> Held:
    unlike = list(judge_likeness(base, run, is_noise_settled=extent.own_noise is not None))
    found = list(unlike)
    if extent.clipped and not is_private(base.mode):
        found.append(_clips_unlike(regime, base, extent))
    replay = regime.replays.get(run.title)
    if replay and replay.baseline == base.label:
        found += judge_gaps(replay)
    pair = None if run.replay else regime.pair(run.label, base.label)
    if pair and any(f.verdict is Verdict.BUG for f in judge_run(base)):
        found.append(_unknown(regime, f"{base.label} is itself at fault", base.label))
    floor = regime.floor_for(run.label, base.label)
    return Held(
        pair=pair, floor=floor, plain=in_type, findings=found, unlike=bool(unlike), extent=extent
    )


def _clips_unlike(regime: RegimeComparison, base: ModeRun, extent: Extent) -> Finding:
    why = (
        f"cannot be compared with {base.label} in {regime.name}: {extent.reason}. Run "
        f"{REFERENCE} beside it, which clips, or raise --max-grad-norm"
    )
    return Finding(
        verdict=Verdict.INCONCLUSIVE, regime=regime.name, sentence=why, against=base.label
    )


def _lacking(run: ModeRun, baseline: ModeRun | None, regime: RegimeComparison) -> list[Finding]:
    if baseline is None and kind_of(regime.name) != NOISE:
        return [_unknown(regime, "there is no baseline to compare with")]
    if baseline and run is baseline and not regime.pairs:
        return [_unknown(regime, "there is nothing to compare with")]
    return []


def _unknown(regime: RegimeComparison, why: str, against: str = "") -> Finding:
    return Finding(
        verdict=Verdict.INCONCLUSIVE,
        regime=regime.name,
        sentence=f"{why} in {regime.name}",
        against=against,
    )


def _bases(regime: str, runs: Sequence[ModeRun]) -> tuple[ModeRun | None, ModeRun | None]:
    """The baseline and the oracle of a regime, each None if it was not recorded."""
    if kind_of(regime) == NOISE:
        return None, None
    recorded = [run for run in runs if run.trajectory]
    # no_dp clips nothing, so in the clip regime only the oracle can be the baseline.
    reference = run_of(recorded, REFERENCE)
    plain = None if kind_of(regime) == CLIP else run_of(recorded, BASELINE)
    # A single mode can still be the baseline of its variants.
    installed = (run_of(recorded, run.mode) for run in runs if run.variant)
    return plain or reference or next(filter(None, installed), None), reference


def _in_type(
    repeats: Sequence[tuple[ModeRun, ModeRun]], replays: Sequence[Pair]
) -> Trajectory | None:
    """The reference's sound replay in the modes' type, aligned with it."""
    return next(
        (
            pair.aligned.other
            for (base, run), pair in zip(repeats, replays, strict=True)
            if (base.label, run.replay) == (REFERENCE, PLAIN) and is_sound(base, run)
        ),
        None,
    )


def _floors(repeats: Sequence[tuple[ModeRun, ModeRun]], replays: list[Pair]) -> dict[str, Floor]:
    """The joint floor of all sound replays, by the label of each base."""
    sound: list[Pair] = []
    against_float64 = False
    for (base, run), pair in zip(repeats, replays, strict=True):
        if not is_sound(base, run):
            continue
        sound.append(pair)
        exact = base.job is None or base.job.performance.reference_dtype == "float64"
        against_float64 |= run.replay == PLAIN and exact
    # The largest counts for all, since each replay is one draw of the rounding error.
    floor = floor_of(sound, against_float64=against_float64)
    return dict.fromkeys((base.label for base, _ in repeats), floor) if floor else {}


def _largest(
    recorded: Sequence[ModeRun], pairs: Sequence[Pair]
) -> dict[ObservableName, LargestDrift]:
    by_labels = {frozenset((pair.baseline, pair.mode)): pair for pair in pairs}
    labels = [run.label for run in recorded]
    # Of equal drifts the first counts, in the launcher's order.
    return largest_of(by_labels[frozenset(both)] for both in combinations(labels, 2))
