"""Modes as real process groups of a fake worker, over a real SQLite store."""

import json
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dpsgd_track.record import names
from dpsgd_track.record.plan import PLAN, PLAN_FILE, STARTED_JOB
from tests.support.launches import living, start

TOKEN = "hf_a_secret_never_to_be_seen"


@dataclass
class Run:
    status: str
    tags: dict[str, str]
    params: dict[str, str]


def runs(folder: Path) -> dict[str, Run]:
    """Every run by the path of its names: `group/mode/regime/rank 0`."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        found = dict(database.execute("SELECT run_uuid, status FROM runs"))
        tags: dict[str, dict[str, str]] = {run_id: {} for run_id in found}
        params: dict[str, dict[str, str]] = {run_id: {} for run_id in found}
        for table, into in (("tags", tags), ("params", params)):
            for run_id, key, value in database.execute(f"SELECT run_uuid, key, value FROM {table}"):
                into[run_id][key] = value

    def path(run_id: str) -> str:
        parent = tags[run_id].get(names.PARENT_RUN)
        name = tags[run_id]["mlflow.runName"]
        return f"{path(parent)}/{name}" if parent else name

    return {path(i): Run(status, tags[i], params[i]) for i, status in found.items()}


def wait_for(condition, timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@dataclass
class Suite:
    code: int
    out: str
    err: str
    runs: dict[str, Run]
    folder: Path


def launch(folder: Path, *argv: str, plan: dict | None = None, makes_store: bool = False) -> Suite:
    process = start(folder, *argv, plan=plan, makes_store=makes_store)
    out, err = process.communicate(timeout=120)
    return Suite(process.returncode, out, err, runs(folder), folder)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Suite:
    """One suite in which modes fail in each way, between modes that finish."""
    plan = {
        "no_dp": {"do": "out_of_memory", "regime": 1, "step": 2, "rank": 1},
        "flash_fsdp": {"do": "sigkill", "rank": 1},
        "flash_fsdp_bk": {"do": "crash", "regime": 0, "rank": 1},
    }
    argv = ("full", "--group", "mixed", "--num-iter", "3", "--nproc-per-node", "2")
    modes = "no_dp,flash_fsdp,flash_fsdp_bk,flash_fsdp_fuse"
    folder = tmp_path_factory.mktemp("mixed")
    return launch(folder, *argv, "--mode", modes, plan=plan, makes_store=True)


def test_one_mode_failing_does_not_stop_the_others(mixed):
    assert mixed.code == 1
    for mode in ("reference", "flash_fsdp_fuse"):
        for regime in ("accuracy", "clip"):
            assert mixed.runs[f"mixed/{mode}/{regime}"].status == "FINISHED"
            assert mixed.runs[f"mixed/{mode}/{regime}/rank 1"].status == "FINISHED"
    group = mixed.runs["mixed"]
    assert group.status == "FAILED"
    assert group.tags[names.REASON].startswith(
        "not every run finished: 2 of 5 modes finished; failed: no_dp, flash_fsdp,"
    )
    (plan,) = mixed.folder.glob(f"mlartifacts/**/{PLAN_FILE}")
    assert len(list(PLAN.loads(plan.read_bytes()).runs())) == 14
    assert {run.status for run in mixed.runs.values()} == {"FINISHED", "FAILED"}
    assert len(mixed.runs) == 1 + 14 * 3
    assert not living(mixed.folder)


def test_a_failure_is_the_regime_in_flight_and_the_finished_one_stays(mixed):
    assert mixed.runs["mixed/no_dp/accuracy"].status == "FINISHED"
    failed = mixed.runs["mixed/no_dp/accuracy (again)"]
    assert failed.status == "FAILED"
    reason = failed.tags[names.REASON]
    assert reason.startswith("out of memory at step 2, rank 1: tried to allocate 1 PiB")
    assert "--batch-size" in reason
    assert "results/mixed/logs/no_dp/output.log" in reason
    assert failed.tags[names.NOTE].startswith("**FAILED**: out of memory")


def test_a_killed_worker_is_said_to_be_killed(mixed):
    reason = mixed.runs["mixed/flash_fsdp/accuracy"].tags[names.REASON]
    assert reason.startswith("the process group was killed: signal 9 (SIGKILL).")
    assert "--batch-size" in reason
    later = mixed.runs["mixed/flash_fsdp/clip"]
    assert later.status == "FAILED"
    assert later.tags[names.REASON].startswith("not started: regime accuracy failed first")


def test_an_exception_is_quoted_from_the_log(mixed):
    reason = mixed.runs["mixed/flash_fsdp_bk/accuracy"].tags[names.REASON]
    assert "RuntimeError: the fake worker crashed on purpose" in reason


def test_the_references_bounds_reach_the_other_modes(mixed):
    bounds = mixed.runs["mixed/flash_fsdp_fuse/clip"].params["regime.max_grad_norms"]
    assert bounds == "2.0, 2.0, 0.5, 0.5"
    text = (mixed.folder / "results/mixed/logs/flash_fsdp_fuse/job.json").read_text()
    assert STARTED_JOB.loads(text).job.regimes[1].max_grad_norms == (2.0, 2.0, 0.5, 0.5)


def test_every_rank_is_a_fresh_process(mixed):
    left = sorted((mixed.folder / "results/mixed/logs").glob("*/process-rank*.json"))
    processes = [json.loads(file.read_text()) for file in left]
    assert len({pid for pid, _, _ in processes}) == len(processes)
    # A rank that crashes or is killed may end the other before that has written anything.
    ended = (["flash_fsdp"], ["flash_fsdp_bk"])
    assert len([modes for _, modes, _ in processes if modes not in ended]) == 3 * 2
    assert [seen for _, seen, _ in processes] == [[file.parent.name] for file in left]


def test_no_rank_starts_before_all_are_forked(mixed):
    left = [*(mixed.folder / "results/mixed/logs").glob("*/process-rank*.json")]
    # A rank that kills itself may be gone before the other one counts.
    counted = [file for file in left if file.parent.name != "flash_fsdp"]
    assert len(counted) >= 4
    assert {json.loads(file.read_text())[2] for file in counted} == {2}


def test_plain_lines_when_stdout_is_no_terminal(mixed):
    assert "\x1b" not in mixed.out
    lines = mixed.out.splitlines()
    assert sum(line.startswith("flash_fsdp_fuse: ") for line in lines) == 4
    assert lines[-2:] == ["compare: python compare.py mixed", "browse:  python launch.py ui"]
    assert mixed.err == ""


def test_without_the_reference_clip_is_failed_and_accuracy_still_runs(tmp_path):
    plan = {"reference": {"do": "out_of_memory", "regime": 1}}
    argv = ("quick", "--group", "g", "--mode", "flash_fsdp", "--nproc-per-node", "1")
    suite = launch(tmp_path, *argv, plan=plan)
    assert suite.code == 1
    assert suite.runs["g/reference/accuracy"].status == "FINISHED"
    assert suite.runs["g/reference/clip"].status == "FAILED"
    assert suite.runs["g/flash_fsdp/accuracy"].status == "FINISHED"
    assert suite.runs["g/flash_fsdp/probe-accuracy"].status == "FINISHED"
    for regime in ("clip", "probe-clip"):
        clip = suite.runs[f"g/flash_fsdp/{regime}"]
        assert clip.status == "FAILED"
        assert "clipping bounds are unknown" in clip.tags[names.REASON]


def test_without_the_references_run_on_the_probe_the_users_own_clip_regime_still_runs(tmp_path):
    plan = {"reference": {"do": "out_of_memory", "regime": 6}}
    argv = ("quick", "--group", "g", "--mode", "flash_fsdp", "--nproc-per-node", "1")
    suite = launch(tmp_path, *argv, plan=plan)
    assert suite.code == 1
    assert suite.runs["g/reference/clip"].status == "FINISHED"
    assert suite.runs["g/reference/probe-clip"].status == "FAILED"
    for regime in ("accuracy", "clip", "probe-accuracy", "probe-noise"):
        assert suite.runs[f"g/flash_fsdp/{regime}"].status == "FINISHED", regime
    clip = suite.runs["g/flash_fsdp/probe-clip"]
    assert clip.status == "FAILED"
    assert "clipping bounds are unknown" in clip.tags[names.REASON]


def test_a_mode_on_one_device_is_one_process_between_those_of_all_ranks(tmp_path):
    modes = ("--mode", "no_dp,flash,flash_fsdp", "--nproc-per-node", "2")
    suite = launch(tmp_path, "quick", "--group", "g", *modes, "--num-iter", "2")
    assert suite.code == 0
    ranks = [file.parent.name for file in tmp_path.rglob("process-rank*.json")]
    assert {mode: ranks.count(mode) for mode in ranks} == {
        "reference": 2,
        "no_dp": 2,
        "flash": 1,
        "flash_fsdp": 2,
    }
    single, shared = suite.runs["g/flash/clip"], suite.runs["g/flash_fsdp/clip"]
    assert (single.params["num_ranks"], shared.params["num_ranks"]) == ("1", "2")
    assert single.params["regime.micro_batches"] == "4"
    assert shared.params["regime.micro_batches"] == "2"
    on_probe = (suite.runs["g/flash/probe-clip"], suite.runs["g/flash_fsdp/probe-clip"])
    assert [run.params["regime.micro_batches"] for run in on_probe] == ["6", "3"]
    assert {run.params["model.name"] for run in on_probe} == {"dpsgd-track/probe"}
    assert {run.params["model.name"] for run in (single, shared)} == {"minilm"}
    assert "g/flash/clip/rank 0" in suite.runs
    assert "g/flash/clip/rank 1" not in suite.runs
    assert {run.status for run in suite.runs.values()} == {"FINISHED"}


@pytest.fixture
def stubborn(tmp_path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A launch whose worker ignores SIGTERM, in the middle of a step."""
    plan = {"no_dp": {"do": "stubborn", "regime": 1, "rank": 1}}
    argv = ("quick", "--group", "g", "--mode", "no_dp,flash_fsdp", "--regime", "accuracy")
    process = start(tmp_path, *argv, plan=plan)
    progress = tmp_path / "results/g/logs/no_dp/progress.jsonl"
    wait_for(lambda: progress.exists() and '"regime": 1' in progress.read_text())
    time.sleep(0.3)
    assert living(tmp_path)
    yield process, tmp_path
    process.kill()
    for left in living(tmp_path):
        left.kill()


