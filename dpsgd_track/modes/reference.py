"""The oracle: one sample at a time through plain autograd.

It shares no code with other modes beyond the loss, the data and dropout masks: no hooks, norm
rules, sharding or reduction. Every rank holds the whole model, in float64 by default, and runs its
own samples; the sums are added over ranks. In a low precision it keeps float32 weights and computes
on rounded copies, as mixed precision does.

A sample whose loss, gradient or norm is not finite is left out: its factor is 0, and it adds
nothing. A micro-batch is added as a whole, once all of its gradients are computed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dpsgd_track.distributed.ranks import sum_over_ranks
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.dropout import only


class ReferenceMode(Mode):
    """DP-SGD by its definition."""

    replicated = True
    is_atomic = True

    def __init__(self, model: nn.Module, context: ModeContext) -> None:
        super().__init__(context)
        self.compute_dtype = context.reference_dtype
        self.is_low_precision = self.compute_dtype.itemsize < 4
        self.model = model if self.is_low_precision else model.to(self.compute_dtype)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = context.make_optimizer(self.parameters)
        if context.observer:
            context.observer.watch(self.model)

    def accumulate(self, batch: Batch) -> SampleRecord:
        """Clip the gradient of each sample alone, and add the sum to `.grad`."""
        losses, norms, factors = [], [], []
        by_parameter: dict[str, list[Tensor]] = {name: [] for name in self.names}
        sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        for index in range(len(batch)):
            if observer := self.context.observer:
                run = partial(self._logits_of_place, index)
                observer.see_losses(self.context.loss, batch, index, run)
            with only(index):
                loss, gradients = self.gradient(batch.sample(index))
            squares = [gradient.square().sum() for gradient in gradients]
            norm = torch.stack(squares).sum().sqrt()
            # The norm is finite only if the whole gradient is.
            parts = [
                torch.where(loss.isfinite() & (part > 0), part, 0.0)
                for part in self._factors(squares, norm)
            ]
            if observer:
                observer.weigh(parts)
            for total, gradient, part in zip(sums, gradients, parts, strict=True):
                # Zeros instead, as 0 times NaN is NaN.
                total.addcmul_(part, torch.where(part > 0, gradient, 0.0))
            losses.append(loss)
            norms.append(norm)
            factors.append(self._factor(parts, squares, norm))
            for name, square in zip(self.names, squares, strict=True):
                by_parameter[name].append(square.sqrt())
        if self.context.observer:
            self.context.observer.end_batch()
        for parameter, total in zip(self.parameters, sums, strict=True):
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
        self.note_bound()
        return SampleRecord(
            self._column(losses),
            self._column(norms),
            self._column(factors),
            {name: self._column(values) for name, values in by_parameter.items()},
        )

    def _factors(self, squares: list[Tensor], norm: Tensor) -> list[Tensor]:
        """Factor of each parameter's gradient of one sample; 0 or NaN if that is not finite.

        Args:
            squares: squared norms by parameter.
            norm: the whole gradient's norm.
        """
        bound = self.max_grad_norm
        match self.context.privacy.clipping:
            case "flat":
                factor = torch.clamp(bound / norm, max=1.0)
            case "automatic":
                factor = bound / (norm + 0.01)
            case _:
                layers = [name.rpartition(".")[0] for name in self.names]
                share = bound / len(set(layers)) ** 0.5
                square_of = dict.fromkeys(layers, torch.zeros_like(norm))
                for layer, square in zip(layers, squares, strict=True):
                    square_of[layer] = square_of[layer] + square
                return [torch.clamp(share / square_of[layer].sqrt(), max=1.0) for layer in layers]
        return [factor] * len(squares)

    def _factor(self, parts: list[Tensor], squares: list[Tensor], norm: Tensor) -> Tensor:
        """Length of the sample's contribution over its norm; 0 if some of it was left out."""
        if self.context.privacy.clipping != "per_layer":
            return parts[0]
        added = torch.stack([p * p * square for p, square in zip(parts, squares, strict=True)])
        of_parts = torch.stack(parts)
        factor = torch.where((of_parts == 1).all(), 1.0, added.sum().sqrt() / norm)
        return torch.where(of_parts.all(), factor, 0.0)

    def gradient(self, sample: Batch) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient of one sample."""
        loss = self.context.loss(self._logits(sample), sample.targets)[0]
        if not loss.requires_grad:
            zeros = [torch.zeros_like(parameter) for parameter in self.parameters]
            if observer := self.context.observer:
                outputs = [torch.zeros_like(output) for output in observer.outputs()]
                observer.see(dict(zip(self.names, zeros, strict=True)), outputs)
            return loss, zeros
        observer = self.context.observer
        outputs = observer.outputs() if observer else []
        found = torch.autograd.grad(
            loss, [*self.parameters, *outputs], allow_unused=True, materialize_grads=True
        )
        gradients = list(found[: len(self.parameters)])
        if observer:
            observer.see(
                dict(zip(self.names, gradients, strict=True)), found[len(self.parameters) :]
            )
        return loss.detach(), gradients

    def _logits_of_place(self, index: int, sample: Batch) -> Tensor:
        # Each forward with the dropout masks of this place of the micro-batch.
        with only(index):
            return self._logits(sample)

    def _logits(self, sample: Batch) -> Tensor:
        if not self.is_low_precision:
            return sample.run(self.model, self.compute_dtype)
        rounded = {n: p.to(self.compute_dtype) for n, p in self.model.named_parameters()}
        call = partial(torch.func.functional_call, self.model, rounded)
        return sample.run(lambda *args, **inputs: call(args, inputs), self.compute_dtype)

    def clipped_sum(self) -> ClippedSum:
        """Add the ranks' sums; every rank then holds the whole."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sum_over_ranks(parameter.grad)
        return super().clipped_sum()

    def _column(self, values: list[Tensor]) -> Tensor:
        """Stack one value for each sample, [B], of a micro-batch that may be empty."""
        if not values:
            return torch.zeros(0, device=self.context.device)
        return torch.stack(values)
