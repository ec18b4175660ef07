"""One backward, and a second one for the layers whose terms do not fit into a budget of memory.

The first takes norms as it runs, and keeps the terms that fit (`privacy.memory_budget`). The second
repeats it from the loss down to the lowest of the layers whose terms were dropped. What was kept is
summed and freed before the second begins.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine
from dpsgd_track.privacy.strategies.bookkeeping import launches


def within_budget(engine: Engine, loss_B: Tensor) -> SampleRecord:
    """Put sum_i c_i g_i, formed from kept terms, and during a second backward."""
    capture, sharder = engine.capture, engine.sharder
    assert capture is not None
    with engine.without_autocast():
        dropped = capture.plan_to_drop()
        with sharder.keeping_root_gathered() if dropped else nullcontext():
            norm_sq = capture.run_norms(loss_B, retain_graph=bool(dropped))
        record = engine.clip(loss_B, norm_sq)
        weight_B = engine.weights_of(record.factors_B)
        kept = [names for names in sharder.groups if dropped.isdisjoint(names)]
        sharder.start_with(kept)
        for names in launches(sharder, kept, weight_B.device):
            engine.put_kept(names, weight_B)
        # What is left of the root's group would wait for its end, and is put after the others.
        *inner, root = sharder.groups
        for names in (names for names in inner if names not in kept):
            engine.put(_kept_sums(engine, names, weight_B))
        if dropped:
            capture.run_dropped(loss_B, weight_B, engine.put)
        if root not in kept:
            engine.put(_kept_sums(engine, root, weight_B))
    sharder.finish()
    return record


def _kept_sums(engine: Engine, names: list[str], weight_B: Tensor) -> dict[str, Tensor]:
    """Clipped sums of the parameters that were not dropped."""
    capture = engine.capture
    assert capture is not None
    return capture.kept_sums([n for n in names if n not in capture.split.dropped], weight_B)
