"""Launch one kernel over many tensors: their addresses, and the tensor of each program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Code that tells a kernel the dtype at an address."""


_ALIGNMENT = 64
"""Numbers of 8 bytes that an allocation is aligned to."""
RECORDED_NUMBERS = 1 << 18
"""Numbers in the tables of one CUDA graph."""


class RecordedTables:
    """Tables of the launches that a CUDA graph records; the graph reads them at every replay.

    A graph cannot copy them from the host. Its tensors stay where they are, so the tables are
    written once, after it was recorded, into memory that the graph itself does not use: a tensor
    that it allocates may lie where another of its tensors has been. They live as long as this
    object.
    """

    def __init__(self, device: torch.device) -> None:
        self._space = torch.zeros(RECORDED_NUMBERS, dtype=torch.int64, device=device)
        self._hosts: list[Tensor] = []
        self._num_used = 0
        self.kept: list[tuple[Tensor, Tensor]] = []
        """Tables that a cache may drop before the graph."""

    def add(self, host: Tensor) -> Tensor:
        """A table that will have the values of `host`."""
        start = self._num_used
        # As aligned as an allocation, so that Triton compiles nothing for another alignment.
        self._num_used += host.numel() + -host.numel() % _ALIGNMENT
        if self._num_used > len(self._space):
            raise RuntimeError("The tables of a CUDA graph are larger than the space for them.")
        padding = self._num_used - start - host.numel()
        self._hosts.append(torch.nn.functional.pad(host.flatten(), (0, padding)))
        return self._space[start : start + host.numel()].view(host.shape)

    def keep(self, tables: tuple[Tensor, Tensor]) -> None:
        """Keep cached tables as long as the graph."""
        self.kept.append(tables)

    def write(self) -> None:
        """Write the tables, after the graph was recorded."""
        if self._hosts:
            self._space[: self._num_used].copy_(torch.cat(self._hosts))


_recorded: RecordedTables | None = None


@contextmanager
def recording_tables(device: torch.device) -> Iterator[RecordedTables]:
    """Context in which a CUDA graph is recorded. Entered before the recording begins."""
    global _recorded
    tables = _recorded = RecordedTables(device)
    try:
        yield tables
    finally:
        _recorded = None


def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up; some ten times as fast as Triton's own."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is not below a positive number."""
    return 1 << (number - 1).bit_length()


_PACKED = 16
"""Elements of 4 bytes that a packed tensor begins at a multiple of."""


def _packed_sizes(shapes: Sequence[torch.Size]) -> list[int]:
    """Elements from each of many tensors in one allocation to the next."""
    return [size + -size % _PACKED for size in map(torch.Size.numel, shapes)]


def packed_size(shapes: Sequence[torch.Size]) -> int:
    """Elements of an allocation that holds tensors of these shapes."""
    return sum(_packed_sizes(shapes))


def unpacked(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of `shapes` that `flat`, of `packed_size` elements, holds."""
    found = []
    sizes = _packed_sizes(shapes)
    for piece, shape, size in zip(flat.split(sizes), shapes, sizes, strict=True):
        num_elements = shape.numel()
        found.append((piece if num_elements == size else piece[:num_elements]).view(shape))
    return found


def packed(shapes: Sequence[torch.Size], like: Tensor) -> list[Tensor]:
    """Float32 tensors in one allocation that nothing has written yet, on the device of `like`."""
    return unpacked(like.new_empty(packed_size(shapes), dtype=torch.float32), shapes)


def write_rows(out: Tensor, total: Tensor) -> None:
    """Write the elements of a contiguous tensor into the rows of `out`, and leave what follows."""
    for row, part in zip(out, total.view(-1).split(out.shape[1]), strict=False):
        row[: len(part)] = part


def address_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[tensors, columns] int64, copied to `device` without waiting."""
    host = torch.tensor(rows, dtype=torch.int64)
    if _recorded is not None:
        return _recorded.add(host)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def programs_of(num_chunks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensor of each program, first program of each tensor), int32.

    Cached, as the sizes of tensors stay the same from step to step.

    Args:
        num_chunks: programs that each tensor takes.
    """
    tables = _programs_of(num_chunks, device)
    if _recorded is not None:
        _recorded.keep(tables)
    return tables


@lru_cache(maxsize=1024)
def _programs_of(num_chunks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    owner = np.repeat(np.arange(len(num_chunks), dtype=np.int32), num_chunks)
    first = np.cumsum([0, *num_chunks[:-1]]).astype(np.int32)
    return torch.from_numpy(owner).to(device), torch.from_numpy(first).to(device)
