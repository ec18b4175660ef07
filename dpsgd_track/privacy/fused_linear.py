"""Linear layers whose own backward reports the factors of per-sample gradients to the capture.

Covers `torch.nn.Linear` and transformers' Conv1D. Where the plan is to keep gradients, autograd
forms them of an expanded weight instead (`privacy.per_sample_weights`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dpsgd_track.config import GRADIENTS
from dpsgd_track.privacy.capture import Capture, has_saved_tensor_hooks
from dpsgd_track.privacy.captured_layer import WatchedLayer
from dpsgd_track.privacy.layers import linear, transposed_linear
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.per_sample_weights import run_linear


def can_fuse(layer: Layer) -> bool:
    """True if `FusedLayer` supports the layer."""
    return layer.rule in (linear, transposed_linear)


class FusedLayer(WatchedLayer):
    """Runs a linear layer as an autograd function whose backward reports to the capture."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """[B, ..., d] -> [B, ..., p]."""
        capture, layer = self.capture, self.layer
        module: Any = layer.module
        x = self.only_input(args, kwargs)
        leaves = self.leaves()
        if self._has_gradients_formed(x):
            if self._rounds_twice(x):
                return super().run(args, kwargs)
            return run_linear(capture, layer, leaves, x)
        is_open = capture.open_call(layer, x)
        if not is_open and not has_saved_tensor_hooks():
            # Not a checkpoint's, but a forward of a backward of the model's own, as in reversible
            # layers. It leaves gradients on leaves, by which the model is refused.
            return self.run_on_leaves(args, kwargs)
        weight, bias = leaves.get("weight", module.weight), leaves.get("bias", module.bias)
        weight_PD = weight if layer.rule is linear else weight.T
        # Autograd runs a function's backward only if it leads to a requested input.
        needs_anchor = capture.budget is not None or not x.requires_grad
        anchor = torch.empty(0, requires_grad=True) if needs_anchor else None
        output = _FusedLinear.apply(x, weight_PD, bias, anchor, capture, layer)
        if is_open and capture.budget is not None:
            assert anchor is not None
            capture.note_tap(layer, x, output, anchor)
        elif is_open:
            target = None if anchor is None else get_gradient_edge(anchor)
            capture.note_output(layer, get_gradient_edge(output), target)
        return output

    def _rounds_twice(self, x: Tensor) -> bool:
        """True if a batched product would be rounded before the bias is added, and once more after.

        On a GPU `torch.baddbmm` does so in 16 bits, which biases all samples alike. The layer's own
        forward rounds once.
        """
        weight: Any = self.layer.module.weight
        device = x.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        return dtype.itemsize == 2 and self.layer.module.bias is not None

    def _has_gradients_formed(self, x: Tensor) -> bool:
        """True if per-sample gradients are kept, so that autograd may form them."""
        # Autograd would hold them to the end of the backward, whatever the budget.
        if not self.capture.keep or self.capture.budget is not None:
            return False
        if "weight" not in self.layer.names:
            return True
        weight: Any = self.layer.module.weight
        num_outputs = weight.numel() // x.shape[-1]
        return self.capture.norm_plan_of(self.layer.names["weight"], x, num_outputs) == GRADIENTS


class _FusedLinear(torch.autograd.Function):
    """y = x W^T + b, with a backward that reports to the capture and returns dx alone."""

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
        return linear_forward(x, weight_PD, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_PD = ctx.saved_tensors
        ctx.capture.close_call(ctx.layer, x, dy)
        dx = dy @ weight_PD.to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None


def linear_forward(x: Tensor, weight_PD: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as the layer itself computes it, [B, ..., P]."""
    y = F.linear(x, weight_PD, bias)
    # Not a view, so that later operations may change it in place.
    output: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return output
