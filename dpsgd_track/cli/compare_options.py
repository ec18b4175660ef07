"""Command line of `compare.py`. Imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpsgd_track.config import Settings, load_settings
from dpsgd_track.store.sqlite_file import sqlite_path

DEFAULT_CONFIG = Path("mlflow.yaml")
WAIVERS = "waivers.yaml"
"""Read where it is beside the settings file."""

_EXIT_CODES = """\
exit codes: 0 PASS; 1 DRIFT or BUG; 2 usage, or nothing found; 3 INCONCLUSIVE
(a missing, failed or unlike run never passes)"""


def parser() -> argparse.ArgumentParser:
    """The parser, with every option documented."""
    made = argparse.ArgumentParser(
        prog="compare.py",
        description="Compare the modes of a run group, or all runs of two groups, and write a "
        "report.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "group",
        metavar="GROUP",
        help="a group's name, a run id, latest, or a golden file (.dpsgd), which needs no server",
    )
    made.add_argument(
        "after",
        metavar="GROUP_B",
        nargs="?",
        help="hold each run of this group against the same run of the first (default: compare the "
        "modes of the first with each other)",
    )
    made.add_argument(
        "--config", type=Path, help=f"settings file (default: {DEFAULT_CONFIG} if it exists)"
    )
    made.add_argument("--tracking-uri", help="where runs are tracked")
    made.add_argument(
        "--spool",
        metavar="DIR",
        help="folder of records that the store may not have yet (default: spool_dir of the "
        "settings file)",
    )
    made.add_argument("--results-dir", help="folder to write GROUP/ into")
    for name, meaning in (
        ("loss", "largest acceptable absolute difference of a loss"),
        ("grad-norm", "largest acceptable relative difference of a gradient norm"),
        ("bug", "relative difference above which drift is called a bug"),
    ):
        made.add_argument(f"--{name}-threshold", type=float, metavar="X", help=meaning)
    made.add_argument(
        "--fail-on",
        choices=("drift", "bug"),
        default="drift",
        help="the least verdict that fails; bug lets DRIFT pass (default: drift)",
    )
    made.add_argument(
        "--waivers",
        type=Path,
        metavar="FILE",
        help="YAML list of drifts that are accepted until a day "
        f"(default: {WAIVERS} beside the settings file, if it exists)",
    )
    made.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="also write the group to FILE, a golden file that ends in .dpsgd",
    )
    made.add_argument(
        "--force", action="store_true", help="let --export replace a file that is there"
    )
    made.add_argument("--no-png", action="store_true", help="leave out the PNG charts")
    made.add_argument("--no-log", action="store_true", help="leave the tracking server as it is")
    return made


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Settings from the file, with what the command line says on top.

    Raises:
        ValueError: a setting is not acceptable.
    """
    config = arguments.config
    if config is None and DEFAULT_CONFIG.is_file():
        config = DEFAULT_CONFIG
    settings = load_settings(config)
    given = {
        name: value
        for name in ("loss", "grad_norm", "bug")
        if (value := getattr(arguments, f"{name}_threshold")) is not None
    }
    places = {
        name: value
        for name in ("tracking_uri", "results_dir")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.spool is not None:
        places["spool_dir"] = arguments.spool
    settings = replace(settings, thresholds=replace(settings.thresholds, **given), **places)
    # Raises where it names no file.
    sqlite_path(settings.tracking_uri)
    return settings


def waivers_path(arguments: argparse.Namespace) -> Path | None:
    """The waivers file to read, if any."""
    if arguments.waivers is not None:
        return Path(arguments.waivers)
    beside = (arguments.config or DEFAULT_CONFIG).with_name(WAIVERS)
    return beside if beside.exists() else None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with 2 and one line of usage where they are wrong."""
    return parser().parse_args(argv)
