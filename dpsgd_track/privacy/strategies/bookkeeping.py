"""One backward: norms as it goes, the clipped sum from what it kept.

Source: Bu et al., 2023, "Differentially Private Optimization on Large Model at Small Cost".
The backward forms no weight gradient; the clipped sums are formed afterwards, unit by unit, and
each is on its way to the other ranks while the next is formed.
"""

from __future__ import annotations

import torch

from dpsgd_track.privacy.clipping import SampleRecord, clip_factors, total_norm
from dpsgd_track.privacy.engine import Batch, Engine


def bookkeeping(engine: Engine, batch: Batch) -> SampleRecord:
    """Add sum_i c_i g_i, formed layer by layer."""
    capture = engine.capture
    assert capture is not None
    with capture.sample_batch(len(batch)):
        loss_B = engine.losses(batch)
        torch.autograd.grad(loss_B.sum(), capture.roots, allow_unused=True)
        capture.finish_norms()
    norm_B = total_norm(capture.norm_sq)
    clip_factor_B = clip_factors(norm_B, engine.max_grad_norm)
    engine.sharder.add(capture.clipped_sums(clip_factor_B))
    return SampleRecord(loss_B.detach(), norm_B, clip_factor_B, capture.norm_by_parameter())
