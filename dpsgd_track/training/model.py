"""Builds a model from transformers' classes, with weights from the seed or loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from dpsgd_track.config import (
    CAUSAL_LM,
    CLASSIFICATION,
    MASKED_LM,
    PROBE_MODEL,
    REGRESSION,
    ModelConfig,
    require,
)
from dpsgd_track.training.model_source import ModelSource, resolve_model
from dpsgd_track.training.probe import build_probe

_HEADS: dict[str, Any] = {
    CLASSIFICATION: AutoModelForSequenceClassification,
    CAUSAL_LM: AutoModelForCausalLM,
    MASKED_LM: AutoModelForMaskedLM,
    # A classifier with one output, trained with a regression loss.
    REGRESSION: AutoModelForSequenceClassification,
}
"""transformers' model class for each task."""


def build_model(
    config: ModelConfig, *, num_labels: int, seed: int, device: torch.device
) -> nn.Module:
    """An unsharded float32 model with the task's head, in training mode, on `device`.

    Random weights (all of a preset's, the new head of a pretrained model) depend on `seed` and
    the kind of device alone. Dropout is off unless the configuration enables it.

    Args:
        num_labels: outputs of a classifier or regression.

    Raises:
        ValueError: the configuration or the weights cannot be loaded, or the model does not support
            the task or gradient checkpointing.
    """
    if config == PROBE_MODEL:
        return build_probe(seed=seed, device=device)
    # Silences reports of a newly initialised head, which num_labels implies.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = resolve_model(config)
    hf_config = load_config(source)
    check_task(config, hf_config)
    hf_config.num_labels = num_labels
    if not config.dropout:
        _switch_off_dropout(hf_config)
    if config.task == CAUSAL_LM and hasattr(hf_config, "is_decoder"):
        # Otherwise a bidirectional encoder would see the token that it has to predict.
        hf_config.is_decoder = True
    hf_config.use_cache = False
    # Some configurations have none, or -1, which is no row of an embedding.
    hf_config.pad_token_id = max(getattr(hf_config, "pad_token_id", None) or 0, 0)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if source.preset is not None:
            with device:
                model = _HEADS[config.task].from_config(hf_config)
        else:
            model = _HEADS[config.task].from_pretrained(
                source.path, config=hf_config, dtype=torch.float32
            )
    model = model.to(device=device, dtype=torch.float32).train()
    if config.gradient_checkpointing:
        _checkpoint_gradients(model, config)
    assert isinstance(model, nn.Module)
    return model


def check_task(config: ModelConfig, hf_config: Any) -> None:
    """Raise ValueError unless transformers has the task's head for this kind of model."""
    able = [task for task, head in _HEADS.items() if type(hf_config) in head._model_mapping]
    require(
        config.task in able,
        "task",
        config.task,
        f"one of {', '.join(able)} for {config.name}, a {hf_config.model_type} model"
        if able
        else f"another model than {config.name}: no task has a head for {hf_config.model_type}",
        "Choose another --task or --model-name.",
    )


def _checkpoint_gradients(model: Any, config: ModelConfig) -> None:
    require(
        model.supports_gradient_checkpointing,
        "gradient_checkpointing",
        True,
        f"a model that can recompute its blocks, which {config.name} can't",
        "Leave out --gradient-checkpointing.",
    )
    # transformers has renamed the method, and newer versions warn of the old name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


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
    """Raise ValueError if `seq_length` exceeds the model's limit."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding_index = getattr(module, "padding_idx", None)
        if limit is not None and name.endswith("position_embeddings") and padding_index is not None:
            # RoBERTa and its relatives count positions from the padding index on.
            limit -= padding_index + 1
    require(
        limit is None or seq_length <= limit,
        "seq_length",
        seq_length,
        f"at most {limit}, the limit of the model",
        "Shorten --seq-length.",
    )


def perturb_inputs(model: Any, seed: int) -> None:
    """Move each output of the input embedding by one unit in the last place, up or down at random.

    The directions are the same at every call. The effect on a step is that of any error of one unit
    in the last place.
    """

    def move(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        signs = torch.Generator().manual_seed(seed % 2**63)
        up = torch.randint(0, 2, output.shape, generator=signs, dtype=torch.bool)
        start = output.detach()
        end = torch.where(up.to(start.device), math.inf, -math.inf).to(start.dtype)
        return output + (torch.nextafter(start, end) - start)

    model.get_input_embeddings().register_forward_hook(move)


def _switch_off_dropout(hf_config: Any) -> None:
    for name, value in hf_config.to_dict().items():
        is_rate = isinstance(value, float) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("_pdrop")):
            setattr(hf_config, name, 0.0)
