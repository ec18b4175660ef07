"""Many tensors in one launch: a table of addresses, and which program works on which tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How a kernel is told the type of what an address points to."""


def address_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[tensors, columns] int64 on `device`, on its way there. Nothing waits."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


@lru_cache(maxsize=1024)
def programs_of(num_chunks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensor of each program, first program of each tensor), int32, of tensors of so many chunks.

    Tensors' sizes stay the same from step to step, and so does this.
    """
    owner = np.repeat(np.arange(len(num_chunks), dtype=np.int32), num_chunks)
    first = np.cumsum([0, *num_chunks[:-1]]).astype(np.int32)
    return torch.from_numpy(owner).to(device), torch.from_numpy(first).to(device)
