"""Known defects of DP-SGD code, each as a small patch of a correct mode.

A mode with a fault planted in it is called `mode+fault`, and runs wherever a mode does:
`launch.py quick --mode no_dp,flash_fsdp+mean_clip_factor`.
"""

from __future__ import annotations

from torch import nn

from dpsgd_track.config import require
from dpsgd_track.faults import (
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
from dpsgd_track.faults.fault import FAULTS, Fault, Site
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import split_planted

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
        ValueError: listing the known ones.
    """
    require(name in FAULTS, "fault", name, f"one of {', '.join(FAULTS)}")
    return FAULTS[name]


def build(name: str, model: nn.Module, context: ModeContext) -> Mode:
    """`build_mode`, and the fault that the name asks for planted in what it built.

    Faults that were planted in this process before are taken out: some lie in code that modes
    share.
    """
    while _open:
        _open.pop().close()
    mode_name, fault_name = split_planted(name)
    mode = build_mode(mode_name, model, context)
    if fault_name:
        site = Site(mode)
        _open.append(site)
        find_fault(fault_name).plant(site)
    return mode


__all__ = ["FAULTS", "KINDS", "Fault", "build", "find_fault"]
