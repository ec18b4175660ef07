"""Linear layers whose backward itself reports the per-sample gradients, and forms no other.

The forward of the module is replaced while a batch is captured; the module stays what it is, with
its parameters and names. Covers `torch.nn.Linear` and transformers' Conv1D. Where the plan is to
keep the gradients, autograd forms them; else the backward is a function of our own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dpsgd_track.config import GRADIENTS
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.layers import linear, transposed_linear
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.per_sample_weights import run_linear


def can_fuse(layer: Layer) -> bool:
    """Whether `fuse` knows the layer."""
    return layer.rule in (linear, transposed_linear)


def fuse(capture: Capture, layer: Layer) -> None:
    """Make the layer's module report to `capture` from its own backward."""
    module: Any = layer.module
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        """[B, ..., d] -> [B, ..., p]."""
        if not capture.is_capturing:
            output: Tensor = plain(x)
            return output
        capture.note_parameters(layer)
        if _has_gradients_formed(capture, layer, x):
            return run_linear(capture, layer, x)
        is_open = capture.open_call(layer, x)
        weight_PD = module.weight if layer.rule is linear else module.weight.T
        # A backward runs through a function only towards an input that it has to reach.
        anchor = None if x.requires_grad else torch.empty(0, requires_grad=True)
        output = _FusedLinear.apply(x, weight_PD, module.bias, anchor, capture, layer)
        if is_open:
            root = None if anchor is None else get_gradient_edge(anchor)
            capture.note_output(layer, get_gradient_edge(output), root)
        return output

    module.forward = forward


def _has_gradients_formed(capture: Capture, layer: Layer, x: Tensor) -> bool:
    """Whether the per-sample gradients themselves are kept, so that autograd may form them."""
    if not capture.keep:
        return False
    if "weight" not in layer.names:
        return True
    weight: Any = layer.module.weight
    num_outputs = weight.numel() // x.shape[-1]
    return capture.plan_of(layer.names["weight"], x, num_outputs) == GRADIENTS


class _FusedLinear(torch.autograd.Function):
    """y = x W^T + b; the backward reports to the capture and returns dx alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_PD: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        capture: Capture,
        layer: Layer,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_PD)
        ctx.capture, ctx.layer = capture, layer
        y = F.linear(x.flatten(0, -2), weight_PD, bias)
        # Not a view, which what follows might want to change in place.
        whole: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight_PD)))
        return whole

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_PD = ctx.saved_tensors
        ctx.capture.close_call(ctx.layer, x, dy)
        dx = dy @ weight_PD.to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None
