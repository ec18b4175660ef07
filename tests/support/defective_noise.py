"""User modes whose clipped sum is right and whose noise is not, each by one known fault.

They enter as any user's do, by `--mode tests.support.defective_noise:NAME`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.noise import NoiseSource
from tests.support.defective_modes import Healthy


class OwnNoise(Healthy):
    """Adds `std` times `draw`, as it should unless a subclass says otherwise."""

    def privatize(self, clipped: ClippedSum, source: NoiseSource) -> dict[str, Tensor]:
        parts = self.weight_parts()
        for part in parts if self.context.privacy.noise_multiplier > 0 else ():
            clipped.gradients[part.name].add_(self.std() * self.draw(part, source))
        return super().privatize(replace(clipped, sensitivity=0.0), source)

    def std(self) -> float:
        return self.context.privacy.noise_multiplier * self.max_grad_norm

    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        return source.standard_normal(part)


class IdenticalShards(OwnNoise):
    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        return source.standard_normal(replace(part, start=0, num_elements=part.local.numel()))


class EveryRankAddsAll(OwnNoise):
    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        keys = [f"{source.key}/{rank}" for rank in range(dist.get_world_size())]
        return sum(replace(source, key=key).standard_normal(part) for key in keys)


class EveryMicroBatch(OwnNoise):
    """Noise with each micro-batch, another each time."""

    count = 0
    is_same = False

    def accumulate(self, batch: Batch) -> SampleRecord:
        record = super().accumulate(batch)
        sums = self.engine.sharder.sums
        for part in self.weight_parts():
            total = sums.setdefault(part.name, torch.zeros_like(part.local))
            source = NoiseSource("micro", 0 if self.is_same else self.count)
            sigma = self.context.privacy.noise_multiplier
            total.add_(source.standard_normal(part), alpha=sigma * self.max_grad_norm)
        self.count += 1
        return record

    def std(self) -> float:
        return 0.0


class SameEveryMicroBatch(EveryMicroBatch):
    is_same = True


class IgnoresC(OwnNoise):
    def std(self) -> float:
        return self.context.privacy.noise_multiplier


class AlwaysOne(OwnNoise):
    def std(self) -> float:
        return 1.0


class SigmaCSquared(OwnNoise):
    def std(self) -> float:
        return super().std() * self.max_grad_norm


class CalibratedToTheMean(OwnNoise):
    def std(self) -> float:
        return super().std() * self.context.privacy.expected_batch_size


class NoNoise(OwnNoise):
    def std(self) -> float:
        return 0.0


class SkipsEmptyBatches(OwnNoise):
    has_samples = False

    def accumulate(self, batch: Batch) -> SampleRecord:
        self.has_samples |= len(batch) > 0
        return super().accumulate(batch)

    def std(self) -> float:
        has_samples = torch.tensor(float(self.has_samples))
        dist.all_reduce(has_samples)
        return super().std() if has_samples else 0.0

    def zero_grad(self) -> None:
        self.has_samples = False
        super().zero_grad()


class SameEveryStep(OwnNoise):
    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        return replace(source, step=0).standard_normal(part)


class SameForOneShape(OwnNoise):
    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        return source.standard_normal(replace(part, name=str(tuple(part.local.shape))))


class TwoThirds(OwnNoise):
    def std(self) -> float:
        return super().std() * 2 / 3


class ThreeHalves(OwnNoise):
    def std(self) -> float:
        return super().std() * 3 / 2


class Uniform(OwnNoise):
    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        normal = source.standard_normal(part)
        return torch.erf(normal / math.sqrt(2)) * math.sqrt(3)


class FirstBlockOnly(OwnNoise):
    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        normal = source.standard_normal(part)
        normal.reshape(-1)[192:] = 0
        return normal


class OncePerColumn(OwnNoise):
    """Drawn for one row of a matrix, and broadcast over the others."""

    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        normal = source.standard_normal(part)
        return normal[:1].expand_as(normal) if normal.ndim > 1 else normal


class UnequalReplicas(OwnNoise):
    def draw(self, part: LocalPart, source: NoiseSource) -> Tensor:
        return replace(source, key=f"{source.key}/{dist.get_rank()}").standard_normal(part)
