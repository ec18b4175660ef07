"""Checks of model and data that need no process group. Imports no torch."""

from __future__ import annotations

from dpsgd_track.config import SYNTHETIC, DataConfig, ModelConfig, require
from dpsgd_track.training.model_source import resolve_model
from dpsgd_track.training.text_source import read_text


def check_inputs(model: ModelConfig, data: DataConfig) -> None:
    """Raise unless the model and the data exist and fit each other.

    Raises:
        ValueError: saying what does not.
    """
    source = resolve_model(model)
    limit = source.max_seq_length()
    require(
        limit is None or data.seq_length <= limit,
        "seq_length",
        data.seq_length,
        f"at most {limit}, the limit of {model.name}",
        "Shorten --seq-length.",
    )
    if data.source == SYNTHETIC:
        return
    read_text(data.source)
    require(
        source.has_tokenizer,
        "data",
        data.source,
        f"synthetic, since the preset {model.name} has no tokenizer",
        "Choose a model with one, such as --model-name minilm.",
    )
