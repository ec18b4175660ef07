"""Losses of a sample's single targets, and its size, from which wrong losses are explained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd_track.modes.protocol import SampleRun
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import (
    IGNORED,
    PerSampleLoss,
    causal_lm_loss,
    masked_lm_loss,
    token_classification_loss,
)
from dpsgd_track.record.parts import MOST_POSITIONS
from dpsgd_track.training.other_losses import inner_loss

_BY_POSITION = frozenset((causal_lm_loss, masked_lm_loss, token_classification_loss))


def target_losses(loss: PerSampleLoss, sample: Batch, run: SampleRun) -> Tensor:
    """[T] float64 loss of each target of a sample; NaN of positions without one."""
    found = torch.full((MOST_POSITIONS,), torch.nan, dtype=torch.float64)
    inner = inner_loss(loss)
    if inner not in _BY_POSITION or sample.targets.shape[-1] > MOST_POSITIONS:
        return found
    with torch.no_grad():
        logits, targets = run(sample)[0].double(), sample.targets[0]
        if inner is causal_lm_loss:
            logits, targets = logits[:-1], targets[1:]
        values = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        found[: len(targets)] = values.masked_fill(targets == IGNORED, torch.nan).cpu()
    return found


def sizes_of(sample: Batch, target_losses_T: Tensor) -> tuple[float, float]:
    """Numbers of tokens and of targets; NaN where they are not counted."""
    mask = sample.inputs.get("attention_mask")
    tokens = float("nan") if mask is None else float(mask.sum())
    targets = float(target_losses_T.isfinite().sum())
    return tokens, targets if targets else float("nan")
