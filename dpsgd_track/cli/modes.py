"""`modes`: lists the available modes."""

from __future__ import annotations

from dpsgd_track.launcher import EXIT_FINISHED
from dpsgd_track.modes.table import MODES, plugged_in_modes
from dpsgd_track.report.columns import in_columns


def list_modes() -> int:
    """Print the table of modes, including those of installed packages.

    Raises:
        ValueError: one of the latter cannot be used.
    """
    rows = [("mode", "norm rule", "strategy", "sharding", "")]
    rows += [(m.name, m.norm_rule, m.strategy, m.sharding, m.summary) for m in MODES.values()]
    rows += [(name, "", "", "", factory) for name, factory in plugged_in_modes().items()]
    print("\n".join(in_columns(rows)))
    return EXIT_FINISHED
