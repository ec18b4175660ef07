"""What the reference records of each sample's gradient, for the comparison to explain errors with.

Legend: N samples, P trainable parameters, K projections, V wrong norms, F wrong losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, norm_and_sketch
from dpsgd_track.modes.protocol import SampleRun
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import PerSampleLoss
from dpsgd_track.record.alternatives import LossFormula, NormFormula
from dpsgd_track.training.norm_formulas import LayerCalls, formulas
from dpsgd_track.training.other_losses import other_losses

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What was recorded of N samples."""

    sketch: Floats
    """[N, P, 2 K] projections of the gradients, and of their ranks' rows."""
    other_norm: Floats
    """[N, P, V] value of each `NormFormula`."""
    other_loss: Floats
    """[N, F] value of each `LossFormula`."""


class SampleObserver:
    """Projections of each sample's gradient, and its norms by wrong formulas."""

    def __init__(self) -> None:
        self._calls: LayerCalls | None = None
        self._num_parameters = 0
        self._sketches: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._losses: list[Tensor] = []

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

    def see_losses(self, loss: PerSampleLoss, batch: Batch, index: int, run: SampleRun) -> None:
        """Record a sample's wrong losses."""
        self._losses.append(other_losses(loss, batch, index, run))

    def take(self) -> Observed:
        """What was recorded since the last call."""
        widths = 2 * NUM_PROJECTIONS, len(NormFormula)
        taken = []
        for values, width in zip((self._sketches, self._norms), widths, strict=True):
            empty = np.empty((0, self._num_parameters, width))
            taken.append(torch.stack(values).double().numpy() if values else empty)
            values.clear()
        none = np.empty((0, len(LossFormula)))
        losses = torch.stack(self._losses).numpy() if self._losses else none
        self._losses.clear()
        return Observed(sketch=taken[0], other_norm=taken[1], other_loss=losses)


def _sketch(name: str, gradient: Tensor) -> Tensor:
    """[2 K] projections of a gradient: of the whole, and of this rank's rows if it were sharded."""
    first, last = row_range(len(gradient), dist.get_rank(), dist.get_world_size())
    start = first * gradient[0].numel()
    whole = norm_and_sketch(name, gradient, 0, gradient.numel())
    own = norm_and_sketch(name, gradient[first:last], start, gradient.numel())
    return torch.cat([whole[1:], own[1:]])
