"""Faults of rounding: right but for too few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpsgd_track.mutants.catalogue.norms import WITH_OUTER, of_changed_outers
from dpsgd_track.mutants.fault import FACTORS, NORMS, Site, fault
from dpsgd_track.privacy.terms import Outer


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


@fault(
    "C held in float16",
    formula="min(1, C / n) with C rounded to float16",
    at="clip_factors",
    needs="clipping",
    stage=FACTORS,
)
def bound_in_fp16(site: Site) -> None:
    """Up to 0.05 % beyond C, in all samples alike."""
    site.wrap(
        "clip_factors",
        lambda original, norm_B, bound: original(norm_B, float(torch.tensor(bound).half())),
    )


@fault(
    "Gram matrices in TF32",
    source="torch.backends.cuda.matmul.allow_tf32",
    formula="n^2 from activations and gradients of 11 bits",
    at="norm_sq_of",
    needs="float32",
    stage=NORMS,
    where="*.weight",
    modes=WITH_OUTER,
)
def gram_in_tf32(site: Site) -> None:
    """The sum is formed from all bits."""

    def shortened(values: Tensor) -> Tensor:
        # Rounds to the nearest of 10 bits behind the point.
        large = values * (2**13 + 1)
        return large - (large - values)

    of_changed_outers(site, lambda t: Outer(shortened(t.x_BTD), shortened(t.dy_BTP)))


@fault(
    "activations kept in bfloat16",
    source="a buffer that saves memory",
    formula="sum_t dy_t x_t^T with x rounded to bfloat16",
    at="linear_terms",
    needs="float32, or gradients that are compared to 1e-3",
    in_bf16="it is what computing in bfloat16 means",
    stage=NORMS,
    where="*.weight",
)
def activations_in_bf16(site: Site) -> None:
    """Forward and backward keep all bits."""
    site.wrap(
        "linear_terms",
        lambda original, module, x, dy: original(module, x.bfloat16().to(x.dtype), dy),
    )
