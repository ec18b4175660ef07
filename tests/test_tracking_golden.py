"""A golden file holds a group exactly, and nothing of who made it or where."""

from __future__ import annotations

import io
import json
import re
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsgd_track.cli.main import main
from dpsgd_track.comparison import compare_groups
from dpsgd_track.config import DataConfig, ModelConfig, Thresholds
from dpsgd_track.record.facts import DeviceFacts, RunFacts
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.trajectory import ALTERNATIVES, Trajectory
from dpsgd_track.store.golden import read_golden, write_golden
from dpsgd_track.store.reader import GroupNotFound
from tests.support.noisy_records import draws_of, noisy
from tests.support.noisy_records import run_of as noise_run
from tests.support.synthetic_group import (
    ENVIRONMENT,
    Store,
    failed,
    first_steps,
    group_of,
    healthy_runs,
    job,
    mode_run,
    plan_of,
    put,
    scaled,
    trajectory,
    with_run,
)

FACTS = RunFacts(
    environment=ENVIRONMENT,
    device=DeviceFacts(torch_num_threads=1, allow_tf32=False, cudnn_allow_tf32=True),
    left_out_steps=(0, 3),
    norm_plan={"head": "gram"},
)
HOSTILE = "../<script>alert(1)</script>|`**[x](http://e.vil)@you;'\"\n\x1b[2J"


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the last bit, types included."""
    assert type(ours) is type(theirs)
    if is_dataclass(ours):
        for field in fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, float):
        assert struct.pack("d", ours) == struct.pack("d", theirs)
    else:
        assert ours == theirs


def odd_runs() -> list[ModeRun]:
    record = trajectory()
    for row, value in enumerate((np.nan, np.inf, -np.inf, -0.0)):
        record = put(record, "loss", value, row)
    empty = first_steps(trajectory(), 0)
    metrics = {"a": float("nan"), "b": float("inf"), "c": -0.0, "d": 5e-324, "e": 1 / 3}
    return [
        *healthy_runs(),
        mode_run("flash", record=record, metrics=metrics, variant="fork", facts=FACTS),
        mode_run("flash_bk", record=empty, replay="again"),
        mode_run("ghost", status="MISSING", trajectory_missing="the run was never started"),
        mode_run(HOSTILE, status="FAILED", failure=failed(HOSTILE.replace("/", ""))),
    ]


def planned(runs: list[ModeRun], name: str, **more: Any) -> Group:
    """A group as it is read: each run with its job, and without ids of a server."""
    plan = plan_of(runs)
    jobs = {key: (each, regime) for key, each, regime in plan.runs()}
    known = [
        replace(run, run_id="", job=each.run_in(regime), setup=regime)
        for run in runs
        for each, regime in [jobs[run.key]]
    ]
    return group_of(known, name, run_id="", plan=plan, **more)


def test_every_bit_survives_the_round_trip(tmp_path: Path) -> None:
    group = planned(odd_runs(), HOSTILE, rank_statuses={Status.FINISHED: 3}, superseded=2)
    write_golden(group, tmp_path / "g.dpsgd")
    assert_same(read_golden(tmp_path / "g.dpsgd"), group)
    again = tmp_path / "again.dpsgd"
    write_golden(read_golden(tmp_path / "g.dpsgd"), again)
    assert again.read_bytes() == (tmp_path / "g.dpsgd").read_bytes()
    write_golden(planned([], "empty"), tmp_path / "empty.dpsgd")
    assert_same(read_golden(tmp_path / "empty.dpsgd"), planned([], "empty"))
    assert [file.suffix for file in tmp_path.iterdir()] == [".dpsgd"] * 3


def without_alternatives(group: Group) -> Group:
    """`group` as text keeps it: without what names causes alone."""

    def kept(t: Trajectory | None) -> Trajectory | None:
        if t is None:
            return None
        return replace(t, **{name: getattr(t, name)[..., :0] for name in ALTERNATIVES})

    runs = tuple(replace(run, trajectory=kept(run.trajectory)) for run in group.runs)
    return replace(group, runs=runs)


def test_every_bit_survives_the_round_trip_as_text(tmp_path: Path) -> None:
    file = tmp_path / "g.dpsgd.json"
    drawn = replace(noisy(), noise_std=0.259, noise_draws=draws_of(num_steps=2))
    for runs in (odd_runs(), [noise_run(drawn)], []):
        group = planned(runs, HOSTILE, rank_statuses={Status.FINISHED: 3})
        write_golden(group, file, force=True)
        assert_same(read_golden(file), without_alternatives(group))


def test_a_changed_step_is_a_changed_line(tmp_path: Path) -> None:
    lines = []
    for record in (trajectory(), put(trajectory(), "loss", 0.25, 1)):
        file = tmp_path / "g.dpsgd.json"
        write_golden(planned([mode_run("flash", record=record)], "g"), file, force=True)
        lines.append(file.read_text().splitlines())
    before, after = lines
    assert len(before) == len(after)
    (at,) = (i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
    assert after[at].strip() == '"loss": "0.25",'
    steps = [i for i, line in enumerate(after) if re.match(r' *"step": "\d', line)]
    assert steps[1] < at < steps[2]
    assert max(map(len, after)) < 400


@pytest.mark.parametrize("factor", [1.0, 1 + 3e-4, 1.5])
def test_the_verdict_is_that_of_the_packed_file(tmp_path: Path, factor: float) -> None:
    runs = healthy_runs()
    record = scaled(trajectory(), "sample_norm", factor)
    changed = planned(with_run(runs, mode_run("flash_fsdp", "clip", record)), "after")
    said = []
    for name in ("g.dpsgd", "g.dpsgd.json"):
        write_golden(planned(runs, "before"), tmp_path / name)
        comparison = compare_groups(read_golden(tmp_path / name), changed, Thresholds())
        said.append(
            (comparison.verdict, comparison.sentence, [m.sentence for m in comparison.modes])
        )
    assert said[0] == said[1]


BROKEN = {
    "no record": lambda text: text.replace('"records"', '"other"'),
    "fewer steps": lambda text: re.sub(r'("loss": "<f8) \[\d+\]', r"\1 [9]", text),
    "another type": lambda text: text.replace('"<f8 [', '"|O8 [', 1),
    "a word": lambda text: text.replace('"loss": "', '"loss": "much ', 1),
    "no base64": lambda text: re.sub(r'(sketch": \{\s+"[^"]+": ")[^"]+', r"\1 !", text, count=1),
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "a column less": lambda text: re.sub(r'\s+"clip_factor": "<f8[^"]*",', "", text, count=1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_text_that_is_something_else_is_refused(tmp_path: Path, what: str) -> None:
    file = tmp_path / "g.dpsgd.json"
    write_golden(planned([mode_run("flash")], "g"), file)
    text = file.read_text()
    broken = BROKEN[what](text)
    assert broken != text
    file.write_text(broken)
    with pytest.raises(GroupNotFound, match="expected a file that dpsgd-track compare --export wr"):
        read_golden(file)


PRIVATE = (
    "/home/anne/x.csv",
    "~/models/a",
    "~anne/models",
    "C:\\Users\\anne",
    "sqlite:////home/anne/mlflow.db",
    "file:///home/anne",
    "a,/home/anne",
    "--data='/home/anne/x y'",
)
KEPT = (
    "Intel(R) Xeon(R) CPU @ 2.70GHz",
    "../opacus",
    "n/a",
    "org/model",
    "package.module:factory",
    "1e-05",
)


@pytest.mark.parametrize("text", [*PRIVATE, *KEPT])
def test_no_user_and_no_absolute_path_is_kept(tmp_path: Path, text: str) -> None:
    regime = mode_run("flash").setup
    assert regime is not None
    data = DataConfig(source=text)
    flash = job("flash", regime, data=data, model=ModelConfig(name=text))
    run = mode_run("flash", status="FAILED", job=flash, failure=failed(f"it failed: {text}"))
    group = group_of([run], tags={"mlflow.user": "anne"}, plan=plan_of([run], command=text))
    write_golden(group, tmp_path / "g.dpsgd")
    plan = read_golden(tmp_path / "g.dpsgd").plan
    assert (plan.command == text) == (plan.jobs[0].data.source == text) == (text in KEPT)
    with zipfile.ZipFile(tmp_path / "g.dpsgd") as archive:
        assert all(b"anne" not in archive.read(name) for name in archive.namelist())


def test_a_file_is_never_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "g.dpsgd"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"expected a file that is not there yet. Add --force"):
        write_golden(group_of(healthy_runs()), path)
    assert path.read_text() == "precious"
    write_golden(group_of(healthy_runs()), path, force=True)
    assert read_golden(path).name == "synthetic"


def damaged(path: Path, **changes: Any) -> None:
    """Write a golden file again, with `changes` to its JSON."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(parts["group.json"])
    for key, value in changes.items():
        place, _, name = key.partition("__")
        if name:
            (document[place][0] if place == "runs" else document[place])[name] = value
        else:
            document[key] = value
    parts["group.json"] = json.dumps(document).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": "other"}, "expected a document of schema dpsgd-track/golden"),
        ({"schema_version": 99}, "schema_version=99: expected 2"),
        ({"schema_version": 1}, "Use the version of dpsgd-track that wrote it"),
        ({"name": 3}, "name='3'"),
        ({"start_time_ms": "now"}, "start_time_ms='now'"),
        ({"hat": "x"}, "hat"),
        ({"plan__suite": "none"}, "plan.suite='none'"),
        ({"plan__jobs": [{"mode": "flash"}]}, "plan.jobs.0.model"),
        ({"runs__failure": {"kind": "bad luck"}}, "runs.0.failure.kind='bad luck'"),
        ({"runs__status": None}, "runs.0.status='None'"),
        ({"runs__metrics": {"a": "x"}}, "runs.0.metrics.a='x'"),
        ({"runs": [3]}, "runs.0='3'"),
        ({"plan": []}, "plan='[]'"),
        ({"runs": {}}, "runs='{}'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_foreign_or_newer_file_is_an_error(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "g.dpsgd"
    write_golden(group_of(healthy_runs()), path)
    damaged(path)
    read_golden(path)
    damaged(path, **changes)
    with pytest.raises(GroupNotFound, match="expected a file that dpsgd-track compare") as e:
        read_golden(path)
    assert said in str(e.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_torn_file_is_an_error(tmp_path: Path, share: float) -> None:
    path = tmp_path / "g.dpsgd"
    write_golden(group_of(healthy_runs()), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(GroupNotFound, match="It is torn or something else"):
        read_golden(path)


def test_a_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "g.dpsgd"
    write_golden(group_of(healthy_runs()), path)
    whole = bytearray(path.read_bytes())
    for at in range(100, len(whole) - 2000, len(whole) // 50):
        bent = bytearray(whole)
        bent[at] ^= 0xFF
        path.write_bytes(bent)
        with pytest.raises(GroupNotFound):
            read_golden(path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    made = Store(tmp_path)
    made.add_group(healthy_runs(), command="python launch.py quick")
    return made


def test_a_golden_file_stands_wherever_a_group_may(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tracking-uri", store.uri, "--no-png"]
    assert main(["compare", "synthetic", *options, "--export", "golden.dpsgd"]) == 0
    assert "Golden file: golden.dpsgd (" in capsys.readouterr().out
    before = store.client.search_runs([store.experiment_id])
    wrong = scaled(mode_run("flash_fsdp", "clip").trajectory, "grad_norm", 1.1, 1)
    store.add_group(with_run(healthy_runs(), mode_run("flash_fsdp", "clip", wrong)), "later")
    assert main(["compare", "golden.dpsgd", "latest", *options]) == 1
    assert main(["compare", "golden.dpsgd", "synthetic", *options]) == 0
    # Without any server, and nothing is written to one.
    nowhere = ["--tracking-uri", "http://127.0.0.1:9", "--no-png", "--results-dir", "alone"]
    assert main(["compare", "golden.dpsgd", *nowhere]) == 0
    assert Path("alone/synthetic/report.html").is_file()
    assert main(["compare", "golden.dpsgd", "golden.dpsgd", *nowhere]) == 0
    assert main(["compare", "latest", "golden.dpsgd", *options]) == 1
    after = {run.info.run_id: dict(run.data.tags) for run in before}
    for run_id, tags in after.items():
        assert dict(store.client.get_run(run_id).data.tags) == tags


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["absent.dpsgd"],
            "group='absent.dpsgd': expected a file that dpsgd-track compare --export wrote.",
        ),
        (["torn.dpsgd"], "It is torn or something else"),
        (["synthetic", "absent.dpsgd"], "There is no such file."),
        (["synthetic", "--export", "torn.dpsgd"], "Add --force to replace it."),
        (["synthetic", "--export", "golden.zip"], "expected a file that ends in .dpsgd"),
        (["synthetic", "--export", "no/golden.dpsgd"], "expected a file in an existing folder"),
        (["synthetic", "synthetic", "--export", "n.dpsgd"], "expected one GROUP"),
        (["synthetic", "--force"], "force=True: expected it with --export"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_file_that_cannot_be_used_is_one_line_and_exit_code_2(
    store: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("torn.dpsgd").write_text("no zip")
    assert main(["compare", *arguments, "--tracking-uri", store.uri, "--no-png"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert Path("torn.dpsgd").read_text() == "no zip"
    assert not Path("results").exists()


def packed_again(path: Path, change: Callable[[dict[str, bytes]], None], compression: int) -> None:
    """Change the columns in a golden file, and pack them by another method."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(io.BytesIO(contents["runs.zip"])) as packed:
        columns = {name: packed.read(name) for name in packed.namelist()}
    change(columns)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as packed:
        for name, data in columns.items():
            packed.writestr(name, data)
    contents["runs.zip"] = buffer.getvalue()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)


def claimed(shape: str) -> bytes:
    """A column whose header claims a shape, and that has no data."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


HUGE = 150 << 20


@pytest.mark.parametrize(
    ("change", "compression", "said"),
    [
        (lambda c: c.update({"0/loss.npy": bytes(HUGE)}), zipfile.ZIP_STORED, "unpack to"),
        (
            lambda c: c.update({"0/loss.npy": bytes(1000)}),
            zipfile.ZIP_DEFLATED,
            "that are not comp",
        ),
        (lambda c: c.update({"0/loss.npy": claimed("(1 << 40,)")}), zipfile.ZIP_STORED, "expected"),
        (lambda c: c.update({"0/loss.npy": claimed(f"({1 << 40},)")}), zipfile.ZIP_STORED, "whole"),
        (lambda c: c.update({"0/loss.npy": claimed("(-1, -3)")}), zipfile.ZIP_STORED, "whole"),
        (lambda c: c.update({"0/../x.npy": b""}), zipfile.ZIP_STORED, "expected"),
    ],
    ids=["zeros", "compressed", "shape-no-literal", "shape-huge", "shape-negative", "name"],
)
def test_a_golden_file_that_expands_is_refused_at_once_and_in_little_memory(
    tmp_path: Path, change: Callable[[dict[str, bytes]], None], compression: int, said: str
) -> None:
    path = tmp_path / "g.dpsgd"
    write_golden(group_of(healthy_runs()), path)
    packed_again(path, change, compression)
    assert path.stat().st_size < 4 << 20
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(GroupNotFound, match=said) as raised:
        read_golden(path)
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert "\n" not in str(raised.value)
