"""The configuration of a run, as frozen dataclasses that validate themselves.

`PrivacyConfig` holds the settings of the privacy guarantee; `PerformanceConfig` holds those that
may change speed and memory but never the guarantee. Errors read
``{setting}={got!r}: expected {allowed}. {what to do}``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dpsgd_track.redaction import redact_uri
from dpsgd_track.yaml_file import read_yaml

PARAM_DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("sgd", "adamw")
DEVICES = ("cpu", "cuda")
NOISE_FROM = ("seed", "os")

AUTO, GRADIENTS, GRAM, TILED = "auto", "gradients", "gram", "tiled"
PLANS = (AUTO, GRADIENTS, GRAM, TILED)
"""Methods to compute norms of linear layers; `dpsgd_track.privacy.norm_planner` explains each."""

CLASSIFICATION = "sequence-classification"
CAUSAL_LM = "causal-lm"
MASKED_LM = "masked-lm"
REGRESSION = "regression"
IMAGES = "image-classification"
TAGGING = "token-classification"
SEQ2SEQ = "seq2seq"
TASKS = (CLASSIFICATION, CAUSAL_LM, MASKED_LM, REGRESSION, IMAGES, TAGGING, SEQ2SEQ)
"""Prediction tasks; `dpsgd_track.privacy.loss` holds the loss of each."""

PADDINGS = ("right", "left")
SEQUENTIAL = "sequential"
POISSON = "poisson"
SAMPLINGS = (SEQUENTIAL, POISSON)

ACCURACY = "accuracy"
CLIP = "clip"
NOISE = "noise"
TRAIN = "train"
PROFILE = "profile"
"""Regime of timed steps, whose times alone are compared."""
PROBE = "probe-"
"""Prefix of regimes that run on the probe, whatever model the user chose."""
PROBE_ACCURACY, PROBE_CLIP, PROBE_NOISE = (f"{PROBE}{kind}" for kind in (ACCURACY, CLIP, NOISE))
PROBES = (PROBE_ACCURACY, PROBE_CLIP, PROBE_NOISE)
PROBE_NAIVE = f"{PROBE}naive"
"""Regime of a test unaware of the faults: nothing is clipped, next to no noise is added."""
REGIMES = (ACCURACY, CLIP, NOISE, TRAIN, PROFILE, *PROBES, PROBE_NAIVE)


def kind_of(regime: str) -> str:
    """Kind of a regime on any model: accuracy, clip, noise, train or profile."""
    return regime.removeprefix(PROBE)


def is_probe(regime: str) -> bool:
    """True if a regime runs on the probe."""
    return regime.startswith(PROBE)


AGAIN = "again"
"""Replay of the baseline, unchanged."""
PERMUTED = "permuted"
"""Replay of the baseline with the samples of each rank's batch in reverse order."""
ULP = "ulp"
"""Replay of the baseline with every embedded input moved to a neighbouring number."""
PLAIN = "plain"
"""Replay of the reference in the modes' compute type."""
SILENT = "silent"
"""Twin of a run of the noise regime at sigma 0, whose update the noise is measured against."""
REPLAYS = ("", AGAIN, PERMUTED, ULP, PLAIN, SILENT)


def require(condition: bool, setting: str, got: object, allowed: str, advice: str = "") -> None:
    """Raise a ValueError in the project's form unless `condition` holds."""
    if not condition:
        raise ValueError(f"{setting}={got!r}: expected {allowed}. {advice}".rstrip())


_UNITS = {"B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("iB", 1024))
}
_AMOUNT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", re.ASCII)


def num_bytes(memory_budget: int | str | None) -> int | None:
    """Bytes of a number, or of a text such as 2GiB; None of None.

    Raises:
        ValueError: it is neither.
    """
    if memory_budget is None:
        return None
    allowed = "a number of bytes >= 0, or one with a unit, such as '2GiB'"
    if isinstance(memory_budget, str):
        amount = _AMOUNT.fullmatch(memory_budget if memory_budget != "0" else "0B")
        is_known = amount is not None and amount[2] in _UNITS
        require(is_known, "memory_budget", memory_budget, allowed, f"Units: {', '.join(_UNITS)}.")
        assert amount is not None
        return int(float(amount[1]) * _UNITS[amount[2]])
    is_integer = isinstance(memory_budget, Integral) and not isinstance(memory_budget, bool)
    require(is_integer and memory_budget >= 0, "memory_budget", memory_budget, allowed)
    return int(memory_budget)


