"""What launch.py does with its arguments, and what it exits with.

Exit codes: 0 every mode finished, 1 one failed, 2 usage error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.cli.options import PLANTED, PROFILE, RESUMABLE, build_parser, reproducing_command
from dpsgd_track.config import DataConfig, ModelConfig, redact_uri
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_USAGE
from dpsgd_track.modes.table import MODES, plugged_in_modes, split_planted

if TYPE_CHECKING:
    from dpsgd_track.config import JobConfig, NodesConfig, Settings
    from dpsgd_track.launcher.process_group import Launch
    from dpsgd_track.launcher.recording import Recording
    from dpsgd_track.launcher.several_machines.meeting import Leader
    from dpsgd_track.launcher.suites import Suite

RunSuite = Callable[[argparse.Namespace], tuple[int, str]]
"""Runs the suite of parsed arguments; returns the exit code and the group's name."""
Detect = Callable[[argparse.Namespace, str, RunSuite], int]
"""Takes the arguments, the command line that is to be recorded, and how a suite is run."""
Summarise = Callable[["Settings", str, Path | None], object]
"""Takes the settings, a group's name, and the file that its figures are to be written to."""


def check_inputs(model: ModelConfig, data: DataConfig) -> None:
    """Raise ValueError where model and data cannot be built; imports the training half."""
    from dpsgd_track.training import preflight

    preflight.check_inputs(model, data)


def main(
    argv: Sequence[str] | None = None,
    *,
    check_inputs: Callable[[ModelConfig, DataConfig], object] = check_inputs,
    launch: Launch | None = None,
    detect: Detect | None = None,
    summarise: Summarise | None = None,
) -> int:
    """Parse, check, run.

    Args:
        argv: arguments (default: the process's own).
        check_inputs: says whether model and data fit.
        launch: how workers are started.
        detect: what `faults` does. It compares as well as launches, so that it stands above this.
        summarise: what `profile` does with its figures once they are taken; likewise.
    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    try:
        match args.command:
            case "modes":
                return _list_modes()
            case "ui":
                return _open_ui(args)
            case "sync":
                return _sync(args)

        command = reproducing_command(argv)
        launch = launch or _planting_workers()

        if args.command == "resume":
            return _resume(args, check_inputs, launch, detect)

        def run(args: argparse.Namespace) -> tuple[int, str]:
            return _run_suite(args, command, check_inputs, launch, summarise)

        if args.command == PLANTED:
            assert detect is not None, "an entry point that offers faults says how"
            return detect(args, command, run)
        return run(args)[0]
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run_suite(
    args: argparse.Namespace,
    command: str,
    check_inputs: Callable[[ModelConfig, DataConfig], object],
    launch: Launch,
    summarise: Summarise | None,
) -> tuple[int, str]:
    """Run a suite as a group; returns the exit code, and the group's name where there is one."""
    from dpsgd_track.launcher.recording import open_group
    from dpsgd_track.launcher.suites import build_suite

    if args.token:
        # Workers and the hub's client inherit it; it goes nowhere else.
        os.environ["HF_TOKEN"] = args.token
    leader = None
    try:
        suite = build_suite(args, check_inputs)
        _check_planted(suite.jobs)
        if not suite.nodes.leads:
            return _follow(args, suite.settings, suite.nodes, suite.jobs, launch), ""
        leader = _lead(suite.nodes, suite.jobs, args, launch)
        recording = open_group(suite)
    except ValueError as error:
        if leader is not None:
            leader.refuse(str(error))
        return complain(error, EXIT_USAGE), ""

    def say_figures() -> None:
        if args.command == PROFILE:
            assert summarise is not None, "an entry point that offers profiles says how"
            summarise(suite.settings, recording.group, suite.output)

    code = _run_group(args, suite, recording, command, launch, {}, say_figures, leader)
    return code, "" if code == EXIT_USAGE else recording.group


