"""The table of modes, one line a mode. Imports no torch, so that listing modes is instant."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

from dpsgd_track.config import GRADIENTS, nearest, require
from dpsgd_track.demands import Demand


@dataclass(frozen=True)
class ModeSpec:
    """A mode as a composition of independent parts."""

    name: str
    norm_rule: str
    """none, ghost, flash, fused, materialised (explicit per-sample gradients of a whole batch), or
    autograd (explicit gradients of one sample)."""
    strategy: str
    """unclipped, two_pass, bookkeeping, one_by_one, or opacus (the library's own step)."""
    sharding: str
    """fsdp2, opacus_fsdp2 (the library's own wrapper), replicated (every rank holds the whole
    model), or none (one device)."""
    summary: str
    grad_sample_mode: str = ""
    """Opacus's name of the mode; empty for other modes."""

    @property
    def is_private(self) -> bool:
        """True if the mode clips."""
        return self.norm_rule != "none"

    @property
    def runs_on_one_device(self) -> bool:
        """True if the mode runs on a single rank."""
        return self.sharding == "none"


_HOOKS_1, _HOOKS_2 = "tiled norms in hooks, one backward", "tiled norms in hooks, two backwards"
_FUSED_1 = "norms inside linear backward, one backward"
_FUSED_2 = "norms inside linear backward, two backwards"
_GHOST_1 = "ghost norms in hooks, one backward"

_TABLE = (
    ModeSpec("no_dp", "none", "unclipped", "fsdp2", "ordinary training, the baseline"),
    ModeSpec(
        "ghost_fsdp",
        "ghost",
        "opacus",
        "opacus_fsdp2",
        "Opacus's own FSDP ghost clipping",
        grad_sample_mode="ghost_fsdp",
    ),
    ModeSpec("ghost_fsdp_bk", "ghost", "bookkeeping", "fsdp2", _GHOST_1),
    ModeSpec("flash_fsdp", "flash", "two_pass", "fsdp2", _HOOKS_2),
    ModeSpec("flash_fsdp_bk", "flash", "bookkeeping", "fsdp2", _HOOKS_1),
    ModeSpec("flash_fsdp_fuse", "fused", "two_pass", "fsdp2", _FUSED_2),
    ModeSpec("flash_fsdp_fuse_bk", "fused", "bookkeeping", "fsdp2", _FUSED_1),
    ModeSpec("no_dp_single", "none", "unclipped", "none", "ordinary training on one device"),
    ModeSpec(
        "ghost",
        "ghost",
        "opacus",
        "none",
        "Opacus's own ghost clipping",
        grad_sample_mode="ghost",
    ),
    ModeSpec("ghost_bk", "ghost", "bookkeeping", "none", _GHOST_1),
    ModeSpec("flash", "flash", "two_pass", "none", _HOOKS_2),
    ModeSpec("flash_bk", "flash", "bookkeeping", "none", _HOOKS_1),
    ModeSpec("flash_fuse", "fused", "two_pass", "none", _FUSED_2),
    ModeSpec("flash_fuse_bk", "fused", "bookkeeping", "none", _FUSED_1),
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
SINGLE_BASELINE = "no_dp_single"
"""Baseline that modes on one device are timed against."""
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


OPACUS_DECLINES = (Demand.TIED_WEIGHTS, Demand.REUSED_LAYERS, Demand.EMPTY_BATCHES)
"""Demands that Opacus's modes decline."""

_PLANTED = "+"
_OPACUS = "opacus"
_ENTRY_POINTS = "dpsgd_track.modes"


def split_planted(name: str) -> tuple[str, tuple[str, ...]]:
    """(mode, faults) of `mode+fault`, a mode with known faults planted in it."""
    mode, *faults = name.split(_PLANTED)
    return mode, tuple(faults)


def with_planted(mode: str, *faults: str) -> str:
    """The name of `mode` with `faults` planted in it."""
    return _PLANTED.join([mode, *faults])


def spec_of(name: str) -> ModeSpec | None:
    """The parts of a built-in mode or of `opacus:GRAD_SAMPLE_MODE`; None for a user's own mode.

    Planted faults do not change them.
    """
    name, _ = split_planted(name)
    if name in MODES:
        return MODES[name]
    library, _, mode = name.partition(":")
    # A factory inside the library itself is named by its submodule, `opacus.module:factory`.
    if library != _OPACUS:
        return None
    rules = {"fuse": "fused", "flash": "flash", "ghost": "ghost"}
    return ModeSpec(
        name,
        next((rule for part, rule in rules.items() if part in mode), "materialised"),
        _OPACUS,
        "opacus_fsdp2" if "fsdp" in mode else "none",
        f"Opacus's grad_sample_mode {mode}",
        grad_sample_mode=mode,
    )


def name_of_opacus(grad_sample_mode: str) -> str:
    """The mode that is Opacus's `grad_sample_mode`: one of the table, or `opacus:...`."""
    named = (spec.name for spec in _TABLE if spec.grad_sample_mode == grad_sample_mode)
    return next(named, f"{_OPACUS}:{grad_sample_mode}")


def is_private(name: str) -> bool:
    """True if mode `name` clips; assumed of users' modes."""
    spec = spec_of(name)
    return spec is None or spec.is_private


def is_of_opacus(name: str) -> bool:
    """True if mode `name` is one of Opacus's, as installed or as a variant."""
    spec = spec_of(name)
    return spec is not None and spec.strategy == _OPACUS


def is_of_package(name: str) -> bool:
    """True if mode `name` is computed by this package itself."""
    return name == REFERENCE or (spec_of(name) is not None and not is_of_opacus(name))


def declined_by_table(name: str) -> tuple[Demand, ...] | None:
    """Demands that mode `name` declines; None for a user's, which only its code can tell."""
    if spec_of(name) is None:
        return None
    return OPACUS_DECLINES if is_of_opacus(name) else ()


def takes_norm_plan(name: str, plan: str) -> bool:
    """True if mode `name` can compute all norms by `plan`.

    Only flash and fused norms have a choice; modes with two backwards keep no gradients.
    """
    spec = spec_of(name)
    if spec is None or spec.strategy == _OPACUS or spec.norm_rule not in ("flash", "fused"):
        return False
    return plan != GRADIENTS or spec.strategy == "bookkeeping"


def takes_memory_budget(name: str) -> bool:
    """True if mode `name` keeps terms of one backward, whose memory a budget can bound."""
    spec = spec_of(name)
    return spec is not None and spec.strategy == "bookkeeping"


def runs_on_one_device(name: str) -> bool:
    """True if mode `name` runs on a single rank; users' modes run on all ranks."""
    spec = spec_of(name)
    return spec is not None and spec.runs_on_one_device


def baseline_of(name: str) -> str:
    """The mode that `name` is timed against: ordinary training on as many devices."""
    return SINGLE_BASELINE if runs_on_one_device(name) else BASELINE


def plugged_in_modes() -> dict[str, str]:
    """Modes that installed packages provide as entry points: name -> `package.module:factory`.

    Raises:
        ValueError: a name is no identifier, is that of a built-in mode, or is provided twice.
    """
    factories: dict[str, str] = {}
    for entry in metadata.entry_points(group=_ENTRY_POINTS):
        where = f"entry point {entry.name} = {entry.value}"
        advice = f"Rename it in the package that brings it ({where})."
        require(entry.name.isidentifier(), "mode", entry.name, "an identifier", advice)
        is_new = entry.name not in MODES and factories.get(entry.name, entry.value) == entry.value
        require(is_new, "mode", entry.name, "a name that no other mode has", advice)
        factories[entry.name] = entry.value
    return factories


def factory_of(name: str) -> str:
    """`package.module:factory` of a user's own mode, which may be an entry point's name."""
    name, _ = split_planted(name)
    return name if ":" in name else plugged_in_modes().get(name, name)


def check_mode(name: str) -> None:
    """Raise unless `name` is a known mode or an importable `package.module:factory`.

    The `grad_sample_mode`s of Opacus are checked when Opacus is imported, not here.

    Raises:
        ValueError: naming the known modes.
    """
    name, _ = split_planted(name)
    if name in MODES:
        return
    module, _, factory = factory_of(name).partition(":")
    if not (module and factory.isidentifier()):
        names = [*MODES, *plugged_in_modes()]
        allowed = f"one of {', '.join(names)}, opacus:GRAD_SAMPLE_MODE, or package.module:factory"
        require(False, "mode", name, allowed, nearest(name, names))
    why = f"No module {module!r} is in the working directory, on PYTHONPATH or installed."
    try:
        is_importable = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        is_importable = False
    # The package around a user's module is imported, and may do anything.
    except (Exception, SystemExit) as error:
        is_importable, why = False, f"Its package raises {type(error).__name__}: {error}"
    require(is_importable, "mode", name, "a module that is there", why)
