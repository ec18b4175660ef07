"""Privacy ledger of a training over its whole life, resumes and changes of settings included."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

from dpsgd_track.config import require
from dpsgd_track.privacy.accounting import History, epsilon_pld, epsilon_prv, epsilon_rdp

KIND = "dpsgd_track.privacy_ledger"
"""Value of `kind` in the dict that `PrivacyLedger.state_dict` returns."""
VERSION = 1
ACCOUNTANTS = ("rdp", "prv", "pld")
MAX_NUM_STEPS = 2**53
"""Largest count that float64 represents without gaps, and so do the accountants."""

RATE_ADVICE = (
    "Loop over private.loader(dataset); or, for batches of one's own Poisson sampling, give it to "
    "make_private, or 1.0 for batches that are not sampled; or, for shuffled batches, call "
    "private.epsilon(delta, steps_per_sample=epochs)."
)


class Stage(NamedTuple):
    """Consecutive steps with the same noise multiplier and sample rate."""

    noise_multiplier: float
    """sigma >= 0"""
    sample_rate: float | None
    """q, above 0 and at most 1; None if it is not known"""
    num_steps: int
    """at least 1"""


class PrivacyLedger:
    """Records the noise multiplier and the sample rate of each noisy step of a training.

    Epsilon is that of all steps together. A resumed training continues the ledger of the run
    before, whatever its own settings are:

        ledger = PrivacyLedger()
        ledger.load_state_dict(checkpoint["ledger"])
        ledger.record(noise_multiplier=1.0, sample_rate=0.01)  # one more step
        ledger.epsilon(delta=1e-5)

    Steps are only ever added. `copy.deepcopy`, pickle, `==` and `repr` work as for a list.
    """

    def __init__(self, history: Iterable[tuple[float, float | None, int]] = ()) -> None:
        """Start with steps that were taken before; none by default.

        Args:
            history: (noise multiplier, sample rate or None, number of steps), in order.
        Raises:
            ValueError: a noise multiplier, sample rate or number of steps is out of range.
        """
        self._stages: list[Stage] = []
        self._num_steps = 0
        for stage in history:
            self._add(_checked(stage))

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return self._num_steps

    @property
    def history(self) -> tuple[Stage, ...]:
        """The steps in order; neighbouring stages differ."""
        return tuple(self._stages)

    def record(self, noise_multiplier: float, sample_rate: float | None) -> None:
        """Add one step.

        Args:
            noise_multiplier: sigma of the noise that was added; 0 if none was.
            sample_rate: probability with which the step took each sample; 1.0 if batches are not
                drawn by Poisson sampling; None if it is not known.
        Raises:
            ValueError: one of them is out of range. Nothing is recorded then.
        """
        self._add(_checked((noise_multiplier, sample_rate, 1)))

    def extend(self, other: PrivacyLedger) -> None:
        """Append the steps of `other`."""
        require(isinstance(other, PrivacyLedger), "other", other, "a PrivacyLedger")
        for stage in other.history:
            self._add(stage)

    def epsilon(self, delta: float, accountant: str = "rdp") -> float:
        """Epsilon of all steps together, at `delta`.

        Args:
            delta: probability at which the bound may fail, between 0 and 1.
            accountant: rdp (never too small), prv (tighter) or pld (tight and never too small, by
                the package dp-accounting).
        Returns:
            Epsilon; 0.0 before the first step.
        Raises:
            ValueError: a step had no noise, or its sample rate is not known; `delta` or
                `accountant` is out of range; the accountant cannot compute this epsilon, or is
                not installed.
        """
        require(0 < _as_float(delta) < 1, "delta", delta, "a number between 0 and 1")
        require(accountant in ACCOUNTANTS, "accountant", accountant, "rdp, prv or pld")
        if not self._stages:
            return 0.0
        history, delta = self.accountable_history(), float(delta)
        if accountant == "rdp":
            return epsilon_rdp(history, delta)
        compute = epsilon_prv if accountant == "prv" else epsilon_pld
        try:
            epsilon = compute(history, delta)
        except ImportError:
            raise ValueError(
                f"accountant={accountant!r}: expected the package dp-accounting, which is not "
                "installed. Run pip install dp-accounting, or use rdp or prv."
            ) from None
        if epsilon is None:
            raise ValueError(
                f"accountant={accountant!r}: expected an epsilon that it computes rightly and in "
                f"time, got about {epsilon_rdp(history, delta):.3g} at delta={delta:g}. Use rdp."
            )
        return epsilon

    def without_sampling(self, steps_per_sample: int) -> PrivacyLedger:
        """A ledger of what one sample spends if it is in at most that many steps, each once.

        They count as those with the least noise, whichever they were, and unsampled.

        Args:
            steps_per_sample: at least 1; with shuffled batches, epochs begun.
        """
        is_count = type(steps_per_sample) is int and steps_per_sample >= 1
        require(is_count, "steps_per_sample", steps_per_sample, "an integer >= 1")
        left, worst = steps_per_sample, []
        for stage in sorted(self._stages, key=lambda stage: stage.noise_multiplier):
            if left:
                num_steps = min(left, stage.num_steps)
                worst.append(Stage(stage.noise_multiplier, 1.0, num_steps))
                left -= num_steps
        return PrivacyLedger(worst)

    def state_dict(self) -> dict[str, Any]:
        """All steps, in types that JSON and `torch.load(..., weights_only=True)` support."""
        return {
            "kind": KIND,
            "version": VERSION,
            "num_steps": self.num_steps,
            "history": [list(stage) for stage in self._stages],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the steps of a saved ledger into this one, which must be empty.

        Raises:
            ValueError: `state` is not that of a ledger, or is damaged, or this ledger has steps,
                which would be lost or counted twice. Nothing is loaded then.
        """
        require(
            not self._stages,
            "num_steps",
            self.num_steps,
            "a ledger without steps to load into",
            "Load before the first step; extend() adds the steps of another ledger.",
        )
        loaded = PrivacyLedger(_stages_of(state))
        num_steps = state["num_steps"]
        require(
            type(num_steps) is int and num_steps == loaded.num_steps,
            "state['num_steps']",
            num_steps,
            f"{loaded.num_steps}, the sum over its history",
            "The state is damaged.",
        )
        self._stages, self._num_steps = loaded._stages, loaded._num_steps

    def _add(self, stage: Stage) -> None:
        num_steps = self._num_steps + stage.num_steps
        require(num_steps <= MAX_NUM_STEPS, "num_steps", num_steps, "at most 2**53 in all")
        self._num_steps = num_steps
        if self._stages and self._stages[-1][:2] == stage[:2]:
            num_before = self._stages.pop().num_steps
            stage = stage._replace(num_steps=num_before + stage.num_steps)
        self._stages.append(stage)

    def accountable_history(self) -> History:
        """The history, if all its stages have an epsilon.

        Raises:
            ValueError: some have no noise, or no known sample rate.
        """
        noiseless = [stage for stage in self._stages if stage.noise_multiplier == 0]
        require(
            not noiseless,
            "noise_multiplier",
            0.0,
            "a number > 0",
            f"Without noise epsilon is infinite, and {self._fraction(noiseless)} had none.",
        )
        unknown = [stage for stage in self._stages if stage.sample_rate is None]
        require(
            not unknown,
            "sample_rate",
            None,
            "a number above 0 and at most 1",
            f"It is not known for {self._fraction(unknown)}. {RATE_ADVICE}",
        )
        return tuple((sigma, q, steps) for sigma, q, steps in self._stages if q is not None)

    def _fraction(self, stages: list[Stage]) -> str:
        num_steps = sum(stage.num_steps for stage in stages)
        return f"{num_steps} of {self.num_steps} steps"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrivacyLedger):
            return NotImplemented
        return self._stages == other._stages

    def __copy__(self) -> PrivacyLedger:
        # A shallow copy would share steps that are recorded later.
        return PrivacyLedger(self._stages)

    # Ledgers are mutable.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [str(tuple(stage)) for stage in self._stages]
        if len(shown) > 6:
            shown[3:-2] = [f"... {len(shown) - 5} more ..."]
        return f"PrivacyLedger([{', '.join(shown)}])"


