"""The noise in numpy: Philox word by word, and its normals in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)

Words = tuple[NDArray[np.uint64], ...]
Key = tuple[int, int, int, int]
"""4 words of 32 bits: Philox's key, and the nonce in the upper half of its counter."""


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox 4x32-10.

    Args:
        counter: 4 arrays of 32-bit words, each in a uint64.
        key: 2 words.
    Returns:
        4 arrays of 32-bit words, each in a uint64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def standard_normal(start: int, num_elements: int, key: Key) -> NDArray[np.float64]:
    """Noise of std 1 for `num_elements` elements from index `start` on."""
    element = np.arange(start, start + num_elements, dtype=np.uint64)
    group = element >> np.uint64(2)
    nonce = [np.full_like(group, word) for word in key[2:]]
    words = philox((group & _LOW, group >> np.uint64(32), *nonce), key[:2])
    # Words 0 and 1 make the first two normals, words 2 and 3 the others.
    place = element & np.uint64(3)
    is_later = place >= 2
    u = np.where(is_later, words[2], words[0])
    v = np.where(is_later, words[3], words[1])
    radius = np.sqrt(-2 * np.log((u + 1.0) / 2.0**32))
    angle = 2 * np.pi * (v / 2.0**32)
    return np.where(place & np.uint64(1), radius * np.sin(angle), radius * np.cos(angle))


def add_gaussian(
    locals_: Sequence[Tensor], starts: Sequence[int], keys: Sequence[Key], *, std: float
) -> None:
    """Add noise of standard deviation `std`, in place.

    Args:
        locals_: consecutive elements of each parameter, float32.
        starts: index of their first element in the whole parameter.
        keys: key of each parameter; equal keys draw equal noise.
    """
    for local, start, key in zip(locals_, starts, keys, strict=True):
        noise = torch.from_numpy(standard_normal(start, local.numel(), key)).to(local.device)
        local.copy_(local.double() + std * noise.view(local.shape))
