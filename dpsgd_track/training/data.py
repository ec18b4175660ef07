"""Samples as a function of (seed, global index) alone, and a rank's slice of them.

A step's global batch is G = W K b consecutive indices; rank r takes the r-th of W equal slices
and cuts it into K micro-batches. The global batch is therefore the same however it is shared
out, and nothing else that draws random numbers can change it.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer

from dpsgd_track.config import SYNTHETIC, DataConfig
from dpsgd_track.privacy.engine import Batch
from dpsgd_track.training.model_source import ModelSource
from dpsgd_track.training.text_source import LabelledText, read_text

# Streams of one seed that must not meet.
_TOKENS, _ORDER = 0, 1


@dataclass(frozen=True)
class Sample:
    """One sequence, padded to the sequence length."""

    input_ids: NDArray[np.int64]
    """[T]"""
    attention_mask: NDArray[np.int64]
    """[T] 1 at tokens, 0 at padding."""
    target: int
    """Class."""

    def digest(self) -> int:
        """64-bit digest of everything the sample holds."""
        content = hashlib.blake2b(digest_size=8)
        content.update(self.input_ids.tobytes())
        content.update(self.attention_mask.tobytes())
        content.update(self.target.to_bytes(8, "little"))
        return int.from_bytes(content.digest(), "little", signed=True)


class Dataset(Protocol):
    """Endless samples by global index."""

    num_labels: int
    num_samples: int | None
    """Samples of an epoch; None where none ever comes again."""

    def sample(self, index: int) -> Sample:
        """The sample with that global index."""
        ...


class SyntheticText:
    """Uniformly random tokens and classes."""

    num_samples = None

    def __init__(self, *, seed: int, vocab_size: int, seq_length: int, num_labels: int) -> None:
        self.seed, self.vocab_size, self.seq_length = seed, vocab_size, seq_length
        self.num_labels = num_labels

    def sample(self, index: int) -> Sample:
        """Tokens 1 .. vocab_size - 1 (0 is padding), no padding."""
        random = _generator(self.seed, _TOKENS, index)
        return Sample(
            random.integers(1, self.vocab_size, size=self.seq_length, dtype=np.int64),
            np.ones(self.seq_length, dtype=np.int64),
            int(random.integers(0, self.num_labels)),
        )


class TokenizedText:
    """Labelled text through the model's tokenizer, in a new random order each epoch."""

    def __init__(self, text: LabelledText, tokenizer: Any, *, seed: int, seq_length: int) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        encoded = tokenizer(
            list(text.texts), truncation=True, max_length=seq_length, padding="max_length"
        )
        self.input_ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        self.attention_mask = np.asarray(encoded["attention_mask"], dtype=np.int64)
        self.targets = text.labels
        self.num_labels = len(text.label_names)
        self.num_samples = len(text.labels)
        self.seed = seed

    def sample(self, index: int) -> Sample:
        """Every row once an epoch."""
        epoch, position = divmod(index, len(self.targets))
        order = _generator(self.seed, _ORDER, epoch).permutation(len(self.targets))
        row = int(order[position])
        return Sample(self.input_ids[row], self.attention_mask[row], self.targets[row])


def build_dataset(config: DataConfig, source: ModelSource, model: nn.Module, *, seed: int) -> Any:
    """The data that `config` names, fit for `model`."""
    model_config: Any = model.config
    if config.source == SYNTHETIC:
        return SyntheticText(
            seed=seed,
            vocab_size=model_config.vocab_size,
            seq_length=config.seq_length,
            num_labels=model_config.num_labels,
        )
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    return TokenizedText(
        read_text(config.source), tokenizer, seed=seed, seq_length=config.seq_length
    )


def num_labels_of(config: DataConfig, default: int) -> int:
    """Classes in the data; `default` for synthetic data, which has as many as asked for."""
    if config.source == SYNTHETIC:
        return default
    return len(read_text(config.source).label_names)


@dataclass(frozen=True)
class Slice:
    """What one rank computes in one step."""

    indices: tuple[int, ...]
    """Global index of each sample, in the order of the micro-batches."""
    digests: tuple[int, ...]
    """Digest of each sample."""
    batches: tuple[Batch, ...]
    """K micro-batches."""


@dataclass(frozen=True, kw_only=True)
class Slicer:
    """Cuts a rank's share out of each step's global batch."""

    dataset: Dataset
    batch_size: int
    micro_batches: int
    rank: int
    world_size: int
    device: torch.device
    extra_inputs: frozenset[str]
    """Which of position_ids and token_type_ids the model takes."""
    is_permuted: bool = False
    """Reverse the rank's order: the same sum in another order of additions."""

    @property
    def global_batch_size(self) -> int:
        """Samples in a step over all ranks and micro-batches."""
        return self.world_size * self.micro_batches * self.batch_size

    def slice(self, step: int) -> Slice:
        """This rank's share of `step`."""
        share = self.micro_batches * self.batch_size
        first = step * self.global_batch_size + self.rank * share
        indices = list(range(first, first + share))
        if self.is_permuted:
            indices.reverse()
        samples = [self.dataset.sample(index) for index in indices]
        chunks = [samples[i : i + self.batch_size] for i in range(0, share, self.batch_size)]
        return Slice(
            tuple(indices),
            tuple(sample.digest() for sample in samples),
            tuple(self._batch(chunk) for chunk in chunks),
        )

    def _batch(self, samples: list[Sample]) -> Batch:
        input_ids = torch.from_numpy(np.stack([s.input_ids for s in samples]))
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.from_numpy(np.stack([s.attention_mask for s in samples])),
        }
        # Left to itself, a model makes one row of these for all samples, and Opacus then sees
        # the sum of the samples' gradients where it should see each.
        if "position_ids" in self.extra_inputs:
            positions = torch.arange(input_ids.shape[1])
            inputs["position_ids"] = positions.repeat(len(samples), 1)
        if "token_type_ids" in self.extra_inputs:
            inputs["token_type_ids"] = torch.zeros_like(input_ids)
        target = torch.tensor([sample.target for sample in samples])
        return Batch({k: v.to(self.device) for k, v in inputs.items()}, target.to(self.device))


def extra_inputs_of(model: nn.Module) -> frozenset[str]:
    """Which optional index inputs are given to the model: those its forward takes.

    RoBERTa and its kin number positions by the tokens themselves; theirs are left to them.
    """
    wanted = {"position_ids", "token_type_ids"}
    if any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        wanted.discard("position_ids")
    return frozenset(wanted & set(inspect.signature(model.forward).parameters))


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Its own counter-based stream for each (seed, stream, index)."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
