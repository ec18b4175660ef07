"""Builds a user's own model by the function that `package.module:build_model` names."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dpsgd_track.config import require

_FORM = "package.module:build_model, a function without arguments that returns a torch.nn.Module"


def build_own(factory: str, *, seed: int, device: torch.device, keeps_dropout: bool) -> nn.Module:
    """The model of a user's function. Weights that it draws depend on the seed alone.

    Args:
        keeps_dropout: keep the rates of torch's dropout layers.

    Raises:
        ValueError: there is no such function, it raises, or it returns something else.
    """
    build = _function(factory)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            model = build()
        # A user's function may raise anything.
        except Exception as error:
            why = f"It raises {type(error).__name__}: {error}"
            raise ValueError(f"model_name={factory!r}: expected {_FORM}. {why}") from error
    got = f"It returned {type(model).__name__}."
    require(isinstance(model, nn.Module), "model_name", factory, _FORM, got)
    if not keeps_dropout:
        _switch_off_dropout(model)
    built: nn.Module = model
    return built


def _function(factory: str) -> Any:
    module, _, name = factory.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model_name={factory!r}: expected {_FORM}. {error}.") from None
    require(callable(found), "model_name", factory, _FORM, f"It is a {type(found).__name__}.")
    return found


def _switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
