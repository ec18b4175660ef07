"""Samples as a function of (seed, global index) alone, and each rank's slice of a batch.

A step's global batch is either G = W K b consecutive indices; or, with Poisson sampling, each of N
indices with probability G / N, as a function of (seed, step); or a given number of consecutive
indices. Rank r takes the r-th of W slices, as equal as possible, and cuts it into micro-batches of
b samples. So the global batch depends neither on its distribution over ranks nor on other
random draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from dpsgd_track.config import (
    CAUSAL_LM,
    IMAGES,
    MASKED_LM,
    REGRESSION,
    SEQ2SEQ,
    SYNTHETIC,
    TAGGING,
    DataConfig,
    ModelConfig,
    require,
)
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import IGNORED
from dpsgd_track.privacy.sampling import num_micro_batches, poisson_draw, split_over_ranks
from dpsgd_track.training.image_data import (
    DEFAULT_CHANNELS,
    DecodedImages,
    SyntheticImages,
    image_size_of,
    processor_of,
)
from dpsgd_track.training.labelled_images import read_images
from dpsgd_track.training.model_source import resolve_model
from dpsgd_track.training.pair_data import (
    PairSamples,
    SyntheticPairs,
    TokenizedPairs,
    start_token_of,
)
from dpsgd_track.training.sample import (
    MASKED,
    SAMPLING,
    TOKENS,
    Endless,
    Sample,
    Samples,
    Tokens,
    generator,
    padded,
    ragged,
    row_at,
    uniform_tokens,
)
from dpsgd_track.training.tagged_data import (
    SyntheticTags,
    TaggedSamples,
    TokenizedTags,
)
from dpsgd_track.training.tagged_text import read_tagged
from dpsgd_track.training.task_source import num_labels_of
from dpsgd_track.training.text_pairs import read_pairs
from dpsgd_track.training.text_source import read_text

MASKED_FRACTION = 0.15
"""Fraction of a sample's tokens that a masked language model has to predict."""


class Texts(Endless, Protocol):
    """An endless sequence of texts, by global index."""

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
        random = generator(self.seed, TOKENS, index)
        tokens = uniform_tokens(random, self.vocab_size, self.seq_length)
        is_number = self.num_labels == 1
        label = random.uniform(-1, 1) if is_number else random.integers(0, self.num_labels)
        if self.is_ragged:
            tokens = ragged(tokens, seed=self.seed, index=index)
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
        row = row_at(index, num_rows=len(self.tokens), seed=self.seed)
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
            {
                "input_ids": self._padded(input_ids, self.pad_token),
                "attention_mask": self._padded(np.ones_like(tokens), 0),
            },
            self._padded(target, IGNORED) if target.ndim else target,
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.seq_length

    @property
    def num_samples(self) -> int | None:
        """Texts of an epoch."""
        return self.texts.num_samples

    def _with_target(self, tokens: Tokens, label: float, index: int) -> tuple[Tokens, NDArray[Any]]:
        if self.task == CAUSAL_LM:
            return tokens, tokens
        if self.task == MASKED_LM:
            assert self.mask_token is not None
            num_masked = max(1, round(MASKED_FRACTION * len(tokens)))
            random = generator(self.seed, MASKED, index)
            chosen = np.isin(np.arange(len(tokens)), random.permutation(len(tokens))[:num_masked])
            return np.where(chosen, self.mask_token, tokens), np.where(chosen, tokens, IGNORED)
        return tokens, np.array(label, np.float32 if self.task == REGRESSION else np.int64)

    def _padded(self, values: Tokens, filler: int) -> Tokens:
        return padded(values, self.seq_length, filler, self.padding)


def build_dataset(model: ModelConfig, data: DataConfig, built: Any, *, seed: int) -> Samples:
    """Samples from the source `data` for the task of `model`.

    Args:
        built: the model, whose vocabulary, padding token and image size are used.

    Raises:
        ValueError: the source does not fit the model or its tokenizer.
    """
    build = {IMAGES: _images, TAGGING: _tagged, SEQ2SEQ: _pairs}.get(model.task, _texts)
    return build(model, data, built, seed)


def _texts(model: ModelConfig, data: DataConfig, built: Any, seed: int) -> Samples:
    texts: Texts
    if data.source == SYNTHETIC:
        vocab_size = vocab_size_of(model, built)
        texts = SyntheticText(
            seed=seed,
            vocab_size=vocab_size,
            seq_length=data.seq_length,
            num_labels=num_labels_of(model, data),
            is_ragged=data.ragged,
        )
        mask_token = vocab_size - 1
    else:
        tokenizer = _tokenizer(model)
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
        pad_token=_pad_token(built),
        seed=seed,
        mask_token=mask_token,
    )


