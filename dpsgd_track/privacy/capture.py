"""Captures what per-sample gradients are made of: each layer's inputs and output gradients.

A `Capture` watches the layers of one model. In the forward pass it keeps the inputs of every
call; in the backward pass, once the output gradients of all calls of a layer have arrived, it
joins the calls along the positions and hands `(x, dy)` to the norm rule. A layer that is called
several times in one forward is therefore exact: its calls are positions of one longer sequence.

Two ways lead in: hooks on an unchanged module (`watch_with_hooks`), and the backward of a fused
layer that was put in the module's place and reports itself (`open_call`, `close_call`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dpsgd_track.privacy.layers import LayerRule, find_rule
from dpsgd_track.privacy.layers import linear as linear_rule
from dpsgd_track.privacy.layers.positions import flatten_positions
from dpsgd_track.privacy.norms import NormRule


@dataclass
class _Call:
    """One call of a layer in one forward pass."""

    x: Tensor
    dy: Tensor | None = None


@dataclass
class Layer:
    """A layer whose per-sample gradients are captured."""

    fqn: str
    module: nn.Module
    rule: LayerRule
    shapes: dict[str, torch.Size]
    """Full shape of each trainable parameter."""
    calls: list[_Call] = field(default_factory=list)
    num_pending: int = 0

    def joined(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and output gradients of all calls that a gradient reached, as one sequence."""
        reached = [(call.x, call.dy) for call in self.calls if call.dy is not None]
        if not reached:
            return None
        if len(reached) == 1:
            return reached[0]
        return (
            torch.cat([_as_sequence(x) for x, _ in reached], dim=1),
            torch.cat([_as_sequence(dy) for _, dy in reached], dim=1),
        )


