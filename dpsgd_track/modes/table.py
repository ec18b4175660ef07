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
    """none, ghost, flash, fused, materialised (explicit per-sample gradients of a whole batch), or
    autograd (explicit gradients of one sample)."""
    strategy: str
    """plain, two_pass, bookkeeping, one_by_one, or opacus (the library's own step)."""
    sharding: str
    """fsdp2, opacus_fsdp2 (the library's own wrapper), replicated, or none (one device)."""
    summary: str
    grad_sample_mode: str = ""
    """What Opacus calls a mode that it runs; empty for others."""

    @property
    def is_private(self) -> bool:
        """Whether the mode clips."""
        return self.norm_rule != "none"


_TABLE = (
    ModeSpec("no_dp", "none", "plain", "fsdp2", "ordinary training, the baseline"),
    ModeSpec(
        "ghost_fsdp",
        "ghost",
        "opacus",
        "opacus_fsdp2",
        "Opacus's own FSDP ghost clipping",
        grad_sample_mode="ghost_fsdp",
    ),
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
        "ghost",
        "ghost",
        "opacus",
        "none",
        "Opacus's own ghost clipping",
        grad_sample_mode="ghost",
    ),
    ModeSpec(
        "grad_materialize",
        "materialised",
        "opacus",
        "none",
        "Opacus's explicit per-sample gradients (hooks)",
        grad_sample_mode="hooks",
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


def spec_of(name: str) -> ModeSpec | None:
    """The parts of a built-in mode or of `opacus:GRAD_SAMPLE_MODE`; None for a user's own mode."""
    if name in MODES:
        return MODES[name]
    library, _, mode = name.partition(":")
    if library != "opacus":
        return None
    return ModeSpec(
        name,
        "ghost" if "ghost" in mode else "materialised",
        "opacus",
        "opacus_fsdp2" if "_fsdp" in mode else "none",
        f"Opacus's grad_sample_mode {mode}",
        grad_sample_mode=mode,
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
