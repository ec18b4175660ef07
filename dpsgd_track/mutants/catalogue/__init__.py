"""The known defects, one module per class."""

from __future__ import annotations

from dpsgd_track.mutants.catalogue import (
    accumulation,
    clipping,
    losses,
    noise,
    norms,
    precision,
    ranks,
    sums,
    updates,
)
from dpsgd_track.mutants.mutant import MUTANTS

KINDS = {
    module.__name__.rpartition(".")[2]: (module.__doc__ or "").partition("\n")[0]
    for module in (losses, norms, clipping, sums, accumulation, ranks, noise, updates, precision)
}
"""Classes of mutants, in the order of a step, each with the subject of its module."""

__all__ = ["KINDS", "MUTANTS"]
