"""Mixed precision on one device: computes in a low precision, with float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def rounded_parameters(
    model: nn.Module, dtype: torch.dtype, *, has_graph: bool = True
) -> Iterator[None]:
    """Run the model on copies of its parameters in `dtype`, as under FSDP2.

    The backward belongs inside too, as a checkpoint recomputes the forward there.

    Args:
        has_graph: gradients flow through the copies to the float32 parameters. Otherwise the
            copies are leaves, made by one launch.
    """
    slots = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype == torch.float32
    ]
    parameters: list[Tensor] = list(dict.fromkeys(parameter for _, _, parameter in slots))
    if has_graph:
        copies = [parameter.to(dtype) for parameter in parameters]
    else:
        copies = _leaves(parameters, dtype)
    copy_of = dict(zip(parameters, copies, strict=True))
    for own, name, parameter in slots:
        own[name] = copy_of[parameter]  # type: ignore[assignment]
    try:
        yield
    finally:
        for own, name, parameter in slots:
            own[name] = parameter


@torch.no_grad()
def _leaves(parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of parameters in `dtype`, that require gradients as they do."""
    copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
    if copies:
        torch._foreach_copy_(copies, parameters)
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.requires_grad_(parameter.requires_grad)
    return copies
