"""Parts of trial runs, in which a model shows how it treats its samples before the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.privacy.batch import RepeatableBatch, Rows
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.random_state import RandomState
from dpsgd_track.privacy.replaced_forward import ReplacedForward


class Reader(ReplacedForward):
    """Runs a layer as it is, and notes what it is called with."""

    def __init__(
        self, captured: CapturedLayer, note: Callable[[str, tuple[Any, dict[str, Any]]], None]
    ) -> None:
        """
        Args:
            note: takes the layer's fully qualified name, and a call's (args, kwargs).
        """
        super().__init__(captured.module)
        self.captured, self.fqn, self.note = captured, captured.layer.fqn, note

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""
        self.note(self.fqn, (args, kwargs))
        with self.captured.on_own_parameters():
            return self.original(*args, **kwargs)


def random_move(x: Tensor, seed: int) -> Tensor:
    """Random numbers in the shape and on the scale of `x`, the same at every run."""
    generator = torch.Generator().manual_seed(seed)
    scale = x.float().square().mean().sqrt().clamp(min=0.1)
    return (torch.randn(x.shape, generator=generator).to(x.device) * scale).to(x.dtype)


def is_same_run(a: Tensor, b: Tensor) -> bool:
    """True if results of two runs of the same arithmetic agree up to rounding."""
    if a.shape != b.shape:
        return False
    # Far above rounding errors, and far below the effect of the moves.
    tolerance = 0.3 * torch.finfo(a.dtype).eps ** 0.5 if a.is_floating_point() else 0.0
    scale = max(float(b.float().abs().max()), 1e-30) if b.numel() else 1.0
    return torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance * scale, equal_nan=True)


class KeptBuffers:
    """Buffers of a model as they are now, for runs that may change them."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module._buffers, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._values = [b if b is None else (b._version, b.clone()) for *_, b in self._kept]

    def restore(self) -> None:
        """Put them back, with their values."""
        for (own, name, buffer), before in zip(self._kept, self._values, strict=True):
            own[name] = buffer
            if buffer is not None and before is not None and buffer._version != before[0]:
                buffer.copy_(before[1])


@contextmanager
def kept_random_state(batch: Rows) -> Iterator[None]:
    """Draw the random numbers that come next, or that the batch has drawn before; restore the
    generators afterwards: torch's, NumPy's and Python's."""
    devices = sorted({t.device.index or 0 for t in batch.tensors() if t.is_cuda})
    before = RandomState("cpu")
    try:
        with torch.random.fork_rng(devices=devices):
            if isinstance(batch, RepeatableBatch):
                batch.restore_random_state()
            yield
    finally:
        before.restore()
