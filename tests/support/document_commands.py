"""Runs the lines of a page's blocks, in a folder with made-up groups and the files that pages name.

Launches make their plan (`--dry-run`), from the page's own mode; what reads a group, a layer or a
model runs as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

import opacus
import pytest

from dpsgd_track.cli.main import main
from dpsgd_track.config import VariantConfig
from dpsgd_track.demands import Demand
from dpsgd_track.launcher import choices, entrants
from dpsgd_track.launcher.declarations import declined_demands
from dpsgd_track.modes.table import split_planted
from dpsgd_track.record.plan import Suite
from tests.support import ROOT
from tests.support.spooled_group import spool_a_group
from tests.support.synthetic_group import Store, healthy_runs

LAYERS = """\
from torch import nn


def make_block():
    return nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 3))
"""
_LAUNCHES = {str(suite) for suite in Suite}


def _git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=T", "-c", "user.email=t@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def _repository(folder: Path, *tags: str) -> None:
    _git(folder, "init", "-q", "-b", "main")
    _git(folder, "add", ".")
    _git(folder, "commit", "-qm", "All")
    for tag in tags:
        _git(folder, "tag", tag)


def _opacus(folder: Path) -> Path:
    """A checkout of Opacus with what tells its version and its modes."""
    package = folder / "opacus"
    installed = Path(opacus.__file__).parent
    for name in ("__init__.py", "version.py", "grad_sample/__init__.py", "grad_sample/utils.py"):
        target = package / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((installed / name).read_bytes())
    return folder


def furnish(folder: Path, mode: str, waivers: str) -> Path:
    """Fill `folder` with groups, files and neighbours; returns the folder to work in.

    Args:
        mode: source of the modules my_mode and my_package.mode.
        waivers: text of waivers.yaml.
    """
    here = folder / "here"
    here.mkdir()
    (here / "my_package").mkdir()
    (here / "my_package/__init__.py").touch()
    for name in ("my_mode.py", "my_package/mode.py"):
        (here / name).write_text(mode, encoding="utf-8")
    (here / "waivers.yaml").write_text(waivers, encoding="utf-8")
    (here / "my_layers.py").write_text(LAYERS, encoding="utf-8")
    (here / "mine.csv").write_text("text,label\nyes,1\nno,0\n", encoding="utf-8")
    _repository(here)
    for name in ("opacus-branch", "fork"):
        _opacus(folder / name)
    _repository(_opacus(folder / "opacus"), "v1.5.3")
    store = Store(here)
    for name in ("june", "july", "now"):
        store.add_group(healthy_runs(), name=name)
    spool_a_group(here / "spool", "offline", steps=2)
    return here


@cache
def _declined(mode: str) -> tuple[Demand, ...]:
    return declined_demands((mode,))[mode]


def _declined_once(
    modes: Sequence[str], _variant: VariantConfig | None = None
) -> dict[str, tuple[Demand, ...]]:
    """As each mode declares without a fault: a process that reads its attributes takes seconds."""
    return {mode: _declined(split_planted(mode)[0]) for mode in modes}


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Work in `folder` as on a machine without a GPU, with a terminal of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(choices, "count_gpus", lambda: 0)
        patch.setattr(entrants, "declined_demands", _declined_once)
        patch.delenv("PYTHONPATH", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        patch.setenv("COLUMNS", "80")
        patch.setenv("NO_COLOR", "1")
        yield patch


def arguments_of(line: str) -> list[str]:
    """Verb and options of a line that calls the program, as it is run here."""
    verb, *options = shlex.split(line)[1:]
    options = ["june" if option == "GROUP" else option for option in options]
    if verb in _LAUNCHES and "--list" not in options:
        return [verb, *options, "--dry-run"]
    return [verb, *options, "--no-png"] if verb == "compare" else [verb, *options]


def _program(line: str, _folder: Path) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments_of(line), check_inputs=lambda model, data: None)
    return "" if code == 0 else f"ended with {code}: {err.getvalue() or out.getvalue()}"


def _make(line: str, _folder: Path) -> str:
    done = subprocess.run(
        ["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    return done.stderr


def _benchmark(line: str, _folder: Path) -> str:
    _, script, *options = shlex.split(line)
    parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).parser()
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            parser.parse_args(options)
    except SystemExit:
        return err.getvalue()
    return ""


def _example(line: str, _folder: Path) -> str:
    _, script, *options = shlex.split(line)
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            importlib.import_module("tracked").parser().parse_args(options)
    except SystemExit:
        return err.getvalue()
    return "" if (ROOT / script).is_file() else "is no file"


def _export(line: str, _folder: Path) -> str:
    variables = importlib.import_module("mlflow.environment_variables")
    names = [pair.partition("=")[0] for pair in line.split()[1:]]
    return ", ".join(name for name in names if not hasattr(variables, name))


def _mlflow(line: str, _folder: Path) -> str:
    with warnings.catch_warnings(action="ignore"):
        cli = importlib.import_module("mlflow.cli").cli
    _, verb, *options = shlex.split(line)
    try:
        cli.commands[verb].make_context(verb, options)
    except Exception as error:
        return repr(error)
    return ""


def _search(line: str, folder: Path) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("dpsgd-track")
    assert experiment is not None
    try:
        client.search_runs([experiment.experiment_id], filter_string=line)
    except Exception as error:
        return str(error)
    return ""


HANDLERS: dict[str, Callable[[str, Path], str]] = {
    r"dpsgd-track ": _program,
    r"make ": _make,
    r"python benchmarks/": _benchmark,
    r"python examples/": _example,
    r"export MLFLOW_": _export,
    r"mlflow server ": _mlflow,
    r"tags\.": _search,
}
"""By the beginning of a line: its runner, or its parser where it is no command of this program.
Each returns the error, or nothing."""


def run(line: str, folder: Path) -> str:
    """Error of a line of a block; empty if it runs."""
    for pattern, handler in HANDLERS.items():
        if re.match(pattern, line):
            sys.modules.pop("my_mode", None)
            with mock.patch.object(sys, "argv", ["dpsgd-track"]):
                return handler(line, folder)
    return "is neither run nor among those that are left out"
