"""Known defects of DP-SGD code, each as a small patch of a correct mode.

A mode with a fault planted in it is called `mode+fault`, and runs wherever a mode does:
`launch.py quick --mode no_dp,flash_fsdp+mean_clip_factor`.
"""

from __future__ import annotations

from torch import nn

from dpsgd_track.config import nearest, require
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import split_planted
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
from dpsgd_track.mutants.fault import FAULTS, Fault, Site
from dpsgd_track.mutants.redaction import MUTES

KINDS = {
    module.__name__.rpartition(".")[2]: (module.__doc__ or "").partition("\n")[0]
    for module in (
        losses,
        norms,
        clipping,
        sums,
        accumulation,
        ranks,
        noise,
        updates,
        precision,
    )
}
"""Classes of faults, in the order of a step, and what each is about."""

_open: list[Site] = []
"""Where faults are planted in this process."""


def find_fault(name: str) -> Fault:
    """The fault of that name.

    Raises:
        ValueError: there is none.
    """
    advice = f"{nearest(name, FAULTS)} `dpsgd-track faults --list` lists them.".strip()
    require(name in FAULTS, "fault", name, "a known fault", advice)
    return FAULTS[name]


def check_planted(mode: str) -> None:
    """Raise ValueError unless everything that the name asks to be planted is known."""
    for name in split_planted(mode)[1]:
        if name not in MUTES:
            find_fault(name)


def build(name: str, model: nn.Module, context: ModeContext) -> Mode:
    """`build_mode`, and what the name asks for planted in what it built.

    What was planted in this process before is taken out: some of it lies in code that modes share.
    """
    while _open:
        _open.pop().close()
    mode_name, planted = split_planted(name)
    mode = build_mode(mode_name, model, context)
    if planted:
        site = Site(mode)
        _open.append(site)
        for each in planted:
            plant = MUTES[each] if each in MUTES else find_fault(each).plant
            plant(site)
    return mode


def unreached_seams() -> list[str]:
    """Where something is planted in this process that no step has come by."""
    return sorted({seam for site in _open for seam in site.unreached})


__all__ = [
    "FAULTS",
    "KINDS",
    "MUTES",
    "Fault",
    "build",
    "check_planted",
    "find_fault",
    "unreached_seams",
]
