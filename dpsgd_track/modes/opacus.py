"""Opacus's own modes, through its `PrivacyEngine`, as Opacus's users run them.

Clipping, accumulation, noise calibration and scaling are Opacus's; only the noise's random
numbers are replaced by the common ones, so that they cancel in a comparison. Releases from 1.4 on
and forks differ in what they have and in what they tell; numbers that one does not tell are not
computed in its place.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import opacus
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from dpsgd_track.config import require
from dpsgd_track.distributed.ranks import world_size
from dpsgd_track.distributed.sharding import (
    LocalPart,
    local_part,
    mixed_precision,
    trainable_parameters,
)
from dpsgd_track.modes.opacus_source import grad_sample_modes
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.loss import PerSampleLoss, logits_of
from dpsgd_track.privacy.noise import NoiseSource


class OpacusMode(Mode):
    """Any `grad_sample_mode` of the Opacus that is importable.

    Modes with `fsdp` in their name run under Opacus's FSDP2Wrapper; the others on one device.
    """

    wrapped: Any
    """`model`, in Opacus's own class."""
    dp_optimizer: Any
    """`optimizer`, typed as Opacus's own class."""
    # `OPACUS_DECLINES` says the same to those who do not import Opacus.
    takes_tied_weights = False
    takes_reused_layers = False
    takes_empty_batches = False
    """Opacus's hooks reduce over the samples of a batch, and raise if there are none."""

    def __init__(
        self,
        grad_sample_mode: str,
        model: nn.Module,
        context: ModeContext,
        *,
        loss_reduction: str = "mean",
    ) -> None:
        """Wrap `model` as `PrivacyEngine.make_private` does.

        Args:
            loss_reduction: mean, or sum, which Opacus is told of as its users tell it.

        Raises:
            ValueError: Opacus has no such mode, cannot run it with these settings, or refuses the
                model.
        """
        super().__init__(context)
        self.world_size = world_size()
        self.is_sharded = "fsdp" in grad_sample_mode
        _check(grad_sample_mode, self.is_sharded, context)
        self.loss_reduction = loss_reduction
        self.is_fused = "fuse" in grad_sample_mode
        self.model = self.shard(model) if self.is_sharded else model
        # Only the modes that clip in two backwards come with a criterion.
        self.wrapped, optimizer, *criterion, _ = self._make_private(grad_sample_mode)
        self.criterion = criterion[0] if criterion else None
        self.optimizer = self.dp_optimizer = optimizer
        self.first_input = next(iter(inspect.signature(model.forward).parameters))
        name = "accumulate" if hasattr(optimizer, "accumulate") else "clip_and_accumulate"
        self.collect = _OncePerBatch(getattr(optimizer, name))
        setattr(optimizer, name, self.collect)
        self.clip_factors = _LastResult(getattr(self.wrapped, "get_clipping_coef", None))
        if self.criterion is not None:
            self.wrapped.get_clipping_coef = self.clip_factors
        self.draws_inline = self.draws_unseen = False

    def shard(self, model: nn.Module) -> nn.Module:
        """`model`, sharded by Opacus's `FSDP2Wrapper`.

        A fused mode replaces linear layers, which it can only do before they are sharded.
        """
        from opacus.utils.fsdp_utils import FSDP2Wrapper

        replace_linear = getattr(opacus.grad_sample, "replace_linear_with_fused", None)
        if self.is_fused and replace_linear is not None:
            model = replace_linear(model)
        policy = mixed_precision(self.context.param_dtype)
        sharded: nn.Module = FSDP2Wrapper(model, mp_policy=policy)
        return sharded

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Clip at another C, in the wrapped module if that clips, and in the optimizer."""
        super().set_max_grad_norm(max_grad_norm)
        self.dp_optimizer.max_grad_norm = max_grad_norm
        if self.criterion is not None:
            self.wrapped.max_grad_norm = max_grad_norm

    def accumulate(self, batch: Batch) -> SampleRecord:
        """One forward, and the one or two backwards of Opacus.

        Opacus keeps the earlier micro-batches of a step only if each is followed by a skipped
        step, as its own BatchMemoryManager does.
        """
        if self.collect.is_due:
            self.dp_optimizer.signal_skip_step(do_skip=True)
            self.dp_optimizer.step()
            self.dp_optimizer.zero_grad()
        loss_B = self.backward(batch)
        self.collect.is_due = True
        if self.criterion is not None:
            norm_B = getattr(self.wrapped, "per_sample_gradient_norms", None)
            factor_B = self.clip_factors.last
            return SampleRecord(loss_B, norm_B, factor_B, self._norm_by_parameter())
        norms = self._norm_of_grad_samples()
        # The optimizer does not record its clip factors; these are by its formula.
        norm_B = torch.stack(list(norms.values()), dim=1).norm(2, dim=1)
        factor_B = (self.max_grad_norm / (norm_B + 1e-6)).clamp(max=1.0)
        return SampleRecord(loss_B, norm_B, factor_B, norms)

    def backward(self, batch: Batch) -> Tensor:
        """Run the backward; returns the losses of the samples, [B]."""
        logits = self.logits(batch)
        if self.criterion is None:
            loss_B = self.context.loss(logits, batch.targets)
            (loss_B.mean() if self.loss_reduction == "mean" else loss_B.sum()).backward()
        else:
            loss = self.criterion(logits, batch.targets)
            loss.backward()
            loss_B = loss.loss_per_sample
        return loss_B.detach()

    def logits(self, batch: Batch) -> Tensor:
        """Output of the model for `batch`."""
        # Expanded weights take the batch size from the first argument, by position.
        inputs = dict(batch.inputs)
        first = [inputs.pop(self.first_input)] if self.first_input in inputs else []
        return logits_of(self.wrapped(*batch.args, *first, **inputs))

    def clipped_sum(self) -> ClippedSum:
        """Opacus's clipped sum, times the number of ranks, by which its reduction divides.

        A parameter that the optimizer lacks has no sum; its gradient is what training would see.
        """
        self.collect()
        summed = {}
        for name, parameter in trainable_parameters(self.model).items():
            total = self._summed(parameter)
            if total is None:
                total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            summed[name] = local_part(name, parameter, total).local * self.world_size
        return ClippedSum(summed, self.max_grad_norm)

    def _summed(self, parameter: Any) -> Any:
        if self.is_sharded:
            return self.dp_optimizer.grad_state.get(parameter, {}).get("summed_grad")
        return getattr(parameter, "summed_grad", None)

    def privatize(self, clipped: ClippedSum, source: NoiseSource) -> dict[str, Tensor]:
        """Add noise and scale as Opacus does, with random numbers from `source`."""
        noise = _NoiseFrom(source, self.dp_optimizer, trainable_parameters(self.model))
        with noise:
            self.dp_optimizer.pre_step()
        self.draws_inline |= noise.is_inline
        is_noisy = self.dp_optimizer.noise_multiplier > 0
        self.draws_unseen |= is_noisy and not noise.num_drawn
        return {part.name: part.local for part in self.gradient_parts()}

    def notices(self) -> tuple[str, ...]:
        """A sentence on noise that the optimizer does not draw by Opacus's own function."""
        name = type(self.dp_optimizer).__name__
        if self.draws_inline:
            return (
                f"{name} draws its noise with torch.randn_like, not with Opacus's "
                "_generate_noise: noise_generator and secure_mode have no effect",
            )
        if self.draws_unseen:
            return (
                f"{name} draws its noise neither with Opacus's _generate_noise nor with "
                "torch.randn_like, if at all: it could not be replaced by the common noise",
            )
        return ()

    def step(self) -> None:
        """Finish Opacus's step: that of the wrapped optimizer."""
        self.dp_optimizer.original_optimizer.step()

    def zero_grad(self) -> None:
        """Drop the step's gradients, of earlier micro-batches too."""
        self.collect.is_due = False
        self.dp_optimizer._is_last_step_skipped = False
        self.dp_optimizer.zero_grad()

    def _make_private(self, grad_sample_mode: str) -> Any:
        privacy = self.context.privacy
        # Opacus derives the expected batch size from a data loader: one batch of that many rows.
        rows = TensorDataset(torch.zeros(privacy.expected_batch_size, 1))
        settings: dict[str, Any] = {
            "criterion": _SharedLoss(self.context.loss, self.loss_reduction),
            "loss_reduction": self.loss_reduction,
        }
        if "criterion" not in inspect.signature(opacus.PrivacyEngine.make_private).parameters:
            # Before 1.5 no mode clips in two backwards.
            del settings["criterion"]
        try:
            with warnings.catch_warnings():
                # Known, and chosen here: the noise is replaced anyway.
                warnings.filterwarnings("ignore", "Secure RNG turned off")
                engine = opacus.PrivacyEngine()
            return engine.make_private(
                module=self.model,
                optimizer=self.context.make_optimizer(self.model.parameters()),
                data_loader=DataLoader(rows, batch_size=privacy.expected_batch_size),
                noise_multiplier=privacy.noise_multiplier,
                max_grad_norm=privacy.max_grad_norm,
                poisson_sampling=False,
                grad_sample_mode=grad_sample_mode,
                **settings,
            )
        except (UnsupportedModuleError, NotImplementedError) as error:
            raise ValueError(
                f"model={type(self.model).__name__!r}: expected one that Opacus's "
                f"{grad_sample_mode} takes. {_reasons(error)}"
            ) from error

    def _norm_of_grad_samples(self) -> dict[str, Tensor]:
        grad_samples = self.dp_optimizer.grad_samples
        return {
            name: g.reshape(len(g), -1).norm(2, dim=-1)
            for name, g in zip(trainable_parameters(self.model), grad_samples, strict=True)
        }

    def _norm_by_parameter(self) -> dict[str, Tensor] | None:
        """Norms of the mode that clips in two backwards; None unless each parameter has one."""
        parameters: dict[str, Any] = {**trainable_parameters(self.model)}
        if self.is_sharded:
            norm_of = dict(self._norms_in_modules())
        else:
            of = ((p, getattr(p, "_norm_sample", None)) for p in parameters.values())
            norm_of = {p: norm_B for p, norm_B in of if norm_B is not None}
        if any(p not in norm_of for p in parameters.values()):
            return None
        return {name: norm_of[p] for name, p in parameters.items()}

    def _norms_in_modules(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for module in self.wrapped.iterate_submodules(self.model):
            norms = getattr(module, "norm_sample", None) or []
            if len(norms) == len(own := _trainable(module)):
                yield from zip(own, norms, strict=True)


class _SharedLoss(nn.Module):
    """The loss that all modes share, as the criterion that Opacus expects."""

    def __init__(self, loss: PerSampleLoss, reduction: str) -> None:
        super().__init__()
        self.loss = loss
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Losses of the samples, [B]: Opacus sets `reduction` to none, and reduces them itself."""
        assert self.reduction == "none"
        return self.loss(logits, target)


class _OncePerBatch:
    """Has Opacus accumulate a batch only once, as its own step would do so again.

    `clipped_sum` needs the sum before that step.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.is_due = False

    def __call__(self) -> None:
        if self.is_due:
            self.is_due = False
            self.function()


class _LastResult:
    """A function without arguments that keeps what it returned last."""

    def __init__(self, function: Callable[[], Tensor] | None) -> None:
        self.function = function
        self.last: Tensor | None = None

    def __call__(self) -> Tensor:
        assert self.function is not None
        self.last = self.function()
        return self.last


class _NoiseFrom(TorchFunctionMode):
    """Context in which Opacus's `optimizer` draws its noise from `source`."""

    def __init__(
        self, source: NoiseSource, optimizer: Any, parameters: dict[str, nn.Parameter]
    ) -> None:
        super().__init__()
        self.source = source
        # Each of Opacus's optimizers looks the function up in its own module.
        self.module: Any = sys.modules[type(optimizer).add_noise.__module__]
        name_of = {parameter: name for name, parameter in parameters.items()}
        self.remaining = iter([(name_of[p], p) for p in optimizer.params if p in name_of])
        self.is_inline = False
        """True once the optimizer has drawn without Opacus's own function."""
        self.num_drawn = 0

    def __enter__(self) -> _NoiseFrom:
        # A fork's optimizer may do without it.
        self.original = getattr(self.module, "_generate_noise", None)
        if self.original is not None:
            self.module._generate_noise = self.generate
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self.original is not None:
            self.module._generate_noise = self.original

    def __torch_function__(
        self, function: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.randn_like:
            return function(*args, **(kwargs or {}))
        self.is_inline = True
        return self.generate(std=1.0, reference=args[0])

    def generate(self, *, std: float, reference: Any, **unused: object) -> Tensor:
        """Noise of `std` for the next parameter; Opacus asks in the optimizer's order."""
        name, parameter = next(self.remaining)
        self.num_drawn += 1
        if parameter.shape != reference.shape:
            raise RuntimeError(f"{name}: Opacus asked for noise in an unexpected order")
        # Unsharded, even for a sharded parameter: how it is distributed is up to Opacus.
        whole = torch.empty(reference.shape, device=reference.device)
        part = LocalPart(name, whole, 0, whole.numel())
        return self.source.standard_normal(part).to(reference.dtype).mul_(std)


def _check(grad_sample_mode: str, is_sharded: bool, context: ModeContext) -> None:
    available = grad_sample_modes(Path(opacus.__file__).parent)
    require(
        grad_sample_mode in available,
        "grad_sample_mode",
        grad_sample_mode,
        f"one of {', '.join(available)}",
        f"Those are the modes of Opacus {opacus.__version__}.",
    )
    if is_sharded:
        require(
            context.num_replicas == 1,
            "num_replicas",
            context.num_replicas,
            "1",
            "Opacus's FSDP2Wrapper shards over all ranks.",
        )
        return
    require(
        world_size() == 1,
        "nproc_per_node",
        world_size(),
        f"1 for Opacus's {grad_sample_mode}",
        "Of Opacus's modes, ghost_fsdp runs on several ranks.",
    )
    require(
        context.param_dtype == torch.float32,
        "param_dtype",
        str(context.param_dtype).removeprefix("torch."),
        f"float32 for Opacus's {grad_sample_mode}",
        "On one device it keeps no float32 weights beside rounded ones.",
    )


def _reasons(error: Exception) -> str:
    """The messages of an error of Opacus, which may hold a list of errors."""
    listed = error.args[0] if error.args and isinstance(error.args[0], list) else [error]
    return " ".join(str(reason).strip() for reason in listed)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.requires_grad]
