"""What `compare.py` does: read, compare, write, print, log, and tell the verdict by exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.cli.compare_options import parse, settings_of, waivers_path
from dpsgd_track.config import Settings, redact_uri, require

if TYPE_CHECKING:
    from dpsgd_track.comparison import GroupComparison, Verdict
    from dpsgd_track.comparison.waivers import Waiver
    from dpsgd_track.record.run import Group
    from dpsgd_track.store.find_group import Found

PASSED, FAILED, USAGE, INCONCLUSIVE = 0, 1, 2, 3
ARTIFACT_FOLDER = "comparison"
_LONGEST_TAG = 5000  # what MLflow's stores accept at least


def main(argv: Sequence[str] | None = None) -> int:
    """Run `compare.py` and return its exit code."""
    arguments = parse(argv)
    try:
        settings = settings_of(arguments)
        waivers = _waivers(arguments)
        _check_export(arguments)
    except ValueError as error:
        return _refuse(str(error))
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    from dpsgd_track.store.client import one_line
    from dpsgd_track.store.reader import GroupNotFound

    try:
        group, found = _read(settings, arguments.group)
        if arguments.after is None and group.timed_runs and not group.runs:
            return _show_profile(settings, arguments, group, found)
        comparison = _compare(settings, arguments, waivers, group, found)
    except (GroupNotFound, _Refused) as error:
        return _refuse(str(error))
    except (MlflowException, SQLAlchemyError, RequestException) as error:
        where = redact_uri(settings.tracking_uri)
        why = one_line(error)
        return _refuse(f"tracking_uri={where!r}: expected a tracking server that answers. {why}")
    except OSError as error:
        return _refuse(f"results_dir={settings.results_dir!r}: expected a writable folder. {error}")
    code = exit_code(comparison.verdict, arguments.fail_on)
    return _profile_code(comparison.group) if code == PASSED else code


class _Refused(Exception):
    """What was asked for cannot be done; the message says why."""


def _waivers(arguments: argparse.Namespace) -> tuple[Waiver, ...]:
    path = waivers_path(arguments)
    if path is None:
        return ()
    from dpsgd_track.comparison.waivers import load_waivers

    return load_waivers(path)


def _check_export(arguments: argparse.Namespace) -> None:
    export = arguments.export
    require(export is not None or not arguments.force, "force", True, "it with --export")
    if export is None:
        return
    from dpsgd_track.store.golden import check_target

    advice = "Export one group at a time."
    require(arguments.after is None, "export", str(export), "one GROUP", advice)
    check_target(export, force=arguments.force)


def _refuse(message: str) -> int:
    print(f"compare.py: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE


def exit_code(verdict: Verdict, fail_on: str) -> int:
    """0 PASS, 1 DRIFT or BUG, 3 INCONCLUSIVE; with `fail_on` bug a DRIFT is 0."""
    if verdict == "DRIFT" and fail_on == "bug":
        return PASSED
    return {"PASS": PASSED, "INCONCLUSIVE": INCONCLUSIVE}.get(verdict, FAILED)


def _read(settings: Settings, wanted: str) -> tuple[Group, Found | None]:
    """The group, and where it was read; None for a golden file."""
    from dpsgd_track.store.find_group import read_group_anywhere
    from dpsgd_track.store.golden import is_golden, read_golden

    if is_golden(wanted):
        return read_golden(Path(wanted)), None
    found = read_group_anywhere(settings, wanted, lambda line: print(line, file=sys.stderr))
    return found.group, found


def _export(group: Group, arguments: argparse.Namespace) -> None:
    from dpsgd_track.store.golden import write_golden

    try:
        write_golden(group, arguments.export, force=arguments.force)
    except ValueError as error:
        raise _Refused(str(error)) from error
    print(f"Golden file: {arguments.export} ({arguments.export.stat().st_size / 1024:.0f} KiB)")


def _compare(
    settings: Settings,
    arguments: argparse.Namespace,
    waivers: Sequence[Waiver],
    group: Group,
    found: Found | None,
) -> GroupComparison:
    from rich.console import Console

    from dpsgd_track.comparison import compare_group, compare_groups
    from dpsgd_track.comparison.profile import profile_of
    from dpsgd_track.report.text import console_width, print_profile, print_table
    from dpsgd_track.report.write import folder_name, write_report

    if arguments.after is None:
        comparison = compare_group(group, settings.thresholds, waivers)
    else:
        after, found = _read(settings, arguments.after)
        for each in (group, after):
            _refuse_profile(each)
        comparison = compare_groups(group, after, settings.thresholds, waivers)
    folder = Path(settings.results_dir) / folder_name(comparison.group.name)
    png, tell = not arguments.no_png, lambda line: print(line, file=sys.stderr)
    files = write_report(comparison, folder, png, tell)
    console = Console(highlight=False, width=console_width())
    print_table(comparison, console)
    if profile := profile_of(comparison.group):
        print_profile(profile, "Speed and memory", console)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print((folder / "annotations.txt").read_text(encoding="utf-8"), end="")
    _say_where(files, folder)
    if arguments.export is not None:
        _export(group, arguments)
    if not arguments.no_log and found is not None:
        if arguments.after is None:
            _log(found, comparison, files)
        else:
            target = f"{ARTIFACT_FOLDER}-{folder_name(group.name)}"
            found.attach([(file, target) for file in files], {})
    return comparison


def _say_where(files: Sequence[Path], folder: Path) -> None:
    print(f"Report: {files[0]} (and {len(files) - 1} more files in {folder})")


def _refuse_profile(group: Group) -> None:
    if group.timed_runs and not group.runs:
        raise _Refused(
            f"group={group.name!r}: expected a group with runs to compare. It is a profile, whose "
            "times mean something beside each other alone: give one GROUP."
        )


def _show_profile(
    settings: Settings, arguments: argparse.Namespace, group: Group, found: Found | None
) -> int:
    """Report a group that holds nothing but a profile; returns the exit code."""
    from rich.console import Console

    from dpsgd_track.comparison.profile import profile_of
    from dpsgd_track.record import names
    from dpsgd_track.report.markdown import profile_note
    from dpsgd_track.report.text import console_width, print_profile
    from dpsgd_track.report.write import folder_name, write_profile

    if arguments.export is not None:
        _refuse_profile(group)
    profile = profile_of(group)
    assert profile is not None
    folder = Path(settings.results_dir) / folder_name(group.name)
    png, tell = not arguments.no_png, lambda line: print(line, file=sys.stderr)
    files = write_profile(profile, group, folder, png, tell)
    print_profile(profile, group.name, Console(highlight=False, width=console_width()))
    _say_where(files, folder)
    if not arguments.no_log and found is not None:
        said = {names.NOTE: profile_note(profile, group)[:_LONGEST_TAG]}
        found.attach([(file, ARTIFACT_FOLDER) for file in files], said)
    return _profile_code(group)


def _profile_code(group: Group) -> int:
    """0 where every run of the group's profile ended as it should, or there is none."""
    from dpsgd_track.comparison.profile import profile_of

    profile = profile_of(group)
    return INCONCLUSIVE if profile and profile.incomplete else PASSED


def _log(found: Found, comparison: GroupComparison, files: Sequence[Path]) -> None:
    """The report of a group on its own, with its verdict; of two it is uploaded alone."""
    from dpsgd_track.record import names
    from dpsgd_track.report.markdown import note

    verdict = comparison.verdict.value
    tags = {names.NOTE: note(comparison)[:_LONGEST_TAG], names.VERDICT: verdict}
    found.attach([(file, ARTIFACT_FOLDER) for file in files], tags)
