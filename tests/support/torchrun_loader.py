"""Run in each of two ranks: a loop over `private.loader` under FSDP2, with empty micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from dpsgd_track import make_private

NUM_SAMPLES, EXPECTED, NUM_STEPS = 12, 1, 14


def data() -> TensorDataset:
    """Sample i is (i, 1) with class i modulo 2."""
    x = torch.stack([torch.arange(float(NUM_SAMPLES)), torch.ones(NUM_SAMPLES)], dim=1)
    return TensorDataset(x / NUM_SAMPLES, torch.arange(NUM_SAMPLES) % 2)


def train(mode: str, seed: int | None) -> dict[str, Any]:
    """Samples of this rank by step and micro-batch, the weights, and the ledger."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = make_private(
        model,
        optimizer,
        mode=mode,
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        expected_batch_size=EXPECTED,
        seed=seed,
    )
    drawn: list[list[list[int]]] = []
    for batches in private.loader(data(), physical_batch_size=1, num_steps=NUM_STEPS):
        drawn.append([])
        for x, y in batches:
            drawn[-1].append((x[:, 0] * NUM_SAMPLES).round().int().tolist())
            private.backward(x, y)
        optimizer.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    flat = torch.cat([w.detach().flatten() for w in weights]).tolist()
    return {"drawn": drawn, "weights": flat, "history": private.state_dict()["history"]}


def main(folder: str) -> None:
    """Leave what this rank drew, from a seed and from a key of the operating system."""
    dist.init_process_group("gloo")
    ended = {"seed": train("flash_fsdp_bk", 5), "secret": train("flash_fsdp_bk", None)}
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(ended))
    dist.destroy_process_group()
