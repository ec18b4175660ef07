"""What a mutant is: a few lines that replace what happens at one or two seams of a correct mode."""

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
"""Source of what nobody reported, and is easily written."""

FUSED_BK = "flash_fsdp_fuse_bk"
FSDP_MODES = ("flash_fsdp", "flash_fsdp_bk", "flash_fsdp_fuse", FUSED_BK)
"""Modes that a mutant is planted in by default: each in one of them, in turn."""
_OF_FUSED_BK = "fused", "bookkeeping"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One known defect."""

    name: str
    kind: str
    """Class of mutants: the module that it stands in."""
    title: str
    """What goes wrong, in a few words."""
    about: str
    """What comes of it, or how one gets there."""
    source: str
    """Where it was found, or `PLAUSIBLE`."""
    formula: str
    """What is computed, and in place of what."""
    needs: tuple[Need, ...]
    """What a test has to have for it to show."""
    stage: Stage
    """Stage of a step that is to be blamed."""
    where: tuple[str, ...]
    """Patterns of the parameters that are to be blamed; empty where it has no place."""
    in_bf16: str
    """Why it is not found where modes compute in bfloat16; empty where it is."""
    seams: tuple[Seam, ...]
    """Where it is planted."""
    modes: tuple[str, ...]
    """Of the sharded flash modes, those that it can be planted in."""
    plant: Callable[[Site], None]

    @property
    def fits_any_mode(self) -> bool:
        """Whether every mode has its seams."""
        return all(seam.is_of_every_mode for seam in self.seams)

    def fits(self, mode: str) -> bool:
        """Whether it can be planted in one of our own modes, sharded or not."""
        spec = spec_of(mode)
        keeps_gradients = spec is not None and (spec.norm_rule, spec.strategy) == _OF_FUSED_BK
        return FUSED_BK in self.modes or not keeps_gradients

    @property
    def needs_ranks(self) -> bool:
        """Whether it shows on several ranks alone."""
        return not OF_RANKS.isdisjoint(self.needs)


MUTANTS: dict[str, Mutant] = {}
"""Every mutant by name."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
By = Callable[[Site, Callable[..., Any]], object]
"""Plants a function at a site."""


def on_site(site: Site, function: Callable[[Site], object]) -> None:
    """Have the function plant what it likes."""
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
) -> Callable[[_Function], _Function]:
    """Register the function below as a mutant of the same name.

    Args:
        at: seams.
        by: how the function is planted; None: it is what replaces the one seam.
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
            about=function.__doc__ or "",
            source=source,
            formula=formula,
            needs=needs,
            stage=stage,
            where=where,
            in_bf16=in_bf16,
            seams=seams,
            modes=modes,
            plant=plant,
        )
        return function

    return register
