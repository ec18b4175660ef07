"""The losses that all modes share: one number for each sample, in float32 or better.

A loss is a function (logits, targets) -> [B]. Dimension 0 of both is the sample. The loss of a
sample is the mean over its own targets alone, so that no sample's loss depends on another.

Shapes: B samples, T positions, C classes, V tokens of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd_track.config import require

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

IGNORED = -100
"""Target at positions that are not predicted."""


def classification_loss(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Cross-entropy of each sample's class, [B]."""
    return F.cross_entropy(_exact(logits_BC), target_B, reduction="none")


def masked_lm_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Mean cross-entropy over each sample's own targets, [B]; 0 for a sample without any."""
    per_token = F.cross_entropy(
        _exact(logits_BTV).flatten(0, 1),
        target_BT.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    ).view(target_BT.shape)
    num_targets_B = target_BT.ne(IGNORED).sum(dim=1)
    return per_token.sum(dim=1) / num_targets_B.clamp(min=1)


def causal_lm_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """`masked_lm_loss` in which position t predicts the target of position t + 1, [B]."""
    return masked_lm_loss(logits_BTV[:, :-1], target_BT[:, 1:])


def regression_loss(logits_BC: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over each sample's own outputs, [B].

    Args:
        target: as many numbers a sample as outputs; may be [B] for one output.
    """
    logits_BC = _exact(logits_BC).flatten(1)
    return (logits_BC - target.view_as(logits_BC).to(logits_BC)).square().mean(dim=1)


def token_classification_loss(logits_BTC: Tensor, target_BT: Tensor) -> Tensor:
    """`masked_lm_loss` over the classes of a sample's tokens, [B]."""
    return masked_lm_loss(logits_BTC, target_BT)


def seq2seq_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """`masked_lm_loss` of a decoder that was given the targets shifted by one, [B]."""
    return masked_lm_loss(logits_BTV, target_BT)


LOSSES: dict[str, PerSampleLoss] = {
    "sequence-classification": classification_loss,
    "causal-lm": causal_lm_loss,
    "masked-lm": masked_lm_loss,
    "regression": regression_loss,
    "image-classification": classification_loss,
    "token-classification": token_classification_loss,
    "seq2seq": seq2seq_loss,
}
"""Every built-in loss by the name of its task."""


def one_loss_a_sample(loss: PerSampleLoss) -> PerSampleLoss:
    """`loss`, with a ValueError if it does not return one number a sample, [B].

    The gradients of a mean or a sum over the batch are not those of the samples: clipping them at C
    would bound nothing.
    """

    @functools.wraps(loss)
    def checked(logits: Tensor, targets: Tensor) -> Tensor:
        loss_B = loss(logits, targets)
        name = getattr(loss, "__name__", type(loss).__name__)
        refuse_unless_one_a_sample(f"loss={name!r}", loss_B, len(targets))
        return loss_B

    return checked


def refuse_unless_one_a_sample(what: str, loss_B: Any, num_samples: int) -> None:
    """Raise ValueError unless a loss is one floating number for each sample, [B].

    Args:
        what: beginning of the sentence, such as `loss`.
    """
    is_tensor = isinstance(loss_B, Tensor)
    if is_tensor and loss_B.shape == (num_samples,) and loss_B.is_floating_point():
        return
    got = f"{loss_B.dtype} of shape {tuple(loss_B.shape)}" if is_tensor else type(loss_B).__name__
    raise ValueError(
        f"{what}: expected one number a sample, a tensor of shape ({num_samples},), got {got}. Use "
        "reduction='none', and take the mean over each sample's own outputs, never over samples."
    )


def loss_named(loss: str | PerSampleLoss) -> PerSampleLoss:
    """The loss of a task by its name; a function is returned as it is.

    Raises:
        ValueError: no task has that name.
    """
    if not isinstance(loss, str):
        return loss
    require(loss in LOSSES, "loss", loss, f"one of {', '.join(LOSSES)}, or a function")
    return LOSSES[loss]


def logits_of(output: Any) -> Tensor:
    """A model's output, or its `logits` where it is one of transformers' output classes.

    Raises:
        ValueError: it is neither.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"model: expected a tensor, or an output with a tensor `logits`, got "
            f"{type(output).__name__}. Wrap the model in a module that returns the tensor that the "
            "loss takes."
        )
    return logits


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
