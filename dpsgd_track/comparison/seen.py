"""Errors that a comparison could have seen, and those that no regime of its group exercised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpsgd_track.comparison.audit.noise import NoiseAudit, draws
from dpsgd_track.comparison.audit.noise.std import STD
from dpsgd_track.comparison.measure.amount import share
from dpsgd_track.comparison.measure.resolution import (
    Resolution,
    least_sensitive,
    most_sensitive,
    told,
)
from dpsgd_track.config import CLIP, NOISE, SYNTHETIC, is_probe, kind_of
from dpsgd_track.record.run import ModeRun

MODEL, PROBE = "the model", "the probe"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Resolution of a group: the smallest errors found, whichever mode has them."""

    resolutions: Mapping[str, Resolution]
    """By MODEL and PROBE."""
    noise_std: float | None = None
    """Smallest relative error found of the std of all noise; None if it was not audited."""
    unseen: tuple[str, ...] = ()
    """Kinds of faults that no regime exercised."""

    @property
    def sentence(self) -> str:
        """One line for every verdict; empty if nothing was compared."""
        found = [
            f"in {name}: {said}"
            for name, resolution in self.resolutions.items()
            if (said := told(resolution))
        ]
        if self.noise_std is not None:
            found.append(f"noise whose std is off by {share(self.noise_std)}")
        seen = f"Would have seen {'; '.join(found)}." if found else ""
        blind = f"Cannot have seen faults {', '.join(self.unseen)}." if self.unseen else ""
        return " ".join(filter(None, (seen, blind)))


def by_model(resolutions: Sequence[tuple[str, Resolution]]) -> dict[str, Resolution]:
    """Joint resolution of one mode on the model and on the probe.

    Args:
        resolutions: one for each comparison, with its regime.
    """
    found: dict[str, Resolution] = {}
    for name in (MODEL, PROBE):
        own = [each for regime, each in resolutions if is_probe(regime) == (name == PROBE)]
        if own:
            found[name] = most_sensitive(own)
    return found


def seen_in(
    modes: Sequence[Mapping[str, Resolution]],
    audits: Sequence[NoiseAudit],
    runs: Sequence[ModeRun],
) -> Seen:
    """Resolution in every mode of a group.

    Args:
        modes: the resolution of each mode, by model.
        audits: of the modes' own noise.
        runs: all runs but replays.
    """
    resolutions = {}
    for name in (MODEL, PROBE):
        found = [mode[name] for mode in modes if name in mode]
        # A mode without norms, such as no_dp, is compared in fewer regimes.
        found = [each for each in found if each.norms] or found
        if found:
            resolutions[name] = least_sensitive(found)
    return Seen(
        resolutions=resolutions,
        noise_std=max(filter(None, map(_noise_std, audits)), default=None),
        unseen=tuple(_unseen([run for run in runs if run.trajectory])),
    )


def _noise_std(audit: NoiseAudit) -> float | None:
    """Smallest relative error of the std that the audit finds with 95 % probability."""
    if kind_of(audit.regime) != NOISE:
        return None
    found = [check.resolution for check in audit.checks if check.name in (STD, draws.STD)]
    return min(filter(math.isfinite, found), default=None)


def _unseen(runs: Sequence[ModeRun]) -> Iterator[str]:
    """Kinds of faults that no run could show."""
    if not runs:
        return
    kinds = {kind_of(run.regime) for run in runs}
    steps = max(run.trajectory.num_steps for run in runs if run.trajectory)
    yield f"that begin after step {steps - 1}"
    if CLIP not in kinds:
        yield "of clipping"
    if NOISE not in kinds:
        yield "of a mode's own noise"
    jobs = [run.job for run in runs if run.job]
    setups = [run.setup for run in runs if run.setup]
    if jobs and max(job.num_ranks for job in jobs) == 1:
        yield "of several ranks"
    if setups and max(setup.micro_batches for setup in setups) == 1:
        yield "of several micro-batches"
    if not any((run.trajectory.num_samples == 0).any() for run in runs if run.trajectory):
        yield "of an empty batch"
    has_padding = any(
        is_probe(run.regime) or run.job is None or run.job.data.ragged for run in runs
    ) or any(job.data.source != SYNTHETIC for job in jobs)
    if not has_padding:
        yield "of padding"
    dtypes = {job.performance.param_dtype for job in jobs}
    if len(dtypes) == 1:
        yield f"in other types than {dtypes.pop()}"
