"""One backward: takes norms as it runs; clipped sums are formed from the terms it kept.

Source: Bu et al., 2023, "Differentially Private Optimization on Large Model at Small Cost".
Each clipped sum is in flight to the other ranks while the next is formed.
"""

from __future__ import annotations

from torch import Tensor

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine


def bookkeeping(engine: Engine, loss_B: Tensor) -> SampleRecord:
    """Put sum_i c_i g_i, formed from the terms that the backward for norms kept."""
    capture = engine.capture
    assert capture is not None
    with engine.without_autocast():
        record = engine.clip(loss_B, capture.run_norms(loss_B, retain_graph=False))
        weight_B = engine.weights_of(record.factors_B)
        for names in engine.sharder.groups:
            engine.put_kept(names, weight_B)
    engine.sharder.finish()
    return record
