"""Redactions: fields removed from built-in modes' records because a user's mode lacks them.

A mode that reports fewer fields shows fewer faults. Mutants planted in a built-in mode with the
same redactions tell which of them would go undetected in the user's mode.
"""

from __future__ import annotations

import enum
from dataclasses import replace

from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Site


class Redaction(enum.StrEnum):
    """Planted like a mutant: `flash_fsdp+without_norms+stand_in_counted`."""

    NORMS = "without_norms"
    NORMS_BY_PARAMETER = "without_norms_by_parameter"
    CLIP_FACTORS = "without_clip_factors"
    EMPTY_BATCHES = "without_empty_batches"

    @property
    def in_words(self) -> str:
        """Fields that a mode with this redaction does not report."""
        return _TITLES[self]

    def plant(self, site: Site) -> None:
        """Remove the fields from the records of the mode at `site`."""
        if self is Redaction.EMPTY_BATCHES:
            site.mode.takes_empty_batches = False
            return
        silenced = {_FIELDS[self]: None}
        site.wrap(Seam.ACCUMULATE, lambda original, batch: replace(original(batch), **silenced))


_FIELDS = {
    Redaction.NORMS: "norm_B",
    Redaction.NORMS_BY_PARAMETER: "norm_by_parameter_B",
    Redaction.CLIP_FACTORS: "clip_factor_B",
}
_TITLES = {
    Redaction.NORMS: "no norm of any sample",
    Redaction.NORMS_BY_PARAMETER: "no norm of a sample's gradient of one parameter",
    Redaction.CLIP_FACTORS: "no clip factor of any sample",
    Redaction.EMPTY_BATCHES: "nothing of steps in which a rank has no samples",
}
