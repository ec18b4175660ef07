"""A group with more steps than are shown: nothing that matters is lost on the way."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from benchmarks.compare_scale import ROOT, SPIKED, Shape, mode_metrics, record, write_group
from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.report.thinning import MOST
from dpsgd_track.store.reader import read_group
from tests.support.synthetic_group import Store

SHAPE = Shape(name="small", modes=("no_dp", SPIKED, "flash_fsdp_bk"), num_ranks=2, num_steps=1200)

COMPARE = """
import sys
from dpsgd_track.cli.main import main
code = main(["compare", *sys.argv[1:]])
assert "torch" not in sys.modules, "comparing needs no torch"
sys.exit(code)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("store"))
    write_group(made.folder, SHAPE)
    return made


@pytest.fixture(scope="module")
def found(store: Store) -> Any:
    """drift.json of the group, compared as a user does."""
    options = ["--no-png", "--no-log", "--tracking-uri", store.uri]
    options += ["--results-dir", str(store.folder / "results")]
    command = [sys.executable, "-c", COMPARE, SHAPE.name, *options]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 1, done.stderr
    return json.loads((store.folder / "results" / SHAPE.name / "drift.json").read_text())


def drift(found: Any, mode: str, observable: str) -> Any:
    pairs = found["regimes"][0]["pairs"]
    return next(p for p in pairs if p["mode"] == mode)["drifts"][observable]


def test_every_point_and_run_of_the_group_is_there(store: Store) -> None:
    assert len(mode_metrics(record(SHAPE))) == 50
    tables = sqlite3.connect(store.folder / "mlflow.db")
    (count,) = tables.execute(
        "SELECT count(*) FROM metrics WHERE run_uuid IN "
        f"(SELECT run_uuid FROM tags WHERE key = '{names.KIND}' AND value = '{names.KIND_MODE}')"
    ).fetchone()
    tables.close()
    assert count == 3 * 50 * SHAPE.num_steps
    group = read_group(store.client, Settings(tracking_uri=store.uri), SHAPE.name)
    assert group.rank_statuses == {"FINISHED": 3 * SHAPE.num_ranks}
    assert [run.trajectory_missing for run in group.runs] == [""] * 3


@pytest.mark.parametrize("observable", ["loss", "grad_norm"])
def test_spike_of_one_step_is_found_and_still_listed(found: Any, observable: str) -> None:
    measured = drift(found, SPIKED, observable)
    assert measured["step"] == SHAPE.spiked_step
    assert len(measured["steps"]) == len(measured["per_step"]) <= MOST < SHAPE.num_steps
    listed = dict(zip(measured["steps"], measured["per_step"], strict=True))
    assert listed[SHAPE.spiked_step] == measured["max"]
    others = [value for step, value in listed.items() if step != SHAPE.spiked_step]
    assert max(others) < 1e-4 * measured["max"]


def test_mean_and_deviation_are_those_of_all_steps(store: Store, found: Any) -> None:
    group = read_group(store.client, Settings(tracking_uri=store.uri), SHAPE.name)
    ours, theirs = (run.trajectory for run in group.runs[:2])
    assert ours is not None
    assert theirs is not None
    differences = np.abs(theirs.loss - ours.loss)
    measured = drift(found, SPIKED, "loss")
    assert measured["mean"] == pytest.approx(differences.mean())
    assert measured["std"] == pytest.approx(differences.std())


def test_sound_mode_passes_beside_it(found: Any) -> None:
    verdicts = {mode["label"]: mode["verdict"] for mode in found["modes"]}
    assert verdicts == {"no_dp": "PASS", SPIKED: "BUG", "flash_fsdp_bk": "PASS"}
