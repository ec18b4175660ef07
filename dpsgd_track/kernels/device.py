"""Which kernels run where."""

from __future__ import annotations

from torch import Tensor


def runs_triton(*tensors: Tensor) -> bool:
    """Whether Triton's kernels take `tensors`: on a GPU, of at most 32 bits."""
    return all(t.is_cuda and t.dtype.itemsize <= 4 for t in tensors if t.is_floating_point())


def uses_tensor_cores(tensor: Tensor) -> bool:
    """Whether products of `tensor` take 16-bit factors and accumulate in float32 by themselves."""
    return tensor.is_cuda and tensor.dtype.itemsize == 2
