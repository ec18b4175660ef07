"""Demands of a run on its mode. A mode may decline one, and what makes it is then left out."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dpsgd_track.config import ACCURACY, NOISE, PROBE_CLIP, is_probe, kind_of


class Demand(enum.StrEnum):
    """A demand, in words; a mode declines it by, say, `takes_tied_weights = False`."""

    TIED_WEIGHTS = "tied weights"
    REUSED_LAYERS = "layers that are used twice"
    UNUSED_LAYERS = "layers that no sample uses"
    OTHER_MODELS = "models of other classes"
    EMPTY_BATCHES = "empty batches"
    GIVEN_NOISE = "noise that it is given"
    SEVERAL_RANKS = "several ranks"

    @property
    def attribute(self) -> str:
        """Attribute of a mode that declines it by being False."""
        return f"takes_{self.name.lower()}"


ATTRIBUTES = frozenset(demand.attribute for demand in Demand)
"""Attributes of a mode that say what it takes."""
_OF_PROBE = frozenset(
    (Demand.TIED_WEIGHTS, Demand.REUSED_LAYERS, Demand.UNUSED_LAYERS, Demand.OTHER_MODELS)
)


def declined_by(factory: object) -> tuple[Demand, ...]:
    """Demands that a mode, its class or its factory declines."""
    return tuple(demand for demand in Demand if not getattr(factory, demand.attribute, True))


def model_demands(regime: str) -> frozenset[Demand]:
    """Demands that the model of `regime` is known to make before it is built."""
    return _OF_PROBE if is_probe(regime) else frozenset()


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One part of a comparison that a launch leaves out, with the reason."""

    label: str
    """`mode` or `mode@variant`."""
    reason: str
    """A clause, such as `it takes no tied weights`."""
    regimes: tuple[str, ...] = ()
    """Regimes that it is left out of; empty for all."""
    part: str = ""
    """Part of the regimes' runs that is left out, in words; empty for all of them."""


def sentences(left_out: Iterable[LeftOut]) -> tuple[str, ...]:
    """`not compared: ghost in probe-clip, as it takes no tied weights`, once for each reason."""
    labels: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for each in left_out:
        labels.setdefault((each.part, each.regimes, each.reason), []).append(each.label)
    return tuple(_sentence(of, *why) for why, of in labels.items())


def _sentence(labels: Sequence[str], part: str, regimes: Sequence[str], reason: str) -> str:
    where = f" in {_listed(regimes, 'and')}" if regimes else ""
    what = _listed(labels, "and")
    if len(labels) > 1:
        what = f"each of {what}"
    if part:
        what = f"{part} of {what}"
    return f"not compared: {what}{where}, as {reason}"


def left_out_of(
    label: str, regimes: Sequence[str], declined: Collection[Demand]
) -> Iterator[LeftOut]:
    """Parts of `regimes` that are left out for a mode that declines demands."""
    whole = tuple(name for name in regimes if model_demands(name) & set(declined))
    others = [name for name in regimes if name not in whole]
    if whole:
        demands = [d for d in declined if any(d in model_demands(name) for name in whole)]
        yield LeftOut(label=label, regimes=whole, reason=f"it takes no {_listed(demands, 'or')}")
    parts = {
        Demand.EMPTY_BATCHES: (
            "steps with an empty batch",
            [name for name in others if kind_of(name) == NOISE or name == PROBE_CLIP],
        ),
        Demand.GIVEN_NOISE: (
            "noise and all that follows from it",
            [name for name in others if kind_of(name) == ACCURACY],
        ),
    }
    for demand, (part, names) in parts.items():
        if demand in declined and names:
            reason = f"it takes no {demand}"
            yield LeftOut(label=label, regimes=tuple(names), part=part, reason=reason)


def _listed(words: Sequence[str], conjunction: str) -> str:
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last
