"""Groups made of arithmetic instead of training: trajectories, and a store that holds them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dpsgd_track.comparison import GroupComparison, compare_group
from dpsgd_track.config import (
    CLIP,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
    Thresholds,
    VariantConfig,
    kind_of,
)
from dpsgd_track.record import names
from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.record.environment import Environment
from dpsgd_track.record.facts import FACTS as FACTS_CODEC
from dpsgd_track.record.facts import FACTS_FILE, DeviceFacts, RunFacts
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.plan import PLAN, PLAN_FILE, STARTED_JOB, GroupPlan, StartedJob, Suite
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.trajectory import SAMPLE_COLUMNS, SCALAR_METRICS, Trajectory

ENVIRONMENT = Environment(
    python="3.12.1",
    platform="Linux",
    cpu="a CPU",
    dpsgd_track="0.2.0",
    torch="2.13.0",
    triton="not installed",
    transformers="5.1",
    opacus="1.6",
    mlflow="3.5",
)
FACTS = RunFacts(
    environment=ENVIRONMENT,
    device=DeviceFacts(torch_num_threads=1, allow_tf32=False, cudnn_allow_tf32=False),
)

NOT_CLIPPING = ("sample_norm", "clip_factor", "sample_norm_by_parameter")


def trajectory(
    *, steps: int = 4, samples: int = 6, layers: int = 3, noise_std: float = 100.0, seed: int = 0
) -> Trajectory:
    """A plausible record; equal arguments make equal records."""
    rng = np.random.default_rng(seed)
    S, N, L, P, K = steps, samples, layers, layers + 1, 8
    by_parameter = rng.uniform(0.5, 2.0, (S, N, P))
    sample_norm = np.sqrt(np.square(by_parameter).sum(axis=2))
    bound = np.median(sample_norm, axis=1, keepdims=True)
    bound[S // 2 + S % 2 :] = 0.1
    accurate = noise_std > 0
    factor = np.ones((S, N)) if accurate else np.minimum(1, bound / sample_norm)
    # From a generator of its own, as the rest of the record must not depend on it.
    sketch = np.random.default_rng(seed + 1).normal(0, 1.0, (S, N, P, K))
    sketch *= (by_parameter / np.sqrt(np.square(sketch).mean(axis=3)))[..., None]
    gradient = np.einsum("sn,snpk->spk", factor, sketch)
    length = np.sqrt(np.square(gradient).mean(axis=2).sum(axis=1))
    grad_norm = length / N
    noised = gradient + rng.normal(0, noise_std, (S, P, K))
    weights = rng.normal(0, 30.0, (P, K)) - 1e-4 * np.cumsum(noised, axis=0)
    return Trajectory(
        step=np.arange(S),
        loss=np.linspace(7.0, 6.5, S),
        grad_norm=grad_norm,
        grad_norm_noised=grad_norm + noise_std,
        clip_fraction=(factor < 1).mean(axis=1),
        max_grad_norm=np.full(S, 1e4) if accurate else bound[:, 0],
        step_time_ms=rng.uniform(90, 110, S),
        peak_memory_gib=np.full(S, 1.5),
        tokens_per_second=np.full(S, 1e4),
        layer_names=np.array([f"model.layers.{i}.self_attn.q_proj" for i in range(L)]),
        layer_weight_norm=rng.uniform(3.0, 4.0, (S, L)),
        layer_grad_norm=rng.uniform(0.1, 0.5, (S, L)),
        sample_index=np.arange(S * N).reshape(S, N),
        sample_rank=np.tile(np.arange(N) * 2 // N, (S, 1)),
        sample_micro_batch=np.tile(np.arange(N) * 4 // N % 2, (S, 1)),
        sample_loss=rng.uniform(6.0, 7.0, (S, N)),
        sample_norm=sample_norm,
        clip_factor=factor,
        parameter_names=np.array([f"model.layers.{i}.weight" for i in range(P)]),
        parameter_sizes=np.zeros(P, dtype=np.int64),
        sample_norm_by_parameter=by_parameter,
        sample_sketch=sketch if not accurate else sketch[..., :0],
        sample_shard_sketch=np.empty((S, N, P, 0)),
        sample_other_norm=np.empty((S, N, P, 0)),
        sample_other_loss=np.empty((S, N, 0)),
        sample_part_square=np.empty((S, N, P, 0)),
        sample_target_loss=np.empty((S, N, 0)),
        sample_size=np.empty((S, N, 0)),
        part_sketch=np.empty((S, 0, P, 0)),
        moved_sketch=np.empty((S, len(SumFormula), P, 0)),
        gradient_sketch=gradient,
        noised_sketch=noised,
        weight_sketch=weights,
        noise_samples=np.empty((S, 0, P, 0), dtype=np.float32),
        data_hash=np.array([f"data-{step}" for step in range(S)]),
        initial_weights_hash="weights",
        noise_std=noise_std,
        expected_batch_size=N,
    )


def without_norms(t: Trajectory) -> Trajectory:
    """`t` as no_dp records it."""
    blank: dict[str, Any] = {name: np.full(getattr(t, name).shape, np.nan) for name in NOT_CLIPPING}
    return replace(t, clip_fraction=np.full(t.num_steps, np.nan), **blank)


def scaled(t: Trajectory, field_name: str, factor: float, at: Any = ...) -> Trajectory:
    """`t` with `field_name` multiplied by `factor` at index `at`."""
    values = getattr(t, field_name).copy()
    values[at] *= factor
    changed: dict[str, Any] = {field_name: values}
    return replace(t, **changed)


def put(t: Trajectory, field_name: str, value: float, at: Any = ...) -> Trajectory:
    """`t` with `field_name` set to `value` at index `at`."""
    values = getattr(t, field_name).copy()
    values[at] = value
    changed: dict[str, Any] = {field_name: values}
    return replace(t, **changed)


def permuted(t: Trajectory) -> Trajectory:
    """`t` with the samples of every step in reverse order."""
    changed: dict[str, Any] = {name: getattr(t, name)[:, ::-1].copy() for name in SAMPLE_COLUMNS}
    return replace(t, **changed)


def first_steps(t: Trajectory, count: int) -> Trajectory:
    """The first `count` steps of `t`."""
    scalars = ("initial_weights_hash", "noise_std", "expected_batch_size")
    whole = (*scalars, "layer_names", "parameter_names", "parameter_sizes", "noise_draws")
    changed: dict[str, Any] = {
        name: getattr(t, name)[:count] for name in t.__dataclass_fields__ if name not in whole
    }
    return replace(t, **changed)


def mode_run(
    mode: str, regime: str = "accuracy", record: Trajectory | None = None, **more: Any
) -> ModeRun:
    """A finished run; by default with the record that its mode and regime call for."""
    status = Status(more.pop("status", Status.FINISHED))
    if record is None and status is Status.FINISHED:
        record = trajectory(noise_std=0.0 if kind_of(regime) == CLIP else 100.0)
        record = without_norms(record) if mode == "no_dp" else record
    settings = {
        "setup": setup(regime, replay=more.get("replay", "")),
        "run_id": "" if status is Status.MISSING else "0" * 32,
    }
    return ModeRun(
        mode=mode, regime=regime, status=status, trajectory=record, **{**settings, **more}
    )


def setup(regime: str, **more: Any) -> RegimeConfig:
    """A regime with noise common to all modes; its optimizer's steps follow no formula."""
    settings = {"num_iter": 4, "noise_matched": True, "optimizer": "adamw"}
    return RegimeConfig(name=regime, **{**settings, **more})


