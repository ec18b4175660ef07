"""Faults of the optimizer's step: what it is given is right, what it makes of it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.mutants.fault import UPDATE, Site, fault

TRAINED = "a learning rate above 0"


def _weights(site: Site) -> dict[str, Tensor]:
    return {n: as_local(p.detach()) for n, p in trainable_parameters(site.mode.model).items()}


def _gradients(site: Site) -> dict[str, Tensor]:
    return {part.name: part.local for part in site.mode.gradient_parts()}


def _stepped_with(site: Site, used: Callable[[str, Tensor], Tensor]) -> None:
    """Have the optimizer use `used(name, gradient)`; the gradients are then what they were."""

    def step(original: Any) -> None:
        gradients = _gradients(site)
        noised = {name: total.clone() for name, total in gradients.items()}
        for name, total in gradients.items():
            total.copy_(used(name, noised[name]))
        original()
        for name, total in gradients.items():
            total.copy_(noised[name])

    site.wrap("step", step)


def _rates(site: Site, factor: float) -> None:
    for group in site.mode.optimizer.param_groups:
        group["lr"] *= factor


@fault(
    "weights updated without the noise",
    formula="w - lr S / B, in place of w - lr (S + N) / B",
    at="privatize, step",
    needs=f"noise, {TRAINED}",
    stage=UPDATE,
)
def update_without_noise(site: Site) -> None:
    """The noised gradient is there, and another is used."""
    clean: dict[str, Tensor] = {}

    def privatize(original: Any, clipped: Any, source: Any) -> Any:
        divisor = site.mode.context.privacy.expected_batch_size
        clean.update({name: total / divisor for name, total in clipped.gradients.items()})
        return original(clipped, source)

    site.wrap("privatize", privatize)
    _stepped_with(site, lambda name, noised: clean[name])


@fault("optimizer stepped twice", formula="w - 2 lr g", at="step", needs=TRAINED, stage=UPDATE)
def stepped_twice(site: Site) -> None:
    """By the engine, and by the loop."""

    def step(original: Any) -> None:
        original()
        original()

    site.wrap("step", step)


@fault(
    "learning rate times the number of ranks",
    formula="w - W lr g",
    at="step",
    needs=f"several ranks, {TRAINED}",
    stage=UPDATE,
)
def rate_times_ranks(site: Site) -> None:
    """A linear scaling rule that nobody asked for."""

    def step(original: Any) -> None:
        _rates(site, dist.get_world_size())
        original()
        _rates(site, 1 / dist.get_world_size())

    site.wrap("step", step)


@fault(
    "weight decay nobody asked for",
    formula="w - lr (g + 0.01 w)",
    at="step",
    needs=TRAINED,
    stage=UPDATE,
)
def weight_decay_added(site: Site) -> None:
    """An optimizer's default."""

    def step(original: Any) -> None:
        rate = site.mode.optimizer.param_groups[0]["lr"]
        for weight in _weights(site).values():
            weight.mul_(1 - 0.01 * rate)
        original()

    site.wrap("step", step)


@fault(
    "momentum nobody asked for",
    formula="v = 0.9 v + g, w - lr v",
    at="step",
    needs=f"several steps, {TRAINED}",
    stage=UPDATE,
)
def momentum_added(site: Site) -> None:
    """The first step is right."""
    kept: dict[str, Tensor] = {}

    def with_momentum(name: str, noised: Tensor) -> Tensor:
        kept[name] = noised + 0.9 * kept.get(name, torch.zeros_like(noised))
        return kept[name]

    _stepped_with(site, with_momentum)


@fault(
    "one parameter not trained",
    formula="w, in place of w - lr g",
    at="step",
    needs=TRAINED,
    stage=UPDATE,
    where="blocks.0.down.weight",
)
def parameter_not_trained(site: Site) -> None:
    """Not among the optimizer's."""

    def step(original: Any) -> None:
        weight = _weights(site)["blocks.0.down.weight"]
        before = weight.clone()
        original()
        weight.copy_(before)

    site.wrap("step", step)


@fault(
    "noised gradient clipped again",
    source="a training loop that was there before",
    formula="w - lr min(1, 1 / |g|) g",
    at="step",
    needs=TRAINED,
    stage=UPDATE,
)
def noised_gradient_clipped(site: Site) -> None:
    """`clip_grad_norm_` stayed in the loop."""

    def step(original: Any) -> None:
        square = torch.stack([g.double().square().sum() for g in _gradients(site).values()]).sum()
        dist.all_reduce(square)
        factor = 1 / max(1.0, float(square.sqrt()))
        _rates(site, factor)
        original()
        _rates(site, 1 / factor)

    site.wrap("step", step)


@fault(
    "weights kept in bfloat16",
    formula="w rounded to bfloat16 after the step",
    at="step",
    needs=TRAINED,
    stage=UPDATE,
)
def weights_in_bf16(site: Site) -> None:
    """No master weights."""

    def step(original: Any) -> None:
        original()
        for weight in _weights(site).values():
            weight.copy_(weight.bfloat16())

    site.wrap("step", step)


@fault(
    "schedule steps with every micro-batch",
    formula="lr 0.999^k after k micro-batches, in place of lr",
    at="accumulate, step",
    needs=TRAINED,
    stage=UPDATE,
)
def schedule_of_micro_batches(site: Site) -> None:
    """A schedule that nobody asked for besides."""
    count = [0]

    def accumulate(original: Any, batch: Any) -> Any:
        count[0] += 1
        return original(batch)

    def step(original: Any) -> None:
        factor = 0.999 ** count[0]
        _rates(site, factor)
        original()
        _rates(site, 1 / factor)

    site.wrap("accumulate", accumulate)
    site.wrap("step", step)


@fault(
    "optimizer's lists out of line",
    source="torch._foreach_ over two lists that were filtered apart",
    formula="w_1 - lr g_2 and w_2 - lr g_1 of two weights of one shape",
    at="step",
    needs=f"two layers of one shape, {TRAINED}",
    stage=UPDATE,
    where="blocks.0.left.weight, blocks.0.right.weight",
)
def foreach_lists_misaligned(site: Site) -> None:
    """The gradients themselves are right, and stay where they are."""
    names = "blocks.0.left.weight", "blocks.0.right.weight"

    def exchange() -> None:
        first, second = (_gradients(site)[name] for name in names)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)

    def step(original: Any) -> None:
        exchange()
        original()
        exchange()

    site.wrap("step", step)
