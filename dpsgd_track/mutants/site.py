"""A mode whose seams can be wrapped.

The mode's source is not changed, and closing the site restores everything.
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
"""The callable at a seam."""
Replacement = Callable[..., Any]
"""Called with the original, and then with the original's arguments."""


def _norms_one_by_one(replacement: Replacement) -> Replacement:
    def norms_of(original: Original, joined: Mapping[str, Any]) -> dict[str, Tensor]:
        def norm_sq_of(name: str, terms: Any) -> Any:
            return original({name: terms})[name]

        return {name: replacement(norm_sq_of, name, terms) for name, terms in joined.items()}

    return norms_of


def _sums_one_by_one(replacement: Replacement) -> Replacement:
    def sums_of(
        original: Original, joined: Mapping[str, Any], factors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        def sum_of(name: str, terms: Any, factor_B: Tensor) -> Any:
            return original({name: terms}, {name: factor_B})[name]

        return {n: replacement(sum_of, n, terms, factors[n]) for n, terms in joined.items()}

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
"""Adapters for seams where the engine passes many parameters at once: a replacement gets them
one by one."""

_OF_WHOLE_SUMS = (Seam.SUM_OF, Seam.PUT, Seam.PADDED_ROWS)
"""Seams that whole sums pass through, which a sharder that packs may bypass."""


def _add_part_by_part(
    source: NoiseSource, totals: Sequence[tuple[Tensor, LocalPart]], *, std: float
) -> None:
    """`NoiseSource.add_to`, with a call of `standard_normal` for each part."""
    for total, part in totals:
        total.add_(source.standard_normal(part).to(total.dtype), alpha=std)


class Site:
    """A mode whose seams can be wrapped."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Any = mode
        self.unreached: set[Seam] = set()
        """Seams with something planted that no step has reached yet."""
        self._undo = ExitStack()

    def wrap(self, seam: Seam, replacement: Replacement) -> None:
        """Call `replacement` in place of the callable at `seam`.

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
            # A GPU draws the noise of all parts in one go.
            self._set(owner, "add_to", _add_part_by_part)

    def before(self, seam: Seam, look: Callable[..., object]) -> None:
        """Call `look` before each call at `seam`, with the same arguments."""

        def replacement(original: Original, *args: Any) -> Any:
            look(*args)
            return original(*args)

        self.wrap(seam, replacement)

    def after(self, seam: Seam, look: Callable[[Any], object]) -> None:
        """Call `look` with each result of `seam`, which it may change in place."""

        def replacement(original: Original, *args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            look(result)
            return result

        self.wrap(seam, replacement)

    def over_ranks(self, number: float) -> float:
        """Sum of `number` over ranks."""
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
        """This rank's shards of the optimizer's input, which may be changed in place."""
        return {part.name: part.local for part in self.mode.gradient_parts()}

    def close(self) -> None:
        """Remove everything that was planted."""
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
