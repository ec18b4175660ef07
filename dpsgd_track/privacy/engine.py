"""What a pass strategy works with: a model, its capture, and where clipped sums go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.distributed.reduction import GradientSharder
from dpsgd_track.kernels.weighted_sum import weighted_sums_into
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.clipping import SampleRecord, clip_factors, total_norm
from dpsgd_track.privacy.loss import PerSampleLoss, logits_of


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; it may be empty."""

    inputs: dict[str, Tensor]
    """The model's keyword arguments; dimension 0 of every tensor is the sample."""
    targets: Tensor
    """What the loss compares with; dimension 0 is the sample. See `dpsgd_track.privacy.loss`."""
    args: tuple[Tensor, ...] = field(default=(), kw_only=True)
    """The model's positional arguments, likewise."""

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, index: int) -> Batch:
        """Sample `index` alone, as a batch of one."""
        pick = slice(index, index + 1)
        inputs = {name: t[pick] for name, t in self.inputs.items()}
        return Batch(inputs, self.targets[pick], args=tuple(t[pick] for t in self.args))

    def run(self, model: Callable[..., Any], dtype: torch.dtype | None = None) -> Tensor:
        """Logits of `model` over the batch; floating inputs are cast to `dtype`."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if dtype and t.is_floating_point() else t

        inputs = {name: cast(t) for name, t in self.inputs.items()}
        return logits_of(model(*map(cast, self.args), **inputs))

    def stand_in(self) -> Batch:
        """One made-up sample of the same shapes: zeros, and masks that hide nothing."""

        def blank(name: str, t: Tensor) -> Tensor:
            shape = (1, *t.shape[1:])
            return t.new_ones(shape) if name.endswith("mask") else t.new_zeros(shape)

        inputs = {name: blank(name, t) for name, t in self.inputs.items()}
        args = tuple(blank("", t) for t in self.args)
        return Batch(inputs, blank("", self.targets), args=args)


@dataclass
class Engine:
    """A model made ready for one mode."""

    model: nn.Module
    sharder: GradientSharder
    max_grad_norm: float
    loss: PerSampleLoss
    capture: Capture | None = None
    input_dtype: torch.dtype | None = None
    """Type that floating inputs are cast to; None leaves them as they are."""
    is_standing_in: bool = False
    """The batch at hand is made up: its losses and gradients count for nothing."""
    packs: bool = True
    """Whether sums of kept gradients may go to the other ranks without being whole tensors."""

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, [B], with its graph."""
        return self.loss(batch.run(self.model, self.input_dtype), batch.targets)

    def clip(self, loss_B: Tensor, norm_sq: dict[str, Tensor]) -> SampleRecord:
        """Norms and clip factors from squared norms by parameter."""
        norm_B = total_norm(norm_sq) if norm_sq else torch.zeros_like(loss_B)
        roots = torch.stack(list(norm_sq.values())).sqrt().unbind() if norm_sq else ()
        by_parameter = dict(zip(norm_sq, roots, strict=True))
        return SampleRecord(
            loss_B.detach(), norm_B, clip_factors(norm_B, self.max_grad_norm), by_parameter
        )

    def put_kept(self, names: list[str], clip_factor_B: Tensor) -> None:
        """Add this rank's clipped sums of a group, from what the backward for norms kept of it.

        Where that is gradients, their sums are written where the other ranks expect them.
        """
        assert self.capture is not None
        packs = self.packs and self.sharder.packs and not self.is_standing_in
        gradients = self.capture.kept_gradients(names) if packs else None
        if gradients is None:
            self.put(self.capture.kept_sums(names, clip_factor_B))
        else:
            kept = gradients
            self.sharder.pack(names, lambda outs: weighted_sums_into(outs, kept, clip_factor_B))

    def put(self, sums: dict[str, Tensor]) -> None:
        """Add this rank's clipped sums of some parameters."""
        if self.is_standing_in:
            sums = {name: torch.zeros_like(total) for name, total in sums.items()}
        self.sharder.put(sums)
