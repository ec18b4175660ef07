"""Tags, metric names and file names of the run tree.

Group run -> one run per mode and regime -> one run per rank, nested by `mlflow.parentRunId`.
"""

from __future__ import annotations

PARENT_RUN = "mlflow.parentRunId"
NOTE = "mlflow.note.content"

GROUP = "dpsgd.group"
"""Name of the group; on every run."""
KIND = "dpsgd.kind"
"""group, mode or rank."""
MODE = "dpsgd.mode"
REGIME = "dpsgd.regime"
VARIANT = "dpsgd.variant"
"""Name given by `--variant NAME=PATH`; empty for the installed code."""
RANK = "dpsgd.rank"
REPLAY = "dpsgd.replay"
"""On a run that only measures the floor, which replay it is (config.REPLAYS); else empty."""
ORDER = "dpsgd.order"
"""On a timed run of a profile: its place among them, 1 for the first."""
KEY = "dpsgd.key"
"""What a run is called in the spool; a run that was sent twice is recognised by it."""
REASON = "dpsgd.reason"
"""Why a run failed, with advice, in words for people."""
FAILURE = "dpsgd.failure"
"""The same as JSON (`record.failure.FAILURE`), which is what programs read."""
NOISE_MATCHED = "noise_matched"
"""`true` where all modes of the group added the same noise."""
VERDICT = "dpsgd.verdict"
"""PASS, DRIFT, BUG or INCONCLUSIVE; on the group run, set by `compare`."""

KIND_GROUP, KIND_MODE, KIND_RANK = "group", "mode", "rank"

TRAJECTORY_FILE = "trajectory.npz"
TIMINGS_FILE = "timings.json"
VARIANT_VARIABLE = "DPSGD_TRACK_VARIANT"
"""Environment variable of a variant's workers: the folder whose packages come first."""

EPSILON_RDP, EPSILON_PRV = "epsilon_rdp", "epsilon_prv"
"""Metrics of a private mode's run with noise: epsilon after each step, by two accountants."""
ACCOUNTED_SIGMA = "accounting/sigma"
ACCOUNTED_SAMPLING_RATE = "accounting/sampling_rate"
ACCOUNTED_STEPS = "accounting/steps"
"""What epsilon was computed from; `privacy/accounting.py` says how steps are counted."""

LAYER_WEIGHT_NORM = "layer_weight_norm/"
LAYER_GRAD_NORM = "layer_grad_norm/"
SAMPLE_NORM = "sample_norm/"
CLIP_FACTOR = "clip_factor/"
"""Prefixes; layers by fully qualified name, samples by position in the rank's batch."""
