"""A linear layer whose backward computes the per-sample norms itself.

It takes the place of `torch.nn.Linear`, keeps its parameters and names, and forms the weight
gradient only when asked to: never in a backward that is run for the norms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.privacy.capture import Capture, Layer


class FusedLinear(nn.Linear):
    """`torch.nn.Linear` that reports its output gradients to a capture."""

    is_fused_linear = True
    capture: Capture
    layer: Layer

    def forward(self, input: Tensor) -> Tensor:
        """[B, ..., d] -> [B, ..., p]."""
        call = self.capture.open_call(self.layer, input)
        if call is None:
            return F.linear(input, self.weight, self.bias)
        output: Tensor = _FusedLinear.apply(
            input, self.weight, self.bias, self.capture, self.layer, call
        )
        self.capture.note_root(input, output)
        return output


def fuse_linears(model: nn.Module) -> None:
    """Replace every plain trainable `torch.nn.Linear` of `model` in place; parameters are kept."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and any(p.requires_grad for p in child.parameters()):
                fused = FusedLinear(
                    child.in_features, child.out_features, child.bias is not None, device="meta"
                )
                fused.weight, fused.bias = child.weight, child.bias
                fused.train(child.training)
                parent.register_module(name, fused)


def connect(model: nn.Module, capture: Capture) -> None:
    """Make fused layers report to `capture`, and watch all others with hooks."""
    for layer in capture.layers:
        if isinstance(layer.module, FusedLinear):
            layer.module.capture, layer.module.layer = capture, layer
        else:
            capture.watch_with_hooks(layer.module)


class _FusedLinear(torch.autograd.Function):
    """y = x W^T + b with norms in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        capture: Capture,
        layer: Layer,
        call: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.layer, ctx.call = capture, layer, call
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.capture.close_call(ctx.layer, ctx.call, dy)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        if ctx.capture.wants_weight_gradients:
            dy_rows = dy.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                d_weight = dy_rows.T @ x.flatten(0, -2)
            if ctx.needs_input_grad[2]:
                d_bias = dy_rows.sum(dim=0)
        return dx, d_weight, d_bias, None, None, None
