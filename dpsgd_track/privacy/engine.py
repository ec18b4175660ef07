"""The engine that pass strategies work with: a model, its capture, and a gradient sharder."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.config import AUTOMATIC, FLAT, PER_LAYER
from dpsgd_track.distributed.reduction import GradientSharder
from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.kernels.device import HostCopy
from dpsgd_track.kernels.left_out import assuming_all_kept
from dpsgd_track.kernels.weighted_sum import weighted_sums
from dpsgd_track.privacy.batch import Batch, RepeatableBatch, Rows
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.clipping import (
    SampleRecord,
    automatic_factors,
    clip_factors,
    layer_of,
    total_norm,
)
from dpsgd_track.privacy.loss import PerSampleLoss
from dpsgd_track.privacy.precision import rounded_parameters
from dpsgd_track.privacy.sample_dim import find_sample_dims
from dpsgd_track.privacy.uncompiled import without_compiler

Strategy = Callable[["Engine", Tensor], SampleRecord]
"""Puts a micro-batch's clipped sum into the engine, from the samples' losses [B] with their graph;
see `privacy.strategies`."""


@dataclass
class Added:
    """The micro-batch that is being added."""

    record: SampleRecord | None = None
    """Set before the end."""


@dataclass
class Engine:
    """Adds clipped sums of a model's gradients, micro-batch by micro-batch, for one mode."""

    model: nn.Module
    sharder: GradientSharder
    max_grad_norm: float
    loss: PerSampleLoss
    strategy: Strategy
    capture: Capture | None = None
    clipping: str = FLAT
    """Rule by which samples are clipped."""
    rounded_dtype: torch.dtype | None = None
    """Type that parameters and floating inputs are rounded to on one device; None leaves them as
    they are."""
    is_standing_in: bool = False
    """True while a stand-in runs for an empty batch: its losses and gradients do not count."""
    _weight_B: Tensor | None = field(default=None, init=False)
    """Weights of the samples' gradients that replace the clip factors."""
    knows_sample_dims: bool = field(default=False, init=False)
    _is_for_graph: bool = field(default=False, init=False)
    """True while a step runs as a CUDA graph records it."""
    _layers: dict[tuple[str, ...], tuple[list[str], Tensor]] = field(
        default_factory=dict, init=False
    )
    """Layers of parameters, and the place of each parameter's among them."""
    _leaves_out: HostCopy | None = field(default=None, init=False)
    """On a GPU, true if a sample of the current batch is left out."""

    def __post_init__(self) -> None:
        self._device_type = next(self.model.parameters()).device.type

    def add(self, batch: RepeatableBatch) -> SampleRecord:
        """Add a micro-batch's clipped sum, whole or not at all; an empty one adds nothing."""
        with self.adding(len(batch)) as added:
            if self.is_standing_in:
                batch = batch.stand_in()
            if isinstance(batch, Batch):
                run = partial(Batch.run, model=self.model, dtype=self.rounded_dtype)
                self.find_sample_dims(run, batch)
            added.record = self._run(batch)
        assert added.record is not None
        return added.record

    @contextmanager
    def adding(self, num_samples: int) -> Iterator[Added]:
        """Context in which the clipped sum of a micro-batch is formed; added unless it raises."""
        added = Added()
        self.is_standing_in = num_samples == 0
        try:
            with self.in_rounded_dtype():
                yield added
        except BaseException:
            self.sharder.discard()
            raise
        self.sharder.commit()
        if num_samples == 0 and added.record is not None:
            added.record = added.record.emptied()

    def find_sample_dims(self, run: Callable[[Any], Tensor], rows: Rows) -> None:
        """Before the first batch, find the samples' dimension in each layer.

        Args:
            run: the model's outputs of `rows`, [B, ...].
        """
        if self.capture is None or self.knows_sample_dims:
            return
        # Once, on other numbers of samples: not worth a compiler's while.
        with without_compiler():
            find_sample_dims(self.capture, run, rows)
        self.sharder.reshard()
        self.knows_sample_dims = True

    def capturing(self, num_samples: int, kind: Hashable = None) -> AbstractContextManager[None]:
        """Context in which the forward of a micro-batch runs, and then the strategy.

        Args:
            kind: see `privacy.traced_layers.Tracing`.
        """
        if self.capture is None:
            return nullcontext()
        return self.capture.sample_batch(num_samples, kind)

    def _run(self, batch: RepeatableBatch) -> SampleRecord:
        """Run the strategy; on one GPU at first on the assumption that no sample is left out.

        If one is, which the host knows long before the sums are formed, run it again.
        """
        is_clipped_on_one_gpu = self.capture is not None and self.sharder.repeats_batches
        if self._device_type == "cpu" or not is_clipped_on_one_gpu or self._is_for_graph:
            return self._run_once(batch)
        with assuming_all_kept() as assumption:
            record = self._run_once(batch)
        assert self._leaves_out is not None
        if assumption.was_made and bool(self._leaves_out.wait()):
            self.sharder.discard()
            record = self._run_once(batch)
        return record

    @contextmanager
    def without_host(self) -> Iterator[None]:
        """Context in which batches are added without a question to the GPU, as in a CUDA graph."""
        self._is_for_graph = True
        try:
            yield
        finally:
            self._is_for_graph = False

    def _run_once(self, batch: RepeatableBatch) -> SampleRecord:
        with self.capturing(len(batch), self._kind_of(batch)):
            return self.strategy(self, self.losses(batch))

    def _kind_of(self, batch: RepeatableBatch) -> Hashable:
        """Shapes and types of the samples, if layers may be traced for them."""
        keeps_all = self.capture is not None and self.capture.keeps_all
        if not keeps_all or self.clipping == PER_LAYER or not isinstance(batch, Batch):
            return None
        if torch.is_autocast_enabled(self._device_type):
            return None
        inputs = (*batch.args, *(batch.inputs[name] for name in sorted(batch.inputs)))
        return tuple((x.shape[1:], x.dtype) for x in inputs)

    def weighted_sum(
        self, batch: RepeatableBatch, weight_B: Tensor
    ) -> tuple[SampleRecord, dict[str, Tensor]]:
        """sum_i w_i g_i over all ranks, formed the way a clipped sum is. Adds nothing.

        Returns:
            The record that `add` would return, and this rank's shard of each sum.
        """
        self._weight_B = weight_B if len(batch) else weight_B.new_zeros(1)
        try:
            with self.sharder.aside() as sums:
                record = self.add(batch)
                return record, dict(sums)
        finally:
            self._weight_B = None

    def autograd_gradients(
        self, batch: RepeatableBatch, weight_B: Tensor
    ) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
        """The gradient of sum_i w_i loss_i over all ranks by plain autograd, with no capture.

        Returns:
            Logits of the samples, None if they are not known, their losses, and this rank's shards
            of the gradient, by parameter.
        """
        if len(batch) == 0:
            batch, weight_B = batch.stand_in(), weight_B.new_zeros(1)
        parameters = trainable_parameters(self.model)
        with self.in_rounded_dtype(has_graph=True):
            logits, loss_B = batch.outputs(self.model, self.loss, self.rounded_dtype)
            total = (loss_B * weight_B).sum()
            shards = self.sharder.gradients_of(total, list(parameters.values()))
        gradients = {
            name: torch.zeros_like(as_local(parameter)) if gradient is None else gradient.to_dense()
            for (name, parameter), gradient in zip(parameters.items(), shards, strict=True)
        }
        return logits if logits is None else logits.detach(), loss_B.detach(), gradients

    def losses(self, batch: RepeatableBatch) -> Tensor:
        """Loss of each sample, [B], with its graph."""
        return batch.outputs(self.model, self.loss, self.rounded_dtype)[1]

    def clip(self, loss_B: Tensor, norm_sq: dict[str, Tensor]) -> SampleRecord:
        """Norms and clip factors from squared norms by parameter.

        A sample whose loss or norm is not finite gets factor 0, which leaves it out of the sum.
        """
        norm_B = total_norm(norm_sq) if norm_sq else torch.zeros_like(loss_B)
        roots = torch.stack(list(norm_sq.values())).sqrt().unbind() if norm_sq else ()
        by_parameter = dict(zip(norm_sq, roots, strict=True))
        loss_B = loss_B.detach()
        factor_B = torch.where(loss_B.isfinite(), self.factors_of(norm_sq, norm_B), 0.0)
        if factor_B.is_cuda and not self._is_for_graph:
            self._leaves_out = HostCopy(factor_B.eq(0).any())
        return SampleRecord(loss_B, norm_B, factor_B, by_parameter)

    def factors_of(self, norm_sq: dict[str, Tensor], norm_B: Tensor) -> Tensor:
        """Clip factors, [B], from squared norms by parameter and the norms over all of them."""
        if self.clipping == AUTOMATIC:
            return automatic_factors(norm_B, self.max_grad_norm)
        if self.clipping == FLAT or not norm_sq:
            return clip_factors(norm_B, self.max_grad_norm)
        _, layer_sq = self._by_layer(norm_sq)
        factor_LB = clip_factors(layer_sq.sqrt(), self._layer_bound)
        added_B = (factor_LB.square() * layer_sq).sum(dim=0).sqrt()
        # Exactly 1 where nothing is clipped, and 0 where a part is left out.
        factor_B = torch.where(factor_LB.eq(1).all(dim=0), 1.0, added_B / norm_B)
        return torch.where(factor_LB.ne(0).all(dim=0), factor_B, 0.0)

    def layer_factors(self, norm_sq: dict[str, Tensor], is_kept_B: Tensor) -> dict[str, Tensor]:
        """Clip factors [B] of each layer, from squared norms [B] by parameter.

        Args:
            is_kept_B: samples whose factor is not 0.
        """
        layers, layer_sq = self._by_layer(norm_sq)
        factor_LB = clip_factors(layer_sq.sqrt(), self._layer_bound)
        factor_LB = torch.where(is_kept_B, factor_LB, 0.0)
        return dict(zip(layers, factor_LB.unbind(), strict=True))

    def _by_layer(self, norm_sq: dict[str, Tensor]) -> tuple[list[str], Tensor]:
        """Layers, and the squared norms [L, B] of their parts."""
        squares = torch.stack(list(norm_sq.values()))
        names = tuple(norm_sq)
        if names not in self._layers:
            of_names = list(map(layer_of, names))
            layers = list(dict.fromkeys(of_names))
            places = torch.tensor([layers.index(layer) for layer in of_names])
            self._layers[names] = layers, places.to(squares.device)
        layers, places = self._layers[names]
        layer_sq = squares.new_zeros(len(layers), squares.shape[1])
        return layers, layer_sq.index_add_(0, places, squares)

    @property
    def _layer_bound(self) -> float:
        assert self.capture is not None
        return self.max_grad_norm / math.sqrt(self.capture.num_layers)

    def weights_of(self, factor_B: Tensor) -> Tensor:
        """Weight of each sample's gradient in the sum, [B]: its clip factor, or a given weight."""
        if self._weight_B is None:
            return factor_B
        # A sample that a clipped sum leaves out is left out here too.
        return self._weight_B.to(factor_B.dtype) * factor_B.ne(0)

    def put_kept(self, names: list[str], clip_factor_B: Tensor) -> None:
        """Add this rank's clipped sums of the group `names`, from the terms that were kept.

        They are written straight into the tensor that is sent to other ranks, if one is.
        """
        capture = self.capture
        assert capture is not None
        if not self.sharder.packs or self.is_standing_in:
            self.put(capture.kept_sums(names, clip_factor_B))
            return
        self.sharder.pack(
            names,
            lambda outs: capture.write_kept_sums(
                dict(zip(names, outs, strict=True)), clip_factor_B
            ),
        )

    def put_sent(self, weight_B: Tensor) -> None:
        """Add this rank's clipped sums of the per-sample gradients that the backward has sent."""
        weight_B = torch.zeros_like(weight_B) if self.is_standing_in else weight_B
        self.sharder.put_sent(weight_B, weighted_sums)

    def put(self, sums: dict[str, Tensor]) -> None:
        """Add this rank's clipped sums of some parameters."""
        if self.is_standing_in:
            sums = {name: torch.zeros_like(total) for name, total in sums.items()}
        self.sharder.put(sums)

    def without_autocast(self) -> AbstractContextManager[object]:
        """Compute norms and sums, after an autocast forward, without autocast."""
        if not torch.is_autocast_enabled(self._device_type):
            return nullcontext()
        return torch.autocast(self._device_type, enabled=False)

    def in_rounded_dtype(self, *, has_graph: bool = False) -> AbstractContextManager[None]:
        """Run the model on parameters in `rounded_dtype`, if there is one.

        Args:
            has_graph: gradients flow to the parameters themselves, as they do without a capture.
        """
        if self.rounded_dtype is None:
            return nullcontext()
        has_graph |= self.capture is None
        return rounded_parameters(self.model, self.rounded_dtype, has_graph=has_graph)
