"""The runs of a profile, in the order in which they are timed.

At each shape every mode runs between two runs of its baseline, so that a drift of the machine's
speed affects both: no_dp, mode 1, no_dp, mode 2, no_dp. Modes on one device run between runs of
no_dp_single in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpsgd_track.config import PROFILE, DataConfig, JobConfig
from dpsgd_track.modes.table import BASELINE, SINGLE_BASELINE, baseline_of


def with_baselines(modes: Sequence[str]) -> tuple[str, ...]:
    """`modes`, preceded by their baselines."""
    needed = {BASELINE, *map(baseline_of, modes)}
    return tuple(dict.fromkeys([b for b in (BASELINE, SINGLE_BASELINE) if b in needed] + [*modes]))


def interleaved(jobs: Sequence[JobConfig], num_rounds: int = 1) -> list[JobConfig]:
    """`jobs`, one for each mode, with the baseline's run before, between and after the others.

    The last baseline run of a round is also the first of the next.
    """
    order: list[JobConfig] = []
    for base in (job for job in jobs if job.label == baseline_of(job.mode)):
        compared = [job for job in jobs if job is not base and baseline_of(job.mode) == base.mode]
        order.append(base)
        for job in compared * num_rounds:
            order += [job, base]
    return order


def profile_jobs(
    jobs: Sequence[JobConfig], shapes: Sequence[DataConfig], num_rounds: int
) -> tuple[JobConfig, ...]:
    """A job for each timed run of a profile, in order, numbered from 1.

    Args:
        jobs: one for each mode, the baselines first. Regimes besides the profile are run once, by
            the first job of each mode.
        shapes: the data at each sequence length and batch size.
    """
    timed: list[JobConfig] = []
    seen: set[str] = set()
    for data in shapes:
        for job in interleaved([job for job in jobs if job.is_timed], num_rounds):
            regimes = tuple(
                replace(regime, order=len(timed) + 1) if regime.name == PROFILE else regime
                for regime in job.regimes
                if regime.name == PROFILE or job.label not in seen
            )
            seen.add(job.label)
            timed.append(replace(job, data=data, regimes=regimes))
    return (*(job for job in jobs if not job.is_timed), *timed)
