"""Modules without a rule: run on one copy of their parameters for each sample.

While a batch is captured, the module's forward is mapped over the samples, each as a batch of one,
with parameters expanded to [B, *parameter]. The gradient that autograd forms of each copy is the
per-sample gradient, whatever the module computes. Nothing is recomputed, and dropout inside is
drawn once. The mapping is `torch.func.vmap`; a module that cannot be vectorised runs sample by
sample, which computes the same. Tensors of the samples that the module keeps as attributes, such as
the last state of a recurrence, are taken apart and joined as its arguments and outputs are.

The samples' dimension in each argument and output is learned from a call in which the number of
samples equals no other size (`privacy.sample_dim`), and kept, so that sizes that are equal by
chance later do not matter.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.layers.inventory import Layer, is_recurrent
from dpsgd_track.privacy.mapped_calls import MappedCalls, is_mapped, mapped_functions
from dpsgd_track.privacy.replaced_forward import Forward
from dpsgd_track.privacy.shared_rows import Course, SharedRows, rows_of

_logger = logging.getLogger(__name__)

_Copies = dict[str, Tensor]
"""[B, *parameter] by the parameter's name in the module."""

_RunOne = Callable[[_Copies, list[Any]], list[Tensor]]
"""Runs a module for one sample, on its copies and the leaves of its arguments."""

Kind = tuple[tuple[int, bool] | None, ...]
"""For each argument of a call, (number of dimensions, True if it is shared and holds a row for each
sample) of a tensor, and None for anything else."""


SPREAD = -1
"""In place of a dimension: all samples share the tensor, and each is given a copy of it."""

GROUPED = -2
"""In place of a dimension: dimension 0 has several rows of each sample, one after the other."""

ROWS = -3
"""In place of a dimension: all samples share the tensor, which holds a row for each of them."""


Attribute = tuple[str, str]
"""Name of a module in the layer's, and of an attribute of it that is no parameter or buffer."""


@dataclass(frozen=True)
class SampleDims:
    """Dimension of the samples in each tensor of a call; None for other arguments."""

    inputs: tuple[int | None, ...]
    """None also for a tensor that all samples share."""
    outputs: tuple[int | None, ...]
    """SPREAD for a tensor that all samples share (see `captured_layer.spread`)."""
    kept: Mapping[Attribute, int] = field(default_factory=dict)
    """The samples' dimension in each tensor that the module keeps as an attribute."""

    @property
    def is_shared(self) -> bool:
        """True if all samples share every tensor that the call returned."""
        return all(dim is None or dim == SPREAD for dim in self.outputs)


class MixedSamplesError(ValueError):
    """A module computes something else for a batch than for its samples one at a time."""


