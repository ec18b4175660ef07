"""A spool that lost something is told from one whose writers were killed, and is kept."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dpsgd_track.config import Settings
from dpsgd_track.launcher.sync import sync
from dpsgd_track.record import names
from dpsgd_track.record.plan import GroupPlan, Suite
from dpsgd_track.record.run import Status
from dpsgd_track.store.history import all_points
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.shipper import Shipper, settle
from dpsgd_track.store.spool import CONTROL, HEADER_BYTES, MAGIC, RECORDS, SpoolWriter, spool_files
from dpsgd_track.store.spooled import SpooledGroup, claim, join, leave, part_of, spooled_groups
from tests.support.spooled_group import STOPPED
from tests.support.synthetic_group import ENVIRONMENT, job, setup

STEPS, RANKS = 6, 2
REGIMES = ("accuracy", "clip")
PLANNED = GroupPlan(
    suite=Suite.FULL,
    jobs=tuple(job(mode, *map(setup, REGIMES), num_ranks=RANKS) for mode in ("no_dp", "flash")),
    num_ranks=RANKS,
    environment=ENVIRONMENT,
)
NO_DP = "no_dp-rank1"
FLASH = "flash-rank1"
CUTS = ["nothing but its end", "in a line", "in its second line", "in its first line", "empty"]
"""How much of a file is missing."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("store")
    return Settings(
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        artifact_location=str(folder / "artifacts"),
        spool_dir=str(folder / "spool"),
    )


@pytest.fixture
def settings(store: Settings, tmp_path: Path) -> Settings:
    """The same store, and a spool of the test's own."""
    return replace(store, spool_dir=str(tmp_path / "spool"))


@pytest.fixture(scope="module")
def _shipped(store: Settings) -> Spooled:
    spooled = a_group(store, "g")
    client, experiment_id = open_store(store)
    Shipper(spooled.group, client, store.tracking_uri, experiment_id).ship()
    return spooled


@pytest.fixture
def spooled(_shipped: Spooled, settings: Settings) -> Spooled:
    """A copy of the spool of a group that was shipped."""
    folder = Path(settings.spool_dir, "g")
    shutil.copytree(_shipped.group.folder, folder)
    return Spooled(SpooledGroup(folder), settings, _shipped.runs)


@dataclass
class Spooled:
    """A group in the spool: no_dp finished, flash failed in its second regime."""

    group: SpooledGroup
    settings: Settings
    runs: dict[tuple[str, str, int], str]
    """Keys by mode, regime and rank; the mode's own run under -1."""

    def file(self, name: str) -> Path:
        (file,) = (f for f in spool_files(self.group.folder) if f.stem[7:] == name)
        return file

    def settle(self, *, count: bool = False) -> list[str]:
        """What a new process finds."""
        client, experiment_id = open_store(self.settings)
        uri = self.settings.tracking_uri
        return settle(Shipper(self.group, client, uri, experiment_id), count=count)

    def steps_in_store(self) -> dict[tuple[str, str, int], list[int]]:
        client, experiment_id = open_store(self.settings)
        stored = {
            run.data.tags[names.KEY]: run.info.run_id for run in client.search_runs([experiment_id])
        }
        found = {}
        for who, key in self.runs.items():
            if key in stored:
                ((_, points),) = all_points(client, stored[key], ["loss"])
                found[who] = sorted(step for step, _, _ in points)
        return found

    def is_kept(self) -> bool:
        return self.group.folder.is_dir()


def log(group: SpooledGroup, name: str, runs: Iterable[str]) -> None:
    """A worker's file about two regimes."""
    writer = SpoolWriter(group.folder, name + RECORDS, runs=runs)
    for run in runs:
        for step in range(STEPS):
            writer.log_metrics(run, step, {"loss": step / 3, "grad_norm": 1.0})
    for run in runs:
        writer.log_params(run, {"device.name": "cpu"})
    writer.close()


