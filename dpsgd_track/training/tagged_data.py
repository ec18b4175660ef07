"""Samples of a task that asks for a class of each token.

Shapes: T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dpsgd_track.config import require
from dpsgd_track.privacy.loss import IGNORED
from dpsgd_track.training.sample import (
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
from dpsgd_track.training.tagged_text import TaggedText


class TaggedTokens(Endless, Protocol):
    """An endless sequence of tokens with classes, by global index."""

    def tagged(self, index: int) -> tuple[Tokens, Tokens]:
        """At least one token, and the class of each; IGNORED if it is not predicted."""
        ...


@dataclass(frozen=True, kw_only=True)
class SyntheticTags:
    """Uniformly random tokens and classes."""

    seed: int
    vocab_size: int
    seq_length: int
    num_labels: int
    is_ragged: bool = False
    num_samples = None

    def tagged(self, index: int) -> tuple[Tokens, Tokens]:
        """Tokens 1 .. vocab_size - 1 (0 is padding), each with a class."""
        random = generator(self.seed, TOKENS, index)
        tokens = uniform_tokens(random, self.vocab_size, self.seq_length)
        if self.is_ragged:
            tokens = ragged(tokens, seed=self.seed, index=index)
        return tokens, random.integers(0, self.num_labels, size=len(tokens), dtype=np.int64)


class TokenizedTags:
    """Words through the model's tokenizer. Of a word's tokens the first has its class, and the
    others are not predicted."""

    def __init__(self, text: TaggedText, tokenizer: Any, *, seq_length: int, seed: int) -> None:
        """
        Raises:
            ValueError: the tokenizer does not say which word a token is of, or a row has no token.
        """
        kind = type(tokenizer).__name__
        allowed = "one whose fast version tells the word of each token"
        require(getattr(tokenizer, "is_fast", False), "tokenizer", kind, allowed)
        made = tokenizer(
            [list(words) for words in text.words],
            is_split_into_words=True,
            truncation=True,
            max_length=seq_length,
        )
        self.seed = seed
        self.num_samples = len(text)
        self.rows: list[tuple[Tokens, Tokens]] = []
        for number, labels in enumerate(text.labels):
            words = made.word_ids(number)
            classes = [
                IGNORED if word is None or word in words[:place] else labels[word]
                for place, word in enumerate(words)
            ]
            advice = f"Row {number + 1} has none."
            is_any = any(each != IGNORED for each in classes)
            require(is_any, "data", " ".join(text.words[number])[:40], "a word in each row", advice)
            ids = made["input_ids"][number]
            self.rows.append((np.array(ids, np.int64), np.array(classes, np.int64)))

    def tagged(self, index: int) -> tuple[Tokens, Tokens]:
        """Row at a position of the endless sequence."""
        return self.rows[row_at(index, num_rows=len(self.rows), seed=self.seed)]


@dataclass(frozen=True, kw_only=True)
class TaggedSamples:
    """Padded tokens and classes."""

    texts: TaggedTokens
    seq_length: int
    padding: str
    """right or left."""
    pad_token: int
    seed: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.seq_length

    @property
    def num_samples(self) -> int | None:
        """Rows of an epoch."""
        return self.texts.num_samples

    def sample(self, index: int) -> Sample:
        """input_ids and attention_mask [T], target [T]."""
        tokens, classes = self.texts.tagged(index)
        return Sample(
            {
                "input_ids": self._padded(tokens, self.pad_token),
                "attention_mask": self._padded(np.ones_like(tokens), 0),
            },
            self._padded(classes, IGNORED),
        )

    def _padded(self, values: Tokens, filler: int) -> Tokens:
        return padded(values, self.seq_length, filler, self.padding)
