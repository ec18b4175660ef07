"""Faults of the noise: its size, its distribution, and what it repeats.

Where a mode is at fault here, the clipped sum is right.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.mutants.fault import NOISE, Site, fault
from dpsgd_track.privacy.noise import NoiseSource

OWN = "noise of the mode's own"
SEVERAL = "several ranks"


def _std(site: Site, factor_of: Any) -> None:
    """Multiply the std of the noise."""

    def add_noise(original: Any, clipped: Any, parts: Any, sigma: float, source: Any) -> None:
        original(clipped, parts, sigma * factor_of(clipped, sigma), source)

    site.wrap("add_noise", add_noise)


def _drawn(site: Site, draw: Any) -> None:
    """Have `draw(standard_normal, part, source)` make the noise of a part."""

    def standard_normal(original: Any, source: NoiseSource, part: LocalPart) -> Tensor:
        found: Tensor = draw(lambda s, p: original(s, p), part, source)
        return found

    site.wrap("standard_normal", standard_normal)


@fault(
    "no noise at all",
    source="Opacus #313",
    formula="S, in place of S + N",
    at="add_noise",
    needs="noise",
    stage=NOISE,
)
def no_noise(site: Site) -> None:
    """Silently not private."""
    _std(site, lambda clipped, sigma: 0.0)


@fault(
    "C ignored in the noise",
    formula="std sigma, in place of sigma C",
    at="add_noise",
    needs="C other than 1",
    stage=NOISE,
)
def noise_ignores_bound(site: Site) -> None:
    """Right for C = 1."""
    _std(site, lambda clipped, sigma: 1 / clipped.sensitivity)


@fault(
    "noise of std 1",
    formula="std 1, in place of sigma C",
    at="add_noise",
    needs="sigma C other than 1",
    stage=NOISE,
)
def noise_of_std_1(site: Site) -> None:
    """Drawn, and not scaled."""
    _std(site, lambda clipped, sigma: 1 / (sigma * clipped.sensitivity) if sigma else 0.0)


@fault(
    "noise scaled by C twice",
    formula="std sigma C^2",
    at="add_noise",
    needs="C other than 1",
    stage=NOISE,
)
def noise_scaled_twice(site: Site) -> None:
    """Right for C = 1."""
    _std(site, lambda clipped, sigma: clipped.sensitivity)


@fault(
    "noise for the sum added to the mean",
    formula="std sigma C B on S, in place of sigma C",
    at="add_noise",
    needs=OWN,
    stage=NOISE,
)
def noise_of_sum_on_mean(site: Site) -> None:
    """The division comes first."""
    _std(site, lambda clipped, sigma: site.mode.context.privacy.expected_batch_size)


@fault(
    "noise times the number of ranks",
    source="loss reduction sum under FSDP",
    formula="std W sigma C",
    at="add_noise",
    needs=SEVERAL,
    stage=NOISE,
)
def noise_times_ranks(site: Site) -> None:
    """The signal is averaged, and scaled back together with the noise."""
    _std(site, lambda clipped, sigma: dist.get_world_size())


@fault("two thirds of the noise", formula="std 2/3 sigma C", at="add_noise", needs=OWN, stage=NOISE)
def two_thirds_of_noise(site: Site) -> None:
    """How small an error of the std must be found."""
    _std(site, lambda clipped, sigma: 2 / 3)


@fault(
    "half as much noise again", formula="std 3/2 sigma C", at="add_noise", needs=OWN, stage=NOISE
)
def noise_and_a_half(site: Site) -> None:
    """The same, the other way."""
    _std(site, lambda clipped, sigma: 3 / 2)


@fault(
    "noise calibrated to the bound before",
    formula="sigma C of the step before",
    at="add_noise",
    needs="a C that changes",
    stage=NOISE,
)
def noise_of_bound_before(site: Site) -> None:
    """A constant that went stale: the sum's own sensitivity is not asked."""
    kept: list[float] = []

    def stale(clipped: Any, sigma: float) -> float:
        before = kept[-1] if kept else clipped.sensitivity
        kept.append(clipped.sensitivity)
        return float(before / clipped.sensitivity)

    _std(site, stale)


@fault(
    "noise with every micro-batch",
    formula="std sqrt(K) sigma C",
    at="add_noise, accumulate",
    needs="several micro-batches",
    stage=NOISE,
)
def noise_every_micro_batch(site: Site) -> None:
    """Another draw each time."""
    count = [0]

    def accumulate(original: Any, batch: Any) -> Any:
        count[0] += 1
        return original(batch)

    def add_noise(original: Any, clipped: Any, parts: Any, sigma: float, source: Any) -> None:
        for number in range(count[0]):
            original(clipped, parts, sigma, replace(source, key=f"{source.key}/{number}"))
        count[0] = 0

    site.wrap("accumulate", accumulate)
    site.wrap("add_noise", add_noise)


