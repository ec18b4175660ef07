"""Numbers of samples that are wrong by what the samples are: their size, place, or micro-batch.

Legend: S steps, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.record.parts import TARGETS, TOKENS
from dpsgd_track.record.trajectory import UNUSED, Floats

_ALIKE = 3e-4
"""Relative spread up to which factors are one."""
_POWERS = (1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1.5, -1.5)
_FEWEST_VALUES, _ENOUGH = 3, 8
"""Values of an attribute, and samples, that a law is told from."""
_SHOWN = 4


@dataclass(frozen=True)
class Attribute:
    """A number of each sample, [S, N]."""

    values: Floats
    text: str
    """`the number of its tokens`."""
    counted: str = ""
    """Things that it numbers from 1, and sentences from 0: `step`."""

    def side(self, least: float, *, is_above: bool, levels: Floats) -> str:
        """Words for the samples on one side of a value."""
        if self.counted:
            number = f"{self.counted} {least - 1:.3g}"
            return f"from {number} on" if is_above else f"before {number}"
        where = _from(least, levels) if is_above else f"less than {least:.3g}"
        return f"where {self.text} is {where}"


def attributes(facts: Facts) -> Iterator[Attribute]:
    """Numbers that are known of each sample."""
    shape = facts.theirs.sample_index.shape
    sizes = facts.ours.sample_size
    if sizes.shape[-1]:
        tokens, targets = (sizes[..., place].astype(np.float64) for place in (TOKENS, TARGETS))
        yield Attribute(tokens, "the number of its tokens")
        yield Attribute(targets, "the number of its targets")
        for values, what in ((tokens, "tokens"), (targets, "targets")):
            longest = facts.by_batch(values, lambda own: np.broadcast_to(own.max(), own.shape))
            total = facts.by_batch(values, lambda own: np.broadcast_to(own.sum(), own.shape))
            if total is not None:
                yield Attribute(total, f"the number of {what} in its micro-batch")
            if longest is not None:
                yield Attribute(
                    values / longest, f"its {what} as a share of the longest in the micro-batch"
                )
    place, size, number = (np.full(shape, np.nan) for _ in range(3))
    for batch in facts.micro_batches:
        place[batch.row, batch.places] = np.arange(1, len(batch.places) + 1)
        size[batch.row, batch.places] = len(batch.places)
        number[batch.row, batch.places] = batch.number + 1
    there = np.where(facts.theirs.sample_index == UNUSED, np.nan, 1.0)
    yield Attribute(size, "the number of samples in the micro-batch")
    yield Attribute(place, "its place in the micro-batch, from 1", "place")
    yield Attribute(number, "the number of the micro-batch, from 1", "micro-batch")
    step = there * (facts.theirs.step[:, None] + 1.0)
    yield Attribute(step, "the number of the step, from 1", "step")
    yield Attribute(there * facts.counts[:, None], "the number of samples in the step")


def law_of(facts: Facts, factors: Floats) -> tuple[Floats, str] | None:
    """Factors [S, N] that follow from an attribute alone, and the law in words.

    Args:
        factors: of the samples that tell one, NaN of others.
    """
    chosen = np.zeros(factors.shape, dtype=bool)
    chosen[facts.rows] = np.isfinite(factors[facts.rows])
    if chosen.sum() < _ENOUGH:
        return None
    told = factors[chosen]
    if np.ptp(told) < 10 * _ALIKE * np.abs(told).max():
        return None
    known = [each for each in attributes(facts) if np.isfinite(each.values[chosen]).all()]
    for find in (_power, _two_values, _table):
        for each in known:
            if found := find(each, factors, chosen):
                return found
    return None


def _power(each: Attribute, factors: Floats, chosen: np.ndarray) -> tuple[Floats, str] | None:
    values, told = each.values[chosen], factors[chosen]
    if len(np.unique(values)) < _FEWEST_VALUES or np.any(values <= 0) or np.any(told <= 0):
        return None
    for power in _POWERS:
        constants = told / values**power
        constant = float(np.median(constants))
        if np.abs(constants / constant - 1).max() > _ALIKE:
            continue
        how = "divided" if power < 0 else "multiplied"
        of = {0.5: f"the root of {each.text}", 1.0: each.text, 2.0: f"the square of {each.text}"}
        by = of.get(abs(power), f"the {abs(power):g}th power of {each.text}")
        times = "" if abs(constant - 1) < _ALIKE else f", times {constant:.4g}"
        with np.errstate(all="ignore"):
            return constant * each.values**power, f"{how} by {by}{times}"
    return None


def _two_values(each: Attribute, factors: Floats, chosen: np.ndarray) -> tuple[Floats, str] | None:
    """Factors that are one number on one side of a threshold, and another on the other."""
    values, told = each.values[chosen], factors[chosen]
    levels = np.unique(values)
    for least in levels[1:]:
        low, high = told[values < least], told[values >= least]
        scale = _ALIKE * max(float(np.abs(told).max()), 1.0)
        if np.ptp(low) < scale and np.ptp(high) < scale:
            below, above = float(np.median(low)), float(np.median(high))
            with np.errstate(invalid="ignore"):
                predicted = np.where(each.values < least, below, above)
            said = [
                f"multiplied by {share:.3g} {each.side(least, is_above=is_above, levels=levels)}"
                for share, is_above in ((below, False), (above, True))
                if abs(share - 1) > _ALIKE
            ]
            return predicted, " and ".join(said)
    return None


def _from(least: float, levels: Floats) -> str:
    return f"{least:.3g}" if least == levels[-1] else f"{least:.3g} or more"


def _table(each: Attribute, factors: Floats, chosen: np.ndarray) -> tuple[Floats, str] | None:
    """Factors that are one number for each value of the attribute."""
    values, told = each.values[chosen], factors[chosen]
    levels, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    if not 1 < len(levels) <= len(told) / 3 or np.median(counts) < 2:
        return None
    means = np.bincount(place, told) / counts
    if np.abs(told - means[place]).max() > _ALIKE * np.abs(told).max():
        return None
    predicted = np.full(factors.shape, np.nan)
    predicted[chosen] = means[place]
    shown = [k for k in range(len(levels)) if abs(means[k] - 1) > _ALIKE][:_SHOWN]
    listed = ", ".join(f"{means[k]:.3g} where that is {levels[k]:.3g}" for k in shown)
    return predicted, f"multiplied by a number that depends on {each.text}: {listed}"


def scaled_by_attribute(
    of: Callable[[Facts], Floats], theirs: Callable[[Facts], Floats]
) -> Hypothesis:
    """Right numbers times a factor that follows from an attribute of the sample.

    Args:
        of: the right numbers, [S, N] or [S, N, Q].
        theirs: what the mode recorded.
    """

    def predict(facts: Facts) -> Prediction:
        right, observed = of(facts), theirs(facts)
        with np.errstate(all="ignore"):
            ratios = np.where(right > 0, observed / right, np.nan)
        factors = ratios
        if ratios.ndim == 3:
            is_there = np.isfinite(ratios)
            factors = np.where(
                is_there.any(axis=2),
                np.nanmedian(np.where(is_there, ratios, np.nan), axis=2),
                np.nan,
            )
        found = law_of(facts, factors)
        if found is None:
            return None
        factor, said = found
        return Fitted(right * (factor[..., None] if ratios.ndim == 3 else factor), said)

    return Hypothesis(sentence="they are {}", predict=predict)
