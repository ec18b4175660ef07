"""The samples of a task's source: their kind, number and classes. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from dpsgd_track.config import (
    IMAGES,
    POISSON,
    REGRESSION,
    SEQ2SEQ,
    SYNTHETIC,
    TAGGING,
    DataConfig,
    ModelConfig,
)
from dpsgd_track.training.labelled_images import LabelledImages, read_images
from dpsgd_track.training.tagged_text import TaggedText, read_tagged
from dpsgd_track.training.text_pairs import TextPairs, read_pairs
from dpsgd_track.training.text_source import LabelledText, read_text

Source = LabelledText | TaggedText | TextPairs | LabelledImages

_READERS: dict[str, Callable[[str], Source]] = {
    IMAGES: read_images,
    TAGGING: read_tagged,
    SEQ2SEQ: read_pairs,
}
"""Readers of tasks; the others read labelled text."""


def read_source(source: str, task: str) -> Source:
    """Read `source` as the task takes it.

    Raises:
        ValueError: it is missing, malformed, or of another kind.
    """
    return _READERS.get(task, read_text)(source)


def population_of(data: DataConfig, task: str) -> int | None:
    """Number of samples that Poisson sampling draws from; None without Poisson sampling."""
    if data.sampling != POISSON:
        return None
    return data.dataset_size or len(read_source(data.source, task))


def num_labels_of(model: ModelConfig, data: DataConfig) -> int:
    """Outputs of a classifier (the source's classes, or the configured number) or regression."""
    if model.task == REGRESSION:
        return 1
    if data.source == SYNTHETIC:
        return model.num_labels
    source = read_source(data.source, model.task)
    return model.num_labels if isinstance(source, TextPairs) else len(source.label_names)
