"""The part of two runs that can be compared, where by design they do not do the same throughout.

Ordinary training is compared with a clipping mode up to the first step in which a sample is
clipped. A mode that draws noise of its own is compared up to the noise of the first step: from then
on its weights are others. What is left out is shown as not computed, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from dpsgd_track.comparison.audit.noise.own import OwnNoise, own_noise
from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.clip_factors import factors_by
from dpsgd_track.comparison.measure.drift import Pair
from dpsgd_track.comparison.verdict import noise_is_matched
from dpsgd_track.config import AUTOMATIC, FLAT
from dpsgd_track.demands import Demand
from dpsgd_track.modes.table import REFERENCE, is_private, spec_of
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Trajectory

_FROM_NOISE_ON = frozenset(
    (
        ObservableName.NOISE,
        ObservableName.NOISED_GRADIENT,
        ObservableName.GRAD_NORM_NOISED,
        ObservableName.UPDATE,
        ObservableName.WEIGHTS,
        ObservableName.LAYER_WEIGHT_NORM,
    )
)
# The noise as well: beside a gradient that is not clipped it may be lost in rounding.
_FROM_CLIPPING_ON = _FROM_NOISE_ON | {
    ObservableName.CLIP_FACTOR,
    ObservableName.GRADIENT,
    ObservableName.GRAD_NORM,
    ObservableName.LAYER_GRAD_NORM,
}
_UNAUDITED = "run the noise regime as well, so that it is audited"


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """The first step of a regime in which a sample is clipped."""

    step: int
    bound: float
    """C of that step."""
    rule: str = FLAT
    """Clipping rule."""

    @property
    def told(self) -> str:
        """`C = 1 clips samples from step 0 on`."""
        if self.rule == AUTOMATIC:
            return f"samples are scaled to C = {self.bound:g} from step {self.step} on"
        return f"C = {self.bound:g} clips samples from step {self.step} on"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The part of two runs that is compared."""

    reason: str = ""
    """Reason for leaving something out, as a clause; empty if nothing is."""
    what: str = "all"
    """The comparison's extent in words."""
    last_step: int | None = None
    """Last step that is compared; None for all."""
    left_out: frozenset[ObservableName] = frozenset()
    """Observables that are not compared."""
    clipped: Clipped | None = None
    """The step from which on only one of the two clips."""
    own_noise: OwnNoise | None = None
    """The noise of the run, if it is its own."""

    @property
    def told(self) -> str:
        """`compared only in the loss up to step 0, as ...`; empty if everything is compared."""
        if not self.reason:
            return ""
        when = "" if self.last_step is None else f" up to step {self.last_step}"
        return f"compared only in {self.what}{when}, as {self.reason}"

    def of(self, record: Trajectory) -> Trajectory:
        """The steps of `record` that are compared."""
        if self.last_step is None:
            return record
        return record.rows(0, int(np.searchsorted(record.step, self.last_step, side="right")))

    def applied(self, pair: Pair) -> Pair:
        """`pair` without the observables that are left out."""
        if not self.left_out:
            return pair
        return replace(
            pair,
            drifts={name: d for name, d in pair.drifts.items() if name not in self.left_out},
            not_computed={**pair.not_computed, **dict.fromkeys(self.left_out, self.reason)},
        )


WHOLE = Extent()


def audits_alone(baseline: str) -> Extent:
    """That of two runs with noise of their own, each of which is judged by its own audit."""
    reason = f"each run draws noise of its own; that of {baseline} passes as well"
    return Extent(reason=reason, what="their audits")


