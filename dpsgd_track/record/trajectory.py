"""The trajectory record: the contract between training and comparison.

A trajectory is columnar, float64 and exact. The mode run holds the global one (all samples of
all ranks, in order of their global index); each rank run holds its rank's own. NaN means "this
mode does not compute it" in `sample_norm`, `clip_factor` and the arrays derived from them; in
every other field the run itself computed the NaN. Steps with fewer samples than the largest are
padded: index -1 and NaN.

Legend: S steps, N samples of the largest step, L linear layers, P trainable parameters,
K projections, W ranks, M elements of a shard, V formulas of `SumFormula`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.record.columns import TornFile, open_archive
from dpsgd_track.record.noise_draws import NoiseDraws

SCHEMA_VERSION = 5
_BEFORE = (2, 3, 4)
"""Schema versions of records that lack some of the fields of `_absent_before`; they are read."""
_DRAWS = "noise_draws"

UNUSED = -1
"""Sample index of padding, where a step has fewer samples than N."""

SCALAR_METRICS = (
    "loss",
    "grad_norm",
    "grad_norm_noised",
    "clip_fraction",
    "step_time_ms",
    "peak_memory_gib",
    "tokens_per_second",
)
"""Fields with one value a step; each is a metric under the same name."""

SAMPLE_COLUMNS = (
    "sample_index",
    "sample_rank",
    "sample_micro_batch",
    "sample_loss",
    "sample_norm",
    "clip_factor",
    "sample_norm_by_parameter",
    "sample_sketch",
    "sample_shard_sketch",
    "sample_other_norm",
    "sample_other_loss",
    "sample_part_square",
    "sample_target_loss",
    "sample_size",
)
"""Fields with one entry for each sample of a step."""

_OF_REFERENCE = (
    "sample_sketch",
    "sample_shard_sketch",
    "sample_other_norm",
    "sample_part_square",
    "moved_sketch",
    "part_sketch",
)
"""Fields by parameter that the reference alone records."""
_BY_SAMPLE_AND_OTHERS = ("sample_other_loss", "sample_target_loss", "sample_size")
"""Fields by sample with another axis."""
ALTERNATIVES = (*_OF_REFERENCE, *_BY_SAMPLE_AND_OTHERS)
"""Fields from which causes alone are named. No verdict depends on them."""

LARGE = (
    "sample_norm_by_parameter",
    "sample_sketch",
    "sample_shard_sketch",
    "sample_other_norm",
    "sample_part_square",
    "part_sketch",
    "moved_sketch",
    "gradient_sketch",
    "noised_sketch",
    "weight_sketch",
    "noise_samples",
)
"""Fields that a trajectory read from a file loads only on first access."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Strings = NDArray[np.str_]


