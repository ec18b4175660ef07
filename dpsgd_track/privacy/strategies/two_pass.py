"""Two backwards over one forward: the first for the norms, the second for the clipped sum.

Source: Lee & Kifer, 2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example
Gradient Clipping". They weight the loss by the clip factors in the second backward. Here the
second backward is the first once more, bit for bit, and the factors are applied where a clipped
sum is formed: in bfloat16 a backward of other losses would round otherwise, and what is added
would not be what was measured.
"""

from __future__ import annotations

from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine


def two_pass(engine: Engine, batch: Batch) -> SampleRecord:
    """Put sum_i c_i g_i, formed as a second backward goes."""
    capture = engine.capture
    assert capture is not None
    with capture.sample_batch(len(batch)):
        loss_B = engine.losses(batch)
        # What the root holds (the embeddings) is gathered until the backward's end in any case:
        # kept until the second, it is gathered once.
        with engine.without_autocast():
            with engine.sharder.keeping_root_gathered():
                norm_sq = capture.run_norms(loss_B, retain_graph=True)
            record = engine.clip(loss_B, norm_sq)
            capture.run_sums(loss_B, engine.weights_of(record), engine.put)
    engine.sharder.finish()
    return record
