"""Faults of adding up micro-batches, and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpsgd_track.mutants.catalogue.ranks import scale_updates
from dpsgd_track.mutants.mutant import mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.record.stages import Stage

_OF_SHARES = Seam.ACCUMULATE, Seam.ZERO_GRAD, Seam.CLIPPED_SUM


class _Shares:
    """Contribution of each micro-batch of a step to this rank's sums."""

    def __init__(self, site: Site) -> None:
        self.of: list[dict[str, Tensor]] = []
        self._site = site
        site.wrap(Seam.ACCUMULATE, self._accumulate)
        site.before(Seam.ZERO_GRAD, self.of.clear)

    def _accumulate(self, original: Original, batch: Any) -> Any:
        before = {name: total.clone() for name, total in self._site.sums().items()}
        record = original(batch)
        self.of.append({n: t - before.get(n, 0.0) for n, t in self._site.sums().items()})
        return record


def _choose_sums(site: Site, choose: Callable[[list[Tensor]], Tensor]) -> None:
    """Replace the sum of a parameter by what `choose` makes of its micro-batches' shares."""
    shares = _Shares(site)

    def clipped_sum(original: Original) -> Any:
        for name, total in site.sums().items():
            of_parameter = [share[name] for share in shares.of if name in share]
            if of_parameter:
                total.copy_(choose(of_parameter))
        return original()

    site.wrap(Seam.CLIPPED_SUM, clipped_sum)


_mutant = partial(mutant, stage=Stage.SUM)
_planted = partial(_mutant, by=on_site)
_sum_of_shares = partial(_mutant, at=_OF_SHARES, by=_choose_sums)


@_sum_of_shares(
    "accumulated sum is an alias of `.grad`",
    "2 x the last micro-batch, in place of the sum of all",
    Need.MICRO_BATCHES,
    source="Opacus #707",
)
def sum_aliases_last(shares: list[Tensor]) -> Tensor:
    """The last micro-batch is added to itself."""
    return shares[-1] * min(len(shares), 2)


@_sum_of_shares(
    "last micro-batch alone", "the last micro-batch, in place of the sum of all", Need.MICRO_BATCHES
)
def last_micro_batch_alone(shares: list[Tensor]) -> Tensor:
    """Each micro-batch overwrites the sum instead of adding to it."""
    return shares[-1]


@_sum_of_shares(
    "first micro-batch dropped",
    "the sum of all but the first",
    Need.MICRO_BATCHES,
    source="Opacus, two backwards before a step",
)
def first_micro_batch_dropped(shares: list[Tensor]) -> Tensor:
    """The second micro-batch clears the sum."""
    return sum(shares[1:], start=shares[0] * (len(shares) == 1))


@_sum_of_shares("micro-batches averaged", "sum / K", Need.MICRO_BATCHES)
def micro_batches_averaged(shares: list[Tensor]) -> Tensor:
    """A loss is scaled this way for gradient accumulation."""
    return sum(shares[1:], start=shares[0]) / len(shares)


@_planted(
    "sums not cleared after the step",
    "S_t + S_{t-1}",
    Need.STEPS,
    at=(Seam.ZERO_GRAD, Seam.ACCUMULATE),
)
def sums_not_cleared(site: Site) -> None:
    """`zero_grad` does not reach the sums."""
    kept: dict[str, Tensor] = {}

    def keep() -> None:
        kept.update({name: total.clone() for name, total in site.sums().items()})

    def add_kept(_: object) -> None:
        if kept:
            for name, total in site.sums().items():
                total += kept.get(name, 0.0)
            kept.clear()

    site.before(Seam.ZERO_GRAD, keep)
    site.after(Seam.ACCUMULATE, add_kept)


@_planted(
    "the made-up sample of an empty batch counted",
    "S + c g of a sample that nobody has",
    Need.IDLE_RANK,
    at=Seam.PUT,
)
def stand_in_counted(site: Site) -> None:
    """A rank without samples runs a made-up one to take part in the collectives."""
    engine = site.mode.engine

    def put(original: Original, name: str, total: Tensor) -> None:
        engine.is_standing_in, kept = False, engine.is_standing_in
        original(name, total)
        engine.is_standing_in = kept

    site.wrap(Seam.PUT, put)


@mutant(
    "divided by the samples that are there",
    "(S + N) / |batch|, in place of the expected batch size",
    Need.UNEQUAL_BATCHES,
    at=(Seam.ACCUMULATE, Seam.PRIVATIZE, Seam.ZERO_GRAD),
    by=on_site,
    stage=Stage.NOISE,
)
def divided_by_samples_present(site: Site) -> None:
    """A divisor that depends on the data is not private."""
    sizes: list[int] = []

    def ratio() -> float:
        present = site.over_ranks(sum(sizes))
        return float(site.mode.context.privacy.expected_batch_size / max(present, 1.0))

    site.before(Seam.ACCUMULATE, lambda batch: sizes.append(len(batch)))
    scale_updates(site, ratio)
    site.before(Seam.ZERO_GRAD, sizes.clear)


@_planted(
    "short micro-batches filled up with their last sample",
    "S + c g of the last sample, once for each that is missing",
    Need.SHORT_MICRO_BATCH,
    at=Seam.ACCUMULATE,
    source="a loader that makes batches even",
)
def last_sample_repeated(site: Site) -> None:
    """The copies are left out of the record, but not of the sum."""
    full_size = [0]

    def accumulate(original: Original, batch: Any) -> Any:
        size = len(batch)
        full_size[0] = max(full_size[0], size)
        missing = full_size[0] - size
        if size == 0 or missing == 0:
            return original(batch)
        index = torch.tensor([*range(size), *[size - 1] * missing], device=batch.targets.device)
        inputs = {name: t[index] for name, t in batch.inputs.items()}
        record = original(replace(batch, inputs=inputs, targets=batch.targets[index]))
        by_parameter = record.norm_by_parameter_B
        return replace(
            record,
            loss_B=record.loss_B[:size],
            norm_B=record.norm_B[:size],
            clip_factor_B=record.clip_factor_B[:size],
            norm_by_parameter_B={name: n[:size] for name, n in by_parameter.items()},
        )

    site.wrap(Seam.ACCUMULATE, accumulate)


@_planted(
    "last micro-batch added a step late",
    "S without its last micro-batch, and with that of the step before",
    at=_OF_SHARES,
    source="a reduction that nobody waits for",
)
def last_micro_batch_late(site: Site) -> None:
    """The micro-batch is still in flight when the noise is added."""
    shares = _Shares(site)
    late: dict[str, Tensor] = {}

    def clipped_sum(original: Original) -> Any:
        for name, total in site.sums().items():
            arrived = late.get(name, torch.zeros_like(total))
            late[name] = shares.of[-1].get(name, torch.zeros_like(total))
            total.add_(arrived - late[name])
        return original()

    site.wrap(Seam.CLIPPED_SUM, clipped_sum)
