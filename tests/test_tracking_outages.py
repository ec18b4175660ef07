"""A server that goes and comes back while a group is logged: nothing is lost or doubled."""

import random
import statistics
import time

import pytest

from dpsgd_track.config import Settings
from dpsgd_track.store.opening import open_store
from tests.support.logged_group import kill_and_restart, log_a_group, sync
from tests.support.spooled_group import check_whole
from tests.support.tracking_servers import MlflowServer, Wire, postgres, shared_server


@pytest.fixture(scope="module")
def server() -> MlflowServer:
    return shared_server()


def test_a_wire_cut_in_the_middle_of_anything_loses_nothing(tmp_path, server):
    wire = Wire(server.port)
    rng = random.Random(5)
    cuts = []

    def at_step(step: int, _: list[str]) -> None:
        if step % 20 == 10:
            # The server does what it is asked to, and its answer is lost on the way.
            wire.answers_left = rng.randrange(3)
            cuts.append(step)
        elif step and step % 20 == 19:
            wire.cut()
            wire.mend()

    took_ms, said, left = log_a_group(tmp_path, "cut", wire.uri, 120, at_step)
    wire.cut()
    assert left == ""
    assert len(cuts) == 6
    away = [line for line in said if "takes nothing" in line]
    back = [line for line in said if "is back" in line]
    assert 1 <= len(away) <= len(cuts)
    assert len(back) == len(away)
    assert statistics.median(took_ms) < 0.2
    check_whole(*open_store(Settings(tracking_uri=server.uri)), "cut", 120)


def test_a_server_that_goes_for_good_leaves_all_of_it_to_sync(tmp_path, server):
    wire = Wire(server.port)
    start = time.monotonic()
    _, said, left = log_a_group(
        tmp_path, "gone", wire.uri, 40, lambda step, _: step == 20 and wire.cut()
    )
    assert time.monotonic() - start < 30
    assert "refused" in left
    assert len(said) == 1
    wire.mend()
    sync(tmp_path, wire.uri)
    wire.cut()
    check_whole(*open_store(Settings(tracking_uri=server.uri)), "gone", 40)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_twenty_kills_of_a_server_on_sqlite(tmp_path):
    server = MlflowServer(tmp_path)
    kill_and_restart(server, tmp_path / "spool", "killed", 20)
    server.kill()


@pytest.mark.soak
@pytest.mark.postgres
@pytest.mark.timeout(1200)
def test_twenty_kills_of_a_server_on_postgresql(tmp_path):
    with postgres(tmp_path) as uri:
        server = MlflowServer(tmp_path, uri)
        kill_and_restart(server, tmp_path / "spool", "killed", 20)
        server.kill()
