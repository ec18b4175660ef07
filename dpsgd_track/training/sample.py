"""One sample of a task, and what an endless sequence of them is.

Shapes: T positions, C channels, S pixels of a side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

# Independent random streams of one seed.
TOKENS, ORDER, LENGTH, MASKED, SAMPLING, PIXELS, TARGETS, TARGET_LENGTH = range(8)


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, stream, index)."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniform_tokens(random: np.random.Generator, vocab_size: int, seq_length: int) -> Tokens:
    """Random tokens 1 .. vocab_size - 1; 0 is padding."""
    return random.integers(1, vocab_size, size=seq_length, dtype=np.int64)


def row_at(index: int, *, num_rows: int, seed: int) -> int:
    """Row at a position of an endless sequence: a new random order of all rows each epoch."""
    epoch, position = divmod(index, num_rows)
    return int(generator(seed, ORDER, epoch).permutation(num_rows)[position])


def ragged(tokens: Tokens, *, seed: int, index: int, stream: int = LENGTH) -> Tokens:
    """The first tokens: from a quarter of them, but at least 2, to all."""
    shortest = min(max(len(tokens) // 4, 2), len(tokens))
    return tokens[: generator(seed, stream, index).integers(shortest, len(tokens) + 1)]


@dataclass(frozen=True)
class Sample:
    """One sample, padded to the length of all."""

    inputs: Mapping[str, NDArray[Any]]
    """The model's keyword arguments: [T] int64 tokens and 1 at tokens, 0 at padding, or [C, S, S]
    float32 pixels."""
    target: NDArray[Any]
    """[] int64 class, [] float32 number, or [T] int64 tokens or classes, IGNORED if not
    predicted."""

    def digest(self) -> int:
        """64-bit digest of the sample's arrays."""
        content = hashlib.blake2b(digest_size=8)
        for array in (*self.inputs.values(), self.target):
            content.update(array.tobytes())
        return int.from_bytes(content.digest(), "little", signed=True)


class Endless(Protocol):
    """An endless sequence by global index, of rows that may repeat."""

    @property
    def num_samples(self) -> int | None:
        """Rows of an epoch; None if none is ever repeated."""
        ...


class Samples(Protocol):
    """An endless sequence of samples, by global index; a function of the seed."""

    @property
    def seed(self) -> int:
        """Seed of all samples."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample, padding included; 1 for an image."""
        ...

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch; None if none is ever repeated."""
        ...

    def sample(self, index: int) -> Sample:
        """The sample with that global index."""
        ...


def padded(values: Tokens, length: int, filler: int, side: str = "right") -> Tokens:
    """`values` with `filler` on a side, up to `length`."""
    missing = length - len(values)
    width = (missing, 0) if side == "left" else (0, missing)
    return np.pad(values, width, constant_values=filler)
