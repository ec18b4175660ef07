"""Calls that `torch.func.vmap` cannot map, or maps badly, while a module runs for all samples.

- A `torch.autograd.Function` without `setup_context` or a rule runs on each sample's tensors by
  itself, and its own backward forms their gradients, whatever it computes.
- A function of torch without a rule runs so as well. vmap's own loop would select each row, whose
  backward fills a tensor of all rows with zeros, B times.
- Where Python reads a value, as `if (mask > 0).all():` does, and it is the same for all samples,
  that is the value: each of them takes this branch. Where samples differ, mapping ends, and the
  module runs sample by sample.

All around such a call stays mapped, and a batch takes one backward.

Shapes: B samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
"""Types of arguments that hold no tensors."""
_READS = frozenset(
    (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item)
)
"""Functions by which Python reads a value."""
_NO_RULE = "There is a performance drop"
"""Start of torch's warning of a function without a rule."""


class MappedCalls(TorchFunctionMode):
    """Takes functions of torch without a rule, and values that all samples have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.is_needed = False
        """True once it has taken a call."""
        self._has_rule: dict[Any, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, of mapped tensors in one of the ways above."""
        kwargs = {} if kwargs is None else kwargs
        if func in _READS and is_mapped(args[0]):
            self.is_needed = True
            return func(_common(args[0], torch.bool if func is Tensor.__bool__ else None))
        has_rule = self._has_rule.get(func)
        if has_rule or not any(map(is_mapped, pytree.tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if has_rule is None:
            return self._learned(func, args, kwargs)
        return _run_by_row(func, args, kwargs)

    def _learned(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function for the first time, and see whether it has a rule."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = func(*args, **kwargs)
        is_warned = any(str(warning.message).startswith(_NO_RULE) for warning in caught)
        # A row that is a view of all takes no change in place.
        changes = getattr(func, "__name__", "_").endswith("_") or "out" in kwargs
        self._has_rule[func] = not is_warned or changes
        self.is_needed |= is_warned and not changes
        for warning in caught:
            if not str(warning.message).startswith(_NO_RULE):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        return output


@contextmanager
def mapped_functions() -> Iterator[None]:
    """Context in which vmap takes autograd functions without a rule."""
    original = Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if kwargs or _has_rule(cls) or not any(map(is_mapped, args)):
            return original.__func__(cls, *args, **kwargs)
        if not all(isinstance(x, (Tensor, *_PLAIN)) for x in args):
            # An object may hold tensors of all samples.
            raise RuntimeError(f"{cls.__name__} takes other arguments than tensors.")
        return _run_by_row(cls.apply, args, {})

    # A module calls its functions by name, so that there is no other place to step in.
    Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]


def is_mapped(x: Any) -> bool:
    """True for a tensor that stands for the rows of all samples inside of vmap."""
    return isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x)


def _has_rule(function: type[Function]) -> bool:
    is_new = function.setup_context is not Function.setup_context
    return is_new and (function.generate_vmap_rule or function.vmap is not Function.vmap)


def _common(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The one value of all samples; `x` itself, which nothing can read, where they differ."""
    values = torch._C._functorch.get_unwrapped(x).detach().flatten()
    if x.numel() != 1 or not len(values) or is_mapped(values):
        return x
    values = values if dtype is None else values.to(dtype)
    return values[0] if bool((values == values[0]).all()) else x


def _run_by_row(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function for each sample, on its rows of mapped tensors."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [place for place, x in enumerate(leaves) if is_mapped(x)]

    def run(rows: tuple[Tensor, ...]) -> Any:
        filled = list(leaves)
        for place, row in zip(places, rows, strict=True):
            filled[place] = row
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return func(*args, **kwargs)

    return _ByRow.apply(run, *(leaves[place] for place in places))


class _ByRow(Function):
    """vmap maps it by running a function for each row."""

    @staticmethod
    def forward(run: Any, *tensors: Tensor) -> Any:
        raise RuntimeError("Expected torch.vmap alone around a function that has no rule.")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing, as each row has a context of its own."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], run: Any, *tensors: Tensor) -> Any:
        # The gradients of what was unbound are stacked once.
        by_row = zip(
            *(
                [x] * info.batch_size if dim is None else x.unbind(dim)
                for x, dim in zip(tensors, in_dims[1:], strict=True)
            ),
            strict=True,
        )
        return _stacked([run(rows) for rows in by_row])


def _stacked(rows: list[Any]) -> tuple[Any, Any]:
    """Outputs of all rows, tensors along a new dimension 0, and that dimension for each."""
    leaves, structures = zip(*map(pytree.tree_flatten, rows), strict=True)
    kinds = {tuple(x if x is None else type(x) for x in of_row) for of_row in leaves}
    is_alike = len(kinds) == 1 and all(other == structures[0] for other in structures)
    if not is_alike or not all(x is None or isinstance(x, Tensor) for x in leaves[0]):
        raise RuntimeError("A function without a rule returns something else than tensors.")
    columns = list(zip(*leaves, strict=True))
    stacked = [None if column[0] is None else torch.stack(column) for column in columns]
    dims = [None if column[0] is None else 0 for column in columns]
    return pytree.tree_unflatten(stacked, structures[0]), pytree.tree_unflatten(dims, structures[0])
