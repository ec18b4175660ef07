"""A tensor that looks like one that all samples share, and holds a row for each.

A table of relative positions, a soft prompt or a table of labels is computed once for the whole
batch: reshaped, looked up, permuted. It meets the samples late, where it is added to their scores
or expanded over them. Up to there every operation runs on each sample's row, by `torch.func.vmap`.
Where it meets tensors of the samples, the row of a sample goes with the sample.

Which operation is which is learned in a trial on a number of samples that equals no other size, and
kept: sizes that are equal by chance later do not matter. `privacy.sample_dim` and
`privacy.bare_parameters` compare the trial with runs on one sample's row before they rely on it. An
operation that the trial did not have, as where a batch has no padding to mask, is learned where the
number of samples equals no size of the tensors that it reads but the first, and refused otherwise.

Shapes: B samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

EACH, MEET, MEET_GROUPS, FILL = "each", "meet", "meet groups", "fill"
PAIR, PAIR_AT = "pair", "pair at"
"""An operation on every row alone; one with tensors whose dimension 0 is the sample; one with
tensors that have several rows of each sample, one after the other, in dimension 0; one that runs
for each sample on its row and its part of the other tensors; the same where the sample is another
dimension, which each part keeps with size 1; and an assignment where a mask [B, ...] is true."""

_PROPERTIES = "shape dtype device ndim layout requires_grad is_leaf is_cuda is_sparse is_meta"
_METHODS = "size dim ndimension numel nelement __len__ stride element_size get_device"
_TESTS = "is_floating_point is_complex"
SIZES = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
        *(getattr(Tensor, name) for name in f"{_METHODS} {_TESTS}".split()),
        *(getattr(torch, name) for name in _TESTS.split()),
    }
)
"""Identity of functions that read nothing of a tensor's elements."""
_PAIRED = frozenset(
    (F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.group_norm)
)
"""Functions that take no weight for each sample."""
_PRODUCTS = frozenset(
    (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__)
)
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_EXPANDING = frozenset(("expand", "repeat", "broadcast_to", "tile"))
_Key = tuple[str, ...]
_Place = int
"""An argument's, among all leaves of a call's arguments."""


@dataclass(frozen=True)
class Action:
    """Effect of an operation on rows."""

    kind: str
    dims: Mapping[_Place, int] = field(default_factory=dict)
    """Dimension of the samples in each argument that a pair takes sample by sample."""
    output_dim: int = 0
    """Dimension of the samples in what a pair at another dimension returns."""


