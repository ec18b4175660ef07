"""Plans how the norm of each linear layer is computed, and what is kept for its clipped sum.

For a layer of D inputs and P outputs, with B samples of T positions, in multiply-adds doubled and
in elements, each for all samples:

| plan        | norm              | kept      | clipped sum           |
|-------------|-------------------|-----------|-----------------------|
| `gradients` | 2 T D P, of which | D P       | none: D P are read    |
| `gram`      | T^2 (D + P)       | T (D + P) | 2 T D P               |
| `tiled`     | 2 T D P           | T (D + P) | 2 T D P               |

With `gradients` the norm is a by-product of the gradients themselves. Two-pass modes keep nothing
and choose between the other two. The plan that is cheapest by arithmetic and bytes moved is chosen,
if what it keeps fits into the remaining memory. Gradients are kept only where they take hardly more
than inputs and gradients of outputs: these replace, layer by layer, the activations that the
backward frees, so that a step takes little more memory than an ordinary one. Where gradients are
much larger, they are hardly cheaper.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from dpsgd_track.config import AUTO, GRADIENTS, GRAM, TILED, require

# Operations per byte moved: of tensor cores, of other GPU units, of CPUs.
_BALANCE_16_BIT, _BALANCE_32_BIT, _BALANCE_CPU = 180.0, 14.0, 10.0
# Most that kept gradients may take of what the factors would, on tensor cores and elsewhere. Models
# that are trained in 16 bits hold more activations beside the factors.
_GROWTH_16_BIT, _GROWTH = 1.75, 1.0
SHARE_OF_MEMORY = 0.5
"""Fraction of the memory that is free before the first batch that may be kept. The rest is for
activations."""


@dataclass(frozen=True)
class LinearShape:
    """Shapes, dtype and device of a linear layer's call."""

    B: int
    T: int
    D: int
    P: int
    dtype: torch.dtype
    device: torch.device

    @property
    def gradients_bytes(self) -> int:
        """Bytes of all samples' gradients."""
        return self.B * self.D * self.P * self.dtype.itemsize

    @property
    def factors_bytes(self) -> int:
        """Bytes of the layer's inputs and of the gradients of its outputs."""
        return self.B * self.T * (self.D + self.P) * self.dtype.itemsize

    @property
    def has_small_gradients(self) -> bool:
        """True if gradients take little more memory than factors."""
        growth = _GROWTH_16_BIT if self._balance == _BALANCE_16_BIT else _GROWTH
        return self.gradients_bytes <= growth * self.factors_bytes

    def kept_bytes(self, plan: str) -> int:
        """Bytes that a one-pass mode keeps."""
        return self.gradients_bytes if plan == GRADIENTS else self.factors_bytes

    def cost(self, plan: str) -> float:
        """Time of norm and clipped sum, as the number of bytes that could be moved in it."""
        product = 2.0 * self.B * self.T * self.D * self.P
        if plan == GRADIENTS:
            # Written, read for the norm, read for the sum.
            return product / self._balance + 3 * self.gradients_bytes
        gram = float(self.B * self.T * self.T * (self.D + self.P))
        norm = gram if plan == GRAM else product
        return (norm + product) / self._balance + 2 * self.factors_bytes

    @property
    def _balance(self) -> float:
        if self.device.type == "cpu":
            return _BALANCE_CPU
        return _BALANCE_16_BIT if self.dtype.itemsize == 2 else _BALANCE_32_BIT


def free_bytes(device: torch.device) -> int:
    """The memory that is free on a device; on CPU, this rank's share of it."""
    if device.type != "cuda":
        # Ranks of one machine share it.
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return int(psutil.virtual_memory().available // num_ranks)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused)


class NormPlanner:
    """Chooses a plan for each layer and shape, once."""

    def __init__(
        self,
        *,
        keeps: bool,
        forced: str = AUTO,
        free_bytes: Callable[[torch.device], int] = free_bytes,
    ) -> None:
        """
        Args:
            keeps: True for one-pass modes.
            forced: a plan for every layer, or auto.
            free_bytes: the memory that is free on a device.
        Raises:
            ValueError: the plan keeps gradients, which a two-pass mode does not.
        """
        allowed = (AUTO, GRADIENTS, GRAM, TILED) if keeps else (AUTO, GRAM, TILED)
        advice = "A mode with two backwards keeps nothing between them."
        require(forced in allowed, "plan", forced, f"one of {', '.join(allowed)}", advice)
        self.keeps, self.forced, self._free_bytes = keeps, forced, free_bytes
        self.chosen: dict[tuple[str, LinearShape], str] = {}
        """Plan of each layer and shape so far."""
        self._left_bytes: float | None = None

    def choose(self, fqn: str, shape: LinearShape, *, is_shared: bool = False) -> str:
        """The plan for a call of layer `fqn`.

        Args:
            is_shared: other layers have the same weight, whose gradients are cheaper to join as
                factors.
        """
        if (fqn, shape) not in self.chosen:
            self.chosen[fqn, shape] = self._choose(shape, is_shared)
        return self.chosen[fqn, shape]

    def summary(self) -> dict[str, str]:
        """Plans and shapes of every layer, for the record."""
        plans_of: dict[str, list[str]] = {}
        for (fqn, shape), plan in self.chosen.items():
            plans_of.setdefault(fqn, []).append(f"{plan} (B={shape.B}, T={shape.T})")
        return {fqn: ", ".join(plans) for fqn, plans in plans_of.items()}

    def _choose(self, shape: LinearShape, is_shared: bool) -> str:
        if self.forced != AUTO and not (self.forced == GRADIENTS and is_shared):
            return self.forced
        may_keep = self.keeps and not is_shared and shape.has_small_gradients
        plans = (GRADIENTS, GRAM, TILED) if may_keep else (GRAM, TILED)
        by_cost = sorted(plans, key=shape.cost)
        if not self.keeps:
            return by_cost[0]
        if self._left_bytes is None:
            self._left_bytes = SHARE_OF_MEMORY * self._free_bytes(shape.device)
        fitting = [plan for plan in by_cost if shape.kept_bytes(plan) <= self._left_bytes]
        plan = fitting[0] if fitting else min(by_cost, key=shape.kept_bytes)
        self._left_bytes -= shape.kept_bytes(plan)
        return plan