def test_ctrl_c_ends_everything(stubborn):
    process, folder = stubborn
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    # An impatient second one changes nothing.
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert not living(folder)
    tree = runs(folder)
    assert tree["g/no_dp/accuracy"].status == "FINISHED"
    for name in ("g", "g/no_dp/accuracy (permuted)", "g/no_dp/accuracy (permuted)/rank 1"):
        assert tree[name].status == "KILLED"
        assert tree[name].tags[names.REASON].startswith("interrupted: SIGINT. ")
    assert {run.status for run in tree.values()} == {"FINISHED", "KILLED"}
    assert "Traceback" not in out + err


def test_nothing_outlives_a_killed_launcher(stubborn):
    process, folder = stubborn
    process.kill()
    process.communicate()
    wait_for(lambda: not living(folder), timeout_s=5.0)


def test_a_launcher_killed_while_workers_are_imported_leaves_nothing(tmp_path):
    process = start(tmp_path, "single", "--mode", "no_dp", is_fresh=True)
    wait_for(lambda: living(tmp_path))
    process.kill()
    process.communicate()
    wait_for(lambda: not living(tmp_path), timeout_s=20.0)


def test_ranks_that_lose_their_host_are_killed_and_the_next_mode_runs(tmp_path):
    plan = {"no_dp": {"do": "kill_host", "rank": 1}, "reference": {"do": "no_trajectory"}}
    argv = ("quick", "--group", "g", "--mode", "no_dp,flash_fsdp", "--regime", "accuracy")
    suite = launch(tmp_path, *argv, "--nproc-per-node", "2", plan=plan)
    reason = suite.runs["g/no_dp/accuracy"].tags[names.REASON]
    assert reason.startswith("the process group was killed: signal 9 (SIGKILL).")
    assert suite.runs["g/flash_fsdp/accuracy"].status == "FINISHED"
    assert not living(tmp_path)