class ExpandedLayer(CapturedLayer):
    """Runs the layer's module on per-sample copies of its parameters."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(capture, layer)
        self.shell = _Shell(layer.module)
        # torch.func has no rule for torch's recurrent kernels.
        self.is_vectorised = not is_recurrent(layer.module)
        self.calls = MappedCalls()
        self.is_grouped = False
        """True if the samples have several rows each in what the module reads, one sample after the
        other (`privacy.grouped_rows`)."""
        self.course: Course | None = None
        """To where outputs that all samples share meet the samples, if that is later."""
        self.dims: dict[Kind, SampleDims] = {}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, with each sample's part computed from the sample's copy."""
        capture = self.capture
        assert capture.num_samples is not None
        copies = {
            name: leaf.expand(capture.num_samples, *leaf.shape)
            for name, leaf in self.leaves().items()
        }
        if capture.open_call(self.layer):
            for name, copy in copies.items():
                capture.note_view(self.layer, name, copy)
        if capture.num_samples == 1:
            return self._one({name: copy[0] for name, copy in copies.items()}, args, kwargs)
        dims = self.dims.get(_kind(args, kwargs)) or self.learn(copies, args, kwargs)
        assert dims is not None
        mapped = self._map(copies, dims.inputs, dims.kept, args, kwargs)
        self._put({key: _joined(rows, dims.kept[key]) for key, rows in mapped.kept.items()})
        joined = [
            self._output(x, dim) if isinstance(x, Tensor) else x
            for x, dim in zip(mapped.outputs, dims.outputs, strict=True)
        ]
        return pytree.tree_unflatten(joined, mapped.structure)

    def _output(self, rows: Tensor, dim: int | None) -> Tensor:
        if dim == SPREAD and self.course is not None:
            return SharedRows(rows, self.course)
        return _joined(rows, dim)

    def learn(self, copies: _Copies, args: Any, kwargs: Any) -> SampleDims | None:
        """Learn the samples' dimensions, and check the mapped forward against the module's own.

        A tuple of integers with the number of samples is a batch's shape, and a tensor with a
        multiple of it in dimension 0 has several rows of each sample, if the module agrees.

        Args:
            copies: parameters expanded to the call's number of samples.
        Returns:
            The dimensions; None if a call of the same kind had its samples in others, or if the
            module keeps tensors of a forward that do not have the samples in a dimension.
        Raises:
            MixedSamplesError: a sample's output depends on the other samples.
        """
        num_samples = len(next(iter(copies.values())))
        leaves, _ = _flattened(args, kwargs)
        likely, sure = (
            tuple(
                GROUPED
                if self.is_grouped and isinstance(leaf, Tensor)
                else dim_of(leaf, num_samples)
                for leaf in leaves
            )
            for dim_of in (_likely_dim, _dim_of_size)
        )
        was_vectorised = self.is_vectorised
        for inputs in dict.fromkeys((self._known(_kind(args, kwargs), likely), likely)):
            if inputs == sure:
                break
            try:
                return self._learned(inputs, copies, args, kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                _logger.debug("%s: the samples are not in %s: %s", self.layer.fqn, inputs, error)
                self.is_vectorised = was_vectorised
        return self._learned(sure, copies, args, kwargs)

    def _known(self, kind: Kind, inputs: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """`inputs` with the dimensions of those that other kinds of calls have as well, as where a
        mask comes to the rest."""
        for other, dims in self.dims.items():
            if len(other) == len(kind):
                places = zip(kind, other, inputs, dims.inputs, strict=True)
                inputs = tuple(d if k is not None and k == o else i for k, o, i, d in places)
        return inputs

    @torch.no_grad()
    def _learned(
        self, inputs: tuple[int | None, ...], copies: _Copies, args: Any, kwargs: Any
    ) -> SampleDims | None:
        num_samples = len(next(iter(copies.values())))
        # Rows that differ, as in a trial, are no input of one run.
        args, kwargs = pytree.tree_map_only(
            SharedRows, _first_of_all, (args, kwargs), is_leaf=_is_shape
        )
        kind = _kind(args, kwargs)
        learned = self.dims.get(kind)
        if learned is not None:
            return learned if learned.inputs == inputs else None
        with in_eval_mode(self.module), self._restoring() as restore:
            alike = pytree.tree_map_only(
                SharedRows, lambda x: x.rows[0], (args, kwargs), is_leaf=_is_shape
            )
            before = self._attributes()
            expected = pytree.tree_leaves(self.original(*alike[0], **alike[1]))
            kept = {k: x for k, x in self._attributes().items() if x is not before.get(k)}
            restore()
            kept_dims = _dims_of_size(kept, num_samples)
            mapped = self._map(copies, inputs, kept_dims, args, kwargs)
            joined = {key: _joined(x, kept_dims[key]) for key, x in mapped.kept.items()}
            self._put(joined)
            is_left = any(map(is_mapped, self._attributes().values()))
            if is_left or not all(_is_close(x, kept[key]) for key, x in joined.items()):
                return None
        outputs = tuple(
            self._dim_of_output(got, wanted)
            for got, wanted in zip(mapped.outputs, expected, strict=True)
        )
        dims = self.dims[kind] = SampleDims(inputs, outputs, kept_dims)
        return dims

    def _attributes(self) -> dict[Attribute, Tensor]:
        """Tensors that the modules keep beside parameters and buffers."""
        return {
            (fqn, name): value
            for fqn, module in self.module.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    def _put(self, values: Mapping[Attribute, Any]) -> None:
        for (fqn, name), value in values.items():
            vars(self.module.get_submodule(fqn))[name] = value

    @contextmanager
    def _restoring(self) -> Iterator[Callable[[], None]]:
        """Context that leaves attributes as they are now; yields what makes them so at once."""
        kept = [(vars(module), dict(vars(module))) for module in self.module.modules()]

        def restore() -> None:
            for own, before in kept:
                for name in own.keys() - before.keys():
                    del own[name]
                own.update(before)

        try:
            yield restore
        finally:
            restore()

    def _dim_of_output(self, mapped: Any, expected: Any) -> int | None:
        if not isinstance(mapped, Tensor):
            return None
        if self.is_grouped and _is_close(_joined(mapped, GROUPED), expected):
            return GROUPED
        if mapped.shape[1:] == expected.shape and _is_close(mapped, expected.expand_as(mapped)):
            return SPREAD
        fitting = [d for d in range(mapped.dim() - 1) if _is_close(_joined(mapped, d), expected)]
        if not fitting:
            raise MixedSamplesError(
                f"{self.layer.fqn}: expected a module that treats each sample by itself, got "
                "other outputs for a batch than for its samples one at a time. "
                "Freeze the module, or give it a rule."
            )
        return fitting[0]

    def _one(self, copy: _Copies, args: Any, kwargs: Any) -> Any:
        self.shell.original = self.original
        named = {f"inner.{name}": value for name, value in copy.items()}
        with _no_cached_parametrisations():
            return torch.func.functional_call(self.shell, named, args, kwargs)

    def _map(
        self,
        copies: _Copies,
        dims: Sequence[int | None],
        kept: Mapping[Attribute, int],
        args: Any,
        kwargs: Any,
    ) -> _Mapped:
        """Run the module for each sample."""
        num_samples = len(next(iter(copies.values())))
        given, structure = _flattened(args, kwargs)
        # Each sample begins with what there is now.
        now = {(fqn, n): vars(self.module.get_submodule(fqn)).get(n) for fqn, n in kept}
        state = {
            key: x
            for key, x in now.items()
            if isinstance(x, Tensor) and x.shape[kept[key] :][:1] == (num_samples,)
        }
        given = [
            _of_one(leaf, dim, num_samples) if _is_shape(leaf) and dim is not None else leaf
            for leaf, dim in zip(given, dims, strict=True)
        ]
        leaves = [*given, *state.values()]
        dims = [*dims, *(kept[key] for key in state)]
        leaves = [
            leaf.unflatten(0, (num_samples, -1)) if dim == GROUPED else rows_of(leaf)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        # What has a dimension less for each sample than for a batch.
        has_row = [dim in (GROUPED, ROWS) for dim in dims]
        dims = [
            (0 if row else dim) if isinstance(leaf, Tensor) else None
            for leaf, dim, row in zip(leaves, dims, has_row, strict=True)
        ]
        returned: list[_Mapped] = []

        def one(copy: _Copies, leaves: list[Any]) -> list[Tensor]:
            alone = [
                leaf if dim is None or row else leaf.unsqueeze(dim)
                for leaf, dim, row in zip(leaves, dims, has_row, strict=True)
            ]
            self._put(now | dict(zip(state, alone[len(given) :], strict=True)))
            output = self._one(copy, *pytree.tree_unflatten(alone[: len(given)], structure))
            attributes = self._attributes() if kept else {}
            returned.append(
                _Mapped(*pytree.tree_flatten(output), {key: attributes[key] for key in kept})
            )
            return returned[-1].tensors()

        stacked = self._vectorised(one, copies, leaves, dims) if self.is_vectorised else None
        if stacked is None:
            stacked = _one_by_one(one, copies, leaves, dims)
        return returned[-1].with_tensors(stacked)

    def _vectorised(
        self,
        one: _RunOne,
        copies: _Copies,
        leaves: list[Any],
        dims: Sequence[int | None],
    ) -> Sequence[Tensor] | None:
        """Run `one` for all samples at once; None if that cannot be."""
        # In the first call, which tells if it is needed, and where training takes other branches.
        with_calls = self.calls.is_needed or not self.dims
        for calls in (self.calls,) if with_calls else (nullcontext(), self.calls):
            try:
                with warnings.catch_warnings(), mapped_functions(), calls:
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    mapped = torch.vmap(one, (0, list(dims)), randomness="different")
                    stacked: list[Tensor] = mapped(copies, leaves)
                    return stacked
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
        self.is_vectorised = False
        _logger.warning("%s runs sample by sample: %s", self.layer.fqn, reason)
        return None


@dataclass(frozen=True)
class _Mapped:
    """Outputs of a module and tensors that it keeps, of one sample or stacked for all."""

    outputs: list[Any]
    structure: Any
    kept: dict[Attribute, Tensor]

    def tensors(self) -> list[Tensor]:
        # An attention may return None in place of its weights.
        return [y for y in (*self.outputs, *self.kept.values()) if isinstance(y, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> _Mapped:
        """The same with others in the place of its tensors."""
        others = iter(tensors)
        outputs = [next(others) if isinstance(y, Tensor) else y for y in self.outputs]
        return replace(self, outputs=outputs, kept=dict(zip(self.kept, others, strict=True)))


def _one_by_one(
    one: _RunOne, copies: _Copies, leaves: list[Any], dims: Sequence[int | None]
) -> list[Tensor]:
    """Run `one` for each sample in turn."""
    num_samples = len(next(iter(copies.values())))
    # The gradients of what is unbound are stacked once; each selected row's would be put among
    # zeros for all.
    of_copies = {name: copy.unbind() for name, copy in copies.items()}
    of_leaves = [
        [leaf] * num_samples if dim is None else leaf.unbind(dim)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    rows = [
        one({name: of[i] for name, of in of_copies.items()}, [of[i] for of in of_leaves])
        for i in range(num_samples)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@contextmanager
def _no_cached_parametrisations() -> Iterator[None]:
    """Have each use of a parametrised tensor compute it anew, as each sample has its own."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


def _flattened(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """Tensors, shapes and other leaves of a call's arguments, and their structure."""
    return pytree.tree_flatten((args, kwargs), is_leaf=_is_shape)


def _is_shape(x: object) -> TypeGuard[tuple[int, ...]]:
    return type(x) in (tuple, torch.Size) and all(type(size) is int for size in x)  # type: ignore[attr-defined]


def _kind(args: Any, kwargs: Any) -> Kind:
    leaves, _ = _flattened(args, kwargs)
    return tuple(
        (leaf.dim(), isinstance(leaf, SharedRows)) if isinstance(leaf, Tensor) else None
        for leaf in leaves
    )


def _first_of_all(x: SharedRows) -> SharedRows:
    return SharedRows(x.rows[:1].expand_as(x.rows), x.course, x.path)


def _dim_of_size(leaf: object, size: int) -> int | None:
    """The first dimension of `leaf` that has size `size`; None if there is none."""
    if isinstance(leaf, SharedRows):
        return ROWS
    if not isinstance(leaf, Tensor) or size not in leaf.shape:
        return None
    return leaf.shape.index(size)


def _likely_dim(leaf: object, size: int) -> int | None:
    """The same, also for a shape, and GROUPED for a tensor with a multiple in dimension 0."""
    if _is_shape(leaf):
        return leaf.index(size) if size in leaf else None
    dim = _dim_of_size(leaf, size)
    if dim is not None or not isinstance(leaf, Tensor) or not leaf.dim() or not leaf.shape[0]:
        return dim
    return GROUPED if leaf.shape[0] % size == 0 else None


def _dims_of_size(tensors: Mapping[Attribute, Tensor], size: int) -> dict[Attribute, int]:
    return {key: x.shape.index(size) for key, x in tensors.items() if size in x.shape}


def _of_one(shape: tuple[int, ...], dim: int, num_samples: int) -> tuple[int, ...]:
    """A shape that a module is given, for one sample.

    Raises:
        ValueError: it is of another number of samples.
    """
    if shape[dim : dim + 1] != (num_samples,):
        raise ValueError(
            f"shape={tuple(shape)}: expected {num_samples} samples in dimension {dim}, as in the "
            "first batch. Give the module shapes of whole batches, or freeze it."
        )
    return type(shape)((*shape[:dim], 1, *shape[dim + 1 :]))


def _joined(output: Tensor, dim: int | None) -> Tensor:
    """Join outputs of batches of one, stacked as [B, ...], to one batch along `dim`."""
    if dim == GROUPED:
        return output.flatten(0, 1)
    if dim == SPREAD:
        return output[:, 0] if output.shape[1:2] == (1,) else output
    assert dim is not None
    return output.movedim(0, dim).flatten(dim, dim + 1)


class _Shell(nn.Module):
    """Holds the module, so that `functional_call` runs its own forward without its hooks."""

    original: Forward

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # A sample that is not finite says nothing of the others.
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    # Rounding errors are far below the square root of the unit roundoff, mistakes far above.
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).float().norm() <= tolerance * b.float().norm())
