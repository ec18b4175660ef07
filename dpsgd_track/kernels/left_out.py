"""Samples that are left out of a clipped sum: those whose factor is 0.

0 times NaN is NaN. Of a sample that must not contribute, nothing may therefore be multiplied, not
even by 0: its inputs and its gradients may be anything.

Shapes: B samples.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def kept_samples(factor_B: Tensor) -> Tensor | None:
    """Which samples have a factor other than 0, [B] bool; None where all are known to have one.

    A CPU looks. Elsewhere a look would wait for the device.
    """
    if factor_B.is_cpu and _are_all_kept(factor_B):
        return None
    return factor_B != 0


_last: tuple[weakref.ref[Tensor], int, bool] | None = None
"""Factors that were looked at last, their version and the answer: a batch has one for all sums."""


def _are_all_kept(factor_B: Tensor) -> bool:
    global _last
    version = factor_B._version
    if _last is None or _last[0]() is not factor_B or _last[1] != version:
        _last = weakref.ref(factor_B), version, bool(factor_B.all())
    return _last[2]


def only_kept(tensor: Tensor, is_kept_B: Tensor | None) -> Tensor:
    """`tensor`, [B, ...], without the samples that are left out.

    On CPU they are gone; elsewhere, where their number is not known, they are zeros.
    """
    if is_kept_B is None:
        return tensor
    if tensor.is_cpu:
        return tensor[is_kept_B]
    return torch.where(is_kept_B.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0)
