"""Launches on stores that work or do not, in this process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.store.opening import open_store
from tests.support import fake_launch

SECRET = "a-secret-never-to-be-seen"


def launch(uri: str, *options: str) -> int:
    arguments = ("--mode", "no_dp", "--regime", "accuracy", "--tracking-uri", uri)
    return fake_launch.run(["quick", *arguments, *options])


def refuse(capsys: pytest.CaptureFixture[str], uri: str, *options: str) -> str:
    """Launch on a store that cannot be used; what is said."""
    start = time.monotonic()
    assert launch(uri, *options) == 2
    assert time.monotonic() - start < 15
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dpsgd-track quick: ")
    assert said.err.count("\n") == 1
    assert SECRET not in said.err
    for place in ("spool", "results"):
        assert not Path(place).exists() or not list(Path(place).iterdir())
    return said.err


def statuses(uri: str, group: str) -> dict[str, int]:
    client, experiment_id = open_store(Settings(tracking_uri=uri))
    runs = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = '{group}'")
    found = [run.info.status for run in runs]
    return {status: found.count(status) for status in found}
