"""The protocol of all modes: Opacus's, users' and this package's own.

One step is: `accumulate` each micro-batch, `clipped_sum` once, `privatize` once, `step` once.
The worker records what each call returns, and changes nothing of the step in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from dpsgd_track.config import AUTO, PrivacyConfig, require_one_of
from dpsgd_track.demands import ATTRIBUTES
from dpsgd_track.distributed.sharding import (
    Layout,
    LocalPart,
    as_sharded,
    layout_of,
    placed_as,
    trainable_parameters,
)
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.loss import PerSampleLoss, classification_loss, one_loss_a_sample
from dpsgd_track.privacy.noise import NoiseSource, add_noise

SampleRun = Callable[[Batch], Tensor]
"""Logits of a batch of one sample, [1, ...]."""


class ProtocolError(RuntimeError):
    """A mode returned something else than the protocol says; the message names the method."""


class GradientObserver(Protocol):
    """Sees the gradient of every sample that `reference` computes."""

    def watch(self, model: nn.Module) -> None:
        """Called once, before the first sample."""

    def outputs(self) -> list[Tensor]:
        """Outputs of layers in the sample's forward whose gradients are wanted as well."""

    def see_losses(self, loss: PerSampleLoss, batch: Batch, index: int, run: SampleRun) -> None:
        """Called with each sample of a micro-batch, in order, before `see`.

        Args:
            run: computes the logits of a batch of one sample.
        """

    def see(self, gradients: Mapping[str, Tensor], output_gradients: Sequence[Tensor]) -> None:
        """Called with the sample's gradient by parameter, and those of `outputs`."""

    def weigh(self, factors: Sequence[Tensor]) -> None:
        """Called with the sample's factors by parameter; 0 or less of one that is left out."""

    def end_batch(self) -> None:
        """Called after the last sample of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class ModeContext:
    """Settings with which a mode is built over a model."""

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
    memory_budget: int | None = None
    """Bytes that this package's modes of one backward may keep; a second one does what does not
    fit. None keeps everything, 0 nothing. Other modes keep nothing."""
    capture: bool = False
    """True if this package's modes on one GPU replay batches as CUDA graphs."""
    observer: GradientObserver | None = None
    """Sees every sample's gradient in `reference`; other modes have none to show."""
    regime: str = ""
    """Name of the regime, such as clip or probe-noise; empty outside of a launch. A library that
    draws its own noise shall do so where `config.kind_of` says noise or train."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", one_loss_a_sample(self.loss))


ModeFactory = Callable[[nn.Module, ModeContext], "Mode"]
"""Takes the unsharded float32 model; the process group is initialised."""


class Mode(ABC):
    """One way to compute a DP-SGD step.

    A subclass sets `model` and `optimizer`, and implements `accumulate` such that it adds the
    micro-batch's clipped sum over all ranks (a sum over samples, never a mean) to each trainable
    parameter's `.grad`. The defaults of the other methods build on that.
    """

    model: nn.Module
    """The model as the mode runs it, with this rank's shards as parameters."""
    optimizer: torch.optim.Optimizer
    replicated = False
    """True if every rank holds all parameters unsharded."""
    clips = True
    """True if gradients are clipped."""
    takes_tied_weights = True
    """True if two layers may hold one parameter. As all attributes that begin with `takes_`, it is
    read before anything runs: what makes a demand that is declined is left out, and told of."""
    takes_reused_layers = True
    """True if a sample may pass a layer twice."""
    takes_unused_layers = True
    """True if a sample may pass by a layer."""
    takes_other_models = True
    """False if the mode is written for one class of models, which the user has to choose."""
    takes_empty_batches = True
    """True if `accumulate` takes a batch without samples, as Poisson sampling may give."""
    takes_given_noise = True
    """False if the mode draws noise of its own whatever it is given."""
    takes_several_ranks = True
    """False if the mode runs on one rank, which then has the micro-batches of all."""
    is_atomic = False
    """True if a batch that fails in `accumulate` adds nothing to the sum."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in vars(cls):
            if name.startswith("takes_"):
                require_one_of(f"attribute of {cls.__name__}", name, sorted(ATTRIBUTES))

    def __init__(self, context: ModeContext) -> None:
        self.context = context
        self.max_grad_norm = context.privacy.max_grad_norm
        self._largest_bound = 0.0

    @abstractmethod
    def accumulate(self, batch: Batch) -> SampleRecord:
        """Add one micro-batch's clipped gradients; every rank calls it equally often.

        The batch may be empty. A mode that runs a single sample of it does so within
        `dpsgd_track.privacy.dropout.only`, so that dropout uses that sample's masks.
        """

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Clip at another C from the next micro-batch on."""
        self.max_grad_norm = max_grad_norm

    def set_privacy(self, privacy: PrivacyConfig) -> None:
        """Clip and add noise by other settings from the next step on."""
        self.set_max_grad_norm(privacy.max_grad_norm)
        self.context = replace(self.context, privacy=privacy)

    @property
    def sensitivity(self) -> float:
        """The largest C that a micro-batch of this step was clipped at; before the first, C."""
        return self._largest_bound or self.max_grad_norm

    def note_bound(self) -> None:
        """Note that a micro-batch clipped at the current C was added to the sum."""
        self._largest_bound = max(self._largest_bound, self.max_grad_norm)

    def clipped_sum(self) -> ClippedSum:
        """The clipped sum of the micro-batches since the last step, as this rank's shards."""
        return ClippedSum(
            {part.name: part.local for part in self.gradient_parts()}, self.sensitivity
        )

    def privatize(self, clipped: ClippedSum, source: NoiseSource) -> dict[str, Tensor]:
        """Turn the clipped sum into the update direction, and write it into every `.grad`.

        The weights are updated with the tensors that `clipped_sum` returned, noise included, even
        if those are copies.

        Returns:
            This rank's shards of (clipped sum + noise) / expected batch size, by name.

        Raises:
            ProtocolError: the clipped sum lacks a trainable parameter, or has others.
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
            raise ProtocolError(
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
        """Drop the step's gradients."""
        self._largest_bound = 0.0
        self.optimizer.zero_grad(set_to_none=True)

    def norm_plan(self) -> dict[str, str]:
        """Computation of each layer's norms, by the layer's name, after a step.

        Recorded and shown only: nothing depends on it.
        """
        return {}

    def notices(self) -> tuple[str, ...]:
        """Sentences on the code that the mode drives, without full stops, after a step.

        What a reviewer has to know and no number shows. Recorded, and told with the verdict.
        """
        return ()

    def gradient_parts(self) -> list[LocalPart]:
        """This rank's part of each trainable parameter's gradient; missing ones become zeros."""
        parts = []
        for layout, parameter in self._layouts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parts.append(layout.part(placed_as(parameter.grad, parameter)))
        return parts

    def weight_parts(self) -> list[LocalPart]:
        """This rank's part of every trainable parameter."""
        return [layout.part(parameter) for layout, parameter in self._layouts]

    @cached_property
    def _layouts(self) -> list[tuple[Layout, nn.Parameter]]:
        # Cached, as walking through the modules takes milliseconds.
        trainable = trainable_parameters(self.model)
        return [(layout_of(name, parameter), parameter) for name, parameter in trainable.items()]
