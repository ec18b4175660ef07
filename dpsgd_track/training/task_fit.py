"""Tells if a user's own model fits its task, by a run: `python -m dpsgd_track.training.task_fit`.

A program of its own: a user's module may print, take long or claim a GPU when it is imported, none
of which shall happen to a launcher. It reads the model's and the data's configuration from standard
input, and prints the sentence of a refusal as the last line, empty if the model fits.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch

from dpsgd_track.config import (
    CAUSAL_LM,
    MASKED_LM,
    SEQ2SEQ,
    SYNTHETIC,
    TAGGING,
    DataConfig,
    ModelConfig,
    require,
)
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.training.data import (
    RankSampler,
    build_dataset,
    extra_inputs_of,
    input_names_of,
    vocab_size_of,
)
from dpsgd_track.training.model import build_model
from dpsgd_track.training.task_source import num_labels_of

_SAMPLES = 3


def trial_batch(
    model: ModelConfig, data: DataConfig, built: torch.nn.Module, num_samples: int = _SAMPLES
) -> Batch:
    """Synthetic samples of the task, in the shape of `data`."""
    synthetic = replace(data, source=SYNTHETIC, sampling="sequential", dataset_size=None)
    labels = num_labels_of(model, data)
    shown = model if labels < 2 else replace(model, num_labels=labels)
    dataset = build_dataset(shown, synthetic, built, seed=0)
    sampler = RankSampler(
        dataset=dataset,
        batch_size=num_samples,
        micro_batches=1,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        extra_inputs=extra_inputs_of(built),
        names=input_names_of(built, dataset),
    )
    return sampler.rank_batch(0).batches[0]


def check_fit(model: ModelConfig, data: DataConfig, built: torch.nn.Module) -> Batch:
    """Run the model once on synthetic samples; returns them.

    Raises:
        ValueError: it does not run on the samples of its task, or returns something else than the
            logits of it.
    """
    batch = trial_batch(model, data, built)
    advice = "Choose another --task or --model-name."
    given = ", ".join(f"{name} {list(t.shape)}" for name, t in batch.inputs.items())
    allowed = f"one that {model.name} fits: it is called with {given}"
    try:
        with torch.no_grad():
            logits = batch.run(built)
    except ValueError as error:
        raise ValueError(f"task={model.task!r}: expected {allowed}. {error}") from None
    # A user's model may raise anything.
    except Exception as error:
        why = f"It raises {type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"task={model.task!r}: expected {allowed}. {why}. {advice}") from None
    shape = _logits_shape(model, data, built)
    got = f"{model.name} returned logits of shape {list(logits.shape)}. {advice}"
    is_fit = list(logits.shape) == [_SAMPLES, *shape]
    require(is_fit, "task", model.task, f"logits of shape {[_SAMPLES, *shape]}", got)
    return batch


def build_on_cpu(model: ModelConfig, data: DataConfig) -> torch.nn.Module:
    """The model on the CPU, with weights of the seed 0."""
    num_labels = num_labels_of(model, data)
    return build_model(model, num_labels=num_labels, seed=0, device=torch.device("cpu"))


def _logits_shape(model: ModelConfig, data: DataConfig, built: torch.nn.Module) -> list[int]:
    """Shape of one sample's logits."""
    num_labels = num_labels_of(model, data)
    if model.task in (CAUSAL_LM, MASKED_LM, SEQ2SEQ):
        return [data.seq_length, vocab_size_of(model, built)]
    if model.task == TAGGING:
        return [data.seq_length, num_labels]
    return [num_labels]


def main() -> None:
    """Print the sentence that refuses the model, or an empty line."""
    asked = json.loads(sys.stdin.read())
    try:
        model, data = ModelConfig(**asked["model"]), DataConfig(**asked["data"])
        check_fit(model, data, build_on_cpu(model, data))
        sentence = ""
    except ValueError as error:
        sentence = " ".join(str(error).split())
    print(f"\n{json.dumps({'refusal': sentence})}")


if __name__ == "__main__":
    main()
