"""Faults of rounding: right but for too few bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.mutants.catalogue.norms import WITH_OUTER, of_changed_outers
from dpsgd_track.mutants.mutant import mutant
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original
from dpsgd_track.privacy.terms import Outer
from dpsgd_track.record.stages import Stage

_total_norm = partial(mutant, at=Seam.TOTAL_NORM, stage=Stage.NORMS)
_clip_factors = partial(mutant, at=Seam.CLIP_FACTORS, stage=Stage.FACTORS)


@_total_norm("norm held in bfloat16", "n rounded to bfloat16", source="Opacus, in bfloat16")
def norm_in_bf16(original: Original, norm_sq: dict[str, Tensor]) -> Any:
    """The norm of a clipped gradient reaches 1.004 C."""
    return original(norm_sq).bfloat16().float()


@_total_norm(
    "squared norms added in bfloat16",
    "a running sum of n_p^2 in bfloat16",
    Need.MANY_PARAMETERS,
    source="several libraries",
)
def squares_added_in_bf16(original: Original, norm_sq: dict[str, Tensor]) -> Tensor:
    """2.3 % are lost over 300 terms."""
    total = torch.zeros_like(next(iter(norm_sq.values()))).bfloat16()
    for squares in norm_sq.values():
        total += squares.bfloat16()
    return total.float().sqrt()


@_clip_factors(
    "clip factor held in bfloat16",
    "c rounded to bfloat16",
    Need.CLIPPING,
    source="Opacus, in bfloat16",
)
def factor_in_bf16(original: Original, norm_B: Tensor, bound: float) -> Any:
    """Clipped gradients exceed C by up to 0.4 %."""
    return original(norm_B, bound).bfloat16().float()


@_clip_factors("C held in float16", "min(1, C / n) with C rounded to float16", Need.CLIPPING)
def bound_in_fp16(original: Original, norm_B: Tensor, bound: float) -> Any:
    """Clipped gradients exceed C by up to 0.05 %, all samples alike."""
    return original(norm_B, float(torch.tensor(bound).half()))


def _shortened(values: Tensor) -> Tensor:
    # Rounds to the nearest number with 10 bits after the point.
    large = values * (2**13 + 1)
    return large - (large - values)


@mutant(
    "Gram matrices in TF32",
    "n^2 from activations and gradients of 11 bits",
    Need.FLOAT32,
    at=Seam.NORM_SQ_OF,
    by=of_changed_outers,
    stage=Stage.NORMS,
    where=("*.weight",),
    source="torch.backends.cuda.matmul.allow_tf32",
    modes=WITH_OUTER,
)
def gram_in_tf32(outer: Outer) -> Outer:
    """The sum is formed at full precision."""
    return Outer(_shortened(outer.x_BTD), _shortened(outer.dy_BTP))


@mutant(
    "activations kept in bfloat16",
    "sum_t dy_t x_t^T with x rounded to bfloat16",
    Need.FINE_GRADIENTS,
    at=Seam.LINEAR_TERMS,
    stage=Stage.NORMS,
    where=("*.weight",),
    source="a buffer that saves memory",
    in_bf16="it is what computing in bfloat16 means",
)
def activations_in_bf16(original: Original, module: nn.Module, x: Tensor, dy: Tensor) -> Any:
    """Forward and backward run at full precision."""
    return original(module, x.bfloat16().to(x.dtype), dy)
