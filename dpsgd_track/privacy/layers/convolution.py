"""torch.nn.Conv1d and Conv2d: a linear layer over unfolded patches.

Position t of the output sees one patch of the input; with the patches as inputs x_t the weight
gradient is sum_t dy_t x_t^T. A patch embedding, whose stride is its kernel, copies its input once.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.privacy.layers.positions import summed_channels, trainable_terms
from dpsgd_track.privacy.terms import Outer, Term


def matches(module: nn.Module) -> bool:
    """True for ungrouped Conv1d and Conv2d with a number of zeros as padding."""
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d)
        and type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [P, C, *kernel] and bias [P]."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    dy_BTP = dy.flatten(2).mT
    return trainable_terms(
        module,
        weight=lambda: Outer(_patches(module, x.to(dy.dtype)), dy_BTP),
        bias=lambda: summed_channels(dy),
    )


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """[B, C, ...] -> [B, T, C * kernel]."""
    settings: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
    if isinstance(module, nn.Conv1d):
        # As a two-dimensional convolution over a single row.
        x = x.unsqueeze(2)
        settings = [(one, *setting) for setting, one in zip(settings, (1, 1, 0, 1), strict=True)]
    return F.unfold(x, *settings).mT
