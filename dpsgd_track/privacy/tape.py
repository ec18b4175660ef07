"""Records the computation of losses from a model's outputs, so that it can be repeated.

The losses of a user's own loop are formed by code that cannot be called again. Every torch function
that it calls is recorded, and can be repeated with each sample's rows replaced by another sample's.
A tensor that the code did not make itself, such as the targets, has a row for each sample if its
dimension 0 has that size. Class weights may have it by chance: parameters, the weights of a
cross-entropy, and tensors that an earlier batch of another size used too, are all samples' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from dpsgd_track.privacy.batch import tensors_in

_READ = (bool, int, float, complex, list, np.ndarray)
"""Types of what is read from a tensor into Python."""
_WEIGHTED_BY_CLASS = (F.cross_entropy, F.nll_loss)
"""Functions whose argument `weight` has a number for each class."""
_LOOKING_UP = (Tensor.__getitem__,)
"""Functions of a table and an index."""
_SCALING = frozenset({"mul", "div", "truediv", "__mul__", "__rmul__", "__truediv__", "true_divide"})
"""Functions of a tensor and a number that scale the tensor."""
_TOLERANCE = 1e-3
"""Relative difference of numbers that are read twice, which rounding explains."""


class TapeError(ValueError):
    """The losses are computed in a way that cannot be repeated."""


@dataclass(frozen=True)
class _Made:
    """A tensor that an earlier call has made, by its number."""

    number: int


@dataclass(frozen=True)
class _Given:
    """A tensor that no recorded call has made."""

    tensor: Tensor
    has_rows: bool

    def at(self, rows: Tensor | None) -> Tensor:
        """The tensor, with other samples' rows."""
        if rows is None or not self.has_rows:
            return self.tensor
        return self.tensor.detach()[rows.to(self.tensor.device)]


@dataclass
class _Call:
    """One call of a function."""

    function: Callable[..., Any]
    arguments: Any
    """(args, kwargs), with each tensor as a `_Made` or a `_Given`."""
    made: list[int]
    """Numbers of the tensors in what it returned."""
    read: Any
    """Value that it returned, if that is no tensor."""
    has_gradients: bool
    autocast: tuple[str, torch.dtype] | None
    """Device type and type of autocast; None outside of it."""

    @contextmanager
    def state(self) -> Iterator[None]:
        """Context in which gradients and autocast are as they were."""
        with ExitStack() as stack:
            if not self.has_gradients:
                stack.enter_context(torch.no_grad())
            if self.autocast is not None:
                stack.enter_context(torch.autocast(*self.autocast))
            yield


