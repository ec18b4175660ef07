"""The choices of a launch, by group. The options of the command line are these fields.

A field of a configuration is inherited from it, with its name, default, type and docstring. A
field that was not chosen is empty or None.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dpsgd_track.config import (
    EVERY,
    FLAT,
    SYNTHETIC,
    DataConfig,
    ModelConfig,
    NodesConfig,
    PerformanceConfig,
    Settings,
    load_settings,
    require,
)
from dpsgd_track.launcher.hardware import count_gpus
from dpsgd_track.store.sqlite_file import sqlite_path

DEFAULT_CONFIG = Path("mlflow.yaml")
CPU_RANKS = 2
MINILM, MINILM_DATA = "minilm", "public-domain"


@dataclass(frozen=True, kw_only=True)
class ModeChoices:
    """Modes and regimes to run."""

    mode: tuple[str, ...] = ()
    """Mode to run, repeatable (default: the suite's). Several may be comma separated; they replace
    the suite's modes."""
    regime: tuple[str, ...] = ()
    """Regime to run: accuracy, clip, noise, probe-accuracy, probe-clip or probe-noise, repeatable
    or comma separated (default: accuracy and clip; in quick all but noise)."""
    accuracy_test: bool = False
    """Run the accuracy regime alone. Data and noise are the same in every mode."""
    variant: tuple[str, ...] = ()
    """NAME=PATH: run the modes once more, as mode@NAME, with the code of PATH (default: none). PATH
    is a checkout or a folder of `pip install --target`, or REVISION@REPOSITORY; a REVISION alone is
    one of the repository you are in. Of an Opacus, its own modes run. NAME:OPTION=VALUE runs them
    with another plan, replicas, gradient-checkpointing or memory-budget. Repeatable."""


@dataclass(frozen=True, kw_only=True)
class SingleChoices(ModeChoices):
    """The one mode to run."""

    mode: tuple[str, ...] = ()
    """Mode to run (default: none; single needs exactly one)."""
    accuracy_test: bool = False
    """Run the accuracy regime instead of plain training. Its data and noise are those of every
    other mode's accuracy test."""


@dataclass(frozen=True, kw_only=True)
class ProfileChoices(ModeChoices):
    """Modes and shapes to time."""

    mode: tuple[str, ...] = ()
    """Mode to time against no_dp, repeatable or comma separated (default: those of full)."""
    accuracy_test: bool = False
    """Also run the accuracy regime. Each mode runs it after its timed steps, at the first sequence
    length and batch size alone."""
    seq_length: tuple[str, ...] = ("64", "256")
    """N,...: tokens in a sample. Repeatable or comma separated. Every length is run with every
    batch size."""
    batch_size: tuple[str, ...] = ("2",)
    """N,...: samples in a micro-batch of a rank. Repeatable or comma separated."""
    rounds: int = 1
    """Number of times that every mode is timed at every shape. Each is in fresh processes, as the
    times of short steps differ from process to process."""
    max_slowdown: float | None = None
    """X: most time of a step, over no_dp's (default: any). A mode that takes more makes the exit
    code 1."""
    max_memory: float | None = None
    """X: most peak memory, over no_dp's (default: any). A mode that takes more makes the exit
    code 1."""

    def limits(self) -> dict[str, float]:
        """The limits that were chosen, by option.

        Raises:
            ValueError: one is not above 0.
        """
        chosen = {"max_slowdown": self.max_slowdown, "max_memory": self.max_memory}
        limits = {name: limit for name, limit in chosen.items() if limit is not None}
        for name, limit in limits.items():
            require(0 < limit < math.inf, name, limit, "a number above 0")
        return limits


@dataclass(frozen=True, kw_only=True)
class FaultChoices:
    """Faults to plant."""

    fault: tuple[str, ...] = ()
    """Fault to plant, or a class of faults, repeatable or comma separated (default: all)."""
    mode: tuple[str, ...] = ()
    """Mode to plant every fault in, repeatable or comma separated (default: each fault in one of
    the sharded flash modes, in turn)."""
    list: bool = False
    """List the faults, and run nothing."""


def _as(cls: type, choices: object) -> dict[str, Any]:
    """The fields that `choices` inherited from `cls`."""
    return {each.name: getattr(choices, each.name) for each in fields(cls)}


@dataclass(frozen=True, kw_only=True)
class ModelChoices(ModelConfig):
    """Choice of the model."""

    name: str = ""
    """Preset, local folder or hub id (default: the suite's). minilm in quick, llama-3.2-1b in full
    on cuda, else llama-tiny. Or package.module:build_model, a function without arguments that
    returns a model of your own. A folder without weights is built with random ones."""
    token: str | None = None
    """TOKEN: access token of the hub, handed to workers as HF_TOKEN and written nowhere (default:
    HF_TOKEN). Setting HF_TOKEN keeps it out of the process list as well."""

    def __post_init__(self) -> None:
        """Defer checks to the configuration, once the name is known."""

    def config(self, default_name: str) -> ModelConfig:
        """The configuration of the model, `default_name` unless one was chosen."""
        if self.token is not None:
            advice = "Leave it out to use HF_TOKEN."
            require(bool(self.token.strip()), "token", "", "a token", advice)
        return ModelConfig(**{**_as(ModelConfig, self), "name": self.name or default_name})


@dataclass(frozen=True, kw_only=True)
class DataChoices(DataConfig):
    """Choice of the data."""

    source: str = ""
    """synthetic, public-domain, or a file or folder (default: public-domain for minilm, else
    synthetic). A .jsonl or .csv file has text and label; for token-classification a .jsonl file has
    tokens and labels, for seq2seq source and target; for image-classification a folder has one
    folder of images for each class."""
    # None where it was not chosen, which no configuration is.
    seq_length: int | None = None  # type: ignore[assignment]
    """Tokens in a sample, padding included (default: the suite's). 64, but in full on cuda 1024, or
    the model's limit if that is lower."""

    def __post_init__(self) -> None:
        """Defer checks to the configuration, once the source is known."""

    def config(self, model_name: str, seq_length: int) -> DataConfig:
        """The configuration of the data, by default those that suit the model.

        Args:
            seq_length: used unless one was chosen.
        """
        default = MINILM_DATA if model_name == MINILM else SYNTHETIC
        length = seq_length if self.seq_length is None else self.seq_length
        chosen = {"source": self.source or default, "seq_length": length}
        return DataConfig(**{**_as(DataConfig, self), **chosen})


@dataclass(frozen=True, kw_only=True)
class TrainingChoices:
    """Training settings."""

    num_iter: int | None = None
    """Recorded steps (default: the suite's). 5 in quick and in full on cuda, else 10. They are
    those of the accuracy and train regimes; the others have fixed numbers of steps."""
    warmup_iter: int | None = None
    """Discarded steps before the recorded ones (default: 1 on cuda, else 0)."""
    micro_batches: int | None = None
    """Micro-batches that a rank accumulates in a step (default: 2 in clip, 3 in noise, 1 in
    train)."""
    noise_multiplier: float = 0.01
    """Noise multiplier: standard deviation of the noise, in units of C."""
    max_grad_norm: float = 10000.0
    """C, the bound on the L2 norm of each sample's gradient."""
    clipping: str = FLAT
    """Rule by which each sample is clipped: flat, automatic or per_layer, in every regime."""
    learning_rate: float = 1e-5
    """Step size of the optimizer."""
    optimizer: str = "sgd"
    """Update rule: sgd or adamw."""


@dataclass(frozen=True, kw_only=True)
class ProfileTrainingChoices(TrainingChoices):
    """Training settings of timed runs."""

    num_iter: int | None = None
    """Recorded steps (default: 10). Loss and layer norms are observed in every second one."""
    warmup_iter: int | None = None
    """Discarded steps before the recorded ones (default: 3)."""
    micro_batches: int | None = None
    """Micro-batches that a rank accumulates in a timed step (default: 1)."""


@dataclass(frozen=True, kw_only=True)
class MachineChoices(PerformanceConfig):
    """Device and ranks."""

    device: str = ""
    """cpu or cuda (default: cuda if there is one)."""
    param_dtype: str = ""
    """float32 or bfloat16 (default: the suite's). bfloat16 in full on cuda, else float32. It is the
    compute type of forward and backward; master weights and reductions are float32."""
    nproc_per_node: int | None = None
    """Ranks on each machine (default: one per GPU, or 2 on cpu). Each is one process."""

    def __post_init__(self) -> None:
        """Defer checks to the configuration, once the device is known."""

    def config(self, gpu_dtype: str) -> tuple[int, PerformanceConfig]:
        """Ranks on this machine, and their performance settings.

        Args:
            gpu_dtype: compute type on cuda, unless one was chosen.

        Raises:
            ValueError: the machine has no such device, or too few.
        """
        num_gpus = count_gpus() if self.device != "cpu" else 0
        device = self.device or ("cuda" if num_gpus else "cpu")
        dtype = self.param_dtype or (
            gpu_dtype if device == "cuda" else PerformanceConfig.param_dtype
        )
        chosen = {"device": device, "param_dtype": dtype}
        performance = PerformanceConfig(**{**_as(PerformanceConfig, self), **chosen})
        per_node = num_gpus if device == "cuda" else CPU_RANKS
        num_ranks = per_node if self.nproc_per_node is None else self.nproc_per_node
        if device == "cuda":
            advice = "Use --device cpu."
            require(num_gpus > 0, "device", device, "cpu, as no GPU is visible", advice)
        require(num_ranks >= 1, "nproc_per_node", num_ranks, "an integer >= 1")
        if device == "cuda":
            allowed = f"at most {num_gpus}, the number of visible GPUs"
            require(num_ranks <= num_gpus, "nproc_per_node", num_ranks, allowed)
        return num_ranks, performance


@dataclass(frozen=True, kw_only=True)
class NodeChoices:
    """Rendezvous of several machines: the same command on each, with another --node-rank."""

    nnodes: int = 1
    """Number of machines, each with its own launcher."""
    node_rank: int | None = None
    """Index of this machine, from 0 (default: none; needed with --nnodes). Node 0 leads, and keeps
    the group's runs."""
    rdzv_endpoint: str | None = None
    """HOST:PORT: address of node 0 and a free port there (default: none; needed with --nnodes)."""
    rdzv_timeout: float = 600.0
    """Seconds to wait for the other machines before anything starts."""

    def config(self) -> NodesConfig:
        """Configuration of the machines.

        Raises:
            ValueError: the choices do not fit each other.
        """
        num_nodes, rank, endpoint = self.nnodes, self.node_rank, self.rdzv_endpoint
        require(num_nodes >= 1, "nnodes", num_nodes, "an integer >= 1")
        if num_nodes == 1:
            advice = "Give --nnodes as well."
            require(rank in (None, 0), "node_rank", rank, "0, where --nnodes is 1", advice)
            require(
                endpoint is None, "rdzv_endpoint", endpoint, "none, where --nnodes is 1", advice
            )
            return NodesConfig()
        advice = f"--nnodes is {num_nodes}."
        require(rank is not None, "node_rank", rank, f"0 to {num_nodes - 1}", advice)
        match = re.fullmatch(r"(?:\[(.+)\]|([^:\s]+)):([0-9]{1,5})", endpoint or "")
        is_endpoint = match is not None and 1 <= int(match[3]) <= 65535
        require(is_endpoint, "rdzv_endpoint", endpoint, "HOST:PORT of node 0", advice)
        assert match is not None
        assert rank is not None
        return NodesConfig(
            num_nodes=num_nodes, node_rank=rank, host=match[1] or match[2], port=int(match[3])
        )


@dataclass(frozen=True, kw_only=True)
class StoreChoices:
    """Choice of the tracking store."""

    config: Path | None = None
    """Configuration file (default: mlflow.yaml, if any)."""
    tracking_uri: str | None = None
    """URI: MLflow store or server (default: that of --config)."""

    def settings(self) -> Settings:
        """Settings of the configuration file, with what was chosen on top.

        Raises:
            ValueError: the file or a choice does not fit.
        """
        path = self.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
        settings = load_settings(path)
        if self.tracking_uri is not None:
            settings = replace(settings, tracking_uri=self.tracking_uri)
        # Raises if it names no file.
        sqlite_path(settings.tracking_uri)
        return settings


@dataclass(frozen=True, kw_only=True)
class SpoolChoices(StoreChoices):
    """Choice of the store and the spool."""

    spool: Path | None = None
    """FOLDER: records that the store does not have yet (default: spool_dir of --config)."""

    def settings(self) -> Settings:
        """Settings of the configuration file, with what was chosen on top."""
        settings = super().settings()
        return settings if self.spool is None else replace(settings, spool_dir=str(self.spool))


@dataclass(frozen=True, kw_only=True)
class RecordChoices(SpoolChoices):
    """Location of the records of an existing group."""

    offline: bool = False
    """Use no store: `sync` ships the records later."""
    output: Path | None = None
    """File for the results (default: none). JSON of single, CSV of profile, Markdown of faults."""


@dataclass(frozen=True, kw_only=True)
class GroupChoices(RecordChoices):
    """Name and records of a new group."""

    group: str | None = None
    """Name of the new group (default: SUITE-DATE-TIME)."""
    layer_norms: str = EVERY
    """STEPS: steps whose per-layer norms are recorded: all, ends, or N for every Nth. Ends are the
    first and the last, which are recorded in any case."""
    log_ranks: str | None = None
    """RANKS: ranks with a run of their own: all, or how many (default: log_ranks of --config). They
    are evenly spaced; 0 is rank 0 alone."""
    system_metrics: bool = False
    """Log processor and memory use of the ranks' machines at each step as well."""

    def settings(self) -> Settings:
        """Settings of the configuration file, with what was chosen on top."""
        settings = super().settings()
        return settings if self.log_ranks is None else replace(settings, log_ranks=self.log_ranks)
