"""Two backwards over one forward: the first for the norms, the second for the clipped sum.

Source: Lee & Kifer, 2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example
Gradient Clipping". They weight the loss by the clip factors in the second backward. Here the
second backward repeats the first, bit for bit, and the factors are applied where a clipped sum is
formed: in bfloat16 a backward of weighted losses would round differently, and the gradients added
would not be those whose norms were taken.
"""

from __future__ import annotations

from torch import Tensor

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine


def two_pass(engine: Engine, loss_B: Tensor) -> SampleRecord:
    """Put sum_i c_i g_i, formed during a second backward."""
    capture = engine.capture
    assert capture is not None
    with engine.without_autocast():
        # The root's parameters (the embeddings) stay gathered to the end of the backward in any
        # case. Kept for the second backward, they are gathered once.
        with engine.sharder.keeping_root_gathered():
            norm_sq = capture.run_norms(loss_B, retain_graph=True)
        record = engine.clip(loss_B, norm_sq)
        capture.run_sums(loss_B, engine.weights_of(record.factors_B), engine.put)
    engine.sharder.finish()
    return record
