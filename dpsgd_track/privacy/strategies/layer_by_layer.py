"""One backward in which each layer is clipped by itself, as soon as its gradient is there.

No layer waits for the norms of others, so nothing is kept, and nothing is computed twice. The
layers of a unit that is sharded together, such as a block, are clipped at once, in few launches.
"""

from __future__ import annotations

from torch import Tensor

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine


def layer_by_layer(engine: Engine, loss_B: Tensor) -> SampleRecord:
    """Put sum_i c_il g_il of each layer l, formed during the backward for norms."""
    capture = engine.capture
    assert capture is not None
    is_finite_B = loss_B.detach().isfinite()

    def clip(norm_sq: dict[str, Tensor]) -> dict[str, Tensor]:
        factors = engine.layer_factors(norm_sq, is_finite_B)
        return {layer: engine.weights_of(factor_B) for layer, factor_B in factors.items()}

    with engine.without_autocast():
        norm_sq = capture.run_units(loss_B, engine.sharder.groups, clip, engine.put)
        record = engine.clip(loss_B, norm_sq)
    engine.sharder.finish()
    return record