def job(mode: str, *regimes: RegimeConfig, variant: str = "", **more: Any) -> JobConfig:
    """A small job on two ranks."""
    settings: dict[str, Any] = {
        "model": ModelConfig(name="llama-tiny"),
        "data": DataConfig(),
        "performance": PerformanceConfig(),
        "num_ranks": 2,
        "variant": VariantConfig(name=variant, path=variant, root=variant) if variant else None,
    }
    return JobConfig(mode=mode, regimes=regimes, **{**settings, **more})


def started(planned: JobConfig, **more: Any) -> str:
    """A job as a worker is handed it."""
    settings: dict[str, Any] = {"environment": ENVIRONMENT, "work_dir": ""}
    return STARTED_JOB.dumps(StartedJob(job=planned, **{**settings, **more}))


def failed(message: str, kind: FailureKind = FailureKind.ERROR) -> Failure:
    """A failure that is said in `message`."""
    return Failure(kind=kind, message=message)


def plan_of(runs: Iterable[ModeRun], **more: Any) -> GroupPlan:
    """A plan of `runs`, each as a job of its own."""
    jobs = []
    for run in runs:
        regime = run.setup or setup(run.regime, replay=run.replay, order=run.order)
        planned = run.job or job(run.mode, regime, variant=run.variant)
        jobs.append(replace(planned, regimes=(regime,)))
    settings: dict[str, Any] = {
        "suite": Suite.FULL,
        "jobs": tuple(jobs),
        "num_ranks": 2,
        "environment": ENVIRONMENT,
    }
    return GroupPlan(**{**settings, **more})


def healthy_runs() -> list[ModeRun]:
    """Four modes that agree bit by bit, in both regimes, with a replay."""
    return [
        mode_run("no_dp"),
        mode_run("no_dp", replay="permuted", record=permuted(mode_run("no_dp").trajectory)),
        mode_run("flash_fsdp"),
        mode_run("flash_fsdp_fuse"),
        mode_run("reference"),
        mode_run("flash_fsdp", "clip"),
        mode_run("flash_fsdp_fuse", "clip"),
        mode_run("reference", "clip"),
    ]


