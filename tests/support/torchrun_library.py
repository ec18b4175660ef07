"""Run in each of two or three ranks: a loop of one's own under FSDP2, wrapped variously."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpsgd_track import make_private
from dpsgd_track.privacy.loss import causal_lm_loss
from tests.support.model_zoo import batch, build

SIZES = (
    {0: [0, 4], 1: [1, 3], 2: [0, 2]},
    {0: [0], 1: [0], 2: [0]},
    {0: [2, 1], 1: [3, 2], 2: [1, 0]},
)
"""By step and rank: the micro-batches. The first is empty on one rank, the second step on all."""
SETTINGS: dict[str, Any] = {
    "loss": "causal-lm",
    "noise_multiplier": 0.7,
    "max_grad_norm": 2.0,
    "expected_batch_size": 8,
    "seed": 1,
}


def _wrapped(wrapping: str) -> nn.Module:
    model: Any = build("tied-gpt2")
    if wrapping == "root":
        fully_shard(model)
    elif wrapping == "every layer":
        for block in model.transformer.h:
            for part in (block.attn, block.mlp, block.ln_1):
                fully_shard(part)
            fully_shard(block)
        fully_shard(model)
    return model


def _loop(mode: str | None, wrapping: str, *, is_own: bool = False, num_parts: int = 1) -> Tensor:
    """Weights after the steps, by as many optimizers as parts."""
    model = _wrapped(wrapping)
    parameters = [*model.parameters()]
    parts = [torch.optim.SGD(parameters[k::num_parts], lr=0.1) for k in range(num_parts)]
    private = make_private(model, parts, mode=mode, **SETTINGS)
    for step, sizes in enumerate(SIZES):
        before = _whole(model)
        for number, size in enumerate(sizes[dist.get_rank()]):
            part = batch("tied-gpt2", size, seed=100 * step + 10 * number + dist.get_rank())
            if is_own:
                with private.batch(size):
                    logits = model(**part.inputs).logits
                    private.backward(causal_lm_loss(logits, part.targets))
            else:
                private.backward(part.inputs, part.targets)
        for optimizer in parts:
            optimizer.step()
        for optimizer in parts:
            optimizer.zero_grad()
        if not any(map(any, sizes.values())):
            # Noise alone: sigma C, over the expected batch size and times the learning rate.
            noise = (before - _whole(model)) / 0.1 * 8
            z = (noise.std() / (0.7 * 2.0) - 1) * (2 * len(noise)) ** 0.5
            assert abs(z) < 6, z
    assert private.spot_checks.num_checks > 0
    return _whole(model)


def _whole(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def _unprepared(*, is_mixed: bool) -> str:
    model = build("tied-gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = make_private(model, optimizer, mode="flash_fsdp", **SETTINGS)
    part = batch("tied-gpt2", 3, seed=1)
    if is_mixed:
        private.backward(part.inputs, part.targets)
    model(**part.inputs).logits.sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "took a step"


class FailsOnce(torch.autograd.Function):
    """Stands for an allocation that fails in the n-th backward from now, on every rank."""

    failing_at = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        FailsOnce.failing_at -= 1
        if FailsOnce.failing_at == 0:
            raise torch.OutOfMemoryError("out of memory")
        return dy


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(FailsOnce.apply(x)))


class _Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([_Block(), _Block()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.leave(h)
        return y


def _failed(mode: str, failing_at: int) -> Tensor:
    """Weights after a step of two batches, the second of which may fail and be given in halves."""
    torch.manual_seed(0)
    model = _Failing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = SETTINGS | {"loss": "sequence-classification", "spot_check": False}
    private = make_private(model, optimizer, mode=mode, **settings)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(4, 6, generator=generator)
    y = torch.randint(0, 3, (4,), generator=generator)
    private.backward(x, y)
    FailsOnce.failing_at = failing_at
    try:
        private.backward(2 * x, y)
        assert not failing_at
    except torch.OutOfMemoryError:
        FailsOnce.failing_at = 0
        private.backward(2 * x[:1], y[:1])
        private.backward(2 * x[1:], y[1:])
    optimizer.step()
    return _whole(model)


def _uneven() -> list[list[int]]:
    """[checks, samples left out] so far on rank 0, after each of its batches.

    Rank 0 has samples that are not finite; rank 1 has more samples, fewer, or none.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = SETTINGS | {"loss": "sequence-classification"}
    private = make_private(model, optimizer, mode="flash_fsdp", **settings)
    counts = []
    for size, other_size, num_nan in ((4, 7, 3), (9, 2, 1), (17, 0, 0)):
        x = torch.randn(size if dist.get_rank() == 0 else other_size, 6)
        if dist.get_rank() == 0:
            x[:num_nan] = torch.nan
        private.backward(x, torch.zeros(len(x), dtype=torch.long))
        counts.append([private.spot_checks.num_checks, private.num_left_out])
    return counts


def main(output: str) -> None:
    """Leave what was found as JSON."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    wanted = _loop("flash_fsdp", "by block")
    distance = {
        f"{mode}, {wrapping}": ((_loop(mode, wrapping) - wanted).norm() / wanted.norm()).item()
        for mode in ("flash_fsdp", "flash_fsdp_bk", "flash_fsdp_fuse", "flash_fsdp_fuse_bk")
        for wrapping in ("root", "every layer")
    }
    own = {
        f"{mode}, {wrapping}": ((_loop(mode, wrapping, is_own=True) - wanted).norm()).item()
        for mode, wrapping in (
            ("flash_fsdp", "by block"),
            ("flash_fsdp_fuse_bk", "root"),
            (None, "every layer"),
        )
    }
    distance |= {
        f"{mode}, two optimizers": (_loop(mode, wrapping, num_parts=2) - wanted).norm().item()
        for mode, wrapping in (("flash_fsdp", "root"), ("flash_fsdp_bk", "by block"))
    }
    failed = {
        f"{mode}, {at}": (_failed(mode, at) - _failed(mode, 0)).norm().item()
        for mode in ("flash_fsdp", "flash_fsdp_bk", "flash_fsdp_fuse", "flash_fsdp_fuse_bk")
        for at in ((1, 2) if mode.endswith("bk") else (1, 4))
    }
    found = {
        "distance": distance,
        "own": own,
        "failed": failed,
        "unprepared": _unprepared(is_mixed=False),
        "mixed": _unprepared(is_mixed=True),
        "uneven": _uneven(),
    }
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
