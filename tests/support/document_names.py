"""Names that the code of a page takes as given: a model, its data, a loop's own settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpsgd_track
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.mutants.mutant import mutant
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.dropout import KeyedDropout, only
from dpsgd_track.privacy.terms import Term
from dpsgd_track.record.stages import Stage
from tests.support.model_zoo import small_bert

Names = dict[str, Any]


def _training() -> Names:
    """A model, its optimizer and its data, all new."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    dataset = TensorDataset(torch.randn(60, 16), torch.randint(2, (60,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "dataset": dataset}


def _from_opacus(_folder: Path) -> Names:
    settings = {"BATCH_SIZE": 20, "SIGMA": 1.0, "C": 1.0, "DELTA": 1e-5}
    return {**_training(), **settings, "DataLoader": DataLoader, "criterion": nn.CrossEntropyLoss()}


def _private(_folder: Path) -> Names:
    given = _training()
    settings: Names = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 30}
    private = dpsgd_track.make_private(given["model"], given["optimizer"], **settings)
    return {**given, "dpsgd_track": dpsgd_track, "private": private, "num_epochs": 2}


def _tracked(folder: Path) -> Names:
    # The examples' own tests track to MLflow itself.
    logged = SimpleNamespace(log_metrics=lambda values, step: None, log_artifact=lambda path: None)
    return {**_private(folder), "mlflow": logged}


def _for_a_target(_folder: Path) -> Names:
    return {**_training(), "dpsgd_track": dpsgd_track, "dataset": range(2000)}


def _loop_of_its_own(folder: Path) -> Names:
    given = _private(folder)
    x, y = given["dataset"].tensors
    return {**given, "F": nn.functional, "x": x, "y": y}


def _trainer(_folder: Path) -> Names:
    rows = [{"input_ids": torch.arange(1, 7), "labels": i % 3} for i in range(16)]
    return {"model": small_bert(20, 0.0), "train": rows}


def _mutants(_folder: Path) -> Names:
    kinds = {"Need": Need, "Seam": Seam, "Stage": Stage, "Original": Original, "Term": Term}
    return {**kinds, "mutant": mutant, "Sequence": Sequence, "Any": Any, "Tensor": torch.Tensor}


def _own_layer(_folder: Path) -> Names:
    return {"MyLayer": nn.Linear, "torch": torch}


def _own_dropout(_folder: Path) -> Names:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    batch = Batch({}, torch.zeros(3), args=(torch.randn(3, 4),))
    masks = KeyedDropout(seed=0, step=0, samples=(0, 1, 2))
    given = {"only": only, "index": 1, "batch": batch, "self": SimpleNamespace(model=model)}
    return {**given, "context": masks}


def _drift(folder: Path) -> Names:
    return {"text": (folder / "results/june/drift.json").read_text(encoding="utf-8")}


GIVEN: dict[tuple[str, int], Callable[[Path], Names]] = {
    ("docs/faults.md", 0): _mutants,
    ("docs/from_opacus.md", 0): _from_opacus,
    ("docs/from_opacus.md", 1): _from_opacus,
    ("docs/launching.md", 0): _own_layer,
    ("docs/examples.md", 0): _tracked,
    ("docs/library.md", 0): _loop_of_its_own,
    ("docs/library.md", 1): _trainer,
    ("docs/models.md", 0): _own_dropout,
    ("docs/own_mode.md", 0): lambda _folder: {"Mode": Mode},
    ("docs/privacy.md", 0): _private,
    ("docs/privacy.md", 1): _for_a_target,
    ("docs/records.md", 0): _drift,
}
"""By page and number among its blocks of Python: names set before the block runs, given the folder
with the shared groups."""
