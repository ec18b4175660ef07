"""`--dry-run`: prints the plan and an estimate of its duration."""

from __future__ import annotations

import math

from dpsgd_track.config import is_probe
from dpsgd_track.record.plan import GroupPlan

START_S, STEP_S, PROBE_STEP_S = 5.0, 1.0, 0.15
"""Seconds that a process group takes to start, and a step of minilm or of the probe to run: rounded
from `quick` on two CPU cores."""


def show_plan(plan: GroupPlan) -> None:
    """Print modes, processes and regimes of `plan`, and an estimate of its duration."""
    rows = [("mode", "processes", "regimes")]
    for job in plan.jobs:
        runs = [f"{r.name} ({r.replay})" if r.replay else r.name for r in job.regimes]
        rows.append((job.title, f"{job.num_ranks} on {job.performance.device}", ", ".join(runs)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for mode, processes, regimes in rows:
        print(f"{mode:{widths[0]}}  {processes:{widths[1]}}  {regimes}")
    num_runs = sum(1 for _ in plan.runs())
    machines = f" on {plan.num_nodes} machines" if plan.num_nodes > 1 else ""
    print(f"{plan.suite}: {len(plan.jobs)} process groups{machines}, {num_runs} mode runs")
    print(estimate(plan))


def estimate(plan: GroupPlan) -> str:
    """Estimated duration of `plan`, and its basis."""
    steps = {True: 0, False: 0}
    for _, _, regime in plan.runs():
        steps[is_probe(regime.name)] += regime.num_iter + regime.warmup_iter
    seconds = START_S * len(plan.jobs) + STEP_S * steps[False] + PROBE_STEP_S * steps[True]
    minutes = math.ceil(seconds / 60)
    return (
        f"expected: about {minutes} min, at {START_S:g} s to start each process group, {STEP_S:g} "
        f"s for each of {steps[False]} steps and {PROBE_STEP_S:g} s for each of {steps[True]} on "
        "the probe, as minilm takes on 2 CPU cores; another model or machine may differ by far"
    )
