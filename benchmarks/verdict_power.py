#!/usr/bin/env python
"""Simulate healthy and faulty records, and write how often each check raises an alarm.

    python benchmarks/verdict_power.py docs/power.md

Nothing is trained: a record is a random gradient with the rounding errors of a type. Errors come in
two parts, as in real runs: one that the mode shares with plain autograd, since both compute from
the same rounded weights, and one of its own. A healthy mode and plain autograd differ in nothing
but the draw. A fault of a given size is then planted in the mode's record.

Each study has a trial, which draws one record and tells which checks raise an alarm. The page says
how often healthy records do, beside the designed level, and how often faults of a multiple of the
stated resolution are found, so that a resolution that is not true shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpsgd_track.comparison.measure import bias, floor  # noqa: E402
from dpsgd_track.comparison.measure.bias import TOLERANCES, Biases, Tolerance, biases_of  # noqa: E402
from dpsgd_track.comparison.measure.drift import compare_pairs  # noqa: E402
from dpsgd_track.comparison.measure.excess import Evidence, evidence_of  # noqa: E402
from dpsgd_track.comparison.measure.resolution import Resolution, resolution_of  # noqa: E402
from dpsgd_track.config import Thresholds  # noqa: E402
from dpsgd_track.record.alternatives import SumFormula  # noqa: E402
from dpsgd_track.record.stages import ObservableName  # noqa: E402
from dpsgd_track.record.trajectory import Trajectory, sketch_length  # noqa: E402

Floats = NDArray[np.float64]
Draw = Callable[[tuple[int, ...]], Floats]
"""Draws errors of std 1 in a shape."""

MULTIPLES = (0.5, 1.0, 1.5)
"""Sizes of planted faults, in units of the stated resolution."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Relative errors of one type."""

    dtype: str
    shared: float
    """Std of the error of a sample's norm of one parameter that both sides share."""
    own: float
    loss: float
    """Std of the relative error of one sample's loss."""
    draw: str = "normal"
    """normal, or heavy: Student's t with four degrees of freedom."""

    def errors(self, rng: np.random.Generator) -> Draw:
        """A source of errors of std 1."""
        if self.draw == "normal":
            return rng.standard_normal
        return lambda shape: rng.standard_t(4, shape) / np.sqrt(2.0)


