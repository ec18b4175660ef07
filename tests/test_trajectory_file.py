"""The trajectory file: large fields stay in it until they are asked for."""

from __future__ import annotations

import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsgd_track.record.trajectory import LARGE, SCHEMA_VERSION, Trajectory
from tests.support.synthetic_group import trajectory

RECORD = trajectory(steps=30)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    RECORD.save(tmp_path / "trajectory.npz")
    return tmp_path / "trajectory.npz"


def in_memory(t: Trajectory) -> set[str]:
    return set(LARGE) & set(t.__dict__)


def columns_of(record: Trajectory) -> dict[str, Any]:
    names = {item.name for item in fields(record)} - {"noise_draws"}
    return {name: getattr(record, name) for name in names}


def same(ours: Trajectory, theirs: Trajectory) -> bool:
    return all(
        np.array_equal(getattr(ours, item.name), getattr(theirs, item.name))
        for item in fields(Trajectory)
    )


def test_large_fields_are_read_when_asked_for_and_can_be_let_go(path: Path) -> None:
    read = Trajectory.load(path)
    assert not in_memory(read)
    assert np.array_equal(read.weight_sketch, RECORD.weight_sketch)
    assert in_memory(read) == {"weight_sketch"}
    read.release()
    assert not in_memory(read)
    assert same(read, RECORD)


def test_rows_of_a_field_are_read_without_the_rest(path: Path) -> None:
    read = Trajectory.load(path)
    some = read.rows(7, 11)
    assert np.array_equal(some.gradient_sketch, RECORD.gradient_sketch[7:11])
    assert np.array_equal(some.rows(1, 9).noised_sketch, RECORD.noised_sketch[8:11])
    assert some.step.tolist() == [7, 8, 9, 10]
    past_the_end = read.read("sample_norm_by_parameter", 28, 99)
    assert np.array_equal(past_the_end, RECORD.sample_norm_by_parameter[28:])
    assert not in_memory(read)
    assert np.array_equal(RECORD.rows(7, 11).gradient_sketch, RECORD.gradient_sketch[7:11])


def test_open_record_outlives_its_file(path: Path) -> None:
    read = Trajectory.load(path)
    path.unlink()
    assert same(read, RECORD)


def test_a_record_from_a_file_can_be_changed_in_one_field(path: Path) -> None:
    read = Trajectory.load(path)
    path.unlink()
    changed = replace(read, loss=read.loss * 2)
    assert same(replace(changed, loss=RECORD.loss), RECORD)
    assert same(read, RECORD)


def test_compressed_file_is_read_as_well(path: Path) -> None:
    columns = columns_of(RECORD)
    np.savez_compressed(path, schema=np.int64(SCHEMA_VERSION), **columns)
    assert same(Trajectory.load(path), RECORD)


def test_field_in_another_order_of_memory_is_read_as_it_was(path: Path) -> None:
    transposed = np.asfortranarray(RECORD.gradient_sketch)
    replace(RECORD, gradient_sketch=transposed).save(path)
    assert same(Trajectory.load(path), RECORD)


@pytest.mark.parametrize("field", ["gradient_sketch", "loss"])
def test_one_changed_byte_in_a_field_is_a_torn_file(path: Path, field: str) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(getattr(RECORD, field).tobytes()) + 5
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"trajectory.npz: expected a trajectory file. .*CRC"):
        Trajectory.load(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_cut_file_is_a_torn_file(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="expected a trajectory file"):
        Trajectory.load(path)


@pytest.mark.parametrize(
    ("written", "theirs"),
    [(b"'descr': '<f8'", b"'descr': 'a08'"), (b"'shape': (30,), }", b"'shape': (30L,),}")],
    ids=["old name of a type", "Python 2"],
)
@pytest.mark.filterwarnings("default")
def test_header_that_numpy_only_warns_of_is_a_torn_file(
    path: Path, recwarn: pytest.WarningsRecorder, written: bytes, theirs: bytes
) -> None:
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents["loss.npy"] = contents["loss.npy"].replace(written, theirs)
    assert theirs in contents["loss.npy"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="expected a trajectory file"):
        Trajectory.load(path)
    assert not recwarn.list


def test_file_that_shrinks_after_it_was_opened_is_said(path: Path) -> None:
    read = Trajectory.load(path)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="expected it to stay as it was"):
        read.weight_sketch.sum()


def test_shapes_are_checked_before_a_large_field_is_read(path: Path) -> None:
    columns = columns_of(RECORD)
    columns["noised_sketch"] = RECORD.noised_sketch[:-1]
    np.savez(path, schema=np.int64(SCHEMA_VERSION), **columns)
    with pytest.raises(ValueError, match=r"trajectory.noised_sketch: expected shape \(30,"):
        Trajectory.load(path)


def test_unknown_attribute_is_an_error(path: Path) -> None:
    with pytest.raises(AttributeError, match="no attribute 'gradient'"):
        Trajectory.load(path).gradient  # type: ignore[attr-defined] # noqa: B018


def test_some_steps_are_those_steps_of_every_field_of_a_step() -> None:
    whole = trajectory(steps=4)
    of_the_run = {"layer_names", "parameter_names", "parameter_sizes"}
    for each in fields(Trajectory):
        values = getattr(whole, each.name)
        if isinstance(values, np.ndarray) and each.name not in of_the_run:
            assert np.array_equal(getattr(whole.rows(1, 3), each.name), values[1:3]), each.name
