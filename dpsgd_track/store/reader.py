"""Reads a run group back from the tracking server.

The exact record is each mode run's `trajectory.npz`. A run that died before uploading it is
read from its metric history: enough to see how far it got, never enough to pass.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np

from dpsgd_track.config import PROFILE, Point, Settings, redact_uri
from dpsgd_track.record import names
from dpsgd_track.record.timings import Timings
from dpsgd_track.record.trajectory import Floats, Trajectory
from dpsgd_track.store.client import connect
from dpsgd_track.store.history import History, metric_history, restored
from dpsgd_track.store.sqlite_file import absolute_uri, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Result = TypeVar("Result")

MISSING = "MISSING"
"""Status of a run that the launcher set out to do and that is not on the server."""
FINISHED, FAILED = "FINISHED", "FAILED"

# A run comes with all of its tags and params, and the newest group is most often the one meant.
_PAGE = 100
_NEWEST_SHOWN = 5


class GroupNotFound(LookupError):
    """Nothing to compare; the message says what was looked for and what is there."""


@dataclass(frozen=True, kw_only=True)
class ModeRun:
    """One mode in one regime, as the server knows it."""

    mode: str
    regime: str
    variant: str = ""
    """Name of the code it ran; empty for the installed code."""
    replay: str = ""
    """Which replay measures the floor (config.REPLAYS); empty for a run that is judged."""
    run_id: str = ""
    """Empty when the run is missing."""
    status: str = MISSING
    """FINISHED, FAILED, KILLED, RUNNING, SCHEDULED or MISSING."""
    reason: str = ""
    """Why the run failed, as its worker reported it."""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of each."""
    trajectory: Trajectory | None = None
    trajectory_missing: str = ""
    """Why there is no trajectory, or only one rebuilt from metrics; empty when it is exact."""

    @property
    def label(self) -> str:
        """Name in tables and charts: `mode` or `mode@variant`."""
        return f"{self.mode}@{self.variant}" if self.variant else self.mode

    @property
    def title(self) -> str:
        """`label`, told apart from its replay: `no_dp (permuted)`."""
        return f"{self.label} ({self.replay})" if self.replay else self.label


@dataclass(frozen=True, kw_only=True)
class PointRun(ModeRun):
    """One run of a profile, as the server knows it. It has no trajectory."""

    point: Point
    timings: Timings | None = None
    timings_missing: str = ""
    """Why there are none."""

    @property
    def is_out_of_memory(self) -> bool:
        """Whether it had too little memory, which is a result."""
        return self.tags.get(names.OUT_OF_MEMORY) == "true"


@dataclass(frozen=True, kw_only=True)
class Group:
    """One launch: everything that is compared together."""

    name: str
    run_id: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    start_time_ms: int
    """Unix time."""
    runs: tuple[ModeRun, ...]
    """Mode runs, replays and missing ones included, in the launcher's order; those of a profile
    are not among them."""
    points: tuple[PointRun, ...] = ()
    """Runs of a profile, missing ones included, in the order they were timed in."""
    rank_statuses: Mapping[str, int] = field(default_factory=dict)
    """How many rank runs have each status."""
    superseded: int = 0
    """Earlier attempts of the same mode and regime, left out."""


def open_client(tracking_uri: str) -> MlflowClient:
    """A client of the store at `tracking_uri`, which must exist: reading creates nothing.

    Raises:
        GroupNotFound: an SQLite file that is not there.
        ValueError: an SQLite URI without a file.
    """
    path = sqlite_path(tracking_uri)
    if path is not None and not path.is_file():
        raise GroupNotFound(
            f"tracking_uri={redact_uri(tracking_uri)!r}: expected an existing SQLite file. "
            "Launch a group first, or check --tracking-uri."
        )
    # MLflow keeps what it opened by its name, which may mean another file by now.
    return connect(absolute_uri(tracking_uri))


