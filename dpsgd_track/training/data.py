"""Samples as a function of (seed, global index) alone, and each rank's slice of a batch.

A step's global batch is either G = W K b consecutive indices; or, with Poisson sampling, each of N
indices with probability G / N, as a function of (seed, step); or a given number of consecutive
indices. Rank r takes the r-th of W slices, as equal as possible, and cuts it into micro-batches of
b samples. So the global batch depends neither on its distribution over ranks nor on other
random draws.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer

from dpsgd_track.config import (
    CAUSAL_LM,
    MASKED_LM,
    REGRESSION,
    SYNTHETIC,
    DataConfig,
    ModelConfig,
    require,
)
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import IGNORED
from dpsgd_track.privacy.sampling import num_micro_batches, poisson_draw, split_over_ranks
from dpsgd_track.training.model_source import resolve_model
from dpsgd_track.training.text_source import read_text

# Independent random streams of one seed.
_TOKENS, _ORDER, _LENGTH, _MASKED, _SAMPLING = range(5)

MASKED_FRACTION = 0.15
"""Fraction of a sample's tokens that a masked language model has to predict."""

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One sequence, padded to the sequence length."""

    input_ids: Tokens
    """[T]"""
    attention_mask: Tokens
    """[T] 1 at tokens, 0 at padding."""
    target: NDArray[Any]
    """[] int64 class, [] float32 number, or [T] int64 tokens, IGNORED if not predicted."""

    def digest(self) -> int:
        """64-bit digest of the sample's arrays."""
        content = hashlib.blake2b(digest_size=8)
        for array in (self.input_ids, self.attention_mask, self.target):
            content.update(array.tobytes())
        return int.from_bytes(content.digest(), "little", signed=True)


class Texts(Protocol):
    """An endless sequence of texts, by global index."""

    @property
    def num_samples(self) -> int | None:
        """Texts of an epoch; None if no text is ever repeated."""
        ...

    def text(self, index: int) -> tuple[Tokens, float]:
        """At least one token, and the label: a class, or a number for a regression."""
        ...


