"""C of each step of a clip regime, from per-sample norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpsgd_track.training.observe import GatheredSamples

NUM_MIXED, AT_BOUND = 2, 1
"""Steps of a clip regime in which C first clips about half of the samples; the one of them in which
it is the norm of a sample."""
SAME_BOUND = 5e-7
"""Relative difference of two C that are compared as equal."""
LEAST_SHARE = 1e-3
"""Least usual share of a parameter in a sample's norm, for a C below the norm of its gradient."""


def bounds_of(steps: Sequence[GatheredSamples]) -> tuple[float, ...]:
    """C of each step of a clip regime, given its samples.

    | step | C | clipped |
    |---|---|---|
    | 0 | median of the norms of steps 0 and 1 | about half |
    | 1 | the norm of a sample of the step, next to the median | about half |
    | 2 | below the norm of every parameter's gradient | all |
    | 3 | half the smallest norm of any sample | all |
    | 4, 6, ... | the median of the step's own norms | half |
    | 5, 7, ... | as 3 | all |
    """
    every = np.concatenate([samples.norm for samples in steps])
    median = float(np.median(np.concatenate([samples.norm for samples in steps[:NUM_MIXED]])))
    below_all = 0.5 * float(np.min(every))
    bounds = []
    for step, samples in enumerate(steps):
        norms = samples.norm
        if step == 0:
            bounds.append(median)
        elif step == AT_BOUND:
            bounds.append(float(norms[np.abs(norms - median).argmin()]) if len(norms) else median)
        elif step == NUM_MIXED:
            bounds.append(min(_below_parameters(steps), below_all))
        elif step % 2 == 0 and len(norms):
            bounds.append(float(np.median(norms)))
        else:
            bounds.append(below_all)
    return tuple(bounds)


def _below_parameters(steps: Sequence[GatheredSamples]) -> float:
    """Half the smallest norm of a parameter's gradient, of a usual sample.

    Gradients that are next to nothing beside the whole are left out: they may be zero but for
    rounding, as that of an attention layer's key bias.
    """
    whole = np.concatenate([samples.norm for samples in steps])
    parts = np.concatenate([samples.norm_by_parameter for samples in steps])
    is_zero = whole == 0
    usual = np.median(parts[~is_zero] / whole[~is_zero, None], axis=0)
    # NaN is of a mode that tells no norms of parameters.
    counted = usual[usual > LEAST_SHARE]
    return 0.5 * float(counted.min(initial=1.0) * np.min(whole))
