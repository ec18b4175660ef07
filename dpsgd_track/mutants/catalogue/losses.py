"""Faults of the loss and of the samples it is taken of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.mutants.fault import LOSS, Site, fault
from dpsgd_track.privacy.loss import IGNORED, masked_lm_loss

TARGETS = "samples with unequal numbers of targets"


@fault(
    "ignored targets stay in a sample's mean",
    source="Opacus #792",
    formula="sum_t l_t / (T - 1), in place of the mean over the sample's own targets",
    at="loss",
    needs="targets that are ignored",
    stage=LOSS,
)
def ignored_targets_counted(site: Site) -> None:
    """Short samples weigh less."""

    def loss(original: Any, logits: Tensor, targets: Tensor) -> Tensor:
        num_targets = targets[:, 1:].ne(IGNORED).sum(dim=1).clamp(min=1)
        found: Tensor = original(logits, targets) * num_targets / (targets.shape[1] - 1)
        return found

    site.wrap("loss", loss)


@fault(
    "mean over the batch's targets",
    formula="sum_t l_t b / (targets of the batch), in place of each sample's own mean",
    at="loss",
    needs=TARGETS,
    stage=LOSS,
)
def mean_over_batch(site: Site) -> None:
    """What a loss with reduction mean does: a sample's gradient depends on the others."""

    def loss(original: Any, logits: Tensor, targets: Tensor) -> Tensor:
        num_targets = targets[:, 1:].ne(IGNORED).sum(dim=1).clamp(min=1)
        found: Tensor = original(logits, targets) * num_targets / num_targets.float().mean()
        return found

    site.wrap("loss", loss)


@fault(
    "targets not shifted",
    formula="position t predicts token t, in place of t + 1",
    at="loss",
    stage=LOSS,
)
def targets_not_shifted(site: Site) -> None:
    """An easy task."""
    site.wrap("loss", lambda original, logits, targets: masked_lm_loss(logits, targets))


@fault(
    "loss from low-precision logits",
    source="Opacus, loss without `.float()`",
    formula="logits rounded to bfloat16",
    at="loss",
    needs="float32, or a loss that is compared to 1e-3",
    in_bf16="the model's own logits are rounded so",
    stage=LOSS,
)
def logits_in_bf16(site: Site) -> None:
    """Quantised to 4e-3 at a loss of 1."""
    site.wrap("loss", lambda original, logits, targets: original(logits.bfloat16(), targets))


@fault(
    "rank 0's losses reported for everybody's",
    formula="l of rank 0's samples",
    at="accumulate",
    needs="several ranks, other data on each",
    stage=LOSS,
)
def loss_of_rank_0(site: Site) -> None:
    """The update is right."""

    def accumulate(original: Any, batch: Any) -> Any:
        record = original(batch)
        loss_B = torch.zeros(64, dtype=torch.float64, device=site.mode.context.device)
        loss_B[: len(record.loss_B)] = record.loss_B
        dist.broadcast(loss_B, src=0)
        return replace(record, loss_B=loss_B[: len(record.loss_B)])

    site.wrap("accumulate", accumulate)


@fault(
    "every rank computes rank 0's samples",
    formula="x of rank 0, in place of the rank's own",
    at="accumulate",
    needs="several ranks, other data on each",
    stage=LOSS,
)
def same_samples_on_every_rank(site: Site) -> None:
    """A sampler that was not told the rank."""

    def accumulate(original: Any, batch: Any) -> Any:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (batch.inputs, batch.targets))
        inputs, targets = everyone[0]
        size = len(batch)
        if size == 0 or len(targets) < size:
            return original(batch)
        device = batch.targets.device
        inputs = {name: t[:size].to(device) for name, t in inputs.items()}
        return original(replace(batch, inputs=inputs, targets=targets[:size].to(device)))

    site.wrap("accumulate", accumulate)


def _with_positions(site: Site, change: Callable[[Tensor], Tensor]) -> None:
    def accumulate(original: Any, batch: Any) -> Any:
        inputs = dict(batch.inputs)
        if "position_ids" in inputs:
            inputs["position_ids"] = change(inputs["position_ids"])
        return original(replace(batch, inputs=inputs))

    site.wrap("accumulate", accumulate)


@fault(
    "positions lost",
    formula="position 0 everywhere",
    at="accumulate",
    needs="a model that takes positions",
    stage=LOSS,
)
def positions_lost(site: Site) -> None:
    """An input that a wrapper does not hand on."""

    _with_positions(site, torch.zeros_like)


@fault(
    "logits regularised",
    source="Chowdhery et al., 2022, PaLM",
    formula="l_i + 1e-4 mean_t log^2 Z_t, in place of l_i",
    at="loss",
    in_bf16="it moves a loss by 1e-3, and rounding moves one by 5e-3",
    stage=LOSS,
)
def logits_regularised(site: Site) -> None:
    """A term for stability that the baseline does not have."""

    def loss(original: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_z_BT = logits.float().logsumexp(dim=-1)
        found: Tensor = original(logits, targets) + 1e-4 * log_z_BT.square().mean(dim=1)
        return found

    site.wrap("loss", loss)


@fault(
    "padding given positions of its own",
    formula="position t, in place of the number of tokens before t",
    at="accumulate",
    needs="a model that takes positions, padding that takes part",
    stage=LOSS,
)
def padding_positions_counted(site: Site) -> None:
    """Positions by `arange`, as a model makes them when it is given none."""

    _with_positions(site, lambda given: torch.arange(given.shape[1]).to(given).expand_as(given))


@fault(
    "last target of the longest samples cut off",
    formula="the mean over T - 2 targets, in place of T - 1, of samples without padding",
    at="loss",
    needs="a sample that fills all positions",
    stage=LOSS,
)
def last_target_cut(site: Site) -> None:
    """Labels are cut to length before they are shifted."""

    def loss(original: Any, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.clone()
        targets[:, -1] = IGNORED
        found: Tensor = original(logits, targets)
        return found

    site.wrap("loss", loss)


@fault(
    "one weight a step behind",
    source="a prefetched all-gather",
    formula="l(w_{t-1}) in one weight, in place of l(w_t)",
    at="accumulate, step",
    needs="several steps, a learning rate above 0",
    stage=LOSS,
)
def weight_one_step_behind(site: Site) -> None:
    """Gathered before the optimizer had stepped. What is updated is the right weight."""
    name = "blocks.1.down.weight"
    kept: list[Tensor] = []

    def own() -> Tensor:
        return as_local(trainable_parameters(site.mode.model)[name].detach())

    def accumulate(original: Any, batch: Any) -> Any:
        now = own().clone()
        if kept:
            own().copy_(kept[0])
        record = original(batch)
        own().copy_(now)
        return record

    def step(original: Any) -> None:
        kept[:] = [own().clone()]
        original()

    site.wrap("accumulate", accumulate)
    site.wrap("step", step)
