"""Faults of the clip factors, and of where they are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.mutants.catalogue.norms import per_sample
from dpsgd_track.mutants.fault import FACTORS, SUM, Site, fault
from dpsgd_track.privacy.terms import Term

MIXED = "samples that C clips beside samples that it spares"


def _bounded(
    site: Site,
    bound_of: Callable[[float], float],
    look: Callable[[Any, float], None] = lambda record, bound: None,
) -> None:
    """Clip at `bound_of` the C that was asked for; the noise knows nothing of it.

    Args:
        look: is shown each micro-batch's record, and what it was clipped at.
    """
    engine = site.mode.engine

    def clip(original: Any, *args: Any) -> Any:
        asked = engine.max_grad_norm
        engine.max_grad_norm = bound = bound_of(asked)
        try:
            record = original(*args)
        finally:
            engine.max_grad_norm = asked
        look(record, bound)
        return record

    site.wrap("clip", clip)


@fault(
    "C of the first step for ever",
    formula="min(1, C_0 / n_i), in place of C of the step",
    at="clip",
    needs="a C that changes",
    stage=FACTORS,
)
def bound_of_first_step(site: Site) -> None:
    """The noise follows C, clipping does not."""
    first = site.mode.engine.max_grad_norm
    _bounded(site, lambda asked: first)


@fault(
    "C ignored in clipping",
    source="Opacus #664",
    formula="min(1, 1 / n_i), in place of min(1, C / n_i)",
    at="clip_factors",
    needs="C other than 1",
    stage=FACTORS,
)
def bound_ignored(site: Site) -> None:
    """C is used for the noise alone."""
    site.wrap("clip_factors", lambda original, norm_B, bound: original(norm_B, 1.0))


@fault(
    "C shared out over ranks",
    formula="min(1, C / (W n_i))",
    at="clip_factors",
    needs="several ranks",
    stage=FACTORS,
)
def bound_over_ranks(site: Site) -> None:
    """As one divides a batch."""
    site.wrap(
        "clip_factors",
        lambda original, norm_B, bound: original(norm_B, bound / dist.get_world_size()),
    )


@fault(
    "no clamp: small gradients scaled up",
    formula="C / n_i, in place of min(1, C / n_i)",
    at="clip_factors",
    needs="a sample that C spares",
    stage=FACTORS,
)
def clamp_missing(site: Site) -> None:
    """Normalised, rather than clipped."""
    site.wrap("clip_factors", lambda original, norm_B, bound: bound / norm_B)


@fault(
    "automatic clipping in place of clipping",
    source="Bu et al., 2023, automatic clipping",
    formula="C / (n_i + 0.01)",
    at="clip_factors",
    needs="a sample that C spares",
    stage=FACTORS,
)
def automatic_clipping(site: Site) -> None:
    """Another algorithm under the same name."""
    site.wrap("clip_factors", lambda original, norm_B, bound: bound / (norm_B + 0.01))


@fault(
    "clip factor from the squared norm",
    formula="min(1, C / n_i^2)",
    at="clip_factors",
    needs="clipping",
    stage=FACTORS,
)
def factor_of_squared_norm(site: Site) -> None:
    """Squared norms handed to a formula for norms."""
    site.wrap("clip_factors", lambda original, norm_B, bound: original(norm_B.square(), bound))


@fault(
    "a large constant under the quotient's bar",
    formula="min(1, C / (n_i + 0.001))",
    at="clip_factors",
    needs="clipping",
    stage=FACTORS,
)
def large_epsilon(site: Site) -> None:
    """A thousand times what keeps a division by zero away."""
    site.wrap("clip_factors", lambda original, norm_B, bound: original(norm_B + 1e-3, bound))


@fault(
    "each parameter clipped by itself",
    formula="min(1, C / (sqrt(P) n_ip)) g_ip, in place of c_i g_ip",
    at="sum_of",
    needs="clipping",
    stage=SUM,
)
def clipped_by_parameter(site: Site) -> None:
    """Bounded alike, and another sum."""
    engine = site.mode.engine

    def sum_of(original: Any, name: str, terms: Sequence[Term], factors: Tensor) -> Tensor:
        bound = engine.max_grad_norm / len(engine.capture.shapes) ** 0.5
        norm_B = per_sample(terms).float().norm(dim=1)
        found: Tensor = original(name, terms, (bound / norm_B).clamp(max=1.0).to(factors))
        return found

    site.wrap("sum_of", sum_of)


@fault(
    "the batch's gradient clipped, not each sample's",
    formula="min(1, C / |sum_i g_i|) sum_i g_i, in place of sum_i c_i g_i",
    at="accumulate",
    needs="clipping",
    stage=SUM,
)
def clipped_after_aggregation(site: Site) -> None:
    """What `clip_grad_norm_` does."""

    def accumulate(original: Any, batch: Any) -> Any:
        mode, bound = site.mode, site.mode.max_grad_norm
        before = {name: total.clone() for name, total in site.sums().items()}
        mode.set_max_grad_norm(1e30)
        record = original(batch)
        mode.set_max_grad_norm(bound)
        added = {name: t - before.get(name, 0.0) for name, t in site.sums().items()}
        square = torch.stack([own.double().square().sum() for own in added.values()]).sum()
        dist.all_reduce(square)
        factor = min(1.0, bound / max(float(square.sqrt()), 1e-30))
        for name, total in site.sums().items():
            total.sub_(added[name], alpha=1 - factor)
        if record.norm_B is None or record.clip_factor_B is None:
            return record
        return replace(record, clip_factor_B=(bound / record.norm_B).clamp(max=1.0))

    site.wrap("accumulate", accumulate)


def _factors(site: Site, change: Any) -> None:
    """Form sums with other factors than are reported."""

    def sum_of(original: Any, name: str, terms: Sequence[Term], factors: Tensor) -> Tensor:
        found: Tensor = original(name, terms, change(name, factors))
        return found

    site.wrap("sum_of", sum_of)


@fault(
    "mean clip factor for all",
    source="a research fork",
    formula="mean(c) sum_i g_i, in place of sum_i c_i g_i",
    at="sum_of",
    needs=MIXED,
    stage=SUM,
)
def mean_clip_factor(site: Site) -> None:
    """Right for equal factors."""
    _factors(site, lambda name, factors: factors.mean().expand_as(factors))


@fault(
    "each sample gets its neighbour's factor",
    formula="sum_i c_{i+1} g_i",
    at="sum_of",
    needs=MIXED,
    stage=SUM,
)
def factors_of_neighbour(site: Site) -> None:
    """An order that was lost on the way."""
    _factors(site, lambda name, factors: factors.roll(1))


@fault(
    "clip factors applied twice",
    formula="sum_i c_i^2 g_i",
    at="sum_of",
    needs="clipping",
    stage=SUM,
)
def factors_applied_twice(site: Site) -> None:
    """To the loss and to the gradient."""
    _factors(site, lambda name, factors: factors.square())


@fault(
    "factors of the micro-batch before",
    formula="c of the samples at the same places before",
    at="clip, sum_of, zero_grad",
    needs="several micro-batches, clipping",
    stage=SUM,
)
def factors_one_batch_late(site: Site) -> None:
    """A buffer that is read before it is written."""
    kept: list[Tensor] = []

    def clip(original: Any, *args: Any) -> Any:
        record = original(*args)
        kept.append(record.clip_factor_B)
        return record

    def late(name: str, factors: Tensor) -> Tensor:
        is_first = len(kept) < 2 or len(kept[-2]) != len(factors)
        return factors if is_first else kept[-2]

    site.wrap("clip", clip)
    _factors(site, late)
    site.before("zero_grad", kept.clear)


@fault(
    "embedding not clipped",
    formula="sum_i g_i of the embedding, in place of sum_i c_i g_i",
    at="sum_of",
    needs="clipping",
    stage=SUM,
    where="embedding.weight",
)
def embedding_not_clipped(site: Site) -> None:
    """Its gradient comes from autograd."""
    _factors(site, lambda name, c: torch.ones_like(c) if name == "embedding.weight" else c)


@fault(
    "biases not clipped",
    formula="sum_i g_i of every bias, in place of sum_i c_i g_i",
    at="sum_of",
    needs="clipping",
    stage=SUM,
    where="*.bias",
)
def biases_not_clipped(site: Site) -> None:
    """Their gradients come from autograd."""
    _factors(site, lambda name, c: torch.ones_like(c) if name.endswith("bias") else c)


@fault(
    "raw gradient added to the clipped one",
    source="a user's report",
    formula="sum_i (1 + c_i) g_i",
    at="sum_of",
    stage=SUM,
)
def raw_gradient_added(site: Site) -> None:
    """It was left in `.grad`."""
    _factors(site, lambda name, factors: 1 + factors)


@fault(
    "last sample of each micro-batch lost",
    formula="sum over the first b - 1 samples",
    at="sum_of",
    stage=SUM,
)
def last_sample_lost(site: Site) -> None:
    """A loop that ends too soon."""

    def without_last(name: str, factors: Tensor) -> Tensor:
        there = torch.ones_like(factors)
        there[-1:] = 0
        return factors * there

    _factors(site, without_last)


@fault(
    "soft clipping",
    formula="(1 + (n_i / C)^8)^(-1/8), in place of min(1, C / n_i)",
    at="clip_factors",
    needs="clipping",
    stage=FACTORS,
)
def soft_clipping(site: Site) -> None:
    """Smooth and bounded alike, and off by 8 % at most, where n_i = C."""
    site.wrap(
        "clip_factors", lambda original, norm_B, bound: (1 + (norm_B / bound) ** 8) ** (-1 / 8)
    )


@fault(
    "C adapts to each rank's own samples",
    source="Andrew et al., 2021, adaptive clipping",
    formula="C exp(-0.2 (share of samples below C - 1/2)) after each step, in place of C",
    at="clip, zero_grad",
    needs="clipping, several steps",
    stage=FACTORS,
)
def bound_adapts(site: Site) -> None:
    """Ranks drift apart, and the noise stays at the C that was asked for."""
    ratio, below = [1.0], []

    def count(record: Any, bound: float) -> None:
        below.extend(record.norm_B.le(bound).tolist())

    def adapt() -> None:
        ratio[0] *= math.exp(-0.2 * (sum(below) / max(len(below), 1) - 0.5))
        below.clear()

    _bounded(site, lambda asked: asked * ratio[0], count)
    site.before("zero_grad", adapt)


@fault(
    "last rank learns of a new C a step late",
    formula="min(1, C_{t-1} / n_i) on the last rank",
    at="clip, set_max_grad_norm",
    needs="several ranks, a C that changes",
    stage=FACTORS,
)
def bound_late_on_last_rank(site: Site) -> None:
    """A setting that is not broadcast in time."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    bounds: list[float] = []

    def set_max_grad_norm(original: Any, bound: float) -> None:
        bounds.append(bound)
        original(bound)

    site.wrap("set_max_grad_norm", set_max_grad_norm)
    _bounded(site, lambda asked: bounds[-2] if is_last and len(bounds) > 1 else asked)


@fault(
    "the only clipped sample of a micro-batch spared",
    formula="g_i, in place of c_i g_i, where no other sample's c is below 1",
    at="sum_of",
    needs=MIXED,
    stage=SUM,
)
def lone_clipped_sample_spared(site: Site) -> None:
    """`nonzero().squeeze()` of one index is no list of indices."""

    def spared(name: str, factors: Tensor) -> Tensor:
        return torch.ones_like(factors) if factors.lt(1).sum() == 1 else factors

    _factors(site, spared)
