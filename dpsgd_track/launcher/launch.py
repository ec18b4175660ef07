"""Launch a plan, or the missing runs of a group, on one machine or several."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED, EXIT_USAGE
from dpsgd_track.launcher.group import GroupRun
from dpsgd_track.launcher.placement import Placement
from dpsgd_track.launcher.process_group import Launch
from dpsgd_track.launcher.progress import open_display
from dpsgd_track.launcher.recording import Recording, check_folders, open_group, open_part
from dpsgd_track.launcher.resume import find_missing, reopen_group
from dpsgd_track.launcher.several_machines.follow import follow
from dpsgd_track.launcher.several_machines.meeting import Follower, Leader, hello_of
from dpsgd_track.record.plan import GroupPlan
from dpsgd_track.store.client import TrackingError
from dpsgd_track.store.opening import StoreError, open_store

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Launched:
    """Outcome of a launch."""

    code: int
    """Exit code, one of EXIT_*."""
    group: str = ""
    """Name of the group; empty if nothing was started."""
    sentence: str = ""
    """Sentence on a group in which nothing was missing; else empty."""
    problem: str = ""
    """Reason for an early end, in a sentence; empty without one."""
    left_behind: str = ""
    """Reason that some records are on this machine alone; empty if the store has all."""
    spool: Path | None = None
    """Folder of the records left behind."""


def run_plan(
    plan: GroupPlan,
    place: Placement,
    launch: Launch | None = None,
    say: Say = print,
    *,
    is_quiet: bool = False,
) -> Launched:
    """Run `plan` as a new group.

    Args:
        is_quiet: print nothing of the modes but their outcome.

    Raises:
        ValueError: something cannot be used, or a machine would run something else; nothing was
            started.
    """
    launch = launch or Launch()
    if not place.nodes.leads:
        return _follow(plan, place, launch, say)
    leader = _lead(plan, place, launch, say)
    with _refusing(leader):
        recording = open_group(plan.suite, place)
    return _run(plan, place, recording, launch, leader, {}, is_quiet=is_quiet)


def resume(
    group: str,
    place: Placement,
    check: Callable[[GroupPlan], object],
    launch: Launch | None = None,
    say: Say = print,
    *,
    is_quiet: bool = False,
) -> Launched:
    """Run the missing runs of `group`.

    Args:
        check: raises ValueError if this machine cannot run a plan.
        is_quiet: print nothing of the modes but their outcome.

    Raises:
        ValueError: there is no such group, or it cannot be resumed here; nothing was started.
    """
    launch = launch or Launch()
    if not place.nodes.leads:
        return _follow(None, place, launch, say)
    leader = _lead(None, place, launch, say)
    with _refusing(leader):
        missing = find_missing(place.settings, group, place.nodes)
        if missing.jobs:
            check(missing.plan)
            recording = reopen_group(missing, place.settings, is_offline=place.is_offline)
    name = missing.group.name
    if not missing.jobs:
        sentence = f"group {name}: nothing is missing"
        if leader is not None:
            leader.welcome(name)
            leader.close(EXIT_FINISHED, sentence)
        return Launched(code=EXIT_FINISHED, group=name, sentence=sentence)
    for line in missing.changes:
        say(f"not as it was: {line}")
    bounds = missing.clip_bounds
    return _run(missing.plan, place, recording, launch, leader, bounds, is_quiet=is_quiet)


@contextlib.contextmanager
def _refusing(leader: Leader | None) -> Iterator[None]:
    """Tell the other machines of a ValueError that prevents the start."""
    try:
        yield
    except ValueError as error:
        if leader is not None:
            leader.refuse(str(error))
        raise


def _run(
    plan: GroupPlan,
    place: Placement,
    recording: Recording,
    launch: Launch,
    leader: Leader | None,
    clip_bounds: Mapping[str, tuple[float, ...]],
    *,
    is_quiet: bool,
) -> Launched:
    display, problem = open_display(is_quiet=is_quiet), ""
    try:
        run = GroupRun(plan, recording, launch, display, leader, output=place.output)
        run.know_clip_bounds(clip_bounds)
        code = run.run()
    except StoreError as error:
        code, problem = EXIT_USAGE, str(error)
    except TrackingError as error:
        code, problem = EXIT_FAILED, str(error)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code, problem = EXIT_FAILED, str(error)
    finally:
        display.close()
    return Launched(
        code=code,
        group="" if code == EXIT_USAGE else recording.group,
        problem=problem,
        left_behind=recording.left_behind,
        spool=recording.spool,
    )


def _lead(plan: GroupPlan | None, place: Placement, launch: Launch, say: Say) -> Leader | None:
    """Wait for the other machines' launchers; None if there are none.

    Raises:
        ValueError: one does not come, or would run something else.
    """
    if place.nodes.num_nodes == 1:
        return None
    leader = Leader(place.nodes, lost_after_s=launch.lost_after_s)
    leader.gather(plan, place.rendezvous_timeout_s, say)
    return leader


def _follow(plan: GroupPlan | None, place: Placement, launch: Launch, say: Say) -> Launched:
    """Take part in the group that node 0 leads.

    Raises:
        ValueError: nothing starts.
    """
    settings, nodes, hello = place.settings, place.nodes, hello_of(plan)
    try:
        check_folders(settings)
        if not place.is_offline:
            open_store(settings)
    except ValueError as error:
        hello = replace(hello, problem=str(error))
    problem = ""
    with contextlib.closing(Follower(nodes, lost_after_s=launch.lost_after_s)) as follower:
        group = follower.join(hello, place.rendezvous_timeout_s, say)
        recording = open_part(settings, group, nodes.node_rank, is_offline=place.is_offline)
        try:
            code = follow(follower, recording, launch, say)
        except TrackingError as error:
            code, problem = EXIT_FAILED, str(error)
    return Launched(
        code=code,
        group=group,
        problem=problem,
        left_behind=recording.left_behind,
        spool=recording.spool,
    )
