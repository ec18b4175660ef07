"""`--dry-run`: prints the plan and an estimate of its duration."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from dpsgd_track.config import PROBE_MODEL
from dpsgd_track.launcher.choices import MINILM
from dpsgd_track.record.plan import GroupPlan
from dpsgd_track.report.columns import in_columns

START_S = 5.0
"""Seconds that a process group takes to start, on two CPU cores."""
STEP_S = {MINILM: 1.0, "llama-tiny": 0.3, PROBE_MODEL.name: 0.15}
"""Seconds that a step of a model takes, rounded from quick and full on two CPU cores."""


def show_plan(plan: GroupPlan) -> None:
    """Print modes, processes and regimes of `plan`, and an estimate of its duration."""
    rows = [("mode", "processes", "regimes")]
    for job in plan.jobs:
        replays: defaultdict[str, list[str]] = defaultdict(list)
        for regime in job.regimes:
            replays[regime.name] += filter(None, [regime.replay])
        regimes = [
            f"{name} (+ {', '.join(kinds)})" if kinds else name for name, kinds in replays.items()
        ]
        rows.append((job.title, f"{job.num_ranks} on {job.performance.device}", ", ".join(regimes)))
    print("\n".join(in_columns(rows)))
    num_runs = sum(1 for _ in plan.runs())
    machines = f" on {plan.num_nodes} machines" if plan.num_nodes > 1 else ""
    groups = _count(len(plan.jobs), "process group")
    print(f"{plan.suite}: {groups}{machines}, {_count(num_runs, 'mode run')}")
    print(estimate(plan))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def estimate(plan: GroupPlan) -> str:
    """Estimated duration of `plan`, and its basis."""
    steps: Counter[str] = Counter()
    for _, job, regime in plan.runs():
        steps[job.run_in(regime).model.name] += regime.num_iter + regime.warmup_iter
    seconds, unknown = START_S * len(plan.jobs), []
    parts = [f"{START_S:g} s to start each process group"]
    for model, count in steps.items():
        step_s = STEP_S.get(model, STEP_S[MINILM])
        seconds += step_s * count
        name = "the probe" if model == PROBE_MODEL.name else model
        parts.append(f"{step_s:g} s for each of {count} steps of {name}")
        if model not in STEP_S:
            unknown.append(f"; the speed of {model} is not known, and {MINILM}'s is assumed")
    faster = "; a GPU is faster" * any(job.performance.device == "cuda" for job in plan.jobs)
    return (
        f"expected: about {math.ceil(seconds / 60)} min on 2 CPU cores, at {', '.join(parts)}"
        f"{''.join(unknown)}{faster}"
    )
