"""The regimes of each suite, with their constants and replays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from dpsgd_track.config import (
    ACCURACY,
    AGAIN,
    CLIP,
    NOISE,
    PERMUTED,
    PLAIN,
    PROBE_ACCURACY,
    PROBE_CLIP,
    PROBE_NAIVE,
    PROBE_NOISE,
    PROBES,
    PROFILE,
    SILENT,
    TRAIN,
    ULP,
    RegimeConfig,
    kind_of,
)
from dpsgd_track.demands import Demand, model_demands
from dpsgd_track.launcher.choices import TrainingChoices
from dpsgd_track.launcher.recipe import recipe_of
from dpsgd_track.modes import table
from dpsgd_track.record.plan import Suite

PROFILE_WARMUP_ITER = 3
CLIP_NUM_ITER = 4
"""Least steps of the clip regime: two clip some samples, two all; more do so in turn."""
PROBE_NUM_ITER = 8
"""Steps of the probe's clip and accuracy regimes. The last four are small, and there for faults
that begin late."""
NAIVE_NUM_ITER = 4
NOISE_SIGMA = 0.7
NOISE_BOUNDS = (0.37, 0.83, 1.3, 0.47)
"""C of each step of the noise regime: none is 1, and no two differ by a likely fault's factor."""
NOISE_MICRO_BATCHES = 3
PROBE_MICRO_BATCHES = 3
PROBE_SIGMA, PROBE_BOUND, PROBE_LEARNING_RATE = 0.0037, 83.0, 0.053
"""Settings of the probe's accuracy regime, where no sample reaches C and the norm of the noise is
about that of the clipped sum."""
SUITE_REGIMES = {
    Suite.QUICK: (ACCURACY, CLIP, *PROBES),
    Suite.FULL: (ACCURACY, CLIP),
    Suite.FAULTS: (*PROBES, PROBE_NAIVE),
}
"""Regimes that run unless the user asks for others."""
CHOOSABLE = (ACCURACY, CLIP, NOISE, *PROBES)
"""Regimes that a user can ask for."""
ORDERED = (*CHOOSABLE, PROBE_NAIVE)
"""Regimes of all suites but single and profile, in the order of execution."""


def is_run(mode: str, regime: str, declined: Collection[Demand] = ()) -> bool:
    """True if `mode` has a run in `regime`: only private modes have clip and noise regimes.

    Args:
        declined: demands that the mode declines.
    """
    kind = kind_of(regime)
    if mode == table.REFERENCE and (kind == NOISE or regime == PROBE_NAIVE):
        return False
    if model_demands(regime) & set(declined):
        return False
    return kind not in (CLIP, NOISE) or table.is_private(mode)


def regimes_of(
    mode: str, names: Sequence[str], suite: Suite, training: TrainingChoices, device: str
) -> tuple[RegimeConfig, ...]:
    """The regimes of `names`, each with the replays that `mode` has."""
    regimes = {regime.name: regime for regime in _all(suite, training, device)}
    return tuple(
        run
        for name in names
        for run in _with_replays(mode, regimes[name], is_single=suite is Suite.SINGLE)
    )


def num_iter(suite: Suite, training: TrainingChoices, device: str) -> int:
    """Recorded steps of the regimes whose number of steps the user chooses."""
    chosen = training.num_iter
    return recipe_of(suite, device).num_iter if chosen is None else chosen


def _all(suite: Suite, training: TrainingChoices, device: str) -> Iterator[RegimeConfig]:
    """Every regime, on the user's model and then on the probe."""
    by_device = int(device == "cuda")
    chosen = training.warmup_iter
    warmup = by_device if chosen is None else chosen
    steps = num_iter(suite, training, device)
    trained = RegimeConfig(
        name=TRAIN,
        num_iter=steps,
        warmup_iter=warmup,
        micro_batches=training.micro_batches or 1,
        noise_multiplier=training.noise_multiplier,
        max_grad_norms=(training.max_grad_norm,) * steps,
        clipping=training.clipping,
        learning_rate=training.learning_rate,
        optimizer=training.optimizer,
    )
    yield trained
    timed = PROFILE_WARMUP_ITER if chosen is None else chosen
    yield replace(trained, name=PROFILE, warmup_iter=timed)
    # In a profile, --warmup-iter applies to the timed steps.
    warmup = by_device if suite is Suite.PROFILE else warmup
    trained = replace(trained, warmup_iter=warmup)
    yield replace(trained, name=ACCURACY, micro_batches=1, noise_matched=True)
    clipped = RegimeConfig(
        name=CLIP,
        num_iter=max(training.num_iter or 0, CLIP_NUM_ITER),
        warmup_iter=warmup,
        micro_batches=training.micro_batches or 2,
        clipping=training.clipping,
        optimizer=training.optimizer,
    )
    yield clipped
    noisy = replace(
        clipped,
        name=NOISE,
        num_iter=len(NOISE_BOUNDS),
        micro_batches=training.micro_batches or NOISE_MICRO_BATCHES,
        max_grad_norms=NOISE_BOUNDS,
        noise_multiplier=NOISE_SIGMA,
    )
    yield noisy
    yield from _on_probe(training.clipping)


def _on_probe(clipping: str) -> Iterator[RegimeConfig]:
    """Regimes on the probe, the same for all choices, so that their sensitivity is known."""
    # A warm-up would hide faults of the first step.
    clipped = RegimeConfig(
        name=PROBE_CLIP,
        num_iter=PROBE_NUM_ITER,
        micro_batches=PROBE_MICRO_BATCHES,
        clipping=clipping,
    )
    yield clipped
    accurate = replace(
        clipped,
        name=PROBE_ACCURACY,
        noise_multiplier=PROBE_SIGMA,
        max_grad_norms=(PROBE_BOUND,) * clipped.num_iter,
        learning_rate=PROBE_LEARNING_RATE,
        noise_matched=True,
    )
    yield accurate
    naive_bounds = accurate.max_grad_norms[:NAIVE_NUM_ITER]
    yield replace(
        accurate,
        name=PROBE_NAIVE,
        num_iter=len(naive_bounds),
        max_grad_norms=naive_bounds,
        noise_multiplier=1e-9,
        micro_batches=1,
    )
    yield replace(
        clipped,
        name=PROBE_NOISE,
        num_iter=len(NOISE_BOUNDS),
        max_grad_norms=NOISE_BOUNDS,
        noise_multiplier=NOISE_SIGMA,
    )


def _with_replays(mode: str, regime: RegimeConfig, *, is_single: bool) -> tuple[RegimeConfig, ...]:
    """`regime` with the replays and twin that a comparison needs."""
    if regime.kind == NOISE:
        # The twin without noise comes first: its update is subtracted.
        return replace(regime, noise_multiplier=0.0, replay=SILENT), regime
    replays: tuple[str, ...] = ()
    if regime.kind == PROFILE or is_single:
        return (regime,)
    if mode == table.BASELINE and regime.kind == ACCURACY:
        # The error of a trajectory due to rounding alone.
        replays = (AGAIN, PERMUTED, ULP)
    elif mode == table.REFERENCE:
        # The error of plain autograd in the modes' compute type.
        replays = (PLAIN,)
    return (regime, *(replace(regime, replay=kind) for kind in replays))
