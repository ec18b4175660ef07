"""Mistakes of the noise that all modes share, and of the division that follows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Fitted,
    Hypothesis,
    Prediction,
    Subject,
    off_as_rounded,
)
from dpsgd_track.record.trajectory import Floats, sketch_length


def _own_noise(facts: Facts) -> Floats:
    theirs = facts.theirs
    return np.asarray((theirs.noised_sketch - theirs.gradient_sketch)[:, facts.columns])


def _of_other_step(other: Callable[[Floats], Floats]) -> Callable[[Facts], Prediction]:
    return lambda facts: other(facts.noise)


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
    levels=(),
    late=(
        (),
        (
            Hypothesis(
                sentence="it is scaled by another factor in each step: {}", predict=_step_by_step
            ),
        ),
    ),
)
"""(Clipped sum + noise) / expected batch size, in units of 1 / expected batch size, [S, Q, K]."""
