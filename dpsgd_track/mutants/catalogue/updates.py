"""Faults of the optimizer's step: what it is given is right, what it makes of it is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.mutants.mutant import mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.privacy.clipping import ClippedSum
from dpsgd_track.record.stages import Stage

_planted = partial(mutant, by=on_site, stage=Stage.UPDATE)
_step = partial(mutant, at=Seam.STEP, stage=Stage.UPDATE)


def _weights(site: Site) -> dict[str, Tensor]:
    return {n: as_local(p.detach()) for n, p in trainable_parameters(site.mode.model).items()}


def _step_with(site: Site, used: Callable[[str, Tensor], Tensor]) -> None:
    """Have the optimizer use `used(name, gradient)`, and restore the gradients after the step."""

    def step(original: Original) -> None:
        gradients = site.gradients()
        noised = {name: total.clone() for name, total in gradients.items()}
        for name, total in gradients.items():
            total.copy_(used(name, noised[name]))
        original()
        for name, total in gradients.items():
            total.copy_(noised[name])

    site.wrap(Seam.STEP, step)


def _step_at(site: Site, factor_of: Callable[[], float]) -> None:
    """Scale the learning rate of each step by `factor_of()`."""

    def step(original: Original) -> None:
        groups, factor = site.mode.optimizer.param_groups, factor_of()
        for group in groups:
            group["lr"] *= factor
        original()
        for group in groups:
            group["lr"] *= 1 / factor

    site.wrap(Seam.STEP, step)


@_planted(
    "weights updated without the noise",
    "w - lr S / B, in place of w - lr (S + N) / B",
    Need.NOISE,
    Need.TRAINING,
    at=(Seam.PRIVATIZE, Seam.STEP),
)
def update_without_noise(site: Site) -> None:
    """A noised gradient is computed, and another one is used."""
    clean: dict[str, Tensor] = {}

    def keep(clipped: ClippedSum, _: object) -> None:
        divisor = site.mode.context.privacy.expected_batch_size
        clean.update({name: total / divisor for name, total in clipped.gradients.items()})

    site.before(Seam.PRIVATIZE, keep)
    _step_with(site, lambda name, noised: clean[name])


@_step("optimizer stepped twice", "w - 2 lr g", Need.TRAINING)
def stepped_twice(original: Original) -> None:
    """Once by the engine, and once by the training loop."""
    original()
    original()


@_step(
    "learning rate times the number of ranks", "w - W lr g", Need.RANKS, Need.TRAINING, by=_step_at
)
def rate_times_ranks() -> float:
    """A linear scaling rule that was not asked for."""
    return dist.get_world_size()


@_planted("weight decay nobody asked for", "w - lr (g + 0.01 w)", Need.TRAINING, at=Seam.STEP)
def weight_decay_added(site: Site) -> None:
    """The optimizer's default."""

    def decay() -> None:
        rate = site.mode.optimizer.param_groups[0]["lr"]
        for weight in _weights(site).values():
            weight.mul_(1 - 0.01 * rate)

    site.before(Seam.STEP, decay)


@_planted(
    "momentum nobody asked for", "v = 0.9 v + g, w - lr v", Need.STEPS, Need.TRAINING, at=Seam.STEP
)
def momentum_added(site: Site) -> None:
    """The first step is right."""
    kept: dict[str, Tensor] = {}

    def with_momentum(name: str, noised: Tensor) -> Tensor:
        kept[name] = noised + 0.9 * kept.get(name, torch.zeros_like(noised))
        return kept[name]

    _step_with(site, with_momentum)


@_planted(
    "one parameter not trained",
    "w, in place of w - lr g",
    Need.TRAINING,
    at=Seam.STEP,
    where=("blocks.0.down.weight",),
)
def parameter_not_trained(site: Site) -> None:
    """The parameter is missing from the optimizer."""

    def step(original: Original) -> None:
        weight = _weights(site)["blocks.0.down.weight"]
        before = weight.clone()
        original()
        weight.copy_(before)

    site.wrap(Seam.STEP, step)


@_planted(
    "noised gradient clipped again",
    "w - lr min(1, 1 / |g|) g",
    Need.TRAINING,
    at=Seam.STEP,
    source="a training loop that was there before",
)
def noised_gradient_clipped(site: Site) -> None:
    """`clip_grad_norm_` was left in the training loop."""

    def factor_of() -> float:
        gradients = site.gradients().values()
        square = torch.stack([g.double().square().sum() for g in gradients]).sum()
        dist.all_reduce(square)
        return 1 / max(1.0, float(square.sqrt()))

    _step_at(site, factor_of)


@_planted(
    "weights kept in bfloat16", "w rounded to bfloat16 after the step", Need.TRAINING, at=Seam.STEP
)
def weights_in_bf16(site: Site) -> None:
    """There are no master weights."""

    def round_weights(_: object) -> None:
        for weight in _weights(site).values():
            weight.copy_(weight.bfloat16())

    site.after(Seam.STEP, round_weights)


@_planted(
    "schedule steps with every micro-batch",
    "lr 0.999^k after k micro-batches, in place of lr",
    Need.TRAINING,
    at=(Seam.ACCUMULATE, Seam.STEP),
)
def schedule_of_micro_batches(site: Site) -> None:
    """A schedule that was not asked for, stepped too often."""
    losses: list[Tensor] = []
    site.after(Seam.ACCUMULATE, lambda record: losses.append(record.loss_B))
    _step_at(site, lambda: 0.999 ** len(losses))


@_planted(
    "optimizer's lists out of line",
    "w_1 - lr g_2 and w_2 - lr g_1 of two weights of one shape",
    Need.LAYERS_OF_ONE_SHAPE,
    Need.TRAINING,
    at=Seam.STEP,
    source="torch._foreach_ over two lists that were filtered apart",
    where=("blocks.0.left.weight", "blocks.0.right.weight"),
)
def foreach_lists_misaligned(site: Site) -> None:
    """The gradients are right and stay in place."""
    names = "blocks.0.left.weight", "blocks.0.right.weight"

    def exchange() -> None:
        first, second = (site.gradients()[name] for name in names)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)

    def step(original: Original) -> None:
        exchange()
        original()
        exchange()

    site.wrap(Seam.STEP, step)
