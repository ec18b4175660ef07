"""torch.nn.LayerNorm: weight gradient sum_t dy_t * xhat_t, bias gradient sum_t dy_t."""

from __future__ import annotations

from torch import Tensor, nn

from dpsgd_track.kernels.normalisation import weight_and_bias_parts
from dpsgd_track.privacy.layers.positions import trainable_terms
from dpsgd_track.privacy.terms import Positions, Term


def matches(module: nn.Module) -> bool:
    """True for LayerNorm, not for subclasses that compute something else."""
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight and bias, in the normalised shape."""
    assert isinstance(module, nn.LayerNorm)
    num_dims = len(module.normalized_shape)
    weight, bias = weight_and_bias_parts(
        _positions(x, num_dims), _positions(dy, num_dims), module.eps, is_centred=True
    )
    return trainable_terms(module, weight=lambda: Positions(weight), bias=lambda: Positions(bias))


def _positions(tensor: Tensor, num_feature_dims: int) -> Tensor:
    """[B, ..., *features] as [B, T, D]."""
    features = tensor.shape[tensor.dim() - num_feature_dims :].numel()
    return tensor.reshape(len(tensor), -1, features)
