"""`compare`: reads, compares, writes, prints, logs, and returns the verdict as the exit code."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.cli.compare_options import CompareChoices
from dpsgd_track.cli.context import Context, reading, say_aside
from dpsgd_track.config import Settings, require

if TYPE_CHECKING:
    from dpsgd_track.comparison import GroupComparison, Verdict
    from dpsgd_track.comparison.waivers import Waiver
    from dpsgd_track.record.run import Group
    from dpsgd_track.store.find_group import Found

PASSED, FAILED, USAGE, INCONCLUSIVE = 0, 1, 2, 3
ARTIFACT_FOLDER = "comparison"
_LONGEST_TAG = 5000  # accepted by all of MLflow's stores


def compare(context: Context, wanted: str, after: str | None, choices: CompareChoices) -> int:
    """Compare a group, or all runs of two; returns the exit code.

    Raises:
        ValueError: something cannot be read, or the request cannot be met.
    """
    settings = choices.settings()
    waivers = _waivers(choices)
    _check_export(choices, after)
    try:
        with _no_garbage_collection(), reading(settings):
            group, found = _read(settings, wanted)
            if after is None and _is_profile(group):
                return _show_profile(settings, choices, group, found)
            later = None if after is None else _read(settings, after)
            unequal = _bitwise_code(choices, group, later[0] if later else None)
            comparison = _compare(settings, choices, waivers, group, found, later)
    except OSError as error:
        message = f"results_dir={settings.results_dir!r}: expected a writable folder. {error}"
        return context.complain(message, USAGE)
    code = exit_code(comparison.verdict, choices.fail_on) or unequal
    return _profile_code(comparison.group) if code == PASSED else code


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Suspend garbage collection: a fifth of MLflow's import time, which is half of the total."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _waivers(choices: CompareChoices) -> tuple[Waiver, ...]:
    path = choices.waivers_path()
    if path is None:
        return ()
    from dpsgd_track.comparison.waivers import load_waivers

    return load_waivers(path)


def _check_export(choices: CompareChoices, after: str | None) -> None:
    export = choices.export
    require(export is not None or not choices.force, "force", True, "it with --export")
    if export is None:
        return
    from dpsgd_track.store.golden import check_target

    advice = "Export one group at a time."
    require(after is None, "export", str(export), "one GROUP", advice)
    check_target(export, force=choices.force)


def exit_code(verdict: Verdict, fail_on: str) -> int:
    """0 PASS, 1 DRIFT or BUG, 3 INCONCLUSIVE; with `fail_on` bug a DRIFT is 0."""
    if verdict == "DRIFT" and fail_on == "bug":
        return PASSED
    return {"PASS": PASSED, "INCONCLUSIVE": INCONCLUSIVE}.get(verdict, FAILED)


def _read(settings: Settings, wanted: str) -> tuple[Group, Found | None]:
    """The group, and its location; None for a golden file."""
    from dpsgd_track.store.find_group import read_group_anywhere
    from dpsgd_track.store.golden import is_golden, read_golden

    if is_golden(wanted):
        return read_golden(Path(wanted)), None
    located = read_group_anywhere(settings, wanted, say_aside)
    return located.group, located


def _compare(
    settings: Settings,
    choices: CompareChoices,
    waivers: Sequence[Waiver],
    group: Group,
    found: Found | None,
    after: tuple[Group, Found | None] | None,
) -> GroupComparison:
    from rich.console import Console

    from dpsgd_track.comparison import compare_group, compare_groups
    from dpsgd_track.comparison.profile import profile_of
    from dpsgd_track.comparison.verdict import Verdict
    from dpsgd_track.report.text import console_width, print_profile, print_table, print_verdict
    from dpsgd_track.report.write import folder_name, write_report

    if after is None:
        comparison = compare_group(group, settings.thresholds, waivers)
    else:
        later, found = after
        for each in (group, later):
            _refuse_profile(each)
        comparison = compare_groups(group, later, settings.thresholds, waivers)
    folder = Path(settings.results_dir) / folder_name(comparison.group.name)
    since = _since(found, comparison) if after is None and found is not None else ""
    files = write_report(comparison, folder, not choices.no_png, say_aside, _ci_link(), since)
    console = Console(highlight=False, width=console_width())
    is_pass = comparison.verdict is Verdict.PASS
    if choices.quiet or (is_pass and not choices.verbose):
        print_verdict(comparison, console)
    else:
        print_table(comparison, console)
    if not choices.quiet:
        if profile := profile_of(comparison.group):
            print_profile(profile, "Speed and memory", console)
        _say_where(files, folder)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print((folder / "annotations.txt").read_text(encoding="utf-8"), end="")
    if choices.export is not None:
        _export(group, choices)
    if not choices.no_log and found is not None:
        if after is None:
            _log(found, comparison, files, since)
        else:
            target = f"{ARTIFACT_FOLDER}-{folder_name(group.name)}"
            found.attach([(file, target) for file in files], {})
    return comparison


def _since(found: Found, comparison: GroupComparison) -> str:
    """Sentence on the changes since the newest earlier group launched alike; empty without one."""
    from dpsgd_track.report.history import judged, since
    from dpsgd_track.report.run_list import marks
    from dpsgd_track.store.judged import judged_before
    from dpsgd_track.store.reader import open_client

    if found.spooled is not None:
        # The store does not have it, and may not answer.
        return ""
    run_id = comparison.group.run_id
    before = judged_before(open_client(found.settings.tracking_uri), found.settings, run_id)
    return since(before, judged(comparison, marks(comparison, "")[run_id])) if before else ""


def _ci_link() -> str:
    """Address of the CI run that this process belongs to, with its files; empty outside of one."""
    env = os.environ.get
    if run := env("GITHUB_RUN_ID"):
        return f"{env('GITHUB_SERVER_URL')}/{env('GITHUB_REPOSITORY')}/actions/runs/{run}#artifacts"
    if job := env("CI_JOB_URL"):
        return f"{job}/artifacts/browse"
    return ""


def _export(group: Group, choices: CompareChoices) -> None:
    from dpsgd_track.store.golden import write_golden

    file = choices.export
    assert file is not None
    write_golden(group, file, force=choices.force)
    if not choices.quiet:
        print(f"Golden file: {file} ({file.stat().st_size / 1024:.0f} KiB)")


def _say_where(files: Sequence[Path], folder: Path) -> None:
    print(f"Report: {files[0]} (and {len(files) - 1} more files in {folder})")


def _bitwise_code(choices: CompareChoices, group: Group, later: Group | None) -> int:
    """Print which runs are not their counterparts bit by bit, where --bitwise asks for it.

    Returns:
        0 if none is, 1 if one differs, 3 if one has no counterpart.
    """
    from dpsgd_track.comparison.bitwise import unequal_runs

    if not choices.bitwise:
        return PASSED
    count, unequal = unequal_runs(group, later)
    for each in unequal if not choices.quiet else ():
        print(f"bitwise: {each.sentence}")
    if not unequal and not choices.quiet:
        print(f"bitwise: all {count} runs are equal bit by bit.")
    has_drift = any(not each.is_missing for each in unequal)
    return FAILED if has_drift else INCONCLUSIVE if unequal else PASSED


def _is_profile(group: Group) -> bool:
    """True if a group holds only a profile."""
    return bool(group.timed_runs) and not group.runs


def _refuse_profile(group: Group) -> None:
    allowed = "a group with runs to compare"
    advice = "It is a profile, whose times mean something beside each other alone: give one GROUP."
    require(not _is_profile(group), "group", group.name, allowed, advice)


def _show_profile(
    settings: Settings, choices: CompareChoices, group: Group, found: Found | None
) -> int:
    """Report a group that holds only a profile; returns the exit code."""
    from rich.console import Console

    from dpsgd_track.comparison.profile import profile_of
    from dpsgd_track.report.markdown import profile_note
    from dpsgd_track.report.run_list import profile_marks
    from dpsgd_track.report.text import console_width, print_profile, print_sentence
    from dpsgd_track.report.write import folder_name, write_profile

    if choices.export is not None:
        _refuse_profile(group)
    profile = profile_of(group)
    assert profile is not None
    folder = Path(settings.results_dir) / folder_name(group.name)
    files = write_profile(profile, group, folder, not choices.no_png, say_aside)
    console = Console(highlight=False, width=console_width())
    if choices.quiet:
        print_sentence(profile.sentence, console)
    else:
        print_profile(profile, group.name, console)
        _say_where(files, folder)
    if not choices.no_log and found is not None:
        note = profile_note(profile, group)[:_LONGEST_TAG]
        marks = profile_marks(profile, group.run_id, note)
        found.attach([(file, ARTIFACT_FOLDER) for file in files], marks)
    return _profile_code(group)


def _profile_code(group: Group) -> int:
    """0 where every run of the group's profile ended as it should, or there is none."""
    from dpsgd_track.comparison.profile import profile_of

    profile = profile_of(group)
    return INCONCLUSIVE if profile and profile.incomplete else PASSED


def _log(found: Found, comparison: GroupComparison, files: Sequence[Path], since: str) -> None:
    """Attach the report and the verdict to the group's run, and verdicts to its mode runs."""
    from dpsgd_track.report.markdown import note
    from dpsgd_track.report.run_list import marks

    verdicts = marks(comparison, note(comparison, since)[:_LONGEST_TAG])
    found.attach([(file, ARTIFACT_FOLDER) for file in files], verdicts)