def _resume(
    args: argparse.Namespace,
    check_inputs: Callable[[ModelConfig, DataConfig], object],
    launch: Launch,
    detect: Detect | None,
) -> int:
    from dpsgd_track.launcher.resume import find_missing, reopen_group
    from dpsgd_track.launcher.suites import read_nodes, read_settings

    leader, code = None, EXIT_FINISHED
    try:
        nodes = read_nodes(args)
        if not nodes.leads:
            return _follow(args, read_settings(args), nodes, None, launch)
        leader = _lead(nodes, None, args, launch)
        missing = find_missing(args, nodes, check_inputs)
        _check_planted(missing.suite.jobs)
        if not missing.suite.jobs:
            said = f"group {args.group}: nothing is missing"
            print(said)
            if leader is not None:
                leader.welcome(missing.group.name)
                leader.close(code, said)
        else:
            recording = reopen_group(missing, is_offline=args.offline)
    except ValueError as error:
        if leader is not None:
            leader.refuse(str(error))
        return complain(error, EXIT_USAGE)
    if missing.suite.jobs:
        for line in missing.changes:
            print(f"not as it was: {line}")
        bounds = missing.clip_bounds
        code = _run_group(args, missing.suite, recording, "", launch, bounds, leader=leader)
    # A mode of the user's own is run healthy first, as a group of its own.
    is_planted = any(split_planted(run.mode)[1] for run in missing.group.runs)
    if not is_planted or code not in (EXIT_FINISHED, EXIT_FAILED):
        return code
    assert detect is not None, "an entry point that offers faults says how"
    # The group is whole, or as whole as it gets: it is compared like one that was just run.
    return detect(missing.args, missing.command, lambda _: (code, missing.group.name))


def _planting_workers() -> Launch:
    """Workers that understand `mode+fault`, as the command line does."""
    from dpsgd_track.launcher.process_group import Launch

    return Launch(worker_module="dpsgd_track.mutants.worker")


def _check_planted(jobs: Sequence[JobConfig]) -> None:
    """Raise ValueError where a job's mode names an unknown fault."""
    planted = [job.mode for job in jobs if split_planted(job.mode)[1]]
    if planted:
        # Imports torch, which nothing else that is checked needs.
        from dpsgd_track.mutants.planting import check_planted

        for mode in planted:
            check_planted(mode)


def _lead(
    nodes: NodesConfig,
    jobs: Sequence[JobConfig] | None,
    args: argparse.Namespace,
    launch: Launch,
) -> Leader | None:
    """Wait for the other machines' launchers; None where there are none.

    Raises:
        ValueError: one does not come, or would run something else.
    """
    if nodes.num_nodes == 1:
        return None
    from dpsgd_track.launcher.several_machines.meeting import Leader

    leader = Leader(nodes, lost_after_s=launch.lost_after_s)
    leader.gather(jobs, args.rdzv_timeout, _say)
    return leader


def _follow(
    args: argparse.Namespace,
    settings: Settings,
    nodes: NodesConfig,
    jobs: Sequence[JobConfig] | None,
    launch: Launch,
) -> int:
    """Take part in the group that node 0 leads.

    Raises:
        ValueError: nothing starts.
    """
    from dpsgd_track.launcher.recording import check_folders, open_part
    from dpsgd_track.launcher.several_machines.follow import follow
    from dpsgd_track.launcher.several_machines.meeting import Follower, hello_of
    from dpsgd_track.launcher.suites import check_shared_store
    from dpsgd_track.store.client import TrackingError
    from dpsgd_track.store.opening import open_store

    check_shared_store(settings, nodes, is_offline=args.offline)
    hello = hello_of(jobs)
    try:
        check_folders(settings)
        if not args.offline:
            open_store(settings)
    except ValueError as error:
        hello["problem"] = str(error)
    follower = Follower(nodes, lost_after_s=launch.lost_after_s)
    with contextlib.closing(follower):
        group = follower.join(hello, args.rdzv_timeout, _say)
        recording = open_part(settings, group, nodes.node_rank, is_offline=args.offline)
        try:
            code = follow(follower, recording, launch, _say)
        except TrackingError as error:
            code = complain(error, EXIT_FAILED)
    _say_left_behind(args, recording)
    return code


