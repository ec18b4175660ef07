"""Counts samples that were left out of clipped sums."""

from __future__ import annotations

import warnings
from collections import deque

from dpsgd_track.kernels.device import HostCopy
from dpsgd_track.privacy.clipping import SampleRecord


class LeftOutCounter:
    """Counts samples that added nothing because they were not finite; warns of the first.

    Does not wait for a GPU: a batch's count is read once it has reached the host.
    """

    def __init__(self) -> None:
        self._total = 0
        self._pending: deque[HostCopy] = deque()
        self._has_warned = False

    def add(self, record: SampleRecord) -> None:
        """Count the samples of one batch."""
        if record.clip_factor_B is not None and len(record.clip_factor_B):
            self._pending.append(HostCopy(record.clip_factor_B.eq(0).sum()))
            self._read(waits=False)

    def count(self) -> int:
        """Samples left out so far."""
        self._read(waits=True)
        return self._total

    def _read(self, *, waits: bool) -> None:
        while self._pending and (waits or self._pending[0].has_arrived):
            self._total += int(self._pending.popleft().wait())
        if self._total and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "The loss or the gradient of a sample is not finite: such samples add nothing. "
                "PrivateTraining.num_left_out counts them.",
                stacklevel=4,
            )
