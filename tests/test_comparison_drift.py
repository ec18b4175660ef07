"""The fast walk through all pairs measures what its definition says, item by item."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison import compare_group, compare_groups
from dpsgd_track.comparison.measure import alignment, excess
from dpsgd_track.comparison.measure import drift as drift_module
from dpsgd_track.comparison.measure.drift import Pair, compare_pair, compare_pairs
from dpsgd_track.comparison.measure.observables import OBSERVABLES, SMALL, SMALL_SAMPLE, STAGES
from dpsgd_track.comparison.waivers import Waiver
from dpsgd_track.config import Thresholds
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import LARGE, SAMPLE_COLUMNS, Trajectory
from tests.support.synthetic_group import (
    group_of,
    healthy_runs,
    mode_run,
    permuted,
    put,
    scaled,
    trajectory,
    with_run,
    without_norms,
)

STEPS = 40
LABELS = {"layer": "layer {}", "parameter": "parameter {}", "sample": "sample {}"}


def ratio(own: Any, difference: Any, total: Any, small: float = SMALL) -> Any:
    return 0.0 if difference == 0 else difference / np.maximum(abs(own), small * total)


def l2(values: Any) -> Any:
    return np.sqrt(np.nansum(np.square(values)))


def l2s(columns: Any) -> Any:
    return [l2(row) for row in np.transpose(columns)]


def length(sketch: Any) -> Any:
    return np.sqrt(np.mean(np.square(sketch)))


class Readable:
    """The definition: two records, compared one number at a time."""

    def __init__(self, ours: Trajectory, theirs: Trajectory) -> None:
        self.a, self.b = ours, theirs
        at = {int(step): row for row, step in enumerate(theirs.step)}
        self.rows = [(row, at[int(s)]) for row, s in enumerate(ours.step) if int(s) in at]
        self.layers = self._shared(ours.layer_names, theirs.layer_names)
        self.parameters = self._shared(ours.parameter_names, theirs.parameter_names)

    @staticmethod
    def _shared(ours: Any, theirs: Any) -> list[tuple[str, int, int]]:
        there = theirs.tolist()
        return [(n, i, there.index(n)) for i, n in enumerate(ours.tolist()) if n in there]

    def samples(self, i: int, j: int) -> list[tuple[str, int, int]]:
        there = self.b.sample_index[j].tolist()
        indices = self.a.sample_index[i].tolist()
        return [(str(s), n, there.index(s)) for n, s in enumerate(indices) if s >= 0 and s in there]

    def differences(self, name: str) -> list[dict[str, Any]]:
        """Of each step in common, the difference of each item by its label."""
        with np.errstate(all="ignore"):
            return [self._step(name, k) for k in range(len(self.rows))]

    def _step(self, name: str, k: int) -> dict[str, Any]:
        a, b, (i, j) = self.a, self.b, self.rows[k]
        field = OBSERVABLES[name].field
        x, y = getattr(a, field), getattr(b, field)
        match name:
            case "loss":
                return {"": abs(y[j] - x[i])}
            case "final_loss":
                return {"": abs(y[j] - x[i])} if k == len(self.rows) - 1 else {}
            case "sample_loss" | "clip_factor":
                return {f"sample {s}": abs(y[j, q] - x[i, p]) for s, p, q in self.samples(i, j)}
            case "sample_norm":
                total = max(np.nan_to_num(abs(x[i])))
                return {
                    f"sample {s}": ratio(x[i, p], abs(y[j, q] - x[i, p]), total, SMALL_SAMPLE)
                    for s, p, q in self.samples(i, j)
                }
            case "sample_norm_by_parameter":
                totals = l2s([x[i, :, u] for _, u, _ in self.parameters])
                return {
                    f"sample {s}, parameter {w}": ratio(
                        x[i, p, u], abs(y[j, q, v] - x[i, p, u]), totals[p]
                    )
                    for s, p, q in self.samples(i, j)
                    for w, u, v in self.parameters
                }
            case "grad_norm" | "grad_norm_noised":
                total = max(np.nan_to_num(abs(x[row])) for row, _ in self.rows)
                return {"": ratio(x[i], abs(y[j] - x[i]), total, SMALL_SAMPLE)}
            case "layer_grad_norm" | "layer_weight_norm":
                total = l2([x[i, u] for _, u, _ in self.layers])
                total = a.grad_norm[i] if name == "layer_grad_norm" else total
                return {
                    f"layer {w}": ratio(x[i, u], abs(y[j, v] - x[i, u]), total)
                    for w, u, v in self.layers
                }
        return self._sketches(name, k)

    def _sketches(self, name: str, k: int) -> dict[str, Any]:
        a, b, (i, j) = self.a, self.b, self.rows[k]
        field = OBSERVABLES[name].field
        ours = {w: getattr(a, field)[i, u] for w, u, _ in self.parameters}
        theirs = {w: getattr(b, field)[j, v] for w, _, v in self.parameters}
        units = {w: length(v) for w, v in ours.items()}
        least: Any = dict.fromkeys(ours, l2(list(units.values())))
        if name == "noise":
            ours = {w: ours[w] - a.gradient_sketch[i, u] for w, u, _ in self.parameters}
            theirs = {w: theirs[w] - b.gradient_sketch[j, v] for w, _, v in self.parameters}
        if name == "update":
            if k == 0:
                return {}
            before, there = self.rows[k - 1]
            weights = units
            ours = {w: ours[w] - a.weight_sketch[before, u] for w, u, _ in self.parameters}
            theirs = {w: theirs[w] - b.weight_sketch[there, v] for w, _, v in self.parameters}
            units = {w: length(v) for w, v in ours.items()}
            total = l2(list(units.values()))
            least = {w: np.maximum(total, weights[w]) for w in units}
        return {
            f"parameter {w}": ratio(units[w], length(theirs[w] - ours[w]), least[w]) for w in ours
        }


def check(pair: Pair, ours: Trajectory, theirs: Trajectory) -> None:
    """`pair` is what the definition says of `ours` and `theirs`."""
    readable = Readable(ours, theirs)
    for name in OBSERVABLES:
        wanted = readable.differences(name)
        known = [{w: v for w, v in step.items() if not np.isnan(v)} for step in wanted]
        if not any(known):
            assert name in pair.not_computed, name
            continue
        drift = pair.drifts[name]
        largest = [max(step.values(), default=np.nan) for step in known]
        # 1e-9: sums may be taken in another order; equal values must stay equal.
        np.testing.assert_allclose(drift.per_step, largest, rtol=1e-9, err_msg=name)
        assert ((drift.per_step == 0) == (np.array(largest) == 0)).all()
        assert len(drift.where_per_step) == len(known)
        for row, step in enumerate(known):
            if step:
                assert drift.where_per_step[row] == max(step, key=lambda w: step[w]), name
        assert drift.max == np.nanmax(drift.per_step)
        assert drift.steps[drift.per_step == drift.max][0] == drift.step
        check_items(drift, known)


def check_items(drift: drift_module.Drift, known: list[dict[str, Any]]) -> None:
    """What is said of each layer or parameter is the largest of what belongs to it."""
    kind = "layer" if drift.observable.items == "layer" else "parameter"
    of_items = drift.observable.items in ("layer", "parameter", "sample_parameter")
    assert (drift.per_step_by_item is not None) == of_items == bool(drift.items)
    if drift.per_step_by_item is None:
        return
    for column, item in enumerate(drift.items):
        wanted = [
            max((v for w, v in step.items() if w.endswith(f"{kind} {item}")), default=np.nan)
            for step in known
        ]
        got = drift.per_step_by_item[:, column]
        np.testing.assert_allclose(got, np.float32(wanted), rtol=1e-6)
        if drift.observable.items != "sample_parameter" and not np.isnan(wanted).all():
            np.testing.assert_allclose(drift.by_item[item], np.nanmax(wanted), rtol=1e-9)


def rounded(t: Trajectory, seed: int) -> Trajectory:
    """`t` with an error of its own in everything that is compared."""
    rng = np.random.default_rng(seed)
    changed: dict[str, Any] = {}
    for name in {o.field for o in OBSERVABLES.values()}:
        values = getattr(t, name)
        changed[name] = values * (1 + 1e-6 * rng.standard_normal(values.shape))
    return replace(t, **changed)


def without_steps(t: Trajectory, gone: list[int]) -> Trajectory:
    kept = np.setdiff1d(np.arange(t.num_steps), gone)
    whole = ("_names", "_sizes")
    names = [n for n in t.__dataclass_fields__ if not n.endswith(whole)]
    arrays = {n: getattr(t, n) for n in names if isinstance(getattr(t, n), np.ndarray)}
    return replace(t, **{n: v[kept] for n, v in arrays.items()})  # type: ignore[arg-type]


def without_columns(t: Trajectory, layer: int, parameter: int) -> Trajectory:
    names = ("layer_names", "layer_weight_norm", "layer_grad_norm")
    changed: dict[str, Any] = {n: np.delete(getattr(t, n), layer, axis=-1) for n in names}
    for name, axis in (
        ("parameter_names", 0),
        ("parameter_sizes", 0),
        ("sample_norm_by_parameter", 2),
        ("sample_sketch", 2),
        ("sample_shard_sketch", 2),
        ("sample_other_norm", 2),
        ("sample_part_square", 2),
        ("part_sketch", 2),
        ("moved_sketch", 2),
        ("gradient_sketch", 1),
        ("noised_sketch", 1),
        ("weight_sketch", 1),
        ("noise_samples", 2),
    ):
        changed[name] = np.delete(getattr(t, name), parameter, axis=axis)
    return replace(t, **changed)


def with_other_samples(t: Trajectory) -> Trajectory:
    """Every third step has another sample in one place, and lacks one."""
    index = t.sample_index.copy()
    index[::3, 2] += 10_000
    index[1::3, 4] = -1
    gone = index == -1
    changed: dict[str, Any] = {"sample_index": index}
    for name in ("sample_loss", "sample_norm", "clip_factor", "sample_norm_by_parameter"):
        changed[name] = getattr(t, name).copy()
        changed[name][gone] = np.nan
    return replace(t, **changed)


def shuffled(t: Trajectory) -> Trajectory:
    """`t` with the samples of every step in an order of its own."""
    order = np.argsort(np.random.default_rng(0).random(t.sample_index.shape), axis=1)
    rows = np.arange(t.num_steps)[:, None]
    changed: dict[str, Any] = {name: getattr(t, name)[rows, order] for name in SAMPLE_COLUMNS}
    return replace(t, **changed)


def with_an_empty_step(t: Trajectory) -> Trajectory:
    """`t` with a step in which every gradient is zero, and so is what it would be divided by."""
    for name in ("gradient_sketch", "noised_sketch", "grad_norm", "layer_grad_norm"):
        t = put(t, name, 0.0, 9)
    return t


BASE = with_an_empty_step(trajectory(steps=STEPS, samples=6))
OTHERS = {
    "equal": BASE,
    "rounded": rounded(BASE, 1),
    "permuted": permuted(rounded(BASE, 2)),
    "shuffled": shuffled(rounded(BASE, 2)),
    "not-empty": put(rounded(BASE, 11), "gradient_sketch", 1.0, (9, 2)),
    "nan": put(rounded(BASE, 3), "gradient_sketch", np.nan, (17, 2)),
    "infinity": put(rounded(BASE, 4), "sample_norm_by_parameter", np.inf, (21, 3, 1)),
    "infinite-weights": put(rounded(BASE, 5), "weight_sketch", -np.inf, (20, 1, 3)),
    "fewer-steps": without_steps(rounded(BASE, 6), [0, 7, 8, 31]),
    "fewer-columns": without_columns(rounded(BASE, 7), 1, 2),
    "other-samples": with_other_samples(rounded(BASE, 8)),
    "no-norms": without_norms(rounded(BASE, 9)),
    "all-at-once": permuted(
        without_steps(without_columns(with_other_samples(rounded(BASE, 10)), 0, 3), [5, 39])
    ),
}


# Blocks of a size of 1 have the least length, 16 steps.
in_blocks = pytest.mark.parametrize(
    "blocks", [{}, {"block_size": 1}], ids=["one-block", "many-blocks"]
)


@in_blocks
@pytest.mark.parametrize("name", OTHERS)
def test_fast_form_measures_what_the_readable_one_does(name: str, blocks: dict[str, int]) -> None:
    other = OTHERS[name]
    check(compare_pair("accuracy", ("base", BASE), ("other", other), **blocks), BASE, other)
    check(compare_pair("accuracy", ("other", other), ("base", BASE), **blocks), other, BASE)


@in_blocks
def test_pairs_compared_together_are_what_they_are_alone_and_read_from_files(
    tmp_path: Path, blocks: dict[str, int]
) -> None:
    stored: dict[str, Trajectory] = {}
    for name, record in OTHERS.items():
        record.save(tmp_path / "one.npz")
        stored[name] = Trajectory.load(tmp_path / "one.npz")
    base = ("equal", stored["equal"])
    together = compare_pairs("accuracy", [(base, other) for other in stored.items()], **blocks)
    for pair in together:
        check(pair, BASE, OTHERS[pair.mode])
    read = {n: [f for f in LARGE if f in t.__dict__] for n, t in stored.items()}
    assert not any(read.values()), "large fields are read by rows and not kept"


def test_pair_that_is_not_detailed_keeps_no_items() -> None:
    pairs = [(("base", BASE), (name, OTHERS[name])) for name in ("rounded", "permuted")]
    first, second = compare_pairs("accuracy", pairs, num_detailed=1)  # type: ignore[arg-type]
    assert first.drifts["gradient"].per_step_by_item is not None
    assert second.drifts["gradient"].per_step_by_item is None
    assert second.drifts["gradient"].by_item


def test_update_sees_a_jump_at_the_first_step_of_a_block() -> None:
    moved = scaled(BASE, "weight_sketch", 1.01, np.s_[16:])
    pair = compare_pair("accuracy", ("base", BASE), ("moved", moved), block_size=1)
    drift = pair.drifts["update"]
    assert drift.per_step[15] == 0
    assert drift.step == 16


class Calls:
    """How often a function was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.count = 0
        original = getattr(module, name)

        def counted(*args: Any, **more: Any) -> Any:
            self.count += 1
            return original(*args, **more)

        monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_each_pair_is_aligned_and_held_against_its_limits_once(
    monkeypatch: pytest.MonkeyPatch, num_groups: int
) -> None:
    # What only these two call, so that whoever calls them is counted.
    aligned = Calls(monkeypatch, alignment, "_sample_places")
    weighed = Calls(monkeypatch, excess, "limits_of")
    wrong = scaled(trajectory(noise_std=0.0), "gradient_sketch", 1.5)
    changed = with_run(healthy_runs(), mode_run("flash_fsdp", "clip", wrong))
    after, before = group_of(changed), group_of(healthy_runs(), "before")
    until = datetime.date.max
    waiver = Waiver(mode="flash_fsdp", observable="gradient", reason="known", expires=until)
    if num_groups == 1:
        comparison = compare_group(after, Thresholds(), [waiver])
        replays = 1
    else:
        comparison = compare_groups(before, after, Thresholds(), [waiver])
        replays = 2
    assert any(f.waiver for mode in comparison.modes for f in mode.findings)
    judged = [pair for regime in comparison.regimes for pair in regime.pairs]
    # Within a group, two pairs are measured for the largest drift alone.
    assert aligned.count == len(judged) + replays + 2 * (num_groups == 1)
    assert weighed.count == sum(len(pair.drifts) for pair in judged)


def test_every_name_of_an_observable_is_compared() -> None:
    assert list(OBSERVABLES) == list(ObservableName)
    computed = [stage for stage in Stage if stage not in (Stage.DATA, Stage.INITIAL_WEIGHTS)]
    assert list(STAGES) == computed
