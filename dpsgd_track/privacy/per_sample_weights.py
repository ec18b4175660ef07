"""Layers that run on one view of their parameters for each sample.

The views share the parameter's memory; a batched product reads one weight for all samples. What
autograd forms as the gradient of the view is the per-sample gradients, [B, *parameter], at the
price of the gradient itself: nothing is hooked, and no line of Python runs in the backward.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.layers import linear, rms_norm
from dpsgd_track.privacy.layers.inventory import Layer


def run_linear(capture: Capture, layer: Layer, x: Tensor) -> Tensor:
    """A linear layer (or transformers' Conv1D) on its weight for each sample.

    The call is opened here.
    """
    module: Any = layer.module
    num_samples = x.shape[0]
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled(x.device.type):
        # Once, rather than for each sample.
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.expand(num_samples, *weight.shape)
    x_BTD = x.reshape(num_samples, -1, x.shape[-1]) if x.dim() != 3 else x
    weight_BDP = weight.mT if layer.rule is linear else weight
    is_open = capture.open_call(layer, x)
    if is_open and "weight" in layer.names:
        capture.want(layer, "weight", weight)
    if bias is None:
        y = torch.bmm(x_BTD, weight_BDP)
    else:
        bias = bias.expand(num_samples, 1, *bias.shape)
        if is_open and "bias" in layer.names:
            capture.want(layer, "bias", bias)
        y = torch.baddbmm(bias, x_BTD, weight_BDP)
    return y if x.dim() == 3 else y.view(*x.shape[:-1], y.shape[-1])


def run_rms_norm_per_sample(capture: Capture, layer: Layer) -> None:
    """Make an RMSNorm's module run on its weight for each sample whenever a batch is captured."""
    module: Any = layer.module
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        """[B, ..., D] -> [B, ..., D]."""
        if not capture.is_capturing:
            output: Tensor = plain(x)
            return output
        capture.note_parameters(layer)
        weight = module.weight
        view = weight.expand(x.shape[0], *[1] * (x.dim() - 2), *weight.shape)
        if capture.open_call(layer, x):
            capture.want(layer, "weight", view)
        module._parameters["weight"] = view
        try:
            output = plain(x)
        finally:
            module._parameters["weight"] = weight
        return output

    module.forward = forward


def takes_weight_per_sample(layer: Layer) -> bool:
    """Whether `run_rms_norm_per_sample` is exact for the layer."""
    return layer.rule is rms_norm and rms_norm.takes_weight_per_sample(layer.module)
