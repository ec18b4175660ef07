"""Clipped sums that are made of other positions, rows or columns, or mixed with other sums.

Legend: S steps, N samples, Q wrong parameters, K projections, D positions, rows or columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.comparison.diagnose.hypotheses.mixtures import Term, in_words
from dpsgd_track.comparison.diagnose.hypotheses.places import chosen_places, counted
from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.record.parts import SumParts
from dpsgd_track.record.trajectory import UNUSED, Floats

_FITS = 1e-4
"""Error up to which a sum is predicted, in units of its length."""
_WHOLE = 0.03
"""Distance from a whole number up to which a fitted count is one."""
_NONE = 2e-3
"""Size from which on a coefficient is one."""
_LEAST_TOLD = 0.75
"""Least share of the wrong parameters that has to follow one choice."""
_MOST_ALIKE = 3
"""Choices that agree equally well and are told."""
_ENOUGH = 1.2
"""Numbers for each count that is fitted."""


def _parts(facts: Facts, which: SumParts) -> Floats | None:
    """[S, D, Q, K] parts of the right sum; None where they are not recorded."""
    if not facts.ours.shape_of("part_sketch")[-1]:
        return None
    parts = facts.ours.part_sketch[:, which.value][:, :, facts.columns].astype(np.float64)
    return parts


def _of_parameters(
    facts: Facts, kind: str, clipped: SumParts, unclipped: SumParts | None
) -> Prediction:
    """Each wrong parameter's sum with some of its parts missing, counted twice, or not clipped.

    Args:
        kind: `position`, `row` or `column`.
        unclipped: the same parts without clip factors, of which some may be in their place; None
            to try other counts.
    """
    parts = _parts(facts, clipped)
    others = None if unclipped is None else _parts(facts, unclipped)
    if parts is None or (unclipped is not None and others is None):
        return None
    observed, right = facts.recorded_sum, facts.right_sum
    predicted, said = right.copy(), list[list[str]]()
    rows, num_tried = facts.rows, 0
    for place in range(parts.shape[2]):
        own = parts[rows, :, place]
        if not np.isfinite(own).all() or not own.any():
            continue
        num = int(np.flatnonzero(np.abs(own).max(axis=(0, 2))).max()) + 1
        total, aim = own.sum(axis=1), observed[rows, place]
        size = np.sqrt(np.square(total).mean(axis=-1, keepdims=True))
        size = np.maximum(size, 0.05 * size.max())
        if np.abs(total - right[rows, place]).max() > _FITS * size.max():
            # The mode's own factors are not the reference's.
            return None
        if num < 2:
            continue
        num_tried += 1
        if np.abs(aim).max() <= _FITS * size.max():
            # Whatever its parts are, all of them are missing.
            predicted[rows, place] = 0.0
            said.append(["zero, left out altogether"])
            continue
        change = own if others is None else others[rows, :, place] - own
        found = _counts_of(change[:, :num], aim - total, size, kind, is_loss=others is None)
        if found is None:
            continue
        values, texts = found
        predicted[rows, place] = total + values
        said.append(texts)
    if not said or len(said) < _LEAST_TOLD * num_tried:
        return None
    return _if_alike(facts, predicted, said)


def _if_alike(facts: Facts, predicted: Floats, said: Sequence[Sequence[str]]) -> Prediction:
    """The predicted sums, if most parameters have one mistake, or there are few mistakes.

    Args:
        said: what each parameter's mistake may be called.
    """
    every = [text for texts in said for text in texts]
    best = max(dict.fromkeys(every), key=every.count)
    alike = [text for text in dict.fromkeys(every) if every.count(text) == every.count(best)]
    if every.count(best) < _LEAST_TOLD * len(said):
        others = dict.fromkeys(texts[0] for texts in said if best not in texts)
        if len(others) > 1:
            return None
        alike = [", others ".join([best, *others])]
    # Parameters that no choice explains have other layers' gradients in them.
    off = np.abs(predicted - facts.recorded_sum)[facts.rows].max(axis=(0, 2))
    size = np.abs(facts.recorded_sum)[facts.rows].max(axis=(0, 2))
    untold = off > 10 * _FITS * size
    predicted[:, untold] = facts.recorded_sum[:, untold]
    return Fitted(predicted, " or ".join(alike[:_MOST_ALIKE]))


def _counts_of(
    parts: Floats, off: Floats, size: Floats, kind: str, *, is_loss: bool
) -> tuple[Floats, list[str]] | None:
    """Change of a sum by parts that are lost, counted twice, or not clipped.

    Args:
        parts: [S, D, K].
        off: [S, K] difference of the recorded sum from the right one.
        size: [S, 1] unit of an error.
        is_loss: True if parts may be missing, False if they may be added.
    """
    num = parts.shape[1]
    sign = -1.0 if is_loss else 1.0
    texts = []
    for mask, said in chosen_places(num, kind):
        chosen = 1 - mask if is_loss else mask
        values = sign * np.einsum("sdk,d->sk", parts, chosen)
        if np.abs(values - off).max(initial=0.0) <= _FITS * size.max():
            texts.append(f"made of {said} alone" if is_loss else f"not clipped in {said}")
    if texts:
        return off, texts
    table = (parts / size[:, None]).transpose(0, 2, 1).reshape(-1, num)
    wanted = (off / size).ravel()
    if len(wanted) < _ENOUGH * num:
        return None
    more = np.linalg.lstsq(table, wanted, rcond=1e-5)[0]
    whole = np.round(more)
    # Of a part that is zero any count is as good.
    is_there = np.abs(table).max(axis=0) > _FITS
    if not whole.any() or np.abs((more - whole)[is_there]).max(initial=0.0) > _WHOLE:
        return None
    if is_loss and np.any(whole < -1):
        return None
    values = np.einsum("sdk,d->sk", parts, whole)
    if is_loss:
        return values, [f"with {counted(1 + whole, kind)}"]
    if np.any((whole != 0) & (whole != 1)):
        return None
    return values, [f"not clipped in {counted(1 - whole, kind).removesuffix(' missing')}"]


def _terms(facts: Facts) -> Iterator[Term]:
    """Other sums of the step or of those before, [S, Q, K], that a mistake may mix in."""
    theirs, right = facts.recorded_sum, facts.right_sum
    yield Term(_shifted(theirs), "the sum that the step before ended with")
    yield Term(_shifted(right), "the right sum of the step before")
    if not facts.has_sketches:
        return
    there = np.where(np.isfinite(facts.factor), 1.0, np.nan)
    raw = facts.weighted(there)
    yield Term(raw, "the sum without clipping")
    yield Term(_shifted(raw), "the step before's sum without clipping")
    numbers, ranks = facts.theirs.sample_micro_batch, facts.theirs.sample_rank
    for number in sorted(set(numbers.flat) - {UNUSED}):
        weights = np.where(numbers == number, facts.factor, 0.0)
        yield Term(facts.weighted(weights), f"the sum of micro-batch {number}")
    last = numbers.max(axis=1, keepdims=True)
    yield Term(
        facts.weighted(np.where(numbers == last, facts.factor, 0.0)),
        "the sum of the last micro-batch",
    )
    yield Term(
        facts.weighted(np.where(numbers < last, facts.factor, 0.0)),
        "the sum of all micro-batches but the last",
    )
    for rank in sorted(set(ranks.flat) - {UNUSED}):
        yield Term(
            facts.weighted(np.where(ranks == rank, facts.factor, 0.0)), f"the sum of rank {rank}"
        )
    squared = facts.weighted(np.square(facts.factor))
    yield Term(squared, "the sum with squared clip factors")
    moved = facts.ours.moved_sketch
    for place, formula in enumerate(SumFormula):
        if moved.shape[-1] and place < moved.shape[1]:
            values = moved[:, place][:, facts.columns].astype(np.float64)
            yield Term(values, f"the sum that is {formula.value}")


def _shifted(values: Floats) -> Floats:
    return np.concatenate([np.zeros_like(values[:1]), values[:-1]])


def mixed_sums(facts: Facts) -> Prediction:
    """The sum as the right one and one or two others, each counted some times."""
    terms = [t for t in _terms(facts) if np.isfinite(t.values[facts.rows]).all()]
    own, observed, rows = facts.right_sum, facts.recorded_sum, facts.rows
    size = np.sqrt(np.square(own).mean(axis=2, keepdims=True))
    size = np.maximum(size, 0.05 * size.max(axis=1, keepdims=True))[rows]
    if not np.isfinite(own[rows]).all() or not (size > 0).all():
        rows = rows[(size > 0).all(axis=(1, 2))]
        size = size[(size > 0).all(axis=(1, 2))]
    if not len(rows):
        return None
    flat = [(t.values[rows] / size).ravel() for t in terms]
    right, wanted = (own[rows] / size).ravel(), (observed[rows] / size).ravel()
    for num in (1, 2):
        # Alternatives are many, and one of them is a mistake by itself.
        candidates = range(len(terms)) if num == 1 else range(min(len(terms), _MOST_PAIRED))
        for chosen in combinations(candidates, num):
            table = np.stack([right, *(flat[i] for i in chosen)], axis=1)
            found, _, rank, _ = np.linalg.lstsq(table, wanted, rcond=1e-8)
            is_used = np.abs(found[1:]) > _NONE
            if rank < num + 1 or not is_used.all():
                continue
            if np.abs(table @ found - wanted).max() > 10 * _FITS:
                continue
            values = found[0] * own
            for share, i in zip(found[1:], chosen, strict=True):
                values = values + share * terms[i].values
            told = [(float(f), terms[i].text) for f, i in zip(found[1:], chosen, strict=True)]
            return Fitted(values, in_words(float(found[0]), told, "the right one"))
    return None


_MOST_PAIRED = 12
"""Terms of which two are tried together."""


def of_parts() -> Sequence[Sequence[Hypothesis]]:
    """Levels of hypotheses about parts of the clipped sum."""
    kinds = (
        ("position", SumParts.POSITIONS, None),
        ("position", SumParts.POSITIONS, SumParts.UNCLIPPED_POSITIONS),
        ("row", SumParts.ROWS, None),
        ("column", SumParts.COLUMNS, None),
        ("row", SumParts.ROWS, SumParts.UNCLIPPED_ROWS),
    )
    return tuple(
        (
            Hypothesis(
                sentence="it is {}",
                predict=partial(_of_parameters, kind=kind, clipped=clipped, unclipped=unclipped),
            ),
        )
        for kind, clipped, unclipped in kinds
    )