def test_a_worker_that_cannot_be_imported_is_a_failure_that_says_so(tmp_path):
    suite = launch(tmp_path, "single", "--mode", "no_dp", plan={"no_dp": {"do": "unimportable"}})
    assert suite.code == 1
    (reason,) = {run.tags[names.REASON] for path, run in suite.runs.items() if path.count("/") == 2}
    assert "ImportError: the fake worker lacks something" in reason


def test_the_token_is_seen_by_workers_alone(tmp_path):
    argv = ("single", "--mode", "no_dp", "--token", TOKEN, "--output", "results.json")
    process = start(tmp_path, *argv, plan={"no_dp": {"do": "environment"}}, is_fresh=True)
    commands: set[str] = set()
    own = psutil.Process(process.pid).cmdline()

    def watch() -> bool:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                # Until it executes its own program, a child shows what the user typed.
                if (command := child.cmdline()) != own:
                    commands.add(" ".join(command))
            except psutil.Error:
                continue
        return process.poll() is not None

    wait_for(watch)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert any("tests.support.fake_worker" in command for command in commands)
    assert not any(TOKEN in text for text in (out, err, *commands))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file.name for file in files if TOKEN.encode() in file.read_bytes()]
    seen = json.loads(next(tmp_path.rglob("environment-rank0.json")).read_text())
    assert seen["has_token"]
    (group,) = [run for path, run in runs(tmp_path).items() if "/" not in path]
    assert group.params["command"].endswith("launch.py single --mode no_dp --output results.json")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["final_loss"] == pytest.approx(0.1)
    assert result["loss_values"][0] == 1.0
    assert (result["peak_memory_gb"], result["peak_memory_mb"]) == (0.5, 512.0)
    assert result["layer_norms_history"][0]["norms"]["head_grad_norm"] == 2.0
