"""torch.nn.Linear, and subclasses that compute the same.

The gradient of the weight is sum_t dy_t x_t^T, that of the bias sum_t dy_t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.privacy.layers.positions import linear_terms, outer
from dpsgd_track.privacy.terms import Term


def matches(module: nn.Module) -> bool:
    """True for linear layers, not for subclasses that compute something else."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [P, D] and bias [P]."""
    return linear_terms(module, lambda: outer(x, dy), dy)


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Compare the module with a linear layer on fixed inputs and parameters, as Falcon's.

    The parameters are random: those of a sharded model are elsewhere, and zeros say little.
    """
    P, D = module.weight.shape
    device = module.weight.device
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x = draw(2, 3, D)
    # Of rank one, which costs less to draw, at the scale of D inputs.
    trial = {"weight": draw(P, 1) * draw(1, D) / D**0.5}
    if module.bias is not None:
        trial["bias"] = draw(P)
    try:
        for rows in (x, x[0]):
            got = torch.func.functional_call(module, trial, (rows,))
            if not torch.allclose(got, F.linear(rows, **trial), rtol=1e-4, atol=1e-4):
                return False
    except Exception:
        # It takes other arguments.
        return False
    return True
