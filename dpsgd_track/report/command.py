"""What `compare.py` does: read, compare, write, print, log, and tell the verdict by exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.config import Settings, redact_uri
from dpsgd_track.report.arguments import parse, settings_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from dpsgd_track.comparison import GroupComparison, Verdict

PASSED, FAILED, USAGE, INCONCLUSIVE = 0, 1, 2, 3
_LOG_WIDTH = 160
ARTIFACT_FOLDER = "comparison"
_LONGEST_TAG = 5000  # what MLflow's stores accept at least


def main(argv: Sequence[str] | None = None) -> int:
    """Run `compare.py` and return its exit code."""
    arguments = parse(argv)
    try:
        settings = settings_of(arguments)
    except ValueError as error:
        return _refuse(str(error))
    # MLflow retries for minutes by default, which looks like a hang in front of a terminal.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from dpsgd_track.tracking.client import one_line
    from dpsgd_track.tracking.reader import GroupNotFound

    try:
        comparison = _compare(
            settings, arguments.group, log=not arguments.no_log, png=not arguments.no_png
        )
    except GroupNotFound as error:
        return _refuse(str(error))
    except (MlflowException, SQLAlchemyError) as error:
        where = redact_uri(settings.tracking_uri)
        why = one_line(error, settings.tracking_uri)
        return _refuse(f"tracking_uri={where!r}: expected a tracking server that answers. {why}")
    except OSError as error:
        return _refuse(f"results_dir={settings.results_dir!r}: expected a writable folder. {error}")
    return exit_code(comparison.verdict, arguments.fail_on)


def _refuse(message: str) -> int:
    print(f"compare.py: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE


def exit_code(verdict: Verdict, fail_on: str) -> int:
    """0 PASS, 1 DRIFT or BUG, 3 INCONCLUSIVE; with `fail_on` bug a DRIFT is 0."""
    if verdict == "DRIFT" and fail_on == "bug":
        return PASSED
    return {"PASS": PASSED, "INCONCLUSIVE": INCONCLUSIVE}.get(verdict, FAILED)


def _compare(settings: Settings, wanted: str, *, log: bool, png: bool) -> GroupComparison:
    from rich.console import Console

    from dpsgd_track.comparison import compare_group
    from dpsgd_track.report.text import print_table
    from dpsgd_track.report.write import folder_name, write_report
    from dpsgd_track.tracking.reader import open_client, read_group

    client = open_client(settings.tracking_uri)
    group = read_group(client, settings, wanted)
    comparison = compare_group(group, settings.thresholds)
    folder = Path(settings.results_dir) / folder_name(group.name)
    files = write_report(comparison, folder, png, tell=lambda line: print(line, file=sys.stderr))
    # A log file has no width of its own, and is no reason to leave columns out.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH
    print_table(comparison, Console(highlight=False, width=width))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print((folder / "annotations.txt").read_text(encoding="utf-8"), end="")
    print(f"Report: {files[0]} (and {len(files) - 1} more files in {folder})")
    if log:
        _log(client, comparison, folder, files)
    return comparison


def _log(
    client: MlflowClient, comparison: GroupComparison, folder: Path, files: Sequence[Path]
) -> None:
    from dpsgd_track.report.markdown import note
    from dpsgd_track.tracking import names

    run_id = comparison.group.run_id
    for file in files:  # one by one: the folder may hold what is not ours
        client.log_artifact(run_id, str(file), ARTIFACT_FOLDER)
    client.set_tag(run_id, names.NOTE, note(comparison)[:_LONGEST_TAG])
    client.set_tag(run_id, names.VERDICT, comparison.verdict.value)