def _tagged(model: ModelConfig, data: DataConfig, built: Any, seed: int) -> Samples:
    texts: SyntheticTags | TokenizedTags
    if data.source == SYNTHETIC:
        texts = SyntheticTags(
            seed=seed,
            vocab_size=vocab_size_of(model, built),
            seq_length=data.seq_length,
            num_labels=num_labels_of(model, data),
            is_ragged=data.ragged,
        )
    else:
        text, tokenizer = read_tagged(data.source), _tokenizer(model)
        texts = TokenizedTags(text, tokenizer, seq_length=data.seq_length, seed=seed)
    return TaggedSamples(
        texts=texts,
        seq_length=data.seq_length,
        padding=data.padding,
        pad_token=_pad_token(built),
        seed=seed,
    )


def _pairs(model: ModelConfig, data: DataConfig, built: Any, seed: int) -> Samples:
    texts: SyntheticPairs | TokenizedPairs
    if data.source == SYNTHETIC:
        texts = SyntheticPairs(
            seed=seed,
            vocab_size=vocab_size_of(model, built),
            seq_length=data.seq_length,
            is_ragged=data.ragged,
        )
    else:
        text, tokenizer = read_pairs(data.source), _tokenizer(model)
        texts = TokenizedPairs(text, tokenizer, seq_length=data.seq_length, seed=seed)
    pad_token = _pad_token(built)
    return PairSamples(
        texts=texts,
        seq_length=data.seq_length,
        padding=data.padding,
        pad_token=pad_token,
        start_token=start_token_of(built, pad_token),
        seed=seed,
    )


def _images(model: ModelConfig, data: DataConfig, built: Any, seed: int) -> Samples:
    config = getattr(built, "config", None)
    size = image_size_of(config, data.image_size)
    num_channels = getattr(config, "num_channels", DEFAULT_CHANNELS)
    if data.source == SYNTHETIC:
        return SyntheticImages(
            seed=seed,
            num_channels=num_channels,
            size=size,
            num_labels=num_labels_of(model, data),
        )
    is_colour = num_channels == DEFAULT_CHANNELS
    require(is_colour, "data", data.source, f"synthetic, as {model.name} takes no colours")
    return DecodedImages(
        seed=seed,
        images=read_images(data.source),
        processor=processor_of(resolve_model(model).path, size),
        size=size,
    )


def _tokenizer(model: ModelConfig) -> Any:
    return AutoTokenizer.from_pretrained(resolve_model(model).path)


def _pad_token(built: Any) -> int:
    token = getattr(getattr(built, "config", None), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def vocab_size_of(model: ModelConfig, built: Any) -> int:
    """Tokens of a model's vocabulary.

    Raises:
        ValueError: neither the model nor the user says how many.
    """
    own = getattr(getattr(built, "config", None), "vocab_size", None)
    size = own if isinstance(own, int) else model.vocab_size
    allowed = f"the tokens that {model.name} takes, as it has no config.vocab_size"
    require(size is not None, "vocab_size", size, allowed, "Give --vocab-size.")
    assert size is not None
    return size


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

    dataset: Samples
    batch_size: int
    micro_batches: int
    rank: int
    world_size: int
    device: torch.device
    extra_inputs: frozenset[str]
    """Those of position_ids and token_type_ids that the model takes."""
    names: Mapping[str, str] | None = None
    """The model's own name of each input that it takes; None if it takes all as they are."""
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
        random = generator(self.dataset.seed, SAMPLING, step)
        return poisson_draw(random, self.population, size / self.population)

    def _batch(self, chosen: list[Sample]) -> Batch:
        # An empty batch has the types and shapes of any other.
        samples = chosen or [self.dataset.sample(0)]
        inputs = {
            name: torch.from_numpy(np.stack([sample.inputs[name] for sample in samples]))
            for name in samples[0].inputs
        }
        # By default a model makes one row of these for all samples, for which Opacus would see
        # the sum of the samples' gradients.
        if "position_ids" in self.extra_inputs:
            # A sample's first token is at position 0, also after padding on the left.
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        if "token_type_ids" in self.extra_inputs:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        if self.names is not None:
            inputs = {own: inputs[name] for name, own in self.names.items() if name in inputs}
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


def input_names_of(model: nn.Module, samples: Samples) -> Mapping[str, str] | None:
    """The name in the model's forward of each input; None for models that take all of them.

    The first input goes to the first argument of a forward that does not have its name, and those
    that the forward does not take are left out.

    Raises:
        ValueError: the forward lacks an argument without which the task is another one.
    """
    if isinstance(model, PreTrainedModel):
        return None
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = (*samples.sample(0).inputs, "position_ids", "token_type_ids")
    names = {name: name for name in given if name in parameters or takes_any}
    first = next(iter(given))
    if first not in names:
        named = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        own = next(iter(named), None)
        kind, allowed = type(model).__name__, f"a forward that takes {first}"
        require(own is not None and own not in names, "model", kind, allowed)
        assert own is not None
        names = {first: own, **names}
    lacking = {"decoder_input_ids"} & set(given) - set(names)
    kind = type(model).__name__
    require(not lacking, "model", kind, "a forward that takes decoder_input_ids, for seq2seq")
    return names
