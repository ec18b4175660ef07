"""Norms and clipped sums of materialised gradients, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpsgd_track.kernels.left_out import kept_samples, only_kept
from dpsgd_track.kernels.tensor_table import write_rows


def norms_sq(grads: Sequence[Tensor]) -> Tensor:
    """[parameters, B]; see `kernels.weighted_sum`."""
    return torch.stack([_norm_sq(grad) for grad in grads])


def _norm_sq(grad: Tensor) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.unsqueeze(-1) if grad.dim() == 1 else grad
    # Needs no copy in another type, and takes any order in memory.
    return torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.dim())), dtype=dtype).square()


def weighted_sums(grads: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """sum_i c_i g_i of each parameter; see `kernels.weighted_sum`."""
    return [_weighted_sum(grad, factor_B) for grad, factor_B in zip(grads, factors, strict=True)]


def _weighted_sum(grad: Tensor, factor_B: Tensor) -> Tensor:
    is_kept_B = kept_samples(factor_B)
    factor_B = only_kept(factor_B, is_kept_B)
    # A transposed gradient is summed as it lies in memory, and the sum transposed at the end.
    is_transposed = grad.dim() == 3 and grad.mT.is_contiguous() and not grad.is_contiguous()
    rows = only_kept(grad.mT if is_transposed else grad, is_kept_B)
    # Not -1, which is ambiguous for zero samples.
    flat = rows.reshape(len(rows), rows.shape[1:].numel()).to(factor_B.dtype)
    total = (factor_B @ flat).view(rows.shape[1:])
    return (total.mT if is_transposed else total).contiguous()


def weighted_sums_into(
    outs: Sequence[Tensor], grads: Sequence[Tensor], factors: Sequence[Tensor]
) -> None:
    """The same sums, written into the rows of `outs`."""
    for out, total in zip(outs, weighted_sums(grads, factors), strict=True):
        write_rows(out, total)
