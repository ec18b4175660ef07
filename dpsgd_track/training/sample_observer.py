"""What the reference records of each sample's gradient, for the comparison to explain errors with.

Legend: N samples, P trainable parameters, K projections, V wrong formulas for norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, norm_and_sketch
from dpsgd_track.record.alternatives import NormFormula
from dpsgd_track.training.norm_formulas import LayerCalls, formulas

Floats = NDArray[np.float64]


class SampleObserver:
    """Projections of each sample's gradient, and its norms by wrong formulas."""

    def __init__(self) -> None:
        self._calls: LayerCalls | None = None
        self._num_parameters = 0
        self._sketches: list[Tensor] = []
        self._norms: list[Tensor] = []

    def watch(self, model: nn.Module) -> None:
        """Note the calls of the layers of `model`."""
        self._calls = LayerCalls(model)
        self._num_parameters = sum(p.requires_grad for _, p in model.named_parameters())

    def outputs(self) -> list[Tensor]:
        """What came out of the layers in the sample's forward."""
        return self._calls.outputs if self._calls else []

    def see(self, gradients: Mapping[str, Tensor], output_gradients: Sequence[Tensor]) -> None:
        """Record one sample's gradient.

        Args:
            gradients: by parameter.
            output_gradients: of `outputs`.
        """
        assert self._calls is not None, "the model is watched before its first sample"
        # Thousands of operations on small tensors, each of which a GPU would wait for.
        gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
        shares = self._calls.shares(output_gradients)
        self._calls.clear()
        self._sketches.append(torch.stack([_sketch(n, g) for n, g in gradients.items()]))
        self._norms.append(
            torch.stack([formulas(g, shares.get(n, ())) for n, g in gradients.items()])
        )

    def take(self) -> tuple[Floats, Floats]:
        """[N, P, 2 K] projections and [N, P, V] norms of the samples since the last call."""
        widths = 2 * NUM_PROJECTIONS, len(NormFormula)
        taken = []
        for values, width in zip((self._sketches, self._norms), widths, strict=True):
            empty = np.empty((0, self._num_parameters, width))
            taken.append(torch.stack(values).double().numpy() if values else empty)
            values.clear()
        return taken[0], taken[1]


def _sketch(name: str, gradient: Tensor) -> Tensor:
    """[2 K] projections of a gradient: of the whole, and of this rank's rows if it were sharded."""
    first, last = row_range(len(gradient), dist.get_rank(), dist.get_world_size())
    start = first * gradient[0].numel()
    whole = norm_and_sketch(name, gradient, 0, gradient.numel())
    own = norm_and_sketch(name, gradient[first:last], start, gradient.numel())
    return torch.cat([whole[1:], own[1:]])
