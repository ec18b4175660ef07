"""Real modes whose processes are killed at random moments, and what is left of their group.

What is told of is what `progress.jsonl` lists: a worker appends a step there once it has logged it.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.record.plan import STARTED_JOB
from dpsgd_track.store.history import all_points
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.spooled import SpooledGroup
from tests.support.arrivals import told_of
from tests.support.launches import kill_all, living

ROOT = Path(__file__).resolve().parent.parent
SUITE = (
    *("quick", "--mode", "no_dp,flash_fsdp", "--model-name", "llama-tiny"),
    *("--regime", "accuracy,clip", "--num-iter", "12"),
)
Points = dict[str, list[int]]
"""Steps at which each metric was logged, in order, by metric."""


@dataclass
class Workspace:
    """A folder that a user works in, and the groups launched there."""

    folder: Path
    number: int = 0
    codes: list[int] = field(default_factory=list)
    lost: int = 0
    """Steps that were told of and are not there."""
    in_flight: int = 0
    """Steps of other ranks that were being logged as they were killed."""
    steps: int = 0
    """Steps that were told of."""
    doubled: int = 0
    """Values that are there more than once."""

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        with (self.folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, str(ROOT / script), *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
                stdout=output,
                stderr=output,
                text=True,
            )

    def run(self, script: str, *arguments: str) -> int:
        return self.start(script, *arguments).wait(280)

    @property
    def group(self) -> str:
        return f"g{self.number}"

    @property
    def settings(self) -> Settings:
        return Settings(
            tracking_uri=f"sqlite:///{self.folder}/mlflow.db", spool_dir=str(self.folder / "spool")
        )

    def goes_on(self) -> subprocess.Popen[str]:
        """Launch the group, or resume it where there is anything of it."""
        spooled = SpooledGroup(self.folder / "spool" / self.group)
        if spooled.folder.is_dir() and spooled.group_run() is None:
            # Its launcher was killed between the folder and the first record.
            self.number += 1
        elif spooled.folder.is_dir() or self.statuses():
            return self.start("launch.py", "resume", self.group)
        return self.start("launch.py", *SUITE, "--group", self.group)

    def statuses(self) -> Counter[str]:
        """Of the group's runs in the store."""
        if not (self.folder / "mlflow.db").exists():
            return Counter()
        client, experiment_id = open_store(self.settings)
        query = f"tags.`{names.GROUP}` = '{self.group}'"
        runs = client.search_runs([experiment_id], query, max_results=1000)
        return Counter(run.info.status for run in runs)

    def held(self) -> dict[str, Points]:
        """What is there of each run, by its key: in the spool, or else in the store."""
        spooled = SpooledGroup(self.folder / "spool" / self.group)
        if spooled.folder.is_dir():
            held: dict[str, Points] = {}
            for key, run in spooled.runs().items():
                points = held.setdefault(key, {})
                for row in run.rows:
                    for metric in row.keys:
                        points.setdefault(metric, []).append(row.step)
            if not next(iter(spooled.runs().values())).is_resumed:
                return held
        else:
            held = {}
        client, experiment_id = open_store(self.settings)
        query = f"tags.`{names.GROUP}` = '{self.group}'"
        for run in client.search_runs([experiment_id], query, max_results=1000):
            if run.data.tags[names.KEY] not in held:
                points = dict(all_points(client, run.info.run_id, run.data.metrics))
                held[run.data.tags[names.KEY]] = {
                    metric: [step for step, _, _ in found] for metric, found in points.items()
                }
        return held

    def check_records(self) -> None:
        """Hold what is there of every attempt against what it told of."""
        held = self.held()
        for work_dir in (self.folder / "results" / self.group / "logs").iterdir():
            with contextlib.suppress(FileNotFoundError):
                started = STARTED_JOB.loads((work_dir / "job.json").read_bytes())
                told = told_of(work_dir)
                for regime, run in enumerate(started.mode_runs):
                    for rank, own in enumerate(started.rank_runs[regime]):
                        self._check_run(held[own], told[regime], is_teller=rank == 0)
                    self._check_run(held[run], told[regime], is_teller=True)

    def _check_run(self, points: Points, told: list[int], *, is_teller: bool) -> None:
        logged = points.get("loss", [])
        assert logged == list(range(len(logged)))
        missing = set(told) - set(logged)
        if not is_teller:
            # Rank 0 may be a step ahead of those that it does not wait for.
            self.in_flight += len(missing & set(told[-1:]))
            missing -= set(told[-1:])
        self.steps += len(told)
        self.lost += len(missing)
        self.doubled += sum(len(steps) - len(set(steps)) for steps in points.values())


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that run now: launcher -> preloaded process -> agent -> ranks."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for host in psutil.Process(launcher.pid).children():
            for agent in host.children():
                found += agent.children()
    return found


