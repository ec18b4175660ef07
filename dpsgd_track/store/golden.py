"""A group as one small file, to be kept in a repository and compared with later groups.

The file is a zip: `group.json` with everything about the group and its runs but their
trajectories, and `runs.zip` with the columns of those, as `N/COLUMN.npy`. That one is not
compressed by itself: what runs have in common, replays above all, is then stored once. It holds no
user name and no absolute path.
"""

from __future__ import annotations

import dataclasses
import io
import json
import lzma
import re
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpsgd_track.config import require
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.store.reader import Group, GroupNotFound, ModeRun

SUFFIX = ".dpsgd"
"""By it a file is told from a group's name."""
SCHEMA = "dpsgd-track/golden"
SCHEMA_VERSION = 1

_CONTENTS, _RUNS = "group.json", "runs.zip"
# MLflow's own tags name the user, the machine's folders, and ids of another server.
_NOT_KEPT = ("mlflow.",)
_ABSOLUTE = re.compile(r"(?<![\w./])(?:~\w*/|/|[A-Za-z]:[\\/]|file:)[^\s'\",;)\]]*")
_HIDDEN = "[path]"
# The same bytes from the same group, whenever it is written.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def is_golden(wanted: str) -> bool:
    """Whether `wanted` names a golden file, and not a group on a server."""
    return wanted.endswith(SUFFIX)


def check_target(path: Path, *, force: bool) -> None:
    """Raise unless a golden file can be written to `path`.

    Raises:
        ValueError: another suffix, no such folder, or a file that is there already.
    """
    require(path.suffix == SUFFIX, "export", str(path), f"a file that ends in {SUFFIX}")
    require(path.absolute().parent.is_dir(), "export", str(path), "a file in an existing folder")
    require(not path.is_dir(), "export", str(path), "a file, not a folder")
    advice = "Add --force to replace it."
    require(force or not path.exists(), "export", str(path), "a file that is not there yet", advice)


def write_golden(group: Group, path: Path, *, force: bool = False) -> None:
    """Write `group` to `path`, whole or not at all; a profile of it is left out.

    Raises:
        ValueError: the file is there already, or cannot be written.
    """
    check_target(path, force=force)
    document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "group": _plain(group, leave_out=("runs", "points")),
        "runs": [
            {
                **_plain(run, leave_out=("trajectory",)),
                "has_trajectory": run.trajectory is not None,
            }
            for run in group.runs
        ],
    }
    partial = path.with_name(f"{path.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as archive:
            _add(archive, _CONTENTS, json.dumps(document, indent=1, allow_nan=False).encode())
            _add(archive, _RUNS, _packed([run.trajectory for run in group.runs]))
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
        with zipfile.ZipFile(path) as archive:
            document = json.loads(archive.read(_CONTENTS))
            _check_schema(document)
            with zipfile.ZipFile(io.BytesIO(archive.read(_RUNS))) as packed:
                runs = [
                    _run(values, _unpacked(packed, number) if has_trajectory else None)
                    for number, values in enumerate(document["runs"])
                    for has_trajectory in [values.pop("has_trajectory")]
                ]
            return _group(document["group"], tuple(runs))
    except FileNotFoundError:
        reason = "There is no such file."
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        reason = f"It is torn or something else: {error}"
    # RuntimeError: encrypted, or nested without end.
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise GroupNotFound(
        f"group={str(path)!r}: expected a file that compare.py --export wrote. {reason}"
    )


def _check_schema(document: Any) -> None:
    schema, version = document["schema"], document["schema_version"]
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, not {SCHEMA!r}")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"its schema version is {version!r}, this program's is {SCHEMA_VERSION}. "
            "Compare with the version of dpsgd-track that wrote it."
        )


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, archive.compression)


def _packed(trajectories: Sequence[Trajectory | None]) -> bytes:
    """All columns of all runs as one zip, not compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed, tempfile.TemporaryDirectory() as folder:
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
        ValueError: it is none, or of another version.
    """
    place = f"{number}/"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trajectory.npz"
        with zipfile.ZipFile(file, "w") as columns:
            for name in packed.namelist():
                if name.startswith(place):
                    _add(columns, name.removeprefix(place), packed.read(name))
        return Trajectory.load(file)


def _plain(value: Group | ModeRun, leave_out: Sequence[str]) -> dict[str, Any]:
    """The fields of `value` as JSON holds them, without what is private to a machine."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if field.name in ("params", "tags"):
            plain[field.name] = _kept(content)
        elif field.name == "metrics":
            # As text, which is exact for NaN, infinities and -0.0 too.
            plain[field.name] = {key: repr(float(number)) for key, number in content.items()}
        elif isinstance(content, Mapping):
            plain[field.name] = dict(content)
        elif isinstance(content, str) and field.name in ("reason", "trajectory_missing"):
            plain[field.name] = _ABSOLUTE.sub(_HIDDEN, content)
        elif field.name not in leave_out:
            plain[field.name] = content
    return plain


def _kept(values: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in values.items()
        if not key.startswith(_NOT_KEPT) and not _ABSOLUTE.search(value)
    }


def _run(values: dict[str, Any], trajectory: Trajectory | None) -> ModeRun:
    _check_types(ModeRun, values)
    metrics = {key: float(number) for key, number in values.pop("metrics").items()}
    return ModeRun(**values, metrics=metrics, trajectory=trajectory)


def _group(values: dict[str, Any], runs: tuple[ModeRun, ...]) -> Group:
    _check_types(Group, values)
    return Group(**values, runs=runs)


def _check_types(cls: type[Group | ModeRun], values: Mapping[str, Any]) -> None:
    """Raise where a value is not of its field's type: nobody would look again."""
    inner = {"params": str, "tags": str, "metrics": str, "rank_statuses": int}
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key in inner:
            is_right = all(isinstance(item, inner[key]) for item in value.values())
        else:
            is_right = type(value).__name__ == types[key]
        if not is_right:
            raise TypeError(f"its {key} is {str(value)[:80]!r}")
