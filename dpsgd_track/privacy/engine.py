"""What a pass strategy works with: a sharded model, its capture, and where gradients go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dpsgd_track.distributed.sharding import GradientSharder
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.loss import PerSampleLoss, logits_of


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: dict[str, Tensor]
    """The model's keyword arguments; dimension 0 of every tensor is the sample."""
    targets: Tensor
    """What the loss compares with; dimension 0 is the sample. See `dpsgd_track.privacy.loss`."""

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, index: int) -> Batch:
        """Sample `index` alone, as a batch of one."""
        pick = slice(index, index + 1)
        return Batch({name: t[pick] for name, t in self.inputs.items()}, self.targets[pick])


@dataclass
class Engine:
    """A model made ready for one mode."""

    model: nn.Module
    sharder: GradientSharder
    max_grad_norm: float
    loss: PerSampleLoss
    capture: Capture | None = None

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, [B], with its graph."""
        return self.loss(logits_of(self.model(**batch.inputs)), batch.targets)
