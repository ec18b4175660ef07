"""Layers inside compiled modules, as torch.compile traces them.

Elsewhere a captured layer interrupts the graph, and little is left to compile. Here it runs as
ordinary operations, with further inputs (*leaves*) of which it is independent. What autograd takes
for their gradients is what the capture needs:

- the per-sample gradients of a small parameter, or of a weight whose gradients are kept
- otherwise a linear layer's inputs and the gradients of its outputs

No Python runs in the backward, and nothing has a side effect that a compiler might move or merge.
A leaf has its shape before the forward: each kind of batch, by the shapes of its samples, runs once
without the compiler, and the layers' inputs are noted. That batch is inspected like any first one.

This holds for linear layers, RMSNorms and LayerNorms whose inputs are [B, ..., D], in modes that
take one backward and keep what it delivers. Any other captured layer interrupts the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.config import GRADIENTS
from dpsgd_track.distributed.sample_exchange import Formed
from dpsgd_track.kernels.device import HostCopy
from dpsgd_track.kernels.flash_norm.reference import accumulation_dtype
from dpsgd_track.kernels.normalisation import normalised
from dpsgd_track.privacy.layers import layer_norm, linear, rms_norm, transposed_linear
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.layers.positions import flatten_positions
from dpsgd_track.privacy.uncompiled import without_compiler

if TYPE_CHECKING:
    from dpsgd_track.privacy.capture import Capture
    from dpsgd_track.privacy.captured_layer import CapturedLayer

_NAMES = ("weight", "bias")
_LINEAR = (linear, transposed_linear)

_Input: TypeAlias = tuple[torch.Size, torch.dtype]
"""Shape of one sample of a layer's input, and its type."""


def can_trace(layer: Layer) -> bool:
    """True if `TracedLayer` computes what the layer does.

    It has no gradient for a weight that is computed from others, as by a parametrization.
    """
    own = layer.module._parameters
    if any(isinstance(getattr(layer.module, n, None), Tensor) and n not in own for n in _NAMES):
        return False
    if layer.rule is layer_norm:
        return len(getattr(layer.module, "normalized_shape", (1,))) == 1
    return layer.rule in (*_LINEAR, rms_norm)


