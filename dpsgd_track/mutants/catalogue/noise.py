"""Faults of the noise: its size, its distribution, and what it repeats.

The clipped sum of such a mode is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.mutants.mutant import mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum
from dpsgd_track.privacy.noise import NoiseSource
from dpsgd_track.record.stages import Stage

Normal = Callable[[NoiseSource, LocalPart], Tensor]
"""Draw of standard normal noise for a part."""


def _scale_std(site: Site, factor_of: Callable[[ClippedSum, float], float]) -> None:
    """Multiply the std of the noise by `factor_of(clipped, sigma)`."""

    def add_noise(
        original: Original, clipped: ClippedSum, parts: Any, sigma: float, source: Any
    ) -> None:
        original(clipped, parts, sigma * factor_of(clipped, sigma), source)

    site.wrap(Seam.ADD_NOISE, add_noise)


_mutant = partial(mutant, stage=Stage.NOISE)
_planted = partial(_mutant, by=on_site)
_factor_of_std = partial(_mutant, at=Seam.ADD_NOISE, by=_scale_std)
_added = partial(_mutant, at=Seam.ADD_NOISE)
_drawn = partial(_mutant, at=Seam.STANDARD_NORMAL)


@_factor_of_std("no noise at all", "S, in place of S + N", Need.NOISE, source="Opacus #313")
def no_noise(clipped: ClippedSum, sigma: float) -> float:
    """Not private, and nothing says so."""
    return 0.0


@_factor_of_std("C ignored in the noise", "std sigma, in place of sigma C", Need.BOUND_NOT_1)
def noise_ignores_bound(clipped: ClippedSum, sigma: float) -> float:
    """Right for C = 1."""
    return 1 / clipped.sensitivity


@_factor_of_std("noise of std 1", "std 1, in place of sigma C", Need.STD_NOT_1)
def noise_of_std_1(clipped: ClippedSum, sigma: float) -> float:
    """Standard normal noise is drawn and never scaled."""
    return 1 / (sigma * clipped.sensitivity) if sigma else 0.0


@_factor_of_std("noise scaled by C twice", "std sigma C^2", Need.BOUND_NOT_1)
def noise_scaled_twice(clipped: ClippedSum, sigma: float) -> float:
    """Right for C = 1."""
    return clipped.sensitivity


@_planted(
    "noise for the sum added to the mean",
    "std sigma C B on S, in place of sigma C",
    Need.OWN_NOISE,
    at=Seam.ADD_NOISE,
)
def noise_of_sum_on_mean(site: Site) -> None:
    """The sum is divided by B before the noise is added."""
    _scale_std(site, lambda clipped, sigma: site.mode.context.privacy.expected_batch_size)


@_factor_of_std(
    "noise times the number of ranks",
    "std W sigma C",
    Need.RANKS,
    source="loss reduction sum under FSDP",
)
def noise_times_ranks(clipped: ClippedSum, sigma: float) -> float:
    """The signal is averaged over ranks, then scaled back together with the noise."""
    return dist.get_world_size()


@_factor_of_std("two thirds of the noise", "std 2/3 sigma C", Need.OWN_NOISE)
def two_thirds_of_noise(clipped: ClippedSum, sigma: float) -> float:
    """The smallest deficit of the std that must be found."""
    return 2 / 3


@_factor_of_std("half as much noise again", "std 3/2 sigma C", Need.OWN_NOISE)
def noise_and_a_half(clipped: ClippedSum, sigma: float) -> float:
    """The smallest surplus of the std that must be found."""
    return 3 / 2


@_planted(
    "noise calibrated to the bound before",
    "sigma C of the step before",
    Need.CHANGING_BOUND,
    at=Seam.ADD_NOISE,
)
def noise_of_bound_before(site: Site) -> None:
    """A stale constant is used instead of the sum's own sensitivity."""
    kept: list[float] = []

    def stale(clipped: ClippedSum, sigma: float) -> float:
        before = kept[-1] if kept else clipped.sensitivity
        kept.append(clipped.sensitivity)
        return before / clipped.sensitivity

    _scale_std(site, stale)


@_planted(
    "noise with every micro-batch",
    "std sqrt(K) sigma C",
    Need.MICRO_BATCHES,
    at=(Seam.ADD_NOISE, Seam.ACCUMULATE),
)
def noise_every_micro_batch(site: Site) -> None:
    """Noise is drawn again for each micro-batch."""
    batches: list[Batch] = []

    def add_noise(original: Original, clipped: Any, parts: Any, sigma: float, source: Any) -> None:
        for number in range(len(batches)):
            original(clipped, parts, sigma, replace(source, key=f"{source.key}/{number}"))
        batches.clear()

    site.before(Seam.ACCUMULATE, batches.append)
    site.wrap(Seam.ADD_NOISE, add_noise)


