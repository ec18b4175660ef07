"""The record of one run of a profile: the contract between measurement and comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dpsgd_track.record.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Times of the recorded steps of one run, without warm-up."""

    step_time_ms: tuple[float, ...]
    """Time of each step on the slowest rank, from forward to the release of the gradients."""
    is_tracked: tuple[bool, ...]
    """True if a step was also observed: its loss, and norms of each linear layer."""
    num_tokens: tuple[int, ...]
    """Tokens of each step over all ranks, padding included."""
    peak_memory_gib: float
    """Largest CUDA allocation over the recorded steps, or the process's resident set on CPU; the
    largest rank's."""

    def __post_init__(self) -> None:
        lengths = {len(self.step_time_ms), len(self.is_tracked), len(self.num_tokens)}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError("timings: expected one time, mark and number of tokens for each step.")
        for value in (*self.step_time_ms, self.peak_memory_gib):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"timings: expected numbers >= 0, got {value!r}.")

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(_CODEC.dumps(self), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Timings:
        """The timings that `save` wrote.

        Raises:
            ValueError: the file is something else, is torn, or has another schema version.
        """
        try:
            return _CODEC.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


_CODEC = Codec(Timings, "dpsgd-track/timings", 1)