def a_group(settings: Settings, name: str) -> Spooled:
    group = claim(Path(settings.spool_dir), name)
    assert group is not None
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", name)
    tree.start_group(PLANNED)
    keys: dict[tuple[str, str, int], str] = {}
    for each, last in zip(PLANNED.jobs, (Status.FINISHED, Status.FAILED), strict=True):
        mode = each.mode
        for regime in each.regimes:
            own, of_ranks = tree.start_mode(each, regime, range(RANKS))
            keys |= {
                (mode, regime.name, rank): run for rank, run in enumerate((own, *of_ranks), -1)
            }
        for rank in range(RANKS):
            about = (-1, 0) if rank == 0 else (rank,)
            log(group, f"{mode}-rank{rank}", [keys[mode, r, w] for r in REGIMES for w in about])
        for regime, status in zip(REGIMES, (Status.FINISHED, last), strict=True):
            for rank in range(-1, RANKS):
                tree.finish(keys[mode, regime, rank], status)
    tree.finish(tree.group_run, Status.FAILED, STOPPED)
    control.close()
    return Spooled(group, settings, keys)


def cut(file: Path, how: str) -> int:
    """Cut a file's tail off; returns how many lines are left whole."""
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    if how == "nothing but its end":
        kept = b"".join(lines[:-1])
    elif how == "in a line":
        kept = b"".join(lines[:6]) + lines[6][:20]
    else:
        kept = {
            "in its second line": whole[: len(MAGIC) + 9],
            "in its first line": whole[:5],
            "empty": b"",
        }[how]
    file.write_bytes(kept)
    return kept.count(b"\n")


def kill_after(file: Path, num_lines: int) -> None:
    """Leave of a file what its writer had written when it was killed."""
    lines = file.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:num_lines])
    count = b"%016x" % len(kept)
    file.write_bytes(kept[: len(MAGIC)] + count + kept[len(MAGIC) + len(count) :])


def turn_a_byte(file: Path, number: int) -> None:
    """Damage a line, counted from 1."""
    lines = file.read_bytes().splitlines(keepends=True)
    middle = len(lines[number - 1]) // 2
    line = bytearray(lines[number - 1])
    line[middle] ^= 2
    lines[number - 1] = bytes(line)
    file.write_bytes(b"".join(lines))


def test_a_group_without_damage_is_removed(spooled):
    assert spooled.settle(count=True) == []
    assert not spooled.is_kept()


@pytest.mark.parametrize("name", [NO_DP, FLASH])
def test_a_damaged_line_is_said_with_its_number_and_all_others_are_shipped(settings, name):
    spooled = a_group(settings, f"damaged-{name}")
    file = spooled.file(name)
    # After the first line, the runs and the names come steps 0, 1 and 2.
    turn_a_byte(file, 6)
    for _ in range(2):
        # Another process finds it again, though all that can be read was acknowledged.
        assert spooled.settle(count=True) == [f"{file}: line 6 does not fit its checksum."]
        assert spooled.is_kept()
    steps = spooled.steps_in_store()
    damaged = (name.partition("-")[0], "accuracy", 1)
    assert steps.pop(damaged) == [0, 1, 3, 4, 5]
    assert len(steps) == len(spooled.runs) - 1
    assert set(map(tuple, steps.values())) == {tuple(range(STEPS))}


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_finished_workers_file_that_was_cut_is_told_though_another_mode_failed(
    spooled, how, rank
):
    file = spooled.file(f"no_dp-rank{rank}")
    num_lines = cut(file, how)
    problem = spooled.settle()[0]
    assert problem.startswith(f"{file}: ")
    assert problem.endswith(f" bytes are missing after line {num_lines}.")
    assert spooled.is_kept()


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_cut_of_a_killed_workers_file_is_told_from_its_end(spooled, how, rank):
    file = spooled.file(f"flash-rank{rank}")
    num_lines = cut(file, how)
    (problem,) = spooled.settle()
    assert problem.startswith(f"{file}: ")
    assert problem.endswith(f" bytes are missing after line {num_lines}.")
    assert spooled.is_kept()


@pytest.mark.parametrize("num_lines", [1, 2, 3 + STEPS])
def test_a_worker_may_be_killed_anywhere(spooled, num_lines):
    kill_after(spooled.file(FLASH), num_lines)
    assert spooled.settle() == []
    assert not spooled.is_kept()


def test_ranks_of_other_machines_have_their_files_there(spooled):
    for name in (NO_DP, FLASH):
        spooled.file(name).unlink()
    assert spooled.settle() == []


def a_part(spooled: Spooled) -> Spooled:
    """What rank 1 of each mode left on the second machine."""
    group = claim(Path(spooled.settings.spool_dir), part_of("g", 1))
    assert group is not None
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    for name in (NO_DP, FLASH):
        runs = [spooled.runs[name.partition("-")[0], regime, 1] for regime in REGIMES]
        join(control, "dpsgd-track", runs)
        leave(control, runs)
        spooled.file(name).rename(group.folder / spooled.file(name).name)
    control.close()
    return Spooled(group, spooled.settings, spooled.runs)


