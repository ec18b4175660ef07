"""The protocol every mode meets: Opacus's, a user's own and ours alike.

One step is: `accumulate` each micro-batch, `clipped_sum` once, `privatize` once, `step` once.
The worker looks at what each call returns; nothing it does between the calls changes the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dpsgd_track.config import AUTO, PrivacyConfig
from dpsgd_track.distributed.sharding import (
    Layout,
    LocalPart,
    as_sharded,
    layout_of,
    trainable_parameters,
)
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.loss import PerSampleLoss, classification_loss, one_loss_a_sample
from dpsgd_track.privacy.noise import NoiseSource, add_noise


@dataclass(frozen=True, kw_only=True)
class ModeContext:
    """What a mode is built with, beside the model."""

    privacy: PrivacyConfig
    device: torch.device
    param_dtype: torch.dtype
    """Type the forward and backward compute in."""
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    """Builds the optimizer over the mode's own (sharded) parameters."""
    reference_dtype: torch.dtype = torch.float64
    """Type the `reference` mode computes in."""
    loss: PerSampleLoss = classification_loss
    """(logits, targets) -> loss of each sample. Anything but one number a sample raises."""
    num_replicas: int = 1
    """Groups of ranks that each hold the whole model; ranks are sharded within a group (HSDP)."""
    norm_plan: str = AUTO
    """Way in which flash and fused modes take the norms of linear layers (see `NormPlanner`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", one_loss_a_sample(self.loss))


ModeFactory = Callable[[nn.Module, ModeContext], "Mode"]
"""Takes the whole, unsharded float32 model; the process group is initialised."""


class Mode(ABC):
    """One way to compute a DP-SGD step.

    A subclass sets `model` and `optimizer`, and implements `accumulate` so that after it each
    trainable parameter's `.grad` has grown by this micro-batch's share of the clipped sum over
    all ranks (a sum over samples, never a mean). The rest works from there.
    """

    model: nn.Module
    """The model as the mode runs it; its parameters are this rank's shards."""
    optimizer: torch.optim.Optimizer
    replicated = False
    """Every rank holds every parameter whole, rather than a shard."""
    clips = True
    """Whether gradients are clipped at all."""
    takes_empty_batches = True
    """Whether `accumulate` takes a batch of no samples, as Poisson sampling may give it."""
    is_atomic = False
    """Whether a batch that fails in `accumulate` leaves nothing of itself in the sum."""

    def __init__(self, context: ModeContext) -> None:
        self.context = context
        self.max_grad_norm = context.privacy.max_grad_norm
        self._largest_bound = 0.0

    @abstractmethod
    def accumulate(self, batch: Batch) -> SampleRecord:
        """Add one micro-batch's clipped gradients; every rank calls it equally often.

        The batch may be empty. A mode that runs a part of it says which sample with
        `dpsgd_track.privacy.dropout.only`, so that dropout finds the sample's own masks.
        """

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Clip at another C from the next micro-batch on."""
        self.max_grad_norm = max_grad_norm

    @property
    def sensitivity(self) -> float:
        """The largest C that a micro-batch of this step was clipped at; C where there is none."""
        return self._largest_bound or self.max_grad_norm

    def note_bound(self) -> None:
        """A micro-batch that was clipped at the C in force is in the sum now."""
        self._largest_bound = max(self._largest_bound, self.max_grad_norm)

    def clipped_sum(self) -> ClippedSum:
        """The clipped sum of the micro-batches since the last step, as this rank's shards."""
        return ClippedSum(
            {part.name: part.local for part in self.gradient_parts()}, self.sensitivity
        )

    def privatize(self, clipped: ClippedSum, source: NoiseSource) -> dict[str, Tensor]:
        """Turn the clipped sum into the update direction, and write it into every `.grad`.

        Whatever a mode's `clipped_sum` returns, copies or its own tensors, is what the weights
        are updated with, noise included.

        Returns:
            This rank's shards of (clipped sum + noise) / expected batch size, by name.
        Raises:
            RuntimeError: the clipped sum lacks a trainable parameter, or has others.
        """
        privacy = self.context.privacy
        add_noise(clipped, self.weight_parts(), privacy.noise_multiplier, source)
        gradients = list(clipped.gradients.values())
        if gradients:
            torch._foreach_div_(gradients, privacy.expected_batch_size)
        if self.clips:
            self._write_gradients(clipped.gradients)
        return clipped.gradients

    def _write_gradients(self, gradients: dict[str, Tensor]) -> None:
        unlike = gradients.keys() ^ {layout.name for layout, _ in self._layouts}
        if unlike:
            raise RuntimeError(
                f"clipped_sum() of {type(self).__name__}: expected a sum for each trainable "
                f"parameter and nothing else; what differs: {', '.join(sorted(unlike))}."
            )
        for layout, parameter in self._layouts:
            local = gradients[layout.name].to(parameter.dtype)
            parameter.grad = as_sharded(local, parameter)

    def step(self) -> None:
        """Update the weights from `.grad`."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the step's gradients."""
        self._largest_bound = 0.0
        self.optimizer.zero_grad(set_to_none=True)

    def norm_plan(self) -> dict[str, str]:
        """How the mode goes about each layer, once it has taken a step; by the layer's name.

        It is recorded and shown, and nothing depends on it.
        """
        return {}

    def gradient_parts(self) -> list[LocalPart]:
        """This rank's part of every trainable parameter's gradient; absent ones become zeros."""
        parts = []
        for layout, parameter in self._layouts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parts.append(layout.part(parameter.grad))
        return parts

    def weight_parts(self) -> list[LocalPart]:
        """This rank's part of every trainable parameter."""
        return [layout.part(parameter) for layout, parameter in self._layouts]

    @cached_property
    def _layouts(self) -> list[tuple[Layout, nn.Parameter]]:
        # Walking through the modules takes milliseconds; which parameters there are stays the same.
        trainable = trainable_parameters(self.model)
        return [(layout_of(name, parameter), parameter) for name, parameter in trainable.items()]