class Column(Protocol):
    """A field that is not in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[S, ...]."""

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows `start` to `stop`, anew at each call."""


# Compared and hashed by identity: arrays cannot be hashed, and derived values are cached by it.
@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """All observations of one run, step by step.

    The fields of LARGE may be columns that are read on first access; `rows` and `read` give some
    steps of them without loading the rest, and `release` frees them.
    """

    step: Integers
    """[S] step numbers, ascending."""
    loss: Floats
    """[S] mean over the samples of the step (all ranks' in a mode run); 0 of an empty step."""
    grad_norm: Floats
    """[S] L2 norm of clipped sum / expected batch size, before noise."""
    grad_norm_noised: Floats
    """[S] L2 norm of (clipped sum + noise) / expected batch size."""
    clip_fraction: Floats
    """[S] fraction of samples with clip factor < 1; NaN where nothing is clipped by design, and for
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
    """[S, N] global index of each sample, -1 for padding; unique within a step."""
    sample_rank: Integers
    """[S, N] rank that computed each sample, -1 for padding."""
    sample_micro_batch: Integers
    """[S, N] which of its rank's micro-batches held each sample, from 0; -1 for padding."""
    sample_loss: Floats
    """[S, N] loss of each sample."""
    sample_norm: Floats
    """[S, N] L2 norm of each sample's gradient over all trainable parameters."""
    clip_factor: Floats
    """[S, N] factor by which each sample's gradient was multiplied."""
    parameter_names: Strings
    """[P] fully qualified names of trainable parameters."""
    parameter_sizes: Integers
    """[P] elements of each parameter, over all ranks; 0 if unknown."""
    sample_norm_by_parameter: Floats
    """[S, N, P] L2 norm of each sample's gradient with respect to each parameter."""
    sample_sketch: Floats
    """[S, N, P, K] the projections of each sample's gradient before clipping, so that sums with
    other factors can be predicted. K is 0 but in the reference's
    clip regime on a small model."""
    sample_shard_sketch: Floats
    """[S, N, P, K] the same of those rows alone that the sample's own rank would hold if it were
    sharded: what is left of a sum that is not reduced over ranks."""
    sample_other_norm: Floats
    """[S, N, P, F] value of each `NormFormula`, wrong formulas for the norm by parameter; NaN where
    one does not apply. F is 0 but in the reference's clip regime on a small model."""
    sample_other_loss: Floats
    """[S, N, F] value of each `LossFormula`, wrong losses of the sample, as `sample_other_norm`."""
    sample_part_square: Floats
    """[S, N, P, X] squares of each sample's gradient by position, row and column, as `parts` lays
    them out; NaN where those are too many. X is 0 but in the reference's record of a small model.
    """
    sample_target_loss: Floats
    """[S, N, T] loss of each target; NaN of positions without one. T is 0 where not recorded."""
    sample_size: Floats
    """[S, N, 2] numbers of tokens and of targets, NaN where not counted; the last axis is 0 where
    not recorded."""
    part_sketch: Floats
    """[S, M, P, K] projections of the parts of the clipped sum, and of the sum without clipping, as
    `parts` lays them out; NaN as above. K is 0 but in the reference's record of a small model."""
    moved_sketch: Floats
    """[S, V, P, K] the projections of the wrong clipped sum of each `SumFormula`; NaN where one
    does not apply. K is 0 but in the reference's clip regime on a small model."""
    gradient_sketch: Floats
    """[S, P, K] +-1 projections of the clipped sum; E[mean over K of square] = squared norm."""
    noised_sketch: Floats
    """[S, P, K] the same projections of the clipped sum + noise."""
    weight_sketch: Floats
    """[S, P, K] the same projections of the weights after the step."""
    noise_samples: NDArray[np.float32]
    """[S, W, P, M] sampled elements of the noise on each rank's shard of each parameter, at the
    same positions in every step; NaN past the end of a shard. M is 0 outside the noise regime."""
    data_hash: Strings
    """[S] digest of the step's samples in order of their global index."""
    initial_weights_hash: str
    """Digest of all weights before the first step."""
    noise_std: float
    """sigma * C at the first step: std of each element of the noise on the clipped sum."""
    expected_batch_size: int
    """Divisor of the clipped sum."""
    noise_draws: NoiseDraws | None = None
    """Sums over the noise of noise-only steps, which are no steps of the record; None outside the
    noise regime."""

    def __post_init__(self) -> None:
        _check_shapes(lambda name: getattr(self, name).shape)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NDArray[Any]:
            column = self.__dict__.get("_columns", {}).get(name)
            if column is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.__dict__[name] = column.read(0, column.shape[0])
            return self.__dict__[name]

    @classmethod
    def deferred(cls, values: Mapping[str, Any], columns: Mapping[str, Column]) -> Trajectory:
        """A trajectory with `values` in memory and the fields of `columns` read on demand.

        Raises:
            ValueError: the shapes do not match.
        """
        _check_shapes(lambda name: (columns[name] if name in columns else values[name]).shape)
        made = object.__new__(cls)
        made.__dict__.update(values, _columns=dict(columns))
        return made

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.step)

    @property
    def num_samples(self) -> Integers:
        """[S] samples of each step."""
        return np.asarray((self.sample_index != UNUSED).sum(axis=1))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a field, without reading it."""
        values = self.__dict__.get(name)
        column: Column = self.__dict__["_columns"][name] if values is None else values
        return column.shape

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """[stop - start, ...] rows of a field with one row per step; they are not cached."""
        start, stop, _ = slice(start, stop).indices(self.num_steps)
        values: NDArray[Any] | None = self.__dict__.get(name)
        if values is not None:
            return values[start:stop]
        column: Column = self.__dict__["_columns"][name]
        return column.read(start, stop)

    @property
    def noise_stds(self) -> Floats:
        """[S] std of the noise, sigma C, of each step."""
        return np.asarray(self.noise_std * self.max_grad_norm / self.max_grad_norm[0])

    def rows(self, start: int, stop: int) -> Trajectory:
        """The steps from row `start` to `stop`; large fields are read on first access."""
        start, stop, _ = slice(start, stop).indices(self.num_steps)
        values = dict(self.__dict__)
        columns: dict[str, Column] = values.pop("_columns", {})
        values.update({name: values[name][start:stop] for name in BY_STEP if name in values})
        apart: dict[str, Column] = {
            name: _Rows(self, name, start, stop) for name in columns if name not in values
        }
        return Trajectory.deferred(values, apart)

    def release(self) -> None:
        """Free large fields that can be read again."""
        for name in self.__dict__.get("_columns", ()):
            self.__dict__.pop(name, None)

    def save(self, path: Path) -> None:
        """Write to `path` as an npz, whole or not at all.

        Uncompressed: training data hardly compresses, and rows of an uncompressed field can be
        read without the rest.
        """
        partial = path.with_suffix(".partial.npz")
        columns: dict[str, Any] = {
            f.name: np.asarray(getattr(self, f.name), order="C")
            for f in fields(self)
            if f.name != _DRAWS
        }
        draws = self.noise_draws.columns() if self.noise_draws else {}
        columns.update({f"{_DRAWS}.{name}": column for name, column in draws.items()})
        np.savez(partial, schema=np.int64(SCHEMA_VERSION), **columns)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Open a trajectory that `save` wrote. The file may be removed afterwards.

        Raises:
            ValueError: the file is not a trajectory, is torn, or has another schema version.
        """
        try:
            values, columns = open_archive(path, apart=LARGE)
        except TornFile as error:
            raise ValueError(f"{path.name}: expected a trajectory file. {error}") from error
        written = values.pop("schema", np.int64(-1))
        version = int(written) if _is_of(written, "int") else written.tolist()
        if version in _BEFORE:
            absent = _absent_before(values)
            values |= {
                name: absent[name] for name in absent.keys() - values.keys() - columns.keys()
            }
        if version not in (*_BEFORE, SCHEMA_VERSION):
            raise ValueError(
                f"{path.name}: expected trajectory schema {SCHEMA_VERSION}, got {version}. "
                "Compare with the version of dpsgd-track that wrote it."
            )
        draws = {
            name.removeprefix(f"{_DRAWS}."): values.pop(name)
            for name in [*values]
            if name.startswith(f"{_DRAWS}.")
        }
        names = {f.name for f in fields(cls)} - {_DRAWS}
        if values.keys() | columns.keys() != names:
            differing = (values.keys() | columns.keys()) ^ names
            raise ValueError(
                f"{path.name}: expected the fields of schema {version}; "
                f"differing: {', '.join(sorted(differing))}."
            )
        _check_types({**values, **columns}, path.name)
        scalars: dict[str, Any] = {
            "initial_weights_hash": str(values["initial_weights_hash"]),
            "noise_std": float(values["noise_std"]),
            "expected_batch_size": int(values["expected_batch_size"]),
            _DRAWS: NoiseDraws.of_columns(draws) if draws else None,
        }
        made = cls.deferred({**values, **scalars}, columns)
        _check_values(made, path.name)
        return made


