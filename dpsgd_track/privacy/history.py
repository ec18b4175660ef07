"""History of a model's private steps, which the model and its trained parts carry along."""

from __future__ import annotations

import warnings
from itertools import chain

from torch import nn

from dpsgd_track.privacy.ledger import PrivacyLedger

SharedHistory = list[tuple[float, float | None, int]]
"""Stages of a ledger, (noise multiplier, sample rate, steps)."""
_ATTRIBUTE = "_dpsgd_track_history"
"""Attribute of a model and of its trained parts: one list that all of them share, so that a part
takes it into other models. Copies of the model copy it."""


def is_history_of(model: nn.Module, history: SharedHistory) -> bool:
    """True if `history` is the list that the model carries."""
    return vars(model).get(_ATTRIBUTE) is history


def histories(model: nn.Module) -> dict[int, SharedHistory]:
    """Histories of the model and its parts, by identity."""
    return {
        id(vars(module)[_ATTRIBUTE]): vars(module)[_ATTRIBUTE]
        for module in model.modules()
        if _ATTRIBUTE in vars(module)
    }


def history_of(model: nn.Module) -> SharedHistory:
    """History of the steps taken on the model and its parts, in a list that all of them share.

    Parts that were trained separately have lists of their own, which are joined.
    """
    modules, lists = list(model.modules()), histories(model)
    (history,) = lists.values() if len(lists) == 1 else ([*chain(*lists.values())],)
    vars(model)[_ATTRIBUTE] = history
    for module in modules:
        if any(parameter.requires_grad for parameter in module.parameters()):
            vars(module)[_ATTRIBUTE] = history
    if history:
        warnings.warn(
            f"{type(model).__name__}: {PrivacyLedger(history).num_steps} private steps were taken "
            "on this model, its parts, or what they were copied from. epsilon() continues from "
            "there.",
            stacklevel=3,
        )
    return history
