"""Run in each rank: `PrivateTrainer` on several ranks, whole and resumed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from dpsgd_track import PrivacyArguments, PrivateTrainer
from dpsgd_track.privacy.loss import classification_loss
from tests.support.model_zoo import build, small_bert

NUM_SAMPLES, T, V = 40, 6, 20
MICRO, ACCUMULATED = 4, 2
C, SIGMA, DELTA = 0.5, 0.8, 1e-3
SHAPES = {1: (4, 3), 2: (3, 2), 3: (2, 2)}
"""Micro-batch size and micro-batches by the number of ranks: twelve samples a step."""


class Sentences(Dataset[dict[str, Tensor]]):
    """Tokens, whose first one is the label."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, V, (NUM_SAMPLES, T), generator=generator)
        self.ids[:, 0] = torch.randint(0, 3, (NUM_SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0]}


def fresh(dropout: float = 0.0) -> nn.Module:
    """The same small BERT each time."""
    torch.manual_seed(0)
    return small_bert(V, dropout)


def trainer_of(
    model: Any,
    folder: Path,
    privacy: dict[str, Any] | None = None,
    train_dataset: Any = None,
    loss: Any = None,
    **changes: Any,
) -> PrivateTrainer:
    """A private trainer of the model, on `Sentences` if nothing else is given."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_grad_norm": C,
        "learning_rate": 0.01,
        "max_steps": 6,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    chosen = {"delta": DELTA, "noise_multiplier": SIGMA, "seed": 5} | (privacy or {})
    return PrivateTrainer(
        model,
        TrainingArguments(**(settings | changes)),
        train_dataset=Sentences() if train_dataset is None else train_dataset,
        eval_dataset=Sentences(),
        loss=loss,
        privacy=PrivacyArguments(**chosen),
    )


def of_ranks(folder: Path, num_ranks: int, **changes: Any) -> PrivateTrainer:
    """A trainer with a checkpoint half way, the same on any number of ranks."""
    micro, accumulated = SHAPES[num_ranks]
    return trainer_of(
        fresh(),
        folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        save_strategy="steps",
        save_steps=3,
        gradient_checkpointing=True,
        **changes,
    )


def last_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of the label as the token after the last one, [B]."""
    return classification_loss(logits[:, -1], labels)


def refusal_of(optim: str, folder: Path) -> str:
    """The sentence by which an optimizer is refused; empty if it is not."""
    try:
        trainer_of(fresh(), folder, optim=optim, max_steps=1).train()
    except ValueError as error:
        return str(error)
    return ""


def steps_on_one_model(folder: Path) -> int:
    """Steps of two trainings of a sharded model with tied weights, evaluated and loaded between.

    Its optimizer has a state before its first step, which a checkpoint holds.
    """
    model = build("tied-gpt2")
    settings: dict[str, Any] = {"loss": last_token_loss, "max_steps": 1, "optim": "adagrad"}
    first = trainer_of(model, folder, save_strategy="steps", save_steps=1, **settings)
    first.train()
    saved = load_file(folder / "checkpoint-1" / "model.safetensors")
    assert "lm_head.weight" not in saved, "a tied weight is saved once"
    model.load_state_dict(saved | {"lm_head.weight": saved["transformer.wte.weight"]})
    with torch.no_grad():
        model(Sentences().ids[:2])
    second = trainer_of(model, folder, **settings)
    second.train()
    assert second.private is not None
    return second.private.num_steps


def main(output: str) -> None:
    """Train, save and evaluate; resume from half way; write what was logged."""
    folder = Path(output)
    trainer = of_ranks(folder / "whole", int(os.environ["WORLD_SIZE"]))
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "end"))
    resumed = of_ranks(folder / "resumed", dist.get_world_size())
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    best = of_ranks(
        folder / "best",
        dist.get_world_size(),
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    best.train()
    best.save_model(str(folder / "chosen"))
    chosen = best.state.best_model_checkpoint
    if dist.get_rank() == 0:
        shutil.copytree(folder / "best" / "checkpoint-3", folder / "kept")
    dist.barrier()
    # A second training counts what the first has spent.
    best.train()
    assert best.private is not None
    pairs = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
    found = {
        "log": trainer.state.log_history,
        "eval_loss": metrics["eval_loss"],
        "is_resumed_as_whole": all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs),  # type: ignore[attr-defined]
        "chosen": chosen,
        "steps_of_two": best.private.num_steps,
        "steps_on_one_model": steps_on_one_model(folder / "tied"),
        "refusal": refusal_of("adafactor", folder),
        "classes": [type(p).__name__ for p in trainer.model.parameters()],
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
