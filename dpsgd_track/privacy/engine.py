"""What a pass strategy works with: a model, its capture, and where clipped sums go."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dpsgd_track.distributed.reduction import GradientSharder
from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.kernels.left_out import answer_later, assuming_all_kept
from dpsgd_track.kernels.weighted_sum import weighted_sums_into
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.clipping import SampleRecord, clip_factors, total_norm
from dpsgd_track.privacy.loss import PerSampleLoss
from dpsgd_track.privacy.precision import rounded_parameters
from dpsgd_track.privacy.sample_dim import find_sample_dims

Strategy = Callable[["Engine", Batch], SampleRecord]
"""Puts the clipped sum of a micro-batch; see `privacy.strategies`."""


@dataclass
class Engine:
    """A model made ready for one mode."""

    model: nn.Module
    sharder: GradientSharder
    max_grad_norm: float
    loss: PerSampleLoss
    strategy: Strategy
    capture: Capture | None = None
    rounded_dtype: torch.dtype | None = None
    """Type that parameters and floating inputs are rounded to on one device; None leaves them as
    they are."""
    is_standing_in: bool = False
    """The batch at hand is made up: its losses and gradients count for nothing."""
    packs: bool = True
    """Whether sums of kept gradients may go to the other ranks without being whole tensors."""
    _weight_B: Tensor | None = field(default=None, init=False)
    """What gradients are weighted with in place of the clip factors."""
    _knows_sample_dims: bool = field(default=False, init=False)
    _leaves_out: Callable[[], bool] | None = field(default=None, init=False)
    """On a GPU, whether a sample of the batch at hand is left out: waits until that is known."""

    def __post_init__(self) -> None:
        self._device_type = next(self.model.parameters()).device.type

    def add(self, batch: Batch) -> SampleRecord:
        """Add a micro-batch's clipped sum, whole or not at all; an empty one adds nothing."""
        is_empty = self.is_standing_in = len(batch) == 0
        if is_empty:
            batch = batch.stand_in()
        try:
            with self.in_rounded_dtype():
                if self.capture is not None and not self._knows_sample_dims:
                    find_sample_dims(self.capture, self._logits, batch)
                    self.sharder.reshard()
                    self._knows_sample_dims = True
                record = self._run(batch)
        except BaseException:
            self.sharder.discard()
            raise
        self.sharder.commit()
        return record.of_nobody() if is_empty else record

    def _run(self, batch: Batch) -> SampleRecord:
        """The strategy, on one GPU at first as if no sample were left out.

        Whether one is, is known long before its sums are formed there.
        """
        is_clipped_on_one_gpu = self.capture is not None and self.sharder.repeats_batches
        if self._device_type == "cpu" or not is_clipped_on_one_gpu:
            return self.strategy(self, batch)
        with assuming_all_kept() as assumption:
            record = self.strategy(self, batch)
        assert self._leaves_out is not None
        if assumption.was_made and self._leaves_out():
            self.sharder.discard()
            record = self.strategy(self, batch)
        return record

    def weighted_sum(
        self, batch: Batch, weight_B: Tensor
    ) -> tuple[SampleRecord, dict[str, Tensor]]:
        """sum_i w_i g_i over all ranks as the engine forms it, in place of a clipped sum.

        Returns:
            The record as `add` would return it, and this rank's part of each sum. Nothing is added.
        """
        self._weight_B = weight_B if len(batch) else weight_B.new_zeros(1)
        try:
            with self.sharder.aside() as sums:
                record = self.add(batch)
                return record, dict(sums)
        finally:
            self._weight_B = None

    def plain_gradients(
        self, batch: Batch, weight_B: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same by autograd, with nothing captured.

        Returns:
            Logits and losses of the samples, and this rank's part of the gradient of
            sum_i w_i loss_i over all ranks, by parameter.
        """
        if len(batch) == 0:
            batch, weight_B = batch.stand_in(), weight_B.new_zeros(1)
        parameters = trainable_parameters(self.model)
        with self.in_rounded_dtype():
            logits = self._logits(batch)
            loss_B = self.loss(logits, batch.targets)
            total = (loss_B * weight_B).sum()
            found = self.sharder.gradients_of(total, list(parameters.values()))
        gradients = {
            name: torch.zeros_like(as_local(parameter)) if gradient is None else gradient.to_dense()
            for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
        }
        return logits.detach(), loss_B.detach(), gradients

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, [B], with its graph."""
        return self.loss(self._logits(batch), batch.targets)

    def clip(self, loss_B: Tensor, norm_sq: dict[str, Tensor]) -> SampleRecord:
        """Norms and clip factors from squared norms by parameter.

        A sample whose loss or norm is not finite has factor 0: it is left out of the sum.
        """
        norm_B = total_norm(norm_sq) if norm_sq else torch.zeros_like(loss_B)
        roots = torch.stack(list(norm_sq.values())).sqrt().unbind() if norm_sq else ()
        by_parameter = dict(zip(norm_sq, roots, strict=True))
        loss_B = loss_B.detach()
        factor_B = clip_factors(norm_B, self.max_grad_norm)
        factor_B = torch.where(loss_B.isfinite(), factor_B, 0.0)
        if factor_B.is_cuda:
            self._leaves_out = answer_later(factor_B.eq(0).any())
        return SampleRecord(loss_B, norm_B, factor_B, by_parameter)

    def weights_of(self, record: SampleRecord) -> Tensor:
        """What each sample's gradient is multiplied by in the sum, [B]: its clip factor."""
        assert record.clip_factor_B is not None
        if self._weight_B is None:
            return record.clip_factor_B
        # What would be left out of a clipped sum is left out here too.
        return self._weight_B.to(record.clip_factor_B.dtype) * record.clip_factor_B.ne(0)

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

    def _logits(self, batch: Batch) -> Tensor:
        return batch.run(self.model, self.rounded_dtype)

    def without_autocast(self) -> AbstractContextManager[object]:
        """Within it, which is after a forward, norms and sums are not cast as a forward is."""
        if not torch.is_autocast_enabled(self._device_type):
            return nullcontext()
        return torch.autocast(self._device_type, enabled=False)

    def in_rounded_dtype(self) -> AbstractContextManager[None]:
        """Within it the model runs on parameters of the type that the mode computes in."""
        if self.rounded_dtype is None:
            return nullcontext()
        return rounded_parameters(self.model, self.rounded_dtype)
