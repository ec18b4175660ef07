"""Findings from biases: which stage is wrong on average, where, and what inherits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpsgd_track.comparison.audit.consistency import Inconsistency
from dpsgd_track.comparison.diagnose.culprit import Culprit, alone, describe, where_it_arose
from dpsgd_track.comparison.diagnose.ladder import Rung, StageStatus, first_introduced
from dpsgd_track.comparison.measure.amount import share
from dpsgd_track.comparison.measure.bias import Bias, Biases, Outlier, Scatter
from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.measure.excess import Excess
from dpsgd_track.comparison.measure.observables import OBSERVABLES
from dpsgd_track.comparison.verdict import SURE, Finding, Verdict
from dpsgd_track.config import Thresholds
from dpsgd_track.record.stages import ObservableName, Stage

_EVIDENCE: dict[Stage, tuple[ObservableName, ...]] = {
    Stage.LOSS: (ObservableName.SAMPLE_LOSS,),
    Stage.NORMS: (ObservableName.SAMPLE_NORM_BY_PARAMETER, ObservableName.SAMPLE_NORM),
    Stage.SUM: (ObservableName.GRADIENT, ObservableName.GRAD_NORM),
}
"""Observables that show a bias of a stage; one that names parameters comes first."""
_BY_PARAMETER = ObservableName.SAMPLE_NORM_BY_PARAMETER
_INHERITING = (Stage.NORMS, Stage.FACTORS, Stage.SUM)
"""Stages whose error follows from that of an earlier one."""
_PER_FACTOR = 2.0
"""Share of the clip factors' error by which a sum may be off: samples do not weigh alike."""


@dataclass(frozen=True, kw_only=True)
class BiasFinding:
    """The first stage with a bias, as a finding and as what waivers are matched with."""

    stage: Stage
    finding: Finding
    excess: Excess

    def blamed(self, rungs: Sequence[Rung], broken: Sequence[Inconsistency]) -> tuple[Rung, ...]:
        """`rungs` with the biased stage at fault, and later ones inheriting its error.

        Args:
            broken: relations between its own numbers that the mode violates.
        """
        stages = list(Stage)
        at = stages.index(self.stage)
        by_itself = {each.stage for each in broken}

        def changed(rung: Rung) -> Rung:
            if rung.stage is self.stage:
                return self._rung(rung)
            inherits = (
                rung.status is StageStatus.INTRODUCED
                and rung.stage in _INHERITING
                and stages.index(rung.stage) > at
                and rung.stage not in by_itself
            )
            return replace(rung, status=StageStatus.INHERITED) if inherits else rung

        return tuple(map(changed, rungs))

    def _rung(self, rung: Rung) -> Rung:
        culprit = self.finding.culprit
        assert culprit is not None
        return replace(
            rung,
            status=StageStatus.INTRODUCED,
            observable=culprit.observable,
            value=culprit.value,
            limit=culprit.limit,
            step=culprit.step,
            where=self.finding.where,
            items=culprit.places,
        )


def judge_bias(
    biases: Biases | None,
    rungs: Sequence[Rung],
    pair: Pair,
    thresholds: Thresholds,
) -> BiasFinding | None:
    """The first stage that is biased, unless its largest differences show an error already.

    Args:
        rungs: the ladder of the largest differences.
        pair: the mode and the reference.
    """
    if biases is None:
        return None
    first = first_introduced(rungs)
    # What fails in a later step may be the effect of the bias.
    counts = first is not None and (first.step is None or first.step <= biases.steps[-1])
    for stage in Stage:
        if first and counts and stage is first.stage:
            return None
        for name in _EVIDENCE.get(stage, ()):
            shown = _of_bias(biases, name) or _of_scatter(biases, name)
            shown = shown or _of_outlier(biases, name)
            if shown and name in pair.drifts:
                return _finding(stage, shown, pair, pair.drifts[name], thresholds)
    return None


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """An error of one observable that means over samples show."""

    places: tuple[str, ...]
    value: float
    limit: float
    evidence: str
    step: int
    samples: tuple[int, ...] = ()
    by_item: Sequence[float]
    limits: Sequence[float]


def _of_bias(biases: Biases, name: ObservableName) -> _Shown | None:
    bias = biases.by_observable.get(name)
    if bias is None:
        return None
    failing = np.flatnonzero(_unexplained(bias, biases))
    if not len(failing):
        return None
    failing = failing[np.argsort(-bias.times[failing], kind="stable")]
    worst = int(failing[0])
    places = tuple(bias.places[i] for i in failing if bias.places[i])
    mean, sign = float(bias.mean[worst]), "-" if bias.mean[worst] < 0 else ""
    arose = where_it_arose(places, bias.places)[0] if name is _BY_PARAMETER else places
    where = f" in {describe(arose, bias.places)}" if places else ""
    up_to = "up to " if len(failing) > 1 else ""
    over = (
        f"{len(biases.steps)} step{'s' * (len(biases.steps) != 1)}"
        if name in _EVIDENCE[Stage.SUM]
        else f"{biases.num_samples} samples"
    )
    return _Shown(
        places=places,
        value=abs(mean),
        limit=float(bias.limit[worst]),
        evidence=f"biased by {up_to}{sign}{share(abs(mean))}{where} over {over}, compared with "
        f"plain autograd in the same type (resolution {share(float(bias.resolution[worst]))})",
        step=int(biases.steps[0]),
        by_item=np.abs(bias.mean).tolist(),
        limits=bias.limit.tolist(),
    )


