"""Audits the noise that a mode adds: its size, its distribution, and that it repeats nowhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NoiseCheck:
    """One property of a mode's noise, with the interval that its estimate leaves open."""

    name: str
    """Identifier, such as `std` or `correlation_of_ranks`."""
    title: str
    """As it stands in a sentence and as a heading."""
    value: float
    """The estimate."""
    low: float
    """Confidence interval of the estimate."""
    high: float
    expected: float
    is_ok: bool
    where: str = ""
    """Parameter, rank or step of the worst; empty for all together."""
    sentence: str = ""
    """What was found, with numbers."""


@dataclass(frozen=True, kw_only=True)
class NoiseAudit:
    """All checks of one mode in one regime."""

    regime: str
    mode: str
    """Label."""
    checks: tuple[NoiseCheck, ...]
    by_parameter: tuple[tuple[str, float, float, float], ...] = ()
    """(parameter, estimated std / (sigma C), low, high)."""
