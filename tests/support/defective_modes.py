"""User modes for tests: a healthy one, and ones with a known defect planted in it.

They enter as any user's do, by `--mode tests.support.defective_modes:NAME`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import ModeContext
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.noise import NoiseSource, add_noise


class Healthy(ComposedMode):
    """flash_fsdp under another name."""

    def __init__(self, model: nn.Module, context: ModeContext) -> None:
        super().__init__(MODES["flash_fsdp"], model, context)


class FlatRule(ComposedMode):
    """Clips the whole gradient, whatever rule was asked for."""

    def __init__(self, model: nn.Module, context: ModeContext) -> None:
        privacy = replace(context.privacy, clipping="flat")
        super().__init__(MODES["flash_fsdp"], model, replace(context, privacy=privacy))


class NoiseByLocalShard(Healthy):
    """Noise keyed by the position in the shard: every rank draws the same."""

    def privatize(self, clipped: ClippedSum, source: NoiseSource) -> dict[str, Tensor]:
        parts = [replace(p, start=0, num_elements=p.local.numel()) for p in self.gradient_parts()]
        privacy = self.context.privacy
        add_noise(clipped, parts, privacy.noise_multiplier, source)
        for gradient in clipped.gradients.values():
            gradient.div_(privacy.expected_batch_size)
        self._write_gradients(clipped.gradients)
        return clipped.gradients


class MeanClipFactor(Healthy):
    """sum_i g_i times the mean clip factor, in place of sum_i c_i g_i."""

    def accumulate(self, batch: Batch) -> SampleRecord:
        sums, bound = self.engine.sharder.sums, self.engine.max_grad_norm
        before = {name: total.clone() for name, total in sums.items()}
        self.engine.max_grad_norm = 1e30
        record = super().accumulate(batch)
        self.engine.max_grad_norm = bound
        assert record.norm_B is not None
        factors = (bound / record.norm_B).clamp(max=1.0)
        for name, total in sums.items():
            start = before.get(name, torch.zeros_like(total))
            sums[name] = start + (total - start) * factors.mean().item()
        return replace(record, clip_factor_B=factors)


class Rank0Loss(Healthy):
    """Reports rank 0's losses for everyone's."""

    def accumulate(self, batch: Batch) -> SampleRecord:
        record = super().accumulate(batch)
        loss_B = record.loss_B.clone()
        dist.broadcast(loss_B, src=0)
        return replace(record, loss_B=loss_B)


class GoesNan(Healthy):
    """One NaN in one gradient."""

    def clipped_sum(self) -> ClippedSum:
        clipped = super().clipped_sum()
        for gradient in clipped.gradients.values():
            gradient.view(-1)[:1] = float("nan")
        return clipped


class OutOfMemory(Healthy):
    """Runs out of memory on the last rank."""

    def accumulate(self, batch: Batch) -> SampleRecord:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return super().accumulate(batch)


class Leaves(Healthy):
    """Ends its process as if all were well."""

    def accumulate(self, batch: Batch) -> SampleRecord:
        raise SystemExit(0)


class Recordless(Healthy):
    """Clips, and tells nothing of it."""

    def accumulate(self, batch: Batch) -> SampleRecord:
        super().accumulate(batch)
        return None  # type: ignore[return-value]


class MeanLoss(Healthy):
    """Reports one loss for all samples of a micro-batch."""

    def accumulate(self, batch: Batch) -> SampleRecord:
        record = super().accumulate(batch)
        return replace(record, loss_B=record.loss_B.mean())
