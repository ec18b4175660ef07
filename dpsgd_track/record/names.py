"""Tags, metric names and file names of the run tree.

Group run -> one run per mode and regime -> one run per rank, nested by `mlflow.parentRunId`.
"""

from __future__ import annotations

import re

PARENT_RUN = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
GIT_COMMIT = "mlflow.source.git.commit"

GROUP = "dpsgd.group"
"""Name of the group, set on every run."""
KIND = "dpsgd.kind"
"""group, mode or rank."""
MODE = "dpsgd.mode"
REGIME = "dpsgd.regime"
VARIANT = "dpsgd.variant"
"""Name given by `--variant NAME=PATH`; empty for the installed code."""
RANK = "dpsgd.rank"
REPLAY = "dpsgd.replay"
"""Kind of replay (config.REPLAYS) on a run that only measures the floor; else empty."""
ORDER = "dpsgd.order"
"""Position among the timed runs of a profile, 1 for the first."""
KEY = "dpsgd.key"
"""Key of the run in the spool, by which a run that was sent twice is recognised."""
REASON = "dpsgd.reason"
"""Reason of a failure with advice, for people."""
FAILURE = "dpsgd.failure"
"""The failure as JSON (`record.failure.FAILURE`), for programs."""
NOISE_MATCHED = "noise_matched"
"""`true` where all modes of the group added the same noise."""
VERDICT = "dpsgd.verdict"
"""PASS, DRIFT, BUG or INCONCLUSIVE; on the group run and on mode runs, set by `compare`."""

DRIFT_OF_LIMIT = "drift_of_limit"
"""Metric: the largest drift as a share of its limit; above 1 is too much. Set by `compare`."""
COST = "cost"
"""Metric: step time over that of ordinary training, from a profile. Set by `compare`."""

KIND_GROUP, KIND_MODE, KIND_RANK = "group", "mode", "rank"

TRAJECTORY_FILE = "trajectory.npz"
TIMINGS_FILE = "timings.json"
GOLDEN_SUFFIX, GOLDEN_TEXT_SUFFIX = ".dpsgd", ".dpsgd.json"
"""Suffixes that tell a golden file, packed or as text, from a group's name."""
GOLDEN_SUFFIXES = (GOLDEN_SUFFIX, GOLDEN_TEXT_SUFFIX)
VARIANT_VARIABLE = "DPSGD_TRACK_VARIANT"
"""Environment variable of a variant's workers: the folder put first on the import path."""

EPSILON_RDP, EPSILON_PRV = "epsilon_rdp", "epsilon_prv"
"""Metrics of a private mode's run with noise: epsilon after each step, by two accountants."""
ACCOUNTED_SIGMA = "accounting/sigma"
ACCOUNTED_SAMPLING_RATE = "accounting/sampling_rate"
ACCOUNTED_STEPS = "accounting/steps"
"""Number of steps that epsilon was computed from, as counted by `privacy/accounting.py`."""

LAYER_WEIGHT_NORM = "layer_weight_norm/"
LAYER_GRAD_NORM = "layer_grad_norm/"
SAMPLE_NORM = "sample_norm/"
CLIP_FACTOR = "clip_factor/"
"""Prefixes of metrics: layers by fully qualified name, samples by position in the rank's batch."""


CHARTED = ("loss", "grad_norm")
"""Metrics of every mode that the group's run has as well."""
_NOT_IN_A_METRIC = re.compile(r"[^\w.: -]+")
_LONGEST_LABEL = 120


def group_metric(metric: str, regime: str, label: str) -> str:
    """Name under which the group run has `metric` of one mode: `loss/accuracy/flash_fsdp`.

    The MLflow UI takes all up to the last slash as a section of charts.
    """
    return metric_of(f"{metric}/{regime}", label)


def metric_of(prefix: str, label: str) -> str:
    """Name of a metric of the mode `label`, which may have characters that no metric's name has."""
    return f"{prefix}/{_NOT_IN_A_METRIC.sub('-', label)[:_LONGEST_LABEL]}"


def stacks_file(rank: int) -> str:
    """Name of the file with the stacks of a rank that makes no progress, in its work folder."""
    return f"stacks-rank{rank}.txt"
