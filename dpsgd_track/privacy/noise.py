"""Gaussian noise for a clipped sum, a function of (key, step, parameter, element).

A rank draws noise for its own elements only. So the noise of an element does not depend on the
number of ranks, shards never repeat each other's noise, and no other random draw can shift it.
Generators are seeded by a digest of key, step and parameter, which makes the noise of different
steps and parameters independent.

On a GPU the generator is counter-based (`kernels.gaussian_noise`): a step has a key, a parameter a
nonce, and the counter is the element. On a CPU, where that would be slow, noise is drawn in blocks
of consecutive elements of the whole parameter, each from its own generator. The bits are equal on
devices of one kind.

A `fresh_key` is secret. But no generator here is cryptographically secure: an observer of much of
one block's raw noise may in principle predict the rest of the block.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.privacy.clipping import ClippedSum

BLOCK_ELEMENTS = 1 << 18
_KEY_BYTES = 32


def fresh_key(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """256 bits of the operating system's entropy, as hexadecimal digits, equal on every rank.

    Ranks with the same key draw the same noise for an element that several of them hold, and
    different noise for different elements.

    Args:
        group: ranks that share the key; None for all, or for a process without a group.
        device: device that the group's backend communicates from.
    """
    key = torch.tensor(list(secrets.token_bytes(_KEY_BYTES)), dtype=torch.uint8, device=device)
    if dist.is_initialized():
        dist.broadcast(key, group=group, group_src=0)
    return bytes(key.tolist()).hex()


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise for any part of any parameter at one step."""

    key: str
    """A `fresh_key`, or any text such as a seed; equal keys draw equal noise."""
    step: int

    def standard_normal(self, part: LocalPart) -> Tensor:
        """Noise of std 1 for the elements of `part`, float32, in its local shape."""
        noise = torch.zeros(part.local.shape, dtype=torch.float32, device=part.local.device)
        if noise.is_cuda:
            self.add_on_gpu([(noise, part)], std=1.0)
        elif noise.numel():
            pieces = [
                self._block(part, block)[first:last]
                for block, first, last in _overlaps(part.start, part.stop)
            ]
            noise = torch.cat(pieces).view(part.local.shape)
        return noise

    def add_to(self, totals: Sequence[tuple[Tensor, LocalPart]], *, std: float) -> None:
        """Add noise of std `std` to tensors in place, each sharded as the part beside it."""
        on_gpu = [t for t in totals if t[0].dtype == torch.float32 and t[0].is_cuda]
        self.add_on_gpu([t for t in on_gpu if t[0].is_contiguous()], std=std)
        done = {id(total) for total, _ in on_gpu if total.is_contiguous()}
        for total, part in totals:
            if id(total) not in done:
                total.add_(self.standard_normal(part).to(total.dtype), alpha=std)

    def add_on_gpu(self, totals: Sequence[tuple[Tensor, LocalPart]], *, std: float) -> None:
        if not totals:
            return
        from dpsgd_track.kernels.gaussian_noise.triton import add_gaussian

        key = _words(f"{self.key}/{self.step}")
        keys = [(*key, *_words(f"{self.key}/{part.name}")) for _, part in totals]
        add_gaussian([t for t, _ in totals], [part.start for _, part in totals], keys, std=std)

    def _block(self, part: LocalPart, block: int) -> Tensor:
        # The whole block is drawn even if less is needed: the numbers that a generator gives depend
        # on how many are drawn, which must not depend on the shard.
        size = min(BLOCK_ELEMENTS, part.num_elements - block * BLOCK_ELEMENTS)
        # torch's own generator uses 32 bits of a seed: among 100,000 blocks two would coincide, and
        # trying all seeds would find the key.
        name = f"{self.key}/{self.step}/{part.name}/{block}".encode()
        digest = hashlib.blake2b(name, digest_size=_KEY_BYTES).digest()
        bits = np.random.SFC64(int.from_bytes(digest, "little"))
        return torch.from_numpy(np.random.Generator(bits).standard_normal(size, np.float32))


@lru_cache(maxsize=1 << 16)
def _words(name: str) -> tuple[int, int]:
    """Digest of `name` as two 32-bit words."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _overlaps(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(block, first, last) of each block that [start, stop) overlaps, positions in the block."""
    for block in range(start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS)):
        offset = block * BLOCK_ELEMENTS
        yield block, max(start - offset, 0), min(stop - offset, BLOCK_ELEMENTS)


def add_noise(
    clipped: ClippedSum, parts: list[LocalPart], noise_multiplier: float, source: NoiseSource
) -> None:
    """Add normal(0, (sigma C)^2) to this rank's shards of the clipped sum, in place.

    Args:
        clipped: the sum, whose sensitivity the noise is calibrated to.
        parts: name and position of each shard in its whole parameter.
        noise_multiplier: sigma.
        source: draws the noise.
    Raises:
        ValueError: sigma is above 0, but the sum's sensitivity is not finite.
    """
    if noise_multiplier == 0:
        return
    std = noise_multiplier * clipped.sensitivity
    if not math.isfinite(std):
        raise ValueError(
            f"sensitivity={clipped.sensitivity!r}: expected a finite bound to calibrate noise to. "
            "Clip the gradients first."
        )
    source.add_to([(clipped.gradients[part.name], part) for part in parts], std=std)
