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
import torch.nn.functional as F
from torch import Tensor

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.layers import linear, rms_norm
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.layers.positions import flatten_positions


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
    if bias is not None and weight.dtype.itemsize == 2:
        found: Tensor = _BiasedLinear.apply(x, weight, bias, layer.rule is linear)
        return found
    x_BTD = x.reshape(num_samples, -1, x.shape[-1]) if x.dim() != 3 else x
    weight_BDP = weight.mT if layer.rule is linear else weight
    y = torch.bmm(x_BTD, weight_BDP) if bias is None else torch.baddbmm(bias, x_BTD, weight_BDP)
    return y if x.dim() == 3 else y.view(*x.shape[:-1], y.shape[-1])


class _BiasedLinear(torch.autograd.Function):
    """y = x W^T + b in 16 bits, with W and b there once for each sample.

    On a GPU `torch.baddbmm` rounds the product before it adds the bias. What it adds is then the
    bias rounded to the product's last bit, up to half of that bit too much or too little, in all
    samples alike. The layer's own forward rounds once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, is_linear: bool) -> Tensor:
        """[B, ..., D], [B, P, D] (or [B, D, P]) and [B, 1, P] to [B, ..., P]."""
        ctx.save_for_backward(x, weight)
        ctx.is_linear = is_linear
        return linear_forward(x, weight[0] if is_linear else weight[0].T, bias[0, 0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        dy_BTP = flatten_positions(dy)
        if ctx.needs_input_grad[0]:
            weight_PD = weight[0] if ctx.is_linear else weight[0].T
            dx = dy @ weight_PD.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            x_BTD = flatten_positions(x).to(dy.dtype)
            rows, columns = (dy_BTP, x_BTD) if ctx.is_linear else (x_BTD, dy_BTP)
            dweight = torch.bmm(rows.mT, columns)
        if ctx.needs_input_grad[2]:
            dbias = dy_BTP.sum(dim=1, keepdim=True)
        return dx, dweight, dbias, None


def linear_forward(x: Tensor, weight_PD: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as the layer itself computes it, [B, ..., P]."""
    y = F.linear(x, weight_PD, bias)
    # Not a view, which what follows might want to change in place.
    whole: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return whole


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
            return self.plain(*args, **kwargs)
        finally:
            parameters["weight"] = held


def takes_weight_per_sample(layer: Layer) -> bool:
    """Whether `RmsNormPerSample` is exact for the layer."""
    return layer.rule is rms_norm and rms_norm.takes_weight_per_sample(layer.module)