def _of_scatter(biases: Biases, name: ObservableName) -> _Shown | None:
    scatter = biases.scatter
    if name is not _BY_PARAMETER or scatter is None:
        return None
    places = _scattered(scatter)
    if not places:
        return None
    worst = scatter.places.index(places[0])
    value, limit = float(scatter.std[worst]), float(scatter.limit[worst])
    where = describe(where_it_arose(places, scatter.places)[0], scatter.places)
    return _Shown(
        places=places,
        value=value,
        limit=limit,
        evidence=f"scattered by {'up to ' * (len(places) > 1)}{share(value)} in {where} over "
        f"{biases.num_samples} samples, compared with plain autograd in the same type (its own "
        f"scatter explains {share(limit)})",
        step=int(biases.steps[0]),
        by_item=scatter.std.tolist(),
        limits=scatter.limit.tolist(),
    )


def _scattered(scatter: Scatter) -> tuple[str, ...]:
    """Parameters whose norms scatter too much, worst first."""
    failing = np.flatnonzero(scatter.failing)
    times = scatter.std[failing] / scatter.limit[failing]
    return tuple(scatter.places[i] for i in failing[np.argsort(-times, kind="stable")])


def completed(rungs: Sequence[Rung], biases: Biases | None) -> tuple[Rung, ...]:
    """`rungs`, with parameters whose norms are shown to be wrong by their scatter alone.

    In bfloat16 the largest differences show few of the parameters that inherit an error, and where
    it arose follows from all of them.
    """
    more = _scattered(biases.scatter) if biases and biases.scatter else ()

    def changed(rung: Rung) -> Rung:
        is_at_fault = rung.stage is Stage.NORMS and rung.status is StageStatus.INTRODUCED
        if not (is_at_fault and rung.items):
            return rung
        return replace(rung, items=tuple(dict.fromkeys((*rung.items, *more))))

    return tuple(map(changed, rungs))


def _unexplained(bias: Bias, biases: Biases) -> np.ndarray:
    """[M] biases that are not those of the clip factors, which norms and C explain."""
    if bias.observable not in _EVIDENCE[Stage.SUM]:
        return bias.failing
    return bias.failing & (np.abs(bias.mean) > bias.limit + _PER_FACTOR * biases.factor_error)


def _of_outlier(biases: Biases, name: ObservableName) -> _Shown | None:
    outlier: Outlier | None = next((o for o in biases.outliers if o.observable is name), None)
    if outlier is None:
        return None
    more, up_to = (f" and {outlier.num - 1} more", "up to ") if outlier.num > 1 else ("", "")
    return _Shown(
        places=(),
        value=abs(outlier.value),
        limit=outlier.limit,
        evidence=f"sample {outlier.sample}{more} of {biases.num_samples} is off by {up_to}"
        f"{share(abs(outlier.value))} from plain autograd in the same type (the others explain "
        f"{share(outlier.limit)})",
        step=outlier.step,
        samples=(outlier.sample,) if outlier.num == 1 else (),
        by_item=(abs(outlier.value),),
        limits=(outlier.limit,),
    )


def _finding(
    stage: Stage, shown: _Shown, pair: Pair, drift: Drift, thresholds: Thresholds
) -> BiasFinding:
    observable = OBSERVABLES[drift.observable.name]
    is_norm = stage is Stage.NORMS
    arose, inherited = where_it_arose(shown.places, drift.items) if is_norm else (shown.places, ())
    culprit = alone(
        Culprit(
            regime=pair.regime,
            stage=stage,
            step=shown.step,
            places=arose,
            inherited=inherited,
            samples=shown.samples,
            observable=observable.name,
            value=shown.value,
            limit=shown.limit,
        ),
        shown.evidence,
    )
    times = shown.value / shown.limit
    finding = Finding(
        verdict=Verdict.BUG if shown.value > thresholds.bug or times > SURE else Verdict.DRIFT,
        regime=pair.regime,
        sentence=f"{observable.title} in {pair.regime}: {shown.evidence}",
        against=pair.baseline,
        observable=observable.name,
        value=shown.value,
        threshold=shown.limit,
        step=shown.step,
        where=f"parameter {shown.places[0]}" if shown.places else "",
        culprit=culprit,
    )
    by_item, limits = (np.nan_to_num(np.array([each])) for each in (shown.by_item, shown.limits))
    limits = np.where(limits > 0, limits, np.inf)
    excess = Excess(drift=drift, times=np.array([times]), limits=limits, by_item=by_item)
    return BiasFinding(stage=stage, finding=finding, excess=excess)
