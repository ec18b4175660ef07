"""Golden files: a group as one small file, kept in a repository to compare later groups with.

The file is a zip: `group.json` with all data of the group and its runs but their trajectories, and
`runs.zip` with the columns of those, as `N/COLUMN.npy`. The inner zip is not compressed, so that
the outer one stores data common to several runs, replays above all, once. A golden file has no user
name and no absolute path.

A name that ends in .dpsgd.json makes it text: the same, a line for each number (`golden_text`).
"""

from __future__ import annotations

import io
import json
import lzma
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpsgd_track.config import require
from dpsgd_track.record.archive_bounds import check_bounds
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.facts import RunFacts
from dpsgd_track.record.failure import Failure
from dpsgd_track.record.names import GOLDEN_SUFFIXES, GOLDEN_TEXT_SUFFIX
from dpsgd_track.record.plan import GroupPlan
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.store import golden_text
from dpsgd_track.store.reader import GroupNotFound
from dpsgd_track.store.scratch import scratch

_CONTENTS, _RUNS = "group.json", "runs.zip"
_RECORDS = "records"
_ABSOLUTE = re.compile(r"(?<![\w./])(?:~\w*/|/|[A-Za-z]:[\\/]|file:)[^\s'\",;)\]]*")
_HIDDEN = "[path]"
# The same group gives the same bytes, whenever it is written.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class GoldenRun:
    """A mode run without its trajectory and without server ids."""

    mode: str
    regime: str
    variant: str
    replay: str
    status: Status
    failure: Failure | None
    facts: RunFacts | None
    metrics: Mapping[str, float]
    trajectory_missing: str
    has_trajectory: bool
    """True if the columns of its trajectory are in the file."""


@dataclass(frozen=True, kw_only=True)
class GoldenGroup:
    """A group's plan and its runs, in the order of their columns."""

    name: str
    start_time_ms: int
    """Unix time."""
    plan: GroupPlan
    runs: tuple[GoldenRun, ...]
    rank_statuses: Mapping[Status, int]
    superseded: int


GOLDEN = Codec(GoldenGroup, "dpsgd-track/golden", 2)


def is_golden(wanted: str) -> bool:
    """True if `wanted` names a golden file, rather than a group on a server."""
    return wanted.endswith(GOLDEN_SUFFIXES)


def is_text(path: Path) -> bool:
    """True if a golden file is text, by its name."""
    return path.name.endswith(GOLDEN_TEXT_SUFFIX)


def check_target(path: Path, *, force: bool) -> None:
    """Raise unless a golden file can be written to `path`.

    Raises:
        ValueError: another suffix, no such folder, or a file that exists.
    """
    allowed = f"a file that ends in {' or '.join(GOLDEN_SUFFIXES)}"
    require(is_golden(path.name), "export", str(path), allowed)
    require(path.absolute().parent.is_dir(), "export", str(path), "a file in an existing folder")
    require(not path.is_dir(), "export", str(path), "a file, not a folder")
    advice = "Add --force to replace it."
    require(force or not path.exists(), "export", str(path), "a file that is not there yet", advice)


def write_golden(group: Group, path: Path, *, force: bool = False) -> None:
    """Write `group` to `path`, whole or not at all, without its profile.

    Raises:
        ValueError: the file exists, or cannot be written.
    """
    check_target(path, force=force)
    partial = path.with_name(f"{path.name}.partial")
    try:
        contents = _without_paths(GOLDEN.dumps(_golden(group), indent=1))
        trajectories = [run.trajectory for run in group.runs]
        if is_text(path):
            partial.write_bytes(_as_text(contents, trajectories))
        else:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as archive:
                _add(archive, _CONTENTS, contents)
                _add(archive, _RUNS, _packed(trajectories))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"export={str(path)!r}: expected a writable place. {error}") from error


def read_golden(path: Path) -> Group:
    """The group that `write_golden` wrote.

    Raises:
        GroupNotFound: the file is missing, is torn, is something else, or is of a newer version.
    """
    try:
        if is_text(path):
            return _of_text(path.read_bytes())
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryFile() as runs:
            check_bounds(archive, path.stat().st_size)
            golden = GOLDEN.loads(archive.read(_CONTENTS))
            with archive.open(_RUNS) as stored:
                shutil.copyfileobj(stored, runs)
            with zipfile.ZipFile(runs) as packed:
                check_bounds(packed, archive.getinfo(_RUNS).file_size, is_stored=True)
                return _group(golden, lambda number: _unpacked(packed, number))
    except FileNotFoundError:
        reason = "There is no such file."
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        reason = f"It is torn or something else: {error}"
    # RuntimeError: encrypted, or nested without end.
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error)
    raise GroupNotFound(
        f"group={str(path)!r}: expected a file that dpsgd-track compare --export wrote. {reason}"
    )


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, archive.compression)


