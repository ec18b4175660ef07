"""One micro-batch of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpsgd_track.privacy.loss import logits_of


@dataclass(frozen=True)
class Batch:
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
        return self._mapped(lambda name, t: t[index : index + 1])

    def rows(self, indices: Tensor) -> Batch:
        """The samples with these indices."""
        return self._mapped(lambda name, t: t[indices.to(t.device)])

    def stand_in(self) -> Batch:
        """One sample of zeros in the same shapes, with masks of ones."""

        def blank(name: str, t: Tensor) -> Tensor:
            shape = (1, *t.shape[1:])
            return t.new_ones(shape) if name.endswith("mask") else t.new_zeros(shape)

        return self._mapped(blank)

    def run(self, model: Callable[..., Any], dtype: torch.dtype | None = None) -> Tensor:
        """Logits of `model` over the batch; floating inputs are cast to `dtype`."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if dtype and t.is_floating_point() else t

        inputs = {name: cast(t) for name, t in self.inputs.items()}
        return logits_of(model(*map(cast, self.args), **inputs))

    def _mapped(self, function: Callable[[str, Tensor], Tensor]) -> Batch:
        inputs = {name: function(name, t) for name, t in self.inputs.items()}
        args = tuple(function("", t) for t in self.args)
        return Batch(inputs, function("", self.targets), args=args)
