"""Faults of what ranks share: sums, shards and divisors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.mutants.fault import NOISE, SUM, Site, fault

SEVERAL = "several ranks"


def _scaled_sum(site: Site, factor_of: Any) -> None:
    def clipped_sum(original: Any) -> Any:
        clipped = original()
        for name, total in clipped.gradients.items():
            total.mul_(factor_of(name))
        return clipped

    site.wrap("clipped_sum", clipped_sum)


@fault(
    "averaged over ranks, not added",
    source="FSDP2's default",
    formula="S / W",
    at="clipped_sum",
    needs=SEVERAL,
    stage=SUM,
)
def averaged_over_ranks(site: Site) -> None:
    """The noise is not: noise over signal is W times too large."""
    _scaled_sum(site, lambda name: 1 / dist.get_world_size())


class _Done:
    def wait(self) -> None:
        """Nothing is on its way."""


@fault(
    "ranks' gradients not added",
    formula="the rank's own share of S",
    at="reduce_scatter",
    needs="several ranks, other data on each",
    stage=SUM,
)
def ranks_not_added(site: Site) -> None:
    """Each keeps its rows of its own sum."""

    def reduce_scatter(original: Any, shard: Tensor, packed: Tensor, **options: Any) -> _Done:
        shard.copy_(packed.view(-1, shard.numel())[dist.get_rank()])
        return _Done()

    site.wrap("reduce_scatter", reduce_scatter)


@fault(
    "shards of the sum at the wrong ranks",
    formula="rows of rank r at rank r + 1",
    at="reduce_scatter",
    needs="several ranks, a comparison of directions",
    stage=SUM,
)
def shards_rotated(site: Site) -> None:
    """The total norm is right."""

    def reduce_scatter(original: Any, shard: Tensor, packed: Tensor, **options: Any) -> Any:
        turned = packed.view(-1, shard.numel()).roll(1, 0).contiguous()
        return original(shard, turned.view(-1), **options)

    site.wrap("reduce_scatter", reduce_scatter)


@fault(
    "uneven rows padded at the wrong end",
    formula="row p - 1 in place of row p, where ranks do not divide the rows",
    at="padded_rows",
    needs="several ranks, rows that they do not divide",
    stage=SUM,
)
def uneven_rows_padded_in_front(site: Site) -> None:
    """Zeros come first."""

    def padded_rows(original: Any, gradient: Tensor, world_size: int) -> Tensor:
        missing = -len(gradient) % world_size
        empty = gradient.new_zeros(missing, *gradient.shape[1:])
        found: Tensor = original(torch.cat([empty, gradient]), world_size)
        return found

    site.wrap("padded_rows", padded_rows)


@fault(
    "parameters with fewer rows than ranks lost",
    formula="0 in place of S where rows < W",
    at="clipped_sum",
    needs="more ranks than a parameter has rows",
    stage=SUM,
    where="gate.*",
)
def few_rows_lost(site: Site) -> None:
    """A rank without a shard skips the collective for all."""
    rows = {name: p.shape[0] for name, p in site.mode.model.named_parameters()}
    _scaled_sum(site, lambda name: float(rows[name] >= dist.get_world_size()))


@fault(
    "small parameters added once by each rank",
    formula="W S of one-dimensional parameters",
    at="clipped_sum",
    needs=SEVERAL,
    stage=SUM,
    where="*",
)
def small_parameters_counted_by_all(site: Site) -> None:
    """Taken for replicated, and added over ranks once more."""
    dims = {name: p.dim() for name, p in site.mode.model.named_parameters()}
    _scaled_sum(site, lambda name: dist.get_world_size() if dims[name] == 1 else 1)


@fault(
    "sums added in bfloat16",
    formula="ranks' sums rounded to bfloat16 before they are added",
    at="put",
    needs="float32, or norms that are compared to 1e-3",
    in_bf16="what is added is rounded so already",
    stage=SUM,
)
def sums_in_bf16(site: Site) -> None:
    """A reduction in the parameters' type."""
    site.wrap("put", lambda original, name, total: original(name, total.bfloat16().float()))


def scaled_update(site: Site, factor_of: Callable[[], float]) -> None:
    """Multiply what the optimizer is given, signal and noise alike."""

    def privatize(original: Any, *args: Any) -> Any:
        found = original(*args)
        factor = factor_of()
        for part in site.mode.gradient_parts():
            part.local.mul_(factor)
        return found

    site.wrap("privatize", privatize)


@fault(
    "divided by the number of ranks once more",
    source="Opacus 95fdb35a",
    formula="(S + N) / (W B)",
    at="privatize",
    needs=SEVERAL,
    stage=NOISE,
)
def divided_by_ranks_again(site: Site) -> None:
    """A global batch size taken for a local one."""
    scaled_update(site, lambda: 1 / dist.get_world_size())


@fault(
    "divided by the rank's batch",
    formula="(S + N) W / B",
    at="privatize",
    needs=SEVERAL,
    stage=NOISE,
)
def divided_by_own_batch(site: Site) -> None:
    """A local batch size taken for a global one."""
    scaled_update(site, dist.get_world_size)


@fault(
    "gradients of the root averaged over ranks",
    source="FSDP2, set_gradient_divide_factor on blocks alone",
    formula="S / W of what lies outside of the blocks, in place of S",
    at="clipped_sum",
    needs=SEVERAL,
    stage=SUM,
    where="embedding.weight, position.weight, gate.*, norm.weight",
)
def root_averaged(site: Site) -> None:
    """What is set on a unit does not hold for the one above it."""
    _scaled_sum(site, lambda name: 1 if name.startswith("blocks.") else 1 / dist.get_world_size())


@fault(
    "a rank without samples sends what it sent before",
    formula="S + the rank's own sum of the micro-batch before",
    at="put",
    needs="a rank without samples",
    stage=SUM,
)
def idle_rank_sends_again(site: Site) -> None:
    """A bucket that is filled in place, and not cleared."""
    engine = site.mode.engine
    sent: dict[str, Tensor] = {}

    def put(original: Any, name: str, total: Tensor) -> None:
        if not engine.is_standing_in:
            sent[name] = total.clone()
            original(name, total)
            return
        engine.is_standing_in = False
        original(name, sent.get(name, torch.zeros_like(total)))
        engine.is_standing_in = True

    site.wrap("put", put)


@fault(
    "ranks weighed alike, whatever they hold",
    formula="sum over ranks of S_r m / |batch of r|, m being their mean size, in place of S_r",
    at="accumulate, put",
    needs="several ranks that hold unequal numbers of samples",
    stage=SUM,
)
def ranks_weighed_alike(site: Site) -> None:
    """The mean of means."""
    ratio = [1.0]

    def accumulate(original: Any, batch: Any) -> Any:
        ratio[0] = site.over_ranks(len(batch)) / dist.get_world_size() / max(len(batch), 1)
        return original(batch)

    site.wrap("accumulate", accumulate)
    site.wrap("put", lambda original, name, total: original(name, total * ratio[0]))
