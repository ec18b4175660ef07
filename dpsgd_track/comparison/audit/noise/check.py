"""One check of a mode's noise, and all checks together."""

from __future__ import annotations

import math
from dataclasses import dataclass

FALSE_ALARM = 1e-6
"""Probability that any check of an audit fails for a mode with correct noise."""
_NUM_CHECKS = 32
"""Upper bound of the checks per audit, each of which gets an equal share of FALSE_ALARM."""
ALPHA = FALSE_ALARM / _NUM_CHECKS
"""Probability that one check fails by chance, over all its cells."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Part of the noise, in words and in values for programs."""

    text: str = ""
    """Name in a sentence; empty for all of the noise."""
    step: int | None = None
    """The earliest step; None for all."""
    parameters: tuple[str, ...] = ()
    """Empty for all."""

    @classmethod
    def of_step(cls, step: int, before: str = "") -> Place:
        """`step 2`, after the words `before`."""
        return cls(text=f"{before}step {step}", step=step)

    @classmethod
    def of_parameter(cls, name: str, before: str = "") -> Place:
        """`head.weight`, after the words `before`."""
        return cls(text=f"{before}{name}", parameters=(name,))

    @classmethod
    def of_pair(cls, earlier: Place, later: Place) -> Place:
        """`step 0 and step 1`."""
        return cls(
            text=f"{earlier.text} and {later.text}",
            step=earlier.step,
            parameters=tuple(dict.fromkeys(earlier.parameters + later.parameters)),
        )

    @property
    def suffix(self) -> str:
        """The text with a leading blank, if there is any."""
        return f" {self.text}" if self.text else ""


@dataclass(frozen=True, kw_only=True)
class NoiseCheck:
    """One property of a mode's noise, with the confidence interval of its estimate."""

    name: str
    """Identifier, such as `std` or `correlation_of_ranks`."""
    title: str
    """Name in a sentence, and as a heading."""
    value: float
    """The estimate; of several cells, the one farthest out. NaN if nothing was tested."""
    low: float
    """Lower end of the estimate's confidence interval."""
    high: float
    expected: float
    is_ok: bool
    place: Place = Place()
    """Parameter, rank or step of the worst cell."""
    sentence: str = ""
    """The result, with numbers."""
    num_cells: int = 1
    """Parameters, ranks, steps or pairs that were tested individually."""
    num_failed: int = 0
    """Number of cells out of bounds."""
    resolution: float = math.nan
    """Smallest deviation from `expected` over everything that fails with a probability of 95 %; of
    a count of large elements, the size at which a cut fails."""
    is_of_draws: bool = False
    """True if it rests on the sums of noise-only steps rather than on single elements."""
    explains_others: bool = False
    """True for the most telling of several checks of one property in larger or smaller parts."""

    @property
    def was_tested(self) -> bool:
        """False if the run had nothing to test this with; the sentence says so."""
        return not (self.is_ok and math.isnan(self.value))


def untested(name: str, title: str, why: str, *, expected: float = 0.0) -> NoiseCheck:
    """A check that the run had nothing to be tested with, with the reason as its sentence."""
    return NoiseCheck(
        name=name,
        title=title,
        value=math.nan,
        low=math.nan,
        high=math.nan,
        expected=expected,
        is_ok=True,
        sentence=why,
    )


NORMAL_95 = 1.645
"""Quantile of a standard normal variable: what an effect has to exceed its limit by, in standard
deviations of the estimate, to be found with a probability of 95 %."""


@dataclass(frozen=True, kw_only=True)
class NoiseAudit:
    """All checks of one mode in one regime."""

    regime: str
    mode: str
    """Label."""
    checks: tuple[NoiseCheck, ...]
    by_parameter: tuple[tuple[str, float, float, float], ...] = ()
    """(parameter, estimated std / (sigma C), low, high)."""
    source: str = ""
    """samples (elements of the noise), sketches (projections of it), or empty for no noise."""
    num_draws: int = 0
    """Elements of noise-only steps."""
    untested: str = ""
    """Reason why the noise could not be audited at all; empty if it was."""

    @property
    def failed(self) -> tuple[NoiseCheck, ...]:
        """Checks that failed."""
        return tuple(check for check in self.checks if not check.is_ok)
