"""What takes from our modes' records what some other mode does not tell either.

A mode that reports less shows less. Faults planted in one of ours that is muted in the same way
tell which of them nobody would see in that other mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dpsgd_track.mutants.fault import Site


def _record(site: Site, **silenced: None) -> None:
    site.wrap("accumulate", lambda original, batch: replace(original(batch), **silenced))


def without_norms(site: Site) -> None:
    """No norm of any sample."""
    _record(site, norm_B=None)


def without_norms_by_parameter(site: Site) -> None:
    """No norm of a sample's gradient of one parameter."""
    _record(site, norm_by_parameter_B=None)


def without_clip_factors(site: Site) -> None:
    """No clip factor of any sample."""
    _record(site, clip_factor_B=None)


def without_empty_batches(site: Site) -> None:
    """Nothing of steps in which a rank has no samples."""
    site.mode.takes_empty_batches = False


MUTES: dict[str, Callable[[Site], None]] = {
    mute.__name__: mute
    for mute in (
        without_norms,
        without_norms_by_parameter,
        without_clip_factors,
        without_empty_batches,
    )
}
"""By name; planted as faults are."""


def title(name: str) -> str:
    """What a mode that is muted so does not tell."""
    told: Any = MUTES[name].__doc__
    return str(told).rstrip(".").lower()
