"""From a mode's name to the mode, with what the name asks for planted in it."""

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


def find_planted(name: str) -> Mutant | Redaction:
    """The mutant, or the redaction, of that name.

    Raises:
        ValueError: there is none.
    """
    if name in list(Redaction):
        return Redaction(name)
    advice = f"{nearest(name, MUTANTS)} `dpsgd-track faults --list` lists them.".strip()
    require(name in MUTANTS, "fault", name, "a known fault", advice)
    return MUTANTS[name]


def check_planted(mode: str) -> None:
    """Raise ValueError unless everything that the name asks to be planted is known."""
    for name in split_planted(mode)[1]:
        find_planted(name)


class Planter:
    """Builds modes, one at a time: some of what is planted lies in code that modes share."""

    def __init__(self) -> None:
        self._site: Site | None = None

    def build(self, name: str, model: nn.Module, context: ModeContext) -> Mode:
        """`build_mode`, and what the name asks for planted in what it built.

        What was planted before is taken out.
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
        """The seams at which something is planted and that no step has come by."""
        return tuple(sorted(map(str, self._site.unreached))) if self._site else ()

    def close(self) -> None:
        """Take out what is planted."""
        if self._site is not None:
            self._site.close()
            self._site = None
