"""`launch.py resume`: what a group lacks, as a suite that runs only that."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace

from dpsgd_track.cli.options import PLANTED, PROFILE, RESUMABLE, build_parser, planted_suite
from dpsgd_track.config import CLIP, NOISE, JobConfig, NodesConfig, RegimeConfig, require
from dpsgd_track.launcher.recording import Recording, take_up
from dpsgd_track.launcher.suites import InputCheck, Suite, build_suite, read_settings
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record import names
from dpsgd_track.record.environment import environment
from dpsgd_track.store.find_group import read_group_anywhere, run_key
from dpsgd_track.store.reader import FINISHED, Group, GroupNotFound


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What is to be run once more."""

    args: argparse.Namespace
    """What the group was launched with, and where it is kept now."""
    command: str
    """The command line that it was launched by."""
    suite: Suite
    """The group's, with the jobs and regimes that did not finish: none where it lacks nothing."""
    group: Group
    """As far as it got."""
    clip_bounds: dict[str, tuple[float, ...]]
    """C of each step of the clip regimes that the reference finished."""
    changes: tuple[str, ...]
    """What of the environment is not as it was when the group was launched."""


def find_missing(
    resumed: argparse.Namespace, nodes: NodesConfig, check_inputs: InputCheck
) -> Missing:
    """What a group lacks.

    Args:
        resumed: arguments of `resume`.
        nodes: machines that it is to be run on, as many as before.

    Raises:
        ValueError: there is no such group, it cannot be resumed, or its inputs are gone.
    """
    settings, wanted = read_settings(resumed), resumed.group
    try:
        group = read_group_anywhere(settings, wanted, print).group
    except GroupNotFound as error:
        raise ValueError(str(error)) from error
    launched = group.params.get("command", "")
    command = shlex.split(launched)[2:]
    is_known = command[:1] and command[0] in RESUMABLE
    advice = "Times of a profile mean something beside those of the same launch: launch it again."
    allowed = f"a group of {', '.join(RESUMABLE)}"
    require(bool(is_known), "group", wanted, allowed, advice * (command[:1] == [PROFILE]))
    args = build_parser().parse_args(command)
    for place in ("config", "tracking_uri", "spool", "offline"):
        setattr(args, place, getattr(resumed, place))
    modes = [run.mode for run in group.runs if run.mode != REFERENCE]
    of_suite = planted_suite(args, modes) if args.command == PLANTED else args
    suite = build_suite(of_suite, check_inputs)
    before = suite.nodes.num_nodes
    advice = "Ranks are spread over machines as they were. Give --nnodes, --node-rank and "
    advice += "--rdzv-endpoint on each."
    require(nodes.num_nodes == before, "nnodes", nodes.num_nodes, f"{before}, as before", advice)
    suite = replace(suite, settings=settings, group=group.name, nodes=nodes)
    # A run that ended without its record tells too little to be compared.
    done = {
        run_key(run) for run in group.runs if run.status == FINISHED and not run.trajectory_missing
    }
    jobs = tuple(
        replace(job, regimes=regimes) for job in suite.jobs if (regimes := _missing(job, done))
    )
    return Missing(
        args=args,
        command=launched,
        suite=replace(suite, jobs=jobs),
        group=group,
        clip_bounds=_clip_bounds(group),
        changes=_changes(group),
    )


def _missing(job: JobConfig, done: set[tuple[str, str, str, str]]) -> tuple[RegimeConfig, ...]:
    variant = job.variant.name if job.variant else ""
    missing = {
        (regime.name, regime.replay)
        for regime in job.regimes
        if (job.mode, regime.name, variant, regime.replay) not in done
    }
    # A replay of clip takes its bounds from the run beside it, noise what its silent twin left.
    both = {name for name, _ in missing}
    return tuple(
        regime
        for regime in job.regimes
        if (regime.name, regime.replay) in missing
        or (regime.kind in (CLIP, NOISE) and regime.name in both)
    )


def _clip_bounds(group: Group) -> dict[str, tuple[float, ...]]:
    return {
        run.regime: tuple(map(float, run.trajectory.max_grad_norm))
        for run in group.runs
        if run.mode == REFERENCE and not run.replay and run.status == FINISHED
        if run.trajectory is not None and not run.trajectory_missing
    }


def _changes(group: Group) -> tuple[str, ...]:
    now = environment()
    return tuple(
        f"{name} is {value}, was {before}"
        for name, value in now.items()
        if (before := group.params.get(f"environment.{name}", value)) != value
    )


def reopen_group(missing: Missing, *, is_offline: bool) -> Recording:
    """Take up the group where it was left.

    Args:
        is_offline: records stay in the spool; no store is looked for.

    Raises:
        ValueError: it is still being run, or the store cannot be used.
    """
    group, settings = missing.group, missing.suite.settings
    allowed = "a group that nobody works on"
    recording, is_new = take_up(settings, group.name, group.name, allowed, is_offline=is_offline)
    key = group.tags.get(names.KEY, group.run_id)
    tags = {
        name: value for name, value in group.tags.items() if name not in (names.VERDICT, names.NOTE)
    }
    start_ms, params = group.start_time_ms, group.params
    recording.tree.resume_group(key, start_ms, tags, params, is_elsewhere=is_new)
    return recording
