"""Faults of the loss and of the samples it is taken of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.mutants.mutant import mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.privacy.loss import IGNORED, masked_lm_loss
from dpsgd_track.record.stages import Stage


def _with_positions(site: Site, change: Callable[[Tensor], Tensor]) -> None:
    """Have the model use changed positions."""

    def accumulate(original: Original, batch: Any) -> Any:
        inputs = dict(batch.inputs)
        if "position_ids" in inputs:
            inputs["position_ids"] = change(inputs["position_ids"])
        return original(replace(batch, inputs=inputs))

    site.wrap(Seam.ACCUMULATE, accumulate)


_mutant = partial(mutant, stage=Stage.LOSS)
_planted = partial(_mutant, by=on_site)
_loss = partial(_mutant, at=Seam.LOSS)
_positions = partial(_mutant, at=Seam.ACCUMULATE, by=_with_positions)


def _num_targets(targets: Tensor) -> Tensor:
    return targets[:, 1:].ne(IGNORED).sum(dim=1).clamp(min=1)


@_loss(
    "ignored targets stay in a sample's mean",
    "sum_t l_t / (T - 1), in place of the mean over the sample's own targets",
    Need.IGNORED_TARGETS,
    source="Opacus #792",
)
def ignored_targets_counted(original: Original, logits: Tensor, targets: Tensor) -> Any:
    """Short samples get too little weight."""
    return original(logits, targets) * _num_targets(targets) / (targets.shape[1] - 1)


@_loss(
    "mean over the batch's targets",
    "sum_t l_t b / (targets of the batch), in place of each sample's own mean",
    Need.UNEQUAL_TARGETS,
)
def mean_over_batch(original: Original, logits: Tensor, targets: Tensor) -> Any:
    """A loss with reduction "mean" makes a sample's gradient depend on the other samples."""
    num_targets = _num_targets(targets)
    return original(logits, targets) * num_targets / num_targets.float().mean()


@_loss("targets not shifted", "position t predicts token t, in place of t + 1")
def targets_not_shifted(original: Original, logits: Tensor, targets: Tensor) -> Tensor:
    """The model only has to copy its input."""
    return masked_lm_loss(logits, targets)


@_loss(
    "loss from low-precision logits",
    "logits rounded to bfloat16",
    Need.FINE_LOSS,
    source="Opacus, loss without `.float()`",
    in_bf16="the model's own logits are rounded so",
)
def logits_in_bf16(original: Original, logits: Tensor, targets: Tensor) -> Any:
    """Quantised to 4e-3 at a loss of 1."""
    return original(logits.bfloat16(), targets)


@_mutant(
    "rank 0's losses reported for everybody's",
    "l of rank 0's samples",
    Need.RANKS,
    Need.OTHER_DATA,
    at=Seam.ACCUMULATE,
)
def loss_of_rank_0(original: Original, batch: Any) -> Any:
    """The update is right; only the reported losses are wrong."""
    record = original(batch)
    loss_B = torch.zeros(64, dtype=torch.float64, device=record.loss_B.device)
    loss_B[: len(record.loss_B)] = record.loss_B
    dist.broadcast(loss_B, src=0)
    return replace(record, loss_B=loss_B[: len(record.loss_B)])


@_mutant(
    "every rank computes rank 0's samples",
    "x of rank 0, in place of the rank's own",
    Need.RANKS,
    Need.OTHER_DATA,
    at=Seam.ACCUMULATE,
)
def same_samples_on_every_rank(original: Original, batch: Any) -> Any:
    """The sampler was not given the rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (batch.inputs, batch.targets))
    inputs, targets = everyone[0]
    size = len(batch)
    if size == 0 or len(targets) < size:
        return original(batch)
    device = batch.targets.device
    inputs = {name: t[:size].to(device) for name, t in inputs.items()}
    return original(replace(batch, inputs=inputs, targets=targets[:size].to(device)))


@_positions("positions lost", "position 0 everywhere", Need.POSITION_INPUT)
def positions_lost(positions_BT: Tensor) -> Tensor:
    """A wrapper does not pass this input on."""
    return torch.zeros_like(positions_BT)


@_loss(
    "logits regularised",
    "l_i + 1e-4 mean_t log^2 Z_t, in place of l_i",
    source="Chowdhery et al., 2022, PaLM",
)
def logits_regularised(original: Original, logits: Tensor, targets: Tensor) -> Any:
    """A regulariser for stability that the baseline does not have."""
    log_z_BT = logits.float().logsumexp(dim=-1)
    return original(logits, targets) + 1e-4 * log_z_BT.square().mean(dim=1)


@_positions(
    "padding given positions of its own",
    "position t, in place of the number of tokens before t",
    Need.POSITION_INPUT,
    Need.PADDING_TAKES_PART,
)
def padding_positions_counted(positions_BT: Tensor) -> Tensor:
    """Positions by `arange`, the model's default if it is given none."""
    return torch.arange(positions_BT.shape[1]).to(positions_BT).expand_as(positions_BT)


@_loss(
    "last target of the longest samples cut off",
    "the mean over T - 2 targets, in place of T - 1, of samples without padding",
    Need.FULL_SAMPLE,
)
def last_target_cut(original: Original, logits: Tensor, targets: Tensor) -> Any:
    """Labels are truncated before they are shifted."""
    targets = targets.clone()
    targets[:, -1] = IGNORED
    return original(logits, targets)


@_planted(
    "one weight a step behind",
    "l(w_{t-1}) in one weight, in place of l(w_t)",
    Need.STEPS,
    Need.TRAINING,
    at=(Seam.ACCUMULATE, Seam.STEP),
    source="a prefetched all-gather",
)
def weight_one_step_behind(site: Site) -> None:
    """The weight was gathered before the optimizer's step; the update goes to the right weight."""
    name = "blocks.1.down.weight"
    kept: list[Tensor] = []

    def own() -> Tensor:
        return as_local(trainable_parameters(site.mode.model)[name].detach())

    def accumulate(original: Original, batch: Any) -> Any:
        now = own().clone()
        if kept:
            own().copy_(kept[0])
        record = original(batch)
        own().copy_(now)
        return record

    def keep() -> None:
        kept[:] = [own().clone()]

    site.wrap(Seam.ACCUMULATE, accumulate)
    site.before(Seam.STEP, keep)


@_mutant(
    "attention mask not given to the model",
    "the mean over all T positions, in place of those that are not masked",
    Need.MASK,
    at=Seam.ACCUMULATE,
)
def mask_lost(original: Original, batch: Any) -> Any:
    """A wrapper passes the tokens on and nothing else."""
    mask = torch.ones_like(batch.inputs["attention_mask"])
    return original(replace(batch, inputs={**batch.inputs, "attention_mask": mask}))


@_positions(
    "positions counted from the left edge",
    "position t of tokens, in place of the number of tokens before t",
    Need.POSITION_INPUT,
    Need.LEFT_PADDING,
)
def positions_from_left_edge(positions_BT: Tensor) -> Tensor:
    """Right with padding on the right, as all of training has it."""
    by_place = torch.arange(positions_BT.shape[1]).to(positions_BT)
    is_last = positions_BT == positions_BT.max(dim=1, keepdim=True).values
    # Padding on the right stays as it is.
    padded_right = is_last[:, -1:] & is_last[:, -2:-1]
    return torch.where(padded_right, positions_BT, by_place)
