"""One backward: takes norms as it runs; clipped sums are formed from the terms it kept.

Source: Bu et al., 2023, "Differentially Private Optimization on Large Model at Small Cost".
Each clipped sum is in flight to the other ranks while the next is formed. Some per-sample gradients
are sent while the backward runs, and summed where they arrive (`distributed.sample_exchange`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
        offer = engine.sharder.offer
        norm_sq = capture.run_norms(loss_B, retain_graph=False, offer=offer)
        record = engine.clip(loss_B, norm_sq)
        weight_B = engine.weights_of(record.factors_B)
        engine.put_sent(weight_B)
        for names in launches(engine.sharder, engine.sharder.left(), weight_B.device):
            engine.put_kept(names, weight_B)
    engine.sharder.finish()
    return record


def launches(
    sharder: GradientSharder, groups: list[list[str]], device: torch.device
) -> Iterator[list[str]]:
    """Parameters of `groups` whose sums are formed together.

    Of a group that is sent, or of several that are not.

    Many at once are few launches that fill a GPU, but what they are formed from is freed later. On
    a CPU it is freed one by one, before the sums take its place.
    """
    if device.type == "cpu" and not sharder.packs:
        yield from ([name] for names in groups for name in names)
        return
    size = 1 if sharder.packs else max(1, -(-len(groups) // MAX_LAUNCHES))
    for first in range(0, len(groups), size):
        yield [name for names in groups[first : first + size] for name in names]
