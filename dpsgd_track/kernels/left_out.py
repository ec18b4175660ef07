"""Samples that are left out of a clipped sum: those whose factor is 0.

0 times NaN is NaN. The inputs and gradients of such a sample may be anything, so they are dropped
or replaced by zeros, never multiplied by the factor 0.

Shapes: B samples.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def kept_samples(factor_B: Tensor) -> Tensor | None:
    """Mask of samples whose factor is not 0, [B] bool; None if none is left out.

    On a CPU the factors are inspected. On a GPU that would wait for the device: there the result
    is the mask, or None within `assuming_all_kept`.
    """
    if factor_B.is_cpu:
        return None if _are_all_kept(factor_B) else factor_B != 0
    if _assumption is not None:
        _assumption.was_made = True
        return None
    return factor_B != 0


class Assumption:
    """The assumption that no sample is left out; see `assuming_all_kept`."""

    def __init__(self) -> None:
        self.was_made = False
        """True if a sum relied on it."""


_assumption: Assumption | None = None


@contextmanager
def assuming_all_kept() -> Iterator[Assumption]:
    """Have sums on a GPU assume that no sample is left out, which saves a pass over their data.

    The caller checks afterwards whether that was so, and forms the sums again if not.
    """
    global _assumption
    _assumption = made = Assumption()
    try:
        yield made
    finally:
        _assumption = None


_last: tuple[weakref.ref[Tensor], int, bool] | None = None
"""Factors inspected last, their version, and the result: all sums of a batch share them."""


def _are_all_kept(factor_B: Tensor) -> bool:
    global _last
    version = factor_B._version
    if _last is None or _last[0]() is not factor_B or _last[1] != version:
        _last = weakref.ref(factor_B), version, bool(factor_B.all())
    return _last[2]


def only_kept(tensor: Tensor, is_kept_B: Tensor | None) -> Tensor:
    """`tensor`, [B, ...], without the samples that are left out.

    On a CPU their rows are removed. On a GPU, where their number is not known, they are zeroed.
    """
    if is_kept_B is None:
        return tensor
    if tensor.is_cpu:
        return tensor[is_kept_B]
    return torch.where(is_kept_B.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0)
