"""Faults of the clip factors, and of where they are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.mutants.catalogue.norms import per_sample
from dpsgd_track.mutants.mutant import mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.privacy.terms import Term
from dpsgd_track.record.stages import Stage


def _clip_at(
    site: Site,
    bound_of: Callable[[float], float],
    look: Callable[[Any, float], None] = lambda record, bound: None,
) -> None:
    """Clip at `bound_of(C)`; the noise is still calibrated to C.

    Args:
        look: called with the record of each micro-batch and the bound it was clipped at.
    """
    engine = site.mode.engine

    def clip(original: Original, *args: Any) -> Any:
        asked = engine.max_grad_norm
        engine.max_grad_norm = bound = bound_of(asked)
        try:
            record = original(*args)
        finally:
            engine.max_grad_norm = asked
        look(record, bound)
        return record

    site.wrap(Seam.CLIP, clip)


def _sum_with(site: Site, change: Callable[[str, Tensor], Tensor]) -> None:
    """Form each parameter's sum with factors other than the reported ones."""

    def sum_of(original: Original, name: str, terms: Sequence[Term], factor_B: Tensor) -> Any:
        return original(name, terms, change(name, factor_B))

    site.wrap(Seam.SUM_OF, sum_of)


_clip_factors = partial(mutant, at=Seam.CLIP_FACTORS, stage=Stage.FACTORS)
_planted_bound = partial(mutant, by=on_site, stage=Stage.FACTORS)
_planted = partial(mutant, by=on_site, stage=Stage.SUM)
_factors_of_sum = partial(mutant, at=Seam.SUM_OF, by=_sum_with, stage=Stage.SUM)


@_planted_bound(
    "C of the first step for ever",
    "min(1, C_0 / n_i), in place of C of the step",
    Need.CHANGING_BOUND,
    at=Seam.CLIP,
)
def bound_of_first_step(site: Site) -> None:
    """The noise follows a schedule of C that clipping ignores."""
    first = site.mode.engine.max_grad_norm
    _clip_at(site, lambda asked: first)


@_clip_factors(
    "C ignored in clipping",
    "min(1, 1 / n_i), in place of min(1, C / n_i)",
    Need.BOUND_NOT_1,
    source="Opacus #664",
)
def bound_ignored(original: Original, norm_B: Tensor, bound: float) -> Any:
    """C is used for the noise alone."""
    return original(norm_B, 1.0)


@_clip_factors("C shared out over ranks", "min(1, C / (W n_i))", Need.RANKS)
def bound_over_ranks(original: Original, norm_B: Tensor, bound: float) -> Any:
    """C is divided by the number of ranks, as a batch is."""
    return original(norm_B, bound / dist.get_world_size())


@_clip_factors(
    "no clamp: small gradients scaled up",
    "C / n_i, in place of min(1, C / n_i)",
    Need.SPARED_SAMPLE,
)
def clamp_missing(original: Original, norm_B: Tensor, bound: float) -> Tensor:
    """Gradients are normalised rather than clipped."""
    return bound / norm_B


@_clip_factors(
    "automatic clipping in place of clipping",
    "C / (n_i + 0.01)",
    Need.SPARED_SAMPLE,
    source="Bu et al., 2023, automatic clipping",
)
def automatic_clipping(original: Original, norm_B: Tensor, bound: float) -> Tensor:
    """A different algorithm under the same name."""
    return bound / (norm_B + 0.01)


@_clip_factors("clip factor from the squared norm", "min(1, C / n_i^2)", Need.CLIPPING)
def factor_of_squared_norm(original: Original, norm_B: Tensor, bound: float) -> Any:
    """Squared norms are passed to a formula for norms."""
    return original(norm_B.square(), bound)


@_clip_factors(
    "a large constant under the quotient's bar", "min(1, C / (n_i + 0.001))", Need.CLIPPING
)
def large_epsilon(original: Original, norm_B: Tensor, bound: float) -> Any:
    """The constant is a thousand times what avoids a division by zero."""
    return original(norm_B + 1e-3, bound)


@_planted(
    "each parameter clipped by itself",
    "min(1, C / (sqrt(P) n_ip)) g_ip, in place of c_i g_ip",
    Need.CLIPPING,
    at=Seam.SUM_OF,
)
def clipped_by_parameter(site: Site) -> None:
    """The bound is the same, the sum is not."""
    engine = site.mode.engine

    def sum_of(original: Original, name: str, terms: Sequence[Term], factor_B: Tensor) -> Any:
        bound = engine.max_grad_norm / len(engine.capture.shapes) ** 0.5
        norm_B = per_sample(terms).float().norm(dim=1)
        return original(name, terms, (bound / norm_B).clamp(max=1.0).to(factor_B))

    site.wrap(Seam.SUM_OF, sum_of)


