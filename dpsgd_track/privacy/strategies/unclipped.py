"""One backward without clipping: ordinary training, the baseline."""

from __future__ import annotations

from torch import Tensor

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine


def unclipped(engine: Engine, loss_B: Tensor) -> SampleRecord:
    """Add the sum of the samples' gradients to `.grad`, as autograd does."""
    # A stand-in takes part in the backward's collectives and adds nothing.
    (loss_B * 0 if engine.is_standing_in else loss_B).sum().backward()
    return SampleRecord(loss_B=loss_B.detach())
