"""Norms by parameter that are made of other positions, rows, columns, parameters or samples.

The reference records the squares of each sample's gradient by position, row and column. Families of
mistakes with them are tried one after the other, and where none fits, counts are fitted.

Legend: S steps, N samples, Q wrong parameters, T positions, X squares, D rows or columns, n wrong
numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.comparison.diagnose.hypotheses.mixtures import (
    FITS,
    Term,
    coefficients,
    in_words,
    mixed,
    mixture,
    of_neighbours,
)
from dpsgd_track.comparison.diagnose.hypotheses.places import chosen_places, counted
from dpsgd_track.record.alternatives import NormFormula
from dpsgd_track.record.parts import (
    COLUMN_SQUARES,
    MOST_POSITIONS,
    NUM_PAIRS,
    ROW_SQUARES,
    products_of,
)
from dpsgd_track.record.trajectory import Floats

_SMALL = 1e-3
"""Least unit of an error, as a share of the largest norm."""
_LEAST_TOLD = 0.5
"""Least share of the wrong parameters that has to follow one family."""
_FEWEST = 4
"""Wrong numbers of a parameter, to tell a family from."""
_FEWEST_SCALED = 8
"""The same where a factor is fitted."""
_WHOLE = 0.02
"""Distance from a whole number up to which a fitted count is one."""
Named = tuple[Floats, str]
"""Squared norms of the wrong numbers of one parameter, [n], and the mistake in words."""


class _Column:
    """The wrong numbers of one parameter."""

    def __init__(self, facts: Facts, column: int, is_wrong: np.ndarray, parts: Floats) -> None:
        self.at = is_wrong
        self.observed = facts.theirs.sample_norm_by_parameter[..., column][is_wrong]
        self.right = facts.ours.sample_norm_by_parameter[..., column][is_wrong]
        self.parts = parts[is_wrong]
        self.length = _num_positions(facts)

    def agrees(self, squares: Floats) -> bool:
        """True if the squared norms [n] are those that the mode recorded."""
        with np.errstate(invalid="ignore"):
            error = np.abs(np.sqrt(np.maximum(squares, 0.0)) - self.observed)
        return bool(np.nan_to_num(error / self.unit, nan=np.inf).max() <= FITS)

    @property
    def unit(self) -> Floats:
        """[n] unit of an error."""
        return np.maximum(np.maximum(self.right, self.observed), _SMALL * self.right.max())


def _num_positions(facts: Facts) -> int:
    """Positions of the samples: the last one may add nothing to some parameters; 0 if unknown."""
    if not facts.ours.shape_of("sample_part_square")[-1]:
        return 0
    first, second = np.triu_indices(MOST_POSITIONS)
    squares = facts.ours.sample_part_square[..., :NUM_PAIRS][..., first == second]
    used = np.flatnonzero(np.nan_to_num(squares).max(axis=(0, 1, 2), initial=0.0) > 0)
    return int(used.max(initial=0)) + 1


def _columns(facts: Facts) -> dict[int, _Column]:
    """The parameters that have wrong numbers, by their place among the wrong ones."""
    theirs, ours = facts.theirs.sample_norm_by_parameter, facts.ours.sample_norm_by_parameter
    parts = facts.ours.sample_part_square
    found: dict[int, _Column] = {}
    in_rows = np.zeros(theirs.shape[:2], dtype=bool)
    in_rows[facts.rows] = True
    for place, column in enumerate(facts.columns.tolist()):
        right, observed = ours[..., column], theirs[..., column]
        unit = np.maximum(np.abs(right), _SMALL * np.nanmax(right, initial=0.0))
        with np.errstate(invalid="ignore"):
            is_wrong = in_rows & (np.abs(observed - right) > FITS * unit)
        if is_wrong.sum() >= _FEWEST:
            found[place] = _Column(facts, column, is_wrong, parts[:, :, column])
    return found


def _by_families(facts: Facts, families: Callable[[_Column], Iterator[Named]]) -> Prediction:
    """The wrong parameters by the family that most of them follow."""
    if not facts.ours.shape_of("sample_part_square")[-1]:
        return None
    columns = _columns(facts)
    followers: dict[str, dict[int, Floats]] = defaultdict(dict)
    for place, column in columns.items():
        for squares, said in families(column):
            if column.agrees(squares):
                followers[said].setdefault(place, squares)
    if not columns or not followers:
        return None
    said, of_columns = max(followers.items(), key=lambda each: len(each[1]))
    alike = [text for text, own in followers.items() if own.keys() == of_columns.keys()]
    said = " or ".join(alike[:_MOST_ALIKE])
    if len(of_columns) < _LEAST_TOLD * len(columns):
        return None
    predicted = facts.ours.sample_norm_by_parameter[:, :, facts.columns].astype(np.float64)
    for place, column in columns.items():
        # The few parameters that do not follow it have other layers' gradients in them.
        told = of_columns.get(place)
        values = column.observed if told is None else np.sqrt(np.maximum(told, 0.0))
        predicted[..., place][column.at] = values
    some = f" (in {len(of_columns)} of {len(columns)} parameters)"
    return Fitted(predicted, said + some * (len(of_columns) < len(columns)))


def _of_positions(column: _Column) -> Iterator[Named]:
    products = products_of(column.parts)
    if not np.isfinite(products).all():
        return
    length = column.length
    products = products[:, :length, :length]
    squares = np.einsum("ntt->nt", products)
    if length < 3:
        return
    for mask, said in chosen_places(length, "position"):
        chosen = np.einsum("nst,s,t->n", products, mask, mask)
        yield chosen, f"made of {said} alone"
        if len(chosen) >= _FEWEST_SCALED and (chosen > 0).all():
            times = float(np.median(column.observed**2 / chosen))
            yield times * chosen, f"made of {said} alone, with squares multiplied by {times:.3g}"
    yield np.square(np.sqrt(squares).sum(axis=1)), "the sum of the positions' norms |g_t|"
    yield squares.max(axis=1), "the norm of the position whose |g_t| is largest"
    apart = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    for most in range(1, length - 1):
        yield (
            (products * (apart <= most)).sum(axis=(1, 2)),
            f"made of products of positions that are at most {most} apart: others are missing",
        )
    for size in range(2, length):
        tile = np.arange(length) // size
        within = (products * (tile[:, None] == tile)).sum(axis=(1, 2))
        yield within, f"without cross terms between tiles of {size} positions"
        yield (
            (within + products.sum(axis=(1, 2))) / 2,
            f"with cross terms between tiles of {size} positions counted once rather than twice",
        )
    diagonal = squares.sum(axis=1)
    cross = products.sum(axis=(1, 2)) - diagonal
    # A sum that is negative has no root, and is told as 0.
    is_there = column.observed > 0
    fitted = coefficients(
        [diagonal[is_there], cross[is_there]],
        column.observed[is_there] ** 2,
        column.unit[is_there] ** 2,
    )
    # All counted as often is a factor, which says nothing of positions.
    if fitted is not None and abs(fitted[0] - fitted[1]) > _WHOLE:
        a, b = (round(float(f), 2) for f in fitted)
        yield (
            a * diagonal + b * cross,
            f"with the squares |g_t|^2 of positions counted {_times(a)} and their cross terms "
            f"{_times(b)}",
        )


def _times(count: float) -> str:
    whole = {0.0: "not at all", 1.0: "once (as is right)", -1.0: "with the wrong sign"}
    return whole.get(count, f"{count:g} times")


def _of_rows(column: _Column) -> Iterator[Named]:
    for place, kind in ((ROW_SQUARES, "row"), (COLUMN_SQUARES, "column")):
        squares = column.parts[:, place].astype(np.float64)
        if not np.isfinite(squares).all():
            continue
        num = int(np.flatnonzero(squares.max(axis=0) > 0).max(initial=0)) + 1
        squares = squares[:, :num]
        if num < 2:
            continue
        is_named = False
        for mask, said in chosen_places(num, kind):
            is_named |= column.agrees(squares @ mask)
            yield squares @ mask, f"made of {said} of the gradient alone"
        if not is_named:
            yield from _counts(column, squares, kind)
        for count in (2, 3, 4, 8):
            pieces = [
                np.sqrt(squares[:, p].sum(axis=1)) for p in np.array_split(np.arange(num), count)
            ]
            yield (
                np.square(np.sum(pieces, axis=0)),
                f"the sum of the norms of {count} blocks of {kind}s, not the root of the sum of "
                "their squares",
            )
        yield (
            np.square(np.sqrt(squares).sum(axis=1)),
            f"the sum of the {kind}s' norms, not the root of the sum of their squares",
        )
        yield squares.max(axis=1), f"the largest of the {kind}s' norms"


def _counts(column: _Column, squares: Floats, kind: str) -> Iterator[Named]:
    """Rows or columns, each counted as often as agrees best."""
    if len(squares) < squares.shape[1] + _FEWEST:
        return
    off = column.observed**2 - squares.sum(axis=1)
    unit = column.unit**2
    more = np.linalg.lstsq(squares / unit[:, None], off / unit, rcond=1e-6)[0]
    counts = np.round(1 + more)
    if np.abs(1 + more - counts).max() < _WHOLE and np.any(counts != 1) and np.all(counts >= 0):
        yield squares @ counts, f"with {counted(counts, kind)} of the gradient"


def _of_formulas(facts: Facts) -> list[Term]:
    """Squared norms [S, N, Q] by the formulas that the reference records."""
    norms = facts.ours.sample_other_norm[:, :, facts.columns].astype(np.float64)
    return [
        Term(np.square(norms[..., place]), f"those {formula.value}")
        for place, formula in enumerate(NormFormula)
        if place < norms.shape[-1]
    ]


def _mixed(facts: Facts, *, with_formulas: bool) -> Prediction:
    """Squared norms as a sum of the right ones and others, the same in all wrong parameters."""
    columns = _columns(facts)
    squares = np.square(facts.ours.sample_norm_by_parameter[:, :, facts.columns].astype(np.float64))
    if not columns:
        return None
    terms = _of_formulas(facts) if with_formulas else of_neighbours(facts, squares)
    is_wrong = np.zeros(squares.shape, dtype=bool)
    for place, column in columns.items():
        is_wrong[..., place] = column.at
    observed = np.square(facts.theirs.sample_norm_by_parameter[:, :, facts.columns])
    unit = np.maximum(squares, observed)
    known = [t for t in terms if np.isfinite(t.values[is_wrong]).mean() > _LEAST_TOLD]
    flat = [Term(t.values[is_wrong], t.text) for t in known]
    found = mixture(squares[is_wrong], flat, observed[is_wrong], unit[is_wrong])
    if found is None:
        return None
    every, told, own = found
    total = mixed(every, squares, known)
    predicted = np.sqrt(squares)
    ok = is_wrong & np.isfinite(total)
    predicted[ok] = np.sqrt(np.maximum(total[ok], 0.0))
    # Where a sample has no neighbour, nothing can be predicted.
    lacking = is_wrong & ~np.isfinite(total)
    predicted[lacking] = np.sqrt(observed[lacking])
    return Fitted(predicted, in_words(own, told, "the right ones"))


def _of_other_parameters(facts: Facts) -> Prediction:
    """Norms of other parameters in place of each wrong one's, or added to it."""
    columns = _columns(facts)
    norms = facts.ours.sample_norm_by_parameter.astype(np.float64)
    names = facts.ours.parameter_names.tolist()
    predicted, said = norms[:, :, facts.columns].copy(), []
    for place, column in columns.items():
        own = int(facts.columns[place])
        wanted, unit = column.observed**2, column.unit**2
        for other in range(len(names)):
            square = norms[..., other][column.at] ** 2
            if other == own or not square.any():
                continue
            for squares, how in (
                (square, "has that of"),
                (column.right**2 + square, "has also that of"),
            ):
                if np.abs(squares - wanted).max(initial=0.0) <= 2 * FITS * unit.max() and (
                    column.agrees(squares)
                ):
                    said.append(f"{names[own]} {how} {names[other]}")
                    predicted[..., place][column.at] = np.sqrt(squares)
                    break
            else:
                continue
            break
        else:
            predicted[..., place][column.at] = column.observed
    if len(said) <= _LEAST_TOLD * len(columns):
        return None
    more = f" and {len(said) - _SHOWN} more" * (len(said) > _SHOWN)
    return Fitted(predicted, ", ".join(said[:_SHOWN]) + more)


_MOST_ALIKE = 3
"""Families that agree equally well and are told."""
_SHOWN = 3
"""Parameters that are listed."""


def resolved_norms() -> Sequence[Sequence[Hypothesis]]:
    """Levels of hypotheses about norms by parameter."""
    return (
        tuple(
            Hypothesis(sentence="they are {}", predict=partial(_by_families, families=families))
            for families in (_of_positions, _of_rows)
        ),
        (
            Hypothesis(
                sentence="norms are mixed up between parameters: {}", predict=_of_other_parameters
            ),
        ),
        tuple(
            Hypothesis(
                sentence="their squares are {}",
                predict=partial(_mixed, with_formulas=with_formulas),
            )
            for with_formulas in (False, True)
        ),
    )
