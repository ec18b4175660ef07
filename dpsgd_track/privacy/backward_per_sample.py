"""Layers whose samples cannot be told apart by a dimension: one backward for each sample.

Such a layer reads what all samples share (a table of relative positions, embeddings of labels), or
rows in an order of its own. Its parameters' gradients are those of one sample's loss after
the other, which is the definition. The price is B backwards instead of one.
"""

from __future__ import annotations

import logging
from typing import Any

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.layers.inventory import Layer

_logger = logging.getLogger(__name__)


class BackwardPerSample(CapturedLayer):
    """Runs the layer as it is, and has its gradients found one sample at a time."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        """
        Raises:
            ValueError: the model is sharded, and a backward of one sample would be all ranks'.
        """
        super().__init__(capture, layer)
        what = (
            f"{layer.fqn} ({type(layer.module).__name__}) is called on a tensor without a "
            "dimension for the samples"
        )
        if capture.is_sharded:
            raise ValueError(
                f"{what}: expected one under FSDP2. Give it inputs of [B, ...], such as position "
                "ids of each sample, freeze it, or use a mode on one device."
            )
        _logger.warning(
            "%s: its gradients take one backward for each sample, which is exact, but slow.", what
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns."""
        output = self.run_on_leaves(args, kwargs)
        self.capture.open_call_by_sample(self.layer, self.leaves())
        return output
