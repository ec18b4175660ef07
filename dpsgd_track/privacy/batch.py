"""One micro-batch of one rank."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.loss import PerSampleLoss, logits_of


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings, dataclasses and outputs of transformers."""
    tensors: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif _is_dataclass(leaf):
            tensors += tensors_in([getattr(leaf, each.name) for each in fields(leaf)])
    return tensors


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with each tensor replaced."""

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not _is_dataclass(leaf):
            return leaf
        # Its constructor may compute more than its fields.
        made = copy.copy(leaf)
        for each in fields(leaf):
            value = map_tensors(function, getattr(leaf, each.name))
            object.__setattr__(made, each.name, value)
        return made

    return pytree.tree_map(mapped, tree)


def _is_dataclass(leaf: Any) -> bool:
    return is_dataclass(leaf) and not isinstance(leaf, type)


def blank_sample(name: str, rows: Tensor) -> Tensor:
    """One row of zeros like those of `rows`, or of ones if it is a mask by its name."""
    shape = (1, *rows.shape[1:])
    return rows.new_ones(shape) if name.endswith("mask") else rows.new_zeros(shape)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in `dtype`; others, and all if that is None, as they are."""
    return x.to(dtype) if dtype and x.is_floating_point() else x


class Rows(ABC):
    """Samples that a model can be run on, in other numbers and orders too."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """All tensors whose dimension 0 is the sample."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Self:
        """The samples with these indices."""

    def with_other_masks(self) -> Iterator[Self]:
        """The samples with nothing masked, and with their last positions masked, if the masks are
        known: some models run other operations where a batch has no padding."""
        yield from ()


class RepeatableBatch(Rows):
    """A micro-batch of one rank whose losses can be computed again; it may be empty."""

    @abstractmethod
    def stand_in(self) -> Self:
        """A batch that an empty one runs as, so that its rank takes part in collectives."""

    @abstractmethod
    def outputs(
        self, model: nn.Module, loss: PerSampleLoss, dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor]:
        """The model's logits, None if they are not known, and the samples' losses, [B].

        Args:
            loss: of the logits and targets; unused if the batch has a loss of its own.
            dtype: type that floating inputs of the model are cast to; None leaves them.
        """

    def padded(self, indices: Tensor) -> Tensor:
        """`indices`, followed by more of them if `rows` can take no fewer than all samples."""
        return indices

    def code(self) -> int:
        """Hash of the functions that form the losses, where these may differ between batches."""
        return 0

    def outputs_in_halves(
        self, model: nn.Module, dtype: torch.dtype | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The model's outputs in the batch and in two halves of it, [B, elements], for each call.

        Nothing for a batch that can be run in parts itself.
        """
        yield from ()

    def restore_random_state(self) -> None:
        """Set the generators to what the batch's losses were first computed with."""


@dataclass(frozen=True)
class Batch(RepeatableBatch):
    """One micro-batch of one rank; it may be empty."""

    inputs: dict[str, Tensor]
    """The model's keyword arguments; dimension 0 of every tensor is the sample."""
    targets: Tensor
    """Second argument of the loss (see `dpsgd_track.privacy.loss`); dimension 0 is the sample."""
    args: tuple[Tensor, ...] = field(default=(), kw_only=True)
    """The model's positional arguments; dimension 0 is the sample."""

    def __len__(self) -> int:
        return len(self.targets)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, the targets last."""
        yield from (*self.args, *self.inputs.values(), self.targets)

    def sample(self, index: int) -> Batch:
        """Sample `index` alone, as a batch of one."""
        return self.mapped(lambda name, t: t[index : index + 1])

    def rows(self, indices: Tensor) -> Batch:
        """The samples with these indices."""
        return self.mapped(lambda name, t: t[indices.to(t.device)])

    def with_other_masks(self) -> Iterator[Batch]:
        """The samples with nothing masked, and with their last positions masked."""

        def masked(name: str, t: Tensor, last: int) -> Tensor:
            if not name.endswith("mask") or t.dim() < 2:
                return t
            mask = torch.ones_like(t)
            mask[..., -1] = last
            return mask

        if any(name.endswith("mask") for name in self.inputs):
            yield self.mapped(partial(masked, last=1))
            yield self.mapped(partial(masked, last=0))

    def stand_in(self) -> Batch:
        """One sample of zeros in the same shapes, with masks of ones."""
        return self.mapped(blank_sample)

    def outputs(
        self, model: nn.Module, loss: PerSampleLoss, dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor]:
        """The model's logits, and their losses, [B]."""
        logits = self.run(model, dtype)
        return logits, loss(logits, self.targets)

    def run(self, model: Callable[..., Any], dtype: torch.dtype | None = None) -> Tensor:
        """Logits of `model` over the batch; floating inputs are cast to `dtype`."""
        inputs = {name: cast(t, dtype) for name, t in self.inputs.items()}
        return logits_of(model(*(cast(t, dtype) for t in self.args), **inputs))

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> Batch:
        """The batch with `function` of the name and the values in place of each tensor."""
        inputs = {name: function(name, t) for name, t in self.inputs.items()}
        args = tuple(function("", t) for t in self.args)
        return Batch(inputs, function("", self.targets), args=args)
