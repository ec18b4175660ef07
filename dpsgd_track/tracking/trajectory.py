"""The trajectory record: the contract between the half that trains and the half that compares.

A trajectory is columnar, float64 and exact. The mode run holds the global one (all samples of
all ranks, in order of their global index); each rank run holds its rank's own. NaN means "this
mode does not compute it" in `sample_norm`, `clip_factor` and the arrays derived from them; in
every other field NaN is what the run computed. A step with fewer samples than another leaves
places unused: index -1 and NaN.

Legend: S steps, N samples of the step that has most, L linear layers, P trainable parameters,
K projections, W ranks, M elements of a shard.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 2

UNUSED = -1
"""Sample index of a place that a step has no sample for."""

SAMPLE_COLUMNS = (
    "sample_index",
    "sample_rank",
    "sample_loss",
    "sample_norm",
    "clip_factor",
    "sample_norm_by_parameter",
)
"""Fields with one place for each sample of a step."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Strings = NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Everything one run observed, step by step."""

    step: Integers
    """[S] step numbers, ascending."""
    loss: Floats
    """[S] mean over the samples of the step (all ranks' in a mode run); 0 of an empty step."""
    grad_norm: Floats
    """[S] L2 norm of clipped sum / expected batch size, before noise."""
    grad_norm_noised: Floats
    """[S] the same after noise."""
    clip_fraction: Floats
    """[S] fraction of samples with clip factor < 1; NaN where nothing is clipped by design, and of
    an empty step."""
    max_grad_norm: Floats
    """[S] C in force."""
    step_time_ms: Floats
    """[S] forward to optimizer step, without measurement; the slowest rank's in a mode run."""
    peak_memory_gib: Floats
    """[S] peak so far: CUDA allocations, or the process's resident set on CPU; largest rank's."""
    tokens_per_second: Floats
    """[S] tokens of the step over all ranks / step time."""
    layer_names: Strings
    """[L] fully qualified names of linear layers."""
    layer_weight_norm: Floats
    """[S, L] L2 norm of the layer's weight before the step; NaN where not recorded."""
    layer_grad_norm: Floats
    """[S, L] L2 norm of the weight's clipped sum / expected batch size; NaN where not recorded."""
    sample_index: Integers
    """[S, N] global index of each sample, -1 at an unused place; never repeats within a step."""
    sample_rank: Integers
    """[S, N] rank that computed each sample; -1 at an unused place."""
    sample_loss: Floats
    """[S, N] loss of each sample."""
    sample_norm: Floats
    """[S, N] L2 norm of each sample's gradient over all trainable parameters."""
    clip_factor: Floats
    """[S, N] factor each sample's gradient was multiplied by."""
    parameter_names: Strings
    """[P] fully qualified names of trainable parameters."""
    parameter_sizes: Integers
    """[P] elements of each, over all ranks; 0 where unknown."""
    sample_norm_by_parameter: Floats
    """[S, N, P] L2 norm of each sample's gradient of each parameter."""
    gradient_sketch: Floats
    """[S, P, K] +-1 projections of the clipped sum; E[mean over K of square] = squared norm."""
    noised_sketch: Floats
    """[S, P, K] the same projections of clipped sum + noise."""
    weight_sketch: Floats
    """[S, P, K] the same projections of the weights after the step."""
    noise_samples: NDArray[np.float32]
    """[S, W, P, M] some elements of the noise on each rank's shard of each parameter, at the same
    positions in every step; NaN past the end of a shard. M is 0 but in the noise regime."""
    data_hash: Strings
    """[S] digest of the step's samples in order of their global index."""
    initial_weights_hash: str
    """Digest of all weights before the first step."""
    noise_std: float
    """sigma * C at the first step: std of each element of the noise on the clipped sum."""
    expected_batch_size: int
    """Divisor of the clipped sum."""

    def __post_init__(self) -> None:
        S, N = self.sample_index.shape
        L, P = len(self.layer_names), len(self.parameter_names)
        K = self.gradient_sketch.shape[-1]
        wanted: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(_PER_STEP, (S,)),
            "parameter_sizes": (P,),
            **dict.fromkeys(("layer_weight_norm", "layer_grad_norm"), (S, L)),
            **dict.fromkeys(("sample_rank", "sample_loss", "sample_norm", "clip_factor"), (S, N)),
            "sample_norm_by_parameter": (S, N, P),
            **dict.fromkeys(("gradient_sketch", "noised_sketch", "weight_sketch"), (S, P, K)),
            "noise_samples": (S, self.noise_samples.shape[1], P, self.noise_samples.shape[-1]),
        }
        for name, shape in wanted.items():
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(f"trajectory.{name}: expected shape {shape}, got {got}.")

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.step)

    @property
    def num_samples(self) -> Integers:
        """[S] samples of each step."""
        return np.asarray((self.sample_index != UNUSED).sum(axis=1))

    def save(self, path: Path) -> None:
        """Write to `path` as a compressed npz, whole or not at all."""
        partial = path.with_suffix(".partial.npz")
        columns: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        np.savez_compressed(partial, schema=np.int64(SCHEMA_VERSION), **columns)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not a trajectory, is torn, or has another schema version.
        """
        try:
            # The file is opened here, since numpy leaves one that it cannot read open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.name}: expected a trajectory file. {error}") from error
        version = int(arrays.pop("schema", np.int64(-1)))
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path.name}: expected trajectory schema {SCHEMA_VERSION}, got {version}. "
                "Compare with the version of dpsgd-track that wrote it."
            )
        names = {f.name for f in fields(cls)}
        if arrays.keys() != names:
            raise ValueError(
                f"{path.name}: expected the fields of schema {SCHEMA_VERSION}; "
                f"differing: {', '.join(sorted(arrays.keys() ^ names))}."
            )
        values: dict[str, Any] = dict(arrays)
        values["initial_weights_hash"] = str(arrays["initial_weights_hash"])
        values["noise_std"] = float(arrays["noise_std"])
        values["expected_batch_size"] = int(arrays["expected_batch_size"])
        return cls(**values)


_PER_STEP = (
    "step",
    "loss",
    "grad_norm",
    "grad_norm_noised",
    "clip_fraction",
    "max_grad_norm",
    "step_time_ms",
    "peak_memory_gib",
    "tokens_per_second",
    "data_hash",
)


def sketch_distance(a: Floats, b: Floats) -> Floats:
    """Estimated L2 distance between two tensors known by their sketches.

    Args:
        a, b: [..., K] projections.
    Returns:
        [...] sqrt(mean over K of (a - b)^2), whose square is an unbiased estimate
        (Achlioptas, 2003, "Database-friendly random projections").
    """
    return cast(Floats, np.sqrt(np.mean(np.square(a - b), axis=-1)))
