"""Launches of fake workers as processes of their own, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from dpsgd_track.launcher.processes import MARKER
from tests.support import ROOT, warm
from tests.support.synthetic_group import empty_tables


def start(
    folder: Path,
    *argv: str,
    plan: dict | None = None,
    makes_store: bool = False,
    is_fresh: bool = False,
) -> subprocess.Popen[str]:
    """A launch of fake workers in `folder`; `is_fresh` has it and its fork server import."""
    if not makes_store:
        shutil.copy(empty_tables(), folder / "mlflow.db")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_WORKER": json.dumps(plan or {})}
    environment.pop("HF_TOKEN", None)
    command = ("-m", "tests.support.fake_launch", *argv)
    if not is_fresh:
        return warm.start(*command, cwd=folder, environment=environment)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def living(folder: Path) -> list[psutil.Process]:
    """Processes of a launch in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            here = process.cwd() == str(folder) and MARKER in process.environ()
            if here and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_all(launcher: subprocess.Popen[str]) -> None:
    """As a machine that stops: nobody sees anybody else go."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher.pid)
        process.suspend()
        everybody = [*process.children(recursive=True), process]
        for each in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.suspend()
        for each in {*everybody, *process.children(recursive=True)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    launcher.wait()
