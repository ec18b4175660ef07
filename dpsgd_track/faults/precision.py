"""Faults of rounding: right but for too few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpsgd_track.faults.fault import FACTORS, NORMS, Site, fault


@fault(
    "norm held in bfloat16",
    source="Opacus, in bfloat16",
    formula="n rounded to bfloat16",
    at="total_norm",
    stage=NORMS,
)
def norm_in_bf16(site: Site) -> None:
    """The norm of a clipped gradient reaches 1.004 C."""
    site.wrap("total_norm", lambda original, norm_sq: original(norm_sq).bfloat16().float())


@fault(
    "squared norms added in bfloat16",
    source="several libraries",
    formula="a running sum of n_p^2 in bfloat16",
    at="total_norm",
    needs="many parameters",
    stage=NORMS,
)
def squares_added_in_bf16(site: Site) -> None:
    """2.3 % are lost over 300 terms."""

    def total_norm(original: Any, norm_sq: dict[str, Tensor]) -> Tensor:
        total = torch.zeros_like(next(iter(norm_sq.values()))).bfloat16()
        for squares in norm_sq.values():
            total += squares.bfloat16()
        return total.float().sqrt()

    site.wrap("total_norm", total_norm)


@fault(
    "clip factor held in bfloat16",
    source="Opacus, in bfloat16",
    formula="c rounded to bfloat16",
    at="clip_factors",
    needs="clipping",
    stage=FACTORS,
)
def factor_in_bf16(site: Site) -> None:
    """Up to 0.4 % beyond C."""
    site.wrap("clip_factors", lambda original, *args: original(*args).bfloat16().float())
