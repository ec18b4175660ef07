"""Builds a mode from a name such as `mode+fault`, with the named faults planted."""

from __future__ import annotations

from torch import nn

from dpsgd_track.config import nearest, require
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import split_planted
from dpsgd_track.mutants.catalogue import MUTANTS
from dpsgd_track.mutants.mutant import Mutant
from dpsgd_track.mutants.redaction import Redaction
from dpsgd_track.mutants.site import Site
from dpsgd_track.program import command


def find_planted(name: str) -> Mutant | Redaction:
    """The mutant or redaction of that name.

    Raises:
        ValueError: there is none.
    """
    if name in list(Redaction):
        return Redaction(name)
    advice = f"{nearest(name, MUTANTS)} `{command('faults', ['--list'])}` lists them.".strip()
    require(name in MUTANTS, "fault", name, "a known fault", advice)
    return MUTANTS[name]


def check_planted(mode: str) -> None:
    """Raise ValueError unless all mutants and redactions in the name are known."""
    for name in split_planted(mode)[1]:
        find_planted(name)


class Planter:
    """Builds one mode at a time, since some mutants patch code that modes share."""

    def __init__(self) -> None:
        self._site: Site | None = None

    def build(self, name: str, model: nn.Module, context: ModeContext) -> Mode:
        """Build a mode and plant the mutants and redactions of its name.

        Those planted before are removed.
        """
        self.close()
        mode_name, planted = split_planted(name)
        mode = build_mode(mode_name, model, context)
        if planted:
            self._site = Site(mode)
            for each in planted:
                find_planted(each).plant(self._site)
        return mode

    def unreached(self) -> tuple[str, ...]:
        """Seams with something planted that no step has reached."""
        return tuple(sorted(map(str, self._site.unreached))) if self._site else ()

    def close(self) -> None:
        """Remove what is planted."""
        if self._site is not None:
            self._site.close()
            self._site = None
