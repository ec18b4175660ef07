"""The run tree of one group, built by the launcher, which alone sets run statuses.

It is written to the group's spool, so that no store can block the launcher.
"""

from __future__ import annotations

import getpass
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpsgd_track.config import JobConfig, RegimeConfig
from dpsgd_track.record import names
from dpsgd_track.record.failure import FAILURE, Failure
from dpsgd_track.record.plan import PLAN, PLAN_FILE, GroupPlan
from dpsgd_track.record.run import Status
from dpsgd_track.store.scratch import scratch
from dpsgd_track.store.spool import SpoolWriter

MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
"""Length accepted by all of MLflow's stores."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys, values as text: `{"a": {"b": 1}}` -> `{"a.b": "1"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            flat[f"{prefix}{key}"] = text
    return flat


class RunTree:
    """Group, mode and rank runs of one group. A run is identified by its key in the spool."""

    def __init__(self, writer: SpoolWriter, experiment: str, group: str) -> None:
        """
        Args:
            writer: writes the group's control file.
            experiment: name of the experiment that the runs belong to.
        """
        self._writer = writer
        self._experiment = experiment
        self._open: dict[str, None] = {}
        self._jobs: dict[str, JobConfig] = {}
        self._origin = {
            "mlflow.user": _user_name(),
            "mlflow.source.name": "dpsgd-track",
            "mlflow.source.type": "LOCAL",
        }
        self.group = group
        self.group_run = ""

    def start_group(self, plan: GroupPlan) -> None:
        """Create the group run, with the plan as its artifact."""
        self._know_revision(plan)
        tags = {names.GROUP: self.group, names.KIND: names.KIND_GROUP}
        self.group_run = self._create(self.group, tags, flatten(_summary(plan)))
        self._keep_plan(plan)

    def resume_group(
        self,
        run: str,
        start_ms: int,
        tags: Mapping[str, str],
        plan: GroupPlan,
        *,
        is_elsewhere: bool,
    ) -> None:
        """Resume a group run that ended.

        Args:
            is_elsewhere: True if the rest of the group is in the store and not in this spool.
        """
        self._know_revision(plan)
        self._add_run(run, self.group, tags, {}, time_ms=start_ms, is_resumed=is_elsewhere)
        self._writer.add("reopen", run)
        # The reason of the earlier end no longer applies.
        self._writer.set_tags(run, {names.REASON: "", names.FAILURE: "", names.NOTE: ""})
        self.group_run = run
        self._keep_plan(plan)

    def _know_revision(self, plan: GroupPlan) -> None:
        if revision := plan.environment.git_revision:
            self._origin[names.GIT_COMMIT] = revision

    def _keep_plan(self, plan: GroupPlan) -> None:
        with scratch() as folder:
            path = Path(folder, PLAN_FILE)
            path.write_text(PLAN.dumps(plan, indent=1), encoding="utf-8")
            self._writer.upload(self.group_run, path)

    def start_mode(
        self, job: JobConfig, regime: RegimeConfig, logged: Collection[int]
    ) -> tuple[str, tuple[str, ...]]:
        """Create the runs of one mode in one regime.

        Args:
            logged: ranks that have a run of their own.
        Returns:
            The mode run's key, and the key of each rank's run; empty for one that has none.
        """
        tags = {
            names.GROUP: self.group,
            names.MODE: job.mode,
            names.REGIME: regime.name,
            names.VARIANT: job.variant.name if job.variant else "",
            names.REPLAY: regime.replay,
            names.NOISE_MATCHED: str(regime.noise_matched).lower(),
        }
        which = regime.replay
        if regime.order:
            tags[names.ORDER] = str(regime.order)
            which = f"T{job.data.seq_length}-B{job.data.batch_size}-{regime.order}"
        title = f"{job.label}/{regime.name}" + (f" ({which})" if which else "")
        parent = {names.PARENT_RUN: self.group_run, names.KIND: names.KIND_MODE}
        mode_run = self._create(title, tags | parent, flatten(_settings(job, regime)))
        parent = {names.PARENT_RUN: mode_run, names.KIND: names.KIND_RANK}
        ranks = tuple(
            self._create(f"rank {rank}", tags | parent | {names.RANK: str(rank)}, {})
            if rank in logged
            else ""
            for rank in range(job.num_ranks)
        )
        self._jobs |= dict.fromkeys((mode_run, *ranks), job)
        return mode_run, ranks

    def finish(
        self, run: str, status: Status, failure: Failure | None = None, more: str = ""
    ) -> None:
        """End a run, with the reason if it did not finish.

        Args:
            more: text after the advice, such as the path of the log.
        """
        if failure is not None:
            advice = failure.advice(self.group, self._jobs.get(run))
            self._writer.set_tags(run, tags_of(status, failure, f"{advice} {more}".strip()))
        self._writer.add("end", run, status=status)
        self._open.pop(run, None)

    def finish_open(self, status: Status, failure: Failure) -> None:
        """End all runs of this tree that are still running, the group run last."""
        for run in reversed(list(self._open)):
            self.finish(run, status, failure)

    def _create(self, title: str, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
        run = uuid.uuid4().hex
        self._add_run(run, title, {**self._origin, **tags}, params)
        return run

    def _add_run(
        self,
        run: str,
        title: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        **more: object,
    ) -> None:
        self._writer.add(
            "run",
            run,
            experiment=self._experiment,
            title=title,
            tags=dict(tags),
            params={key: value[:MAX_PARAM_LENGTH] for key, value in params.items()},
            **more,
        )
        self._open[run] = None


def tags_of(status: Status, failure: Failure, advice: str) -> dict[str, str]:
    """Tags with the reason of a run's end: for people, and for programs."""
    note = f"**{status}**: {failure.reason}\n\n{advice}"
    return {
        names.REASON: f"{failure.reason} {advice}"[:MAX_TAG_LENGTH],
        names.NOTE: note[:MAX_TAG_LENGTH],
        names.FAILURE: FAILURE.dumps(failure),
    }


def _settings(job: JobConfig, regime: RegimeConfig) -> dict[str, Any]:
    """All settings of a run."""
    settings = asdict(job.run_in(regime)) | {"regime": asdict(regime)}
    del settings["regimes"]
    if job.variant is None:
        del settings["variant"]
    return settings


def _summary(plan: GroupPlan) -> dict[str, Any]:
    """Parameters for the list of runs; the plan itself is an artifact."""
    first = asdict(plan.jobs[0])
    every = {name: [getattr(job.data, name) for job in plan.jobs] for name in first["data"]}
    return {
        "command": plan.command,
        "suite": plan.suite,
        "modes": list(dict.fromkeys(job.label for job in plan.jobs)),
        "regimes": list(dict.fromkeys(key.regime for key, _, _ in plan.runs())),
        "num_ranks": plan.num_ranks,
        **{name: first[name] for name in ("model", "performance", "seed")},
        **{name: first[name] for name in ("layer_norms", "log_ranks")},
        # Sequence lengths and batch sizes of a profile.
        "data": {name: list(dict.fromkeys(values)) for name, values in every.items()},
        "environment": dict(plan.environment.items()),
    }


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
