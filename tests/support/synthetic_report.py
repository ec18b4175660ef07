"""Whole comparisons to draw: healthy, faulty and large, with every section filled.

Audits are made up, so that a report can be looked at whatever the audit says of synthetic noise.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from dpsgd_track.comparison import GroupComparison, compare_group
from dpsgd_track.comparison.audit.noise import NoiseAudit, NoiseCheck, Place
from dpsgd_track.comparison.result import RegimeComparison
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.comparison.waivers import Waiver
from dpsgd_track.config import Thresholds
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import Trajectory
from tests.support.synthetic_group import (
    ENVIRONMENT,
    failed,
    group_of,
    mode_run,
    permuted,
    plan_of,
    put,
    scaled,
    trajectory,
    without_norms,
)

FULL = (
    "no_dp",
    "ghost_fsdp",
    "flash_fsdp",
    "flash_fsdp_bk",
    "flash_fsdp_fuse",
    "flash_fsdp_fuse_bk",
    "reference",
)
QUICK = ("no_dp", "flash_fsdp", "flash_fsdp_fuse", "reference")
GUILTY, GUILTY_LAYER = "flash_fsdp_fuse", "model.layers.2.weight"
COMMAND = "python launch.py quick --model-name llama-tiny --nproc-per-node 2 --num-iter 12"

_BLURRED = (
    "loss",
    "grad_norm",
    "grad_norm_noised",
    "layer_grad_norm",
    "sample_norm",
    "sample_norm_by_parameter",
    "gradient_sketch",
    "noised_sketch",
)


Spoil = Callable[[Trajectory], Trajectory]


def blurred(t: Trajectory, seed: int, size: float = 2e-7) -> Trajectory:
    """`t` with every number off by a relative `size` or so, as rounding leaves it."""
    rng = np.random.default_rng(seed)
    changed: dict[str, Any] = {}
    for name in _BLURRED:
        values = getattr(t, name)
        changed[name] = values * (1 + size * rng.normal(size=values.shape))
    return replace(t, **changed)


def faulty(t: Trajectory, first_step: int = 3) -> Trajectory:
    """`t` with the norm of one layer 8 % too large on rank 1 from `first_step` on."""
    by_parameter = t.sample_norm_by_parameter.copy()
    column = t.parameter_names.tolist().index(GUILTY_LAYER)
    wrong = (t.sample_rank == 1) & (t.step[:, None] >= first_step)
    by_parameter[..., column][wrong] *= 1.08
    norm = np.sqrt(np.square(by_parameter).sum(axis=2))
    factor = np.minimum(1, t.max_grad_norm[:, None] / norm)
    # The sum follows from the factors, in the reference's terms.
    inherited = np.einsum("sn,snpk->spk", factor - t.clip_factor, t.sample_sketch)
    gradient = t.gradient_sketch + inherited
    before, after = (np.square(g).sum(axis=(1, 2)) for g in (t.gradient_sketch, gradient))
    return replace(
        t,
        sample_norm_by_parameter=by_parameter,
        sample_norm=norm,
        clip_factor=factor,
        grad_norm=t.grad_norm * np.sqrt(after / before),
        gradient_sketch=gradient,
        noised_sketch=t.noised_sketch + inherited,
    )


def nan_from(t: Trajectory, first_step: int) -> Trajectory:
    """`t` with NaN in one layer from a step on, and in all that is computed of it."""
    rows = t.step >= first_step
    column = t.parameter_names.tolist().index(GUILTY_LAYER)
    is_layer = np.array([".layers.2." in name for name in t.layer_names.tolist()])
    changed: dict[str, Any] = {}
    for name, columns in (
        ("sample_norm_by_parameter", np.s_[:, column]),
        ("gradient_sketch", np.s_[column]),
        ("noised_sketch", np.s_[column]),
        ("layer_grad_norm", is_layer),
        ("sample_norm", np.s_[:]),
        ("clip_factor", np.s_[:]),
        ("grad_norm", ...),
        ("grad_norm_noised", ...),
    ):
        values = getattr(t, name).astype(float)
        for row in np.flatnonzero(rows):
            if columns is ...:
                values[row] = np.nan
            else:
                values[row][columns] = np.nan
        changed[name] = values
    # The loss is computed before the gradient.
    changed["loss"] = np.where(t.step > first_step, np.nan, t.loss)
    return replace(t, **changed)


def runs(
    modes: Sequence[str],
    *,
    steps: int,
    samples: int,
    layers: int,
    guilty: str = "",
    spoil: Spoil = faulty,
) -> list[ModeRun]:
    """`modes` in both regimes, each with its own rounding, and a replay of each baseline."""
    made = []
    for regime, noise_std in (("accuracy", 100.0), ("clip", 0.0)):
        record = trajectory(steps=steps, samples=samples, layers=layers, noise_std=noise_std)
        if noise_std:
            record = replace(record, loss=6 + np.exp(-record.step / (steps / 3)))
        for seed, mode in enumerate(modes):
            if mode == "no_dp" and regime == "clip":
                continue
            own = blurred(record, seed)
            own = spoil(own) if mode == guilty and regime == "clip" else own
            own = without_norms(own) if mode == "no_dp" else own
            own = put(own, "step_time_ms", 90.0 + 14 * seed)
            own = put(own, "peak_memory_gib", 1.5 + 0.2 * seed)
            made.append(mode_run(mode, regime, own))
        base = "no_dp" if regime == "accuracy" else "reference"
        again = permuted(blurred(record, 99, 4e-7))
        again = without_norms(again) if base == "no_dp" else again
        made.append(mode_run(base, regime, again, replay="permuted"))
    return made


def comparison(modes: Sequence[ModeRun], name: str = "quick-20261122-112953") -> GroupComparison:
    """`modes` compared, with audits made up."""
    environment = replace(ENVIRONMENT, git_revision="0123abc")
    plan = plan_of(modes, command=COMMAND, environment=environment)
    compared = compare_group(group_of(modes, name=name, plan=plan), Thresholds())
    return replace(
        compared,
        regimes=tuple(_audited(regime) for regime in compared.regimes),
    )


def audit(mode: str, regime: str, parameters: Sequence[str], scale: float = 1.0) -> NoiseAudit:
    """An audit that finds the noise `scale` times as large as it should be."""
    rng = np.random.default_rng(len(mode))
    ratios = scale * (1 + 0.01 * rng.normal(size=len(parameters)))
    is_ok = scale == 1
    return NoiseAudit(
        regime=regime,
        mode=mode,
        checks=(
            NoiseCheck(
                name="std",
                title="standard deviation",
                value=scale,
                low=scale - 0.004,
                high=scale + 0.004,
                expected=1.0,
                is_ok=is_ok,
                sentence=f"the noise is {scale:g} times sigma C",
            ),
            NoiseCheck(
                name="correlation_of_ranks",
                title="correlation of ranks",
                value=0.002,
                low=-0.01,
                high=0.014,
                expected=0.0,
                is_ok=True,
                place=Place(text="rank 0 and rank 1"),
                sentence="no two ranks draw the same noise",
            ),
        ),
        by_parameter=tuple(
            (name, float(r), float(r - 0.02), float(r + 0.02))
            for name, r in zip(parameters, ratios, strict=True)
        ),
    )


def _audited(regime: RegimeComparison) -> RegimeComparison:
    if regime.name != "accuracy":
        return regime
    parameters = next(r.trajectory for r in regime.runs if r.trajectory).parameter_names.tolist()
    labels = [run.label for run in regime.runs if run.label not in ("no_dp", "reference")]
    return replace(regime, audits={label: audit(label, "accuracy", parameters) for label in labels})


@cache
def healthy() -> GroupComparison:
    """A quick group in which all agree but for rounding."""
    return comparison(runs(QUICK, steps=12, samples=8, layers=4))


@cache
def broken() -> GroupComparison:
    """The same with a BUG in a middle layer of one mode, and one accepted drift."""
    made = comparison(runs(QUICK, steps=12, samples=8, layers=4, guilty=GUILTY))
    waiver = Waiver(
        mode="flash_fsdp",
        observable="update",
        reason="bf16 master weights until the optimizer is ported",
        expires=datetime.date(2026, 12, 31),
        up_to=2e-3,
    )
    modes = tuple(
        replace(mode, findings=(replace(_finding(made), waiver=waiver, verdict=Verdict.DRIFT),))
        if mode.label == "flash_fsdp"
        else mode
        for mode in made.modes
    )
    return replace(
        made,
        modes=modes,
        waiver_notes=("The waiver of ghost_fsdp, loss, expired on 2026-10-31.",),
        environment_differences=(("torch", "2.12.1", "2.13.0"), ("num_ranks", "1", "2")),
    )


def _finding(made: GroupComparison) -> Any:
    return next(mode.findings[0] for mode in made.modes if mode.findings)


NAN_STEP = 5


@cache
def undefined(first_step: int = NAN_STEP) -> GroupComparison:
    """The same with NaN in a middle layer of one mode from a step on."""
    made = partial(nan_from, first_step=first_step)
    return comparison(runs(QUICK, steps=12, samples=8, layers=4, guilty=GUILTY, spoil=made))


def large(steps: int = 10_000, layers: int = 30) -> GroupComparison:
    """A full group: seven modes of many steps."""
    return comparison(runs(FULL, steps=steps, samples=8, layers=layers, guilty=GUILTY), "full")


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>|`**[x](http://e.vil)@you%{x}"
)


def hostile() -> GroupComparison:
    """A group in which every name that a run can bring is an attack."""
    record = trajectory(noise_std=0.0)
    names: dict[str, Any] = {
        key: np.array([HOSTILE + name for name in getattr(record, key)])
        for key in ("layer_names", "parameter_names")
    }
    record = replace(record, **names)
    wrong = scaled(record, "layer_grad_norm", 1.1, (2, 1))
    runs = [
        mode_run("reference", "clip", record),
        mode_run(f"m:{HOSTILE}", "clip", wrong),
        mode_run("flash_fsdp", "clip", status="FAILED", failure=failed(HOSTILE)),
    ]
    plan = plan_of(
        runs,
        command=f"launch.py\n```\n{HOSTILE}",
        environment=replace(ENVIRONMENT, platform=HOSTILE),
    )
    return compare_group(group_of(runs, name=HOSTILE, plan=plan), Thresholds())
