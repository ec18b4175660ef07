"""`modes`: lists the available modes."""

from __future__ import annotations

from collections.abc import Sequence

from dpsgd_track.launcher import EXIT_FINISHED
from dpsgd_track.launcher.variants import own_modes, read_variants
from dpsgd_track.modes.table import MODES, name_of_opacus, plugged_in_modes, spec_of
from dpsgd_track.report.columns import in_columns


def list_modes(variants: Sequence[str] = ()) -> int:
    """Print the table of modes, including those of installed packages and of variants.

    Raises:
        ValueError: one of the latter cannot be used.
    """
    read = read_variants(variants)
    rows = [("mode", "norm rule", "strategy", "sharding", "")]
    rows += [(m.name, m.norm_rule, m.strategy, m.sharding, m.summary) for m in MODES.values()]
    rows += [(name, "", "", "", factory) for name, factory in plugged_in_modes().items()]
    for variant in read:
        specs = [spec_of(name_of_opacus(name)) for name in own_modes(variant)]
        rows += [
            (f"{s.name}@{variant.name}", s.norm_rule, s.strategy, s.sharding, s.summary)
            for s in specs
            if s is not None
        ]
        if not specs:
            which = "any mode that imports its packages" if variant.root else "any that can"
            rows.append((f"...@{variant.name}", "", "", "", which))
    print("\n".join(in_columns(rows)))
    return EXIT_FINISHED