class Course:
    """Effect of each operation on the rows of a layer, by the operations that led to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        """The layer's or the parameter's fully qualified name."""
        self.is_learning = True
        self._actions: dict[_Key, Action] = {}

    @property
    def num_learned(self) -> int:
        """Operations that are known so far."""
        return len(self._actions)

    def action(self, key: _Key, choose: Callable[[], Action], *, is_clear: bool) -> Action:
        """The action of an operation, chosen while learning and for one that is new.

        Args:
            is_clear: the number of samples tells which dimension holds them.

        Raises:
            ValueError: a new operation that is not clear, or one that has several actions.
        """
        if self.is_learning or (is_clear and key not in self._actions):
            chosen = choose()
            if self._actions.setdefault(key, chosen) != chosen:
                raise ValueError(f"{self.name}: {key[0]} meets the samples here and not there.")
        elif key not in self._actions:
            raise ValueError(
                f"{self.name}: expected the operations of the first batch on what all samples "
                f"share, got {key[0]} as well, on as many samples as another size has. Give the "
                "first batch another number of samples, or freeze the layer."
            )
        return self._actions[key]


class SharedRows(Tensor):
    """[...] that stands for [B, ...], a row for each sample."""

    rows: Tensor
    """[B, ...]"""
    course: Course
    path: str
    """The operations that it was made by."""

    @staticmethod
    def __new__(cls, rows: Tensor, course: Course, path: str = "") -> SharedRows:
        # Without requires_grad: FSDP2 hooks what has it, and the rows have their own graph.
        made: SharedRows = Tensor._make_wrapper_subclass(
            cls, rows.shape[1:], dtype=rows.dtype, device=rows.device
        )
        made.rows, made.course, made.path = rows, course, path or course.name
        return made

    def __init__(self, rows: Tensor, course: Course, path: str = "") -> None:
        """
        Args:
            path: that of an operation on others; empty for the first.
        """

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SharedRows({self.course.name}, {tuple(self.rows.shape)})"

    def refuse_in_function(self) -> None:
        """Raise in the forward of an autograd function, whose backward knows nothing of the rows.

        Raises:
            ValueError: the running code is one, as a trial finds at any time.
        """
        may_lose = self.rows.requires_grad and not torch.is_grad_enabled()
        if (may_lose or self.course.is_learning) and _is_in_function():
            raise ValueError(
                f"{self.course.name}: expected functions of torch on what all samples share, got a "
                "torch.autograd.Function. Make the model private after this changes, or freeze "
                "the layer."
            )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the rows, each alone or with its sample."""
        kwargs = {} if kwargs is None else kwargs
        if func in SIZES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        shared = [x for x in leaves if isinstance(x, SharedRows)]
        first, name = shared[0], str(getattr(func, "__name__", func))
        first.refuse_in_function()
        is_alone = len(shared) == sum(isinstance(x, Tensor) for x in leaves)
        if is_alone and len(shared) == 1 and name not in _EXPANDING:
            # There is no choice, and such an operation may be left out at other sizes.
            return _wrapped(_run_each(func, leaves, structure), first.course, first.path)
        key = (name, *(x.path for x in shared))
        num_samples = len(first.rows)
        action = first.course.action(
            key,
            lambda: _choose(func, leaves, structure, num_samples),
            is_clear=_is_clear(leaves, num_samples),
        )
        if action.kind == PAIR:
            return _run_each(func, leaves, structure, action.dims)
        if action.kind == PAIR_AT:
            parts = _run_each(func, leaves, structure, action.dims, keeps_dim=True)
            dim = action.output_dim
            return parts.movedim(0, dim).flatten(dim, dim + 1)
        if action.kind == EACH:
            made = _run_each(func, leaves, structure)
            return _wrapped(made, first.course, f"{hash(key):x}")
        if action.kind == FILL:
            x, mask, value = args
            return func(x, mask, _filling(value, mask))
        met = _met(name, leaves, num_samples, is_grouped=action.kind == MEET_GROUPS)
        args, kwargs = pytree.tree_unflatten(met, structure)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse what has not come through a function of torch, and would not see the rows."""
        raise ValueError(f"{func}: expected a function of torch on what all samples share.")


def _is_in_function() -> bool:
    """True in the forward of an autograd function."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _wrapped(made: Any, course: Course, path: str) -> Any:
    return pytree.tree_map_only(Tensor, lambda rows: SharedRows(rows, course, path), made)


def rows_of(x: Any) -> Any:
    """The rows of a tensor that all samples share; anything else as it is."""
    return x.rows if isinstance(x, SharedRows) else x


def _choose(func: Any, leaves: list[Any], structure: Any, num_samples: int) -> Action:
    """The action of an operation, where `num_samples` is the size of no other dimension."""
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, SharedRows)]
    firsts = {x.shape[0] for x in others if x.dim()}
    if func is Tensor.__setitem__:
        if len(leaves) == 3 and len(others) == 2 and others[1].dtype == torch.bool:
            return Action(FILL)
        raise ValueError("The rows are assigned otherwise than by a mask.")
    if num_samples in firsts:
        dims = {
            place: 0
            for place, x in enumerate(leaves)
            if any(x is other for other in others) and x.shape[:1] == (num_samples,)
        }
        return Action(PAIR, dims) if _is_paired(func, leaves) else Action(MEET)
    if _expands_to(func, leaves) == num_samples:
        return Action(MEET)
    if any(num_samples in x.shape for x in others):
        return _pair_at(func, leaves, structure, num_samples)
    is_grouped = any(size and size % num_samples == 0 for size in firsts)
    return Action(MEET_GROUPS if is_grouped and func not in _PAIRED else EACH)


def _pair_at(func: Any, leaves: list[Any], structure: Any, num_samples: int) -> Action:
    """A pair where the samples are in another dimension than the first.

    Raises:
        ValueError: the operation has no such dimension in what it returns.
    """
    dims = {
        place: x.shape.index(num_samples)
        for place, x in enumerate(leaves)
        if isinstance(x, Tensor) and not isinstance(x, SharedRows) and num_samples in x.shape
    }
    rows = [x.rows[0] if isinstance(x, SharedRows) else x for x in leaves]
    args, kwargs = pytree.tree_unflatten(rows, structure)
    whole = func(*args, **kwargs)
    parts = _run_each(func, leaves, structure, dims, keeps_dim=True)
    if isinstance(whole, Tensor) and isinstance(parts, Tensor):
        for dim, size in enumerate(whole.shape):
            others = (*whole.shape[:dim], 1, *whole.shape[dim + 1 :])
            if size == num_samples and parts.shape == (num_samples, *others):
                return Action(PAIR_AT, dims, dim)
    raise ValueError("The samples are in another dimension than the first.")


