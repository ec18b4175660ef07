"""Mistakes of the noise that all modes share, and of the division that follows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.by_parameter import scaled_apart, scaled_each
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Fitted,
    Hypothesis,
    Prediction,
    Subject,
    off_as_rounded,
)
from dpsgd_track.record.trajectory import Floats, Integers, sketch_length


def _own_noise(facts: Facts) -> Floats:
    theirs = facts.theirs
    return np.asarray((theirs.noised_sketch - theirs.gradient_sketch)[:, facts.columns])


def _of_other_step(other: Callable[[Floats], Floats]) -> Callable[[Facts], Prediction]:
    return lambda facts: other(facts.noise)


def _of_steps(facts: Facts) -> Prediction:
    """Noise of each step as a sum of the right noise of several steps, each some times."""
    noise, observed, rows = facts.noise, _own_noise(facts), facts.rows
    num = len(noise)
    if num > _MOST_STEPS or noise[0].size < 2 * num:
        return None
    table = noise.reshape(num, -1)
    if not np.isfinite(table).all() or not np.isfinite(observed).all():
        return None
    solved = np.linalg.lstsq(table.T, observed.reshape(num, -1).T, rcond=1e-8)[0]
    shares = np.asarray(solved.T, dtype=np.float64)
    shares[np.abs(shares) < _NONE] = 0.0
    predicted = shares @ table
    # The noise of a later step than the last is not known.
    off = np.abs(predicted[-1] - observed[-1].ravel()).max()
    if off > _CLOSE * np.abs(observed[-1]).max() and rows[-1] == num - 1 and len(rows) > 2:
        predicted[-1], rows = observed[-1].ravel(), rows[:-1]
    is_simple = (shares[rows] != 0).sum(axis=1) <= _MOST_MIXED
    said = _shares_in_words(shares, facts, rows) if is_simple.all() else ""
    return Fitted(predicted.reshape(noise.shape), said) if said else None


_MOST_STEPS, _NONE, _MOST_MIXED, _SHOWN = 16, 1e-3, 3, 3
"""Steps that noise is looked for in, least share of one, most of one mixture, and steps told."""


def _shares_in_words(shares: Floats, facts: Facts, rows: Integers) -> str:
    """`minus that of step 0 at step 1, ...`, of [S, S] shares; empty if all noise is its own."""
    said = []
    steps = facts.theirs.step.tolist()
    for row in rows.tolist():
        held = np.flatnonzero(shares[row])
        if held.tolist() == [row]:
            continue
        terms = [
            f"{'minus ' if shares[row, k] < 0 else ''}"
            f"{'' if abs(abs(shares[row, k]) - 1) < _NONE else f'{abs(shares[row, k]):.3g} times '}"
            f"{'its own' if k == row else f'that of step {steps[k]}'}"
            for k in held.tolist()
        ]
        said.append(f"{' plus '.join(terms) or 'none'} at step {steps[row]}")
    more = f" and so on at {len(said) - _SHOWN} more steps" * (len(said) > _SHOWN)
    return ", ".join(said[:_SHOWN]) + more


NOISE = Subject(
    observed=_own_noise,
    right=lambda facts: facts.noise,
    is_sketch=True,
    is_noise=True,
    be="it is",
    levels=(
        (
            Hypothesis(
                sentence="it is the noise of the first step again, in every step",
                predict=_of_other_step(lambda noise: np.broadcast_to(noise[:1], noise.shape)),
            ),
            Hypothesis(
                sentence="it is the noise of the step before",
                predict=_of_other_step(lambda noise: np.concatenate([noise[:1], noise[:-1]])),
            ),
            Hypothesis(
                sentence="it is the noise of the next step",
                predict=_of_other_step(lambda noise: np.concatenate([noise[1:], noise[-1:]])),
            ),
        ),
    ),
    late=(
        scaled_apart(lambda facts: facts.noise, _own_noise, be="it is"),
        (Hypothesis(sentence="it is the noise of other steps: {}", predict=_of_steps),),
        scaled_each(lambda facts: facts.noise, _own_noise, be="it is"),
        (
            Hypothesis(
                sentence="it is off by as much as rounding to bfloat16 makes it",
                predict=lambda facts: (
                    _own_noise(facts)
                    if off_as_rounded(_own_noise(facts), facts.noise, sketch_length(facts.noise))
                    else None
                ),
                is_hint=True,
            ),
        ),
    ),
)
"""Noise of the wrong parameters, [S, Q, K], where all modes share it."""


def _before_division(facts: Facts) -> Floats:
    """[S, Q, K] the mode's own sum, with the noise that all modes share."""
    theirs = facts.theirs
    return np.asarray(theirs.gradient_sketch[:, facts.columns] + facts.noise)


def _by_whole_number(facts: Facts) -> Prediction:
    """The sum divided by another whole number than the expected batch size, in all steps."""
    right = _before_division(facts)
    rows, theirs = facts.rows, facts.theirs.noised_sketch[:, facts.columns]
    with np.errstate(all="ignore"):
        factor = float((right * theirs)[rows].sum() / np.square(right)[rows].sum())
        divisor = facts.divisor / factor
    whole = round(divisor) if np.isfinite(divisor) else 0
    if whole < 1 or abs(divisor - whole) > _CLOSE * whole:
        return None
    return Fitted(right * (facts.divisor / whole), f"{whole} rather than {facts.divisor:g}")


_CLOSE = 1e-4
"""Relative distance from a whole number up to which a divisor is one."""


def _step_by_step(facts: Facts) -> Prediction:
    """Another factor in each step."""
    right = _before_division(facts)
    theirs = facts.theirs.noised_sketch[:, facts.columns]
    with np.errstate(all="ignore"):
        factors = (right * theirs).sum(axis=(1, 2)) / np.square(right).sum(axis=(1, 2))
    shown = ", ".join(f"{factor:.3g}" for factor in factors[facts.rows].tolist())
    return Fitted(right * factors[:, None, None], shown)


DIVISION = Subject(
    observed=lambda facts: np.asarray(facts.theirs.noised_sketch[:, facts.columns]),
    right=_before_division,
    is_sketch=True,
    be="it is",
    reasons={
        ("multiplied", "W"): "as where it is divided by the expected batch size of one rank",
        ("multiplied", "K"): "as where it is divided by the batch size of one micro-batch",
        ("multiplied", "W K"): "as where it is divided by the size of a micro-batch",
        ("multiplied", "B"): "as where it is not divided by it",
        ("divided", "B"): "as where it is divided by it twice",
        ("divided", "W"): "as where it is averaged over ranks once more",
    },
    levels=(
        (
            Hypothesis(
                sentence="it is divided by {}, the expected batch size", predict=_by_whole_number
            ),
        ),
    ),
    late=(
        scaled_apart(
            _before_division,
            lambda facts: np.asarray(facts.theirs.noised_sketch[:, facts.columns]),
            be="it is",
        ),
        (
            Hypothesis(
                sentence="it is scaled by another factor in each step: {}", predict=_step_by_step
            ),
        ),
    ),
)
"""(Clipped sum + noise) / expected batch size, in units of 1 / expected batch size, [S, Q, K]."""