@fault(
    "every rank adds the whole noise",
    formula="std sqrt(W) sigma C",
    at="add_noise",
    needs=SEVERAL,
    stage=NOISE,
)
def every_rank_adds_noise(site: Site) -> None:
    """Before the ranks' sums are added."""

    def add_noise(original: Any, clipped: Any, parts: Any, sigma: float, source: Any) -> None:
        for rank in range(dist.get_world_size()):
            original(clipped, parts, sigma, replace(source, key=f"{source.key}/{rank}"))

    site.wrap("add_noise", add_noise)


@fault(
    "no noise in a step without samples",
    source="Opacus #161",
    formula="0 where the batch is empty, in place of N",
    at="add_noise, accumulate",
    needs="an empty step",
    stage=NOISE,
)
def empty_step_without_noise(site: Site) -> None:
    """That nothing was there is no secret then."""
    count = [0]

    def accumulate(original: Any, batch: Any) -> Any:
        count[0] += len(batch)
        return original(batch)

    def add_noise(original: Any, *args: Any) -> None:
        present = site.over_ranks(count[0])
        count[0] = 0
        if present > 0:
            original(*args)

    site.wrap("accumulate", accumulate)
    site.wrap("add_noise", add_noise)


@fault(
    "noise of one parameter left out",
    formula="0 in place of N of the embedding",
    at="add_noise",
    needs=OWN,
    stage=NOISE,
    where="embedding.weight",
)
def embedding_without_noise(site: Site) -> None:
    """A list of parameters that is too short."""

    def add_noise(original: Any, clipped: Any, parts: Any, sigma: float, source: Any) -> None:
        original(clipped, [p for p in parts if p.name != "embedding.weight"], sigma, source)

    site.wrap("add_noise", add_noise)


@fault(
    "shards from one seed",
    source="torch.randn_like of a local shard",
    formula="N of element e of a shard, the same on every rank",
    at="standard_normal",
    needs="several ranks, shards",
    stage=NOISE,
)
def identical_shards(site: Site) -> None:
    """The noise of one rank tells the others'."""
    _drawn(
        site,
        lambda normal, part, source: normal(
            source, replace(part, start=0, num_elements=part.local.numel())
        ),
    )


@fault(
    "one rank's noise the negative of another's",
    formula="-N of rank 0 on rank 1",
    at="standard_normal",
    needs="several ranks, shards",
    stage=NOISE,
)
def antithetic_shards(site: Site) -> None:
    """Antithetic draws reduce a variance that must not be reduced."""
    sign = -1 if dist.get_rank() % 2 else 1
    _drawn(
        site,
        lambda normal, part, source: (
            sign * normal(source, replace(part, start=0, num_elements=part.local.numel()))
        ),
    )


@fault(
    "the same noise at every step",
    formula="N_0 in place of N_t",
    at="standard_normal",
    needs="several steps",
    stage=NOISE,
)
def same_noise_every_step(site: Site) -> None:
    """A difference of two steps has none left."""
    _drawn(site, lambda normal, part, source: normal(replace(source, step=0), part))


@fault(
    "the same noise for parameters of one shape",
    formula="N of a shape, in place of a parameter",
    at="standard_normal",
    needs="two parameters of one shape",
    stage=NOISE,
)
def same_noise_for_one_shape(site: Site) -> None:
    """A difference of two gradients has none left."""
    _drawn(
        site,
        lambda normal, part, source: normal(
            source, replace(part, name=str((tuple(part.local.shape), part.start)))
        ),
    )


@fault(
    "uniform noise",
    formula="uniform of std sigma C, in place of normal",
    at="standard_normal",
    needs=OWN,
    stage=NOISE,
)
def uniform_noise(site: Site) -> None:
    """The right std, and no guarantee."""
    _drawn(
        site,
        lambda normal, part, source: torch.erf(normal(source, part) / math.sqrt(2)) * math.sqrt(3),
    )


@fault(
    "noise in the first block of a shard alone",
    formula="0 from element 192 on",
    at="standard_normal",
    needs="shards longer than a block",
    stage=NOISE,
    where="*.weight",
)
def noise_in_first_block(site: Site) -> None:
    """A kernel's grid that is too small."""

    def draw(normal: Any, part: LocalPart, source: NoiseSource) -> Tensor:
        found: Tensor = normal(source, part)
        found.reshape(-1)[192:] = 0
        return found

    _drawn(site, draw)


