"""Asks modes for the demands that they decline, and if they exist, before a launch starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import dpsgd_track
from dpsgd_track.config import VariantConfig, require
from dpsgd_track.demands import Demand
from dpsgd_track.modes import declared, table
from dpsgd_track.modes.declared import Declared

_TIMEOUT_S = 120


def declined_demands(
    modes: Sequence[str], variant: VariantConfig | None = None
) -> dict[str, tuple[Demand, ...]]:
    """Demands that each of `modes` declines, users' modes by the code that would run.

    A user's module that cannot be imported declines nothing here, and fails in its worker.

    Raises:
        ValueError: a user's module has no such mode.
    """
    known = {mode: table.declined_by_table(mode) for mode in modes}
    theirs = [mode for mode, demands in known.items() if demands is None]
    told = _asked(theirs, variant) if theirs else {}
    for mode, each in told.items():
        name = f"{mode}@{variant.name}" if variant else mode
        require(not each.problem, "mode", name, "package.module:factory", each.problem)
    declined = {mode: each.declined for mode, each in told.items()}
    return {mode: declined.get(mode, ()) if d is None else d for mode, d in known.items()}


def _asked(modes: Sequence[str], variant: VariantConfig | None) -> dict[str, Declared]:
    package_root = str(Path(dpsgd_track.__file__).parent.parent)
    given = os.environ.get("PYTHONPATH", "")
    path = [variant.root if variant else "", os.getcwd(), given, package_root]
    search = os.pathsep.join(filter(None, path))
    try:
        done = subprocess.run(
            # Without the working directory first, which a variant comes before.
            [sys.executable, "-P", "-m", declared.__name__, *modes],
            env={**os.environ, "PYTHONPATH": search},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}
    return declared.parsed(done.stdout)
