"""Base class of the ways to capture a layer, and the way for layers with a rule.

A captured layer runs on leaf tensors that share its parameters' memory. They are in the modules'
slots during the layer's own calls only, so that a gradient that reaches a parameter itself comes
from a use that no call accounts for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpsgd_track.privacy.capture import Capture, has_saved_tensor_hooks
from dpsgd_track.privacy.layers.inventory import Layer, own_holders
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.shared_rows import Course, SharedRows

_STANDS_FOR = "stands_for"
"""Attribute of a tensor that is in a slot in place of a parameter."""


class CapturedLayer(ReplacedForward):
    """Captures the calls of one layer: replaces its module's forward while a batch is captured."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(layer.module)
        self.capture, self.layer = capture, layer
        self.slots = _slots_of(layer)
        """Slots of the module's trainable parameters."""

    @property
    def is_by_rows(self) -> bool:
        """True if inputs and outputs are [B, ..., d], a row for each sample."""
        return False

    @abstractmethod
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module on a call's arguments, and capture the call."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Capture the call while gradients are enabled; otherwise run the module as it is."""
        if not self.capture.is_capturing:
            return self.original(*args, **kwargs)
        return self.run(args, kwargs)

    def attach(self) -> None:
        """Replace the module's forward.

        Raises:
            ValueError: other code has replaced the forward of a layer that has a rule.
        """
        if "forward" in self._own and self.layer.rule is not None:
            raise ValueError(
                f"{self.layer.fqn}: expected the forward of {type(self.module).__name__}, got one "
                "that was replaced after the mode was made. Make the model private after that."
            )
        super().attach()

    def leaves(self) -> dict[str, Tensor]:
        """Leaf of each trainable parameter, by the parameter's name in the module."""
        return {slot.name: slot.leaf() for slot in self.slots}

    def own_leaves(self) -> Iterator[Tensor]:
        """All leaves that exist so far."""
        return (slot.current_leaf for slot in self.slots if slot.current_leaf is not None)

    def seen_parameters(self) -> dict[str, Tensor]:
        """Trainable parameters that calls so far have run on, by fully qualified name."""
        return {
            self.layer.names[slot.name]: slot.parameter
            for slot in self.slots
            if slot.parameter is not None
        }

    def run_on_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward on leaves in place of its parameters."""
        outside = [slot.enter() for slot in self.slots]
        try:
            return self.original(*args, **kwargs)
        finally:
            for slot, tensor in zip(self.slots, outside, strict=True):
                slot.fill(tensor)

    @contextmanager
    def on_own_parameters(self) -> Iterator[None]:
        """Context in which the module has its own parameters, whatever another layer has placed."""
        with filled(self.slots, {slot.name: slot.current() for slot in self.slots}):
            yield

    def when_reached(
        self, layer: Layer, x: Tensor, y: Tensor, close: Callable[[Tensor], None]
    ) -> None:
        """Have `close` take the gradient of `y`, which a call of `layer` that was opened has
        computed from `x`, in each backward that ends calls."""
        base = _without_view(y)
        edge = get_gradient_edge(base)
        view = None if base is y else (y.shape, y.stride())

        def take(dy: Tensor) -> None:
            if self.capture.ends_calls():
                close(dy if view is None else dy.contiguous().as_strided(*view))

        if x.requires_grad:
            self.capture.note_output(layer, edge, None)
            _before_node(edge, take)
        elif has_saved_tensor_hooks():
            self.capture.note_output(layer, edge, edge)
            base.register_hook(take)
        else:
            self.capture.note_output(layer, edge, edge, take)

    def only_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The one tensor that a layer with a rule is called with.

        Raises:
            ValueError: the call has other arguments.
        """
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return args[0]
        given = [x for x in (*args, *kwargs.values()) if x is not None]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise ValueError(
                f"{self.layer.fqn}: expected {type(self.module).__name__} to be called with one "
                f"tensor, got {len(given)} arguments. Freeze the layer, or call it so from the "
                "first batch on."
            )
        return given[0]


