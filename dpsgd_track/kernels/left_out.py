"""Samples that are left out of a clipped sum: those whose factor is 0.

0 times NaN is NaN. Of a sample that must not contribute, nothing may therefore be multiplied, not
even by 0: its inputs and its gradients may be anything.

Shapes: B samples.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def kept_samples(factor_B: Tensor) -> Tensor | None:
    """Which samples have a factor other than 0, [B] bool; None where all have one.

    A CPU looks. Elsewhere a look would wait for the device: all may be assumed to have one.
    """
    if factor_B.is_cpu:
        return None if _are_all_kept(factor_B) else factor_B != 0
    if _assumption is not None:
        _assumption.was_made = True
        return None
    return factor_B != 0


class Assumption:
    """That no sample is left out; see `assuming_all_kept`."""

    def __init__(self) -> None:
        self.was_made = False
        """Whether a sum depends on it."""


_assumption: Assumption | None = None


@contextmanager
def assuming_all_kept() -> Iterator[Assumption]:
    """Within it, sums on a device take no sample to be left out, which saves a pass over its data.

    Who is inside finds out afterwards whether that was so, and forms the sums again if not.
    """
    global _assumption
    _assumption = made = Assumption()
    try:
        yield made
    finally:
        _assumption = None


_last: tuple[weakref.ref[Tensor], int, bool] | None = None
"""Factors that were looked at last, their version and the answer: a batch has one for all sums."""


def _are_all_kept(factor_B: Tensor) -> bool:
    global _last
    version = factor_B._version
    if _last is None or _last[0]() is not factor_B or _last[1] != version:
        _last = weakref.ref(factor_B), version, bool(factor_B.all())
    return _last[2]


def answer_later(is_so: Tensor) -> Callable[[], bool]:
    """A yes or no of a GPU on its way to the host; the call waits for this answer alone."""
    on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
    on_host.copy_(is_so, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def answer() -> bool:
        event.synchronize()
        return bool(on_host)

    return answer


def only_kept(tensor: Tensor, is_kept_B: Tensor | None) -> Tensor:
    """`tensor`, [B, ...], without the samples that are left out.

    On CPU they are gone; elsewhere, where their number is not known, they are zeros.
    """
    if is_kept_B is None:
        return tensor
    if tensor.is_cpu:
        return tensor[is_kept_B]
    return torch.where(is_kept_B.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0)