def kill_launcher(launcher: subprocess.Popen[str]) -> None:
    launcher.kill()
    launcher.wait()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole_s(workspace: Workspace) -> float:
    """How long the suite takes if nobody is killed."""
    start = time.monotonic()
    assert workspace.run("launch.py", *SUITE, "--group", workspace.group) == 0
    return time.monotonic() - start


def finish(workspace: Workspace) -> None:
    """Resume the group, which is whole then and compares like any other."""
    assert workspace.run("launch.py", "resume", workspace.group) == 0
    assert set(workspace.statuses()) <= {"FINISHED", "FAILED", "KILLED"}
    assert not (workspace.folder / "spool" / workspace.group).exists()
    workspace.check_records()
    assert workspace.run("launch.py", "resume", workspace.group) == 0
    assert workspace.run("compare.py", workspace.group, "--no-png") == 0


def mode_durations(workspace: Workspace) -> dict[str, float]:
    """Seconds from a mode's job file to its last event, of the group that nobody disturbed."""
    logs = workspace.folder / "results" / "g0" / "logs"
    return {
        folder.name: (folder / "progress.jsonl").stat().st_mtime
        - (folder / "job.json").stat().st_mtime
        for folder in logs.iterdir()
    }


def kill_a_rank_of_each_mode(
    workspace: Workspace, durations: dict[str, float], rng: random.Random, most: int
) -> int:
    """Launch or resume, and kill one rank of every mode; how many were killed in their modes."""
    launcher = workspace.goes_on()
    logs = workspace.folder / "results" / workspace.group / "logs"
    before = {folder.name for folder in logs.iterdir()} if logs.is_dir() else set()
    kills = 0
    while launcher.poll() is None:
        time.sleep(0.02)
        new = {f.name for f in logs.iterdir()} - before if logs.is_dir() else set()
        if not new or len(ranks_of(launcher)) < 2 or kills >= most:
            continue
        before |= new
        time.sleep(rng.uniform(0, durations[new.pop().split("-")[0]]))
        if len(ranks := ranks_of(launcher)) == 2:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(ranks).kill()
                kills += 1
    workspace.codes.append(launcher.returncode)
    return kills


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_kills_of_a_rank(workspace: Workspace, whole_s: float) -> None:
    rng = random.Random(7)
    durations = mode_durations(workspace)
    kills = 0
    workspace.number = 10
    while kills < 20:
        kills += (new := kill_a_rank_of_each_mode(workspace, durations, rng, 20 - kills))
        workspace.check_records()
        assert workspace.codes[-1] in (0, 1)
        # The launcher itself says how each run ended.
        assert workspace.statuses()["RUNNING"] == 0
        assert not living(workspace.folder)
        if new == 0 or rng.random() < 0.3:
            finish(workspace)
            workspace.number += 1
    if workspace.statuses():
        finish(workspace)
    print(f"{kills} kills of a rank, {workspace}")
    assert (workspace.lost, workspace.doubled) == (0, 0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kill", "times"), [(kill_launcher, 10), (kill_all, 5)])
def test_kills_of_the_launcher_and_of_all(
    workspace: Workspace, whole_s: float, kill, times: int
) -> None:
    rng = random.Random(times)
    workspace.number += 1
    kills = 0
    while kills < times:
        launcher = workspace.goes_on()
        end = time.monotonic() + rng.uniform(0, whole_s)
        while launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if launcher.poll() is not None:
            # It was quicker, as little was missing.
            assert launcher.returncode == 0
            finish(workspace)
            workspace.number += 1
            continue
        kill(launcher)
        kills += 1
        for _ in _until_gone(workspace.folder):
            pass
        spooled = SpooledGroup(workspace.folder / "spool" / workspace.group)
        if not spooled.folder.is_dir():
            continue
        is_begun = spooled.group_run() is not None
        if is_begun and (workspace.folder / "results" / workspace.group / "logs").is_dir():
            workspace.check_records()
            assert workspace.run("compare.py", workspace.group, "--no-png") in (0, 2, 3)
        # Every other time the next launch finds what is left, else `sync` does.
        if kills % 2:
            assert workspace.run("launch.py", "sync") == 0
            assert workspace.statuses()["RUNNING"] == 0
    if workspace.statuses() or (workspace.folder / "spool" / workspace.group).is_dir():
        finish(workspace)
    print(f"{kills} times {kill.__name__}, {workspace}")
    assert (workspace.lost, workspace.doubled) == (0, 0)


def _until_gone(folder: Path, timeout_s: float = 30) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    while living(folder):
        assert time.monotonic() < deadline, "workers outlived their launcher"
        yield time.sleep(0.05)
