"""A mutant: a few lines that replace the code at one or two seams of a correct mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dpsgd_track.modes.table import spec_of
from dpsgd_track.mutants.needs import OF_RANKS, Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Site
from dpsgd_track.record.stages import Stage

PLAUSIBLE = "plausible"
"""Source of a mutant that nobody has reported, but that is easily written."""

FUSED_BK = "flash_fsdp_fuse_bk"
FSDP_MODES = ("flash_fsdp", "flash_fsdp_bk", "flash_fsdp_fuse", FUSED_BK)
"""Default modes of a mutant: it is planted in one of them, in turn."""
_OF_FUSED_BK = "fused", "bookkeeping"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One known defect."""

    name: str
    kind: str
    """Class of the mutant: the name of its module."""
    title: str
    """The defect, in a few words."""
    source: str
    """Report of the defect, or `PLAUSIBLE`."""
    formula: str
    """The formula that is computed, and the one that it replaces."""
    needs: tuple[Need, ...]
    """Conditions that a test must meet for the mutant to show."""
    stage: Stage
    """Stage of a step to blame."""
    where: tuple[str, ...]
    """Patterns of the parameters to blame; empty if no particular ones are at fault."""
    in_bf16: str
    """Reason why it is not detected if modes compute in bfloat16; empty if it is."""
    seams: tuple[Seam, ...]
    """Seams that it is planted at."""
    modes: tuple[str, ...]
    """The sharded flash modes that it can be planted in."""
    plant: Callable[[Site], None]
    since: int = 0
    """First step that it shows at."""

    @property
    def fits_any_mode(self) -> bool:
        """True if every mode has its seams."""
        return all(seam.is_of_every_mode for seam in self.seams)

    def fits(self, mode: str) -> bool:
        """True if it can be planted in the built-in mode `mode`, sharded or not."""
        spec = spec_of(mode)
        keeps_gradients = spec is not None and (spec.norm_rule, spec.strategy) == _OF_FUSED_BK
        return FUSED_BK in self.modes or not keeps_gradients

    @property
    def needs_ranks(self) -> bool:
        """True if it shows only with several ranks."""
        return not OF_RANKS.isdisjoint(self.needs)


MUTANTS: dict[str, Mutant] = {}
"""Every mutant by name."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
By = Callable[[Site, Callable[..., Any]], object]
"""Plants a function at a site."""


def on_site(site: Site, function: Callable[[Site], object]) -> None:
    """Let the function plant whatever it needs."""
    function(site)


def mutant(
    title: str,
    formula: str,
    *needs: Need,
    at: Seam | tuple[Seam, ...],
    stage: Stage,
    by: By | None = None,
    where: tuple[str, ...] = (),
    source: str = PLAUSIBLE,
    in_bf16: str = "",
    modes: tuple[str, ...] = FSDP_MODES,
    since: int = 0,
) -> Callable[[_Function], _Function]:
    """Register the decorated function as a mutant of the same name.

    Args:
        at: seams.
        by: how the function is planted; None if it replaces the one seam.
        since: first step that it shows at.
    """
    seams = at if isinstance(at, tuple) else (at,)

    def register(function: _Function) -> _Function:
        def plant(site: Site) -> None:
            if by is not None:
                by(site, function)
                return
            (seam,) = seams
            site.wrap(seam, function)

        name = function.__name__
        assert name not in MUTANTS
        MUTANTS[name] = Mutant(
            name=name,
            kind=function.__module__.rpartition(".")[2],
            title=title,
            source=source,
            formula=formula,
            needs=needs,
            stage=stage,
            where=where,
            in_bf16=in_bf16,
            seams=seams,
            modes=modes,
            plant=plant,
            since=since,
        )
        return function

    return register
