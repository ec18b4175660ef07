"""Names what went wrong: the stage, its layer, step, ranks and samples, and a likely cause."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Blame:
    """The first stage that went wrong by itself."""

    stage: str
    step: int | None
    """None before the first step."""
    layers: tuple[str, ...] = ()
    """Layers or parameters in which the error arose, worst first."""
    inherited: tuple[str, ...] = ()
    """Layers or parameters that only passed it on."""
    samples: tuple[int, ...] = ()
    """Global indices of the samples concerned; empty for all or where it is not per sample."""
    ranks: tuple[int, ...] = ()
    """Ranks concerned; empty for all."""
    fingerprint: str = ""
    """A known ratio between mode and baseline, and what it suggests."""
    sentence: str = ""
    """All of it in one sentence, without a full stop."""
