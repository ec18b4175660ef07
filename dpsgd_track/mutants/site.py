"""A mode with its seams open.

Nothing of a mode's code is touched, and everything is as it was once the site is closed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.config import require
from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.mutants import seams
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.privacy.noise import NoiseSource

Original = Callable[..., Any]
"""What lies at a seam."""
Replacement = Callable[..., Any]
"""Takes the original, and then that one's own arguments."""


def _norms_one_by_one(replacement: Replacement) -> Replacement:
    def norms_of(original: Original, joined: Mapping[str, Any]) -> dict[str, Tensor]:
        def norm_sq_of(name: str, terms: Any) -> Any:
            return original({name: terms})[name]

        return {name: replacement(norm_sq_of, name, terms) for name, terms in joined.items()}

    return norms_of


def _sums_one_by_one(replacement: Replacement) -> Replacement:
    def sums_of(
        original: Original, joined: Mapping[str, Any], factor_B: Tensor
    ) -> dict[str, Tensor]:
        def sum_of(name: str, terms: Any, factor_B: Tensor) -> Any:
            return original({name: terms}, factor_B)[name]

        return {name: replacement(sum_of, name, terms, factor_B) for name, terms in joined.items()}

    return sums_of


def _put_one_by_one(replacement: Replacement) -> Replacement:
    def put(original: Original, sums: Mapping[str, Tensor]) -> None:
        for name, total in sums.items():
            replacement(lambda name, total: original({name: total}), name, total)

    return put


_ONE_BY_ONE = {
    Seam.NORM_SQ_OF: _norms_one_by_one,
    Seam.SUM_OF: _sums_one_by_one,
    Seam.PUT: _put_one_by_one,
}
"""Seams where the engine takes many parameters at once, and a replacement each by itself."""

_OF_WHOLE_SUMS = (Seam.SUM_OF, Seam.PUT, Seam.PADDED_ROWS)
"""Seams that whole sums come by, which a sharder that packs may do without."""


def _add_part_by_part(
    source: NoiseSource, totals: Sequence[tuple[Tensor, LocalPart]], *, std: float
) -> None:
    """`NoiseSource.add_to`, by `standard_normal` of each part."""
    for total, part in totals:
        total.add_(source.standard_normal(part).to(total.dtype), alpha=std)


class Site:
    """A mode with its seams open."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Any = mode
        self.unreached: set[Seam] = set()
        """Seams at which something was planted and that no step has come by so far."""
        self._undo = ExitStack()

    def wrap(self, seam: Seam, replacement: Replacement) -> None:
        """Have `replacement` called in place of what lies at `seam`.

        Raises:
            ValueError: the mode has no such seam.
        """
        owner, attribute = self._find(seam)
        replacement = _ONE_BY_ONE.get(seam, lambda same: same)(replacement)
        original = getattr(owner, attribute)
        self.unreached.add(seam)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            self.unreached.discard(seam)
            return replacement(original, *args, **kwargs)

        self._set(owner, attribute, replaced)
        if seam in _OF_WHOLE_SUMS:
            self._set(self.mode.engine.sharder, "packs", False)
        if seam is Seam.STANDARD_NORMAL:
            # A GPU draws all parts' noise in one go.
            self._set(owner, "add_to", _add_part_by_part)

    def before(self, seam: Seam, look: Callable[..., object]) -> None:
        """Have `look` called first whenever a step comes by `seam`, with the same arguments."""

        def replacement(original: Original, *args: Any) -> Any:
            look(*args)
            return original(*args)

        self.wrap(seam, replacement)

    def after(self, seam: Seam, look: Callable[[Any], object]) -> None:
        """Have `look` called with what comes of `seam`, which it may change in place."""

        def replacement(original: Original, *args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            look(result)
            return result

        self.wrap(seam, replacement)

    def over_ranks(self, number: float) -> float:
        """The sum of a number of each rank."""
        total = torch.tensor(float(number), device=self.mode.context.device)
        dist.all_reduce(total)
        return float(total)

    def sums(self) -> dict[str, Tensor]:
        """This rank's shards of the step's clipped sum so far, which may be changed in place."""
        engine = getattr(self.mode, "engine", None)
        if engine is not None and engine.capture is not None:
            sums: dict[str, Tensor] = engine.sharder.sums
            return sums
        return self.gradients()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's shards of what the optimizer is given, which may be changed in place."""
        return {part.name: part.local for part in self.mode.gradient_parts()}

    def close(self) -> None:
        """Take out everything that was planted."""
        self._undo.close()

    def _find(self, seam: Seam) -> tuple[Any, str]:
        if not seam.is_of_every_mode:
            has_engine = getattr(getattr(self.mode, "engine", None), "capture", None) is not None
            allowed = f"a mode with the seam {seam}"
            require(has_engine, "mode", type(self.mode).__name__, allowed, "Only our own have it.")
        match seam.root:
            case seams.MODE:
                root = self.mode
            case seams.ENGINE:
                root = self.mode.engine
            case module:
                root = import_module(module)
        above, _, attribute = seam.path.rpartition(".")
        return (attrgetter(above)(root) if above else root), attribute

    def _set(self, owner: Any, attribute: str, value: object) -> None:
        if attribute in vars(owner):
            self._undo.callback(setattr, owner, attribute, getattr(owner, attribute))
        else:
            self._undo.callback(delattr, owner, attribute)
        setattr(owner, attribute, value)
