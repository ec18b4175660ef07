"""Layers that run on their parameters expanded to [B, *parameter].

The expanded view shares the parameter's memory; a batched product reads one weight for all samples.
The gradient that autograd forms of the view is the per-sample gradients, [B, *parameter], at the
cost of the ordinary gradient: there are no hooks, and no Python runs in the backward, unless a
linear layer adds a bias in 16 bits.

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
    """Run a linear layer (or transformers' Conv1D) on its weight expanded over samples.

    Opens the call.

    Args:
        leaves: leaves of its trainable parameters, by name.
    """
    module: Any = layer.module
    num_samples = x.shape[0]
    weight, bias = leaves.get("weight", module.weight), leaves.get("bias", module.bias)
    if torch.is_autocast_enabled(x.device.type):
        # Cast once, rather than for each sample.
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.expand(num_samples, *weight.shape)
    if bias is not None:
        bias = bias.expand(num_samples, 1, *bias.shape)
    is_open = capture.open_call(layer, x)
    x_BTD = x.reshape(num_samples, -1, x.shape[-1]) if x.dim() != 3 else x
    if is_open and "weight" in layer.names:
        capture.note_view(layer, "weight", weight, num_positions=x_BTD.shape[1])
    if is_open and "bias" in layer.names:
        capture.note_view(layer, "bias", bias)
    weight_BDP = weight.mT if layer.rule is linear else weight
    y = torch.bmm(x_BTD, weight_BDP) if bias is None else torch.baddbmm(bias, x_BTD, weight_BDP)
    return y if x.dim() == 3 else y.view(*x.shape[:-1], y.shape[-1])


class RmsNormPerSample(CapturedLayer):
    """Runs an RMSNorm on its weight expanded over samples."""

    is_by_rows = True

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """[B, ..., D] -> [B, ..., D]."""
        x = self.only_input(args, kwargs)
        parameters = self.module._parameters
        original, weight = parameters["weight"], self.leaves()["weight"]
        view = weight.expand(x.shape[0], *[1] * (x.dim() - 2), *weight.shape)
        if self.capture.open_call(self.layer, x):
            self.capture.note_view(self.layer, "weight", view)
        parameters["weight"] = view  # type: ignore[assignment]
        try:
            return self.original(*args, **kwargs)
        finally:
            parameters["weight"] = original


def takes_weight_per_sample(layer: Layer) -> bool:
    """True if `RmsNormPerSample` is exact for the layer."""
    return layer.rule is rms_norm and rms_norm.takes_weight_per_sample(layer.module)