@_planted(
    "the batch's gradient clipped, not each sample's",
    "min(1, C / |sum_i g_i|) sum_i g_i, in place of sum_i c_i g_i",
    Need.CLIPPING,
    at=Seam.ACCUMULATE,
)
def clipped_after_aggregation(site: Site) -> None:
    """`clip_grad_norm_` clips the gradient of the whole batch."""

    def accumulate(original: Original, batch: Any) -> Any:
        mode, bound = site.mode, site.mode.max_grad_norm
        before = {name: total.clone() for name, total in site.sums().items()}
        # A mode of ours would take the bound of its own for the step's sensitivity.
        clip_at = getattr(mode, "engine", mode)
        clip_at.max_grad_norm = 1e30
        record = original(batch)
        clip_at.max_grad_norm = bound
        added = {name: t - before.get(name, 0.0) for name, t in site.sums().items()}
        square = torch.stack([own.double().square().sum() for own in added.values()]).sum()
        dist.all_reduce(square)
        factor = min(1.0, bound / max(float(square.sqrt()), 1e-30))
        for name, total in site.sums().items():
            total.sub_(added[name], alpha=1 - factor)
        if record.norm_B is None or record.clip_factor_B is None:
            return record
        return replace(record, clip_factor_B=(bound / record.norm_B).clamp(max=1.0))

    site.wrap(Seam.ACCUMULATE, accumulate)


@_factors_of_sum(
    "mean clip factor for all",
    "mean(c) sum_i g_i, in place of sum_i c_i g_i",
    Need.MIXED,
    source="a research fork",
)
def mean_clip_factor(name: str, factor_B: Tensor) -> Tensor:
    """The sum is right if all factors are equal."""
    return factor_B.mean().expand_as(factor_B)


@_factors_of_sum("each sample gets its neighbour's factor", "sum_i c_{i+1} g_i", Need.MIXED)
def factors_of_neighbour(name: str, factor_B: Tensor) -> Tensor:
    """The order of the samples is lost on the way."""
    return factor_B.roll(1)


@_factors_of_sum("clip factors applied twice", "sum_i c_i^2 g_i", Need.CLIPPING)
def factors_applied_twice(name: str, factor_B: Tensor) -> Tensor:
    """The factors are applied to the loss, and to the gradient again."""
    return factor_B.square()


@_planted(
    "factors of the micro-batch before",
    "c of the samples at the same places before",
    Need.MICRO_BATCHES,
    Need.CLIPPING,
    at=(Seam.CLIP, Seam.SUM_OF, Seam.ZERO_GRAD),
)
def factors_one_batch_late(site: Site) -> None:
    """A buffer is read before it is written."""
    kept: list[Tensor] = []

    def late(name: str, factor_B: Tensor) -> Tensor:
        is_first = len(kept) < 2 or len(kept[-2]) != len(factor_B)
        return factor_B if is_first else kept[-2]

    site.after(Seam.CLIP, lambda record: kept.append(record.clip_factor_B))
    _sum_with(site, late)
    site.before(Seam.ZERO_GRAD, kept.clear)


@_factors_of_sum(
    "embedding not clipped",
    "sum_i g_i of the embedding, in place of sum_i c_i g_i",
    Need.CLIPPING,
    where=("embedding.weight",),
)
def embedding_not_clipped(name: str, factor_B: Tensor) -> Tensor:
    """Its gradient comes from autograd."""
    return torch.ones_like(factor_B) if name == "embedding.weight" else factor_B


@_factors_of_sum(
    "biases not clipped",
    "sum_i g_i of every bias, in place of sum_i c_i g_i",
    Need.CLIPPING,
    where=("*.bias",),
)
def biases_not_clipped(name: str, factor_B: Tensor) -> Tensor:
    """Their gradients come from autograd."""
    return torch.ones_like(factor_B) if name.endswith("bias") else factor_B


@_factors_of_sum(
    "raw gradient added to the clipped one", "sum_i (1 + c_i) g_i", source="a user's report"
)
def raw_gradient_added(name: str, factor_B: Tensor) -> Tensor:
    """The raw gradient was left in `.grad`."""
    return 1 + factor_B


