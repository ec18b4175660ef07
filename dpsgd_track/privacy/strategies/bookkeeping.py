"""One backward: takes norms as it runs; clipped sums are formed from the terms it kept.

Source: Bu et al., 2023, "Differentially Private Optimization on Large Model at Small Cost".
Each clipped sum is in flight to the other ranks while the next is formed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dpsgd_track.distributed.reduction import GradientSharder
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine

MAX_LAUNCHES = 4
"""Times that sums are formed on one GPU."""


def bookkeeping(engine: Engine, loss_B: Tensor) -> SampleRecord:
    """Put sum_i c_i g_i, formed from the terms that the backward for norms kept."""
    capture = engine.capture
    assert capture is not None
    with engine.without_autocast():
        record = engine.clip(loss_B, capture.run_norms(loss_B, retain_graph=False))
        weight_B = engine.weights_of(record.factors_B)
        for names in _launches(engine.sharder, is_on_cpu=weight_B.device.type == "cpu"):
            engine.put_kept(names, weight_B)
    engine.sharder.finish()
    return record


def _launches(sharder: GradientSharder, *, is_on_cpu: bool) -> Iterator[list[str]]:
    """Parameters whose sums are formed together: a group that is sent, or several that are not.

    Many at once are few launches that fill a GPU, but what they are formed from is freed later. On
    a CPU it is freed one by one, before the sums take its place.
    """
    groups = sharder.groups
    if is_on_cpu and not sharder.packs:
        yield from ([name] for names in groups for name in names)
        return
    size = 1 if sharder.packs else -(-len(groups) // MAX_LAUNCHES)
    for first in range(0, len(groups), size):
        yield [name for names in groups[first : first + size] for name in names]
