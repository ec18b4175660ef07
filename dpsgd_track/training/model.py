"""Builds a model from transformers' classes or by a user's function, with its weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils import logging as transformers_logging

from dpsgd_track.config import (
    CAUSAL_LM,
    CLASSIFICATION,
    IMAGES,
    MASKED_LM,
    PROBE_MODEL,
    REGRESSION,
    SEQ2SEQ,
    TAGGING,
    ModelConfig,
    require,
)
from dpsgd_track.training.model_source import ModelSource, resolve_model
from dpsgd_track.training.own_model import build_own
from dpsgd_track.training.probe import build_probe

_HEADS: dict[str, Any] = {
    CLASSIFICATION: AutoModelForSequenceClassification,
    CAUSAL_LM: AutoModelForCausalLM,
    MASKED_LM: AutoModelForMaskedLM,
    # A classifier with one output, trained with a regression loss.
    REGRESSION: AutoModelForSequenceClassification,
    IMAGES: AutoModelForImageClassification,
    TAGGING: AutoModelForTokenClassification,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
}
"""transformers' model class for each task."""

_NEW_HEADS = (CLASSIFICATION, REGRESSION, IMAGES, TAGGING)
"""Tasks whose head has an output for each label: a loaded one of another size is made anew."""


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
    source = resolve_model(config)
    model = (
        build_own(source.factory, seed=seed, device=device, keeps_dropout=config.dropout)
        if source.factory is not None
        else _build_of_transformers(config, source, num_labels, seed, device)
    )
    model = model.to(device=device, dtype=torch.float32).train()
    if config.gradient_checkpointing:
        _checkpoint_gradients(model, config)
    return model


def _build_of_transformers(
    config: ModelConfig, source: ModelSource, num_labels: int, seed: int, device: torch.device
) -> nn.Module:
    # Silences reports of a newly initialised head, which num_labels implies.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
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
        if source.preset is not None or not source.has_weights:
            with device:
                model = _HEADS[config.task].from_config(hf_config)
        else:
            model = _HEADS[config.task].from_pretrained(
                source.path,
                config=hf_config,
                dtype=torch.float32,
                ignore_mismatched_sizes=config.task in _NEW_HEADS,
            )
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
        getattr(model, "supports_gradient_checkpointing", False),
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
    config: Any = getattr(model, "config", None)
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


def perturb_inputs(model: nn.Module, seed: int) -> None:
    """Move what a model reads by one unit in the last place, up or down at random.

    That is each output of the embeddings of its tokens, or each floating input of a model that
    reads no tokens. The directions are the same at every call. The effect on a step is that of any
    error of one unit in the last place.
    """

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        signs = torch.Generator().manual_seed(seed % 2**63)
        up = torch.randint(0, 2, x.shape, generator=signs, dtype=torch.bool)
        start = x.detach()
        end = torch.where(up.to(start.device), math.inf, -math.inf).to(start.dtype)
        return x + (torch.nextafter(start, end) - start)

    tables = _input_tables(model)
    for table in tables:
        table.register_forward_hook(lambda _module, _inputs, output: moved(output))
    if not tables:
        model.register_forward_pre_hook(
            lambda _module, args, kwargs: (
                tuple(map(moved, args)),
                {name: moved(x) for name, x in kwargs.items()},
            ),
            with_kwargs=True,
        )


def _input_tables(model: nn.Module) -> list[nn.Embedding]:
    """Embeddings of the tokens that a model reads, which an encoder and a decoder may share."""
    named = getattr(model, "get_input_embeddings", None)
    try:
        first = named() if named is not None else None
    except NotImplementedError:  # of transformers, where a model reads no tokens
        first = None
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if named is None:
        return tables
    if not isinstance(first, nn.Embedding):
        return []
    return [table for table in tables if table.weight is first.weight]


def _switch_off_dropout(hf_config: Any) -> None:
    for name, value in hf_config.to_dict().items():
        is_rate = isinstance(value, float) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("_pdrop")):
            setattr(hf_config, name, 0.0)
