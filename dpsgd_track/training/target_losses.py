"""Losses of samples' single targets, and the samples' sizes, from which errors are explained.

Legend: N samples, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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
from dpsgd_track.record.parts import MOST_POSITIONS, NUM_SIZES, TARGETS, TOKENS
from dpsgd_track.training.other_losses import inner_loss

Floats = NDArray[np.float64]
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


def sizes_of(loss: PerSampleLoss, batches: Sequence[Batch]) -> Floats:
    """[N, 2] numbers of tokens and of targets of each sample; NaN where they are not counted."""
    found = [np.empty((0, NUM_SIZES))]
    for batch in batches:
        sizes = np.full((len(batch), NUM_SIZES), np.nan)
        mask, targets = batch.inputs.get("attention_mask"), batch.targets
        if mask is not None and mask.ndim == 2:
            sizes[:, TOKENS] = mask.sum(dim=1).cpu().numpy()
        if inner_loss(loss) in _BY_POSITION:
            first = int(inner_loss(loss) is causal_lm_loss)
            sizes[:, TARGETS] = targets[:, first:].ne(IGNORED).sum(dim=1).cpu().numpy()
        found.append(sizes)
    return np.concatenate(found)