@dataclass(frozen=True)
class _Rows:
    """Some rows of a large field of a trajectory."""

    of: Trajectory
    name: str
    first: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.first, *self.of.shape_of(self.name)[1:])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self.of.read(self.name, self.first + start, self.first + stop)


_KINDS = {
    **dict.fromkeys(("Floats", "NDArray[np.float32]", "float"), "f"),
    **dict.fromkeys(("Integers", "int"), "i"),
    **dict.fromkeys(("Strings", "str"), "U"),
}
"""numpy's kind of a field's elements, by its type."""
_WORDS = {"f": "floating-point numbers", "i": "integers", "U": "text"}


def _is_of(written: Any, kind: str) -> bool:
    """True if an array in a file has elements of the type `kind`, and is a scalar if that is."""
    is_scalar = kind in ("float", "int", "str")
    return written.dtype.kind == _KINDS[kind] and (not is_scalar or written.shape == ())


def _check_types(written: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless each field in a file is of its type."""
    for each in fields(Trajectory):
        if each.name == _DRAWS:
            continue
        found, kind = written[each.name], str(each.type)
        if not _is_of(found, kind):
            raise ValueError(
                f"{name}: {each.name}: expected {_WORDS[_KINDS[kind]]}, got {found.dtype} of shape "
                f"{found.shape}."
            )


def _check_values(t: Trajectory, name: str) -> None:
    """Check what no step of a run can make wrong, and what items are found by.

    Raises:
        ValueError: a field holds what no run records.
    """
    bounds, index = t.max_grad_norm, np.sort(t.sample_index, axis=1)
    is_repeated = (np.diff(index, axis=1) == 0) & (index[:, 1:] != UNUSED)
    wanted = (
        ("step", "ascending numbers >= 0", (t.step >= 0).all() and (np.diff(t.step) > 0).all()),
        ("max_grad_norm", "finite numbers > 0", (np.isfinite(bounds) & (bounds > 0)).all()),
        ("noise_std", "a finite number >= 0", 0 <= t.noise_std < np.inf),
        ("expected_batch_size", "an integer >= 0", t.expected_batch_size >= 0),
        ("parameter_sizes", "integers >= 0", (t.parameter_sizes >= 0).all()),
        ("sample_rank", "integers >= -1", (t.sample_rank >= UNUSED).all()),
        (
            "sample_index",
            "integers >= -1 that differ",
            (index >= UNUSED).all() and not is_repeated.any(),
        ),
        ("layer_names", "distinct names", len(set(t.layer_names.tolist())) == len(t.layer_names)),
        (
            "parameter_names",
            "distinct names",
            len(set(t.parameter_names.tolist())) == len(t.parameter_names),
        ),
    )
    for field, allowed, holds in wanted:
        if not holds:
            raise ValueError(f"{name}: {field}: expected {allowed}, which this is not.")


def _absent_before(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The fields that schemas 3 to 5 added, as a run that does not record them has them."""
    S, N = (*values.get("sample_index", np.empty((0, 0))).shape, 0, 0)[:2]
    P = values.get("parameter_names", np.empty(0)).size
    return {
        "sample_micro_batch": np.full((S, N), UNUSED, dtype=np.int64),
        "sample_sketch": np.empty((S, N, P, 0), dtype=np.float32),
        "sample_shard_sketch": np.empty((S, N, P, 0), dtype=np.float32),
        "sample_other_norm": np.empty((S, N, P, 0), dtype=np.float32),
        **{name: np.empty((S, N, 0), dtype=np.float32) for name in _BY_SAMPLE_AND_OTHERS},
        "sample_part_square": np.empty((S, N, P, 0), dtype=np.float32),
        "part_sketch": np.empty((S, 0, P, 0), dtype=np.float32),
        "moved_sketch": np.empty((S, len(SumFormula), P, 0), dtype=np.float32),
    }


def _check_shapes(shape_of: Callable[[str], tuple[int, ...]]) -> None:
    for name, axes in {
        "sample_index": 2,
        "layer_names": 1,
        "parameter_names": 1,
        "gradient_sketch": 3,
        **dict.fromkeys(_BY_SAMPLE_AND_OTHERS, 3),
        **dict.fromkeys(_OF_REFERENCE, 4),
        "noise_samples": 4,
    }.items():
        if len(shape_of(name)) != axes:
            raise ValueError(
                f"trajectory.{name}: expected {axes} dimensions, got shape {shape_of(name)}."
            )
    S, N = shape_of("sample_index")
    (L,), (P,) = shape_of("layer_names"), shape_of("parameter_names")
    K = shape_of("gradient_sketch")[-1]
    noise = shape_of("noise_samples")
    wanted: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(_PER_STEP, (S,)),
        "parameter_sizes": (P,),
        **dict.fromkeys(("layer_weight_norm", "layer_grad_norm"), (S, L)),
        **dict.fromkeys(_BY_SAMPLE_ALONE, (S, N)),
        "sample_norm_by_parameter": (S, N, P),
        "sample_sketch": (S, N, P, shape_of("sample_sketch")[-1]),
        "sample_shard_sketch": (S, N, P, shape_of("sample_shard_sketch")[-1]),
        "sample_other_norm": (S, N, P, shape_of("sample_other_norm")[-1]),
        "sample_part_square": (S, N, P, shape_of("sample_part_square")[-1]),
        **{name: (S, N, shape_of(name)[-1]) for name in _BY_SAMPLE_AND_OTHERS},
        **{
            name: (S, shape_of(name)[1], P, shape_of(name)[-1])
            for name in ("moved_sketch", "part_sketch")
        },
        **dict.fromkeys(("gradient_sketch", "noised_sketch", "weight_sketch"), (S, P, K)),
        "noise_samples": (S, noise[1], P, noise[-1]),
    }
    for name, shape in wanted.items():
        got = shape_of(name)
        if got != shape:
            raise ValueError(f"trajectory.{name}: expected shape {shape}, got {got}.")


_BY_SAMPLE_ALONE = (
    "sample_rank",
    "sample_micro_batch",
    "sample_loss",
    "sample_norm",
    "clip_factor",
)
_PER_STEP = ("step", *SCALAR_METRICS, "max_grad_norm", "data_hash")
BY_STEP = tuple(
    dict.fromkeys((*_PER_STEP, "layer_weight_norm", "layer_grad_norm", *SAMPLE_COLUMNS, *LARGE))
)
"""Fields with one row a step."""


def sketch_length(sketch: Floats) -> Floats:
    """Estimated L2 norm of a tensor known by its sketch.

    Args:
        sketch: [..., K] projections.
    Returns:
        [...] sqrt(mean over K of sketch^2), whose square is an unbiased estimate
        (Achlioptas, 2003, "Database-friendly random projections").
    """
    # Without a temporary for the squares, and without a call for each row of K.
    sum_of_squares = np.einsum("...k,...k->...", sketch, sketch)
    return cast(Floats, np.sqrt(sum_of_squares / sketch.shape[-1]))


def sketch_distance(a: Floats, b: Floats) -> Floats:
    """[...] estimated L2 distance between two tensors known by their sketches, [..., K] each."""
    return sketch_length(a - b)
