"""Layers that run on one view of their parameters for each sample.

The views share the parameter's memory; a batched product reads one weight for all samples. What
autograd forms as the gradient of the view is the per-sample gradients, [B, *parameter], at the
price of the gradient itself: nothing is hooked, and no line of Python runs in the backward, unless
a linear layer adds a bias in 16 bits.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.layers import linear, rms_norm
from dpsgd_track.privacy.layers.inventory import Layer


def run_linear(capture: Capture, layer: Layer, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A linear layer (or transformers' Conv1D) on its weight for each sample.

    The call is opened here.

    Args:
        leaves: what stands for its trainable parameters.
    """
    module: Any = layer.module
    num_samples = x.shape[0]
    weight, bias = leaves.get("weight", module.weight), leaves.get("bias", module.bias)
    if torch.is_autocast_enabled(x.device.type):
        # Once, rather than for each sample.
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.expand(num_samples, *weight.shape)
    if bias is not None:
        bias = bias.expand(num_samples, 1, *bias.shape)
    is_open = capture.open_call(layer, x)
    if is_open and "weight" in layer.names:
        capture.want(layer, "weight", weight)
    if is_open and "bias" in layer.names:
        capture.want(layer, "bias", bias)
    x_BTD = x.reshape(num_samples, -1, x.shape[-1]) if x.dim() != 3 else x
    weight_BDP = weight.mT if layer.rule is linear else weight
    y = torch.bmm(x_BTD, weight_BDP) if bias is None else torch.baddbmm(bias, x_BTD, weight_BDP)
    return y if x.dim() == 3 else y.view(*x.shape[:-1], y.shape[-1])


class RmsNormPerSample(CapturedLayer):
    """An RMSNorm that runs on its weight for each sample."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """[B, ..., D] -> [B, ..., D]."""
        x = self.only_input(args, kwargs)
        parameters = self.module._parameters
        held, weight = parameters["weight"], self.leaf("weight")
        view = weight.expand(x.shape[0], *[1] * (x.dim() - 2), *weight.shape)
        if self.capture.open_call(self.layer, x):
            self.capture.want(self.layer, "weight", view)
        parameters["weight"] = view  # type: ignore[assignment]
        try:
            return self.original(*args, **kwargs)
        finally:
            parameters["weight"] = held


def takes_weight_per_sample(layer: Layer) -> bool:
    """Whether `RmsNormPerSample` is exact for the layer."""
    return layer.rule is rms_norm and rms_norm.takes_weight_per_sample(layer.module)
