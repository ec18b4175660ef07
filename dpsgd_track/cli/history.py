"""`history`: the groups of an experiment that were compared, as a table and as a page."""

from __future__ import annotations

from pathlib import Path

from dpsgd_track.cli.context import reading
from dpsgd_track.config import Settings, require

PAGE = "history.html"


def tell_history(settings: Settings, most: int) -> int:
    """Print the table and write the page; returns the exit code.

    Args:
        most: groups to tell, the newest ones.

    Raises:
        ValueError: there is no such group, or the folder cannot be written to.
    """
    from rich.console import Console

    from dpsgd_track.report.html import history_html
    from dpsgd_track.report.text import console_width, print_history
    from dpsgd_track.store.judged import judged_groups
    from dpsgd_track.store.reader import open_client

    require(most >= 1, "last", most, "an integer >= 1")
    with reading(settings):
        groups = judged_groups(open_client(settings.tracking_uri), settings, most)
    print_history(groups, Console(highlight=False, width=console_width()))
    page = Path(settings.results_dir) / PAGE
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(history_html(settings.experiment, groups), encoding="utf-8")
    except OSError as error:
        require(False, "results_dir", settings.results_dir, f"a writable folder. {error}")
    print(f"History: {page}")
    return 0
