"""Prints what users' modes decline, and which are not there.

`python -m dpsgd_track.modes.declared MODE...` is a program of its own: a user's module may print,
take long or claim a GPU when it is imported, none of which shall happen to a launcher.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpsgd_track.config import nearest
from dpsgd_track.demands import Demand, declined_by
from dpsgd_track.modes.table import factory_of


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Declarations of a user's module on a mode."""

    declined: tuple[Demand, ...] = ()
    problem: str = ""
    """Reason that its module has no such mode, in a sentence; empty if it has."""


def parsed(output: str) -> dict[str, Declared]:
    """Declarations on each mode, read from the output of `main`; empty if it did not end."""
    lines = output.splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    if not isinstance(found, Mapping):
        return {}
    return {
        mode: Declared(declined=tuple(Demand[name] for name in names), problem=problem)
        for mode, (names, problem) in found.items()
    }


def main(modes: Sequence[str]) -> None:
    """Print a line of JSON: mode -> (names of the demands that it declines, problem)."""
    declared = {mode: _declared(mode) for mode in modes}
    told = {
        mode: ([d.name for d in each.declined], each.problem) for mode, each in declared.items()
    }
    print("\n" + json.dumps(told))


def _declared(mode: str) -> Declared:
    name, _, attribute = factory_of(mode).partition(":")
    try:
        module = importlib.import_module(name)
        factory = getattr(module, attribute, None)
        if not callable(factory):
            near = nearest(attribute, (n for n, each in vars(module).items() if callable(each)))
            return Declared(problem=f"{name} has no callable {attribute!r}. {near}".rstrip())
        return Declared(declined=declined_by(factory))
    # Its worker comes to the same, and that is a failure with a place.
    except (Exception, SystemExit):
        return Declared()


if __name__ == "__main__":
    main(sys.argv[1:])
