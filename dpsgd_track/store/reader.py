"""Reads a run group from the tracking server, or from wherever its runs are stored.

The exact record is each mode run's `trajectory.npz`. A run that died before uploading it is
read from its metric history: enough to see its progress, never enough to pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np

from dpsgd_track.config import PROFILE, JobConfig, RegimeConfig, Settings
from dpsgd_track.record import names
from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.record.facts import FACTS, FACTS_FILE, RunFacts
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.plan import PLAN, PLAN_FILE, GroupPlan, RunKey
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.timings import Timings
from dpsgd_track.record.trajectory import SCALAR_METRICS, Floats, Trajectory
from dpsgd_track.redaction import redact_uri
from dpsgd_track.store.client import connect
from dpsgd_track.store.history import History, metric_history, restored
from dpsgd_track.store.scratch import scratch
from dpsgd_track.store.sqlite_file import absolute_uri, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Result = TypeVar("Result")

NEVER_STARTED = "the run was never started"

PAGE_SIZE = 100
"""Runs per request: each comes with all of its tags and params, and the newest group is most often
the one wanted."""
_NEWEST_SHOWN = 5


class GroupNotFound(LookupError):
    """Nothing to compare; the message names the group wanted and the available ones."""


class KeptRun(Protocol):
    """A mode run where it is stored."""

    @property
    def run_id(self) -> str:
        """Id of the run in that place."""

    @property
    def status(self) -> Status:
        """Status of the run."""

    @property
    def tags(self) -> Mapping[str, str]:
        """Tags as the launcher set them."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Last value of each metric."""

    def read(self, name: str, load: Callable[[Path], Result]) -> Result:
        """`load` applied to the run's file `name`.

        Raises:
            ValueError: the file is not what `load` reads.
            LookupError: there is no such file.
        """

    def history(self) -> History:
        """All values of the metrics that a trajectory holds."""


def open_client(tracking_uri: str) -> MlflowClient:
    """A client of the store at `tracking_uri`, which must exist: reading creates nothing.

    Raises:
        GroupNotFound: the SQLite file does not exist.
        ValueError: an SQLite URI without a file.
    """
    path = sqlite_path(tracking_uri)
    if path is not None and not path.is_file():
        raise GroupNotFound(
            f"tracking_uri={redact_uri(tracking_uri)!r}: expected an existing SQLite file. "
            "Launch a group first, or check --tracking-uri."
        )
    # MLflow caches stores by name, which may mean another file by now.
    return connect(absolute_uri(tracking_uri))


def find_group(client: MlflowClient, settings: Settings, wanted: str) -> Run:
    """The group run that `wanted` names: a group's name, a run id, or `latest`.

    The newest of several groups with one name is taken. The id of a mode or rank run stands for its
    group.

    Raises:
        GroupNotFound: the experiment or the group does not exist.
    """
    groups = []
    for run in groups_of(client, settings):
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