def first_clipped(runs: Iterable[ModeRun]) -> Clipped | None:
    """The first step in which C clips a sample, where `runs` include ordinary training.

    The oracle's norms tell. Without it, either the gradient of ordinary training is longer than C,
    so that some sample's is, or the norms of every mode say so. None if nothing is clipped, or if
    all runs clip, or none does.

    Args:
        runs: one regime's.
    """
    recorded = [(run, run.trajectory) for run in runs if run.trajectory and not run.replay]
    plain = [t for run, t in recorded if not is_private(run.mode)]
    private = [t for run, t in recorded if is_private(run.mode)]
    if not plain or not private:
        return None
    oracle = [t for run, t in recorded if run.mode == REFERENCE]
    told = oracle or [t for t in private if not np.isnan(t.sample_norm).all()]
    rule = next((run.setup.clipping for run, _ in recorded if run.setup), FLAT)
    scaled = [_scaled_steps(t, rule) for t in told]
    found = set.intersection(*scaled) if scaled else set()
    if not oracle:
        found = found.union(*map(_steps_longer_than_bound, plain))
    if not found:
        return None
    step, t = min(found), private[0]
    bound = float(t.max_grad_norm[np.searchsorted(t.step, step)])
    return Clipped(step=step, bound=bound, rule=rule)


def _scaled_steps(t: Trajectory, rule: str) -> set[int]:
    """Steps with a sample that the clipping rule scales."""
    factors = factors_by(rule, t)
    is_scaled = (np.isfinite(factors) & (factors != 1)).any(axis=1)
    return set(t.step[is_scaled].tolist())


def _steps_longer_than_bound(t: Trajectory) -> set[int]:
    """Steps whose mean gradient is longer than C: then so is that of some sample."""
    length = t.grad_norm * t.expected_batch_size / np.maximum(t.num_samples, 1)
    return set(t.step[length > t.max_grad_norm].tolist())


def extent_of(
    baseline: ModeRun, run: ModeRun, clipped: Clipped | None = None, *, is_audited: bool
) -> Extent:
    """The part of two runs of one regime that is compared.

    Args:
        clipped: what `first_clipped` says of the regime.
        is_audited: the mode has a run in a noise regime.
    """
    ours, theirs = baseline.trajectory, run.trajectory
    if ours is None or theirs is None or not (ours.num_steps and theirs.num_steps):
        return WHOLE
    first = max(int(ours.step[0]), int(theirs.step[0]))
    unlike = _unlike_clipping(baseline, run, first, clipped)
    own = own_noise(ours, theirs) if _may_draw_its_own(baseline, run) else None
    if own is None and not any(map(_draws_its_own, (baseline, run))):
        return unlike
    stands_still = run.setup is not None and run.setup.learning_rate == 0
    ends = [end for end in (unlike.last_step, None if stands_still else first) if end is not None]
    told = f"it takes no {Demand.GIVEN_NOISE}"
    if own is not None:
        std, low, high = own.std
        told = (
            f"it draws noise of its own, with std {std:.3f} sigma C ({low:.3f} to {high:.3f}) and "
            f"uncorrelated with the baseline's ({number(own.correlation)})"
        )
    told += ", which its audit judges" if is_audited else f"; {_UNAUDITED}"
    return Extent(
        reason=" and ".join(filter(None, (unlike.reason, told))),
        what="the loss" if unlike.left_out else "what comes before the noise",
        last_step=min(ends, default=None),
        left_out=unlike.left_out | _FROM_NOISE_ON,
        clipped=unlike.clipped,
        own_noise=own,
    )


def _unlike_clipping(
    baseline: ModeRun, run: ModeRun, first: int, clipped: Clipped | None
) -> Extent:
    if clipped is None or is_private(baseline.mode) == is_private(run.mode):
        return WHOLE
    plain = run if is_private(baseline.mode) else baseline
    is_at_once = clipped.step <= first
    return Extent(
        reason=f"{clipped.told} and {plain.label} clips none",
        what="the loss" if is_at_once else "all",
        last_step=first if is_at_once else clipped.step - 1,
        left_out=_FROM_CLIPPING_ON if is_at_once else frozenset(),
        clipped=clipped,
    )


def _draws_its_own(run: ModeRun) -> bool:
    """True if the mode of `run` says that it adds other noise than it is given."""
    return run.facts is not None and Demand.GIVEN_NOISE in run.facts.declined


def _may_draw_its_own(baseline: ModeRun, run: ModeRun) -> bool:
    """True if other noise than the baseline's need not be a fault.

    Built-in modes draw from the source that they are given.
    """
    is_users = spec_of(run.mode) is None or spec_of(baseline.mode) is None
    return is_users or not noise_is_matched(baseline, run)
