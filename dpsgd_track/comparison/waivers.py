"""Drifts that are known and accepted for a while: they stay visible and fail nothing."""

from __future__ import annotations

import datetime
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """One accepted drift."""

    mode: str
    """Label of the mode; `*` for any."""
    observable: str
    """Name of the observable; `*` for any."""
    reason: str
    expires: datetime.date
    """Last day on which it holds."""
    regime: str = "*"
    where: str = "*"
    """Layer, parameter or sample, as a finding names it; `*` for any."""
    up_to: float | None = None
    """Largest drift that is accepted; None for any."""
