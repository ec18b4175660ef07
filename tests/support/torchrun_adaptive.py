"""Run in each of two ranks: adaptive clipping under FSDP2, with uneven and empty micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dpsgd_track import AdaptiveClipping, make_private

B, D, SIZES = 6, 4, ((4, 2), (6, 0), (1, 5))
"""Samples of each rank, by step."""


def bounds(sizes: list[list[int]], mode: str) -> list[float]:
    """C after each step, of a rank that has these samples of each step's six."""
    torch.manual_seed(0)
    model = nn.Linear(D, 3)
    private = make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        mode=mode,
        noise_multiplier=0.5,
        max_grad_norm=0.4,
        expected_batch_size=B,
        adaptive=AdaptiveClipping(),
        seed=3,
    )
    found = []
    for number, rows in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(B, D, generator=generator)
        private.backward(x[rows], torch.arange(B)[rows] % 3)
        private.mode.optimizer.step()
        found.append(private.max_grad_norm)
    return found


def main(output: str) -> None:
    """Write this rank's bounds."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows = [list(range(a)) if rank == 0 else list(range(a, a + b)) for a, b in SIZES]
    found = bounds(rows, "flash_fsdp_bk")
    Path(output, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
