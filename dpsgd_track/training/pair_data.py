"""Samples of a task that reads a source and writes a target.

The decoder reads a start token and then the targets but the last, so that the output of a position
predicts the target of that position. Padding of a target is on its right, and not predicted.

Shapes: T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dpsgd_track.privacy.loss import IGNORED
from dpsgd_track.training.sample import (
    LENGTH,
    TARGET_LENGTH,
    TARGETS,
    TOKENS,
    Endless,
    Sample,
    Tokens,
    generator,
    padded,
    ragged,
    row_at,
    uniform_tokens,
)
from dpsgd_track.training.text_pairs import TextPairs


class TokenPairs(Endless, Protocol):
    """An endless sequence of source and target tokens, by global index."""

    def pair(self, index: int) -> tuple[Tokens, Tokens]:
        """At least one token of each."""
        ...


@dataclass(frozen=True, kw_only=True)
class SyntheticPairs:
    """Uniformly random tokens."""

    seed: int
    vocab_size: int
    seq_length: int
    is_ragged: bool = False
    num_samples = None

    def pair(self, index: int) -> tuple[Tokens, Tokens]:
        """Tokens 1 .. vocab_size - 1 (0 is padding)."""
        return self._tokens(TOKENS, LENGTH, index), self._tokens(TARGETS, TARGET_LENGTH, index)

    def _tokens(self, stream: int, lengths: int, index: int) -> Tokens:
        random = generator(self.seed, stream, index)
        tokens = uniform_tokens(random, self.vocab_size, self.seq_length)
        if not self.is_ragged:
            return tokens
        return ragged(tokens, seed=self.seed, index=index, stream=lengths)


class TokenizedPairs:
    """Pairs of texts through the model's tokenizer."""

    def __init__(self, text: TextPairs, tokenizer: Any, *, seq_length: int, seed: int) -> None:
        cut = {"truncation": True, "max_length": seq_length}
        sources = tokenizer(list(text.sources), **cut)["input_ids"]
        targets = tokenizer(text_target=list(text.targets), **cut)["input_ids"]
        self.seed = seed
        self.num_samples = len(text)
        self.rows = [
            (np.array(source, np.int64), np.array(target, np.int64))
            for source, target in zip(sources, targets, strict=True)
        ]
        for number, row in enumerate(self.rows, start=1):
            if not all(map(len, row)):
                raise ValueError(f"data=row {number}: expected a token in source and target.")

    def pair(self, index: int) -> tuple[Tokens, Tokens]:
        """Row at a position of the endless sequence."""
        return self.rows[row_at(index, num_rows=len(self.rows), seed=self.seed)]


@dataclass(frozen=True, kw_only=True)
class PairSamples:
    """Padded sources and targets."""

    texts: TokenPairs
    seq_length: int
    padding: str
    """Side of the source that is padded: right or left."""
    pad_token: int
    start_token: int
    """First token that the decoder reads."""
    seed: int

    @property
    def num_tokens(self) -> int:
        """Source and target."""
        return 2 * self.seq_length

    @property
    def num_samples(self) -> int | None:
        """Rows of an epoch."""
        return self.texts.num_samples

    def sample(self, index: int) -> Sample:
        """input_ids, attention_mask and decoder_input_ids [T], target [T]."""
        source, target = self.texts.pair(index)
        length = self.seq_length
        read = np.concatenate([[self.start_token], target[:-1]]).astype(np.int64)
        return Sample(
            {
                "input_ids": padded(source, length, self.pad_token, self.padding),
                "attention_mask": padded(np.ones_like(source), length, 0, self.padding),
                "decoder_input_ids": padded(read, length, self.pad_token),
            },
            padded(target, length, IGNORED),
        )


def start_token_of(built: Any, pad_token: int) -> int:
    """First token that a model's decoder reads; the padding token where the model names none."""
    for settings in (getattr(built, "config", None), getattr(built, "generation_config", None)):
        token = getattr(settings, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    return pad_token