@dataclass(frozen=True, kw_only=True)
class SyntheticText:
    """Uniformly random tokens and labels: classes, or numbers from -1 to 1."""

    seed: int
    vocab_size: int
    seq_length: int
    num_labels: int
    is_ragged: bool = False
    """Draw lengths from a quarter of the sequence length, but at least 2, to all of it."""
    num_samples = None

    def text(self, index: int) -> tuple[Tokens, float]:
        """Tokens 1 .. vocab_size - 1 (0 is padding)."""
        random = _generator(self.seed, _TOKENS, index)
        tokens = random.integers(1, self.vocab_size, size=self.seq_length, dtype=np.int64)
        is_number = self.num_labels == 1
        label = random.uniform(-1, 1) if is_number else random.integers(0, self.num_labels)
        if self.is_ragged:
            shortest = min(max(self.seq_length // 4, 2), self.seq_length)
            lengths = _generator(self.seed, _LENGTH, index)
            tokens = tokens[: lengths.integers(shortest, self.seq_length + 1)]
        return tokens, float(label)


class TokenizedText:
    """Labelled text through the model's tokenizer, in a new random order each epoch."""

    def __init__(
        self, tokens: list[list[int]], labels: Sequence[float], *, seed: int, fewest: int = 1
    ) -> None:
        for row, text in enumerate(tokens, start=1):
            allowed = f"{fewest} tokens or more in every text"
            require(len(text) >= fewest, "data", f"row {row}", allowed)
        self.tokens = [np.array(text, dtype=np.int64) for text in tokens]
        self.labels = labels
        self.num_samples = len(labels)
        self.seed = seed

    def text(self, index: int) -> tuple[Tokens, float]:
        """Text at a position of the endless sequence, in which each epoch has every row once."""
        epoch, position = divmod(index, len(self.tokens))
        order = _generator(self.seed, _ORDER, epoch).permutation(len(self.tokens))
        row = int(order[position])
        return self.tokens[row], self.labels[row]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An endless sequence of samples: padded texts with the targets of a task."""

    texts: Texts
    task: str
    seq_length: int
    padding: str
    """right or left."""
    pad_token: int
    seed: int
    mask_token: int | None = None
    """Token that replaces the ones that a masked language model has to predict."""

    def sample(self, index: int) -> Sample:
        """The sample with that global index."""
        tokens, label = self.texts.text(index)
        input_ids, target = self._with_target(tokens, label, index)
        return Sample(
            self._padded(input_ids, self.pad_token),
            self._padded(np.ones_like(tokens), 0),
            self._padded(target, IGNORED) if target.ndim else target,
        )

    def _with_target(self, tokens: Tokens, label: float, index: int) -> tuple[Tokens, NDArray[Any]]:
        if self.task == CAUSAL_LM:
            return tokens, tokens
        if self.task == MASKED_LM:
            assert self.mask_token is not None
            num_masked = max(1, round(MASKED_FRACTION * len(tokens)))
            random = _generator(self.seed, _MASKED, index)
            chosen = np.isin(np.arange(len(tokens)), random.permutation(len(tokens))[:num_masked])
            return np.where(chosen, self.mask_token, tokens), np.where(chosen, tokens, IGNORED)
        return tokens, np.array(label, np.float32 if self.task == REGRESSION else np.int64)

    def _padded(self, values: Tokens, filler: int) -> Tokens:
        missing = self.seq_length - len(values)
        width = (missing, 0) if self.padding == "left" else (0, missing)
        return np.pad(values, width, constant_values=filler)


def build_dataset(model: ModelConfig, data: DataConfig, built: Any, *, seed: int) -> Dataset:
    """Dataset from the source `data` for the task of `model`.

    Args:
        built: the model, whose vocabulary and padding token are used.

    Raises:
        ValueError: the text has too few tokens, or its tokenizer no mask token.
    """
    texts: Texts
    if data.source == SYNTHETIC:
        texts = SyntheticText(
            seed=seed,
            vocab_size=built.config.vocab_size,
            seq_length=data.seq_length,
            num_labels=num_labels_of(model, data),
            is_ragged=data.ragged,
        )
        mask_token = built.config.vocab_size - 1
    else:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model).path)
        text = read_text(data.source)
        tokens = tokenizer(list(text.texts), truncation=True, max_length=data.seq_length)
        labels = text.numbers if model.task == REGRESSION else text.labels
        fewest = 2 if model.task == CAUSAL_LM else 1
        texts = TokenizedText(tokens["input_ids"], labels, seed=seed, fewest=fewest)
        mask_token = tokenizer.mask_token_id
        require(
            model.task != MASKED_LM or mask_token is not None,
            "task",
            model.task,
            f"another task, as the tokenizer of {model.name} has no mask token",
        )
    return Dataset(
        texts=texts,
        task=model.task,
        seq_length=data.seq_length,
        padding=data.padding,
        pad_token=built.config.pad_token_id,
        seed=seed,
        mask_token=mask_token,
    )


def num_labels_of(model: ModelConfig, data: DataConfig) -> int:
    """Outputs of a classifier (the text's classes, or the configured number) or regression."""
    if model.task == REGRESSION:
        return 1
    if data.source == SYNTHETIC:
        return model.num_labels
    return len(read_text(data.source).label_names)


@dataclass(frozen=True)
class RankBatch:
    """One rank's samples of one step, in micro-batches."""

    indices: tuple[int, ...]
    """Global index of each sample, in the order of the micro-batches."""
    digests: tuple[int, ...]
    """Digest of each sample."""
    batches: tuple[Batch, ...]
    """Micro-batches, the same number on every rank; the last may have fewer samples, or none."""


@dataclass(frozen=True, kw_only=True)
class RankSampler:
    """Draws a rank's samples of each step's global batch."""

    dataset: Dataset
    batch_size: int
    micro_batches: int
    rank: int
    world_size: int
    device: torch.device
    extra_inputs: frozenset[str]
    """Those of position_ids and token_type_ids that the model takes."""
    is_permuted: bool = False
    """True to reverse the order of the rank's samples: the same sum in another order."""
    population: int | None = None
    """Samples that Poisson sampling draws from (N); None for consecutive samples."""
    sizes: tuple[int, ...] = ()
    """Samples of each step, consecutive, over all ranks; empty for G in every step."""

    @property
    def expected_batch_size(self) -> int:
        """Samples a step is expected to hold over all ranks and micro-batches (G)."""
        return self.world_size * self.micro_batches * self.batch_size

    def rank_batch(self, step: int) -> RankBatch:
        """This rank's samples of `step`, in micro-batches."""
        slices = split_over_ranks(self._global_batch(step), self.world_size)
        num_batches = num_micro_batches(len(slices[0]), self.batch_size)
        indices = slices[self.rank].tolist()
        if self.is_permuted:
            indices.reverse()
        samples = [self.dataset.sample(index) for index in indices]
        starts = range(0, num_batches * self.batch_size, self.batch_size)
        chunks = [samples[start : start + self.batch_size] for start in starts]
        return RankBatch(
            tuple(indices),
            tuple(sample.digest() for sample in samples),
            tuple(self._batch(chunk) for chunk in chunks),
        )

    def leaves_some_empty(self, step: int) -> bool:
        """True if a micro-batch of `step` is empty on some rank."""
        slices = split_over_ranks(self._global_batch(step), self.world_size)
        return (
            len(slices[-1])
            <= (num_micro_batches(len(slices[0]), self.batch_size) - 1) * self.batch_size
        )

    def _global_batch(self, step: int) -> NDArray[np.int64]:
        size = self.expected_batch_size
        if self.sizes:
            start = sum(self.sizes[:step])
            return np.arange(start, start + self.sizes[step])
        if self.population is None:
            return np.arange(step * size, (step + 1) * size)
        random = _generator(self.dataset.seed, _SAMPLING, step)
        return poisson_draw(random, self.population, size / self.population)

    def _batch(self, chosen: list[Sample]) -> Batch:
        # An empty batch has the types and shapes of any other.
        samples = chosen or [self.dataset.sample(0)]
        input_ids = torch.from_numpy(np.stack([s.input_ids for s in samples]))
        attention_mask = torch.from_numpy(np.stack([s.attention_mask for s in samples]))
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        # By default a model makes one row of these for all samples, for which Opacus would see
        # the sum of the samples' gradients.
        if "position_ids" in self.extra_inputs:
            # A sample's first token is at position 0, also after padding on the left.
            inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        if "token_type_ids" in self.extra_inputs:
            inputs["token_type_ids"] = torch.zeros_like(input_ids)
        targets = torch.from_numpy(np.stack([sample.target for sample in samples]))
        batch = Batch({k: v.to(self.device) for k, v in inputs.items()}, targets.to(self.device))
        if chosen:
            return batch
        return Batch({name: t[:0] for name, t in batch.inputs.items()}, batch.targets[:0])


def extra_inputs_of(model: nn.Module) -> frozenset[str]:
    """Optional index inputs that the model's forward takes, of position_ids and token_type_ids.

    RoBERTa and its relatives derive positions from the tokens, and get none. Types are given where
    the model has a table of them: GPT-2 looks them up in its table of tokens, and without them
    leaves them out.
    """
    wanted = {"position_ids", "token_type_ids"}
    if any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        wanted.discard("position_ids")
    if not any("token_type" in name for name, _ in model.named_modules()):
        wanted.discard("token_type_ids")
    return frozenset(wanted & set(inspect.signature(model.forward).parameters))


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, stream, index)."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
