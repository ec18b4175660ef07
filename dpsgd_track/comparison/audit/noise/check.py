"""One check of a mode's noise, and all of them together."""

from __future__ import annotations

import math
from dataclasses import dataclass

FALSE_ALARM = 1e-6
"""Probability that any check of an audit fails for a mode whose noise is as it should be."""
_NUM_CHECKS = 20
"""At least as many as an audit makes: each has an equal share of FALSE_ALARM."""
ALPHA = FALSE_ALARM / _NUM_CHECKS
"""Probability that one check fails by chance, over all its cells."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Part of the noise: in words, and as values for what reads it."""

    text: str = ""
    """As it stands in a sentence; empty for all of the noise."""
    step: int | None = None
    """The earliest; None for all."""
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
        """The text with a blank before it, if there is any."""
        return f" {self.text}" if self.text else ""


@dataclass(frozen=True, kw_only=True)
class NoiseCheck:
    """One property of a mode's noise, with the interval that its estimate leaves open."""

    name: str
    """Identifier, such as `std` or `correlation_of_ranks`."""
    title: str
    """As it stands in a sentence and as a heading."""
    value: float
    """The estimate; of several cells, the one farthest out. NaN where nothing was tested."""
    low: float
    """Confidence interval of the estimate."""
    high: float
    expected: float
    is_ok: bool
    place: Place = Place()
    """Parameter, rank or step of the worst."""
    sentence: str = ""
    """What was found, with numbers."""
    num_cells: int = 1
    """Parameters, ranks, steps or pairs that were looked at one by one."""
    num_failed: int = 0
    """How many of them were out of bounds."""
    explains_others: bool = False
    """Of checks that look at the same in larger or smaller parts, the one that says it best."""

    @property
    def was_tested(self) -> bool:
        """False where the run had nothing to test this with; the sentence says so."""
        return not (self.is_ok and math.isnan(self.value))


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

    @property
    def failed(self) -> tuple[NoiseCheck, ...]:
        """Checks that were not passed."""
        return tuple(check for check in self.checks if not check.is_ok)
