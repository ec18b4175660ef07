"""Gaussian noise for a clipped sum, a function of (key, step, parameter, element).

Noise is drawn in blocks of consecutive elements of the whole parameter, each block from a
generator seeded by a digest of what it is for. A rank draws only the blocks that overlap its
shard, so that the noise of an element does not depend on how many ranks there are, shards never
repeat each other's noise, and nothing else that is random can shift it. The bits are those of
the device's generator: equal on equal devices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.privacy.clipping import ClippedSum

BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise for any part of any parameter at one step."""

    key: str
    """What the noise belongs to, such as a seed; equal keys draw equal noise."""
    step: int

    def standard_normal(self, part: LocalPart) -> Tensor:
        """Noise of std 1 for the elements that `part` holds, float32, in its local shape."""
        pieces = [
            self._block(part, block, device=part.local.device)[first:last]
            for block, first, last in _overlaps(part.start, part.stop)
        ]
        if not pieces:
            return torch.zeros_like(part.local, dtype=torch.float32)
        return torch.cat(pieces).view(part.local.shape)

    def _block(self, part: LocalPart, block: int, *, device: torch.device) -> Tensor:
        name = f"{self.key}/{self.step}/{part.name}/{block}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        # The whole block is drawn even where less is needed: how a generator fills a tensor
        # depends on the tensor's length, which must not depend on the shard.
        size = min(BLOCK_ELEMENTS, part.num_elements - block * BLOCK_ELEMENTS)
        return torch.randn(size, generator=generator, device=device)


def _overlaps(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(block, first, last) for each block that [start, stop) meets; positions in the block."""
    for block in range(start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS)):
        offset = block * BLOCK_ELEMENTS
        yield block, max(start - offset, 0), min(stop - offset, BLOCK_ELEMENTS)


def add_noise(
    clipped: ClippedSum, parts: list[LocalPart], noise_multiplier: float, source: NoiseSource
) -> None:
    """Add normal(0, (sigma C)^2) to this rank's shards of the clipped sum, in place.

    Args:
        clipped: what the noise is calibrated to.
        parts: where in the whole each of its shards lies.
        noise_multiplier: sigma.
        source: the noise.
    Raises:
        ValueError: noise was asked for, but nothing bounds the sum's sensitivity.
    """
    if noise_multiplier == 0:
        return
    std = noise_multiplier * clipped.sensitivity
    if not math.isfinite(std):
        raise ValueError(
            f"sensitivity={clipped.sensitivity!r}: expected a finite bound to calibrate noise to. "
            "Clip the gradients first."
        )
    for part in parts:
        gradient = clipped.gradients[part.name]
        gradient.add_(source.standard_normal(part).to(gradient.dtype), alpha=std)
