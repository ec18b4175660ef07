"""Builds the model: transformers' own code, weights a function of the seed or loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from dpsgd_track.config import ModelConfig, require
from dpsgd_track.training.model_source import ModelSource, resolve_model


def build_model(
    config: ModelConfig, *, num_labels: int, seed: int, device: torch.device
) -> nn.Module:
    """A float32 sequence classifier in training mode, whole, on `device`.

    Random weights (all of a preset's, the new head of a pretrained model) depend on `seed` and
    the kind of device alone. Dropout is switched off: a comparison needs one function.

    Raises:
        ValueError: the configuration or the weights can't be loaded.
    """
    # Reports of a newly initialised head say what num_labels already says.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = resolve_model(config)
    hf_config = load_config(source)
    hf_config.num_labels = num_labels
    _switch_off_dropout(hf_config)
    hf_config.use_cache = False
    if getattr(hf_config, "pad_token_id", None) is None:
        hf_config.pad_token_id = 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if source.preset is not None:
            with device:
                model = AutoModelForSequenceClassification.from_config(hf_config)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                source.path, config=hf_config, dtype=torch.float32
            )
    model = model.to(device=device, dtype=torch.float32).train()
    assert isinstance(model, nn.Module)
    return model


def load_config(source: ModelSource) -> Any:
    """transformers' configuration of a resolved model."""
    if source.preset is not None:
        values = dict(source.preset)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return AutoConfig.from_pretrained(source.path)
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model_name={source.name!r}: expected a model that can be loaded. {first_line} "
            "A gated model needs --token or HF_TOKEN."
        ) from None


def check_length(model: nn.Module, seq_length: int) -> None:
    """Raise if `seq_length` is over the built model's limit."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    require(
        limit is None or seq_length <= limit,
        "seq_length",
        seq_length,
        f"at most {limit}, the limit of the model",
        "Shorten --seq-length.",
    )


def _switch_off_dropout(hf_config: Any) -> None:
    for name, value in hf_config.to_dict().items():
        is_rate = isinstance(value, float) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("_pdrop")):
            setattr(hf_config, name, 0.0)
