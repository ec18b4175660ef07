"""Prints what users' modes decline: `python -m dpsgd_track.modes.declared MODE...`.

A program of its own: a user's module may print, take long or claim a GPU when it is imported, none
of which shall happen to a launcher.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence

from dpsgd_track.demands import Demand, declined_by
from dpsgd_track.modes.table import factory_of


def parsed(output: str) -> dict[str, tuple[Demand, ...]]:
    """Demands that each mode declines, from what `main` printed; empty if it did not end."""
    lines = output.splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    if not isinstance(found, Mapping):
        return {}
    return {mode: tuple(Demand[name] for name in names) for mode, names in found.items()}


def main(modes: Sequence[str]) -> None:
    """Print a line of JSON: mode -> names of the demands that it declines."""
    print("\n" + json.dumps({mode: [d.name for d in _declined(mode)] for mode in modes}))


def _declined(mode: str) -> tuple[Demand, ...]:
    module, _, attribute = factory_of(mode).partition(":")
    try:
        return declined_by(getattr(importlib.import_module(module), attribute))
    # Its worker comes to the same, and that is a failure with a place.
    except (Exception, SystemExit):
        return ()


if __name__ == "__main__":
    main(sys.argv[1:])