def _say(line: str) -> None:
    print(line, flush=True)


def _run_group(
    args: argparse.Namespace,
    suite: Suite,
    recording: Recording,
    command: str,
    launch: Launch,
    clip_bounds: Mapping[str, tuple[float, ...]],
    summarise: Callable[[], object] = lambda: None,
    leader: Leader | None = None,
) -> int:
    from dpsgd_track.launcher.group import GroupRun
    from dpsgd_track.launcher.progress import open_display
    from dpsgd_track.store.client import TrackingError
    from dpsgd_track.store.opening import StoreError

    display = open_display()
    try:
        group_run = GroupRun(suite, recording, launch, display, leader)
        group_run.know_clip_bounds(clip_bounds)
        code = group_run.run(command)
    except StoreError as error:
        return complain(error, EXIT_USAGE)
    except TrackingError as error:
        code = complain(error, EXIT_FAILED)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code = complain(error, EXIT_FAILED)
    finally:
        display.close()
    if code in (EXIT_FINISHED, EXIT_FAILED):
        summarise()
    group, places = recording.group, _place_options(args)
    _say_left_behind(args, recording)
    if code != EXIT_FINISHED and suite.name in RESUMABLE:
        again = ["python", "launch.py", "resume", group, *_node_options(args), *places]
        print(f"resume:  {shlex.join(again)}")
    print(f"compare: {shlex.join(['python', 'compare.py', group, *places])}")
    print(f"browse:  {shlex.join(['python', 'launch.py', 'ui', *_store_options(args)])}")
    return code


def _say_left_behind(args: argparse.Namespace, recording: Recording) -> None:
    if recording.left_behind:
        command = ["python", "launch.py", "sync", recording.group, *_place_options(args)]
        print(f"tracking: {recording.left_behind} It is in {recording.spool}, and safe.")
        print(f"ship:    {shlex.join(command)}")


def _store_options(args: argparse.Namespace) -> list[str]:
    """The options by which another command finds the same store."""
    options = []
    if args.config is not None:
        options += ["--config", str(args.config)]
    if args.tracking_uri is not None:
        options += ["--tracking-uri", redact_uri(args.tracking_uri)]
    return options


def _node_options(args: argparse.Namespace) -> list[str]:
    """The options by which machines meet again; each has a --node-rank of its own."""
    if args.nnodes == 1:
        return []
    endpoint = ["--rdzv-endpoint", args.rdzv_endpoint]
    return ["--nnodes", str(args.nnodes), "--node-rank", str(args.node_rank), *endpoint]


def _place_options(args: argparse.Namespace) -> list[str]:
    """The options by which another command finds the same store and spool."""
    spool = [] if args.spool is None else ["--spool", str(args.spool)]
    return _store_options(args) + spool


def _list_modes() -> int:
    rows = [("mode", "norm rule", "strategy", "sharding", "")]
    rows += [(m.name, m.norm_rule, m.strategy, m.sharding, m.summary) for m in MODES.values()]
    try:
        rows += [(name, "", "", "", factory) for name, factory in plugged_in_modes().items()]
    except ValueError as error:
        return complain(error, EXIT_USAGE)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return EXIT_FINISHED


def _open_ui(args: argparse.Namespace) -> int:
    from dpsgd_track.launcher.suites import read_settings
    from dpsgd_track.launcher.ui import open_ui

    try:
        return open_ui(read_settings(args), args.port)
    except ValueError as error:
        return complain(error, EXIT_USAGE)


def _sync(args: argparse.Namespace) -> int:
    from dpsgd_track.launcher.suites import read_settings
    from dpsgd_track.launcher.sync import sync

    try:
        return sync(read_settings(args), args.group)
    except ValueError as error:
        return complain(error, EXIT_USAGE)


def complain(error: Exception, code: int) -> int:
    """Say in one line what is wrong; returns `code`, to exit with."""
    print(f"launch.py: {' '.join(str(error).split())}", file=sys.stderr)
    return code
