"""A tracking store in memory, with as much of MLflow's client as shipping and checking use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.entities import DatasetInput, Metric, Param, RunTag

from dpsgd_track.record import names
from dpsgd_track.store.history import as_stored

_QUERY = re.compile(r"tags\.`(?P<tag>[^`]+)` = '(?P<value>[^']*)'")


class Page(list[Any]):
    """A page of runs, the only one."""

    token = None


@dataclass
class StoredRun:
    """A run as the store keeps it."""

    run_id: str
    tags: dict[str, str]
    start_time: int
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, set[tuple[int, int, float | None]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[str, DatasetInput] = field(default_factory=dict)

    def seen(self) -> Any:
        """The run as MLflow returns it."""
        info = SimpleNamespace(run_id=self.run_id, status=self.status, start_time=self.start_time)
        data = SimpleNamespace(tags=self.tags, params=self.params, metrics=self.metrics)
        inputs = SimpleNamespace(dataset_inputs=list(self.inputs.values()))
        return SimpleNamespace(info=info, data=data, inputs=inputs)


class MemoryStore:
    """Stands in for `MlflowClient`."""

    tracking_uri = "memory"

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}

    def contents(self) -> dict[str, tuple[Any, ...]]:
        """Everything that arrived, by the key of its run."""
        return {
            run.tags[names.KEY]: (
                run.status,
                {key: value for key, value in run.tags.items() if key != names.PARENT_RUN},
                run.params,
                run.metrics,
                run.files,
                set(run.inputs),
            )
            for run in self.runs.values()
        }

    def get_experiment(self, experiment_id: str) -> str:
        """The experiment, which is always there."""
        return experiment_id

    def search_runs(
        self, experiment_ids: Sequence[str], filter_string: str = "", **_: object
    ) -> Page:
        """Runs with a tag."""
        query = _QUERY.fullmatch(filter_string)
        assert query is not None
        matches = (
            run for run in self.runs.values() if run.tags.get(query["tag"]) == query["value"]
        )
        return Page(run.seen() for run in matches)

    def create_run(
        self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str
    ) -> Any:
        """A new run."""
        run = StoredRun(f"id-{len(self.runs)}", {**tags, "mlflow.runName": run_name}, start_time)
        self.runs[run.run_id] = run
        return run.seen()

    def get_run(self, run_id: str) -> Any:
        """A run by its id."""
        return self.runs[run_id].seen()

    def delete_run(self, run_id: str) -> None:
        """Forget a run."""
        del self.runs[run_id]

    def update_run(self, run_id: str, status: str) -> None:
        """Set a run's status."""
        self.runs[run_id].status = str(status)

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        """End a run."""
        self.runs[run_id].status = str(status)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
    ) -> None:
        """Add to a run."""
        run = self.runs[run_id]
        run.params.update({param.key: param.value for param in params})
        run.tags.update({tag.key: tag.value for tag in tags})
        for metric in metrics:
            point = (metric.step, metric.timestamp, as_stored(metric.value))
            run.metrics.setdefault(metric.key, set()).add(point)

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        """Add a file to a run."""
        name = Path(path).name
        self.runs[run_id].files[f"{folder}/{name}" if folder else name] = Path(path).read_bytes()

    def log_inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None:
        """Add datasets to a run."""
        self.runs[run_id].inputs |= {each.dataset.digest: each for each in datasets}

    def list_artifacts(self, run_id: str, folder: str | None) -> list[Any]:
        """The files of a run."""
        files = self.runs[run_id].files.items()
        return [SimpleNamespace(path=path, file_size=len(data)) for path, data in files]

    def get_metric_history(self, run_id: str, metric: str) -> list[Any]:
        """All points of a metric."""
        return [
            SimpleNamespace(step=step, timestamp=time_ms, value=float("nan") if v is None else v)
            for step, time_ms, v in self.runs[run_id].metrics.get(metric, ())
        ]
