"""Names what went wrong: the stage, its layer, step, ranks and samples, and a likely cause."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.diagnose.fingerprint import (
    Ratio,
    fingerprint,
    projected_ratio,
    quantities,
    ratio_of,
)
from dpsgd_track.comparison.diagnose.ladder import Rung, StageStatus
from dpsgd_track.comparison.measure.alignment import Aligned
from dpsgd_track.comparison.measure.observables import SMALL_SAMPLE, relative
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import UNUSED, Floats, sketch_distance, sketch_length

_SHOWN = 3
_FROM_HERE_ON = 0.9
"""Share of the layers before a wrong one that are wrong too where it has passed its error on."""

_FEWEST_BEFORE = 3
"""Fewer parameters before it may be wrong by themselves."""


@dataclass(frozen=True, kw_only=True)
class Blame:
    """The first stage that went wrong by itself."""

    stage: str
    step: int | None
    """None before the first step."""
    layers: tuple[str, ...] = ()
    """Layers or parameters in which the error arose, worst first."""
    inherited: tuple[str, ...] = ()
    """Layers or parameters that only passed it on."""
    samples: tuple[int, ...] = ()
    """Global indices of the samples concerned; empty for all or where it is not per sample."""
    ranks: tuple[int, ...] = ()
    """Ranks concerned; empty for all."""
    fingerprint: str = ""
    """A known ratio between mode and baseline, and what it suggests."""
    sentence: str = ""
    """All of it in one sentence, without a full stop."""


def blame(rungs: Sequence[Rung], pair: Aligned, run: ModeRun) -> Blame | None:
    """Who is to blame for what `rungs` show; None where no stage went wrong by itself.

    Args:
        pair: the two runs that were compared.
        run: the mode's.
    """
    order = {rung.stage: place for place, rung in enumerate(rungs)}
    guilty = [rung for rung in rungs if rung.status is StageStatus.INTRODUCED]
    if not guilty:
        return None
    rung = min(guilty, key=lambda r: (-1 if r.step is None else r.step, order[r.stage]))
    rows = np.flatnonzero(pair.baseline.step == rung.step)
    if not rung.observable or not len(rows):
        step = None if rung.step is None or rung.step < 0 else rung.step
        return _said(Blame(stage=rung.stage, step=step), ())
    # Large fields of long records are read for this step and the one before it alone.
    first = max(0, int(rows[0]) - 1)
    row = int(rows[0]) - first
    pair = Aligned(
        baseline=pair.baseline.rows(first, first + row + 1),
        other=pair.other.rows(first, first + row + 1),
        gaps=(),
    )
    names = tuple(pair.baseline.parameter_names.tolist())
    arose: tuple[str, ...] = rung.items
    inherited: tuple[str, ...] = ()
    if rung.stage == "per-sample norms":
        arose, inherited = where_it_arose(rung.items, names)
        if _are_right_in_sum(inherited, rung, pair, row):
            arose, inherited = rung.items, ()
    samples = _samples(rung, pair, row)
    found = Blame(
        stage=rung.stage,
        step=rung.step,
        layers=arose,
        inherited=inherited,
        samples=tuple(pair.baseline.sample_index[row, samples].tolist()),
        ranks=_ranks(samples, pair, row),
        fingerprint=fingerprint(
            _ratio(rung, pair, row, samples),
            quantities(run, float(pair.baseline.max_grad_norm[row])),
        ),
    )
    return _said(found, names)


def where_it_arose(
    wrong: Sequence[str], names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the `wrong` parameters, those in which the error arose, and those that inherited it.

    A backward goes from the last layer to the first. If the gradient that a layer hands on is
    wrong, so is all that comes after it in the backward, which are the layers before it. Wrong
    parameters with right ones among the layers before them are wrong by themselves.

    Args:
        wrong: worst first.
        names: all parameters, in the order of the forward.
    """
    place = {name: i for i, name in enumerate(names)}
    known = [name for name in wrong if name in place]
    if not known:
        return tuple(wrong), ()
    last = max(known, key=place.__getitem__)
    layer = last.rpartition(".")[0]
    before = [name for name in names[: place[last]] if name.rpartition(".")[0] != layer]
    passed_on = [name for name in known if name in set(before)]
    is_everything = len(known) == len(names)
    is_told = len(before) >= _FEWEST_BEFORE and len(passed_on) >= _FROM_HERE_ON * len(before)
    if is_everything or not is_told:
        return tuple(known), ()
    arose = tuple(name for name in known if name not in set(passed_on))
    return arose, tuple(passed_on)


def _are_right_in_sum(parameters: Sequence[str], rung: Rung, pair: Aligned, row: int) -> bool:
    """Whether gradients of which wrong norms are told add up to what they should.

    A wrong gradient that a layer has handed on would be wrong in the sum as well. Where samples
    were clipped, wrong norms make the sum wrong themselves, and nothing is known.
    """
    ours, theirs = pair.baseline, pair.other
    with np.errstate(invalid="ignore"):
        is_clipped = bool((ours.clip_factor[row] < 1).any() or (theirs.clip_factor[row] < 1).any())
    if is_clipped or not parameters:
        return False
    columns = [i for i, name in enumerate(ours.parameter_names.tolist()) if name in parameters]
    sums = [side.gradient_sketch[[row]][:, columns] for side in (ours, theirs)]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = sketch_distance(*sums) / sketch_length(sums[0])
    limit = rung.limit or 0.0
    return bool(np.nanmedian(errors) <= limit)


