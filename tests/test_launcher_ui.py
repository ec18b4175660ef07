import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from dpsgd_track.config import Settings
from dpsgd_track.launcher.ui import open_ui
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.spool import CONTROL, SpoolWriter
from dpsgd_track.store.spooled import claim
from tests.support.launches import living
from tests.support.tracking_servers import closed_port

ROOT = Path(__file__).parent.parent


def test_the_ui_serves_artifacts_of_a_local_folder_and_ends_with_ctrl_c(tmp_path, monkeypatch):
    # A name that a URI writes in another way.
    here = tmp_path / "a%20b?c#d"
    here.mkdir()
    monkeypatch.chdir(here)
    settings = Settings()
    client, experiment_id = open_store(settings)
    run_id = client.create_run(experiment_id).info.run_id
    (tmp_path / "report.md").write_text("exact")
    client.log_artifact(run_id, str(tmp_path / "report.md"))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), "ui", "--port", str(closed_port())],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None
        query = f"get-artifact?path=report.md&run_uuid={run_id}"
        with urllib.request.urlopen(f"{address[0]}/{query}", timeout=30) as reply:
            assert reply.read() == b"exact"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert not living(here)
        assert sorted(tmp_path.iterdir()) == [here, tmp_path / "report.md"]
    finally:
        process.kill()
        process.communicate()
        for left in living(here):
            left.kill()


_OWNER = """
import sys, time
from pathlib import Path
from dpsgd_track.launcher.processes import Session
# A process of its own, as a server has.
script = "import subprocess; subprocess.run(['sleep', '60'])"
session = Session([sys.executable, "-c", script], {}, Path("log"))
print(session.pid, flush=True)
time.sleep(60)
"""


def test_what_a_command_started_ends_with_it_though_it_is_killed(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    leader = psutil.Process(int(owner.stdout.readline()))
    while len(everybody := [leader, *leader.children(recursive=True)]) < 3:
        time.sleep(0.02)
    owner.kill()
    owner.communicate()
    _, alive = psutil.wait_procs(everybody, timeout=10)
    assert not alive


def test_a_taken_port_is_said(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port}: expected a free port"):
            open_ui(Settings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"), port)


def test_groups_that_are_in_the_spool_alone_are_named_with_the_command_that_ships_them(tmp_path):
    uri, spool = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "spool"
    settings = Settings(tracking_uri=uri, spool_dir=str(spool))
    with pytest.raises(ValueError, match="Run `dpsgd-track quick` first"):
        open_ui(settings, 5000)
    spooled = claim(spool, "offline-1")
    assert spooled is not None
    SpoolWriter(spooled.folder, f"launcher{CONTROL}").close()
    with pytest.raises(ValueError, match="Run `dpsgd-track sync` first, which ships offline-1"):
        open_ui(settings, 5000)


def test_a_tracking_server_has_its_own_ui(capsys):
    assert open_ui(Settings(tracking_uri="http://me:secret@host:5000"), 5000) == 0
    assert capsys.readouterr().out == "MLflow UI: http://***@host:5000\n"
