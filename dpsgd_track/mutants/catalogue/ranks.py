"""Faults of what ranks share: sums, shards and divisors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.mutants.mutant import mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum
from dpsgd_track.record.stages import Stage


def scale_sums(site: Site, factor_of: Callable[[str], float]) -> None:
    """Multiply each parameter's sum over micro-batches and ranks by `factor_of(name)`."""

    def scale(clipped: ClippedSum) -> None:
        for name, total in clipped.gradients.items():
            total.mul_(factor_of(name))

    site.after(Seam.CLIPPED_SUM, scale)


def scale_updates(site: Site, factor_of: Callable[[], float]) -> None:
    """Multiply the optimizer's input, signal and noise alike."""

    def scale(_: object) -> None:
        factor = factor_of()
        for total in site.gradients().values():
            total.mul_(factor)

    site.after(Seam.PRIVATIZE, scale)


_mutant = partial(mutant, stage=Stage.SUM)
_planted = partial(_mutant, by=on_site)
_factor_of_sum = partial(_mutant, at=Seam.CLIPPED_SUM, by=scale_sums)
_factor_of_update = partial(mutant, at=Seam.PRIVATIZE, by=scale_updates, stage=Stage.NOISE)


@_factor_of_sum("averaged over ranks, not added", "S / W", Need.RANKS, source="FSDP2's default")
def averaged_over_ranks(name: str) -> float:
    """The noise is not averaged, so that noise over signal is W times too large."""
    return 1 / dist.get_world_size()


class _Done:
    def wait(self) -> None:
        """Do nothing: no transfer is pending."""


@_mutant(
    "ranks' gradients not added",
    "the rank's own share of S",
    Need.RANKS,
    Need.OTHER_DATA,
    at=Seam.REDUCE_SCATTER,
)
def ranks_not_added(original: Original, shard: Tensor, packed: Tensor, **options: Any) -> _Done:
    """Each rank keeps its rows of its own sum."""
    shard.copy_(packed.view(-1, shard.numel())[dist.get_rank()])
    return _Done()


@_mutant(
    "shards of the sum at the wrong ranks",
    "rows of rank r at rank r + 1",
    Need.RANKS,
    Need.DIRECTIONS,
    at=Seam.REDUCE_SCATTER,
)
def shards_rotated(original: Original, shard: Tensor, packed: Tensor, **options: Any) -> Any:
    """The total norm is right."""
    turned = packed.view(-1, shard.numel()).roll(1, 0).contiguous()
    return original(shard, turned.view(-1), **options)


@_mutant(
    "uneven rows padded at the wrong end",
    "row p - 1 in place of row p, where ranks do not divide the rows",
    Need.RANKS,
    Need.UNDIVIDED_ROWS,
    at=Seam.PADDED_ROWS,
)
def uneven_rows_padded_in_front(original: Original, gradient: Tensor, world_size: int) -> Any:
    """The zeros come first."""
    missing = -len(gradient) % world_size
    empty = gradient.new_zeros(missing, *gradient.shape[1:])
    return original(torch.cat([empty, gradient]), world_size)


@_planted(
    "parameters with fewer rows than ranks lost",
    "0 in place of S where rows < W",
    Need.MORE_RANKS_THAN_ROWS,
    at=Seam.CLIPPED_SUM,
    where=("gate.*",),
)
def few_rows_lost(site: Site) -> None:
    """A rank without a shard skips the collective for all parameters."""
    rows = {name: p.shape[0] for name, p in site.mode.model.named_parameters()}
    scale_sums(site, lambda name: float(rows[name] >= dist.get_world_size()))


@_planted(
    "small parameters added once by each rank",
    "W S of one-dimensional parameters",
    Need.RANKS,
    at=Seam.CLIPPED_SUM,
    where=("*",),
)
def small_parameters_counted_by_all(site: Site) -> None:
    """They are taken for replicated, and reduced once more."""
    dims = {name: p.dim() for name, p in site.mode.model.named_parameters()}
    scale_sums(site, lambda name: dist.get_world_size() if dims[name] == 1 else 1)


@_mutant(
    "sums added in bfloat16",
    "ranks' sums rounded to bfloat16 before they are added",
    Need.FINE_NORMS,
    at=Seam.PUT,
    in_bf16="what is added is rounded so already",
)
def sums_in_bf16(original: Original, name: str, total: Tensor) -> None:
    """The reduction runs in the type of the parameters."""
    original(name, total.bfloat16().float())


@_factor_of_update(
    "divided by the number of ranks once more",
    "(S + N) / (W B)",
    Need.RANKS,
    source="Opacus 95fdb35a",
)
def divided_by_ranks_again() -> float:
    """A global batch size is taken for a local one."""
    return 1 / dist.get_world_size()


@_factor_of_update("divided by the rank's batch", "(S + N) W / B", Need.RANKS)
def divided_by_own_batch() -> float:
    """A local batch size is taken for a global one."""
    return dist.get_world_size()


@_factor_of_sum(
    "gradients of the root averaged over ranks",
    "S / W of what lies outside of the blocks, in place of S",
    Need.RANKS,
    source="FSDP2, set_gradient_divide_factor on blocks alone",
    where=("embedding.weight", "position.weight", "gate.*", "norm.weight"),
)
def root_averaged(name: str) -> float:
    """A setting of one FSDP unit does not apply to its parent."""
    return 1 if name.startswith("blocks.") else 1 / dist.get_world_size()


@_planted(
    "a rank without samples sends what it sent before",
    "S + the rank's own sum of the micro-batch before",
    Need.IDLE_RANK,
    at=Seam.PUT,
)
def idle_rank_sends_again(site: Site) -> None:
    """A bucket is filled in place and never cleared."""
    engine = site.mode.engine
    sent: dict[str, Tensor] = {}

    def put(original: Original, name: str, total: Tensor) -> None:
        if not engine.is_standing_in:
            sent[name] = total.clone()
            original(name, total)
            return
        engine.is_standing_in = False
        original(name, sent.get(name, torch.zeros_like(total)))
        engine.is_standing_in = True

    site.wrap(Seam.PUT, put)


@_planted(
    "ranks weighed alike, whatever they hold",
    "sum over ranks of S_r m / |batch of r|, m being their mean size, in place of S_r",
    Need.UNEQUAL_RANKS,
    at=(Seam.ACCUMULATE, Seam.PUT),
)
def ranks_weighed_alike(site: Site) -> None:
    """The mean of the ranks' means."""
    ratio = [1.0]

    def weigh(batch: Batch) -> None:
        ratio[0] = site.over_ranks(len(batch)) / dist.get_world_size() / max(len(batch), 1)

    site.before(Seam.ACCUMULATE, weigh)
    site.wrap(Seam.PUT, lambda original, name, total: original(name, total * ratio[0]))
