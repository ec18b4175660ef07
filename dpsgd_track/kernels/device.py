"""Dispatch of kernels by device and dtype, and small copies from a device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_triton(*tensors: Tensor) -> bool:
    """True if all floating `tensors` are on a GPU and have at most 32 bits."""
    return all(t.is_cuda and t.dtype.itemsize <= 4 for t in tensors if t.is_floating_point())


def uses_tensor_cores(tensor: Tensor) -> bool:
    """True if products of `tensor` take 16-bit factors and accumulate in float32 in hardware."""
    return tensor.is_cuda and tensor.dtype.itemsize == 2


class HostCopy:
    """Asynchronous copy of a small tensor to the host; of a CPU tensor the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def has_arrived(self) -> bool:
        """True if `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values, on the host; waits for this copy and for nothing queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