ROUNDINGS = {
    "bfloat16": Rounding(dtype="bfloat16", shared=3e-3, own=1e-3, loss=5e-4),
    "float32": Rounding(dtype="float32", shared=1e-7, own=1e-7, loss=6e-8),
    "bfloat16, heavy tails": Rounding(
        dtype="bfloat16", shared=3e-3, own=1e-3, loss=5e-4, draw="heavy"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a record of the clip regime."""

    steps: int = 4
    samples: int = 12
    parameters: int = 10
    projections: int = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """The records of one trial."""

    exact: Trajectory
    plain: Trajectory
    mode: Trajectory


def case(rng: np.random.Generator, rounding: Rounding, size: Size) -> Case:
    """A healthy mode beside plain autograd and the float64 reference."""
    S, N, P, K = size.steps, size.samples, size.parameters, size.projections
    scale = np.exp(rng.normal(0, 0.7, P))
    norms = scale * np.exp(rng.normal(0, 0.4, (S, N, P)))
    # One parameter has one element, whose projections differ in sign alone.
    sums = rng.normal(0, 1, (S, P, K)) * scale[:, None] * np.sqrt(N)
    sums[:, 0] = np.abs(sums[:, 0, :1]) * rng.choice((-1.0, 1.0), K)
    draw = rounding.errors(rng)
    shared = [draw(shape) for shape in ((S, N, P), (S, P, K), (S, N))]
    shared[1][:, 0] = shared[1][:, 0, :1]
    loss = rng.uniform(2, 5, (S, N))

    def rounded(which: float, own: float) -> Trajectory:
        drawn = [draw(each.shape) for each in shared]
        drawn[1][:, 0] = drawn[1][:, 0, :1]
        size_of = rounding.shared * which, rounding.own * own
        error = [size_of[0] * a + size_of[1] * b for a, b in zip(shared, drawn, strict=True)]
        length = sketch_length(sums)[:, :, None]
        erred = sums * (1 + error[1]) if K == 1 else sums + length * error[1]
        erred[:, 0] = sums[:, 0] * (1 + error[1][:, 0])
        losses = loss * (1 + rounding.loss * (which * shared[2] + 0.1 * own * drawn[2]))
        return _record(norms * np.exp(error[0]), erred, losses)

    return Case(exact=rounded(0, 0), plain=rounded(1, 1), mode=rounded(1, 1))


def _record(norms: Floats, sums: Floats, losses: Floats) -> Trajectory:
    S, N, P = norms.shape
    total = np.sqrt(np.square(norms).sum(axis=2))
    lengths = sketch_length(sums)
    blank: dict[str, Any] = dict.fromkeys(
        ("step_time_ms", "peak_memory_gib", "tokens_per_second"), np.ones(S)
    )
    names = np.array([f"layer{i}.weight" for i in range(P)])
    grad_norm = np.sqrt(np.square(lengths).sum(axis=1)) / N
    return Trajectory(
        step=np.arange(S),
        loss=losses.mean(axis=1),
        grad_norm=grad_norm,
        grad_norm_noised=grad_norm,
        clip_fraction=np.full(S, 0.5),
        max_grad_norm=np.full(S, 1e9),
        layer_names=np.array([f"layer{i}" for i in range(P)]),
        layer_weight_norm=np.ones((S, P)),
        layer_grad_norm=lengths / N,
        sample_index=np.arange(S * N).reshape(S, N),
        sample_rank=np.tile(np.arange(N) * 2 // N, (S, 1)),
        sample_micro_batch=np.zeros((S, N), dtype=np.int64),
        sample_loss=losses,
        sample_norm=total,
        clip_factor=np.ones((S, N)),
        parameter_names=names,
        parameter_sizes=np.array([1] + [1000] * (P - 1)),
        sample_norm_by_parameter=norms,
        sample_sketch=np.empty((S, N, P, 0)),
        sample_shard_sketch=np.empty((S, N, P, 0)),
        sample_other_norm=np.empty((S, N, P, 0)),
        sample_other_loss=np.empty((S, N, 0)),
        sample_part_square=np.empty((S, N, P, 0)),
        sample_target_loss=np.empty((S, N, 0)),
        sample_size=np.empty((S, N, 0)),
        part_sketch=np.empty((S, 0, P, 0)),
        moved_sketch=np.empty((S, len(SumFormula), P, 0)),
        gradient_sketch=sums,
        noised_sketch=sums,
        weight_sketch=np.ones_like(sums),
        noise_samples=np.empty((S, 0, P, 0), dtype=np.float32),
        data_hash=np.array([""] * S),
        initial_weights_hash="",
        noise_std=0.0,
        expected_batch_size=N,
        **blank,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Alarms and resolution of the comparison of one case."""

    evidence: Evidence
    biases: Biases

    @property
    def resolution(self) -> Resolution:
        """The resolution that a verdict states."""
        return resolution_of(self.evidence, self.biases)

    @property
    def alarms(self) -> set[str]:
        """Names of the checks that fail."""
        found = {f"largest {name}" for name, e in self.evidence.excesses.items() if e.failing.any()}
        found |= {f"mean {n}" for n, b in self.biases.by_observable.items() if b.failing.any()}
        found |= {f"one {outlier.observable}" for outlier in self.biases.outliers}
        scatter = self.biases.scatter
        return found | ({SCATTER} if scatter is not None and scatter.failing.any() else set())


SCATTER = "scatter sample_norm_by_parameter"


def measured(of: Case, tolerance: Tolerance) -> Measured:
    """Compare the mode with the reference, and with plain autograd."""
    exact = "reference", of.exact
    replay, pair = compare_pairs(
        "clip", [(exact, ("reference (plain)", of.plain)), (exact, ("mode", of.mode))]
    )
    found = biases_of(of.mode, of.plain, of.exact, tolerance, stands_still=True)
    assert found is not None
    floored = floor.floor_of([replay], against_float64=True)
    return Measured(evidence=evidence_of(pair, Thresholds(), floored), biases=found)


def scaled(record: Trajectory, field: str, factor: float, at: int | slice) -> Trajectory:
    values = getattr(record, field).copy()
    axis = (slice(None),) * (2 if field == "sample_norm_by_parameter" else 1)
    values[(*axis, at)] *= factor
    changed: dict[str, Any] = {field: values}
    if field == "sample_norm_by_parameter":
        changed["sample_norm"] = np.sqrt(np.square(values).sum(axis=2))
    else:
        lengths = sketch_length(values)
        changed |= {
            "noised_sketch": values,
            "layer_grad_norm": lengths / record.expected_batch_size,
        }
        total = np.sqrt(np.square(lengths).sum(axis=1)) / record.expected_batch_size
        changed |= {"grad_norm": total, "grad_norm_noised": total}
    return replace(record, **changed)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A relative error e of norms or sums, planted as a factor 1 + e."""

    title: str
    field: str
    at: int | slice
    """Parameters."""
    stated: Callable[[Resolution], float]
    """The resolution that a verdict states for it."""


def _one(sight: str) -> Callable[[Resolution], float]:
    return lambda resolution: float(getattr(resolution, sight).one[-1])


def _all(sight: str) -> Callable[[Resolution], float]:
    return lambda resolution: float(getattr(resolution, sight).all)


FAULTS = (
    Fault(title="norms, one", field="sample_norm_by_parameter", at=-1, stated=_one("norms")),
    Fault(
        title="norms, all", field="sample_norm_by_parameter", at=slice(None), stated=_all("norms")
    ),
    Fault(title="sums, one", field="gradient_sketch", at=-1, stated=_one("sums")),
    Fault(title="sums, all", field="gradient_sketch", at=slice(None), stated=_all("sums")),
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One table of the page."""

    title: str
    about: str
    headings: tuple[str, ...]
    rows: Callable[[int], Iterator[tuple[str, ...]]]
    """Takes the number of trials."""
    share: float = 1.0
    """Share of the trials of a run that the study takes."""


def false_alarms(trials: int) -> Iterator[tuple[str, ...]]:
    """Alarms of healthy records, by type and check."""
    for name, rounding in ROUNDINGS.items():
        rng = np.random.default_rng(0)
        counts: dict[str, int] = {}
        num_any = 0
        for _ in range(trials):
            found = measured(case(rng, rounding, Size()), TOLERANCES[rounding.dtype]).alarms
            num_any += bool(found)
            for check in found:
                counts[check] = counts.get(check, 0) + 1
        which = ", ".join(f"{check} {count}" for check, count in sorted(counts.items()))
        yield name, str(trials), str(num_any), which or "none"


def bias_level(trials: int) -> Iterator[tuple[str, ...]]:
    """Healthy records with a bias, were nothing tolerated."""
    nothing = Tolerance(one=0.0, total=0.0, loss=0.0)
    for name, rounding in ROUNDINGS.items():
        rng = np.random.default_rng(1)
        failing = 0
        for _ in range(trials):
            of = case(rng, rounding, Size())
            found = biases_of(of.mode, of.plain, of.exact, nothing, stands_still=True)
            assert found is not None
            failing += any(each.failing.any() for each in found.by_observable.values())
        expected = f"{bias.FALSE_ALARM * trials:.3g}"
        yield name, str(trials), str(failing), expected


def floor_level(trials: int) -> Iterator[tuple[str, ...]]:
    """Healthy records over the limits of the largest differences, by the number of draws."""
    rounding = ROUNDINGS["bfloat16"]
    checks = ("sample_norm", "gradient", "grad_norm")
    for steps in (1, 4):
        for samples in (1, 2, 4, 16):
            size = Size(steps=steps, samples=samples)
            rng = np.random.default_rng(2)
            counts = dict.fromkeys(checks, 0)
            for _ in range(trials):
                of = case(rng, rounding, size)
                excesses = measured(of, TOLERANCES[rounding.dtype]).evidence.excesses
                for check in checks:
                    counts[check] += bool(excesses[ObservableName(check)].failing.any())
            yield (
                str(steps),
                str(samples),
                str(trials),
                *(str(counts[check]) for check in checks),
                f"{floor.FALSE_ALARM * trials:.3g}",
            )


def power(trials: int) -> Iterator[tuple[str, ...]]:
    """Faults found, at multiples of the resolution that the verdict states for the same record."""
    for name, rounding in ROUNDINGS.items():
        for fault in FAULTS:
            rng = np.random.default_rng(3)
            stated, found = [], np.zeros(len(MULTIPLES))
            tolerance = TOLERANCES[rounding.dtype]
            for _ in range(trials):
                of = case(rng, rounding, Size())
                stated.append(fault.stated(measured(of, tolerance).resolution))
                for i, multiple in enumerate(MULTIPLES):
                    error = multiple * stated[-1] * rng.choice((-1, 1))
                    wrong = scaled(of.mode, fault.field, 1 + error, fault.at)
                    found[i] += bool(measured(replace(of, mode=wrong), tolerance).alarms)
            shares = [f"{100 * each:.3g} %" for each in found / trials]
            yield name, fault.title, f"{100 * np.median(stated):.2g} %", *shares


STUDIES = (
    Study(
        title="Healthy records",
        about="Records in which the mode and plain autograd differ in nothing but their rounding, "
        "and those of them at which any check raises an alarm. A limit of largest differences is "
        f"designed for {floor.FALSE_ALARM:g} alarms a check and record, all biases of a record "
        f"together for {bias.FALSE_ALARM:g}, were nothing tolerated.",
        headings=("type", "records", "with an alarm", "checks that raised it"),
        rows=false_alarms,
    ),
    Study(
        title="Level of the bias test",
        about="The same with no bias tolerated, so that chance alone decides. Where errors have "
        "heavy tails, a t-test keeps its level only about; what is tolerated makes up for it.",
        headings=("type", "records", "with a bias", "designed"),
        rows=bias_level,
    ),
    Study(
        title="Few draws",
        about="Healthy records in bfloat16 over the limit of a largest difference, where the floor "
        "is the largest of few draws: alarms, of per-sample norms, of the clipped sum and of its "
        "norm.",
        headings=(
            "steps",
            "samples a step",
            "records",
            "sample norm",
            "clipped sum",
            "gradient norm",
            "designed",
        ),
        rows=floor_level,
        share=0.5,
    ),
    Study(
        title="Power",
        about="Relative errors of norms and of clipped sums, of one parameter and of all, planted "
        "at multiples of the resolution that the verdict states for that very record, and the "
        "share of them that any check finds.",
        headings=(
            "type",
            "error of",
            "stated resolution (median)",
            *(f"found at {multiple:g} x" for multiple in MULTIPLES),
        ),
        rows=power,
        share=0.1,
    ),
)
"""The tables of the page, in order."""


def page(trials: int, command: str) -> str:
    """All tables, in Markdown."""
    size = Size()
    parts = [
        "# Power and false alarms of the verdict",
        "These tables show the share of errors that a verdict finds, and its false alarms. They "
        f"are made by `{command}` from simulated records of {size.steps} steps of {size.samples} "
        f"samples, {size.parameters} parameters and {size.projections} projections. One constant "
        "of the comparison, the limit of a single sample, was raised after such records with heavy "
        "tails had raised alarms; no other was chosen with them.",
    ]
    for study in STUDIES:
        count = max(1, round(trials * study.share))
        lines = [study.headings, ("---",) * len(study.headings), *study.rows(count)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts += [f"## {study.title}", study.about, table]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="Markdown file to write")
    parser.add_argument("--trials", type=int, default=2000, help="records of each type and table")
    args = parser.parse_args()
    command = f"python benchmarks/verdict_power.py {args.page}"
    args.page.write_text(page(args.trials, command), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
