"""Modules that no rule knows: run on one copy of their parameters for each sample.

While a batch is captured the module's forward is mapped over the samples, each seen as a batch
of one, with parameters expanded to [B, *parameter]. Autograd then delivers the gradient of each
copy, which is the per-sample gradient, whatever the module computes: nothing is recomputed, and
dropout inside is drawn once. The mapping is `torch.func.vmap`; a module that cannot be
vectorised is run sample by sample, which is the same definition.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.layers.inventory import Layer

_logger = logging.getLogger(__name__)

Forward = Callable[..., Any]


def expand(capture: Capture, layer: Layer) -> None:
    """Make the layer's module run on per-sample copies whenever a batch is captured."""
    module = layer.module
    plain: Forward = module.forward
    each = _EachSample(layer, plain)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not capture.is_capturing:
            return plain(*args, **kwargs)
        assert capture.num_samples is not None
        parameters = dict(module.named_parameters())
        copies = {
            name: parameters[name].expand(capture.num_samples, *parameters[name].shape)
            for name in layer.names
        }
        capture.note_parameters(layer)
        if capture.open_call(layer):
            for name, copy in copies.items():
                capture.want(layer, name, copy)
        return each(copies, args, kwargs)

    module.forward = forward


class _EachSample:
    """Maps a module's forward over samples and per-sample parameters."""

    def __init__(self, layer: Layer, plain: Forward) -> None:
        self.layer, self.plain = layer, plain
        self.shell = _Shell(layer.module, plain)
        self.is_vectorised = True
        self.sample_dims: list[int] = []
        """Dimension of the samples in each output tensor, from the first batch of several."""

    def __call__(self, copies: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        num_samples = len(next(iter(copies.values())))
        if num_samples == 1:
            return self._one({name: copy[0] for name, copy in copies.items()}, args, kwargs)
        if not self.sample_dims:
            self._verify(copies, args, kwargs)
        found, structure = self._run(copies, args, kwargs)
        dims = iter(self.sample_dims)
        joined = [_joined(x, next(dims)) if isinstance(x, Tensor) else x for x in found]
        return pytree.tree_unflatten(joined, structure)

    def _one(self, copy: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        named = {f"inner.{name}": value for name, value in copy.items()}
        return torch.func.functional_call(self.shell, named, args, kwargs)

    def _run(self, copies: dict[str, Tensor], args: Any, kwargs: Any) -> tuple[list[Any], Any]:
        """Outputs for each sample, tensors stacked along a new dimension 0, and their structure."""
        num_samples = len(next(iter(copies.values())))
        leaves, structure = pytree.tree_flatten((args, kwargs))
        in_dims = [_sample_dim(leaf, num_samples) for leaf in leaves]
        out_structure: list[Any] = []

        def one(copy: dict[str, Tensor], leaves: list[Any]) -> list[Any]:
            alone = [
                leaf if dim is None else leaf.unsqueeze(0)
                for leaf, dim in zip(leaves, in_dims, strict=True)
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
                    mapped = torch.vmap(one, (0, in_dims), randomness="different")
                    return mapped(copies, leaves), out_structure[0]
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.is_vectorised = False
                reason = str(error).splitlines()[0]
                _logger.warning("%s runs sample by sample: %s", self.layer.fqn, reason)
        out_structure.clear()
        rows = [
            one(
                {name: copy[i] for name, copy in copies.items()},
                [leaf if d is None else leaf[i] for leaf, d in zip(leaves, in_dims, strict=True)],
            )
            for i in range(num_samples)
        ]
        columns = zip(*rows, strict=True)
        stacked = [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        return stacked, out_structure[0]

    @torch.no_grad()
    def _verify(self, copies: dict[str, Tensor], args: Any, kwargs: Any) -> None:
        """Hold one mapped forward against the plain one: samples must not see each other.

        Raises:
            ValueError: they do.
        """
        module = self.layer.module
        was_training = {m: m.training for m in module.modules()}
        module.eval()
        try:
            mapped, _ = self._run(copies, args, kwargs)
            plain = pytree.tree_leaves(self.plain(*args, **kwargs))
        finally:
            for m, training in was_training.items():
                m.training = training
        for found, wanted in zip(mapped, plain, strict=True):
            if not isinstance(found, Tensor):
                continue
            fitting = [d for d in range(found.dim() - 1) if _is_close(_joined(found, d), wanted)]
            if not fitting:
                raise ValueError(
                    f"{self.layer.fqn}: expected a module that treats each sample by itself, got "
                    "other outputs for a batch than for its samples one at a time. "
                    "Freeze the module, or give it a rule."
                )
            self.sample_dims.append(fitting[0])


def _sample_dim(leaf: object, num_samples: int) -> int | None:
    return 0 if isinstance(leaf, Tensor) and leaf.shape[:1] == (num_samples,) else None


def _joined(output: Tensor, dim: int) -> Tensor:
    """Samples [B, ...], each with a dimension `dim` of 1, as one batch along that dimension."""
    return output.movedim(0, dim).flatten(dim, dim + 1)


class _Shell(nn.Module):
    """Holds the module, so that `functional_call` runs its plain forward without its hooks."""

    def __init__(self, inner: nn.Module, plain: Forward) -> None:
        super().__init__()
        self.inner = inner
        self.plain = plain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Rounding is far below the square root of the unit, a mistake far above.
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).float().norm() <= tolerance * b.float().norm())