@fault(
    "noise drawn for one row",
    formula="one row's noise for all rows of a matrix",
    at="standard_normal",
    needs=OWN,
    stage=NOISE,
    where="*.weight",
)
def noise_of_one_row(site: Site) -> None:
    """Broadcast over the others."""

    def draw(normal: Any, part: LocalPart, source: NoiseSource) -> Tensor:
        found: Tensor = normal(source, part)
        return found[:1].expand_as(found) if found.ndim > 1 else found

    _drawn(site, draw)


@fault(
    "noise drawn in bfloat16",
    formula="N rounded to bfloat16",
    at="standard_normal",
    needs="noise that other modes share",
    stage=NOISE,
)
def noise_in_bf16(site: Site) -> None:
    """A grid that is 8 bits fine."""
    _drawn(site, lambda normal, part, source: normal(source, part).bfloat16().float())


@fault(
    "noise cut off at three",
    formula="N of absolute value 3 at most, in place of normal",
    at="standard_normal",
    needs="noise that other modes share",
    stage=NOISE,
)
def noise_truncated(site: Site) -> None:
    """For stability: 0.27 % of the elements, and no guarantee."""
    _drawn(site, lambda normal, part, source: normal(source, part).clamp(-3, 3))


@fault(
    "noise with heavy tails",
    formula="Student's t of 5 degrees, of std sigma C, in place of normal",
    at="standard_normal",
    needs=OWN,
    stage=NOISE,
)
def heavy_tailed_noise(site: Site) -> None:
    """The right std."""

    def draw(normal: Any, part: LocalPart, source: NoiseSource) -> Tensor:
        squares = [normal(replace(source, key=f"{source.key}/{n}"), part) ** 2 for n in range(5)]
        found: Tensor = normal(source, part) * (3 / torch.stack(squares).sum(dim=0)).sqrt()
        return found

    _drawn(site, draw)


@fault(
    "noise rounded down",
    source="fixed-point secure aggregation",
    formula="floor(16 N) / 16: mean -1/32, in place of 0",
    at="standard_normal",
    needs=OWN,
    stage=NOISE,
)
def noise_rounded_down(site: Site) -> None:
    """A conversion to integers does not round to the nearest."""
    _drawn(site, lambda normal, part, source: (normal(source, part) * 16).floor() / 16)


@fault(
    "noise on rank 0 alone",
    formula="0 in place of N on the other ranks",
    at="standard_normal",
    needs=SEVERAL,
    stage=NOISE,
)
def noise_on_rank_0(site: Site) -> None:
    """Right where gradients are replicated, and then broadcast."""
    is_first = dist.get_rank() == 0
    _drawn(site, lambda normal, part, source: normal(source, part) * is_first)


@fault(
    "one buffer of noise for all parameters",
    formula="N of element e, the same in every parameter",
    at="standard_normal",
    needs="several parameters",
    stage=NOISE,
)
def one_noise_buffer(site: Site) -> None:
    """Drawn once a step, in the largest size, and cut to each parameter's."""
    _drawn(
        site,
        lambda normal, part, source: normal(
            source, replace(part, name="buffer", num_elements=1 << 40)
        ),
    )


@fault(
    "seeds of step plus rank",
    formula="N of step t on rank r + 1 is that of step t + 1 on rank r",
    at="standard_normal",
    needs=f"{SEVERAL}, several steps",
    stage=NOISE,
)
def seed_of_step_plus_rank(site: Site) -> None:
    """`manual_seed(seed + step + rank)`."""
    rank = dist.get_rank()
    _drawn(
        site,
        lambda normal, part, source: normal(
            replace(source, step=source.step + rank),
            replace(part, start=0, num_elements=part.local.numel()),
        ),
    )


@fault(
    "noise repeats in every block of a kernel",
    formula="N of element e mod 128",
    at="standard_normal",
    needs="shards longer than a block",
    stage=NOISE,
)
def noise_repeats_in_blocks(site: Site) -> None:
    """Offsets of random numbers without the program's number."""

    def draw(normal: Any, part: LocalPart, source: NoiseSource) -> Tensor:
        found: Tensor = normal(source, part)
        place = torch.arange(found.numel(), device=found.device) % 128
        return found.flatten()[place].view(found.shape)

    _drawn(site, draw)


@fault(
    "no noise where no gradient arrives",
    source="`if p.grad is None: continue`",
    formula="0 in place of N of a parameter that is not used",
    at="add_noise",
    needs="a parameter that is not used",
    stage=NOISE,
    where="unused.*",
)
def unused_without_noise(site: Site) -> None:
    """Whether a parameter was used is no secret then."""

    def add_noise(original: Any, clipped: Any, parts: Any, sigma: float, source: Any) -> None:
        used = [part for part in parts if not part.name.startswith("unused.")]
        original(clipped, used, sigma, source)

    site.wrap("add_noise", add_noise)
