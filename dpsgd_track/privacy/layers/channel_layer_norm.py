"""LayerNorm over the channels of [B, C, height, width], as ConvNeXt's."""

from __future__ import annotations

from torch import Tensor, nn

from dpsgd_track.privacy.layers import layer_norm
from dpsgd_track.privacy.layers.norm_trial import computes_norm
from dpsgd_track.privacy.terms import Term


def matches(module: nn.Module) -> bool:
    """True for classes by the name of a LayerNorm that compute this on trial inputs."""
    if not layer_norm.is_named_alike(module):
        return False
    normalise, epsilon = layer_norm.normalised_features(module), layer_norm.epsilon(module)
    return computes_norm(module, normalise, epsilon, (2, 3, 2), feature_dim=1)


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight and bias [C].

    Raises:
        ValueError: the inputs have other dimensions than those of images.
    """
    if x.dim() != 4:
        raise ValueError(
            f"{type(module).__name__}: expected inputs [B, C, height, width], got "
            f"{tuple(x.shape)}. Use torch's own LayerNorm for others, or freeze it."
        )
    return layer_norm.terms(module, x.movedim(1, -1), dy.movedim(1, -1))