@pytest.mark.parametrize("how", CUTS)
def test_a_second_machine_tells_of_its_own_files_alone(spooled, how):
    part = a_part(spooled)
    no_dp = part.file(NO_DP)
    whole = no_dp.read_bytes()
    cut(no_dp, how)
    problems = part.settle()
    assert {problem.partition(": ")[0] for problem in problems} == {str(no_dp)}
    assert part.is_kept()
    no_dp.write_bytes(whole)
    assert part.settle() == []
    assert not part.is_kept()


def test_a_second_machine_alarms_nobody_while_node_0_has_not_said_how_it_ended(spooled):
    part = a_part(spooled)
    client, _ = open_store(spooled.settings)
    (ids,) = (each["run_ids"] for each in spooled.group.state().values())
    run_ids = [ids[spooled.runs["no_dp", regime, 1]] for regime in REGIMES]
    kill_after(part.file(NO_DP), 18)
    try:
        for run_id in run_ids:
            client.update_run(run_id, "RUNNING")
        assert part.settle() == []
    finally:
        for run_id in run_ids:
            client.set_terminated(run_id, Status.FINISHED)


def test_a_launchers_damaged_line_keeps_back_only_what_needs_it(settings):
    spooled = a_group(settings, "launcher-damaged")
    file = spooled.file("launcher")
    lines = file.read_bytes().splitlines()
    key = spooled.runs["flash", "accuracy", 1]
    number = next(i for i, line in enumerate(lines, 1) if key.encode() in line)
    turn_a_byte(file, number)
    for _ in range(2):
        problems = spooled.settle()
        assert f"{file}: line {number} does not fit its checksum." in problems
        assert f"Records belong to run {key}, which the launcher's file lacks." in problems
        assert spooled.is_kept()
    steps = spooled.steps_in_store()
    assert steps.keys() == spooled.runs.keys() - {("flash", "accuracy", 1)}
    assert set(map(tuple, steps.values())) == {tuple(range(STEPS))}


def test_sync_ends_with_a_code_of_its_own_and_says_what_is_damaged(spooled, capsys):
    turn_a_byte(spooled.file(NO_DP), 6)
    assert sync(spooled.settings, None) == 1
    said = capsys.readouterr().out
    assert "-no_dp-rank1.records: line 6 does not fit its checksum." in said
    assert "NOT all of it is at" in said
    assert spooled.is_kept()


@pytest.mark.parametrize("name", ["launcher", "worker"])
def test_sync_keeps_a_spool_of_which_only_damaged_lines_are_left(settings, capsys, name):
    group = claim(Path(settings.spool_dir), "g")
    assert group is not None
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    if name == "launcher":
        RunTree(control, "dpsgd-track", "g").start_group(PLANNED)
    control.close()
    worker = SpoolWriter(group.folder, f"worker{RECORDS}", runs=["run"])
    if name == "worker":
        worker.log_params("run", {"device.name": "cpu"})
    worker.close()
    (file,) = (f for f in spool_files(group.folder) if f.stem[7:] == name)
    turn_a_byte(file, 3)
    assert sync(settings, None) == 1
    assert f"{file}: line 3 does not fit its checksum." in capsys.readouterr().out
    assert [each.name for each in spooled_groups(Path(settings.spool_dir))] == ["g"]


def test_no_byte_of_a_worker_can_be_turned_unnoticed(spooled):
    """Whatever its mode came to."""
    rng = random.Random(3)
    client, experiment_id = open_store(spooled.settings)
    shipper = Shipper(spooled.group, client, spooled.settings.tracking_uri, experiment_id)
    shipper.ship()
    for name in (NO_DP, FLASH, "no_dp-rank0"):
        file = spooled.file(name)
        whole = file.read_bytes()
        # A count of bytes that lags behind hides nothing.
        for place in rng.sample(range(HEADER_BYTES, len(whole)), 8):
            turned = bytes((whole[place] ^ 1 << rng.randrange(8),))
            file.write_bytes(whole[:place] + turned + whole[place + 1 :])
            assert str(file) in "".join(shipper.differences(count=False)), place
        file.write_bytes(whole)
    assert shipper.differences() == []
