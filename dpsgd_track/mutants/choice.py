"""Which faults are planted in which modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dpsgd_track.config import PROBE_CLIP, nearest, require
from dpsgd_track.modes.table import (
    BASELINE,
    REFERENCE,
    check_mode,
    is_of_opacus,
    spec_of,
    split_planted,
    with_planted,
)
from dpsgd_track.mutants import FAULTS, KINDS, MUTES, Fault
from dpsgd_track.mutants.fault import FSDP_MODES
from dpsgd_track.record.run import ModeRun

_OURS = ("two_pass", "bookkeeping")


def chosen_faults(asked: Sequence[str]) -> tuple[Fault, ...]:
    """Faults by their names and classes, in the catalogue's order; all where none is asked for.

    Raises:
        ValueError: one is neither.
    """
    for name in asked:
        known = f"a fault, or one of the classes {', '.join(KINDS)}"
        near = nearest(name, (*KINDS, *FAULTS))
        advice = f"{near} `dpsgd-track faults --list` lists the faults.".strip()
        require(name in KINDS or name in FAULTS, "fault", name, known, advice)
    ordered = sorted(FAULTS.values(), key=lambda fault: list(KINDS).index(fault.kind))
    return tuple(f for f in ordered if not asked or f.name in asked or f.kind in asked)


def is_ours(mode: str) -> bool:
    """Whether `mode` is a composition of ours, which has every seam."""
    spec = spec_of(mode)
    return spec is not None and spec.strategy in _OURS


def check_modes(modes: Sequence[str]) -> None:
    """Raise ValueError for a mode that no fault can be planted in."""
    for mode in modes:
        check_mode(mode)
        require(not split_planted(mode)[1], "mode", mode, "a mode without faults", "Use --fault.")
        spec = spec_of(mode)
        is_fit = is_ours(mode) or (spec is None and mode not in (BASELINE, REFERENCE))
        refused = "Opacus's modes refuse the probe's tied and reused weights."
        advice = refused if is_of_opacus(mode) else ""
        require(is_fit, "mode", mode, "one of our private modes, or one of yours", advice)


def planted_in_turn(faults: Sequence[Fault]) -> tuple[str, ...]:
    """The healthy sharded flash modes, and each fault in one of them."""
    places = {name: number for number, name in enumerate(FAULTS)}
    planted = [
        with_planted(fault.modes[places[fault.name] % len(fault.modes)], fault.name)
        for fault in faults
    ]
    return (BASELINE, *FSDP_MODES, *planted)


def planted_in(mode: str, faults: Sequence[Fault], mutes: Sequence[str] = ()) -> tuple[str, ...]:
    """A healthy mode, and every fault that can be planted in it.

    Faults whose seams someone else's mode does not have are planted in one of ours that tells as
    little.

    Args:
        mutes: what the mode does not tell.
    """
    return BASELINE, mode, *_planted(mode, faults, mutes)


def _planted(mode: str, faults: Sequence[Fault], mutes: Sequence[str]) -> Iterator[str]:
    for fault in faults:
        if is_ours(mode):
            if fault.fits(mode):
                yield with_planted(mode, fault.name)
        elif fault.fits_any_mode:
            yield with_planted(mode, fault.name)
        else:
            yield with_planted(fault.modes[0], *mutes, fault.name)


def mutes_of(mode: str, runs: Iterable[ModeRun]) -> tuple[str, ...] | None:
    """What `mode` does not tell, as its record of the probe's clip regime shows; None for none.

    Args:
        runs: of a group with the healthy mode and the reference.
    """
    recorded = {r.label: r.trajectory for r in runs if r.regime == PROBE_CLIP and not r.replay}
    told, reference = recorded.get(mode), recorded.get(REFERENCE)
    if told is None or reference is None:
        return None
    is_silent = {
        "without_norms": np.isnan(told.sample_norm).all(),
        "without_norms_by_parameter": np.isnan(told.sample_norm_by_parameter).all(),
        "without_clip_factors": np.isnan(told.clip_factor).all(),
        "without_empty_batches": told.num_steps < reference.num_steps,
    }
    assert set(is_silent) == set(MUTES)
    return tuple(mute for mute in is_silent if is_silent[mute])
