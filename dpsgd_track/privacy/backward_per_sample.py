"""Layers in whose inputs no dimension separates the samples: one backward per sample.

Such a layer's input is shared by all samples (a table of relative positions, embeddings of labels),
or has rows in an order of its own. Its per-sample gradients are computed by their definition, from
one sample's loss after the other, at the cost of B backwards instead of one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, WatchedLayer, filled
from dpsgd_track.privacy.layers.inventory import Layer

_logger = logging.getLogger(__name__)


class BackwardPerSample(CapturedLayer):
    """Runs the layer as it is, and has its gradients computed one sample at a time."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(capture, layer)
        kind = type(layer.module).__name__
        what = f"{layer.fqn} ({kind}) is called on a tensor without a dimension for the samples"
        if layer.is_bare:
            bare = ", ".join(sorted(layer.names.values()))
            what = f"{bare} (of {kind}) is used in a way that takes no copy for each sample"
        _logger.warning(
            "%s: its gradients take one backward for each sample, which is exact, but slow.", what
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, with its leaves noted for one backward per sample."""
        output = self.run_on_leaves(args, kwargs)
        self.capture.open_call_by_sample(self.layer, self.leaves())
        return output


class PartlyBackwardPerSample(WatchedLayer):
    """Captures calls on the samples' rows by the rule, and those on a tensor that all samples share
    by one backward per sample.

    As DoRA's adapters, which multiply an identity matrix once for the norm of their product. If no
    loss depends on such a call, it costs no backward.
    """

    def __init__(self, capture: Capture, layer: Layer, num_dims: frozenset[int]) -> None:
        """
        Args:
            num_dims: numbers of dimensions of inputs that all samples share.
        """
        super().__init__(capture, layer)
        self.num_dims = num_dims
        self._shared_leaves: dict[str, Tensor] = {}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """[..., d] -> [..., p]."""
        if self.only_input(args, kwargs).dim() not in self.num_dims:
            return super().run(args, kwargs)
        # Apart from those of the other calls, whose gradients arrive by the rule.
        self._shared_leaves = {
            name: self._other_leaf(name, leaf) for name, leaf in self.leaves().items()
        }
        with filled(self.slots, self._shared_leaves):
            output = self.original(*args, **kwargs)
        self.capture.open_call_by_sample(self.layer, self._shared_leaves)
        return output

    def own_leaves(self) -> Iterator[Tensor]:
        """All leaves that exist so far."""
        yield from super().own_leaves()
        yield from self._shared_leaves.values()

    def _other_leaf(self, name: str, leaf: Tensor) -> Tensor:
        known = self._shared_leaves.get(name)
        if known is not None and known.data_ptr() == leaf.data_ptr():
            return known
        return leaf.detach().requires_grad_()
