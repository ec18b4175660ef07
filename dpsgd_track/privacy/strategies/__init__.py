"""One file per pass strategy, each a way from norms to a clipped sum.

A strategy is a function `(engine, loss_B) -> SampleRecord` that adds the clipped sum of a
micro-batch, whose forward the engine has captured. Every loss is summed over samples, never
averaged, so that each sample's gradients flow unscaled.
"""

from dpsgd_track.privacy.engine import Strategy
from dpsgd_track.privacy.strategies.bookkeeping import bookkeeping
from dpsgd_track.privacy.strategies.layer_by_layer import layer_by_layer
from dpsgd_track.privacy.strategies.two_pass import two_pass
from dpsgd_track.privacy.strategies.unclipped import unclipped
from dpsgd_track.privacy.strategies.within_budget import within_budget

LAYER_BY_LAYER = "layer_by_layer"
"""Strategy of every private mode under per-layer clipping."""

WITHIN_BUDGET = "within_budget"
"""Strategy of one-pass modes that keep to a budget of memory."""

STRATEGIES: dict[str, Strategy] = {
    "unclipped": unclipped,
    "two_pass": two_pass,
    "bookkeeping": bookkeeping,
    LAYER_BY_LAYER: layer_by_layer,
    WITHIN_BUDGET: within_budget,
}
"""Every pass strategy by the name the table of modes uses."""
