"""A hypothesis, and the test of whether it explains what a mode recorded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts, Quantity
from dpsgd_track.comparison.measure.observables import relative
from dpsgd_track.record.trajectory import Floats, sketch_distance, sketch_length

_BETTER = 5.0
"""Times by which a prediction has to be closer than the right value is."""
_CLOSEST = 2e-5
"""Error that a prediction may have in any case: it is made of float32 numbers."""
_LIMITS = 3.0
"""Error that it may have in units of what rounding explains."""
_SMALL, _SMALL_SAMPLE = 0.05, 1e-3
"""Least unit of an error: of a parameter, as a share of the length of all, and of a sample's
number, as a share of the largest."""


_LARGE_SHARE, _ENOUGH_PARAMETERS = 0.02, 4
"""Parameters whose rounding errors are compared: their least share of the length, and number."""


@dataclass(frozen=True)
class Fitted:
    """A prediction with a constant that was chosen to agree best."""

    values: Floats
    shown: str
    """The constant, in words, for the `{}` of the sentence."""


Prediction = Floats | Fitted | None
"""Predicted values, in the shape of what is observed; None where it does not apply."""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A mistake that a mode may make."""

    sentence: str
    """The computation, as a clause about the stage's result; `{}` is the fitted constant."""
    predict: Callable[[Facts], Prediction]
    is_hint: bool = False
    """True if it agrees in size only, so that it predicts no number."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A hypothesis that agrees with the record."""

    sentence: str
    name: str = ""
    """Sentence without numbers: equal for the same mistake in two comparisons."""
    is_hint: bool = False

    @property
    def is_named(self) -> bool:
        """False of a constant that was fitted and has no other meaning, and of a mere size."""
        return "{}" not in self.name and not self.is_hint

    @property
    def subject_free(self) -> str:
        """Name without what it is said of: `multiplied by 2`, `zero, left out altogether`."""
        return self.name.removeprefix("they are ").removeprefix("it is ").replace("ones", "one")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A stage's result, and the hypotheses about it."""

    observed: Callable[[Facts], Floats]
    """The result that the mode recorded."""
    right: Callable[[Facts], Floats]
    """The result without a mistake."""
    levels: Sequence[Sequence[Hypothesis]]
    """Simplest first."""
    late: Sequence[Sequence[Hypothesis]] = ()
    """Those that say less than that the result is a multiple of the right one."""
    is_sketch: bool = False
    """True if the last axis holds projections, so that a distance is taken over it."""
    be: str = "they are"
    """Beginning of a clause about the result."""
    is_noise: bool = False
    """True if it is noise."""
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Explanations of a multiple, by `multiplied` or `divided` and the symbol of the quantity."""
    zero: str = ""
    """Clause on a result of zero, if it is more than that."""
    zero_in_all: str = ""
    """The same where it is zero in all parameters."""


def off_as_rounded(
    observed: Floats, right: Floats, size: Floats, *, bits: int = 8, is_once: bool = False
) -> bool:
    """True if tensors are off by as much as rounding their elements makes them.

    Args:
        observed, right: [S, Q, K] projections.
        size: [S, Q] lengths of what is rounded.
        bits: of a rounded number: 8 in bfloat16, 11 in float16 and TF32.
        is_once: True if each element is rounded once, which makes the error known.
    """
    total = np.sqrt(np.square(size).sum(axis=1, keepdims=True))
    is_large = size > _LARGE_SHARE * total
    with np.errstate(all="ignore"):
        off = (sketch_distance(observed, right) / size)[is_large]
    off = off[np.isfinite(off)]
    if off.size < _ENOUGH_PARAMETERS or not off.all():
        return False
    spread = float(np.quantile(off, 0.9)) / float(np.quantile(off, 0.1))
    # One rounding makes a tensor wrong by 2^-(bits + 1.3) of its length, several make it more so.
    # Projections of small tensors scatter.
    lost = -math.log2(float(np.median(off))) - bits
    if is_once:
        # Weights near a power of two, such as the ones of a norm, are rounded by less.
        return spread < 6 and 0.9 < lost < 1.7
    return spread < 4 and 0.5 < lost < 3.5


def share_lost(observed: Floats, right: Floats) -> float | None:
    """Share of the squared length that is missing, if elements are right or else zero.

    Then the product of the two is the squared length of what is left, up to the error of sketches.

    Args:
        observed, right: [S, Q, K] projections.
    Returns:
        None where that is not so, or where too few projections were recorded to tell.
    """
    with np.errstate(all="ignore"):
        is_there = np.isfinite(observed) & np.isfinite(right) & (right != 0)
    if is_there.sum() < _ENOUGH_PROJECTIONS:
        return None
    a, b = observed[is_there], right[is_there]
    whole = float(np.square(b).sum())
    left, common = float(np.square(a).sum()) / whole, float((a * b).sum()) / whole
    spread = _SPREADS * math.sqrt(2 / is_there.sum())
    is_part = spread < left < 1 - spread
    return 1 - common if is_part and abs(left - common) < spread else None


def in_some_elements(facts: Facts, observed: Floats, right: Floats) -> Prediction:
    """The recorded tensors, if they are right in some elements and zero in the others.

    Elements that lack some of their terms look alike, where these have nothing to do with the rest.

    Args:
        observed, right: [S, Q, K] projections.
    """
    lost = share_lost(observed[facts.rows], right[facts.rows])
    return None if lost is None else Fitted(observed, f"{lost:.0%}")


_ENOUGH_PROJECTIONS, _SPREADS = 512, 3.0
"""Projections from which lengths are told, and the standard deviations of their error allowed."""


def explanations(facts: Facts, subject: Subject, limit: float) -> tuple[Explanation, ...]:
    """The simplest hypotheses that agree with the record; none if none does.

    A hypothesis that agrees in all numbers is preferred to one that agrees in the wrong ones alone.

    Args:
        limit: relative error that rounding explains.
    """
    with warnings.catch_warnings():
        # A step without samples, or a field that is not computed, has no mean and no largest.
        warnings.simplefilter("ignore", RuntimeWarning)
        return _explanations(facts, subject, limit)


def _explanations(facts: Facts, subject: Subject, limit: float) -> tuple[Explanation, ...]:
    trial = _Trial(facts, subject, limit)
    if not trial.is_wrong.any():
        return ()
    zero = _zero(subject, facts)
    levels = [zero, _multiples(subject, facts), *subject.levels]
    levels += [_constant(subject, trial), *subject.late]
    # What is missing wherever it is wrong needs no formula; a step may be skipped by a law.
    if not subject.zero and (missing := tuple(trial.agreeing(zero[:1], trial.is_wrong))):
        return missing
    # What explains every wrong number is told before a mere size that fits all of them.
    for is_hint in (False, True):
        tried = [[h for h in level if h.is_hint is is_hint] for level in levels]
        for cells in (np.ones_like(trial.is_wrong), trial.is_wrong):
            for level in tried:
                found = {each.name: each for each in trial.agreeing(level, cells)}
                if found:
                    return tuple(found.values())
    return ()


def residual(facts: Facts, subject: Subject) -> Floats:
    """Errors of the right value, [rows, ...], in units of it: of a sample or a parameter."""
    return _Trial(facts, subject, 0.0).errors(subject.right(facts))


class _Trial:
    """Records that the hypotheses are held against."""

    def __init__(self, facts: Facts, subject: Subject, limit: float) -> None:
        self.facts, self.subject = facts, subject
        self.observed, self.right = subject.observed(facts), subject.right(facts)
        self.unit = self._unit()
        self.allowed = max(_LIMITS * limit, _CLOSEST)
        self.deviation = self.errors(self.right)
        self.is_wrong: NDArray[np.bool_] = self.deviation > self.allowed

    def _unit(self) -> Floats:
        """[S, ...] unit of an error of each sample or parameter."""
        if self.subject.is_sketch:
            length = sketch_length(self.right)
            total = np.sqrt(np.square(length).sum(axis=1, keepdims=True))
            return np.maximum(length, _SMALL * total)
        size = np.abs(self.right)
        return np.maximum(size, _SMALL_SAMPLE * np.nanmax(size, initial=0.0))

    def errors(self, predicted: Floats) -> Floats:
        """[rows, ...] errors of a prediction; 0 where nothing was recorded."""
        rows = self.facts.rows
        with np.errstate(all="ignore"):
            a, b = np.broadcast_arrays(self.observed[rows], predicted[rows])
            difference = sketch_distance(a, b) if self.subject.is_sketch else np.abs(a - b)
            errors = relative(self.unit[rows], difference, 0.0, 0.0)
        if not self.subject.is_sketch:
            errors[np.isnan(self.observed[rows])] = 0.0
        return np.nan_to_num(errors, nan=np.inf)

    def agreeing(
        self, level: Sequence[Hypothesis], cells: NDArray[np.bool_]
    ) -> Iterator[Explanation]:
        """Those hypotheses whose predictions agree in `cells`, [rows, ...]."""
        allowed = min(self.allowed, float(self.deviation[cells].max()) / _BETTER)
        for hypothesis in level:
            with np.errstate(all="ignore"):
                predicted = hypothesis.predict(self.facts)
            values = predicted.values if isinstance(predicted, Fitted) else predicted
            if values is None or self.errors(values)[cells].max() > allowed:
                continue
            shown = predicted.shown if isinstance(predicted, Fitted) else ""
            sentence = hypothesis.sentence.replace("{}", shown)
            yield Explanation(
                sentence=sentence, name=hypothesis.sentence, is_hint=hypothesis.is_hint
            )


def _be(subject: Subject) -> tuple[str, str]:
    return subject.be, "right ones" if subject.be.endswith("are") else "right one"


def _zero(subject: Subject, facts: Facts) -> Sequence[Hypothesis]:
    be, right = _be(subject)
    is_all = len(facts.columns) == len(facts.ours.parameter_names)
    zero = is_all * subject.zero_in_all or subject.zero
    return (
        Hypothesis(
            sentence=zero or f"{be} zero, left out altogether",
            predict=lambda facts: np.zeros_like(subject.right(facts)),
        ),
        Hypothesis(
            sentence=f"{be} the negative of the {right}",
            predict=lambda facts: -subject.right(facts),
        ),
    )


def _multiples(subject: Subject, facts: Facts) -> Sequence[Hypothesis]:
    return [
        _multiple(subject, quantity, is_inverse=is_inverse)
        for quantity in (
            *facts.quantities(),
            *(facts.noise_quantities() if subject.is_noise else ()),
        )
        for is_inverse in (False, True)
    ]


def _multiple(subject: Subject, quantity: Quantity, *, is_inverse: bool) -> Hypothesis:
    be, right = _be(subject)
    how = "divided" if is_inverse else "multiplied"

    def predict(facts: Facts) -> Prediction:
        values = subject.right(facts)
        factor = np.asarray(quantity.value, dtype=np.float64) ** (-1 if is_inverse else 1)
        # An empty step has nothing to divide by.
        factor = np.where(np.isfinite(factor), factor, 1.0)
        factor = factor.reshape(-1, *[1] * (values.ndim - 1)) if factor.ndim else factor
        return np.asarray(values * factor)

    reason = subject.reasons.get((how, quantity.symbol), "")
    reason = f", {reason}" if reason else ""
    sentence = f"{be} the {right} {how} by {quantity.text}{reason}"
    return Hypothesis(sentence=sentence, predict=predict)


def _constant(subject: Subject, trial: _Trial) -> Sequence[Hypothesis]:
    """One unnamed factor."""
    be, right = _be(subject)
    is_wrong = trial.is_wrong
    num_steps = int(is_wrong.reshape(len(is_wrong), -1).any(axis=1).sum())
    of_all = "every step" if num_steps == len(is_wrong) else f"{num_steps} of {len(is_wrong)} steps"
    throughout = f" in {of_all}" if num_steps > 1 else ""

    def predict(facts: Facts) -> Prediction:
        cells = is_wrong[..., None] if subject.is_sketch else is_wrong
        a, b = trial.right[facts.rows], trial.observed[facts.rows]
        used = np.broadcast_to(cells, a.shape) & np.isfinite(a) & np.isfinite(b)
        square = float(np.square(a[used]).sum())
        if not square:
            return None
        factor = float((a * b)[used].sum()) / square
        return Fitted(
            factor * trial.right, f"{factor:.6g}" if abs(factor - 1) < 0.01 else f"{factor:.4g}"
        )

    return [Hypothesis(sentence=f"{be} {{}} times the {right}{throughout}", predict=predict)]
