"""Checks of model and data that need no process group. Importing it imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import dpsgd_track
from dpsgd_track.config import (
    CAUSAL_LM,
    CLASSIFICATION,
    IMAGES,
    REGRESSION,
    SYNTHETIC,
    DataConfig,
    ModelConfig,
    require,
)
from dpsgd_track.training.hub import check_hub_model
from dpsgd_track.training.model_source import MINILM, ModelSource, resolve_model
from dpsgd_track.training.task_source import read_source
from dpsgd_track.training.text_source import LabelledText

_TIMEOUT_S = 300
_TASK_FIT = "dpsgd_track.training.task_fit"


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
    allowed = f"no value but for {IMAGES}"
    is_of_task = data.image_size is None or model.task == IMAGES
    require(is_of_task, "image_size", data.image_size, allowed, "Leave --image-size out.")
    _check_task(model, source)
    _check_data(model, data, source)
    if source.factory is not None:
        _check_fit(model, data)


def _check_data(model: ModelConfig, data: DataConfig, source: ModelSource) -> None:
    if data.source == SYNTHETIC:
        return
    read = read_source(data.source, model.task)
    if model.task == REGRESSION and isinstance(read, LabelledText):
        # Raises where a label is not a number.
        _ = read.numbers
    kind = "model" if source.preset is None else "preset"
    require(
        model.task == IMAGES or source.has_tokenizer,
        "data",
        data.source,
        f"synthetic, since the {kind} {model.name} has no tokenizer",
        "Choose a model with one, such as --model-name minilm.",
    )


def _check_task(model: ModelConfig, source: ModelSource) -> None:
    """Raise unless the model has a head for its task; a hub id's is checked by its workers."""
    is_preset = source.preset is not None or source.name == MINILM
    is_at_hand = is_preset or Path(source.path or "").is_dir()
    if source.factory is not None or not is_at_hand:
        return
    if is_preset and model.task == CLASSIFICATION:
        return
    # Only transformers knows the heads of a model, and it takes seconds to import.
    from dpsgd_track.training.model import check_task, load_config

    check_task(model, load_config(source))


def _check_fit(model: ModelConfig, data: DataConfig) -> None:
    """Have a process of its own build and run a user's model (see `training.task_fit`).

    Raises:
        ValueError: the model does not fit its task, or the process did not end well.
    """
    package_root = str(Path(dpsgd_track.__file__).parent.parent)
    path = [os.getcwd(), os.environ.get("PYTHONPATH", ""), package_root]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", _TASK_FIT],
            input=json.dumps({"model": asdict(model), "data": asdict(data)}),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
        lines, why = done.stdout.splitlines(), _last_line(done.stderr)
    except subprocess.TimeoutExpired:
        lines, why = [], f"It did not end within {_TIMEOUT_S} s."
    told = _refusal(lines[-1]) if lines else None
    require(told is not None, "model_name", model.name, "a model that runs on the CPU", why)
    if told:
        raise ValueError(told)


def _refusal(line: str) -> str | None:
    """The sentence that `training.task_fit` printed; None if it is not one of its lines."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return str(told["refusal"]) if isinstance(told, dict) and "refusal" in told else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "Its process ended."