def require_one_of(setting: str, got: str, known: Iterable[str], advice: str = "") -> None:
    """Raise ValueError unless `got` is one of `known`; it names them, and the nearest."""
    names = tuple(known)
    advice = f"{nearest(got, names)} {advice}".strip()
    require(got in names, setting, got, f"one of {', '.join(names)}", advice)


def nearest(got: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?`; empty where no known name is near."""
    matches = difflib.get_close_matches(got, tuple(known), n=1)
    return f"Did you mean {matches[0]!r}?" if matches else ""


def _is_number(got: float) -> bool:
    """True if `got` is a finite number within a float's range; bools and text are not."""
    if not isinstance(got, Real) or isinstance(got, bool):
        return False
    try:
        return math.isfinite(got)
    except OverflowError:
        return False


def _require_finite(setting: str, got: float, *, above: float | None, allowed: str) -> None:
    ok = _is_number(got) and (got >= 0 if above is None else got > above)
    require(ok, setting, got, allowed)


MAX_GRAD_NORMS = (1e-6, 1e30)
"""Smallest and largest C: the range in which float32 arithmetic keeps the bound.

A gradient element below 2^-63 has a square below 2^-126, which float32 holds with few bits or, on a
device that flushes denormals, as 0. Of N elements a norm of sqrt(N) 2^-63 may thus be lost: 1e-13
of 10^12 elements. In the Gram form the squares are those of a layer's output gradients (or inputs),
and the lost norm is sqrt(T P) 2^-63 times the norm of its inputs: 3e-10 where T P is 10^9 and that
norm 10^5, and 3e-9 for 100 such layers. With a lost norm u, the true squared norm exceeds the
computed one by at most u^2, and a contribution is at most C sqrt(1 + (u/C)^2). From C = 1e-6 on
that is within 1e-5 of C, in the worst case; at 1e-9 it could be 3 C. Clip factors keep full
precision: a norm whose square fits float32 is below 1.9e19, and C over it is a normal number.

A norm of 1.9e19 or more counts as infinite, and its sample is dropped: no larger C clips anything.
Values of C up to 1e30 may stand for "do not clip" while sigma C still fits float32.
"""


def _require_max_grad_norm(got: float) -> None:
    smallest, largest = MAX_GRAD_NORMS
    require(
        _is_number(got) and smallest <= got <= largest,
        "max_grad_norm",
        got,
        f"a number from {smallest:g} to {largest:g}",
        "float32 cannot keep another bound.",
    )


FLAT, AUTOMATIC, PER_LAYER = CLIPPING_RULES = ("flat", "automatic", "per_layer")
"""Rules by which samples are clipped (see `privacy.clipping`)."""


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Settings of the privacy guarantee."""

    noise_multiplier: float
    """sigma: standard deviation of the noise on the clipped sum, in units of C."""
    max_grad_norm: float
    """C: bound on the L2 norm of one sample's contribution, within `MAX_GRAD_NORMS`."""
    expected_batch_size: int
    """Expected samples of a step over all ranks and micro-batches; the divisor."""
    clipping: str = FLAT
    """Rule by which a sample's gradient is clipped: flat, automatic or per_layer (see
    `privacy.clipping`). Under each it adds at most C."""

    def __post_init__(self) -> None:
        require_one_of("clipping", self.clipping, CLIPPING_RULES)
        _require_finite("sigma", self.noise_multiplier, above=None, allowed="a number >= 0")
        _require_max_grad_norm(self.max_grad_norm)
        size = self.expected_batch_size
        is_integer = isinstance(size, Integral) and not isinstance(size, bool)
        require(is_integer and size >= 1, "expected_batch_size", size, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class PerformanceConfig:
    """Settings that may change speed and memory, never the guarantee."""

    device: str = "cpu"
    """Device of the model: cpu or cuda."""
    param_dtype: str = "float32"
    """float32 or bfloat16. The compute type of forward and backward; master weights and reductions
    are float32."""
    reference_dtype: str = "float64"
    """Compute type of the reference: float64 or float32."""
    num_replicas: int = 1
    """Groups of ranks that each hold the whole model. It is sharded within a group (HSDP)."""
    plan: str = AUTO
    """Norm computation of linear layers: auto, gradients, gram or tiled. In flash and fused modes,
    from the per-sample gradients (one backward only), by the Gram form or by the tiled form; auto
    chooses layer by layer."""
    memory_budget: str | None = None
    """Memory on each rank, such as 2GiB, for what modes of one backward keep (default: any). A
    second backward does the layers that do not fit; 0 is two passes."""

    def __post_init__(self) -> None:
        require_one_of("plan", self.plan, PLANS)
        num_bytes(self.memory_budget)
        require_one_of("device", self.device, DEVICES)
        require_one_of("param_dtype", self.param_dtype, PARAM_DTYPES)
        require_one_of("reference_dtype", self.reference_dtype, ("float64", "float32"))
        replicas = self.num_replicas
        is_integer = isinstance(replicas, Integral) and not isinstance(replicas, bool)
        require(is_integer and replicas >= 1, "replicas", replicas, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model and the source of its weights."""

    name: str
    """A preset (`llama-tiny`), a local folder, a hub id (`org/model`), or a function that returns
    a model (`package.module:build_model`)."""
    vocab_size: int | None = None
    """Tokens in the vocabulary of a preset, or of your own model (default: its own)."""
    num_labels: int = 2
    """Classes of synthetic samples, where the task has classes."""
    task: str = CLASSIFICATION
    """Prediction task: sequence-classification, causal-lm, masked-lm, regression,
    image-classification, token-classification or seq2seq."""
    dropout: bool = False
    """Keep the model's dropout rates, with the same masks in all modes."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model_name", self.name, "a preset, a folder or a hub id")
        require_one_of("task", self.task, TASKS)
        require(
            self.vocab_size is None or self.vocab_size >= 2,
            "vocab_size",
            self.vocab_size,
            "an integer >= 2",
        )
        require(self.num_labels >= 2, "num_labels", self.num_labels, "an integer >= 2")


EVERY, ENDS = "all", "ends"
"""Choices of steps or ranks in place of a number."""


def layer_norm_steps(layer_norms: str, num_iter: int) -> frozenset[int]:
    """Steps of `num_iter` whose layer norms are recorded, the first and the last among them.

    Raises:
        ValueError: `layer_norms` is none of all, ends, and an integer >= 1.
    """
    last = num_iter - 1
    if layer_norms == ENDS:
        return frozenset((0, last))
    is_known = layer_norms == EVERY or re.fullmatch(r"[1-9][0-9]{0,8}", layer_norms, re.ASCII)
    require(bool(is_known), "layer_norms", layer_norms, "all, ends, or an integer N >= 1")
    stride = 1 if layer_norms == EVERY else int(layer_norms)
    return frozenset((*range(0, num_iter, stride), last))


def logged_ranks(log_ranks: str, num_ranks: int) -> tuple[int, ...]:
    """Ranks of a group that have a run of their own: evenly spaced, rank 0 among them.

    Raises:
        ValueError: `log_ranks` is neither all nor an integer >= 0.
    """
    is_known = log_ranks == EVERY or re.fullmatch(r"[0-9]{1,9}", log_ranks, re.ASCII)
    allowed = "all, 0 for rank 0 alone, or a number of ranks"
    require(bool(is_known), "log_ranks", log_ranks, allowed)
    wanted = num_ranks if log_ranks == EVERY else min(max(1, int(log_ranks)), num_ranks)
    return tuple(number * num_ranks // wanted for number in range(wanted))


SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The samples of a run: source, shape and sampling."""

    source: str = SYNTHETIC
    """`synthetic`, a bundled corpus's name, a path to a .jsonl or .csv file, or a folder with one
    folder of images for each class."""
    seq_length: int = 64
    """Tokens in a sample, padding included. In seq2seq, of its source and of its target each."""
    batch_size: int = 2
    """Samples in a micro-batch of a rank. With Poisson sampling, an upper bound."""
    padding: str = "right"
    """Side that short samples are padded on: right or left."""
    ragged: bool = False
    """Give synthetic samples unequal lengths. They are a quarter of `--seq-length` and more."""
    sampling: str = SEQUENTIAL
    """Draw of samples: sequential (the next ones) or poisson (each independently)."""
    dataset_size: int | None = None
    """Number of synthetic samples that Poisson sampling draws from (default: none). Text has its
    own number of rows."""
    image_size: int | None = None
    """Height and width of an image in pixels (default: the model's own, else 224)."""

    def __post_init__(self) -> None:
        is_size = self.image_size is None or self.image_size >= 1
        require(is_size, "image_size", self.image_size, "an integer >= 1")
        require(self.seq_length >= 1, "seq_length", self.seq_length, "an integer >= 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "an integer >= 1")
        require_one_of("padding", self.padding, PADDINGS)
        is_synthetic = self.source == SYNTHETIC
        require(
            is_synthetic or not self.ragged,
            "ragged",
            self.ragged,
            "no --ragged but with synthetic data",
            "Text has lengths of its own.",
        )
        require_one_of("sampling", self.sampling, SAMPLINGS)
        if is_synthetic and self.sampling == POISSON:
            size = self.dataset_size
            require(
                size is not None and size >= 1,
                "dataset_size",
                size,
                "an integer >= 1 with synthetic data and Poisson sampling",
                "Give --dataset-size.",
            )
        else:
            require(
                self.dataset_size is None,
                "dataset_size",
                self.dataset_size,
                "no value but with synthetic data and Poisson sampling",
                "Leave it out.",
            )


PROBE_MODEL = ModelConfig(name="dpsgd-track/probe", task=CAUSAL_LM)
PROBE_DATA = DataConfig(seq_length=17, batch_size=5, ragged=True)
"""Sizes that differ from all others, and from any factor that a likely fault introduces."""


@dataclass(frozen=True, kw_only=True)
class RegimeConfig:
    """One pass over fresh weights: its steps, their shape and their privacy settings."""

    name: str
    """One of REGIMES."""
    num_iter: int
    """Recorded steps."""
    warmup_iter: int = 0
    """Steps computed before the recorded ones, on the same weights, and discarded."""
    micro_batches: int = 1
    """Micro-batches accumulated by a rank per step (K)."""
    noise_multiplier: float = 0.0
    """sigma of this regime."""
    max_grad_norms: tuple[float, ...] = ()
    """C of each recorded step; empty in the clip regime of the mode that calibrates it."""
    learning_rate: float = 0.0
    """Step size of the optimizer."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    noise_matched: bool = False
    """All modes add the common noise, a function of (seed, step, parameter, element)."""
    replay: str = ""
    """again, permuted, ulp or plain for a run that only measures the numerical floor; silent for
    the twin of a noisy run; else empty."""
    clipping: str = FLAT
    """Rule by which samples are clipped: flat, automatic or per_layer."""
    order: int = 0
    """Position among the timed runs of a profile, 1 for the first; 0 elsewhere."""

    @property
    def kind(self) -> str:
        """accuracy, clip, noise, train or profile."""
        return kind_of(self.name)

    def __post_init__(self) -> None:
        require_one_of("regime", self.name, REGIMES)
        require_one_of("replay", self.replay, REPLAYS)
        require_one_of("clipping", self.clipping, CLIPPING_RULES)
        is_timed = self.name == PROFILE
        require(self.order >= 0 and (is_timed or not self.order), "order", self.order, "0")
        require(self.num_iter >= 1, "num_iter", self.num_iter, "an integer >= 1")
        require(self.warmup_iter >= 0, "warmup_iter", self.warmup_iter, "an integer >= 0")
        require(self.micro_batches >= 1, "micro_batches", self.micro_batches, "an integer >= 1")
        _require_finite("sigma", self.noise_multiplier, above=None, allowed="a number >= 0")
        for bound in self.max_grad_norms:
            _require_max_grad_norm(bound)
        require(
            len(self.max_grad_norms) in (0, self.num_iter),
            "max_grad_norms",
            self.max_grad_norms,
            f"one value for each of the {self.num_iter} steps",
        )
        _require_finite("learning_rate", self.learning_rate, above=None, allowed="a number >= 0")
        require_one_of("optimizer", self.optimizer, OPTIMIZERS)


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """Other code, or other settings, with which a job runs once more."""

    name: str
    """Name of the variant, as in `mode@name`."""
    path: str
    """The checkout, or the settings as `OPTION=VALUE,...`, as the user gave it."""
    root: str
    """Absolute path of the code's packages, first on the import path of the workers; empty if only
    settings are others."""
    git_revision: str = ""
    """Commit of the checkout; empty if it is not a repository."""
    git_dirty: bool = False
    """True if the checkout has uncommitted changes."""

    @property
    def option(self) -> str:
        """The value of `--variant` that asks for it."""
        return f"{self.name}{'=' if self.root else ':'}{self.path}"


@dataclass(frozen=True, kw_only=True)
class NodesConfig:
    """The machines that a group runs on, one launcher each; node 0 leads."""

    num_nodes: int = 1
    """Machines."""
    node_rank: int = 0
    """Index of this machine."""
    host: str = ""
    """Name or address of node 0, as the others reach it; empty for a single machine."""
    port: int = 0
    """Port of node 0's store."""

    def __post_init__(self) -> None:
        require(self.num_nodes >= 1, "nnodes", self.num_nodes, "an integer >= 1")
        allowed = f"0 to {self.num_nodes - 1}, where --nnodes is {self.num_nodes}"
        require(0 <= self.node_rank < self.num_nodes, "node_rank", self.node_rank, allowed)

    @property
    def endpoint(self) -> str:
        """HOST:PORT of node 0."""
        return f"{self.host}:{self.port}"

    @property
    def leads(self) -> bool:
        """True if this machine's launcher keeps the group's runs."""
        return self.node_rank == 0


@dataclass(frozen=True, kw_only=True)
class DrawsConfig:
    """Sources of randomness, and the delta of the guarantee."""

    seed: int = 42
    """Seed of data, weights and common noise. Each has its own generator."""
    noise_from: str = "seed"
    """Source of the modes' own noise in the noise and train regimes and in a profile: seed (the
    same in every run) or os (the operating system's entropy)."""
    delta: float = 1e-5
    """Delta of the (epsilon, delta) guarantee that is recorded."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "random_seed", self.seed, "an integer from 0 to 2^63 - 1")
        require_one_of("noise_from", self.noise_from, NOISE_FROM)
        require(0 < self.delta < 1, "delta", self.delta, "a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class JobConfig(DrawsConfig):
    """One process group: one mode, and its regimes in turn."""

    mode: str
    """A mode's name, `opacus:GRAD_SAMPLE_MODE`, or `package.module:factory`."""
    model: ModelConfig
    data: DataConfig
    performance: PerformanceConfig
    regimes: tuple[RegimeConfig, ...]
    num_ranks: int = 1
    """Processes of the process group."""
    layer_norms: str = EVERY
    """Steps whose per-layer norms are recorded: all, ends (first and last), or an integer N (every
    Nth, the first and the last)."""
    log_ranks: str = EVERY
    """Ranks that have a run of their own: all, 0 (rank 0 alone), or how many."""
    system_metrics: bool = False
    """True if ranks log the use of their machine's processors and memory at each step."""
    variant: VariantConfig | None = None
    """Code that runs instead of the installed packages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.regimes), "regimes", self.regimes, "at least one regime")
        replicas = self.performance.num_replicas
        allowed = f"a divisor of the number of ranks, {self.num_ranks}"
        require(self.num_ranks % replicas == 0, "replicas", replicas, allowed)
        layer_norm_steps(self.layer_norms, 1)
        logged_ranks(self.log_ranks, self.num_ranks)

    @property
    def label(self) -> str:
        """Name of the job: `mode` or `mode@variant`."""
        return f"{self.mode}@{self.variant.name}" if self.variant else self.mode

    @property
    def is_timed(self) -> bool:
        """True if the job has a timed regime."""
        return any(regime.kind == PROFILE for regime in self.regimes)

    @property
    def title(self) -> str:
        """`label`, with the shape of a timed job: `no_dp (T=64, B=2)`."""
        shape = f" (T={self.data.seq_length}, B={self.data.batch_size})"
        return self.label + (shape if self.is_timed else "")

    def run_in(self, regime: RegimeConfig) -> JobConfig:
        """The job with the model and data of `regime`: the probe's, or the user's."""
        if not is_probe(regime.name):
            return self
        padding = "left" if regime.name == PROBE_CLIP else "right"
        return replace(self, model=PROBE_MODEL, data=replace(PROBE_DATA, padding=padding))


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds above which drift is not acceptable."""

    loss: float = 1e-4
    """Largest acceptable absolute difference of a loss."""
    grad_norm: float = 1e-3
    """Largest acceptable relative difference of a gradient norm (total, layer or sample)."""
    bug: float = 1e-2
    """Relative difference above which drift is called a bug."""

    def __post_init__(self) -> None:
        for name in ("loss", "grad_norm", "bug"):
            _require_finite(
                f"thresholds.{name}", getattr(self, name), above=0.0, allowed="a number > 0"
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of `mlflow.yaml`. Relative paths are relative to the working directory."""

    tracking_uri: str = "sqlite:///mlflow.db"
    """Tracking store: a SQLAlchemy URI or http(s)://host:port."""
    experiment: str = "dpsgd-track"
    """MLflow experiment of all groups."""
    artifact_location: str | None = "mlartifacts"
    """Folder or URI for artifacts of a new experiment; null lets the server decide."""
    results_dir: str = "results"
    """Folder that `compare` writes <group>/ into."""
    spool_dir: str = "spool"
    """Folder that records are kept in until the store has them."""
    log_ranks: str = EVERY
    """Ranks that have a run of their own: all, 0 (rank 0 alone), or how many, evenly spaced."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Verdict thresholds."""

    def __post_init__(self) -> None:
        for name in ("tracking_uri", "experiment", "results_dir", "spool_dir"):
            value = getattr(self, name)
            require(isinstance(value, str) and bool(value), name, value, "a non-empty string")
        place = self.artifact_location
        is_place = place is None or (isinstance(place, str) and bool(place))
        require(is_place, "artifact_location", place, "a non-empty string, or null")
        schemes = ("sqlite:", "postgresql", "mysql", "http://", "https://")
        require(
            self.tracking_uri.startswith(schemes),
            "tracking_uri",
            redact_uri(self.tracking_uri),
            "a URI that starts with sqlite:, postgresql, mysql, http:// or https://",
            "MLflow's file store is not supported.",
        )
        _require_plain_credentials(self.tracking_uri)
        logged_ranks(self.log_ranks, 1)


def _require_plain_credentials(uri: str) -> None:
    """Refuse a password that would be taken for something else, and turn up in messages."""
    scheme, _, rest = uri.partition("://")
    if scheme.startswith("sqlite"):
        return
    is_plain = "***" not in redact_uri(uri).partition("?")[0] or re.match(
        r"[^/?#@]*@[^@]*(\?|$)", rest
    )
    allowed = "a user name and password in which / ? # and @ are written %2F %3F %23 and %40"
    require(bool(is_plain), "tracking_uri", redact_uri(uri), allowed)


def load_settings(path: Path | None) -> Settings:
    """Settings from `path`; the defaults when `path` is None.

    Raises:
        ValueError: the file is missing, is no YAML in UTF-8, or has an unknown key or value.
    """
    if path is None:
        return Settings()
    try:
        raw = read_yaml("config", path)
    except FileNotFoundError:
        raise ValueError(
            f"config={str(path)!r}: expected an existing file. Check --config."
        ) from None
    raw = {} if raw is None else raw
    require(isinstance(raw, Mapping), "config", str(path), "a mapping of settings at the top")
    values = _known_keys(Settings, raw, where=str(path))
    if "log_ranks" in values:
        # YAML parses a number of ranks as an integer; anything else is refused as written.
        values["log_ranks"] = str(values["log_ranks"])
    if "thresholds" in values:
        section = values["thresholds"]
        require(isinstance(section, Mapping), "thresholds", section, "a mapping of numbers")
        thresholds = _known_keys(Thresholds, section, where=f"{path}, thresholds")
        for key, value in thresholds.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # YAML 1.1 reads 1e-4 (no dot) as a string.
            if isinstance(value, str):
                try:
                    thresholds[key], is_number = float(value), True
                except ValueError:
                    is_number = False
            require(is_number, f"thresholds.{key}", value, "a number")
        values["thresholds"] = Thresholds(**thresholds)
    return Settings(**values)


def _known_keys(cls: type, raw: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        require(key in names, "key", key, f"one of {', '.join(names)}", f"It stands in {where}.")
    return dict(raw)
