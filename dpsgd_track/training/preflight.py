"""Checks of model and data that need no process group. Importing it imports no torch."""

from __future__ import annotations

from dpsgd_track.config import (
    CAUSAL_LM,
    CLASSIFICATION,
    REGRESSION,
    SYNTHETIC,
    DataConfig,
    ModelConfig,
    require,
)
from dpsgd_track.training.hub import check_hub_model
from dpsgd_track.training.model_source import ModelSource, resolve_model
from dpsgd_track.training.text_source import read_text


def check_inputs(model: ModelConfig, data: DataConfig) -> None:
    """Raise unless the model and the data exist and fit each other.

    Raises:
        ValueError: they do not; the message says why.
    """
    source = resolve_model(model)
    if source.is_on_hub:
        check_hub_model(model.name)
    limit = source.max_seq_length()
    require(
        limit is None or data.seq_length <= limit,
        "seq_length",
        data.seq_length,
        f"at most {limit}, the limit of {model.name}",
        "Shorten --seq-length.",
    )
    require(
        model.task != CAUSAL_LM or data.seq_length >= 2,
        "seq_length",
        data.seq_length,
        f"at least 2 for {CAUSAL_LM}, where each token predicts the next",
    )
    _check_task(model, source)
    if data.source == SYNTHETIC:
        return
    text = read_text(data.source)
    if model.task == REGRESSION:
        # Raises where a label is not a number.
        _ = text.numbers
    require(
        source.has_tokenizer,
        "data",
        data.source,
        f"synthetic, since the preset {model.name} has no tokenizer",
        "Choose a model with one, such as --model-name minilm.",
    )


def _check_task(model: ModelConfig, source: ModelSource) -> None:
    """Raise unless the model has a head for its task; a hub id's is checked by its workers."""
    if model.task == CLASSIFICATION or source.is_on_hub:
        return
    # Only transformers knows the heads of a model, and it takes seconds to import.
    from dpsgd_track.training.model import check_task, load_config

    check_task(model, load_config(source))