def describe(wrong: Sequence[str], names: Sequence[str]) -> str:
    """`wrong` parameters in few words: their names, or what they have in common.

    Args:
        names: all parameters of the model.
    """
    if names and len(wrong) == len(names):
        return f"all {len(names)} parameters"
    if len(wrong) <= _SHOWN:
        return ", ".join(wrong)
    for kind in (lambda name: name.rpartition(".")[2], _pattern):
        groups: dict[str, list[str]] = defaultdict(list)
        for name in names:
            groups[kind(name)].append(name)
        alike = {kind(name) for name in wrong}
        whole = sum(len(groups[each]) for each in alike) == len(wrong)
        if whole and len(alike) <= _SHOWN:
            what = ", ".join(f"*.{each}" if "." not in each else each for each in sorted(alike))
            return f"every {what} ({len(wrong)})"
    return f"{', '.join(wrong[:_SHOWN])} and {len(wrong) - _SHOWN} more"


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _samples(rung: Rung, pair: Aligned, row: int) -> NDArray[np.int64]:
    """Places of the samples that are wrong; none where the stage has no samples."""
    none = np.array([], dtype=np.int64)
    limit = rung.limit or 0.0
    ours, theirs = pair.baseline, pair.other
    with np.errstate(invalid="ignore", over="ignore"):
        match rung.observable:
            case "loss" | "sample_loss":
                error = np.abs(theirs.sample_loss[row] - ours.sample_loss[row])
            case "sample_norm" | "clip_factor":
                a, b = (getattr(t, rung.observable)[row] for t in (ours, theirs))
                scale = np.nanmax(a) if rung.observable == "sample_norm" else 1.0
                error = relative(a, np.abs(b - a), scale, SMALL_SAMPLE)
            case "sample_norm_by_parameter" if rung.items:
                column = ours.parameter_names.tolist().index(rung.items[0])
                a, b = (t.sample_norm_by_parameter[row, :, column] for t in (ours, theirs))
                error = relative(a, np.abs(b - a), ours.sample_norm[row])
            case _:
                return none
    wrong = np.flatnonzero(error > limit)
    there = np.flatnonzero(ours.sample_index[row] != UNUSED)
    return none if len(wrong) == len(there) else wrong


def _ranks(samples: NDArray[np.int64], pair: Aligned, row: int) -> tuple[int, ...]:
    """Ranks that hold the wrong samples, if others hold none of them."""
    ranks = pair.other.sample_rank[row]
    wrong = set(ranks[samples].tolist()) - {UNUSED}
    everybody = set(ranks.tolist()) - {UNUSED}
    return tuple(sorted(wrong)) if wrong < everybody else ()


def _ratio(rung: Rung, pair: Aligned, row: int, samples: NDArray[np.int64]) -> Ratio | None:
    ours, theirs = pair.baseline, pair.other
    chosen: NDArray[np.int64] | slice = samples if len(samples) else slice(None)
    columns = [i for i, name in enumerate(ours.parameter_names.tolist()) if name in rung.items]

    def ratio(field: str) -> Ratio | None:
        a, b = (getattr(side, field)[row] for side in (ours, theirs))
        if field in ("sample_loss", "sample_norm", "clip_factor"):
            a, b = a[chosen], b[chosen]
        return ratio_of(np.atleast_1d(a), np.atleast_1d(b))

    match rung.observable:
        case "sample_norm_by_parameter":
            a, b = (t.sample_norm_by_parameter[row][chosen][:, columns] for t in (ours, theirs))
            return ratio_of(a, b)
        case "gradient" | "noised_gradient":
            field = "gradient_sketch" if rung.observable == "gradient" else "noised_sketch"
            a, b = (getattr(t, field)[row, columns] for t in (ours, theirs))
            return projected_ratio(a, b)
        case "noise":
            a, b = (
                _noise(t.noised_sketch, t.gradient_sketch, row, columns) for t in (ours, theirs)
            )
            return projected_ratio(a, b)
        case "update" if row > 0:
            a, b = (t.weight_sketch[row] - t.weight_sketch[row - 1] for t in (ours, theirs))
            return projected_ratio(a[columns], b[columns])
        case "layer_grad_norm" | "layer_weight_norm":
            places = [i for i, n in enumerate(ours.layer_names.tolist()) if n in rung.items]
            a, b = (getattr(t, rung.observable)[row, places] for t in (ours, theirs))
            return ratio_of(a, b)
        case "weights" | "update":
            return None
    return ratio(rung.observable)


def _noise(noised: Floats, clipped: Floats, row: int, columns: list[int]) -> Floats:
    return np.asarray(noised[row, columns] - clipped[row, columns])


def _said(found: Blame, names: Sequence[str]) -> Blame:
    parts = [found.stage]
    if found.step is not None:
        parts[0] += f" at step {found.step}"
    if found.layers:
        parts.append(f"in {describe(found.layers, names)}")
    if found.inherited:
        parts.append(f"handed on to {len(found.inherited)} parameters before it")
    if found.samples:
        shown = ", ".join(map(str, found.samples[:_SHOWN]))
        more = f" and {len(found.samples) - _SHOWN} more" * (len(found.samples) > _SHOWN)
        parts.append(f"of sample{'s' * (len(found.samples) > 1)} {shown}{more}")
    if found.ranks:
        which = ", ".join(map(str, found.ranks))
        parts.append(f"of rank{'s' * (len(found.ranks) > 1)} {which} alone")
    if found.fingerprint:
        parts.append(found.fingerprint)
    return replace(found, sentence=", ".join(parts))
