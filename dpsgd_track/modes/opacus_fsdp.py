"""Opacus's own `ghost_fsdp`, through its PrivacyEngine, as its users run it.

Clipping, accumulation, noise calibration and scaling are Opacus's; only the noise's random
numbers may be replaced by the common ones, so that they cancel in a comparison.
"""

from __future__ import annotations

from typing import Any

import opacus
import opacus.optimizers.fsdpoptimizer_fast_gradient_clipping as fsdp_optimizer
import torch
import torch.distributed as dist
from opacus.utils.fsdp_utils import FSDP2Wrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpsgd_track.distributed.sharding import (
    LocalPart,
    as_sharded,
    local_part,
    mixed_precision,
    trainable_parameters,
)
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.engine import Batch
from dpsgd_track.privacy.loss import PerSampleLoss, logits_of
from dpsgd_track.privacy.noise import NoiseSource


class _SharedLoss(nn.Module):
    """The loss every mode shares, in the form Opacus asks of a criterion."""

    def __init__(self, loss: PerSampleLoss) -> None:
        super().__init__()
        self.loss = loss
        self.reduction = "mean"

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss_B = self.loss(logits, target)
        return loss_B if self.reduction == "none" else loss_B.mean()


class OpacusGhostFsdpMode(Mode):
    """`grad_sample_mode="ghost_fsdp"` of the installed Opacus."""

    dp_optimizer: Any
    """`optimizer`, as Opacus's own class."""

    def __init__(self, model: nn.Module, context: ModeContext) -> None:
        super().__init__(context)
        model = FSDP2Wrapper(model, mp_policy=mixed_precision(context.param_dtype))
        privacy = context.privacy
        # Opacus reads the expected batch size off a data loader: one batch of that many rows.
        rows = TensorDataset(torch.zeros(privacy.expected_batch_size, 1))
        engine = opacus.PrivacyEngine()
        wrapped, optimizer, self.criterion, _ = engine.make_private(
            module=model,
            optimizer=context.make_optimizer(model.parameters()),
            criterion=_SharedLoss(context.loss),
            data_loader=DataLoader(rows, batch_size=privacy.expected_batch_size),
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            poisson_sampling=False,
            grad_sample_mode="ghost_fsdp",
        )
        self.model = model
        self.wrapped = wrapped
        self.optimizer = self.dp_optimizer = optimizer
        self.world_size = dist.get_world_size()
        self.norm_names = _norm_names(wrapped, model)
        self.has_pending = False

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Clip at another C, in the module and in the noise."""
        super().set_max_grad_norm(max_grad_norm)
        self.wrapped.max_grad_norm = max_grad_norm
        self.dp_optimizer.max_grad_norm = max_grad_norm

    def accumulate(self, batch: Batch) -> SampleRecord:
        """One forward and Opacus's two backwards.

        Opacus keeps the earlier micro-batches of a step only if each is followed by a skipped
        step, as its own BatchMemoryManager does.
        """
        if self.has_pending:
            self.dp_optimizer.signal_skip_step(do_skip=True)
            self.dp_optimizer.step()
            self.dp_optimizer.zero_grad()
        loss = self.criterion(logits_of(self.wrapped(**batch.inputs)), batch.targets)
        loss.backward()
        self.has_pending = True
        clip_factor_B = self.wrapped.get_clipping_coef()
        return SampleRecord(
            loss.loss_per_sample.detach(),
            self.wrapped.per_sample_gradient_norms,
            clip_factor_B,
            self._norm_by_parameter(),
        )

    def clipped_sum(self) -> ClippedSum:
        """What Opacus has summed, times the number of ranks it divided by."""
        summed = {}
        for name, parameter in trainable_parameters(self.model).items():
            assert parameter.grad is not None
            total = local_part(name, parameter, parameter.grad).local.clone()
            earlier = self.dp_optimizer.grad_state[parameter]["summed_grad"]
            if earlier is not None:
                total += earlier.to_local()
            summed[name] = total.mul_(self.world_size)
        return ClippedSum(summed, self.max_grad_norm)

    def privatize(self, clipped: ClippedSum, source: NoiseSource) -> dict[str, Tensor]:
        """Opacus's own noise and scaling, drawing the given random numbers."""
        with _NoiseFrom(source, trainable_parameters(self.model)):
            self.dp_optimizer.pre_step()
        self.has_pending = False
        return {part.name: part.local for part in self.gradient_parts()}

    def step(self) -> None:
        """The rest of Opacus's step: the wrapped optimizer's."""
        self.dp_optimizer.original_optimizer.step()

    def zero_grad(self) -> None:
        """Forget the step's gradients, the earlier micro-batches' too."""
        self.has_pending = False
        self.dp_optimizer._is_last_step_skipped = False
        self.optimizer.zero_grad(set_to_none=True)

    def _norm_by_parameter(self) -> dict[str, Tensor]:
        return {
            name: norm_B
            for module, names in self.norm_names
            for name, norm_B in zip(names, module.norm_sample, strict=True)
        }


def _norm_names(wrapped: Any, model: nn.Module) -> list[tuple[Any, list[str]]]:
    """Each module Opacus keeps norms on, with its parameters' names in the norms' order."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (module, [name_of[id(p)] for p in module.parameters(recurse=False) if p.requires_grad])
        for module in wrapped.iterate_submodules(model)
    ]


class _NoiseFrom:
    """Within it, Opacus's FSDP optimizer draws its noise from `source`."""

    def __init__(self, source: NoiseSource, parameters: dict[str, nn.Parameter]) -> None:
        self.source = source
        self.remaining = iter(parameters.items())

    def __enter__(self) -> None:
        self.original = fsdp_optimizer._generate_noise
        fsdp_optimizer._generate_noise = self.generate

    def __exit__(self, *exception: object) -> None:
        fsdp_optimizer._generate_noise = self.original

    def generate(self, *, std: float, reference: Any, **unused: object) -> Tensor:
        """Noise of `std` for the next parameter; Opacus asks in the optimizer's order."""
        name, parameter = next(self.remaining)
        if parameter.shape != reference.shape:
            raise RuntimeError(f"{name}: Opacus asked for noise in an unexpected order")
        part: LocalPart = local_part(name, parameter, reference)
        local = self.source.standard_normal(part).to(reference.dtype).mul_(std)
        return as_sharded(local, reference)
