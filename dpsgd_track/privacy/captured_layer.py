"""How the calls of a layer are captured: the layer runs on leaves of the capture's own.

A leaf shares its parameter's memory and stands where the module looks the parameter up, within the
module's own calls alone. So whatever reaches a parameter itself is a use that no call accounts for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
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
        self._places = _places_of(layer)

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
        if self.layer.rule is not None and "forward" in self._own:
            raise ValueError(
                f"{self.layer.fqn}: expected the forward of {type(self.module).__name__}, got one "
                "that was replaced after the mode was made. Make the model private after that."
            )
        super().attach()
        if not self.capture.is_sharded:
            for place in self._places.values():
                place.refresh()

    def detach(self) -> None:
        """Give the module its own forward back."""
        super().detach()
        for place in self._places.values():
            place.release()

    def leaf(self, local_name: str) -> Tensor:
        """What stands for a trainable parameter inside a call."""
        return self._places[local_name].leaf()

    def leaves(self) -> dict[str, Tensor]:
        """What stands for each trainable parameter inside a call, by its name in the module."""
        return {name: place.leaf() for name, place in self._places.items()}

    def seen_parameters(self) -> dict[str, Tensor]:
        """Trainable parameters that calls so far have found, by fully qualified name."""
        return {
            self.layer.names[local]: place.parameter
            for local, place in self._places.items()
            if place.parameter is not None
        }

    def own_leaves(self) -> Iterator[Tensor]:
        """Every leaf that was made so far."""
        return (place.made for place in self._places.values() if place.made is not None)

    def run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward on leaves of the capture's in place of its parameters."""
        places = self._places.values()
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
        if y._is_view():
            # A change in place of a view would take the output's node out of the graph.
            y = torch.ops.aten._unsafe_view(y, y.shape)
        held = capture.hold(x)
        if not capture.open_call(layer, x, dim):
            return y
        edge = get_gradient_edge(y)

        def close(dy: Tensor) -> None:
            if not capture.is_telling_samples_apart:
                capture.close_call(layer, held().movedim(dim, 0), dy.movedim(dim, 0))

        if x.requires_grad:
            capture.note_output(layer, edge, None)
            _before_node(edge, close)
        elif is_saved_by_others():
            capture.note_output(layer, edge, edge)
            y.register_hook(close)
        else:
            capture.note_output(layer, edge, edge, close)
        return y


def spread(x: Tensor, num_samples: int) -> Tensor:
    """[1, ...] or [...] that all samples share as [B, ...], a view."""
    shared = x[0] if x.shape[:1] == (1,) else x
    return shared.expand(num_samples, *shared.shape)


class _Place:
    """Where a module looks a trainable parameter up, and the leaf that is put there."""

    def __init__(self, owns: list[tuple[dict[str, Any], str]]) -> None:
        self.owns = owns
        """Every name that the module has for it: the dictionary of parameters and the key."""
        self.parameter: Tensor | None = None
        self.made: Tensor | None = None

    def leaf(self) -> Tensor:
        """The leaf of the parameter that is there now."""
        own, key = self.owns[0]
        parameter: Tensor = own[key]
        if parameter is self.made:
            return parameter
        if parameter is not self.parameter:
            self.make(parameter)
        assert self.made is not None
        return self.made

    def make(self, parameter: Tensor) -> None:
        """A leaf that shares the parameter's memory."""
        self.parameter, self.made = parameter, parameter.detach().requires_grad_()

    def refresh(self) -> None:
        """Forget a leaf whose parameter has moved to other memory, as `module.to` moves it."""
        if (
            self.made is not None
            and self.parameter is not None
            and self.made.data_ptr() != self.parameter.data_ptr()
        ):
            self.parameter = self.made = None

    def release(self) -> None:
        """Let go of a copy of a parameter, which is made for each batch."""
        if self.parameter is not None and not isinstance(self.parameter, nn.Parameter):
            self.parameter = self.made = None

    def enter(self) -> None:
        """Put the leaf where the module looks the parameter up."""
        leaf = self.leaf()
        for own, key in self.owns:
            own[key] = leaf

    def leave(self) -> None:
        """Put the parameter back."""
        for own, key in self.owns:
            own[key] = self.parameter


def _places_of(layer: Layer) -> dict[str, _Place]:
    places: dict[int, _Place] = {}
    by_name: dict[str, _Place] = {}
    trained = {id(p): n for n, p in layer.module.named_parameters() if n in layer.names}
    for module in layer.module.modules():
        for key, parameter in module._parameters.items():
            name = trained.get(id(parameter))
            if name is None:
                continue
            place = places.setdefault(id(parameter), _Place([]))
            place.owns.append((module._parameters, key))
            by_name[name] = place
    return by_name


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
