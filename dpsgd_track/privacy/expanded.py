"""Modules that no rule knows: run on one copy of their parameters for each sample.

While a batch is captured the module's forward is mapped over the samples, each seen as a batch
of one, with parameters expanded to [B, *parameter]. Autograd then delivers the gradient of each
copy, which is the per-sample gradient, whatever the module computes: nothing is recomputed, and
dropout inside is drawn once. The mapping is `torch.func.vmap`; a module that cannot be
vectorised is run sample by sample, which is the same definition.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.terms import Dense

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
        if capture.open_call(layer):
            for name, copy in copies.items():
                _report(capture, layer, name, copy)
        return each(copies, args, kwargs)

    module.forward = forward


def _report(capture: Capture, layer: Layer, name: str, copy: Tensor) -> None:
    edge = get_gradient_edge(copy)
    capture.note_output(layer, edge, edge)
    copy.register_hook(lambda grad_B: capture.add_term(layer.names[name], Dense(grad_B.detach())))


class _EachSample:
    """Maps a module's forward over samples and per-sample parameters."""

    def __init__(self, layer: Layer, plain: Forward) -> None:
        self.layer, self.plain = layer, plain
        self.shell = _Shell(layer.module, plain)
        self.is_verified = False
        self.is_vectorised = True

    def __call__(self, copies: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        if not self.is_verified:
            self._verify(copies, args, kwargs)
        return self._run(copies, args, kwargs)

    def _run(self, copies: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        num_samples = len(next(iter(copies.values())))
        leaves, structure = pytree.tree_flatten((args, kwargs))
        is_batched = [isinstance(x, Tensor) and x.shape[:1] == (num_samples,) for x in leaves]

        def one(copy: dict[str, Tensor], leaves: list[Any]) -> Any:
            alone = [
                leaf.unsqueeze(0) if batched else leaf
                for leaf, batched in zip(leaves, is_batched, strict=True)
            ]
            args, kwargs = pytree.tree_unflatten(alone, structure)
            named = {f"inner.{name}": value for name, value in copy.items()}
            return torch.func.functional_call(self.shell, named, args, kwargs)

        if self.is_vectorised:
            try:
                in_dims = (0, [0 if batched else None for batched in is_batched])
                found = torch.vmap(one, in_dims, randomness="different")(copies, leaves)
                return pytree.tree_map(self._joined, found)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.is_vectorised = False
                reason = str(error).splitlines()[0]
                _logger.warning("%s runs sample by sample: %s", self.layer.fqn, reason)
        found = [
            one(
                {name: copy[i] for name, copy in copies.items()},
                [x[i] if batched else x for x, batched in zip(leaves, is_batched, strict=True)],
            )
            for i in range(num_samples)
        ]
        return pytree.tree_map(
            lambda *outputs: (
                self._joined(torch.stack(outputs)) if isinstance(outputs[0], Tensor) else outputs[0]
            ),
            *found,
        )

    def _joined(self, output: Tensor) -> Tensor:
        """[B, 1, ...] -> [B, ...]."""
        if output.dim() < 2 or output.shape[1] != 1:
            raise ValueError(
                f"{self.layer.fqn}: expected outputs with the sample in dimension 0, got shape "
                f"{tuple(output.shape[1:])} for one sample. Freeze the module, or give it a rule."
            )
        return output.flatten(0, 1)

    @torch.no_grad()
    def _verify(self, copies: dict[str, Tensor], args: Any, kwargs: Any) -> None:
        """Hold one mapped forward against the plain one: samples must not see each other."""
        module = self.layer.module
        was_training = {m: m.training for m in module.modules()}
        module.eval()
        try:
            mapped = self._run(copies, args, kwargs)
            plain = self.plain(*args, **kwargs)
        finally:
            for m, training in was_training.items():
                m.training = training
        for a, b in zip(pytree.tree_leaves(mapped), pytree.tree_leaves(plain), strict=True):
            if isinstance(a, Tensor) and not _is_close(a, b):
                raise ValueError(
                    f"{self.layer.fqn}: expected a module that treats each sample by itself, got "
                    "other outputs for a batch than for its samples one at a time. "
                    "Freeze the module, or give it a rule."
                )
        self.is_verified = True


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