@dataclass
class Tape:
    """The calls that made the losses of one micro-batch."""

    num_samples: int
    device_type: str
    shared: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Shapes of tensors that belong to no sample, known from this batch and earlier ones."""
    calls: list[_Call] = field(default_factory=list)
    loss: int | None = None
    """Number of the losses, [B]."""
    problem: str = ""
    """Reason for which the calls cannot be repeated."""
    num_made: int = 0
    is_scaled_by_size: bool = False
    """True if something was multiplied or divided by the number of samples."""
    _numbers: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    _by_row: set[int] = field(default_factory=set)
    """Numbers of tensors that were made of the samples' rows, or of the model's outputs."""
    _of_data: set[int] = field(default_factory=set)
    """Numbers of tensors that were made of others without rows, as a slice of all targets is."""

    def record(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        returned: Any,
        *,
        changed: Sequence[Tensor] = (),
        is_of_model: bool = False,
    ) -> None:
        """Record a call and what it returned.

        Args:
            changed: arguments that the call has changed in place.
            is_of_model: it called the model.
        """
        tensors = tensors_in(returned)
        # An attribute that is no tensor, such as `requires_grad`, tells nothing of the samples.
        is_attribute = getattr(function, "__name__", "") == "__get__"
        is_read = not tensors and not is_attribute and isinstance(returned, _READ)
        changes = returned is None and tensors_in((args, kwargs))
        if getattr(function, "__name__", "") in _SCALING:
            numbers = [x for x in (*args, *kwargs.values()) if type(x) in (int, float)]
            self.is_scaled_by_size |= self.num_samples > 1 and any(
                x in (self.num_samples, 1 / self.num_samples) for x in numbers
            )
        # What is left sets torch's own state, which is repeated with each call, or asks for it.
        if not (tensors or is_read or changes):
            return
        weight = kwargs.get("weight") if function in _WEIGHTED_BY_CLASS else None
        if weight is not None:
            self.shared[weight] = weight.shape
        own = set(map(id, changed))
        arguments = pytree.tree_map_only(
            Tensor, lambda x: self._argument(x, is_changed=id(x) in own), (args, kwargs)
        )
        made = [self._number(tensor) for tensor in tensors]
        self._note_origin(arguments, {*made, *map(self._number, changed)}, is_of_model=is_of_model)
        autocast = None
        if torch.is_autocast_enabled(self.device_type):
            autocast = self.device_type, torch.get_autocast_dtype(self.device_type)
        self.calls.append(
            _Call(
                function,
                arguments,
                made,
                returned if is_read else None,
                torch.is_grad_enabled(),
                autocast,
            )
        )

    def code(self) -> int:
        """Hash of the functions called, in order."""
        return hash(tuple(getattr(call.function, "__qualname__", "") for call in self.calls))

    def refuse(self, problem: str) -> None:
        """Note that the calls cannot be repeated; the first reason counts."""
        self.problem = self.problem or problem

    def end(self, loss_B: Tensor) -> None:
        """Note the losses."""
        self._share_tables_of_classes()
        if loss_B not in self._numbers:
            self.refuse("they come from a function that torch does not report")
        self.loss = self._numbers.get(loss_B)
        # Tensors of the batch may be freed.
        self._numbers = WeakTensorKeyDictionary()

    def _share_tables_of_classes(self) -> None:
        """Tables that the targets of a loss are looked up in belong to no sample."""
        labels: set[int] = set()
        for call in self.calls:
            if call.function in _WEIGHTED_BY_CLASS:
                (_, *others), kwargs = call.arguments
                target = kwargs.get("target", others[0] if others else None)
                labels |= {id(target.tensor)} if isinstance(target, _Given) else set()
        for call in self.calls:
            used = call.arguments[0][:2] if call.function in _LOOKING_UP else ()
            if len(used) == 2 and all(isinstance(x, _Given) for x in used):
                table, index = (x.tensor for x in used)
                if id(index) in labels and table is not index:
                    self.shared[table] = table.shape
        for call in self.calls:
            call.arguments = pytree.tree_map_only(_Given, self._with_known_rows, call.arguments)

    def _with_known_rows(self, given: _Given) -> _Given:
        is_shared = self.shared.get(given.tensor) == given.tensor.shape
        return replace(given, has_rows=False) if is_shared else given

    def replay(self, rows: Tensor | None) -> Tensor:
        """The losses, computed again, [B].

        Args:
            rows: [B] samples whose rows take the places of the batch's own; None for its own.
        Raises:
            TapeError: the calls cannot be repeated, or the code read a number that depends on
                several samples.
        """
        if self.problem or self.loss is None:
            raise TapeError(
                f"loss: expected losses that can be computed again to be checked, but "
                f"{self.problem}. Use backward(inputs, targets) with the loss given to "
                "make_private, or spot_check=False."
            )
        made: dict[int, Any] = {}

        def value(argument: Any) -> Any:
            if isinstance(argument, _Made):
                return made[argument.number]
            return argument.at(rows) if isinstance(argument, _Given) else argument

        for call in self.calls:
            args, kwargs = pytree.tree_map(value, call.arguments)
            with call.state():
                returned = call.function(*args, **kwargs)
            made.update(zip(call.made, tensors_in(returned), strict=True))
            if call.read is not None and not _is_same(call.read, returned):
                name = getattr(call.function, "__name__", "a function")
                raise TapeError(
                    f"loss: expected one that depends on its own sample alone, but {name}() reads "
                    "a number from several samples, which may go into it. Compute the loss "
                    "without it, and metrics after backward()."
                )
        loss_B: Tensor = made[self.loss]
        return loss_B

    def given_rows(self) -> Iterator[Tensor]:
        """Tensors with a row for each sample that the code did not make itself."""
        for call in self.calls:
            for argument in pytree.tree_leaves(call.arguments):
                if isinstance(argument, _Given) and argument.has_rows:
                    yield argument.tensor

    def _note_origin(self, arguments: Any, made: set[int], *, is_of_model: bool) -> None:
        """Note what the tensors `made` are made of."""
        used = pytree.tree_leaves(arguments)
        numbers = {x.number for x in used if isinstance(x, _Made)}
        given = [x for x in used if isinstance(x, _Given)]
        if is_of_model or numbers & self._by_row or any(x.has_rows for x in given):
            self._by_row |= made
        elif given or numbers & self._of_data:
            self._of_data |= made

    def _argument(self, tensor: Tensor, *, is_changed: bool) -> _Made | _Given:
        number = self._numbers.get(tensor)
        if number is not None:
            is_slice = number in self._of_data and number not in self._by_row
            has_rows = tensor.shape[:1] == (self.num_samples,) and self._has_rows(tensor)
            if is_changed or not (is_slice and has_rows):
                return _Made(number)
            return _Given(tensor, has_rows=True)
        if tensor.grad_fn is not None:
            self.refuse("a tensor in them comes from a function that torch does not report")
        return _Given(tensor, self._has_rows(tensor))

    def _has_rows(self, tensor: Tensor) -> bool:
        """True if a tensor that the code did not make has a row for each sample."""
        if tensor.dim() > 0 and len(tensor) != self.num_samples:
            self.shared[tensor] = tensor.shape
        is_shared = isinstance(tensor, nn.Parameter) or self.shared.get(tensor) == tensor.shape
        return tensor.dim() > 0 and not is_shared

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = self.num_made
            self.num_made += 1
        number: int = self._numbers[tensor]
        return number


class Recording(TorchFunctionMode):
    """Records every torch function that is called within it."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.is_paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and record the call."""
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        versions = [x._version for x in tensors]
        returned = func(*args, **kwargs)
        pairs = zip(tensors, versions, strict=True)
        changed = [x for x, version in pairs if x._version != version]
        if any(x not in self.tape._numbers for x in changed):
            self.tape.refuse("they change a tensor in place that was made before, as targets")
        self.tape.record(func, args, kwargs, returned, changed=changed)
        return returned


def _is_same(a: Any, b: Any) -> bool:
    """True if two numbers, or arrays of them, differ by rounding at most."""
    if isinstance(a, list | np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        return a.shape == b.shape and bool(
            np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
        )
    if isinstance(a, float):
        both_nan = math.isnan(a) and math.isnan(b)
        return both_nan or a == b or math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(a == b)
