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
POINT = "dpsgd.point"
"""On a run of a profile, which of its runs it is, as config.Point reads."""
OUT_OF_MEMORY = "dpsgd.out_of_memory"
"""`true` on a run of a profile that failed for want of memory, which is a result."""
KEY = "dpsgd.key"
"""What a run is called in the spool; a run that was sent twice is recognised by it."""
REASON = "dpsgd.reason"
"""Why a run failed, with advice."""
LEFT_OUT = "left_out_steps"
"""Param of a run whose mode takes no empty batches: the steps that have one, comma separated."""
REPLICATED = "is_replicated"
"""Param of a run whose mode holds every parameter whole on every rank: true."""
UNREACHED = "fault.unreached"
"""Param of a run that a fault is planted in: seams that the mode never came by."""
UNEQUAL_NOISE = "copies of the noise differ"
"""Begins the reason of a run that failed for it."""
NOISE_MATCHED = "noise_matched"
"""`true` where all modes of the group added the same noise."""
VERDICT = "dpsgd.verdict"
"""PASS, DRIFT, BUG or INCONCLUSIVE; on the group run, set by compare.py."""
EXPECTED_RUNS = "dpsgd.expected_runs"
"""On the group run: JSON list of the [mode, regime, variant, replay] the launcher set out to do;
in a profile with the point as a fifth. What is too long for a tag goes on in
`dpsgd.expected_runs.2` and so on."""

KIND_GROUP, KIND_MODE, KIND_RANK = "group", "mode", "rank"

TRAJECTORY_FILE = "trajectory.npz"
TIMINGS_FILE = "timings.json"
IMPORTS_FILE = "imports.json"
"""In the work folder of a variant's job: package -> version of what came from the variant."""
VARIANT_VARIABLE = "DPSGD_TRACK_VARIANT"
"""Environment variable of a variant's workers: the folder whose packages come first."""

SCALAR_METRICS = (
    "loss",
    "grad_norm",
    "grad_norm_noised",
    "clip_fraction",
    "step_time_ms",
    "peak_memory_gib",
    "tokens_per_second",
)
"""One value a step; each is a field of `Trajectory` under the same name."""

EPSILON_RDP, EPSILON_PRV = "epsilon_rdp", "epsilon_prv"
"""Metrics of a private mode's run with noise: epsilon after each step, by two accountants."""
ACCOUNTED_SIGMA = "accounting/sigma"
ACCOUNTED_SAMPLING_RATE = "accounting/sampling_rate"
ACCOUNTED_STEPS = "accounting/steps"
"""What epsilon was computed from; `privacy/accounting.py` says how steps are counted."""

PLAN = "plan."
"""Begins the params that say how a mode went about each layer."""

LAYER_WEIGHT_NORM = "layer_weight_norm/"
LAYER_GRAD_NORM = "layer_grad_norm/"
SAMPLE_NORM = "sample_norm/"
CLIP_FACTOR = "clip_factor/"
"""Prefixes; layers by fully qualified name, samples by position in the rank's batch."""
