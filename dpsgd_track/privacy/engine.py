"""What a pass strategy works with: a sharded model, its capture, and where gradients go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dpsgd_track.distributed.sharding import GradientSharder
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.loss import per_sample_loss


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: dict[str, Tensor]
    """The model's keyword arguments; dimension 0 of every tensor is the sample."""
    target_B: Tensor
    """Class of each sample."""

    def __len__(self) -> int:
        return len(self.target_B)

    def sample(self, index: int) -> Batch:
        """Sample `index` alone, as a batch of one."""
        pick = slice(index, index + 1)
        return Batch({name: t[pick] for name, t in self.inputs.items()}, self.target_B[pick])


@dataclass
class Engine:
    """A model made ready for one mode."""

    model: nn.Module
    sharder: GradientSharder
    max_grad_norm: float
    capture: Capture | None = None

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, [B], with its graph."""
        return per_sample_loss(self.model(**batch.inputs).logits, batch.target_B)
