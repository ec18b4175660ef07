"""Tells how a launch would form the per-sample gradients of each layer of a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from dpsgd_track.config import SYNTHETIC, DataConfig, ModelConfig, PrivacyConfig
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import ModeContext
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.layers.inventory import Unfit, UnfitModelError
from dpsgd_track.privacy.loss import LOSSES
from dpsgd_track.privacy.why import LayerAccount, accounts_of
from dpsgd_track.training.task_fit import build_on_cpu, check_fit

MODE = "flash_bk"
"""Mode whose layers are told of; the others of this package capture them in the same way."""
_WHOLE = "(model)"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class AlikeLayers:
    """Layers that differ in a number of their names alone, such as those of the blocks."""

    name: str
    """Name of the only layer, or of all with `*` in place of the numbers."""
    count: int
    account: LayerAccount
    """That of the first."""
    refusal: str = ""
    """Sentence that refuses the layers; empty if their gradients are exact."""


def layer_table(model: ModelConfig, data: DataConfig) -> list[AlikeLayers]:
    """Accounts of a model's layers after one step on synthetic samples, and what is refused.

    Raises:
        ValueError: the model cannot be built, or does not fit its task.
    """
    shape = replace(data, source=SYNTHETIC)
    built = build_on_cpu(model, shape)
    batch = check_fit(model, shape, built)
    refused: list[AlikeLayers] = []
    try:
        mode = _mode(built, model.task)
    except UnfitModelError as error:
        refused = list(_refused(built, error.parts))
        _leave_out(built, error.parts)
        mode = _mode(built, model.task)
    try:
        mode.accumulate(batch)
    except ValueError as error:
        kind = type(built).__name__
        refused.append(AlikeLayers(_WHOLE, 1, LayerAccount(_WHOLE, kind, *[""] * 4), str(error)))
    assert mode.engine.capture is not None
    return [*refused, *_grouped(accounts_of(mode.engine.capture))]


def _mode(model: nn.Module, task: str) -> ComposedMode:
    privacy = PrivacyConfig(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
    context = ModeContext(
        privacy=privacy,
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        loss=LOSSES[task],
    )
    return ComposedMode(MODES[MODE], model, context)


def _refused(model: nn.Module, parts: tuple[Unfit, ...]) -> Iterator[AlikeLayers]:
    modules = dict(model.named_modules())
    told = []
    for part in parts:
        owner = modules.get(part.name)
        kind = type(owner).__name__ if owner is not None else "parameter"
        told.append(LayerAccount(part.name, kind, "", "", "", part.reason))
    for each in _grouped(iter(told)):
        account = replace(each.account, advice="")
        yield replace(each, account=account, refusal=each.account.advice)


def _leave_out(model: nn.Module, parts: tuple[Unfit, ...]) -> None:
    """Freeze refused layers, so that the others can be told of."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for part in parts:
        if part.name in parameters:
            parameters[part.name].requires_grad_(False)
            continue
        module = modules[part.name].eval().requires_grad_(False)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.max_norm = None


def _grouped(accounts: Iterator[LayerAccount]) -> Iterator[AlikeLayers]:
    """Alike layers in one row, in the order of their first."""
    alike: dict[LayerAccount, list[LayerAccount]] = {}
    for account in accounts:
        pattern = _NUMBER.sub("*", f".{account.layer}.")[1:-1]
        alike.setdefault(replace(account, layer=pattern), []).append(account)
    for key, members in alike.items():
        first = members[0]
        name = key.layer if len(members) > 1 else first.layer
        yield AlikeLayers(name, len(members), first)


def counts(table: list[AlikeLayers]) -> tuple[int, int]:
    """Layers that are exact, and that are refused."""
    by = {True: 0, False: 0}
    for is_refused, rows in itertools.groupby(table, lambda row: bool(row.refusal)):
        by[is_refused] += sum(row.count for row in rows)
    return by[False], by[True]
