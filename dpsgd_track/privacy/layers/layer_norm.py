"""LayerNorm: weight gradient sum_t dy_t * xhat_t, bias gradient sum_t dy_t.

torch's own, and those of other libraries under that name, such as timm's and transformers'.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dpsgd_track.kernels.normalisation import normalised, weight_and_bias_parts
from dpsgd_track.privacy.layers.norm_trial import computes_norm
from dpsgd_track.privacy.layers.positions import trainable_terms
from dpsgd_track.privacy.terms import Positions, Term

_EPSILON = 1e-5
"""torch's default, which classes without a setting of their own pass on."""


def matches(module: nn.Module) -> bool:
    """True for LayerNorm, and for others of that name that compute one on trial inputs."""
    if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
        return True
    return is_named_alike(module) and all(
        computes_norm(module, normalised_features(module), epsilon(module), shape)
        for shape in ((6,), (2, 3), (2, 1, 3))
    )


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight and bias, in the normalised shape."""
    num_dims = len(getattr(module, "normalized_shape", (1,)))
    weight, bias = weight_and_bias_parts(
        _positions(x, num_dims), _positions(dy, num_dims), epsilon(module), is_centred=True
    )
    return trainable_terms(module, weight=lambda: Positions(weight), bias=lambda: Positions(bias))


def is_named_alike(module: nn.Module) -> bool:
    """True if a class goes by the name of a LayerNorm, and may be one over a single dimension."""
    is_named = isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__
    weight = getattr(module, "weight", None)
    return is_named and isinstance(weight, Tensor) and weight.dim() == 1


def epsilon(module: nn.Module) -> float:
    """Constant that is added to the variance."""
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return float(eps) if isinstance(eps, int | float) else _EPSILON


def normalised_features(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """xhat over the last dimension, with the module's epsilon."""
    return lambda x: normalised(x, epsilon(module), is_centred=True)


def _positions(tensor: Tensor, num_feature_dims: int) -> Tensor:
    """[B, ..., *features] as [B, T, D]."""
    features = tensor.shape[tensor.dim() - num_feature_dims :].numel()
    return tensor.reshape(len(tensor), -1, features)
