"""Facts that a run reports beside its observations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dpsgd_track.demands import Demand
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.environment import Environment

FACTS_FILE = "facts.json"


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """Facts that only a process on the device can find out."""

    torch_num_threads: int
    allow_tf32: bool
    """`torch.backends.cuda.matmul.allow_tf32`"""
    cudnn_allow_tf32: bool
    name: str = ""
    """Name of the GPU; empty on CPU."""
    cuda: str = ""
    """CUDA version that torch was built with; empty on CPU."""
    nccl: str = ""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about one mode in one regime, as rank 0 reports them."""

    environment: Environment
    device: DeviceFacts
    is_replicated: bool = False
    """True if every rank holds every parameter whole."""
    left_out_steps: tuple[int, ...] = ()
    """Steps left out for an empty batch, which the mode does not support."""
    declined: tuple[Demand, ...] = ()
    """Demands that the mode declines."""
    norm_plan: Mapping[str, str] = field(default_factory=dict)
    """Method by which the norm of each layer was computed, by the layer's name."""
    imported: Mapping[str, str] = field(default_factory=dict)
    """Packages imported from the run's variant, and their versions."""
    warnings: tuple[str, ...] = ()
    """Warnings of the code under test in this process so far, and notices of its mode: sentences
    without full stops."""
    not_optimized: tuple[str, ...] = ()
    """Trainable parameters that the mode's optimizer lacks, although it has others."""
    unreached: tuple[str, ...] = ()
    """Points of a step at which the mode's builder planted code that was never executed."""


FACTS = Codec(RunFacts, "dpsgd-track/facts", 1)