def groups_of(client: MlflowClient, settings: Settings) -> Iterator[Run]:
    """The runs of all groups, newest first.

    Raises:
        GroupNotFound: the experiment does not exist.
    """
    experiment = client.get_experiment_by_name(settings.experiment)
    if experiment is None:
        raise GroupNotFound(
            f"experiment={settings.experiment!r}: expected an experiment of "
            f"{redact_uri(settings.tracking_uri)}. Launch a group first, or check --config."
        )
    yield from _search(client, experiment.experiment_id, names.KIND_GROUP)


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
    """Runs of one kind, newest first; children of the run `parent` if given."""
    # Names are matched in Python: a quote in a name would end a filter string. A run id has none.
    child = f" AND tags.`{names.PARENT_RUN}` = '{parent}'" if parent else ""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{names.KIND}` = '{kind}'{child}",
            max_results=PAGE_SIZE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        yield from (run for run in page if names.GROUP in run.data.tags)
        token = page.token
        if not token:
            return


def runs_of(client: MlflowClient, group: Run) -> Iterator[Run]:
    """The run of a group, and its mode runs, newest first."""
    yield group
    yield from _search(client, group.info.experiment_id, names.KIND_MODE, group.info.run_id)


def read_group(client: MlflowClient, settings: Settings, wanted: str) -> Group:
    """The group that `wanted` names, with the trajectory of each mode run.

    Raises:
        GroupNotFound: nothing matches.
    """
    return group_of(client, find_group(client, settings, wanted))


def group_of(client: MlflowClient, run: Run) -> Group:
    """The group of a group run, with the trajectory of each mode run.

    Raises:
        GroupNotFound: the group has no plan that this version reads.
    """
    experiment_id = run.info.experiment_id
    attempts = [
        _StoredRun(client, child)
        for child in _search(client, experiment_id, names.KIND_MODE, run.info.run_id)
    ]
    newest = _newest(attempts)
    ranks = Counter(
        Status(rank.info.status)
        for attempt in newest.values()
        for rank in _search(client, experiment_id, names.KIND_RANK, attempt.run_id)
    )
    return assembled(
        name=run.data.tags[names.GROUP],
        kept=_StoredRun(client, run),
        start_time_ms=run.info.start_time or 0,
        newest=newest,
        rank_statuses=ranks,
        superseded=len(attempts) - len(newest),
    )


def _newest(attempts: Iterable[_StoredRun]) -> dict[RunKey, _StoredRun]:
    """The newest attempt of each run; attempts come newest first."""
    newest: dict[RunKey, _StoredRun] = {}
    for attempt in attempts:
        newest.setdefault(key_of(attempt.tags), attempt)
    return newest


def assembled(
    *,
    name: str,
    kept: KeptRun,
    start_time_ms: int,
    newest: Mapping[RunKey, KeptRun],
    rank_statuses: Mapping[Status, int],
    superseded: int,
) -> Group:
    """A group assembled from its plan and its stored runs.

    Args:
        kept: the group's own run.
        newest: the newest attempt of each mode run.

    Raises:
        GroupNotFound: the group has no plan that this version reads.
    """
    plan = _read_plan(name, kept)
    planned = {key: (job, regime) for key, job, regime in plan.runs()}
    keys = [*planned, *sorted(newest.keys() - planned.keys())]
    runs = [_mode_run(key, newest.get(key), *planned.get(key, (None, None))) for key in keys]
    return Group(
        name=name,
        run_id=kept.run_id,
        start_time_ms=start_time_ms,
        plan=plan,
        runs=tuple(run for run in runs if run.regime != PROFILE),
        timed_runs=tuple(run for run in runs if run.regime == PROFILE),
        rank_statuses=dict(rank_statuses),
        superseded=superseded,
        tags=dict(kept.tags),
    )


def _read_plan(group: str, kept: KeptRun) -> GroupPlan:
    try:
        return kept.read(PLAN_FILE, lambda path: PLAN.loads(path.read_bytes()))
    except LookupError:
        reason = "It has none: it was launched by 0.1, or its launcher died. Launch it again."
    except ValueError as error:
        reason = f"Its {PLAN_FILE} cannot be read: {error}"
    raise GroupNotFound(f"group={group!r}: expected a group with a plan. {reason}")


def key_of(tags: Mapping[str, str]) -> RunKey:
    """The key of a mode run by its tags."""
    return RunKey(
        mode=tags.get(names.MODE, ""),
        regime=tags.get(names.REGIME, ""),
        variant=tags.get(names.VARIANT, ""),
        replay=tags.get(names.REPLAY, ""),
        order=int(tags.get(names.ORDER, 0)),
    )


def _mode_run(
    key: RunKey, kept: KeptRun | None, job: JobConfig | None, setup: RegimeConfig | None
) -> ModeRun:
    trajectory, missing = (None, NEVER_STARTED) if kept is None else _read_record(key, kept)
    facts, damage = _read_facts(kept) if kept else (None, "")
    missing = missing or damage
    timings = trajectory if isinstance(trajectory, Timings) else None
    is_timed = key.regime == PROFILE
    return ModeRun(
        mode=key.mode,
        regime=key.regime,
        variant=key.variant,
        replay=key.replay,
        order=key.order,
        run_id=kept.run_id if kept else "",
        status=kept.status if kept else Status.MISSING,
        job=job.run_in(setup) if job and setup else None,
        setup=setup,
        failure=_read_failure(kept.tags) if kept else None,
        facts=facts,
        metrics=kept.metrics if kept else {},
        trajectory=trajectory if isinstance(trajectory, Trajectory) else None,
        trajectory_missing="" if is_timed else missing,
        timings=timings,
        timings_missing=missing if is_timed else "",
    )


def _read_failure(tags: Mapping[str, str]) -> Failure | None:
    text = tags.get(names.FAILURE, "")
    try:
        return FAILURE.loads(text) if text else None
    except ValueError as error:
        # Somebody has edited the tag; the run's status tells that it failed.
        return Failure(kind=FailureKind.ERROR, message=f"{names.FAILURE}: {error}")


def _read_facts(kept: KeptRun) -> tuple[RunFacts | None, str]:
    """The facts of a run, and why they are missing, which is not reported of an unfinished run."""
    try:
        return kept.read(FACTS_FILE, lambda path: FACTS.loads(path.read_bytes())), ""
    except LookupError:
        is_lost = kept.status is Status.FINISHED
        return None, f"{FACTS_FILE} was not uploaded, or has been removed" * is_lost
    except ValueError as error:
        return None, f"{FACTS_FILE}: {error}".rstrip(".")


def _read_record(key: RunKey, kept: KeptRun) -> tuple[Trajectory | Timings | None, str]:
    """The record of a run, and why it is missing or incomplete."""
    try:
        if key.regime == PROFILE:
            return kept.read(names.TIMINGS_FILE, Timings.load), ""
        return kept.read(names.TRAJECTORY_FILE, Trajectory.load), ""
    except (ValueError, LookupError) as error:
        missing = str(error)
    if key.regime == PROFILE:
        return None, missing
    trajectory = _from_metrics(kept.history())
    if trajectory is None:
        return None, f"{missing}; no metrics were logged"
    steps = f"{trajectory.num_steps} step{'s' * (trajectory.num_steps != 1)}"
    return trajectory, f"{missing}; {steps} read from metric history"


@dataclass(frozen=True)
class _StoredRun:
    """A run on the tracking server."""

    client: MlflowClient
    run: Run

    @property
    def run_id(self) -> str:
        return str(self.run.info.run_id)

    @property
    def status(self) -> Status:
        return Status(self.run.info.status)

    @property
    def tags(self) -> Mapping[str, str]:
        return dict(self.run.data.tags)

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        logged = self.run.data.metrics
        return dict(zip(logged, restored(list(logged.values())).tolist(), strict=True))

    def read(self, name: str, load: Callable[[Path], Result]) -> Result:
        from mlflow.exceptions import MlflowException

        folder = _local_folder(self.run.info.artifact_uri)
        try:
            if folder is not None:
                if not (folder / name).exists():
                    raise FileNotFoundError(folder / name)
                return load(folder / name)
            with scratch() as downloaded:
                return load(Path(self.client.download_artifacts(self.run_id, name, downloaded)))
        except (MlflowException, OSError):
            raise LookupError(f"{name} was not uploaded") from None

    def history(self) -> History:
        wanted = metrics_of_trajectory(self.run.data.metrics)
        logged = metric_history(self.client, self.run_id, wanted)
        return {
            metric: dict(zip(points, restored(list(points.values())).tolist(), strict=True))
            for metric, points in logged.items()
        }


def _local_folder(artifact_uri: str) -> Path | None:
    """Local folder of artifacts, which need no copy then; None for other stores."""
    # As in MLflow, `?` and `#` are characters of a path.
    if artifact_uri.startswith("/"):
        return Path(url2pathname(artifact_uri))
    parts = urlparse(artifact_uri)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return None
    return Path(url2pathname(parts.path))


