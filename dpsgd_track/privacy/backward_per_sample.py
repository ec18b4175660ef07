"""Layers in whose inputs no dimension separates the samples: one backward per sample.

Such a layer's input is shared by all samples (a table of relative positions, embeddings of labels),
or has rows in an order of its own. Its per-sample gradients are computed by their definition, from
one sample's loss after the other, at the cost of B backwards instead of one.
"""

from __future__ import annotations

import logging
from typing import Any

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.layers.inventory import Layer

_logger = logging.getLogger(__name__)


class BackwardPerSample(CapturedLayer):
    """Runs the layer as it is, and has its gradients computed one sample at a time."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        """
        Raises:
            ValueError: the model is sharded: all ranks would have to take part in each backward.
        """
        super().__init__(capture, layer)
        kind = type(layer.module).__name__
        what = f"{layer.fqn} ({kind}) is called on a tensor without a dimension for the samples"
        if layer.is_bare:
            bare = ", ".join(sorted(layer.names.values()))
            what = f"{bare} (of {kind}) is used in a way that takes no copy for each sample"
        if capture.is_sharded:
            raise ValueError(
                f"{what}: expected one under FSDP2. Give it inputs of [B, ...], such as position "
                "ids of each sample, freeze it, or use a mode on one device."
            )
        _logger.warning(
            "%s: its gradients take one backward for each sample, which is exact, but slow.", what
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, with its leaves noted for one backward per sample."""
        output = self.run_on_leaves(args, kwargs)
        self.capture.open_call_by_sample(self.layer, self.leaves())
        return output
