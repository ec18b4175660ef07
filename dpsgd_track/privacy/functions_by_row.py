"""Autograd functions that `torch.func.vmap` has no rule for: one call for each sample.

vmap knows of a `torch.autograd.Function` only what the function tells. One that has no
`setup_context` or no rule would end the mapping of the whole module that calls it. Inside
`functions_by_row`, such a function runs on each sample's tensors by itself, and its own backward
forms their gradients, whatever it computes. All around it stays mapped, and a batch still takes one
backward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
"""Types of arguments that hold no tensors."""


@contextmanager
def functions_by_row() -> Iterator[None]:
    """Context in which vmap takes functions without a rule."""
    original = Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        is_mapped = any(map(_is_mapped, args))
        if kwargs or not is_mapped or _has_rule(cls):
            return original.__func__(cls, *args, **kwargs)
        return _by_row(cls).apply(*args)

    # A module calls its functions by name, so that there is no other place to step in.
    Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]


def _is_mapped(x: Any) -> bool:
    return isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x)


def _has_rule(function: type[Function]) -> bool:
    is_new = function.setup_context is not Function.setup_context
    return is_new and (function.generate_vmap_rule or function.vmap is not Function.vmap)


@functools.cache
def _by_row(function: type[Function]) -> type[Function]:
    """A function that vmap maps by running `function` for each row."""

    class ByRow(Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            raise RuntimeError(f"{function.__name__} can be mapped by torch.vmap alone.")

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Keep nothing, as each row has a context of its own."""

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
            if not all(isinstance(x, (Tensor, *_PLAIN)) for x in args):
                # An object may hold tensors of all samples.
                raise RuntimeError(f"{function.__name__} takes other arguments than tensors.")
            rows = [
                function.apply(
                    *(
                        x if dim is None else x.select(dim, row)
                        for x, dim in zip(args, in_dims, strict=True)
                    )
                )
                for row in range(info.batch_size)
            ]
            return _stacked(function, rows)

    return ByRow


def _stacked(function: type[Function], rows: list[Any]) -> tuple[Any, Any]:
    """Outputs of all rows, tensors along a new dimension 0, and that dimension for each."""
    leaves, structures = zip(*map(pytree.tree_flatten, rows), strict=True)
    kinds = {tuple(x if x is None else type(x) for x in of_row) for of_row in leaves}
    is_alike = len(kinds) == 1 and all(other == structures[0] for other in structures)
    if not is_alike or not all(x is None or isinstance(x, Tensor) for x in leaves[0]):
        raise RuntimeError(f"{function.__name__} returns something else than tensors.")
    columns = list(zip(*leaves, strict=True))
    stacked = [None if column[0] is None else torch.stack(column) for column in columns]
    dims = [None if column[0] is None else 0 for column in columns]
    return pytree.tree_unflatten(stacked, structures[0]), pytree.tree_unflatten(dims, structures[0])
