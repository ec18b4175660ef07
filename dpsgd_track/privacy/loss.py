"""The loss every mode shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_sample_loss(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Cross-entropy of each sample, [B].

    Args:
        logits_BC: class scores, any floating type.
        target_B: class indices.
    Returns:
        [B], computed in float32 (float64 for float64 logits) whatever the logits' type.
    """
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    return F.cross_entropy(logits_BC, target_B, reduction="none")
