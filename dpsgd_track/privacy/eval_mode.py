"""Puts a model into eval mode for the length of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules of the model into eval mode.

    Sets the flags alone: `eval()` of some modules does more, such as merging adapters into weights.
    """
    was_training = [module for module in model.modules() if module.training]
    for module in was_training:
        module.training = False
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
