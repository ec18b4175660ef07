"""`dpsgd-track sync`: ship the spool, and check that all of it arrived."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dpsgd_track.config import Settings
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED
from dpsgd_track.program import command
from dpsgd_track.redaction import redact_uri
from dpsgd_track.store.client import TrackingError
from dpsgd_track.store.contents import Contents
from dpsgd_track.store.opening import StoreError, open_store, unusable
from dpsgd_track.store.shipper import NotThereYet, Shipper, settle
from dpsgd_track.store.spool import SpoolDamaged
from dpsgd_track.store.spooled import Busy, SpooledGroup, spooled_groups
from dpsgd_track.store.sqlite_file import absolute_uri
from dpsgd_track.visible_text import visible

_SHOWN = 10


def sync(settings: Settings, group: str | None, *, is_quiet: bool = False) -> int:
    """Ship `group`, or all; returns the exit code: 0 if all of it is in the store.

    Args:
        is_quiet: print the outcome of each group alone.

    Raises:
        ValueError: there is no such group in the spool, or the store cannot be used.
    """
    spool = Path(settings.spool_dir)
    groups = [each for each in spooled_groups(spool) if group in (None, each.name)]
    if not groups and group is not None:
        in_spool = ", ".join(each.name for each in spooled_groups(spool)) or "nothing"
        raise ValueError(
            f"group={group!r}: expected a group in the spool {str(spool)!r}, which holds "
            f"{in_spool}. What was shipped and checked is no longer there."
        )
    if not groups:
        _say(f"{spool}: nothing to ship")
        return EXIT_FINISHED
    # One after the other even if one fails: each is independent.
    codes = []
    for each in groups:
        try:
            codes.append(_sync_one(settings, each, is_quiet=is_quiet))
        except FileNotFoundError:
            if each.folder.exists():
                raise
            _say(f"{each.label}: its launcher shipped it meanwhile")
        except (StoreError, SpoolDamaged, TrackingError, OSError) as error:
            if len(groups) == 1 and not isinstance(error, SpoolDamaged):
                raise ValueError(str(error)) from error
            _say(f"{each.label}: NOT shipped. {error}")
            codes.append(EXIT_FAILED)
    return max(codes, default=EXIT_FINISHED)


def _say(line: str) -> None:
    """Print a line, which may quote a spool that others wrote."""
    print(visible(line), flush=True)


def _leave_out(_line: str) -> None:
    """Print nothing."""


def _sync_one(settings: Settings, group: SpooledGroup, *, is_quiet: bool) -> int:
    say_more = _leave_out if is_quiet else _say
    size = sum(group.sizes().values()) / 1024
    say_more(f"{group.label}: {size:,.1f} KiB of records in {group.folder}")
    try:
        lock = group.hold()
    except Busy:
        _say(f"{group.label}: its launcher, or another sync, is at work. Wait for it to end.")
        return EXIT_FAILED
    with lock:
        if closed := group.close_left_open():
            say_more(f"{group.label}: closed {closed} runs, as its launcher died")
        experiment = group.experiment()
        if not experiment:
            _say(f"{group.label}: its launcher died before the first record was whole")
            damage = Contents(group).damage()
            for line in damage:
                _say(f"{group.label}: {line}")
            if damage or any(each.rows or each.files for each in group.runs().values()):
                _say(f"{group.label}: what is in {group.folder} belongs to no run that is known")
                return EXIT_FAILED
            group.remove()
            return EXIT_FINISHED
        # A group belongs to the experiment it was launched in.
        settings = replace(settings, experiment=experiment)
        client, experiment_id = open_store(settings)
        uri = absolute_uri(settings.tracking_uri)
        counted = Contents(group)
        say_more(f"{group.label}: shipping {counted}, then reading them back")
        try:
            problems = settle(Shipper(group, client, uri, experiment_id), count=True)
        except NotThereYet as error:
            problems = [f"{error} Run `{command('sync', [group.name])}` on node 0 first."]
        except Exception as error:
            raise unusable(settings, error) from error
    for line in problems[:_SHOWN]:
        _say(f"{group.label}: {line}")
    if len(problems) > _SHOWN:
        _say(f"{group.label}: and {len(problems) - _SHOWN} more")
    where = redact_uri(settings.tracking_uri)
    if problems:
        _say(f"{group.label}: NOT all of it is at {where}; the spool is kept in {group.folder}")
        return EXIT_FAILED
    _say(f"{group.label}: {counted} are at {where}, each value checked; the spool was removed")
    return EXIT_FINISHED
