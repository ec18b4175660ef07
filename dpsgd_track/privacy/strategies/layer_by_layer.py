"""One backward in which each layer is clipped by itself, as soon as its gradient is there.

No layer waits for the norms of others, so nothing is kept, and nothing is computed twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine


def layer_by_layer(engine: Engine, loss_B: Tensor) -> SampleRecord:
    """Put sum_i c_il g_il of each layer l, formed during the backward for norms."""
    capture = engine.capture
    assert capture is not None
    is_finite_B = loss_B.detach().isfinite()
    is_kept_B = is_finite_B

    def clip(norm_sq: dict[str, Tensor]) -> Tensor:
        nonlocal is_kept_B
        factor_B = torch.where(is_finite_B, engine.layer_factors(norm_sq), 0.0)
        is_kept_B = is_kept_B & factor_B.ne(0)
        return engine.weights_of(factor_B)

    with engine.without_autocast():
        norm_sq = capture.run_layers(loss_B, clip, engine.put)
        loss_B = loss_B.detach()
        factor_B = torch.where(is_kept_B, engine.factors_of(norm_sq, loss_B), 0.0)
        record = engine.recorded(loss_B, norm_sq, factor_B)
    engine.sharder.finish()
    return record