def _is_paired(func: Any, leaves: Iterable[Any]) -> bool:
    """True for a function that takes the row of a sample with the sample's part alone."""
    if func not in _PRODUCTS:
        return func in _PAIRED
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    num_dims = max(x.dim() for x in tensors)
    shared = [x for x in tensors if isinstance(x, SharedRows)]
    return not all(x.dim() == num_dims and x.shape[0] == 1 for x in shared)


def _is_clear(leaves: Iterable[Any], num_samples: int) -> bool:
    """True if no size but the first of tensors that are not shared is the number of samples."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    sizes = {
        size for x in tensors for size in (x.shape if isinstance(x, SharedRows) else x.shape[1:])
    }
    return num_samples not in sizes


def _expands_to(func: Any, leaves: Iterable[Any]) -> int | None:
    """Size of dimension 0 that a tensor is expanded to; None for another function."""
    if getattr(func, "__name__", "") not in _EXPANDING:
        return None
    return next((x for x in leaves if type(x) is int), None)


def _run_each(
    func: Any,
    leaves: list[Any],
    structure: Any,
    dims: Mapping[_Place, int] = MappingProxyType({}),
    *,
    keeps_dim: bool = False,
) -> Any:
    """Run a function for each row.

    Args:
        dims: the samples' dimension in other tensors that are taken sample by sample as well.
        keeps_dim: each of these parts keeps that dimension, with size 1.
    """
    rows_at = {place: 0 for place, x in enumerate(leaves) if isinstance(x, SharedRows)}
    taken = rows_at | dict(dims)

    def run(*parts: Tensor) -> Any:
        filled = list(leaves)
        for (place, dim), part in zip(taken.items(), parts, strict=True):
            is_kept = keeps_dim and place in dims
            filled[place] = part.unsqueeze(dim) if is_kept else part
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return func(*args, **kwargs)

    rows = [rows_of(leaves[place]) for place in taken]
    in_dims = tuple(taken.values())
    return torch.func.vmap(run, in_dims, randomness="different")(*rows)


def _filling(value: SharedRows, mask: Tensor) -> Tensor:
    """The row of its sample for each element of a mask [B, ...] that is true, [n, ...].

    Raises:
        ValueError: the mask has another number of samples.
    """
    rows = value.rows
    if len(mask) != len(rows):
        raise ValueError(f"mask: expected {len(rows)} samples in dimension 0, got {len(mask)}.")
    shape, inner = rows.shape[1:], mask.shape[1:]
    filled: Tensor = rows.view(len(rows), *[1] * len(inner), *shape).expand(*mask.shape, *shape)
    return filled[mask]


def _met(name: str, leaves: list[Any], num_samples: int, *, is_grouped: bool) -> list[Any]:
    """`leaves` with each shared tensor as [B, ...], broadcast over the others' dimensions.

    Raises:
        ValueError: no other tensor has the samples in dimension 0.
    """
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, SharedRows)]
    num_dims = max((x.dim() for x in others), default=0)
    sizes = [x.shape[0] for x in others if x.dim() == num_dims and x.dim()]
    is_repeated = name in ("repeat", "tile")
    if name in _EXPANDING:
        places = [place for place, x in enumerate(leaves) if type(x) is int]
        sizes, num_dims = [leaves[places[0]]], len(places)
        if is_repeated:
            leaves = [1 if place == places[0] else x for place, x in enumerate(leaves)]
    size = max(sizes, default=0)
    per_sample, rest = divmod(size, num_samples)
    if rest or per_sample < 1 or (per_sample > 1 and not is_grouped):
        raise ValueError(f"{name}: expected {num_samples} samples in dimension 0, got {size}.")
    return [
        _placed(x, num_dims, per_sample, is_repeated=is_repeated)
        if isinstance(x, SharedRows)
        else x
        for x in leaves
    ]


def _placed(x: SharedRows, num_dims: int, per_sample: int, *, is_repeated: bool) -> Tensor:
    """[B per_sample, ...] in `num_dims` dimensions at least.

    Args:
        is_repeated: the whole tensor is there for each sample, one after the other.

    Raises:
        ValueError: the tensor has another dimension where the samples shall be.
    """
    rows = x.rows
    if rows.dim() > num_dims:
        if is_repeated and rows.dim() == num_dims + 1:
            return rows.flatten(0, 1)
        if rows.shape[1] != 1:
            raise ValueError(f"{x.course.name}: expected a dimension of size 1 for the samples.")
        rows = rows.squeeze(1)
    else:
        missing = num_dims - rows.dim()
        rows = rows.reshape(rows.shape[0], *[1] * missing, *rows.shape[1:])
    return rows if per_sample == 1 else rows.repeat_interleave(per_sample, dim=0)
