"""Gaussian noise for a clipped sum, a function of (key, step, parameter, element).

A rank draws noise for the elements it holds and for no others, so that the noise of an element
does not depend on how many ranks there are, shards never repeat each other's noise, and nothing
else that is random can shift it. A digest of what the noise is for makes what one key draws for
different steps and parameters independent, on any rank.

On a GPU the generator counts elements (`kernels.gaussian_noise`): a step has a key, a parameter a
nonce beside the count. On a CPU, where that would be slow, noise is drawn in blocks of consecutive
elements of the whole parameter, each from a generator of its own. The bits are equal on devices of
one kind.

With `fresh_key` nobody can know the key. But no generator here is cryptographically secure: who
sees much of the raw noise of one block may in principle predict the rest of that block.
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

    Ranks that share a key agree on the noise of an element that several of them hold, and draw
    different noise for different elements.

    Args:
        group: ranks that are to share the key; None: all, or this process if it is alone.
        device: where the group's backend communicates.
    """
    key = torch.tensor(list(secrets.token_bytes(_KEY_BYTES)), dtype=torch.uint8, device=device)
    if dist.is_initialized():
        dist.broadcast(key, group=group, group_src=0)
    return bytes(key.tolist()).hex()


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise for any part of any parameter at one step."""

    key: str
    """What the noise belongs to, such as a seed, or a `fresh_key`; equal keys draw equal noise."""
    step: int

    def standard_normal(self, part: LocalPart) -> Tensor:
        """Noise of std 1 for the elements that `part` holds, float32, in its local shape."""
        noise = torch.zeros(part.local.shape, dtype=torch.float32, device=part.local.device)
        if noise.is_cuda:
            self._add_on_gpu([(noise, part)], std=1.0)
        elif noise.numel():
            pieces = [
                self._block(part, block)[first:last]
                for block, first, last in _overlaps(part.start, part.stop)
            ]
            noise = torch.cat(pieces).view(part.local.shape)
        return noise

    def add_to(self, totals: Sequence[tuple[Tensor, LocalPart]], *, std: float) -> None:
        """Add noise to tensors that are laid out as parts are, in place."""
        on_gpu = [t for t in totals if t[0].dtype == torch.float32 and t[0].is_cuda]
        self._add_on_gpu([t for t in on_gpu if t[0].is_contiguous()], std=std)
        done = {id(total) for total, _ in on_gpu if total.is_contiguous()}
        for total, part in totals:
            if id(total) not in done:
                total.add_(self.standard_normal(part).to(total.dtype), alpha=std)

    def _add_on_gpu(self, totals: Sequence[tuple[Tensor, LocalPart]], *, std: float) -> None:
        if not totals:
            return
        from dpsgd_track.kernels.gaussian_noise.triton import add_gaussian

        key = _words(f"{self.key}/{self.step}")
        keys = [(*key, *_words(f"{self.key}/{part.name}")) for _, part in totals]
        add_gaussian([t for t, _ in totals], [part.start for _, part in totals], keys, std=std)

    def _block(self, part: LocalPart, block: int) -> Tensor:
        # The whole block is drawn even where less is needed: how a generator fills a tensor
        # depends on the tensor's length, which must not depend on the shard.
        size = min(BLOCK_ELEMENTS, part.num_elements - block * BLOCK_ELEMENTS)
        # torch's own generator heeds 32 bits of a seed: among 100,000 blocks two would be alike,
        # and a seed could be found by trying all.
        name = f"{self.key}/{self.step}/{part.name}/{block}".encode()
        digest = hashlib.blake2b(name, digest_size=_KEY_BYTES).digest()
        bits = np.random.SFC64(int.from_bytes(digest, "little"))
        return torch.from_numpy(np.random.Generator(bits).standard_normal(size, np.float32))


@lru_cache(maxsize=1 << 16)
def _words(what: str) -> tuple[int, int]:
    """Two words of 32 bits that belong to `what`."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


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
    source.add_to([(clipped.gradients[part.name], part) for part in parts], std=std)
