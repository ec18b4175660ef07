"""One file per pass strategy, each a way from norms to a clipped sum.

A strategy is a function `(engine, batch) -> SampleRecord` that adds the micro-batch's clipped sum
to the engine's. Every loss is summed over samples, never averaged, so that each sample's
gradients flow unscaled.
"""

from dpsgd_track.privacy.engine import Strategy
from dpsgd_track.privacy.strategies.bookkeeping import bookkeeping
from dpsgd_track.privacy.strategies.two_pass import two_pass
from dpsgd_track.privacy.strategies.unclipped import unclipped

STRATEGIES: dict[str, Strategy] = {
    "unclipped": unclipped,
    "two_pass": two_pass,
    "bookkeeping": bookkeeping,
}
"""Every pass strategy by the name the table of modes uses."""