def _as_sequence(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.reshape(len(tensor), -1)
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


_Kept = Callable[[Tensor], dict[str, Tensor]]
"""clip_factor_B -> sum_i c_i g_i of each parameter of one layer; holds what that needs."""


class Capture:
    """Per-sample squared norms of one micro-batch, and what clipped sums are formed from."""

    def __init__(self, model: nn.Module, norm_rule: NormRule, *, keep: bool) -> None:
        """Find the rule of every layer with trainable parameters; watch nothing yet.

        Args:
            model: unsharded, its parameters in place.
            norm_rule: how norms of linear layers are found.
            keep: keep what the clipped sums of one-pass strategies are formed from.
        Raises:
            ValueError: naming every parameter that has no exact rule.
        """
        self.norm_rule = norm_rule
        self.keep = keep
        self.layers = find_layers(model)
        self.by_module = {layer.module: layer for layer in self.layers}
        self.norm_sq: dict[str, Tensor] = {}
        self.kept: dict[str, _Kept] = {}
        self.roots: list[Tensor] = []
        self._num_samples: int | None = None
        self._is_open = False

    @property
    def wants_weight_gradients(self) -> bool:
        """False in a backward that is run for the norms."""
        return not self._is_open

    @contextmanager
    def sample_batch(self, num_samples: int) -> Iterator[None]:
        """Captures the forward and backward inside, of `num_samples` samples."""
        self.norm_sq, self.kept, self.roots = {}, {}, []
        self._num_samples, self._is_open = num_samples, True
        try:
            yield
        finally:
            self._is_open = False
            self._num_samples = None
            self._forget_calls()

    def finish_norms(self) -> None:
        """End of the backward: settle layers with a call that no gradient reached."""
        for layer in self.layers:
            if layer.num_pending:
                self._settle(layer)
        self._is_open = False

    def norm_by_parameter(self) -> dict[str, Tensor]:
        """L2 norm [B] of each sample's gradient of each parameter that a gradient reached."""
        return {name: norm_sq.sqrt() for name, norm_sq in self.norm_sq.items()}

    def clipped_sums(self, clip_factor_B: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, sum_i c_i g_i) of every trainable parameter, in the same order on every rank.

        What is used is freed on the way; a layer that no gradient reached yields zeros.
        """
        for layer in self.layers:
            kept = self.kept.pop(layer.fqn, None)
            sums = {} if kept is None else kept(clip_factor_B)
            for name, shape in layer.shapes.items():
                gradient = sums.pop(name, None)
                yield (
                    _join(layer.fqn, name),
                    clip_factor_B.new_zeros(shape) if gradient is None else gradient,
                )

    def watch_with_hooks(self, module: nn.Module) -> None:
        """Capture every later call of `module` through hooks."""
        layer = self.by_module[module]
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(self._expand_shared_index)
        module.register_forward_hook(self._hook_of(layer))

    def open_call(self, layer: Layer, x: Tensor) -> int | None:
        """A call begins; its number, or None when nothing is being captured."""
        if not self._is_open or not torch.is_grad_enabled():
            return None
        if len(x) != self._num_samples:
            raise ValueError(
                f"{layer.fqn}: expected inputs of {self._num_samples} samples in dimension 0, got "
                f"shape {tuple(x.shape)}. Per-sample gradients of this layer cannot be told apart."
            )
        layer.calls.append(_Call(x.detach()))
        layer.num_pending += 1
        return len(layer.calls) - 1

    def close_call(self, layer: Layer, call: int, dy: Tensor) -> None:
        """The output gradients of a call have arrived."""
        if not self._is_open:
            return
        layer.calls[call].dy = dy.detach()
        layer.num_pending -= 1
        if layer.num_pending == 0:
            self._settle(layer)

    def note_root(self, x: Tensor, y: Tensor) -> None:
        """Remember `y` as an end of the backward where no gradient flows on through `x`.

        Asking autograd for the gradients of these tensors alone runs the backward through every
        captured layer and forms no weight gradient.
        """
        if self._is_open and not x.requires_grad:
            self.roots.append(y)

    def _hook_of(self, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            call = self.open_call(layer, args[0])
            if call is None:
                return
            self.note_root(args[0], output)
            output.register_hook(lambda dy: self.close_call(layer, call, dy))

        return hook

    def _expand_shared_index(self, module: nn.Module, args: tuple[Tensor, ...]) -> object:
        """Give every sample its own copy of an index that all share.

        Position indices often come as [1, T] and broadcast later; the gradient that returns
        would be the samples' sum. Expanded, the lookup is the same and the gradients apart.
        """
        index = args[0]
        if self._is_open and len(index) == 1 and self._num_samples not in (None, 1):
            return (index.expand(self._num_samples, *index.shape[1:]), *args[1:])
        return None

    def _settle(self, layer: Layer) -> None:
        pair = layer.joined()
        layer.calls.clear()
        layer.num_pending = 0
        if pair is None:
            return
        norms, kept = self._norms(layer, *pair)
        for name, norm_sq in norms.items():
            self.norm_sq[_join(layer.fqn, name)] = norm_sq
        if self.keep:
            self.kept[layer.fqn] = kept

    def _norms(self, layer: Layer, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], _Kept]:
        if self.keep and layer.rule is linear_rule:
            x_BTD, dy_BTP = flatten_positions(x), flatten_positions(dy)
            if self.norm_rule.keeps_gradients(x_BTD, dy_BTP):
                gradients = linear_rule.per_sample_gradients(layer.module, x_BTD, dy_BTP)
                norms = {n: linear_rule.gradient_norm_sq(g) for n, g in gradients.items()}
                return norms, partial(linear_rule.sum_gradients, gradients)
        norms = layer.rule.norm_sq(layer.module, x, dy, self.norm_rule.outer_norm)
        return norms, partial(layer.rule.clipped_sum, layer.module, x, dy)

    def _forget_calls(self) -> None:
        for layer in self.layers:
            layer.calls.clear()
            layer.num_pending = 0
        self.roots = []


def find_layers(model: nn.Module) -> list[Layer]:
    """Every module that owns trainable parameters, with its rule.

    Raises:
        ValueError: naming each parameter that no rule covers, or that two modules share.
    """
    layers: list[Layer] = []
    owner: dict[nn.Parameter, str] = {}
    problems: list[str] = []
    for fqn, module in model.named_modules():
        trainable = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not trainable:
            continue
        for name in trainable:
            parameter = getattr(module, name)
            if parameter in owner:
                problems.append(f"{_join(fqn, name)} (shared with {owner[parameter]})")
            owner[parameter] = _join(fqn, name)
        rule = find_rule(module)
        if rule is None:
            problems += [f"{_join(fqn, name)} (of {type(module).__name__})" for name in trainable]
        else:
            shapes = {name: getattr(module, name).shape for name in trainable}
            layers.append(Layer(fqn, module, rule, shapes))
    if problems:
        raise ValueError(
            f"model={type(model).__name__!r}: expected layers whose per-sample gradients are known "
            f"exactly. These parameters can't be clipped: {', '.join(problems)}. "
            "Freeze them, or use a mode that supports them."
        )
    return layers


def _join(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name
