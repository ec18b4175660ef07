"""The least noise with which a training stays within a budget of epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dpsgd_track.config import require
from dpsgd_track.privacy.ledger import MAX_NUM_STEPS, PrivacyLedger

MAX_NOISE_MULTIPLIER = 2.0**20
"""Largest sigma that is tried. Above it epsilon is that of the steps before, to many digits."""
TOLERANCE = 1e-4
"""Relative distance of the result from the least sigma."""

_Stages = Iterable[tuple[float, float | None, int]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Epsilon that a training must not exceed, and the steps that it is for."""

    target_epsilon: float
    target_delta: float
    num_steps: int
    """Steps in all, those taken before included."""
    accountant: str = "rdp"

    def __post_init__(self) -> None:
        is_positive = 0 < self.target_epsilon < math.inf
        require(is_positive, "target_epsilon", self.target_epsilon, "a finite number > 0")
        is_count = type(self.num_steps) is int and 1 <= self.num_steps <= MAX_NUM_STEPS
        require(is_count, "num_steps", self.num_steps, "an integer from 1 to 2**53")
        # Checks the other two.
        PrivacyLedger().epsilon(self.target_delta, self.accountant)

    def epsilon(self, history: _Stages, noise_multiplier: float, sample_rate: float) -> float:
        """Epsilon at the end, if the steps that are left have this noise and sample rate."""
        ledger = PrivacyLedger(history)
        num_left = self.num_steps - ledger.num_steps
        if num_left > 0:
            ledger.extend(PrivacyLedger([(noise_multiplier, sample_rate, num_left)]))
        return ledger.epsilon(self.target_delta, self.accountant)

    def noise_multiplier(self, history: _Stages, sample_rate: float) -> float:
        """The least sigma of the steps that are left with which epsilon is within the budget.

        Raises:
            ValueError: no step is left, or no sigma suffices; or the accountant cannot tell.
        """
        history = tuple(history)
        past = PrivacyLedger(history)
        allowed = f"more than the {past.num_steps} steps that were taken on the model already"
        require(self.num_steps > past.num_steps, "num_steps", self.num_steps, allowed)
        enough = 1.0
        while not self._suffices(history, enough, sample_rate) and enough < MAX_NOISE_MULTIPLIER:
            enough *= 2
        epsilon = self.epsilon(history, enough, sample_rate)
        allowed = f"at least {epsilon:.4g}, that of any noise, by the accountant"
        advice = f"{past.num_steps} steps were taken already." if history else ""
        is_enough = epsilon <= self.target_epsilon
        require(is_enough, "target_epsilon", self.target_epsilon, allowed, advice)
        too_little = enough / 2
        while self._suffices(history, too_little, sample_rate):
            enough, too_little = too_little, too_little / 2
        while enough - too_little > TOLERANCE * too_little:
            middle = (enough + too_little) / 2
            if self._suffices(history, middle, sample_rate):
                enough = middle
            else:
                too_little = middle
        # Raises if the accountant cannot tell this epsilon, so that less noise may suffice as well.
        self.epsilon(history, too_little, sample_rate)
        return enough

    def noise_within(self, history: _Stages, noise_multiplier: float, sample_rate: float) -> float:
        """`noise_multiplier` if it keeps to the budget; the least that does if it is too little.

        Raises:
            ValueError: as `noise_multiplier`.
        """
        history = tuple(history)
        has_left = PrivacyLedger(history).num_steps < self.num_steps
        if not has_left or self._suffices(history, noise_multiplier, sample_rate):
            return noise_multiplier
        return self.noise_multiplier(history, sample_rate)

    def refuse_beyond(self, history: _Stages, noise_multiplier: float, sample_rate: float) -> None:
        """Raise if the steps that are left would exceed the budget with this noise."""
        epsilon = self.epsilon(history, noise_multiplier, sample_rate)
        allowed = f"enough for an epsilon of {self.target_epsilon:g}, got {epsilon:.4g}"
        advice = f"It is that after {self.num_steps} steps, those taken before included."
        is_within = epsilon <= self.target_epsilon
        require(is_within, "noise_multiplier", noise_multiplier, allowed, advice)

    def refuse_step(self, number: int) -> None:
        """Raise if the step with that number, from 1, is one too many."""
        if number > self.num_steps:
            raise RuntimeError(
                f"step {number}: expected at most num_steps={self.num_steps}, for which "
                f"target_epsilon={self.target_epsilon:g} holds. Call make_private with more."
            )

    def _suffices(self, history: _Stages, noise_multiplier: float, sample_rate: float) -> bool:
        try:
            epsilon = self.epsilon(history, noise_multiplier, sample_rate)
        except ValueError:
            # The accountant cannot tell an epsilon as large.
            return False
        return epsilon <= self.target_epsilon


def noise_multiplier_for(
    target_epsilon: float,
    target_delta: float,
    *,
    sample_rate: float,
    num_steps: int,
    accountant: str = "rdp",
) -> float:
    """The least noise multiplier, to 1e-4, with which epsilon is at most the target.

    Args:
        target_epsilon: bound on epsilon after `num_steps` steps, at `target_delta`.
        sample_rate: probability with which a step takes each sample; 1.0, with the number of epochs
            for `num_steps`, where batches are shuffled.
        accountant: rdp, prv or pld.
    Raises:
        ValueError: an argument is out of range, or no noise suffices.
    """
    budget = Budget(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        num_steps=num_steps,
        accountant=accountant,
    )
    return budget.noise_multiplier((), sample_rate)


def budget_of(
    noise_multiplier: float | None,
    target_epsilon: float | None,
    target_delta: float | None,
    num_steps: int | None,
    accountant: str,
) -> Budget | None:
    """The budget that a training is to stay in; None if its noise is given instead."""
    targets = {"epsilon": target_epsilon, "delta": target_delta, "num_steps": num_steps}
    if noise_multiplier is not None:
        for name, got in targets.items():
            setting = name if name == "num_steps" else f"target_{name}"
            require(got is None, setting, got, "None beside a noise_multiplier")
        return None
    if target_epsilon is None or target_delta is None or num_steps is None:
        advice = "Give it, or target_epsilon, target_delta and num_steps."
        require(False, "noise_multiplier", None, "a number >= 0", advice)
    assert target_epsilon is not None
    assert target_delta is not None
    assert num_steps is not None
    return Budget(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        num_steps=num_steps,
        accountant=accountant,
    )