def _checked(stage: tuple[float, float | None, int], where: str = "") -> Stage:
    """`stage` with Python floats; `where` is a prefix for names in errors."""
    noise_multiplier, sample_rate, num_steps = stage
    sigma = _as_float(noise_multiplier)
    allowed = "a finite number >= 0"
    require(0 <= sigma < math.inf, f"{where}noise_multiplier", noise_multiplier, allowed)
    rate = None if sample_rate is None else _as_float(sample_rate)
    allowed = "a number above 0 and at most 1, or None"
    require(rate is None or 0 < rate <= 1, f"{where}sample_rate", sample_rate, allowed)
    is_count = type(num_steps) is int and 1 <= num_steps <= MAX_NUM_STEPS
    require(is_count, f"{where}num_steps", num_steps, "an integer from 1 to 2**53")
    return Stage(sigma, rate, num_steps)


def _as_float(number: object) -> float:
    """`number` as a float; NaN if it is no number, or overflows."""
    if not isinstance(number, Real) or isinstance(number, bool):
        return math.nan
    try:
        return float(number)
    except OverflowError:
        return math.nan


def _stages_of(state: Mapping[str, Any]) -> list[Stage]:
    """The stages of a ledger's state, once checked."""
    require(isinstance(state, Mapping), "state", state, "what PrivacyLedger.state_dict() returned")
    if set(state) == {"num_steps"}:
        _refuse_version_0_1(state["num_steps"])
    require(
        state.get("kind") == KIND,
        "state['kind']",
        state.get("kind"),
        repr(KIND),
        f"Its keys are {', '.join(map(str, state)) or 'none'}; give it what "
        "PrivacyLedger.state_dict() returned.",
    )
    version = state.get("version")
    is_newer = type(version) is int and version > VERSION
    advice = "It was written by a newer dpsgd-track; upgrade this one." if is_newer else ""
    is_known = type(version) is int and version == VERSION
    require(is_known, "state['version']", version, str(VERSION), advice)
    keys = {"kind", "version", "num_steps", "history"}
    allowed = "kind, version, num_steps and history"
    require(set(state) == keys, "state", list(state), f"the keys {allowed}")
    history = state["history"]
    require(isinstance(history, list | tuple), "state['history']", history, "a list of stages")
    stages = []
    for number, stage in enumerate(history):
        where = f"state['history'][{number}]"
        is_stage = isinstance(stage, list | tuple) and len(stage) == 3
        require(is_stage, where, stage, "[noise multiplier, sample rate, number of steps]")
        stages.append(_checked(tuple(stage), where=f"{where}: "))
    return stages


def _refuse_version_0_1(num_steps: object) -> None:
    """Refuse a state that does not tell the noise and sample rate of its steps."""
    if num_steps == 0:
        advice = "It holds no steps, so go on without loading it."
    else:
        advice = (
            "dpsgd-track 0.1 did not record the noise multiplier and sample rate of its steps. If "
            "you know them, load dpsgd_track.privacy.ledger.PrivacyLedger([(noise_multiplier, "
            f"sample_rate, {num_steps!r})]).state_dict() instead."
        )
    raise ValueError(f"state={{'num_steps': {num_steps!r}}}: expected a history. {advice}")