_LAYER_PREFIXES = (names.LAYER_WEIGHT_NORM, names.LAYER_GRAD_NORM)


def metrics_of_trajectory(logged: Iterable[str]) -> list[str]:
    """Those of `logged` that a trajectory holds."""
    return [m for m in logged if m in SCALAR_METRICS or m.startswith(_LAYER_PREFIXES)]


def _from_metrics(history: History) -> Trajectory | None:
    # A step interrupted while it was logged is missing, not NaN.
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
    scalars: dict[str, Any] = {metric: column(metric) for metric in SCALAR_METRICS}
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
        sample_micro_batch=np.empty((S, 0), dtype=np.int64),
        sample_loss=np.empty((S, 0)),
        sample_norm=np.empty((S, 0)),
        clip_factor=np.empty((S, 0)),
        parameter_names=np.array([], dtype=np.str_),
        parameter_sizes=np.array([], dtype=np.int64),
        sample_norm_by_parameter=np.empty((S, 0, 0)),
        sample_sketch=np.empty((S, 0, 0, 0)),
        sample_shard_sketch=np.empty((S, 0, 0, 0)),
        sample_other_norm=np.empty((S, 0, 0, 0)),
        sample_other_loss=np.empty((S, 0, 0)),
        sample_part_square=np.empty((S, 0, 0, 0)),
        sample_target_loss=np.empty((S, 0, 0)),
        sample_size=np.empty((S, 0, 0)),
        part_sketch=np.empty((S, 0, 0, 0)),
        moved_sketch=np.empty((S, len(SumFormula), 0, 0)),
        gradient_sketch=np.empty((S, 0, 1)),
        noised_sketch=np.empty((S, 0, 1)),
        weight_sketch=np.empty((S, 0, 1)),
        noise_samples=np.empty((S, 0, 0, 0), dtype=np.float32),
        data_hash=np.full(S, "", dtype=np.str_),
        initial_weights_hash="",
        noise_std=float("nan"),
        expected_batch_size=0,
    )
