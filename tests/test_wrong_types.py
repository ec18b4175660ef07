"""What a file holds instead of what is meant is refused in a sentence, never an internal error."""

from __future__ import annotations

import contextlib
import copy
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpsgd_track.cli.main import main
from dpsgd_track.config import load_settings
from dpsgd_track.record.trajectory import SCHEMA_VERSION, Trajectory
from dpsgd_track.store.golden import read_golden, write_golden
from dpsgd_track.store.reader import GroupNotFound
from tests.support.synthetic_group import group_of, healthy_runs, trajectory

FIELDS = tuple(each.name for each in fields(Trajectory) if each.name != "noise_draws")
RIGHT = {
    "schema": np.asarray(SCHEMA_VERSION),
    **{name: np.asarray(getattr(trajectory(), name)) for name in FIELDS},
}
"""The columns of a sound record."""
NUMBERS = ("max_grad_norm", "noise_std")
"""Numbers of a record that no computation makes NaN or infinite."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trajectory.npz"


def rewritten(path: Path, **changed: Any) -> None:
    """Write the record to `path`, with other columns."""
    np.savez(path, **{**RIGHT, **changed})


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"trajectory.*expected") as refused:
        Trajectory.load(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("dtype", ["M8[s]", "S3", "c16", "?", [("a", "f8")], "U5", "f8", "i8"])
def test_a_field_of_another_type_is_refused_by_name(dtype: Any, file: Path) -> None:
    for field, right in RIGHT.items():
        if right.dtype.kind != np.dtype(dtype).kind:
            rewritten(file, **{field: np.zeros(right.shape, dtype)})
            assert field in refusal(file)


def test_a_field_of_another_shape_is_refused(file: Path) -> None:
    for field, right in RIGHT.items():
        rewritten(file, **{field: right[None]})
        refusal(file)
        for fewer in (right[:-1], np.zeros((), right.dtype)) if right.ndim else ():
            rewritten(file, **{field: fewer})
            refusal(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("field", NUMBERS)
def test_a_setting_that_is_no_number_is_refused(field: str, value: float, file: Path) -> None:
    rewritten(file, **{field: np.full(RIGHT[field].shape, value)})
    assert field in refusal(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", np.zeros(4, np.int64)),
        ("step", -np.arange(4)),
        ("sample_index", np.zeros((4, 6), np.int64)),
        ("sample_index", np.full((4, 6), -2)),
        ("sample_rank", np.full((4, 6), -2)),
        ("parameter_names", np.full(4, "w")),
        ("layer_names", np.full(3, "w")),
        ("parameter_sizes", np.full(4, -1)),
        ("expected_batch_size", np.int64(-1)),
    ],
)
def test_numbers_and_names_that_no_run_records_are_refused(
    field: str, value: Any, file: Path
) -> None:
    rewritten(file, **{field: value})
    assert field in refusal(file)


def test_a_sound_record_is_read(file: Path) -> None:
    rewritten(file)
    assert Trajectory.load(file).num_steps == 4


def test_padding_may_repeat(file: Path) -> None:
    index = trajectory().sample_index.copy()
    index[:, -2:] = -1
    rewritten(file, sample_index=index)
    assert Trajectory.load(file).num_samples.tolist() == [4] * 4


# Golden files.


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "good.dpsgd"
    write_golden(group_of(healthy_runs()), path)
    return path


def contents(path: Path) -> tuple[Any, bytes]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("group.json")), archive.read("runs.zip")


def written(document: Any, runs: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        text = document if isinstance(document, bytes) else json.dumps(document)
        archive.writestr("group.json", text)
        archive.writestr("runs.zip", runs)
    return path


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value in a document, of lists that of the first two."""
    yield place
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value[:2])
    for key, each in inside:
        yield from places(each, (*place, key))


WRONG = st.sampled_from(
    (None, -1, 1.5, "x", "", [], {}, True, 10**400, float("nan"), float("inf"), ["x"], {"a": 1})
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_golden_file_with_any_other_value_is_read_or_refused(
    data: st.DataObject, golden: Path, tmp_path: Path
) -> None:
    document, runs = contents(golden)
    changed = copy.deepcopy(document)
    *outer, last = data.draw(st.sampled_from([p for p in places(document) if p]))
    inside = changed
    for key in outer:
        inside = inside[key]
    inside[last] = data.draw(WRONG)
    path = written(changed, runs, tmp_path / "bad.dpsgd")
    with contextlib.suppress(GroupNotFound):
        read_golden(path)


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"null", b"[" * 100_000, b'{"schema": 1}', b"\xff\xfe", b'{"a": NaN}'],
    ids=["empty", "list", "null", "deep", "other schema", "no text", "NaN"],
)
def test_a_golden_file_that_is_no_document_is_one_line_and_exit_2(
    document: bytes, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(document, contents(golden)[1], tmp_path / "bad.dpsgd")
    assert main(["compare", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.dpsgd" in line


def test_a_golden_file_whose_column_is_of_another_type_is_one_line_and_exit_2(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, runs = contents(golden)
    packed = tmp_path / "runs.zip"
    packed.write_bytes(runs)
    column = tmp_path / "loss.npy"
    np.save(column, np.full(4, "7.0"))
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(tmp_path / "new.zip", "w") as target:
        for name in source.namelist():
            data = column.read_bytes() if name == "2/loss.npy" else source.read(name)
            target.writestr(name, data)
    path = written(document, (tmp_path / "new.zip").read_bytes(), tmp_path / "bad.dpsgd")
    assert main(["compare", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "loss: expected floating-point numbers, got <U3 of shape (4,)" in line


# Configuration.

KEYS = (
    *("tracking_uri", "experiment", "artifact_location", "results_dir", "spool_dir", "log_ranks"),
    *("thresholds", "thresholds.loss", "thresholds.bug"),
)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "value", ["[1, 2]", "{a: 1}", "true", "2026-01-01", "2026-99-99", ".nan", "-.inf", "-1", "''"]
)
def test_a_setting_of_another_type_is_refused_in_a_sentence(
    key: str, value: str, tmp_path: Path
) -> None:
    path = tmp_path / "mlflow.yaml"
    outer, _, inner = key.partition(".")
    path.write_text(f"{outer}: {{{inner}: {value}}}" if inner else f"{outer}: {value}")
    with pytest.raises(ValueError, match=": expected"):
        load_settings(path)


@pytest.mark.parametrize("text", ["[" * 5000, "- 1", "1: 2", "? [a]\n: 1", "a: &a [*a]"])
def test_a_configuration_that_is_no_mapping_of_settings_is_refused(
    text: str, tmp_path: Path
) -> None:
    path = tmp_path / "mlflow.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected"):
        load_settings(path)
