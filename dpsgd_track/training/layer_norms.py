"""Loss and norms of a step for logging in a training loop, cheaply and without waiting.

Norms of this rank's shards are taken in float32 and reduced with the loss in one all-reduce. The
result is copied to the host and read when the next step is observed; it has arrived by then.

Legend: P trainable parameters, L linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.kernels.device import HostCopy
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.record.names import LAYER_GRAD_NORM, LAYER_WEIGHT_NORM


@dataclass(frozen=True, kw_only=True)
class StepNorms:
    """Loss and norms of one step, over all ranks."""

    loss: float
    """Mean over the samples; 0 if there are none."""
    grad_norm: float
    """L2 norm of clipped sum / expected batch size."""
    layer_weight_norm: dict[str, float]
    layer_grad_norm: dict[str, float]
    """Norm of the weight's clipped sum / expected batch size, by linear layer."""

    def metrics(self) -> dict[str, float]:
        """The values by metric name."""
        metrics = {"loss": self.loss, "grad_norm": self.grad_norm}
        for prefix, norms in (
            (LAYER_WEIGHT_NORM, self.layer_weight_norm),
            (LAYER_GRAD_NORM, self.layer_grad_norm),
        ):
            metrics |= {f"{prefix}{name}": norm for name, norm in norms.items()}
        return metrics


class LayerNorms:
    """Measures steps; the norms of a step are returned when the next is observed."""

    def __init__(
        self,
        layer_names: Sequence[str],
        parameter_names: Sequence[str],
        expected_batch_size: int,
        add_up: Callable[[Tensor], object] = dist.all_reduce,
    ) -> None:
        """
        Args:
            layer_names: linear layers, each with a weight of its own.
            parameter_names: all trainable parameters.
            expected_batch_size: divisor of the clipped sum.
            add_up: sums a tensor over all ranks, in place.
        """
        self._layers, self._parameters = tuple(layer_names), tuple(parameter_names)
        self._divisor, self._add_up = expected_batch_size, add_up
        self._pending: tuple[int, HostCopy] | None = None

    def observe(
        self,
        step: int,
        gradients: Sequence[LocalPart],
        weights: Sequence[LocalPart],
        records: Sequence[SampleRecord],
    ) -> tuple[int, StepNorms] | None:
        """Start measuring a step; returns the norms of the step observed before.

        Args:
            gradients: this rank's shards of the clipped sum, of all trainable parameters.
            weights: this rank's shards of the parameters.
            records: this rank's samples.
        """
        packed = self._packed(gradients, weights, records)
        self._add_up(packed)
        before = self.read()
        self._pending = step, HostCopy(packed)
        return before

    def read(self) -> tuple[int, StepNorms] | None:
        """The last step observed and its norms; None if they were returned already."""
        if self._pending is None:
            return None
        (step, packed), self._pending = self._pending, None
        return step, self._unpacked(packed.wait().tolist())

    def _packed(
        self,
        gradients: Sequence[LocalPart],
        weights: Sequence[LocalPart],
        records: Sequence[SampleRecord],
    ) -> Tensor:
        """[P + L + 2] squared norms of this rank's shards, sum of its losses, number of samples."""
        weight_of = {part.name: part for part in weights}
        gradient_of = {part.name: part for part in gradients}
        parts = [gradient_of[name] for name in self._parameters]
        parts += [weight_of[f"{name}.weight"] for name in self._layers]
        norms = torch._foreach_norm([_counted(part) for part in parts])
        norm_sq = torch.stack([norm.float() for norm in norms]).square_()
        losses = torch.cat([record.loss_B.detach().float() for record in records])
        loss = torch.stack([losses.sum(), losses.new_full((), len(losses))])
        return torch.cat([norm_sq, loss.to(norm_sq.device)])

    def _unpacked(self, values: list[float]) -> StepNorms:
        *squares, loss, count = values
        gradients = dict(zip(self._parameters, squares, strict=False))
        weights = dict(zip(self._layers, squares[len(self._parameters) :], strict=True))
        return StepNorms(
            loss=loss / count if count else 0.0,
            grad_norm=sum(gradients.values()) ** 0.5 / self._divisor,
            layer_weight_norm={name: square**0.5 for name, square in weights.items()},
            layer_grad_norm={
                name: gradients[f"{name}.weight"] ** 0.5 / self._divisor for name in self._layers
            },
        )


def _counted(part: LocalPart) -> Tensor:
    # Copies in other replicas and empty shards contribute 0.
    if part.is_counted and part.local.numel():
        return part.local
    return part.local.new_zeros(1)


def reference(
    layer_names: Sequence[str],
    expected_batch_size: int,
    gradients: dict[str, Tensor],
    weights: dict[str, Tensor],
    losses: Tensor,
) -> StepNorms:
    """The same norms from unsharded tensors, in float64 and one at a time."""

    def norm(tensor: Tensor) -> float:
        return float(tensor.double().square().sum().sqrt())

    return StepNorms(
        loss=float(losses.double().mean()) if len(losses) else 0.0,
        grad_norm=sum(norm(g) ** 2 for g in gradients.values()) ** 0.5 / expected_batch_size,
        layer_weight_norm={name: norm(weights[f"{name}.weight"]) for name in layer_names},
        layer_grad_norm={
            name: norm(gradients[f"{name}.weight"]) / expected_batch_size for name in layer_names
        },
    )
