"""Refuses changes of a private model or its gradients by others, checked in every batch.

The checks compare identities, flags and version counters: microseconds per hundred modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.distributed.sharding import as_local, fsdp_units, trainable_parameters
from dpsgd_track.privacy.layers.inventory import mixes_samples, refuse_unfit


class ModelGuard:
    """Compares a model with its state when it was made private."""

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: naming layers that mix samples or keep data of them.
        """
        refuse_unfit(model)
        named = list(model.named_modules())
        # FSDP2 replaces parameters by other tensors as it runs: there only names are compared.
        self._entries_of = _keys if fsdp_units(model) else _values
        self._names = [fqn or "model" for fqn, _ in named]
        self._children = [module._modules for _, module in named]
        self._own = [module._parameters for _, module in named]
        self._before = self._structure()
        self._parameters = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
        self._buffers = [(fqn, module._buffers) for fqn, module in named]
        self._mixing = [(fqn, m) for fqn, m in named if mixes_samples(m, in_training=True)]

    def check(self) -> None:
        """Refuse a model that has changed.

        Raises:
            ValueError: naming the module or parameter that has changed.
        """
        now = self._structure()
        if len(now) != len(self._before) or not all(map(is_, now, self._before)):
            self._refuse_structure()
        for name, parameter, before in self._parameters:
            if parameter.requires_grad != before:
                _refuse(name, f"requires_grad={before}", str(not before))
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise ValueError(
                    f"{name}: expected no hook on the gradient of a parameter, got one. It would "
                    "not see the clipped sum. Remove it."
                )
        for fqn, module in self._mixing:
            if mixes_samples(module, in_training=module.training):
                raise ValueError(
                    f"{fqn}: expected {type(module).__name__} in its eval mode, got it in training "
                    "mode, where it mixes the samples of a batch or keeps their statistics. Call "
                    "its eval() after model.train(), or use GroupNorm."
                )

    @contextmanager
    def watching_forward(self) -> Iterator[None]:
        """Context in which a batch runs and must leave buffers and parameters alone.

        Raises:
            ValueError: the batch wrote into one of them, which bypasses clipping and noise.
        """
        before = self._versions()
        yield
        now = self._versions()
        written = sorted(
            ".".join(filter(None, key))
            for key in before.keys() | now.keys()
            if key not in before or key not in now or _differ(before[key], now[key])
        )
        if not written:
            return
        raise ValueError(
            f"{', '.join(written)}: expected a forward that leaves the model as it is, got one "
            "that writes into it. What it keeps of the samples is neither clipped nor covered by "
            "noise. Freeze the statistics (track_running_stats=False, max_norm=None, eval mode), "
            "or keep them outside of the model."
        )

    def _structure(self) -> list[object]:
        """All modules, and all parameters or their names, in order."""
        return [*_values(self._children), *self._entries_of(self._own)]

    def _refuse_structure(self) -> None:
        now, before = iter(self._structure()), iter(self._before)
        sizes = [*map(len, self._children), *map(len, self._own)]
        for where, size in zip(self._names * 2, sizes, strict=True):
            if any(next(now) is not next(before, None) for _ in range(size)):
                _refuse(where, "modules and parameters as they were", "others")
        _refuse("model", "modules and parameters as they were", "fewer")

    def _versions(self) -> dict[tuple[str, str], tuple[Tensor | None, int]]:
        """Each parameter and buffer with its version; a forward may register new buffers."""
        parameters = (("", name, parameter) for name, parameter, _ in self._parameters)
        buffers = ((fqn, name, own[name]) for fqn, own in self._buffers for name in own)
        return {
            (fqn, name): (tensor, version_of(tensor))
            for fqn, name, tensor in chain(parameters, buffers)
        }


class GradientGuard:
    """Detects changes of `.grad` by others while batches are being added."""

    def __init__(self, model: nn.Module, *, keeps_sums_elsewhere: bool) -> None:
        """
        Args:
            keeps_sums_elsewhere: the mode does not keep its sums in `.grad`. A gradient of zeros on
                one parameter then stands for them.
        """
        parameters = list(trainable_parameters(model).values())
        self._keeps_sums_elsewhere = keeps_sums_elsewhere
        self._parameters = parameters
        if keeps_sums_elsewhere:
            self._parameters = sorted(parameters, key=Tensor.numel)[:1]
        self._seen: list[tuple[Tensor | None, int]] = []

    def note(self) -> None:
        """Note the gradients after a batch was added."""
        if self._keeps_sums_elsewhere and not self._seen:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self._seen = [(p.grad, version_of(p.grad)) for p in self._parameters]

    def check(self) -> None:
        """Refuse gradients that have changed since they were noted.

        Raises:
            RuntimeError: other code has cleared a gradient, or added to it.
        """
        for parameter, (gradient, version) in zip(self._parameters, self._seen, strict=False):
            if parameter.grad is gradient and version_of(gradient) == version:
                continue
            was_cleared = parameter.grad is None or not bool(as_local(parameter.grad).any())
            what = (
                "one that was cleared, as model.zero_grad() does. Call optimizer.zero_grad(): it "
                "forgets the batches too"
                if was_cleared
                else "another. A backward of another loss has added to it, and it is not clipped"
            )
            raise RuntimeError(f".grad: expected the gradient that backward() left, got {what}.")

    def release(self) -> None:
        """Remove the gradient that stands for sums that are kept elsewhere."""
        if self._keeps_sums_elsewhere and self._seen:
            for parameter, (gradient, _) in zip(self._parameters, self._seen, strict=True):
                if parameter.grad is gradient:
                    parameter.grad = None
        self._seen = []


def _differ(before: tuple[Tensor | None, int], now: tuple[Tensor | None, int]) -> bool:
    return before[0] is not now[0] or before[1] != now[1]


def version_of(tensor: Tensor | None) -> int:
    """Number of changes in place of a tensor so far; 0 of none."""
    return 0 if tensor is None else tensor._version


def _values(tables: list[dict[str, Any]]) -> Iterable[object]:
    return chain.from_iterable(table.values() for table in tables)


def _keys(tables: list[dict[str, Any]]) -> Iterable[object]:
    return chain.from_iterable(tables)


def _refuse(where: str, expected: str, got: str) -> None:
    raise ValueError(
        f"{where}: expected {expected} when the model was made private, got {got}. Call "
        "make_private again after such a change: it goes on from what was spent."
    )
