"""Faults of adding up micro-batches, and steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpsgd_track.mutants.catalogue.ranks import scaled_update
from dpsgd_track.mutants.fault import NOISE, SUM, Site, fault

SEVERAL = "several micro-batches"


class _Shares:
    """What each micro-batch of a step added to this rank's sums."""

    def __init__(self, site: Site) -> None:
        self.of: list[dict[str, Tensor]] = []
        self._site = site
        site.wrap("accumulate", self._accumulate)
        site.before("zero_grad", self.of.clear)

    def _accumulate(self, original: Any, batch: Any) -> Any:
        before = {name: total.clone() for name, total in self._site.sums().items()}
        record = original(batch)
        self.of.append({n: t - before.get(n, 0.0) for n, t in self._site.sums().items()})
        return record


def _summed(site: Site, choose: Any) -> None:
    """Have `choose` make the sum of a parameter from its shares of all micro-batches."""
    shares = _Shares(site)

    def clipped_sum(original: Any) -> Any:
        for name, total in site.sums().items():
            found = [share[name] for share in shares.of if name in share]
            if found:
                total.copy_(choose(found))
        return original()

    site.wrap("clipped_sum", clipped_sum)


@fault(
    "accumulated sum is an alias of `.grad`",
    source="Opacus #707",
    formula="2 x the last micro-batch, in place of the sum of all",
    at="accumulate, zero_grad, clipped_sum",
    needs=SEVERAL,
    stage=SUM,
)
def sum_aliases_last(site: Site) -> None:
    """What is added to itself."""
    _summed(site, lambda shares: shares[-1] * min(len(shares), 2))


@fault(
    "last micro-batch alone",
    formula="the last micro-batch, in place of the sum of all",
    at="accumulate, zero_grad, clipped_sum",
    needs=SEVERAL,
    stage=SUM,
)
def last_micro_batch_alone(site: Site) -> None:
    """Overwritten, not added."""
    _summed(site, lambda shares: shares[-1])


@fault(
    "first micro-batch dropped",
    source="Opacus, two backwards before a step",
    formula="the sum of all but the first",
    at="accumulate, zero_grad, clipped_sum",
    needs=SEVERAL,
    stage=SUM,
)
def first_micro_batch_dropped(site: Site) -> None:
    """Cleared by the second."""
    _summed(site, lambda shares: sum(shares[1:], start=shares[0] * (len(shares) == 1)))


@fault(
    "micro-batches averaged",
    formula="sum / K",
    at="accumulate, zero_grad, clipped_sum",
    needs=SEVERAL,
    stage=SUM,
)
def micro_batches_averaged(site: Site) -> None:
    """As one scales a loss for accumulation."""
    _summed(site, lambda shares: sum(shares) / len(shares))


@fault(
    "sums not cleared after the step",
    formula="S_t + S_{t-1}",
    at="zero_grad, accumulate",
    needs="several steps",
    stage=SUM,
)
def sums_not_cleared(site: Site) -> None:
    """`zero_grad` forgets them."""
    kept: dict[str, Tensor] = {}
    is_new = [False]

    def zero_grad(original: Any) -> None:
        kept.update({name: total.clone() for name, total in site.sums().items()})
        is_new[0] = True
        original()

    def accumulate(original: Any, batch: Any) -> Any:
        record = original(batch)
        if is_new[0]:
            for name, total in site.sums().items():
                total += kept.get(name, 0.0)
            is_new[0] = False
        return record

    site.wrap("zero_grad", zero_grad)
    site.wrap("accumulate", accumulate)


@fault(
    "the made-up sample of an empty batch counted",
    formula="S + c g of a sample that nobody has",
    at="put",
    needs="a rank without samples",
    stage=SUM,
)
def stand_in_counted(site: Site) -> None:
    """A rank without samples runs one for the collectives' sake."""
    engine = site.mode.engine

    def put(original: Any, name: str, total: Tensor) -> None:
        engine.is_standing_in, kept = False, engine.is_standing_in
        original(name, total)
        engine.is_standing_in = kept

    site.wrap("put", put)


@fault(
    "divided by the samples that are there",
    formula="(S + N) / |batch|, in place of the expected batch size",
    at="accumulate, privatize, zero_grad",
    needs="batches of unequal size",
    stage=NOISE,
)
def divided_by_samples_present(site: Site) -> None:
    """A divisor that depends on the data is not private."""
    sizes: list[int] = []

    def accumulate(original: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        return original(batch)

    def ratio() -> float:
        present = site.over_ranks(sum(sizes))
        return float(site.mode.context.privacy.expected_batch_size / max(present, 1.0))

    site.wrap("accumulate", accumulate)
    scaled_update(site, ratio)
    site.before("zero_grad", sizes.clear)


@fault(
    "short micro-batches filled up with their last sample",
    source="a loader that makes batches even",
    formula="S + c g of the last sample, once for each that is missing",
    at="accumulate",
    needs="a micro-batch that is not full",
    stage=SUM,
)
def last_sample_repeated(site: Site) -> None:
    """Copies are left out of the records, not of the sum."""
    full_size = [0]

    def accumulate(original: Any, batch: Any) -> Any:
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

    site.wrap("accumulate", accumulate)


@fault(
    "last micro-batch added a step late",
    source="a reduction that nobody waits for",
    formula="S without its last micro-batch, and with that of the step before",
    at="accumulate, zero_grad, clipped_sum",
    stage=SUM,
)
def last_micro_batch_late(site: Site) -> None:
    """It is still on its way when the noise is added."""
    shares = _Shares(site)
    late: dict[str, Tensor] = {}

    def clipped_sum(original: Any) -> Any:
        for name, total in site.sums().items():
            arrived = late.get(name, torch.zeros_like(total))
            late[name] = shares.of[-1].get(name, torch.zeros_like(total))
            total.add_(arrived - late[name])
        return original()

    site.wrap("clipped_sum", clipped_sum)
