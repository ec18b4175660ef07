"""The modes of a launch with the code they run, and what is left out for what they decline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dpsgd_track.config import PROFILE, VariantConfig, require
from dpsgd_track.demands import Demand, LeftOut, left_out_of, sentences
from dpsgd_track.launcher.declarations import declined_demands
from dpsgd_track.launcher.regimes import is_run
from dpsgd_track.modes import table
from dpsgd_track.record.plan import Suite


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A mode with the code it runs."""

    mode: str
    variant: VariantConfig | None
    """None for the installed code."""
    declined: tuple[Demand, ...]
    """Demands that it declines."""

    @property
    def label(self) -> str:
        """`mode` or `mode@variant`."""
        return f"{self.mode}@{self.variant.name}" if self.variant else self.mode

    @property
    def runs_on_one_rank(self) -> bool:
        """True if it has the micro-batches of all ranks on one."""
        declines_ranks = Demand.SEVERAL_RANKS in self.declined
        return declines_ranks or table.runs_on_one_device(self.mode)

    def regimes(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the regimes `names` that it has a run in."""
        return tuple(name for name in names if is_run(self.mode, name, self.declined))

    def left_out(self, names: Sequence[str]) -> Iterator[LeftOut]:
        """Parts of the regimes `names` that are left out for the demands it declines."""
        by_kind = [name for name in names if is_run(self.mode, name)]
        return left_out_of(self.label, by_kind, self.declined)


def entrants_of(modes: Sequence[str], variant: VariantConfig | None = None) -> tuple[Entrant, ...]:
    """`modes` with the installed code, or with that of `variant`."""
    declined = declined_demands(modes, variant)
    return tuple(Entrant(mode=mode, variant=variant, declined=declined[mode]) for mode in modes)


def regimes_of_others(entrants: Iterable[Entrant], regimes: Sequence[str]) -> tuple[str, ...]:
    """Those of `regimes` in which a mode besides the reference has a run: it judges others."""
    others = [each for each in entrants if each.mode != table.REFERENCE]
    return tuple(name for name in regimes if not others or any(e.regimes([name]) for e in others))


def check_entrants(
    suite: Suite, entrants: Iterable[Entrant], regimes: Sequence[str], num_ranks: int
) -> None:
    """Raise ValueError if what is left out leaves nothing to compare."""
    others = [e for e in entrants if e.mode != table.REFERENCE]
    absent = [e for e in others if not e.regimes(regimes)]
    # Faults that are planted in a mode that does not run would prove nothing.
    if absent and (len(absent) == len(others) or suite is Suite.FAULTS):
        reasons = "; ".join(sentences(each for e in absent for each in e.left_out(regimes)))
        advice = f"{reasons[:1].upper()}{reasons[1:]}." if reasons else ""
        names = ",".join(e.label for e in absent)
        require(False, "mode", names, f"a mode with a run in {' or '.join(regimes)}", advice)
    for each in others:
        is_unlike = PROFILE in regimes and Demand.SEVERAL_RANKS in each.declined
        require(
            num_ranks == 1 or not is_unlike,
            "nproc_per_node",
            num_ranks,
            f"1, as {each.label} takes no several ranks and is timed beside no_dp",
        )
