"""The privacy guarantee of a group's runs, in plain words."""

from __future__ import annotations

from dpsgd_track.config import TRAIN
from dpsgd_track.record.names import EPSILON_PRV, EPSILON_RDP
from dpsgd_track.record.run import Group, ModeRun

NO_PRIVACY = 20.0
"""Epsilon from which on there is no meaningful guarantee: one sample can make an outcome e^20, half
a billion times, as likely."""


def guarantees(group: Group) -> list[str]:
    """One sentence for each regime with privacy accounting."""
    first: dict[str, ModeRun] = {}
    for run in group.runs:
        if EPSILON_RDP in run.metrics:
            first.setdefault(run.regime, run)
    return [_sentence(run) for run in first.values()]


def _sentence(run: ModeRun) -> str:
    epsilon = run.metrics.get(EPSILON_PRV, run.metrics[EPSILON_RDP])
    verdict = ": no privacy" if epsilon >= NO_PRIVACY else ""
    delta = run.job.delta if run.job else "unknown"
    given = f"The noise of {run.regime} gives epsilon = {epsilon:.4g} at delta = {delta}{verdict}."
    if run.regime != TRAIN:
        return f"{given} It is there to be compared, not to protect."
    if run.job is None or run.job.noise_from != "os":
        return f"{given} It comes from the seed: whoever knows the seed can take it off again."
    return given
