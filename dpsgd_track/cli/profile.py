"""What `launch.py profile` says once its runs are over: the table, and the file of figures."""

from __future__ import annotations

import sys
from pathlib import Path

from dpsgd_track.config import Settings


def summarise(settings: Settings, group: str, output: Path | None) -> None:
    """Print the table of the profile `group`, and write its figures to `output` as CSV."""
    from mlflow.exceptions import MlflowException
    from rich.console import Console
    from sqlalchemy.exc import SQLAlchemyError

    from dpsgd_track.comparison.profile import profile_of
    from dpsgd_track.report.profile_table import profile_csv
    from dpsgd_track.report.text import console_width, print_profile
    from dpsgd_track.store.client import one_line
    from dpsgd_track.store.find_group import read_group_anywhere
    from dpsgd_track.store.reader import GroupNotFound

    try:
        found = read_group_anywhere(settings, group, print).group
    except (GroupNotFound, MlflowException, SQLAlchemyError) as error:
        # The runs are over; compare.py can still read them when the store answers again.
        said = one_line(error)
        print(f"launch.py: group {group} could not be read back. {said}", file=sys.stderr)
        return
    profile = profile_of(found)
    assert profile is not None, "a profile has points"
    print_profile(profile, group, Console(highlight=False, width=console_width()))
    if output is None:
        return
    try:
        output.write_text(profile_csv(profile, found), encoding="utf-8")
    except OSError as error:
        print(f"launch.py: output={str(output)!r}: cannot be written. {error}", file=sys.stderr)
    else:
        print(f"figures: {output}")