def with_run(runs: Iterable[ModeRun], changed: ModeRun) -> list[ModeRun]:
    """`runs` with `changed` in the place of the run of the same mode, regime and replay."""

    def key(run: ModeRun) -> tuple[str, ...]:
        return run.mode, run.regime, run.variant, run.replay

    return [changed if key(run) == key(changed) else run for run in runs]


def group_of(runs: Sequence[ModeRun], name: str = "synthetic", **more: Any) -> Group:
    """A group in memory."""
    timed = more.get("timed_runs", ())
    settings = {
        "run_id": "f" * 32,
        "start_time_ms": 1_700_000_000_000,
        "plan": plan_of([*runs, *timed]),
    }
    return Group(name=name, runs=tuple(runs), **{**settings, **more})


def compared(runs: Sequence[ModeRun], **thresholds: float) -> GroupComparison:
    """The comparison of `runs`."""
    return compare_group(group_of(runs), Thresholds(**thresholds))


def verdicts(comparison: GroupComparison) -> dict[str, str]:
    """Verdict by mode."""
    return {mode.label: mode.verdict.value for mode in comparison.modes}


@cache
def empty_tables() -> Path:
    """An SQLite file with MLflow's tables and nothing in them: making one takes seconds."""
    from mlflow import MlflowClient

    folder = tempfile.mkdtemp(prefix="dpsgd-track-tables-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return Path(folder) / "mlflow.db"


@dataclass
class Store:
    """A fresh SQLite store with one experiment."""

    folder: Path
    experiment: str = "dpsgd-track"
    uri: str = ""
    client: Any = None
    experiment_id: str = ""
    _started: int = field(default_factory=lambda: int(time.time() * 1000))

    def __post_init__(self) -> None:
        from mlflow import MlflowClient

        shutil.copy(empty_tables(), self.folder / "mlflow.db")
        self.uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=self.uri)
        self.experiment_id = self.client.create_experiment(
            self.experiment, artifact_location=(self.folder / "artifacts").as_uri()
        )

    def _run(self, name: str, parent: str = "", **tags: str) -> str:
        self._started += 1000
        if parent:
            tags[names.PARENT_RUN] = parent
        run = self.client.create_run(
            self.experiment_id, start_time=self._started, run_name=name, tags=tags
        )
        return str(run.info.run_id)

    def add_group(
        self,
        runs: Sequence[ModeRun],
        name: str = "synthetic",
        expected: Sequence[ModeRun] | None = None,
        plan: str | None = None,
        **planned: Any,
    ) -> str:
        """Write a whole group and return the id of its run.

        Args:
            expected: runs that the plan has (default: `runs`).
            plan: text of the plan's file, in place of a right one.
            planned: fields of the plan.
        """
        group_id = self._run(name, **{names.GROUP: name, names.KIND: names.KIND_GROUP})
        wanted = plan_of(runs if expected is None else expected, **planned)
        text = PLAN.dumps(wanted) if plan is None else plan
        if text:
            self.client.log_text(group_id, text, PLAN_FILE)
        for run in runs:
            self.add_run(run, name, group_id)
        self.client.set_terminated(group_id)
        return group_id

    def add_run(self, run: ModeRun, group: str, group_id: str) -> str:
        """Write one mode run with one rank run."""
        tags = {
            names.GROUP: group,
            names.MODE: run.mode,
            names.REGIME: run.regime,
            names.VARIANT: run.variant,
            names.REPLAY: run.replay,
            names.REASON: run.reason,
            names.FAILURE: FAILURE.dumps(run.failure) if run.failure else "",
        }
        if run.order:
            tags[names.ORDER] = str(run.order)
        run_id = self._run(run.label, group_id, **{**tags, names.KIND: names.KIND_MODE})
        rank_id = self._run("rank 0", run_id, **{**tags, names.KIND: names.KIND_RANK})
        if run.trajectory:
            self.upload(run_id, run.trajectory)
        if run.status is Status.FINISHED:
            self.client.log_text(run_id, FACTS_CODEC.dumps(run.facts or FACTS), FACTS_FILE)
        for each in (run_id, rank_id):
            if run.status is not Status.RUNNING:
                self.client.set_terminated(each, run.status)
        return run_id

    def upload(self, run_id: str, record: Trajectory) -> None:
        """Log `record` as the run's artifact."""
        path = self.folder / names.TRAJECTORY_FILE
        record.save(path)
        self.client.log_artifact(run_id, str(path))
        path.unlink()

    def log_metrics(self, run_id: str, record: Trajectory) -> None:
        """Log the scalars and layer norms of `record` as metric history."""
        for row, step in enumerate(record.step.tolist()):
            for metric in SCALAR_METRICS:
                self.client.log_metric(run_id, metric, getattr(record, metric)[row], step=step)
            for column, layer in enumerate(record.layer_names.tolist()):
                value = record.layer_grad_norm[row, column]
                self.client.log_metric(run_id, names.LAYER_GRAD_NORM + layer, value, step=step)
