"""Modules that no rule knows: run on one copy of their parameters for each sample.

While a batch is captured the module's forward is mapped over the samples, each seen as a batch
of one, with parameters expanded to [B, *parameter]. Autograd then delivers the gradient of each
copy, which is the per-sample gradient, whatever the module computes: nothing is recomputed, and
dropout inside is drawn once. The mapping is `torch.func.vmap`; a module that cannot be
vectorised is run sample by sample, which is the same definition.

Which dimension of each argument and output holds the samples is learned from a call in which
their number is equal to no other size (`privacy.sample_dim`), and kept: it is no matter of sizes
that happen to be equal later.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.replaced_forward import Forward

_logger = logging.getLogger(__name__)

_Copies = dict[str, Tensor]
"""[B, *parameter] by the parameter's name in the module."""


SPREAD = -1
"""In place of a dimension."""


@dataclass(frozen=True)
class SampleDims:
    """Dimensions of the samples in the tensors of a call; None for what is no tensor."""

    inputs: tuple[int | None, ...]
    """None also where all samples share a tensor."""
    outputs: tuple[int | None, ...]
    """SPREAD where all samples share a tensor: each is given a copy, see `captured_layer.spread`"""

    @property
    def is_shared(self) -> bool:
        """Whether nothing that the call returned belongs to one sample."""
        return all(dim is None or dim == SPREAD for dim in self.outputs)


class MixedSamplesError(ValueError):
    """A module treats a batch in another way than its samples one at a time."""


class ExpandedLayer(CapturedLayer):
    """Runs the layer's module on per-sample copies of its parameters."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(capture, layer)
        self.shell = _Shell(layer.module)
        self.is_vectorised = True
        self.dims: dict[tuple[int | None, ...], SampleDims] = {}
        """By the number of dimensions of each argument; None for what is no tensor."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns, each sample's part from the sample's copy."""
        capture = self.capture
        assert capture.num_samples is not None
        copies = {
            name: leaf.expand(capture.num_samples, *leaf.shape)
            for name, leaf in self.leaves().items()
        }
        if capture.open_call(self.layer):
            for name, copy in copies.items():
                capture.want(self.layer, name, copy)
        if capture.num_samples == 1:
            return self._one({name: copy[0] for name, copy in copies.items()}, args, kwargs)
        dims = self.dims.get(_kind(args, kwargs)) or self.learn(copies, args, kwargs)
        assert dims is not None
        found, structure = self._map(copies, dims.inputs, args, kwargs)
        joined = [
            _joined(x, dim) if isinstance(x, Tensor) else x
            for x, dim in zip(found, dims.outputs, strict=True)
        ]
        return pytree.tree_unflatten(joined, structure)

    @torch.no_grad()
    def learn(self, copies: _Copies, args: Any, kwargs: Any) -> SampleDims | None:
        """Find the samples' dimensions, and hold the mapped forward against the module's own.

        Args:
            copies: of as many samples as the call has.
        Returns:
            The dimensions; None where a call of the same kind had the samples elsewhere, or where
            the module keeps tensors for later, which belong to one sample's run.
        Raises:
            MixedSamplesError: a sample's output depends on the other samples.
        """
        num_samples = len(next(iter(copies.values())))
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = tuple(_dim_of_size(leaf, num_samples) for leaf in leaves)
        known = self.dims.get(_kind(args, kwargs))
        if known is not None:
            return known if known.inputs == inputs else None
        with in_eval_mode(self.module):
            mapped, _ = self._map(copies, inputs, args, kwargs)
            if self._keeps_mapped_tensors():
                return None
            plain = pytree.tree_leaves(self.plain(*args, **kwargs))
        outputs = tuple(
            self._dim_of_output(found, wanted) for found, wanted in zip(mapped, plain, strict=True)
        )
        dims = self.dims[_kind(args, kwargs)] = SampleDims(inputs, outputs)
        return dims

    def _keeps_mapped_tensors(self) -> bool:
        return any(
            isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)
            for module in self.module.modules()
            for value in vars(module).values()
        )

    def _dim_of_output(self, found: Any, wanted: Any) -> int | None:
        if not isinstance(found, Tensor):
            return None
        if found.shape[1:] == wanted.shape and _is_close(found, wanted.expand_as(found)):
            return SPREAD
        fitting = [d for d in range(found.dim() - 1) if _is_close(_joined(found, d), wanted)]
        if not fitting:
            raise MixedSamplesError(
                f"{self.layer.fqn}: expected a module that treats each sample by itself, got "
                "other outputs for a batch than for its samples one at a time. "
                "Freeze the module, or give it a rule."
            )
        return fitting[0]

    def _one(self, copy: _Copies, args: Any, kwargs: Any) -> Any:
        self.shell.plain = self.plain
        named = {f"inner.{name}": value for name, value in copy.items()}
        with _no_cached_parametrisations():
            return torch.func.functional_call(self.shell, named, args, kwargs)

    def _map(
        self, copies: _Copies, dims: Sequence[int | None], args: Any, kwargs: Any
    ) -> tuple[list[Any], Any]:
        """Outputs for each sample, tensors stacked along a new dimension 0, and their structure."""
        num_samples = len(next(iter(copies.values())))
        leaves, structure = pytree.tree_flatten((args, kwargs))
        out_structure: list[Any] = []

        def one(copy: _Copies, leaves: list[Any]) -> list[Any]:
            alone = [
                leaf if dim is None else leaf.unsqueeze(dim)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            found, out = pytree.tree_flatten(
                self._one(copy, *pytree.tree_unflatten(alone, structure))
            )
            out_structure.append(out)
            return found

        if self.is_vectorised:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    mapped = torch.vmap(one, (0, list(dims)), randomness="different")
                    return mapped(copies, leaves), out_structure[0]
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.is_vectorised = False
                reason = str(error).splitlines()[0]
                _logger.warning("%s runs sample by sample: %s", self.layer.fqn, reason)
        out_structure.clear()
        rows = [
            one(
                {name: copy[i] for name, copy in copies.items()},
                [
                    leaf if dim is None else leaf.select(dim, i)
                    for leaf, dim in zip(leaves, dims, strict=True)
                ],
            )
            for i in range(num_samples)
        ]
        columns = zip(*rows, strict=True)
        stacked = [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        return stacked, out_structure[0]


@contextmanager
def _no_cached_parametrisations() -> Iterator[None]:
    """Within it every use of a parametrised tensor computes it, as each sample has its own."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


def _kind(args: Any, kwargs: Any) -> tuple[int | None, ...]:
    leaves = pytree.tree_leaves((args, kwargs))
    return tuple(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves)


def _dim_of_size(leaf: object, size: int) -> int | None:
    """The first dimension of that size."""
    if not isinstance(leaf, Tensor) or size not in leaf.shape:
        return None
    return leaf.shape.index(size)


def _joined(output: Tensor, dim: int | None) -> Tensor:
    """Samples [B, ...], each with a dimension `dim` of 1, as one batch along that dimension."""
    if dim == SPREAD:
        return output[:, 0] if output.shape[1:2] == (1,) else output
    assert dim is not None
    return output.movedim(0, dim).flatten(dim, dim + 1)


class _Shell(nn.Module):
    """Holds the module, so that `functional_call` runs its plain forward without its hooks."""

    plain: Forward

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # A sample that is not finite is no reason to doubt the others.
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    # Rounding is far below the square root of the unit, a mistake far above.
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).float().norm() <= tolerance * b.float().norm())