class WatchedLayer(CapturedLayer):
    """Captures a layer with a rule from its inputs and the gradients of its outputs."""

    def __init__(
        self,
        capture: Capture,
        layer: Layer,
        *,
        sample_dim: int = 0,
        is_spread: bool = False,
        is_grouped: bool = False,
        is_interleaved: bool = False,
        is_mixed: bool = False,
        course: Course | None = None,
    ) -> None:
        """
        Args:
            sample_dim: the samples' dimension in inputs and outputs.
            is_spread: all samples share the inputs. Each sample gets a copy of its own, so that
                their gradients arrive separately.
            is_grouped: inputs and outputs are [B n, ...], the rows of one sample after the other.
            is_interleaved: they are [n B, ...], a row of each sample after another.
            is_mixed: all samples share the inputs of some calls only, and these hold a row for each
                sample.
            course: where the outputs of a spread layer meet the samples, if that is later (see
                `privacy.shared_rows`); None if they have the samples' dimension at once.
        """
        super().__init__(capture, layer)
        self.course = course
        self.sample_dim, self.is_spread, self.is_grouped = sample_dim, is_spread, is_grouped
        self.is_interleaved, self.is_mixed = is_interleaved, is_mixed

    @property
    def is_by_rows(self) -> bool:
        """True if inputs and outputs are [B, ..., d], a row for each sample."""
        is_other = self.is_spread or self.is_grouped or self.is_interleaved or self.is_mixed
        return self.sample_dim == 0 and self.course is None and not is_other

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """[..., d] -> [..., p]."""
        capture, layer, dim = self.capture, self.layer, self.sample_dim
        x = self.only_input(args, kwargs)
        is_spread = self.is_spread and not (self.is_mixed and self._is_of_samples(x))
        if is_spread:
            assert capture.num_samples is not None
            x = self._spread(x, capture.num_samples)
            args, kwargs = (x,), {}
        y: Tensor = self.run_on_leaves(args, kwargs)
        handle = capture.hold(x)
        if not capture.open_call(layer, self._by_sample(x), dim):
            return self._output(y) if is_spread else y

        def close(dy: Tensor) -> None:
            x = handle()
            if dim:
                x, dy = x.movedim(dim, 0), dy.movedim(dim, 0)
            if self.is_interleaved:
                x, dy = self._in_order(x), self._in_order(dy)
            capture.close_call(layer, x, dy, is_grouped=self.is_grouped)

        if capture.budget is not None and type(y) is Tensor:

            def tapped(dy: Tensor) -> None:
                if capture.ends_calls():
                    close(dy)

            y = capture.tap(layer, x, y, tapped)
        else:
            self.when_reached(layer, x, y, close)
        return self._output(y) if is_spread else y

    def _is_of_samples(self, x: Tensor) -> bool:
        """True if an input has a row for each sample in dimension 0; of a single sample, any has
        that all samples share as well."""
        is_one = self.capture.num_samples == 1
        return not isinstance(x, SharedRows) and not (is_one and len(x) != 1)

    def _spread(self, x: Tensor, num_samples: int) -> Tensor:
        if isinstance(x, SharedRows):
            return x.rows if self.course is not None else squeezed(x.rows)
        if self.course is not None:
            return x.expand(num_samples, *x.shape)
        return spread(x, num_samples)

    def _output(self, y: Tensor) -> Tensor:
        if self.course is None:
            return y
        # The row of a single sample is what all samples share.
        return y[0] if len(y) == 1 else SharedRows(y, self.course)

    def _in_order(self, x: Tensor) -> Tensor:
        """[n B, ...] as [B n, ...]."""
        return x.unflatten(0, (-1, self.capture.num_samples)).transpose(0, 1).flatten(0, 1)

    def _by_sample(self, x: Tensor) -> Tensor:
        """[B n, ...] as [B, n, ...]; unchanged if there are other rows, which is refused."""
        num_samples = self.capture.num_samples
        if not self.is_grouped or not num_samples or len(x) % num_samples:
            return x
        return x.unflatten(0, (num_samples, len(x) // num_samples))


def _without_view(y: Tensor) -> Tensor:
    """`y`, or the tensor that it is a view of, with the same elements.

    A linear layer returns a view of its product, and a norm over channels may return another order
    of dimensions. A change in place replaces the node of the view in the graph, and leaves that of
    the base.
    """
    base = y._base if y._is_view() else None
    if base is None or base.numel() != y.numel() or not base.is_contiguous():
        return y
    return base


def squeezed(rows: Tensor) -> Tensor:
    """[B, 1, ...] as [B, ...], as what all samples share is spread; other rows as they are."""
    return rows[:, 0] if rows.shape[1:2] == (1,) else rows


def spread(x: Tensor, num_samples: int) -> Tensor:
    """A tensor [1, ...] or [...] that all samples share, expanded to [B, ...]."""
    shared = x[0] if x.shape[:1] == (1,) else x
    return shared.expand(num_samples, *shared.shape)


class ParameterSlot:
    """A slot of a module that holds a trainable parameter, and the leaf to put into it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[tuple[dict[str, Any], str]] = []
        """Dict and key of each name that the module has for the parameter."""
        self.parameter: Tensor | None = None
        self.current_leaf: Tensor | None = None
        self.address = 0

    def leaf(self) -> Tensor:
        """Leaf of the parameter that is in the slot now; it shares the parameter's memory."""
        parameter = self.current()
        if parameter is self.current_leaf:
            return parameter
        if parameter is not self.parameter:
            self.parameter, self.current_leaf = parameter, parameter.detach().requires_grad_()
            self.address = parameter.data_ptr()
        assert self.current_leaf is not None
        return self.current_leaf

    def refresh(self) -> None:
        """Drop the leaf if the parameter's memory has moved."""
        if self.parameter is not None and self.parameter.data_ptr() != self.address:
            self.parameter = self.current_leaf = None

    def release(self) -> None:
        """Drop a leaf of a tensor that is no parameter of the model, as of a rounded copy."""
        if self.parameter is not None and not isinstance(self.parameter, nn.Parameter):
            self.parameter = self.current_leaf = None

    def content(self) -> Tensor:
        """The tensor that is in the slot now."""
        own, key = self.entries[0]
        tensor: Tensor = own[key]
        return tensor

    def current(self) -> Tensor:
        """The parameter that is in the slot now, or that another layer has placed a view of."""
        tensor = self.content()
        parameter: Tensor = getattr(tensor, _STANDS_FOR, tensor)
        return parameter

    def enter(self) -> Tensor:
        """Put the leaf into the slot; returns what was there."""
        own, key = self.entries[0]
        before: Tensor = own[key]
        # What is there in the second call of a batch, and in every batch if nothing is rounded.
        self.fill(self.current_leaf if before is self.parameter else self.leaf())
        return before

    def place(self, tensor: Tensor) -> None:
        """Put a tensor into the slot that stands for the parameter."""
        parameter = self.current()
        if tensor is not parameter:
            setattr(tensor, _STANDS_FOR, parameter)
        self.fill(tensor)

    def fill(self, tensor: Tensor | None) -> None:
        """Put a tensor into the slot."""
        for own, key in self.entries:
            own[key] = tensor


@contextmanager
def filled(slots: list[ParameterSlot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which a module has `tensors` in place of its parameters."""
    before = [slot.content() for slot in slots]
    try:
        for slot in slots:
            slot.place(tensors[slot.name])
        yield
    finally:
        for slot, tensor in zip(slots, before, strict=True):
            slot.fill(tensor)


def _slots_of(layer: Layer) -> list[ParameterSlot]:
    slots = {
        id(parameter): ParameterSlot(name)
        for name, parameter in layer.module.named_parameters()
        if name in layer.names
    }
    own = {holder for _, holder in own_holders(layer.module)}
    for module in layer.module.modules():
        for key, parameter in module._parameters.items():
            slot = slots.get(id(parameter))
            if slot and (not layer.is_bare or module in own or slot.name in layer.strays):
                slot.entries.append((module._parameters, key))
    return list(slots.values())


def _before_node(edge: GradientEdge, call: Callable[[Tensor], None]) -> None:
    """Call `call` with the gradient of an output right before the output's node runs.

    By then all hooks on the output itself have run, FSDP2's too, which gathers the parameters of
    the unit that returned it. A checkpoint may need them.
    """
    # The hook must not refer to the node that holds it: nothing would ever free the two.
    output_nr = edge.output_nr

    def before_node(gradients: tuple[Tensor | None, ...]) -> None:
        dy = gradients[output_nr]
        if dy is not None:
            call(dy)

    edge.node.register_prehook(before_node)
