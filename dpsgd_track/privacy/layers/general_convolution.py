"""Grouped, transposed and three-dimensional convolutions, and those padded otherwise than by zeros.

With the samples of a batch as groups of one convolution, its weight gradient is the per-sample
gradients, [B, *weight].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.privacy.layers.positions import summed_channels, trainable_terms
from dpsgd_track.privacy.terms import Dense, Term

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matches(module: nn.Module) -> bool:
    """True for torch's convolutions, not for subclasses that compute something else."""
    forwards = [kind.forward for kind in (*_KINDS, *_TRANSPOSED)]
    return isinstance(module, (*_KINDS, *_TRANSPOSED)) and type(module).forward in forwards


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [P, C / groups, *kernel], or [C, P / groups, *kernel] if transposed, and bias [P]."""
    return trainable_terms(
        module,
        weight=lambda: Dense(_weight_gradients(module, x.to(dy.dtype), dy)),
        bias=lambda: summed_channels(dy),
    )


def _weight_gradients(module: Any, x: Tensor, dy: Tensor) -> Tensor:
    """[B, *weight]."""
    num_samples, shape = len(x), module.weight.shape
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), [0]
    # Only the shape of the weight is read.
    weight = dy.new_zeros(()).expand(num_samples * shape[0], *shape[1:])
    _, gradient, _ = torch.ops.aten.convolution_backward(
        dy.reshape(1, -1, *dy.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        weight,
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        module.output_padding,
        num_samples * module.groups,
        [False, True, False],
    )
    return gradient.view(num_samples, *shape)
