"""How the calls of a layer are captured: the layer runs on leaves of the capture's own.

A leaf shares its parameter's memory and stands where the module looks the parameter up, within the
module's own calls alone. So whatever reaches a parameter itself is a use that no call accounts for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpsgd_track.privacy.capture import Capture, is_saved_by_others
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.replaced_forward import ReplacedForward


class CapturedLayer(ReplacedForward):
    """One way to capture the calls of one layer; its module's forward while a batch is captured."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(layer.module)
        self.capture, self.layer = capture, layer
        self.places = _places_of(layer)
        """Where the module looks its trainable parameters up."""

    @abstractmethod
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module on a call's arguments, and capture the call."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Capture the call where gradients are asked for; else run the module as it is."""
        if not self.capture.is_capturing:
            return self.plain(*args, **kwargs)
        return self.run(args, kwargs)

    def attach(self) -> None:
        """Replace the module's forward.

        Raises:
            ValueError: somebody else has replaced the forward of a layer that a rule was found for.
        """
        if "forward" in self._own and self.layer.rule is not None:
            raise ValueError(
                f"{self.layer.fqn}: expected the forward of {type(self.module).__name__}, got one "
                "that was replaced after the mode was made. Make the model private after that."
            )
        super().attach()

    def leaf(self, local_name: str) -> Tensor:
        """What stands for a trainable parameter inside a call."""
        return self.leaves()[local_name]

    def leaves(self) -> dict[str, Tensor]:
        """What stands for each trainable parameter inside a call, by its name in the module."""
        return {place.name: place.leaf() for place in self.places}

    def own_leaves(self) -> Iterator[Tensor]:
        """Every leaf that was made so far."""
        return (place.made for place in self.places if place.made is not None)

    def seen_parameters(self) -> dict[str, Tensor]:
        """Trainable parameters that calls so far have found, by fully qualified name."""
        return {
            self.layer.names[place.name]: place.parameter
            for place in self.places
            if place.parameter is not None
        }

    def run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward on leaves of the capture's in place of its parameters."""
        places = self.places
        for place in places:
            place.enter()
        try:
            return self.plain(*args, **kwargs)
        finally:
            for place in places:
                place.leave()

    def only_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The one tensor that a layer with a rule is called with.

        Raises:
            ValueError: it is called with more.
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
    """A layer with a rule: captured from what it reads and the gradient of what it returns."""

    def __init__(
        self, capture: Capture, layer: Layer, *, sample_dim: int = 0, is_spread: bool = False
    ) -> None:
        """
        Args:
            sample_dim: the samples' dimension in inputs and outputs.
            is_spread: the inputs are the same for all samples; each is given a copy of its own,
                so that the gradients that return are apart.
        """
        super().__init__(capture, layer)
        self.sample_dim, self.is_spread = sample_dim, is_spread

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """[..., d] -> [..., p]."""
        capture, layer, dim = self.capture, self.layer, self.sample_dim
        x = self.only_input(args, kwargs)
        if self.is_spread:
            assert capture.num_samples is not None
            x = spread(x, capture.num_samples)
            args, kwargs = (x,), {}
        y: Tensor = self.run_plain(args, kwargs)
        held = capture.hold(x)
        if not capture.open_call(layer, x, dim):
            return y
        seen = _of_no_view(y)
        edge, shape = get_gradient_edge(seen), None if seen is y else y.shape

        def close(dy: Tensor) -> None:
            if not capture.ends_calls():
                return
            x = held()
            if shape is not None:
                dy = dy.view(shape)
            if dim:
                x, dy = x.movedim(dim, 0), dy.movedim(dim, 0)
            capture.close_call(layer, x, dy)

        if x.requires_grad:
            capture.note_output(layer, edge, None)
            _before_node(edge, close)
        elif is_saved_by_others():
            capture.note_output(layer, edge, edge)
            seen.register_hook(close)
        else:
            capture.note_output(layer, edge, edge, close)
        return y


def _of_no_view(y: Tensor) -> Tensor:
    """`y`, or what it is a view of: the same elements in the same order.

    A change in place takes the node of a view out of the graph, but not that of its base: a linear
    layer's product, of which it returns the positions apart.
    """
    base = y._base if y._is_view() else None
    if base is None:
        return y
    assert base.numel() == y.numel()
    assert base.is_contiguous()
    assert y.is_contiguous()
    return base


def spread(x: Tensor, num_samples: int) -> Tensor:
    """[1, ...] or [...] that all samples share as [B, ...], a view."""
    shared = x[0] if x.shape[:1] == (1,) else x
    return shared.expand(num_samples, *shared.shape)


class ParameterPlace:
    """Where a module looks a trainable parameter up, and the leaf that is put there."""

    def __init__(self, name: str, own: dict[str, Any], key: str) -> None:
        self.name, self.own, self.key = name, own, key
        self.others: list[tuple[dict[str, Any], str]] = []
        """The module's other names for the same parameter."""
        self.parameter: Tensor | None = None
        self.made: Tensor | None = None
        self.address = 0

    def leaf(self) -> Tensor:
        """The leaf of the parameter that is there now."""
        parameter: Tensor = self.own[self.key]
        if parameter is self.made:
            return parameter
        if parameter is not self.parameter:
            # It shares the parameter's memory.
            self.parameter, self.made = parameter, parameter.detach().requires_grad_()
            self.address = parameter.data_ptr()
        assert self.made is not None
        return self.made

    def refresh(self) -> None:
        """Forget the leaf if the parameter's memory is another."""
        if self.parameter is not None and self.parameter.data_ptr() != self.address:
            self.parameter = self.made = None

    def release(self) -> None:
        """Let go of what is no parameter of the model itself."""
        if self.parameter is not None and not isinstance(self.parameter, nn.Parameter):
            self.parameter = self.made = None

    def enter(self) -> None:
        """Put the leaf where the module looks the parameter up."""
        own, key = self.own, self.key
        own[key] = self.made if own[key] is self.parameter else self.leaf()
        for own, key in self.others:
            own[key] = self.made

    def leave(self) -> None:
        """Put the parameter back."""
        self.own[self.key] = self.parameter
        for own, key in self.others:
            own[key] = self.parameter


def _places_of(layer: Layer) -> list[ParameterPlace]:
    places: dict[int, ParameterPlace] = {}
    trained = {id(p): n for n, p in layer.module.named_parameters() if n in layer.names}
    for module in layer.module.modules():
        for key, parameter in module._parameters.items():
            name = trained.get(id(parameter))
            if name is None:
                continue
            if id(parameter) in places:
                places[id(parameter)].others.append((module._parameters, key))
            else:
                places[id(parameter)] = ParameterPlace(name, module._parameters, key)
    return list(places.values())


def _before_node(edge: GradientEdge, call: Callable[[Tensor], None]) -> None:
    """Call with the gradient of an output when it has arrived, right before its node runs.

    By then every hook on the output itself has run, FSDP2's too, which gathers the parameters of
    a unit whose output it is. A checkpoint may need them.
    """
    # The hook must not hold the node that holds it: nothing would ever free the two.
    output_nr = edge.output_nr

    def before_node(gradients: tuple[Tensor | None, ...]) -> None:
        dy = gradients[output_nr]
        if dy is not None:
            call(dy)

    edge.node.register_prehook(before_node)
