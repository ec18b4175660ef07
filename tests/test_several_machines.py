"""Two machines train, a third tracks; cables are pulled. Real workers, gloo and MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.spooled import SpooledGroup, part_of, spooled_groups
from tests.support.network_namespaces import Network, network
from tests.support.tracking_servers import closed_port

ROOT = Path(__file__).parent.parent
LOST_AFTER_S = 4.0
NUM_ITER = 25
LAUNCH = f"""
import sys
from dpsgd_track.launcher.process_group import Launch
from dpsgd_track.cli.main import main
from dpsgd_track.program import CHECKOUT
launch = Launch(grace_s=2, lost_after_s={LOST_AFTER_S})
sys.exit(main(sys.argv[1:], program=CHECKOUT, launch=launch))
"""
HEALTHY = """
import sys, time, urllib.request
while True:
    try:
        urllib.request.urlopen(sys.argv[1] + "/health", timeout=5)
        break
    except OSError:
        time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def lines() -> Iterator[Network]:
    with network() as made:
        yield made


def started(lines: Network, host: str, folder: Path, *command: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        lines.inside(host, *command),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def server(lines: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its URI as the two others reach it, and its folder."""
    folder = tmp_path_factory.mktemp("server")
    address, port = lines.address["server"], closed_port()
    command = (
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "0.0.0.0"),
        *("--port", str(port), "--allowed-hosts", f"{address}:*"),
        *("--backend-store-uri", f"sqlite:///{folder}/server.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            lines.inside("server", *command),
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    uri = f"http://{address}:{port}"
    try:
        subprocess.run(
            lines.inside("node0", sys.executable, "-c", HEALTHY, uri), check=True, timeout=90
        )
        yield uri, folder
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def launched(
    lines: Network, folders: list[Path], *argv: str
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    endpoint = f"{lines.address['node0']}:{closed_port()}"
    machines = ("--nnodes", "2", "--rdzv-endpoint", endpoint, "--rdzv-timeout", "60")
    first, second = (
        started(
            lines,
            f"node{rank}",
            folder,
            *(sys.executable, "-c", LAUNCH, *argv, *machines, "--node-rank", str(rank)),
        )
        for rank, folder in enumerate(folders)
    )
    return first, second


def until_step(folder: Path, mode: str, step: int, process: subprocess.Popen[str]) -> None:
    told = folder / "results" / "g" / "logs" / mode / "progress.jsonl"
    deadline = time.monotonic() + 90
    while not told.exists() or f'"event": "step", "step": {step}' not in told.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


TRAIN = ("--device", "cpu", "--nproc-per-node", "1", "--regime", "accuracy", "--group", "g")


# By default the wire of one machine is cut, in test_tracking_outages.py.
@pytest.mark.soak
def test_a_cable_to_the_tracking_server_is_pulled_and_nothing_is_lost(
    lines: Network, server: tuple[str, Path], tmp_path: Path
) -> None:
    uri, server_folder = server
    folders = [tmp_path / "node0", tmp_path / "node1"]
    where = ("--tracking-uri", uri)
    modes = ("full", "--mode", "no_dp,flash_fsdp", "--num-iter", str(NUM_ITER))
    processes = launched(lines, folders, *modes, *TRAIN, *where)
    until_step(folders[0], "no_dp", 3, processes[0])
    lines.cut("node1", "server")
    try:
        # Node 0 trains and ships on; node 1 trains on, and says what it keeps.
        said, other_said = (process.communicate(timeout=120)[0] for process in processes)
    finally:
        lines.mend("node1", "server")
    assert [process.returncode for process in processes] == [0, 0], said + other_said
    assert "ship:" not in said
    assert other_said.count("takes nothing at the moment") == 1
    assert f"ship:    python launch.py sync g --tracking-uri {uri}" in other_said
    assert spooled_groups(folders[0] / "spool") == []
    (part,) = spooled_groups(folders[1] / "spool")
    assert part.label == part_of("g", 1)

    syncing = started(lines, "node1", folders[1], sys.executable, "-c", LAUNCH, "sync", *where)
    assert "each value checked" in syncing.communicate(timeout=60)[0]
    assert spooled_groups(folders[1] / "spool") == []

    store = Settings(tracking_uri=f"sqlite:///{server_folder}/server.db")
    client, experiment_id = open_store(store)
    found = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = 'g'")
    assert {run.info.status for run in found} == {"FINISHED"}
    ranks = [run for run in found if run.data.tags[names.KIND] == names.KIND_RANK]
    # no_dp and its three replays, and flash_fsdp, on two ranks each.
    assert sorted(run.data.tags[names.RANK] for run in ranks) == ["0"] * 5 + ["1"] * 5
    for run in ranks:
        points = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(point.step for point in points) == list(range(NUM_ITER))

    compare = (sys.executable, str(ROOT / "compare.py"), "g", "--no-png", *where)
    comparing = started(lines, "node0", folders[0], *compare)
    assert "PASS: all 2 modes agree" in comparing.communicate(timeout=60)[0]
    assert comparing.returncode == 0


def test_a_cable_between_the_workers_is_pulled_and_the_mode_fails_soon(
    lines: Network, tmp_path: Path
) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    modes = ("full", "--mode", "no_dp,flash_fsdp", "--num-iter", "100000", "--offline")
    processes = launched(lines, folders, *modes, *TRAIN)
    until_step(folders[0], "no_dp", 3, processes[0])
    lines.cut("node0", "node1")
    began = time.monotonic()
    try:
        said, other_said = (process.communicate(timeout=60)[0] for process in processes)
    finally:
        lines.mend("node0", "node1")
    # Silence, the time of grace, the goodbye that nobody hears, and a busy machine.
    assert time.monotonic() - began < LOST_AFTER_S + 25
    assert [process.returncode for process in processes] == [1, 1], said + other_said
    assert f"was not heard of for {LOST_AFTER_S:g} s. Ending no_dp" in said
    assert "no_dp: FAILED" in said
    assert "a machine was lost: node 1" in said
    assert "flash_fsdp: started" not in said
    assert "resume:  python launch.py resume g --nnodes 2" in said
    assert f"was not heard of for {LOST_AFTER_S:g} s." in other_said
    group = SpooledGroup(folders[0] / "spool" / "g")
    assert {run.status for run in group.runs(with_rows=False).values()} == {"FAILED"}
    # What was seen until then is there.
    steps = [row.step for run in group.runs().values() for row in run.rows]
    assert max(steps) >= 3
