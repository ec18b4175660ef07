"""Launch one kernel over many tensors: their addresses, and the tensor of each program."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Code that tells a kernel the dtype at an address."""


def address_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[tensors, columns] int64, copied to `device` without waiting."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


@lru_cache(maxsize=1024)
def programs_of(num_chunks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensor of each program, first program of each tensor), int32.

    Cached, as the sizes of tensors stay the same from step to step.

    Args:
        num_chunks: programs that each tensor takes.
    """
    owner = np.repeat(np.arange(len(num_chunks), dtype=np.int32), num_chunks)
    first = np.cumsum([0, *num_chunks[:-1]]).astype(np.int32)
    return torch.from_numpy(owner).to(device), torch.from_numpy(first).to(device)