def find_group(client: MlflowClient, settings: Settings, wanted: str) -> Run:
    """The group run that `wanted` names: a group's name, a run id, or `latest`.

    Of several groups with one name the newest is meant. The id of a mode or rank run stands
    for its group.

    Raises:
        GroupNotFound: the experiment or the group does not exist.
    """
    experiment = client.get_experiment_by_name(settings.experiment)
    if experiment is None:
        raise GroupNotFound(
            f"experiment={settings.experiment!r}: expected an experiment of "
            f"{redact_uri(settings.tracking_uri)}. Launch a group first, or check --config."
        )
    groups = []
    for run in _search(client, experiment.experiment_id, names.KIND_GROUP):
        if wanted == "latest" or _is_named(run, wanted):
            return run
        groups.append(run)
    name = _group_of_run(client, wanted)
    for run in groups:
        if name and _is_named(run, name):
            return run
    newest = ", ".join(run.data.tags[names.GROUP] for run in groups[:_NEWEST_SHOWN])
    raise GroupNotFound(
        f"group={wanted!r}: expected a group's name, a run id or latest. "
        + (f"The newest groups: {newest}." if newest else "The experiment holds no group.")
    )


def _group_of_run(client: MlflowClient, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        return ""
    try:
        return str(client.get_run(run_id).data.tags.get(names.GROUP, ""))
    except MlflowException:
        return ""


def _is_named(run: Run, name: str) -> bool:
    return name in (run.info.run_id, run.info.run_name, run.data.tags[names.GROUP])


def _search(client: MlflowClient, experiment_id: str, kind: str, parent: str = "") -> Iterator[Run]:
    """Runs of one kind, newest first; of the run `parent` where it is given."""
    # Names are matched in Python: a quote in a name would break out of a filter string. A run id
    # has none.
    child = f" AND tags.`{names.PARENT_RUN}` = '{parent}'" if parent else ""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{names.KIND}` = '{kind}'{child}",
            max_results=_PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        yield from (run for run in page if names.GROUP in run.data.tags)
        token = page.token
        if not token:
            return


def read_group(client: MlflowClient, settings: Settings, wanted: str) -> Group:
    """The group that `wanted` names, with the trajectory of each mode run.

    Raises:
        GroupNotFound: nothing matches.
    """
    return group_of(client, find_group(client, settings, wanted))


def group_of(client: MlflowClient, run: Run) -> Group:
    """The group of a group run, with the trajectory of each mode run."""
    name = run.data.tags[names.GROUP]
    experiment_id = run.info.experiment_id
    attempts = list(_search(client, experiment_id, names.KIND_MODE, run.info.run_id))
    newest: dict[tuple[str, ...], Run] = {}
    for child in attempts:  # newest first
        newest.setdefault(_key(child), child)
    ranks = Counter(
        rank.info.status
        for child in newest.values()
        for rank in _search(client, experiment_id, names.KIND_RANK, child.info.run_id)
    )
    keys = in_order(run.data.tags, newest)
    return Group(
        name=name,
        run_id=run.info.run_id,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        start_time_ms=run.info.start_time or 0,
        runs=tuple(_mode_run(client, key, newest.get(key)) for key in keys if not is_point(key)),
        points=tuple(_point_run(client, key, newest.get(key)) for key in keys if is_point(key)),
        rank_statuses=dict(ranks),
        superseded=len(attempts) - len(newest),
    )


def in_order(tags: Mapping[str, str], found: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """What the launcher set out to do, by the group run's tags, and then what else was found."""
    expected = dict.fromkeys(_expected(_joined(tags, names.EXPECTED_RUNS) or "[]"))
    return [*expected, *sorted(set(found) - expected.keys())]


def _key(run: Run) -> tuple[str, ...]:
    return key_of(run.data.tags)


def key_of(tags: Mapping[str, str]) -> tuple[str, ...]:
    """(mode, regime, variant, replay, point) of a mode run."""
    return tuple(
        tags.get(tag, "")
        for tag in (names.MODE, names.REGIME, names.VARIANT, names.REPLAY, names.POINT)
    )


def is_point(key: tuple[str, ...]) -> bool:
    """Whether a run is one of a profile."""
    return key[1] == PROFILE


def _joined(tags: Mapping[str, str], tag: str) -> str:
    """A long text that is spread over `tag`, `tag.2`, `tag.3` and so on."""
    parts = [tags.get(tag, "")]
    while part := tags.get(f"{tag}.{len(parts) + 1}"):
        parts.append(part)
    return "".join(parts)


def _expected(text: str) -> list[tuple[str, ...]]:
    try:
        rows = [tuple(str(part or "") for part in row) for row in json.loads(text)]
        keys = [(*row, "") if len(row) == 4 else row for row in rows]
        if any(len(key) != 5 for key in keys):
            raise ValueError("A row has another length.")
        for key in filter(is_point, keys):
            Point.parse(key[4])
        return keys
    except (ValueError, TypeError) as error:
        raise GroupNotFound(
            f"{names.EXPECTED_RUNS}={text[:80]!r}: expected a JSON list of "
            "[mode, regime, variant, replay], and in a profile the point. Launch the group again."
        ) from error


def _mode_run(client: MlflowClient, key: tuple[str, ...], run: Run | None) -> ModeRun:
    if run is None:
        return never_started(key)
    mode, regime, variant, replay, _ = key
    trajectory, missing = _read_trajectory(client, run)
    logged = run.data.metrics
    return ModeRun(
        mode=mode,
        regime=regime,
        variant=variant,
        replay=replay,
        run_id=run.info.run_id,
        status=run.info.status,
        reason=run.data.tags.get(names.REASON, ""),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(zip(logged, restored(list(logged.values())).tolist(), strict=True)),
        trajectory=trajectory,
        trajectory_missing=missing,
    )


def never_started(key: tuple[str, ...]) -> ModeRun:
    """A mode run that the launcher set out to do."""
    mode, regime, variant, replay, _ = key
    return ModeRun(
        mode=mode,
        regime=regime,
        variant=variant,
        replay=replay,
        trajectory_missing="the run was never started",
    )


def point_never_timed(key: tuple[str, ...]) -> PointRun:
    """A run of a profile that the launcher set out to do."""
    mode, regime, variant, _, point = key
    return PointRun(
        mode=mode,
        regime=regime,
        variant=variant,
        point=Point.parse(point),
        timings_missing="the run was never started",
    )


def _point_run(client: MlflowClient, key: tuple[str, ...], run: Run | None) -> PointRun:
    if run is None:
        return point_never_timed(key)
    mode, regime, variant, _, point = key
    timings, missing = None, ""
    try:
        timings = _read_artifact(client, run, names.TIMINGS_FILE, Timings.load)
    except (ValueError, LookupError) as error:
        missing = str(error)
    return PointRun(
        mode=mode,
        regime=regime,
        variant=variant,
        point=Point.parse(point),
        run_id=run.info.run_id,
        status=run.info.status,
        reason=run.data.tags.get(names.REASON, ""),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        timings=timings,
        timings_missing=missing,
    )


def _read_artifact(
    client: MlflowClient, run: Run, name: str, load: Callable[[Path], Result]
) -> Result:
    """What `load` makes of the run's file `name`.

    Raises:
        ValueError: it is something else.
        LookupError: it is not there.
    """
    from mlflow.exceptions import MlflowException

    folder = _local_folder(run.info.artifact_uri)
    try:
        if folder is not None:
            if not (folder / name).exists():
                raise FileNotFoundError(folder / name)
            return load(folder / name)
        with tempfile.TemporaryDirectory(prefix="dpsgd-track-") as downloaded:
            return load(Path(client.download_artifacts(run.info.run_id, name, downloaded)))
    except (MlflowException, OSError):
        raise LookupError(f"{name} was not uploaded") from None


def _read_trajectory(client: MlflowClient, run: Run) -> tuple[Trajectory | None, str]:
    try:
        return _read_artifact(client, run, names.TRAJECTORY_FILE, Trajectory.load), ""
    except (ValueError, LookupError) as error:
        missing = str(error)
    run_id = run.info.run_id
    logged = metric_history(client, run_id, metrics_of_trajectory(run.data.metrics))
    history: History = {
        metric: dict(zip(points, restored(list(points.values())).tolist(), strict=True))
        for metric, points in logged.items()
    }
    return rebuilt(history, missing)


def rebuilt(history: History, missing: str) -> tuple[Trajectory | None, str]:
    """What metrics tell of a trajectory, and why there is no more."""
    trajectory = _from_metrics(history)
    if trajectory is None:
        return None, f"{missing}; no metrics were logged"
    steps = f"{trajectory.num_steps} step{'s' * (trajectory.num_steps != 1)}"
    return trajectory, f"{missing}; {steps} read from metric history"


def _local_folder(artifact_uri: str) -> Path | None:
    """Where artifacts are on this machine, so that they need no copy; None for another store."""
    # As MLflow reads it: in a path, `?` and `#` are characters.
    if artifact_uri.startswith("/"):
        return Path(url2pathname(artifact_uri))
    parts = urlparse(artifact_uri)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return None
    return Path(url2pathname(parts.path))


_LAYER_PREFIXES = (names.LAYER_WEIGHT_NORM, names.LAYER_GRAD_NORM)


def metrics_of_trajectory(logged: Iterable[str]) -> list[str]:
    """Those of the metrics that a trajectory holds."""
    return [m for m in logged if m in names.SCALAR_METRICS or m.startswith(_LAYER_PREFIXES)]


def _from_metrics(history: History) -> Trajectory | None:
    # A step that was cut off while it was logged is a missing step, not a NaN.
    whole = [history.get(metric, {}).keys() for metric in ("loss", "grad_norm")]
    steps = sorted(set(whole[0]) & set(whole[1]))
    if not steps:
        return None

    def column(metric: str) -> Floats:
        values = history.get(metric, {})
        return np.array([values.get(step) for step in steps], dtype=np.float64)

    layers = sorted({m.partition("/")[2] for m in history if m.startswith(_LAYER_PREFIXES)})

    def matrix(prefix: str) -> Floats:
        return np.array([column(prefix + layer) for layer in layers]).reshape(-1, len(steps)).T

    S = len(steps)
    scalars: dict[str, Any] = {metric: column(metric) for metric in names.SCALAR_METRICS}
    if "grad_norm_noised" not in history:
        scalars["grad_norm_noised"] = scalars["grad_norm"]
    return Trajectory(
        step=np.array(steps, dtype=np.int64),
        **scalars,
        max_grad_norm=np.full(S, np.nan),
        layer_names=np.array(layers, dtype=np.str_),
        layer_weight_norm=matrix(names.LAYER_WEIGHT_NORM),
        layer_grad_norm=matrix(names.LAYER_GRAD_NORM),
        sample_index=np.empty((S, 0), dtype=np.int64),
        sample_rank=np.empty((S, 0), dtype=np.int64),
        sample_loss=np.empty((S, 0)),
        sample_norm=np.empty((S, 0)),
        clip_factor=np.empty((S, 0)),
        parameter_names=np.array([], dtype=np.str_),
        parameter_sizes=np.array([], dtype=np.int64),
        sample_norm_by_parameter=np.empty((S, 0, 0)),
        gradient_sketch=np.empty((S, 0, 1)),
        noised_sketch=np.empty((S, 0, 1)),
        weight_sketch=np.empty((S, 0, 1)),
        noise_samples=np.empty((S, 0, 0, 0), dtype=np.float32),
        data_hash=np.full(S, "", dtype=np.str_),
        initial_weights_hash="",
        noise_std=float("nan"),
        expected_batch_size=0,
    )