@_added("every rank adds the whole noise", "std sqrt(W) sigma C", Need.RANKS)
def every_rank_adds_noise(
    original: Original, clipped: Any, parts: Any, sigma: float, source: Any
) -> None:
    """Noise is added before the ranks' sums are reduced."""
    for rank in range(dist.get_world_size()):
        original(clipped, parts, sigma, replace(source, key=f"{source.key}/{rank}"))


@_planted(
    "no noise in a step without samples",
    "0 where the batch is empty, in place of N",
    Need.EMPTY_STEP,
    at=(Seam.ADD_NOISE, Seam.ACCUMULATE),
    source="Opacus #161",
)
def empty_step_without_noise(site: Site) -> None:
    """The output then reveals that the batch was empty."""
    batches: list[Batch] = []

    def add_noise(original: Original, *args: Any) -> None:
        present = site.over_ranks(sum(map(len, batches)))
        batches.clear()
        if present > 0:
            original(*args)

    site.before(Seam.ACCUMULATE, batches.append)
    site.wrap(Seam.ADD_NOISE, add_noise)


@_added(
    "noise of one parameter left out",
    "0 in place of N of the embedding",
    Need.OWN_NOISE,
    where=("embedding.weight",),
)
def embedding_without_noise(
    original: Original, clipped: Any, parts: list[LocalPart], sigma: float, source: Any
) -> None:
    """The list of parameters is too short."""
    original(clipped, [p for p in parts if p.name != "embedding.weight"], sigma, source)


def _alone(part: LocalPart) -> LocalPart:
    """The shard, disguised as a whole parameter."""
    return replace(part, start=0, num_elements=part.local.numel())


