"""Time and peak memory of those sections of a step that are the mode's own work."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class StepClock:
    """Sums the time of sections, and keeps their largest memory peak."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed_ms = 0.0
        self.peak_memory_gib = 0.0
        """Peak CUDA allocation inside the sections; on CPU the process's peak resident set."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a section, until the device has finished it."""
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if is_cuda:
            torch.cuda.synchronize(self.device)
        self.elapsed_ms += (time.perf_counter() - start) * 1e3
        peak = (
            torch.cuda.max_memory_allocated(self.device)
            if is_cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        self.peak_memory_gib = max(self.peak_memory_gib, peak / GIB)
