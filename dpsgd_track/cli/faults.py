"""What `launch.py faults` does: plant, run, compare, and tell what was found.

Faulty and healthy modes run as one group, like any other, and are compared as `compare.py` does.
Exit codes: 0 every fault that can show was found, but for those known to be lost in bfloat16, and
no healthy mode raised an alarm; 1 otherwise, 2 usage error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.cli.launch import RunSuite, complain
from dpsgd_track.cli.options import planted_suite
from dpsgd_track.config import Settings, require
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED, EXIT_USAGE

if TYPE_CHECKING:
    from dpsgd_track.mutants import Fault
    from dpsgd_track.mutants.matrix import Matrix
    from dpsgd_track.store.find_group import Found

ARTIFACT_FOLDER = "faults"
_LOG_WIDTH = 160


def detect(args: argparse.Namespace, command: str, run: RunSuite) -> int:
    """Run `launch.py faults`; returns the exit code.

    Args:
        command: the command line, to be written beside what it found.
        run: runs a suite as a group.
    """
    from dpsgd_track.launcher.suites import read_settings, split_names
    from dpsgd_track.mutants import choice as plan

    try:
        settings = read_settings(args)
        faults = plan.chosen_faults(split_names(args.fault))
        modes = split_names(args.mode)
        plan.check_modes(modes)
        theirs = [mode for mode in modes if not plan.is_ours(mode)]
        require(len(theirs) <= 1, "mode", ",".join(theirs), "one mode of yours at a time")
        _check_output(args.output)
    except ValueError as error:
        return complain(error, EXIT_USAGE)
    if args.list:
        return _list(faults)
    code, mutes = _listen(args, settings, run, theirs[0]) if theirs else (EXIT_FINISHED, ())
    if mutes is None:
        return code
    planned: list[str] = [] if modes else list(plan.planted_in_turn(faults))
    for mode in modes:
        planned += plan.planted_in(mode, faults, mutes)
    code, found = _run(args, settings, run, planned, args.group)
    return code if found is None else _tell(args.output, settings, command, found)


def _check_output(output: Path | None) -> None:
    if output is not None:
        is_writable = not output.is_dir() and output.absolute().parent.is_dir()
        require(is_writable, "output", str(output), "a file in an existing folder")


def _list(faults: Sequence[Fault]) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("fault", "class", "what goes wrong", "source"):
        table.add_column(heading, overflow="fold")
    for fault in faults:
        table.add_row(fault.name, fault.kind, fault.title, fault.source)
    Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH).print(table)
    return EXIT_FINISHED


def _run(
    args: argparse.Namespace,
    settings: Settings,
    run: RunSuite,
    modes: Sequence[str],
    name: str | None,
) -> tuple[int, Found | None]:
    """Run `modes` on the probe as one group.

    Returns:
        The exit code, and the group where it ran to its end.
    """
    suite = planted_suite(args, modes)
    suite.group = name
    code, group = run(suite)
    # A mode that failed is part of what is compared.
    if not group or code not in (EXIT_FINISHED, EXIT_FAILED):
        return code, None
    from dpsgd_track.store.find_group import read_group_anywhere

    found = read_group_anywhere(settings, group, lambda line: print(line, file=sys.stderr))
    return EXIT_FINISHED, found


def _listen(
    args: argparse.Namespace, settings: Settings, run: RunSuite, mode: str
) -> tuple[int, tuple[str, ...] | None]:
    """What someone else's mode does not tell.

    Faults planted in a mode that is wrong by itself would prove nothing.

    Returns:
        The exit code, and nothing where the mode is no place to plant a fault in.
    """
    from dpsgd_track.comparison import compare_group
    from dpsgd_track.comparison.verdict import Verdict
    from dpsgd_track.modes.table import BASELINE
    from dpsgd_track.mutants import choice as plan

    name = f"{args.group}-healthy" if args.group else None
    code, found = _run(args, settings, run, (BASELINE, mode), name)
    if found is None:
        return code, None
    comparison = compare_group(found.group, settings.thresholds)
    mutes = plan.mutes_of(mode, found.group.runs)
    (verdict,) = (each for each in comparison.modes if each.label == mode)
    if verdict.verdict in (Verdict.BUG, Verdict.DRIFT) or mutes is None:
        print(f"{verdict.sentence} It needs to be sound before faults are planted in it.")
        return EXIT_FAILED, None
    return EXIT_FINISHED, mutes


def _tell(output: Path | None, settings: Settings, command: str, found: Found) -> int:
    """Print the matrix, write it, and put it on the group's run."""
    from rich.console import Console

    from dpsgd_track.mutants import matrix_text as text
    from dpsgd_track.mutants.coverage import print_coverage
    from dpsgd_track.mutants.matrix import matrix_of
    from dpsgd_track.mutants.matrix_json import matrix_json

    matrix = matrix_of(found.group, settings.thresholds)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
    text.print_matrix(matrix, console)
    print_coverage(matrix, console)
    folder = Path(settings.results_dir) / matrix.group
    page = text.markdown(matrix, command)
    files = {"faults.md": page, "faults.json": matrix_json(matrix)}
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    found.attach([(folder / name, ARTIFACT_FOLDER) for name in files], {})
    if output is not None:
        output.write_text(page, encoding="utf-8")
    print(f"Matrix: {folder / 'faults.md'}")
    return _exit_code(matrix)


def _exit_code(matrix: Matrix) -> int:
    return EXIT_FAILED if matrix.unexplained or matrix.false_alarms else EXIT_FINISHED
