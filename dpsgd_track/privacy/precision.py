"""Mixed precision on one device: computes in a low precision, with float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def rounded_parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run the model on copies of its parameters in `dtype`, as under FSDP2.

    Gradients flow through the copies to the float32 parameters. The backward belongs inside too, as
    a checkpoint recomputes the forward there.
    """
    copies: dict[nn.Parameter, Tensor] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype == torch.float32:
                copy = copies.setdefault(parameter, parameter.to(dtype))
                module._parameters[name] = copy  # type: ignore[assignment]
                replaced.append((module, name, parameter))
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
