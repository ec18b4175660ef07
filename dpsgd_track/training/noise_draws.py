"""Draws a mode's noise in steps of their own, by the million, and keeps sums of its elements.

A step with an empty batch costs little, and its update is noise alone. A mode that takes no empty
batch is given one sample a rank, and the update of its twin without noise is subtracted.

Legend: W ranks, P trainable parameters, M elements of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.record.noise_draws import NoiseDraws
from dpsgd_track.training.observe import largest_of_ranks

TARGET = 1_250_000
"""Elements over all ranks and steps: they show a std that is off by 0.5 %."""
FEWEST_STEPS, MOST_STEPS = 2, 64
MOST_ELEMENTS = 8192
"""M. Of a larger shard, half of them are its first elements; the others are spread over it."""

Draw = Callable[[int], tuple[NDArray[np.float32], int]]
"""Runs a noise-only step of that number; returns its noise on the clipped sum, [W, P, M], and the
significant bits of its update."""


def num_elements(parts: list[LocalPart], device: torch.device) -> int:
    """M, the same on every rank: the size of the largest shard of any, or MOST_ELEMENTS."""
    sizes = [float(part.local.numel()) for part in parts]
    return min(MOST_ELEMENTS, int(max(largest_of_ranks(sizes, device))))


def significant_bits(parts: list[LocalPart]) -> int:
    """Fewest bits that an element of the updates has."""
    return min(1 - round(math.log2(torch.finfo(part.local.dtype).eps)) for part in parts)


def draw_noise(
    draw: Draw,
    key: str,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: int,
    is_bare: bool,
) -> NoiseDraws | None:
    """Sums over as many steps as give TARGET elements, but FEWEST_STEPS to MOST_STEPS.

    Args:
        key: key of the noise source that `draw` uses.
        is_bare: as in `NoiseDraws`.
    Returns:
        None on all ranks but the first.
    """
    std = noise_multiplier * max_grad_norm
    units = (1.0, noise_multiplier, std, std / expected_batch_size) if is_bare else ()
    total: NoiseDraws | None = None
    before, num_drawn, step, num_steps = None, 0, 0, FEWEST_STEPS
    while step < num_steps:
        noise, bits = draw(step)
        num_drawn += int((~np.isnan(noise)).sum())
        if dist.get_rank() == 0:
            z = noise.astype(np.float64) / std
            drawn = NoiseDraws.of_step(
                z,
                before,
                units=units if step == 0 else (),
                key=key,
                significant_bits=bits,
                is_bare=is_bare,
            )
            before, total = z, drawn if total is None else total + drawn
        step += 1
        wanted = math.ceil(TARGET * step / max(num_drawn, 1))
        num_steps = min(max(wanted, FEWEST_STEPS), MOST_STEPS)
    return total
