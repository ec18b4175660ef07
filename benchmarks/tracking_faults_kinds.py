"""Kinds of faults of tracking: what is injected, how often, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.arrivals import Tally

Inject = Callable[[Path, int], Tally]
"""Injects a fault so many times, in an empty folder of its own."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One row of the table."""

    name: str
    title: str
    """The fault, in words."""
    times: int
    """Default number of injections."""
    after: str
    """Way of the records into the store after that, or the answer of a command."""
    inject: Inject


FAULTS: dict[str, Fault] = {}


def fault(name: str, title: str, *, times: int, after: str) -> Callable[[Inject], Inject]:
    """Enter the decorated function as a fault."""

    def enter(inject: Inject) -> Inject:
        FAULTS[name] = Fault(name=name, title=title, times=times, after=after, inject=inject)
        return inject

    return enter