class TracedLayer:
    """Runs one layer on its leaves."""

    def __init__(self, capture: Capture, captured: CapturedLayer) -> None:
        layer = captured.layer
        self.capture, self.layer, self.interrupt = capture, layer, captured.interrupt
        self.module: Any = layer.module
        self.is_linear, self.is_transposed = layer.rule in _LINEAR, layer.rule is transposed_linear
        self.is_centred = layer.rule is layer_norm
        self.offset = rms_norm.offset(layer.module) if layer.rule is rms_norm else 0.0
        self.has_factors = False
        """True if the leaves take a linear layer's inputs and the gradients of its outputs."""
        self._prepared: tuple[int, _Input, torch.device] | None = None
        self.count_leaf: Tensor | None = None
        self.x_leaf: Tensor | None = None
        self.dy_leaf: Tensor | None = None
        self.num_positions = 0
        self.weight_leaf: Tensor | None = None
        self.bias_leaf: Tensor | None = None

    def prepare(self, num_samples: int, of_sample: _Input) -> None:
        """Have leaves for the inputs of a batch."""
        device = self.module.weight.device
        if self._prepared == (num_samples, of_sample, device):
            return
        self._prepared = num_samples, of_sample, device
        shape, dtype = of_sample
        capture, names = self.capture, self.layer.names
        x = _leaf((num_samples, *shape), dtype, device)
        self.num_positions = shape[:-1].numel()
        self.has_factors = False
        self.count_leaf = self.x_leaf = self.dy_leaf = self.weight_leaf = self.bias_leaf = None
        # Vectors are summed over positions in float32.
        vectors = accumulation_dtype(x)
        if self.is_linear and "weight" in names:
            num_outputs = capture.shapes[names["weight"]][1 if self.is_transposed else 0]
            if capture.norm_plan_of(names["weight"], x, num_outputs) != GRADIENTS:
                self.has_factors = True
                self.count_leaf = _leaf((1,), vectors, device)
                self.x_leaf = x
                self.dy_leaf = _leaf((num_samples, *shape[:-1], num_outputs), dtype, device)
                return
        for name, full_name in names.items():
            is_matrix = self.is_linear and name == "weight"
            leaf_shape = (num_samples, *capture.shapes[full_name])
            leaf = _leaf(leaf_shape, dtype if is_matrix else vectors, device)
            setattr(self, f"{name}_leaf", leaf)

    def leaves(self) -> list[Tensor]:
        """All leaves of the current batch."""
        every = (self.count_leaf, self.x_leaf, self.dy_leaf, self.weight_leaf, self.bias_leaf)
        return [leaf for leaf in every if leaf is not None]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, ..., D] -> [B, ..., P], as the compiler traces it."""
        module = self.module
        weight = module.weight.detach()
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach()
        if not self.is_linear:
            return self._normalised(x, weight, bias)
        weight = weight.T if self.is_transposed else weight
        y: Tensor
        if self.has_factors:
            assert self.x_leaf is not None
            if x.shape != self.x_leaf.shape:
                # Autograd would add up what has more rows than its leaf.
                y = self.interrupt(x)
                return y
            y = _WithFactors.apply(x, weight, bias, self.count_leaf, self.x_leaf, self.dy_leaf)
        else:
            y = _WithGradients.apply(
                x, weight, bias, self.weight_leaf, self.bias_leaf, self.is_transposed
            )
        return y

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module = self.module
        eps = layer_norm.epsilon(module) if self.is_centred else rms_norm.epsilon(module, x)
        xhat = normalised(flatten_positions(x), eps, is_centred=self.is_centred)
        scale = self.offset + weight.to(xhat.dtype)
        y = xhat * (scale if self.weight_leaf is None else scale + self.weight_leaf.unsqueeze(1))
        if bias is not None:
            shift = bias.to(xhat.dtype)
            y = y + (shift if self.bias_leaf is None else shift + self.bias_leaf.unsqueeze(1))
        return y.to(x.dtype).view(x.shape)

    def targets(
        self, count: Callable[[Tensor], None]
    ) -> list[tuple[Tensor, Callable[[Tensor], None]]]:
        """Leaves, each with what takes its gradient.

        Args:
            count: takes the number of calls, [1], that the factors are the sums of.
        """
        if self.has_factors:
            assert self.count_leaf is not None
            assert self.x_leaf is not None
            assert self.dy_leaf is not None
            x: list[Tensor] = []

            def close(dy: Tensor) -> None:
                self.capture.close_call(self.layer, x.pop(), dy)

            return [(self.count_leaf, count), (self.x_leaf, x.append), (self.dy_leaf, close)]
        pairs = ((name, getattr(self, f"{name}_leaf")) for name in self.layer.names)
        return [
            (leaf, partial(self.capture.add_gradients, self.layer.names[name]))
            for name, leaf in pairs
        ]


class Tracing:
    """The traced layers of a capture, and the kinds of batches that they are traced for."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._layers: dict[str, TracedLayer] = {}
        self._kinds: dict[Hashable, dict[str, _Input]] = {}
        """The input of each traced layer, by its name."""
        self._seen: dict[str, list[_Input]] | None = None
        """Inputs of each call of a layer, while they are noted."""
        self._active: list[TracedLayer] = []
        self._counts: list[Tensor] = []
        """Calls of each layer with factors in the current batch."""
        self._is_single: HostCopy | None = None
        """True if there was one of each in the last batch."""

    def note_input(self, layer: Layer, x: Tensor) -> None:
        """Note the input of a call that was opened."""
        if self._seen is not None:
            self._seen.setdefault(layer.fqn, []).append((x.shape[1:], x.dtype))

    @contextmanager
    def batch(self, kind: Hashable, num_samples: int) -> Iterator[None]:
        """Context of a micro-batch in which layers inside compiled modules are traced.

        Args:
            kind: equal for batches whose samples have the same shapes; None for one whose layers
                interrupt the graph.
        """
        self._refuse_several_calls()
        roots = [module for module in self._capture.model.modules() if _is_compiled(module)]
        if roots and self._capture.retains_graphs:
            # A graph would give its buffers away in its first backward.
            torch._functorch.config.donated_buffer = False
        if roots and self._capture.courses:
            # What samples share is followed through the functions of torch that are called.
            with without_compiler():
                yield
        elif not roots or kind is None:
            yield
        elif kind in self._kinds:
            with self._traced(self._kinds[kind], num_samples):
                yield
        else:
            with self._noted(kind, roots):
                yield

    @contextmanager
    def _noted(self, kind: Hashable, roots: list[nn.Module]) -> Iterator[None]:
        self._seen = {}
        try:
            with without_compiler():
                yield
            names = self._traceable(roots)
            self._kinds[kind] = {
                fqn: inputs[0]
                for fqn, inputs in self._seen.items()
                if len(inputs) == 1 and fqn in names
            }
        finally:
            self._seen = None

    def _traceable(self, roots: list[nn.Module]) -> set[str]:
        """Layers inside compiled modules that can be traced."""
        captured = self._capture.captured.values()
        inside = {module for root in roots for module in root.modules()}
        # Another layer may place what it reads into the slots of a module inside it.
        uses = Counter(place for each in captured for place in _places(each))
        return {
            each.layer.fqn
            for each in captured
            if each.module in inside
            and each.is_by_rows
            and can_trace(each.layer)
            and all(uses[place] == 1 for place in _places(each))
        }

    @contextmanager
    def _traced(self, inputs: dict[str, _Input], num_samples: int) -> Iterator[None]:
        captured = self._capture.captured
        with ExitStack() as stack:
            # Leaves are reached through modules, whose tensors are taken to have one size.
            stack.enter_context(
                torch._dynamo.config.patch(force_nn_module_property_static_shapes=False)
            )
            for fqn, of_sample in inputs.items():
                if fqn not in self._layers:
                    self._layers[fqn] = TracedLayer(self._capture, captured[fqn])
                layer = self._layers[fqn]
                layer.prepare(num_samples, of_sample)
                self._active.append(layer)
                captured[fqn].traced = layer
                stack.callback(setattr, captured[fqn], "traced", None)
            stack.callback(self._active.clear)
            for unit in self._capture.units:
                unit.traced = unit.original if unit.has_reported else None
                stack.callback(setattr, unit, "traced", None)
            yield

    def targets(self) -> list[tuple[Tensor, Callable[[Tensor], None]]]:
        """Leaves of the current batch, each with what takes its gradient."""
        self._counts.clear()
        return [pair for layer in self._active for pair in layer.targets(self._counts.append)]

    def formed(self) -> dict[str, tuple[Tensor, Formed]]:
        """Leaves of the current batch whose gradients are a matrix's per-sample gradients, by the
        matrix's name."""
        return {
            traced.layer.names["weight"]: (
                leaf,
                Formed.by_product(leaf, traced.num_positions, is_transposed=False),
            )
            for traced in self._active
            if traced.is_linear and (leaf := traced.weight_leaf) is not None
        }

    def layers(self) -> list[Layer]:
        """Layers that are traced in the current batch."""
        return [traced.layer for traced in self._active]

    def checked(self, norm_sq: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared norms [B] of the current batch, by parameter. If factors are sums of several
        calls, those of one parameter are NaN, so that the batch adds nothing, and the next raises.

        Raises:
            ValueError: on a CPU, at once.
        """
        if not self._counts:
            return norm_sq
        is_single = torch.cat(self._counts).eq(1).all()
        if not (is_single.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._is_single = HostCopy(is_single)
        if is_single.device.type == "cpu":
            self._refuse_several_calls()
        # In one of them: the norm over all is NaN then.
        name, sq = next(iter(norm_sq.items()))
        return norm_sq | {name: torch.where(is_single, sq, torch.nan)}

    def _refuse_several_calls(self) -> None:
        is_single, self._is_single = self._is_single, None
        if is_single is not None and not bool(is_single.wait()):
            raise ValueError(
                "model: expected compiled layers to be called once in a batch, as in the first of "
                "its kind, got more calls. Nothing was added. Train without torch.compile."
            )

    def leaves(self) -> Iterator[Tensor]:
        """All leaves of the current batch."""
        for layer in self._active:
            yield from layer.leaves()


class _WithGradients(torch.autograd.Function):
    """y = x W^T + b; the gradients of the leaves are those of W and b for each sample."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_PD: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_PD)
        ctx.has_weight, ctx.has_bias = weight_leaf is not None, bias_leaf is not None
        ctx.is_transposed = is_transposed
        return F.linear(x, weight_PD, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_PD = ctx.saved_tensors
        x_BTD, dy_BTP = flatten_positions(x), flatten_positions(dy)
        grad_B = None
        if ctx.has_weight:
            first, last = (x_BTD, dy_BTP) if ctx.is_transposed else (dy_BTP, x_BTD)
            grad_B = torch.bmm(first.mT, last)
        bias_grad_B = dy_BTP.sum(dim=1, dtype=accumulation_dtype(dy)) if ctx.has_bias else None
        return dy @ weight_PD, None, None, grad_B, bias_grad_B, None


class _WithFactors(torch.autograd.Function):
    """y = x W^T + b; the gradients of the leaves are 1, x and dy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_PD: Tensor,
        bias: Tensor | None,
        count_leaf: Tensor,
        x_leaf: Tensor,
        dy_leaf: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_PD)
        return F.linear(x, weight_PD, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_PD = ctx.saved_tensors
        one = dy.new_ones(1, dtype=accumulation_dtype(dy))
        return dy @ weight_PD, None, None, one, x, dy


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros that takes no memory, and requires gradients."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()


def _places(captured: CapturedLayer) -> Iterator[tuple[int, str]]:
    """Slots that a captured layer fills."""
    for slot in captured.slots:
        yield from ((id(own), key) for own, key in slot.entries)


def _is_compiled(module: nn.Module) -> bool:
    """True if torch.compile has compiled a module in place, or returned it as a wrapper."""
    own = vars(module)
    return own.get("_compiled_call_impl") is not None or "dynamo_ctx" in own