@_drawn(
    "shards from one seed",
    "N of element e of a shard, the same on every rank",
    Need.RANKS,
    Need.SHARDS,
    source="torch.randn_like of a local shard",
)
def identical_shards(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The noise of one rank reveals that of all others."""
    return normal(source, _alone(part))


@_drawn(
    "one rank's noise the negative of another's", "-N of rank 0 on rank 1", Need.RANKS, Need.SHARDS
)
def antithetic_shards(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """Antithetic draws reduce a variance that must not be reduced."""
    return normal(source, _alone(part)) * (-1 if dist.get_rank() % 2 else 1)


@_drawn("the same noise at every step", "N_0 in place of N_t", Need.STEPS)
def same_noise_every_step(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The noise cancels in the difference of two steps."""
    return normal(replace(source, step=0), part)


@_drawn(
    "the same noise for parameters of one shape",
    "N of a shape, in place of a parameter",
    Need.PARAMETERS_OF_ONE_SHAPE,
)
def same_noise_for_one_shape(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The noise cancels in the difference of two gradients."""
    return normal(source, replace(part, name=str((tuple(part.local.shape), part.start))))


@_drawn("uniform noise", "uniform of std sigma C, in place of normal", Need.OWN_NOISE)
def uniform_noise(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The std is right, but there is no privacy guarantee."""
    return torch.erf(normal(source, part) / math.sqrt(2)) * math.sqrt(3)


@_drawn(
    "noise in the first block of a shard alone",
    "0 from element 192 on",
    Need.LONG_SHARDS,
    where=("*.weight",),
)
def noise_in_first_block(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The grid of a kernel is too small."""
    noise = normal(source, part)
    noise.reshape(-1)[192:] = 0
    return noise


@_drawn(
    "noise drawn for one row",
    "one row's noise for all rows of a matrix",
    Need.OWN_NOISE,
    where=("*.weight",),
)
def noise_of_one_row(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """One row is broadcast over all of them."""
    noise = normal(source, part)
    return noise[:1].expand_as(noise) if noise.ndim > 1 else noise


@_drawn("noise drawn in bfloat16", "N rounded to bfloat16", Need.SHARED_NOISE)
def noise_in_bf16(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """Noise with 8 significant bits."""
    return normal(source, part).bfloat16().float()


@_drawn(
    "noise cut off at three", "N of absolute value 3 at most, in place of normal", Need.SHARED_NOISE
)
def noise_truncated(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """Truncation for stability changes 0.27 % of the elements and voids the guarantee."""
    return normal(source, part).clamp(-3, 3)


@_drawn(
    "noise with heavy tails",
    "Student's t of 5 degrees, of std sigma C, in place of normal",
    Need.OWN_NOISE,
)
def heavy_tailed_noise(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The std is right."""
    squares = [normal(replace(source, key=f"{source.key}/{n}"), part) ** 2 for n in range(5)]
    return normal(source, part) * (3 / torch.stack(squares).sum(dim=0)).sqrt()


@_drawn(
    "noise rounded down",
    "floor(16 N) / 16: mean -1/32, in place of 0",
    Need.OWN_NOISE,
    source="fixed-point secure aggregation",
)
def noise_rounded_down(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """A conversion to integers does not round to the nearest."""
    return (normal(source, part) * 16).floor() / 16


@_drawn("noise on rank 0 alone", "0 in place of N on the other ranks", Need.RANKS)
def noise_on_rank_0(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """Right if gradients are replicated and broadcast afterwards."""
    return normal(source, part) * (dist.get_rank() == 0)


@_drawn(
    "one buffer of noise for all parameters",
    "N of element e, the same in every parameter",
    Need.PARAMETERS,
)
def one_noise_buffer(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The buffer is drawn once a step, at the largest size, and cut to each parameter's size."""
    return normal(source, replace(part, name="buffer", num_elements=1 << 40))


@_drawn(
    "seeds of step plus rank",
    "N of step t on rank r + 1 is that of step t + 1 on rank r",
    Need.RANKS,
    Need.STEPS,
)
def seed_of_step_plus_rank(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """`manual_seed(seed + step + rank)`."""
    return normal(replace(source, step=source.step + dist.get_rank()), _alone(part))


@_drawn("noise repeats in every block of a kernel", "N of element e mod 128", Need.LONG_SHARDS)
def noise_repeats_in_blocks(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The offsets into the random stream lack the program's id."""
    noise = normal(source, part)
    place = torch.arange(noise.numel(), device=noise.device) % 128
    return noise.flatten()[place].view(noise.shape)


@_added(
    "no noise where no gradient arrives",
    "0 in place of N of a parameter that is not used",
    Need.UNUSED_PARAMETER,
    source="`if p.grad is None: continue`",
    where=("unused.*",),
)
def unused_without_noise(
    original: Original, clipped: Any, parts: list[LocalPart], sigma: float, source: Any
) -> None:
    """The output then reveals which parameters were used."""
    used = [part for part in parts if not part.name.startswith("unused.")]
    original(clipped, used, sigma, source)


# Too small for the elements that are sampled; the million of noise-only steps shows them.


@_factor_of_std("noise half a percent short", "std 0.995 sigma C", Need.MILLION_DRAWS)
def std_half_percent_low(clipped: ClippedSum, sigma: float) -> float:
    """A rounded constant in the calibration."""
    return 0.995


@_drawn("noise with a mean", "mean 0.01 sigma C, in place of 0", Need.MILLION_DRAWS)
def mean_shifted(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """Uniform numbers from 0 to 1 are never 0 exactly, and a table of the inverse is shifted."""
    return normal(source, part) + 0.01


@_drawn(
    "noise cut off at four", "N of absolute value 4 at most, in place of normal", Need.MILLION_DRAWS
)
def cut_at_4_sigma(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """Uniform numbers of too few bits never come near enough to 0 or 1."""
    return normal(source, part).clamp(-4, 4)


@_drawn(
    "skewed noise", "N + (N^2 - 1) / 100: a skewness of 0.06, in place of 0", Need.MILLION_DRAWS
)
def skewed(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The mean and the std are right."""
    noise = normal(source, part)
    return (noise + 0.01 * (noise**2 - 1)) / math.sqrt(1 + 2e-4)


def _mixed(ours: Tensor, common: Tensor) -> Tensor:
    """Noise with a correlation of 0.01 where `common` is the same."""
    return math.sqrt(0.99) * ours + 0.1 * common


@_drawn(
    "ranks with a part of their noise in common",
    "correlation 0.01 of the shards of two ranks",
    Need.RANKS,
    Need.SHARDS,
    Need.MILLION_DRAWS,
)
def ranks_correlated(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """The noise of one rank tells of that of another."""
    common = normal(replace(source, key=f"{source.key}/common"), _alone(part))
    return _mixed(normal(source, part), common)


@_drawn(
    "steps with a part of their noise in common",
    "correlation 0.01 of a step and the next",
    Need.STEPS,
    Need.MILLION_DRAWS,
)
def steps_correlated(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """A part of the noise cancels in the difference of two steps."""
    before = normal(replace(source, step=source.step - 1), part)
    return (normal(source, part) + 0.0101 * before) / math.sqrt(1 + 0.0101**2)


@_drawn(
    "neighbours with a part of their noise in common",
    "correlation 0.01 of an element and the next",
    Need.MILLION_DRAWS,
)
def neighbours_correlated(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """A generator whose stream is smoothed."""
    noise = normal(source, part)
    moved = noise.flatten().roll(1).view(noise.shape)
    return (noise + 0.0101 * moved) / math.sqrt(1 + 0.0101**2)


@_drawn(
    "parameters with a part of their noise in common",
    "correlation 0.01 of any two parameters",
    Need.PARAMETERS,
    Need.MILLION_DRAWS,
)
def parameters_correlated(normal: Normal, source: NoiseSource, part: LocalPart) -> Tensor:
    """A part of the noise cancels in the difference of two layers."""
    buffer = replace(part, name="buffer", num_elements=max(1 << 13, part.num_elements))
    return _mixed(normal(source, part), normal(source, buffer))
