"""Two backwards over one forward: the first for the norms, the second for the clipped sum.

Source: Lee & Kifer, 2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example
Gradient Clipping". The first backward stops at the captured layers: autograd is asked for the
gradients of activations only, so that it forms no weight gradient and nothing is reduced.
"""

from __future__ import annotations

import torch

from dpsgd_track.privacy.clipping import SampleRecord, clip_factors, total_norm
from dpsgd_track.privacy.engine import Batch, Engine


def two_pass(engine: Engine, batch: Batch) -> SampleRecord:
    """Add sum_i c_i g_i as the gradient of sum_i c_i loss_i."""
    capture = engine.capture
    assert capture is not None
    with capture.sample_batch(len(batch)):
        loss_B = engine.losses(batch)
        # What the root holds (the embeddings) is gathered until the backward's end in any case:
        # kept until the second, it is gathered once.
        with engine.sharder.keeping_root_gathered():
            torch.autograd.grad(loss_B.sum(), capture.roots, retain_graph=True, allow_unused=True)
        capture.finish_norms()
    norm_B = total_norm(capture.norm_sq)
    clip_factor_B = clip_factors(norm_B, engine.max_grad_norm)
    (clip_factor_B * loss_B).sum().backward()
    return SampleRecord(loss_B.detach(), norm_B, clip_factor_B, capture.norm_by_parameter())