def _packed(trajectories: Sequence[Trajectory | None]) -> bytes:
    """All columns of all runs as one zip, not compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed, scratch() as folder:
        file = Path(folder) / "trajectory.npz"
        for number, trajectory in enumerate(trajectories):
            if trajectory is None:
                continue
            trajectory.save(file)
            with zipfile.ZipFile(file) as columns:
                for name in columns.namelist():
                    _add(packed, f"{number}/{name}", columns.read(name))
    return buffer.getvalue()


def _unpacked(packed: zipfile.ZipFile, number: int) -> Trajectory:
    """The trajectory of one run.

    Raises:
        ValueError: it is not a trajectory, or of another version.
    """
    place = f"{number}/"
    with scratch() as folder:
        file = Path(folder) / "trajectory.npz"
        with zipfile.ZipFile(file, "w") as columns:
            for name in packed.namelist():
                if name.startswith(place):
                    _add(columns, name.removeprefix(place), packed.read(name))
        return Trajectory.load(file)


def _as_text(contents: bytes, trajectories: Sequence[Trajectory | None]) -> bytes:
    """The file as text: `contents`, and each run's record."""
    with scratch() as folder:
        file = Path(folder) / "trajectory.npz"
        records: list[dict[str, Any] | None] = []
        for trajectory in trajectories:
            if trajectory is None:
                records.append(None)
                continue
            trajectory.save(file)
            with np.load(file) as columns:
                records.append(golden_text.written(dict(columns)))
    document = {**json.loads(contents), _RECORDS: records}
    return json.dumps(document, indent=1).encode() + b"\n"


def _of_text(text: bytes) -> Group:
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get(_RECORDS), list):
        raise ValueError(f"Expected {GOLDEN.schema} as JSON.")
    records = document.pop(_RECORDS)

    def record(number: int) -> Trajectory:
        with scratch() as folder:
            file = Path(folder) / "trajectory.npz"
            columns: dict[str, Any] = golden_text.columns_of(records[number])
            np.savez(file, **columns)
            return Trajectory.load(file)

    return _group(GOLDEN.loads(json.dumps(document)), record)


def _golden(group: Group) -> GoldenGroup:
    return GoldenGroup(
        name=group.name,
        start_time_ms=group.start_time_ms,
        plan=group.plan,
        runs=tuple(
            GoldenRun(
                **{name: getattr(run, name) for name in _SHARED},
                has_trajectory=run.trajectory is not None,
            )
            for run in group.runs
        ),
        rank_statuses=group.rank_statuses,
        superseded=group.superseded,
    )


_SHARED = [field.name for field in fields(GoldenRun) if field.name != "has_trajectory"]


def _group(golden: GoldenGroup, trajectory_of: Callable[[int], Trajectory]) -> Group:
    planned = {key: (job, regime) for key, job, regime in golden.plan.runs()}
    runs = []
    for number, kept in enumerate(golden.runs):
        run = ModeRun(
            **{name: getattr(kept, name) for name in _SHARED},
            trajectory=trajectory_of(number) if kept.has_trajectory else None,
        )
        job, setup = planned.get(run.key, (None, None))
        runs.append(replace(run, job=job.run_in(setup) if job and setup else None, setup=setup))
    return Group(
        name=golden.name,
        run_id="",
        start_time_ms=golden.start_time_ms,
        plan=golden.plan,
        runs=tuple(runs),
        rank_statuses=golden.rank_statuses,
        superseded=golden.superseded,
    )


_NAMES = ("mode", "regime", "variant", "replay")
"""Fields that identify runs, and are not paths even if they look like one."""


def _without_paths(document: str) -> bytes:
    """`document` without absolute paths in its strings."""

    def hidden(value: Any) -> Any:
        match value:
            case str():
                return _ABSOLUTE.sub(_HIDDEN, value)
            case list():
                return [hidden(item) for item in value]
            case dict():
                return {
                    key: item if key in _NAMES and isinstance(item, str) else hidden(item)
                    for key, item in value.items()
                }
        return value

    golden = json.loads(document)
    return json.dumps({**hidden(golden), "name": golden["name"]}, indent=1).encode()
