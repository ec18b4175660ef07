"""`faults`: plants faults, runs, compares, and reports the faults that were detected.

Faulty and healthy modes run as one group, like any other, and are compared as `compare` does.
Exit codes: 0 every detectable fault was detected, except those known to be lost in bfloat16, and
no healthy mode raised an alarm; 1 otherwise, 2 usage error, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.cli.context import Context, reading, say, say_aside
from dpsgd_track.cli.launch import run_asked
from dpsgd_track.cli.options import FaultOptions
from dpsgd_track.config import Settings, require
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED
from dpsgd_track.launcher.choices import ModeChoices
from dpsgd_track.launcher.suites import Asked, split_names
from dpsgd_track.record.plan import Suite

if TYPE_CHECKING:
    from dpsgd_track.mutants.matrix import Matrix
    from dpsgd_track.mutants.mutant import Mutant
    from dpsgd_track.mutants.redaction import Redaction

ARTIFACT_FOLDER = "faults"


def detect(context: Context, options: FaultOptions) -> int:
    """Plant the faults that were chosen; returns the exit code.

    Raises:
        ValueError: a choice does not fit; nothing was started.
    """
    from dpsgd_track.mutants import choice

    settings = options.kept.settings()
    mutants = choice.chosen_mutants(split_names(options.what.fault))
    modes = split_names(options.what.mode)
    choice.check_modes(modes)
    theirs = [mode for mode in modes if not choice.is_ours(mode)]
    require(len(theirs) <= 1, "mode", ",".join(theirs), "one mode of yours at a time")
    if options.what.list:
        return _list(mutants)
    redactions: tuple[Redaction, ...] = ()
    if theirs and not options.dry.dry_run:
        # Faults planted in a mode that is itself wrong would prove nothing.
        code, found = _unreported(context, options, theirs[0])
        if found is None:
            return code
        redactions = found
    planted: list[str] = [] if modes else list(choice.planted_in_turn(mutants))
    for mode in modes:
        planted += choice.planted_in(mode, mutants, redactions)
    code, group = _run(context, options, planted, options.kept.group)
    if not _is_whole(code, group):
        return code
    return tell_matrix(context, settings, context.command, group, options.kept.output)


def _list(mutants: Sequence[Mutant]) -> int:
    from rich.console import Console
    from rich.table import Table

    from dpsgd_track.report.text import console_width

    table = Table()
    for heading in ("fault", "class", "what goes wrong", "source"):
        # A name is copied to --fault, whole.
        table.add_column(heading, overflow="fold", no_wrap=heading == "fault")
    for mutant in mutants:
        table.add_row(mutant.name, mutant.kind, mutant.title, mutant.source)
    Console(highlight=False, width=console_width()).print(table)
    return EXIT_FINISHED


def _run(
    context: Context, options: FaultOptions, modes: Sequence[str], group: str | None
) -> tuple[int, str]:
    """Run `modes` on the probe as one group; returns the exit code and the group's name."""
    asked = Asked(
        suite=Suite.FAULTS,
        what=ModeChoices(mode=tuple(dict.fromkeys(modes))),
        draws=options.draws,
        machine=options.machine,
        kept=replace(options.kept, group=group),
    )
    return run_asked(context, asked, is_dry=options.dry.dry_run)


def _is_whole(code: int, group: str) -> bool:
    """True if a group ran to its end; modes that failed are compared as well."""
    return bool(group) and code in (EXIT_FINISHED, EXIT_FAILED)


def _unreported(
    context: Context, options: FaultOptions, mode: str
) -> tuple[int, tuple[Redaction, ...] | None]:
    """The fields that the user's mode does not report, as a healthy run of it shows.

    Returns:
        The exit code, and None if the mode is unfit to plant faults in.
    """
    from dpsgd_track.comparison import compare_group
    from dpsgd_track.comparison.verdict import Verdict
    from dpsgd_track.modes.table import BASELINE
    from dpsgd_track.mutants import choice
    from dpsgd_track.store.find_group import read_group_anywhere

    settings, chosen = options.kept.settings(), options.kept.group
    code, name = _run(context, options, (BASELINE, mode), f"{chosen}-healthy" if chosen else None)
    if not _is_whole(code, name):
        return code, None
    with reading(settings):
        group = read_group_anywhere(settings, name, say_aside).group
    comparison = compare_group(group, settings.thresholds)
    redactions = choice.redactions_of(mode, group.runs)
    (verdict,) = (each for each in comparison.modes if each.label == mode)
    if verdict.verdict in (Verdict.BUG, Verdict.DRIFT) or redactions is None:
        print(f"{verdict.sentence} It needs to be sound before faults are planted in it.")
        return EXIT_FAILED, None
    return EXIT_FINISHED, redactions


def tell_matrix(
    context: Context, settings: Settings, command: str, group: str, output: Path | None
) -> int:
    """Print the matrix of `group`, write it, and attach it to the group's run.

    Args:
        command: the command line that launched the group.
        output: Markdown file to write it to as well.

    Returns:
        The exit code.
    """
    from rich.console import Console

    from dpsgd_track.mutants import matrix_text as text
    from dpsgd_track.mutants.coverage import print_coverage
    from dpsgd_track.mutants.matrix import matrix_of
    from dpsgd_track.mutants.matrix_json import matrix_json
    from dpsgd_track.report.text import console_width
    from dpsgd_track.store.find_group import read_group_anywhere

    with reading(settings):
        located = read_group_anywhere(settings, group, say_aside)
    matrix = matrix_of(located.group, settings.thresholds)
    if context.is_quiet:
        say(text.outcome(matrix))
    else:
        console = Console(highlight=False, width=console_width())
        text.print_matrix(matrix, console)
        print_coverage(matrix, console)
    folder = Path(settings.results_dir) / matrix.group
    page = text.markdown(matrix, command)
    files = {"faults.md": page, "faults.json": matrix_json(matrix)}
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    located.attach([(folder / name, ARTIFACT_FOLDER) for name in files], {})
    if output is not None:
        output.write_text(page, encoding="utf-8")
    context.say(f"Matrix: {folder / 'faults.md'}")
    return _exit_code(matrix)


def _exit_code(matrix: Matrix) -> int:
    return EXIT_FAILED if matrix.unexplained or matrix.false_alarms else EXIT_FINISHED
