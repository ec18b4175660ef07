"""The table of modes, one line a mode. Imports no torch, so that listing modes is instant."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from dpsgd_track.config import require


@dataclass(frozen=True)
class ModeSpec:
    """A mode as a composition of independent parts."""

    name: str
    norm_rule: str
    """none, ghost, flash, fused, or autograd (explicit gradients of one sample)."""
    strategy: str
    """plain, two_pass, bookkeeping, one_by_one, or opacus (the library's own step)."""
    sharding: str
    """fsdp2, opacus_fsdp2 (the library's own wrapper) or replicated."""
    summary: str

    @property
    def is_private(self) -> bool:
        """Whether the mode clips."""
        return self.norm_rule != "none"


_TABLE = (
    ModeSpec("no_dp", "none", "plain", "fsdp2", "ordinary training, the baseline"),
    ModeSpec("ghost_fsdp", "ghost", "opacus", "opacus_fsdp2", "Opacus's own FSDP ghost clipping"),
    ModeSpec("flash_fsdp", "flash", "two_pass", "fsdp2", "tiled norms in hooks, two backwards"),
    ModeSpec(
        "flash_fsdp_bk", "flash", "bookkeeping", "fsdp2", "tiled norms in hooks, one backward"
    ),
    ModeSpec(
        "flash_fsdp_fuse",
        "fused",
        "two_pass",
        "fsdp2",
        "norms inside linear backward, two backwards",
    ),
    ModeSpec(
        "flash_fsdp_fuse_bk",
        "fused",
        "bookkeeping",
        "fsdp2",
        "norms inside linear backward, one backward",
    ),
    ModeSpec(
        "reference", "autograd", "one_by_one", "replicated", "the oracle: one sample at a time"
    ),
)

MODES: dict[str, ModeSpec] = {spec.name: spec for spec in _TABLE}
"""Every built-in mode by name."""

BASELINE = "no_dp"
REFERENCE = "reference"
QUICK = ("no_dp", "flash_fsdp", "flash_fsdp_fuse")
FULL = (
    "no_dp",
    "ghost_fsdp",
    "flash_fsdp",
    "flash_fsdp_bk",
    "flash_fsdp_fuse",
    "flash_fsdp_fuse_bk",
)


def check_mode(name: str) -> None:
    """Raise unless `name` is a built-in mode or an importable `package.module:factory`.

    Raises:
        ValueError: naming the known modes.
    """
    known = f"one of {', '.join(MODES)}, or package.module:factory"
    module, separator, factory = name.partition(":")
    if not separator:
        require(name in MODES, "mode", name, known)
        return
    require(bool(module) and factory.isidentifier(), "mode", name, known)
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    require(found, "mode", name, known, f"No module {module!r} can be imported.")


def is_private(name: str) -> bool:
    """Whether mode `name` clips; a user's own mode is taken to."""
    return name not in MODES or MODES[name].is_private
