import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpsgd_track.config import Settings
from dpsgd_track.launcher.ui import open_ui
from dpsgd_track.modes.table import MODES as MODE_TABLE
from dpsgd_track.record import names
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.reader import find_group
from dpsgd_track.store.spool import CONTROL, SpoolWriter
from dpsgd_track.store.spooled import claim
from tests.support.launches import living
from tests.support.shipped_group import ship_a_group
from tests.support.synthetic_group import trajectory
from tests.support.tracking_servers import closed_port

ROOT = Path(__file__).parent.parent


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MODES = [
    spec.name for spec in MODE_TABLE.values() if spec.name not in ("reference", "grad_materialize")
]
VERDICTS = ("PASS", "DRIFT", "BUG", "INCONCLUSIVE")


@dataclass(frozen=True)
class Served:
    """The UI, as `dpsgd-track ui` serves it, on a store with groups."""

    process: subprocess.Popen[str]
    here: Path
    trajectories: str
    """Address that the command prints first."""
    groups: str
    run_id: str

    @property
    def address(self) -> str:
        """Address of the server."""
        return self.trajectories.partition("/#")[0]


def _last_values(mode: str) -> dict[str, float]:
    record = trajectory(seed=MODES.index(mode))
    return {metric: float(getattr(record, metric)[-1]) for metric in names.CHARTED}


def _add_judged_groups(client: Any, experiment_id: str, number: int) -> None:
    """Groups without runs, with the marks of a comparison."""
    for each in range(number):
        verdict = VERDICTS[each % len(VERDICTS)]
        tags = {
            names.GROUP: f"judged-{each}",
            names.KIND: names.KIND_GROUP,
            names.VERDICT: verdict,
        }
        run = client.create_run(experiment_id, 1000 + each, tags, f"judged-{each}")
        client.log_metric(run.info.run_id, names.DRIFT_OF_LIMIT, 10.0 ** (each - 5))
        client.set_terminated(run.info.run_id, "FAILED" if verdict == "BUG" else "FINISHED")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("ui")
    # A name that a URI writes in another way.
    here = folder / "a%20b?c#d"
    here.mkdir()
    uri = f"sqlite:///{here / 'mlflow.db'}"
    settings = Settings(tracking_uri=uri, artifact_location=str(here / "mlruns"))
    client, experiment_id = store = open_store(settings)
    _add_judged_groups(client, experiment_id, 19)
    ship_a_group(store, uri, folder / "spool", "many-modes", MODES)
    run_id = find_group(client, settings, "many-modes").info.run_id
    (folder / "report.md").write_text("exact")
    client.log_artifact(run_id, str(folder / "report.md"))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), "ui", "--port", str(closed_port())],
        stdout=subprocess.PIPE,
        text=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        lines = [re.search(r"http://\S+", process.stdout.readline()) for _ in range(2)]
        trajectories, groups = (line[0] for line in lines if line is not None)
        yield Served(process, here, trajectories, groups, run_id)
    finally:
        process.kill()
        process.communicate()
        for left in living(here):
            left.kill()


def test_the_ui_serves_artifacts_of_a_local_folder(served: Served) -> None:
    query = f"get-artifact?path=report.md&run_uuid={served.run_id}"
    with urllib.request.urlopen(f"{served.address}/{query}", timeout=30) as reply:
        assert reply.read() == b"exact"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield chromium.new_context(viewport={"width": 1400, "height": 900})
        chromium.close()


@pytest.mark.browser
def test_the_ui_opens_on_the_trajectories_of_all_modes_without_a_click(
    served: Served, browser: Any
) -> None:
    page = browser.new_page()
    page.goto(served.trajectories)
    charts = page.locator(".js-plotly-plot")
    charts.nth(1).locator(".scatterlayer .trace").nth(len(MODES) - 1).wait_for(state="attached")
    assert len(MODES) == 14
    last = _last_values(sorted(MODES)[0])
    for number, metric in enumerate(names.CHARTED):
        chart = charts.nth(number)
        box = chart.bounding_box()
        assert box["y"] + box["height"] < 900
        drawn = chart.evaluate(
            "e => e.data.filter(t => t.x.length === 4 && t.visible !== false).map(t => t.name)"
        )
        assert set(drawn) == {f"{mode}/accuracy" for mode in MODES}
        assert chart.evaluate("e => e.data[0].y.at(-1)") == pytest.approx(last[metric])
    assert page.get_by_text("Model training").is_visible()
    page.close()


@pytest.mark.browser
def test_the_list_of_groups_tells_each_verdict(served: Served, browser: Any) -> None:
    page = browser.new_page()
    page.goto(served.groups)
    cells = page.locator("[role=gridcell]")
    page.get_by_text("judged-18", exact=True).wait_for()
    for verdict in VERDICTS:
        assert cells.get_by_text(verdict, exact=True).count() == sum(
            VERDICTS[each % 4] == verdict for each in range(19)
        )
    page.close()


def test_the_ui_ends_with_ctrl_c_and_leaves_nothing_behind(served: Served) -> None:
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(20) == 0
    assert not living(served.here)
    left = {path.name for path in served.here.iterdir()}
    assert left == {"mlflow.db", "mlruns"}


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
