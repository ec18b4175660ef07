"""`modes`: lists the available modes."""

from __future__ import annotations

from dpsgd_track.launcher import EXIT_FINISHED
from dpsgd_track.modes.table import MODES, plugged_in_modes


def list_modes() -> int:
    """Print the table of modes, including those of installed packages.

    Raises:
        ValueError: one of the latter cannot be used.
    """
    rows = [("mode", "norm rule", "strategy", "sharding", "")]
    rows += [(m.name, m.norm_rule, m.strategy, m.sharding, m.summary) for m in MODES.values()]
    rows += [(name, "", "", "", factory) for name, factory in plugged_in_modes().items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    return EXIT_FINISHED
