"""State of the generators that a forward may draw from: torch's, NumPy's and Python's.

Speech models, for one, choose the positions that they mask by NumPy's.
"""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomState:
    """State of the generators of the CPU, and of the current GPU if a model is on one."""

    def __init__(self, device_type: str) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if device_type == "cuda" else None
        self._numpy, self._python = np.random.get_state(legacy=False), random.getstate()

    def restore(self) -> None:
        """Set the generators to it."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def equals(self, other: RandomState) -> bool:
        """True if the generators would draw the same numbers from here on."""
        numpy, others = self._numpy["state"], other._numpy["state"]
        return (
            torch.equal(self._cpu, other._cpu)
            and (self._cuda is None or other._cuda is None or torch.equal(self._cuda, other._cuda))
            and numpy["pos"] == others["pos"]
            and bool((numpy["key"] == others["key"]).all())
            and self._python == other._python
        )
