"""Choice of the mutants that are planted in each mode."""

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
from dpsgd_track.mutants.catalogue import KINDS, MUTANTS
from dpsgd_track.mutants.mutant import FSDP_MODES, Mutant
from dpsgd_track.mutants.redaction import Redaction
from dpsgd_track.program import command
from dpsgd_track.record.run import ModeRun

_OURS = ("two_pass", "bookkeeping")


def chosen_mutants(asked: Sequence[str]) -> tuple[Mutant, ...]:
    """Mutants by their names and classes, in the catalogue's order; all if `asked` is empty.

    Raises:
        ValueError: a name is neither a mutant nor a class.
    """
    for name in asked:
        allowed = f"a fault, or one of the classes {', '.join(KINDS)}"
        near = nearest(name, (*KINDS, *MUTANTS))
        advice = f"{near} `{command('faults', ['--list'])}` lists the faults.".strip()
        require(name in KINDS or name in MUTANTS, "fault", name, allowed, advice)
    ordered = sorted(MUTANTS.values(), key=lambda mutant: list(KINDS).index(mutant.kind))
    return tuple(m for m in ordered if not asked or m.name in asked or m.kind in asked)


def is_ours(mode: str) -> bool:
    """True if `mode` is a composition of this package, which has every seam."""
    spec = spec_of(mode)
    return spec is not None and spec.strategy in _OURS


def check_modes(modes: Sequence[str]) -> None:
    """Raise ValueError for a mode that nothing can be planted in."""
    for mode in modes:
        check_mode(mode)
        require(not split_planted(mode)[1], "mode", mode, "a mode without faults", "Use --fault.")
        spec = spec_of(mode)
        is_fit = is_ours(mode) or (spec is None and mode not in (BASELINE, REFERENCE))
        refused = "Opacus's modes refuse the probe's tied and reused weights."
        advice = refused if is_of_opacus(mode) else ""
        require(is_fit, "mode", mode, "one of our private modes, or one of yours", advice)


def planted_in_turn(mutants: Sequence[Mutant]) -> tuple[str, ...]:
    """The healthy sharded flash modes, and each mutant planted in one of them."""
    places = {name: number for number, name in enumerate(MUTANTS)}
    planted = [
        with_planted(mutant.modes[places[mutant.name] % len(mutant.modes)], mutant.name)
        for mutant in mutants
    ]
    return (BASELINE, *FSDP_MODES, *planted)


def planted_in(
    mode: str, mutants: Sequence[Mutant], redactions: Sequence[Redaction] = ()
) -> tuple[str, ...]:
    """The healthy mode, and every mutant that can be planted in it.

    Mutants at seams that a user's mode lacks are planted in a built-in mode that reports as
    little as the user's does.

    Args:
        redactions: of the fields that the mode does not report.
    """
    return BASELINE, mode, *_planted(mode, mutants, redactions)


def _planted(
    mode: str, mutants: Sequence[Mutant], redactions: Sequence[Redaction]
) -> Iterator[str]:
    for mutant in mutants:
        if is_ours(mode):
            if mutant.fits(mode):
                yield with_planted(mode, mutant.name)
        elif mutant.fits_any_mode:
            yield with_planted(mode, mutant.name)
        else:
            yield with_planted(mutant.modes[0], *redactions, mutant.name)


def redactions_of(mode: str, runs: Iterable[ModeRun]) -> tuple[Redaction, ...] | None:
    """Fields that `mode` does not report, according to its record of the probe's clip regime.

    Args:
        runs: of a group with the healthy mode and the reference.
    Returns:
        None if one of the two has no record.
    """
    recorded = {r.label: r.trajectory for r in runs if r.regime == PROBE_CLIP and not r.replay}
    own, reference = recorded.get(mode), recorded.get(REFERENCE)
    if own is None or reference is None:
        return None
    is_silent = {
        Redaction.NORMS: np.isnan(own.sample_norm).all(),
        Redaction.NORMS_BY_PARAMETER: np.isnan(own.sample_norm_by_parameter).all(),
        Redaction.CLIP_FACTORS: np.isnan(own.clip_factor).all(),
        Redaction.EMPTY_BATCHES: own.num_steps < reference.num_steps,
    }
    return tuple(redaction for redaction in Redaction if is_silent[redaction])
