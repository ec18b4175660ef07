"""An optimizer that holds other tensors than the model is found out before any number shows it."""

from __future__ import annotations

import torch
from torch import nn

from dpsgd_track.modes.protocol import Mode
from dpsgd_track.training.prepare import not_optimized


class _Mode(Mode):
    """A mode over `model`, whose optimizer holds what it is given."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)

    def accumulate(self, batch: object) -> None:  # type: ignore[override]
        raise NotImplementedError


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    return model


def test_an_optimizer_with_all_trainable_parameters_lacks_none() -> None:
    model = _model()
    assert not_optimized(_Mode(model, [p for p in model.parameters() if p.requires_grad])) == ()


def test_layers_replaced_after_the_optimizer_was_built_are_lacking() -> None:
    model = _model()
    mode = _Mode(model, list(model.parameters()))
    model[2] = nn.Linear(4, 2)
    assert not_optimized(mode) == ("2.weight", "2.bias")


def test_an_optimizer_of_copies_alone_is_left_alone() -> None:
    model = _model()
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    assert not_optimized(_Mode(model, copies)) == ()
