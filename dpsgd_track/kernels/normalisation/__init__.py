"""Per-sample gradients of the weight and bias of an RMSNorm or a LayerNorm.

With xhat the normalised input and g the gradient of the output, a sample's gradients are

    weight: sum_t g_t * xhat_t,    bias: sum_t g_t

    RMSNorm:    xhat = x / sqrt(mean(x^2) + eps)
    LayerNorm:  xhat = (x - mean(x)) / sqrt(var(x) + eps)

They are vectors, whose norms cost next to nothing. One pass reads x and g; xhat is never stored.
"""

from __future__ import annotations

from torch import Tensor

from dpsgd_track.kernels.device import runs_triton
from dpsgd_track.kernels.normalisation import reference
from dpsgd_track.kernels.normalisation.reference import normalised

__all__ = ["normalised", "weight_and_bias_gradients", "weight_and_bias_parts"]


def weight_and_bias_parts(
    x_BTD: Tensor, dy_BTD: Tensor, eps: float, *, is_centred: bool
) -> tuple[Tensor, Tensor]:
    """Each sample's gradient of the weight and of the bias, in parts that are yet to be added.

    Args:
        x_BTD: the layer's inputs.
        dy_BTD: gradients of its outputs.
        is_centred: True for a LayerNorm, False for an RMSNorm.
    Returns:
        [B, parts, D] each, float32 (float64 for float64 inputs): sums over runs of positions.
    """
    if runs_triton(x_BTD, dy_BTD):
        from dpsgd_track.kernels.normalisation import triton

        return triton.weight_and_bias_parts(x_BTD, dy_BTD, eps, is_centred=is_centred)
    return reference.weight_and_bias_parts(x_BTD, dy_BTD, eps, is_centred=is_centred)


def weight_and_bias_gradients(
    x_BTD: Tensor, dy_BTD: Tensor, eps: float, *, is_centred: bool
) -> tuple[Tensor, Tensor]:
    """The same gradients, [B, D] each."""
    weight, bias = weight_and_bias_parts(x_BTD, dy_BTD, eps, is_centred=is_centred)
    return weight.sum(dim=1), bias.sum(dim=1)