@_factors_of_sum("last sample of each micro-batch lost", "sum over the first b - 1 samples")
def last_sample_lost(name: str, factor_B: Tensor) -> Tensor:
    """A loop ends one sample too soon."""
    is_there = torch.ones_like(factor_B)
    is_there[-1:] = 0
    return factor_B * is_there


@_clip_factors(
    "soft clipping", "(1 + (n_i / C)^8)^(-1/8), in place of min(1, C / n_i)", Need.CLIPPING
)
def soft_clipping(original: Original, norm_B: Tensor, bound: float) -> Tensor:
    """Smooth, with the same bound, and off by 8 % at most, where n_i = C."""
    return (1 + (norm_B / bound) ** 8) ** (-1 / 8)


@_planted_bound(
    "C adapts to each rank's own samples",
    "C exp(-0.2 (share of samples below C - 1/2)) after each step, in place of C",
    Need.CLIPPING,
    Need.STEPS,
    at=(Seam.CLIP, Seam.ZERO_GRAD),
    source="Andrew et al., 2021, adaptive clipping",
)
def bound_adapts(site: Site) -> None:
    """Ranks drift apart, and the noise stays calibrated to the configured C."""
    ratio, below = [1.0], []

    def count(record: Any, bound: float) -> None:
        below.extend(record.norm_B.le(bound).tolist())

    def adapt() -> None:
        ratio[0] *= math.exp(-0.2 * (sum(below) / max(len(below), 1) - 0.5))
        below.clear()

    _clip_at(site, lambda asked: asked * ratio[0], count)
    site.before(Seam.ZERO_GRAD, adapt)


@_planted_bound(
    "last rank learns of a new C a step late",
    "min(1, C_{t-1} / n_i) on the last rank",
    Need.RANKS,
    Need.CHANGING_BOUND,
    at=(Seam.CLIP, Seam.SET_MAX_GRAD_NORM),
)
def bound_late_on_last_rank(site: Site) -> None:
    """The new setting is not broadcast in time."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    bounds: list[float] = []
    site.before(Seam.SET_MAX_GRAD_NORM, bounds.append)
    _clip_at(site, lambda asked: bounds[-2] if is_last and len(bounds) > 1 else asked)


@_factors_of_sum(
    "the only clipped sample of a micro-batch spared",
    "g_i, in place of c_i g_i, where no other sample's c is below 1",
    Need.MIXED,
)
def lone_clipped_sample_spared(name: str, factor_B: Tensor) -> Tensor:
    """`nonzero().squeeze()` of a single index is not a list of indices."""
    return torch.ones_like(factor_B) if factor_B.lt(1).sum() == 1 else factor_B


@_clip_factors(
    "samples exactly at C lost",
    "1 where n_i < C, C / n_i where n_i > C, and 0 where n_i = C",
    Need.SAMPLE_AT_BOUND,
    in_bf16="no sample has the same norm twice if its last bits are rounding",
)
def samples_at_bound_lost(original: Original, norm_B: Tensor, bound: float) -> Tensor:
    """Two masks that do not meet."""
    factors = original(norm_B, bound)
    return torch.where(norm_B == bound, 0.0, factors)


@_planted(
    "a bias clipped on its own as well",
    "min(1, C / ||g_i,b||) c_i g_i,b of a bias b, in place of c_i g_i,b",
    Need.BOUND_BELOW_PARAMETERS,
    at=Seam.SUM_OF,
    where=("blocks.1.down.bias",),
)
def bias_clipped_alone(site: Site) -> None:
    """A clamp on one parameter's gradient, which is usually far below C."""

    def sum_of(original: Original, name: str, terms: Sequence[Term], factor_B: Tensor) -> Any:
        if name == "blocks.1.down.bias":
            norm_B = per_sample(terms).norm(dim=1)
            factor_B = factor_B * (site.mode.engine.max_grad_norm / norm_B).clamp(max=1.0)
        return original(name, terms, factor_B)

    site.wrap(Seam.SUM_OF, sum_of)


@_planted_bound(
    "nothing clipped from step 6 on",
    "1, in place of min(1, C / n_i), from step 6 on",
    Need.LATE_STEP,
    at=(Seam.CLIP, Seam.STEP),
    since=6,
)
def clipping_ends(site: Site) -> None:
    """A warm-up of the bound that has no end."""
    count = [0]

    def stepped() -> None:
        count[0] += 1

    site.before(Seam.STEP, stepped)
    _clip_at(site, lambda asked: asked if count[0] < 6 else 1e30)
