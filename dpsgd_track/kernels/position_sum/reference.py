"""Sums over positions, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpsgd_track.kernels.flash_norm.reference import accumulation_dtype


def position_sums(gradients: Sequence[Tensor]) -> list[Tensor]:
    """[B, T, D] -> [B, D] each; see `kernels.position_sum`."""
    return [gradient.sum(dim=1, dtype=accumulation_dtype(gradient)) for gradient in gradients]
