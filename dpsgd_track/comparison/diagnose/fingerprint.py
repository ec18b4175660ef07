"""Ratios that reveal a cause: a quantity that is W, sqrt(W), B, 1/B, K, C, sqrt(T) or 2 times
the right one.

Quantities of a run that happen to be equal, such as W = K = 2, can't be told apart: all are named.
A test tells more if its constants differ from each other and from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import Floats

_CLOSE = 5e-3
"""Relative distance from a quantity below which a ratio is taken to be equal to it."""
_NEAR_ONE = 0.02


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The mode's value over the baseline's."""

    value: float
    """Median over the compared elements."""
    spread: float
    """Largest relative distance from the median among the middle four fifths."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity of the run that a ratio may be equal to."""

    symbol: str
    value: float
    meaning: str


def ratio_of(baseline: Floats, other: Floats) -> Ratio | None:
    """The ratio of two arrays' elements; None if it is undefined or meaningless."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = (other / baseline).ravel()
    ratios = ratios[np.isfinite(ratios)]
    if not ratios.size:
        return None
    median = float(np.median(ratios))
    if median == 0:
        return Ratio(value=0.0, spread=float(np.abs(ratios).max()))
    low, high = np.quantile(ratios, [0.1, 0.9])
    return Ratio(value=median, spread=float(max(high - median, median - low) / abs(median)))


def projected_ratio(baseline: Floats, other: Floats) -> Ratio | None:
    """The ratio of two sketched vectors, one of which is a multiple of the other.

    Args:
        baseline, other: [P, K] projections of the affected parameters.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        along = np.sum(baseline * other, axis=1)
        length_sq, other_sq = np.sum(baseline**2, axis=1), np.sum(other**2, axis=1)
        cosine = along / np.sqrt(length_sq * other_sq)
    # A vector that is not a multiple has no ratio.
    if not np.all(np.abs(cosine) > 0.99):
        is_gone = bool(length_sq.any()) and not other_sq.any()
        return Ratio(value=0.0, spread=0.0) if is_gone else None
    return ratio_of(length_sq, along)


def quantities(run: ModeRun, max_grad_norm: float) -> tuple[Quantity, ...]:
    """Known quantities of a run, which ratios are compared with.

    Args:
        run: the run that was compared; without its plan only C is known.
        max_grad_norm: C of the step.
    """
    W = K = b = T = math.nan
    if run.job and run.setup:
        W, K = float(run.job.num_ranks), float(run.setup.micro_batches)
        b, T = float(run.job.data.batch_size), float(run.job.data.seq_length)
    return (
        Quantity(symbol="2", value=2.0, meaning="counted twice"),
        Quantity(symbol="W", value=W, meaning="the number of ranks"),
        Quantity(symbol="sqrt(W)", value=math.sqrt(W), meaning="W the number of ranks"),
        Quantity(symbol="K", value=K, meaning="the number of micro-batches"),
        Quantity(symbol="sqrt(K)", value=math.sqrt(K), meaning="K the number of micro-batches"),
        Quantity(symbol="b", value=b, meaning="the samples of a micro-batch"),
        Quantity(symbol="B", value=W * K * b, meaning="the global batch size"),
        Quantity(symbol="W b", value=W * b, meaning="the samples of a micro-batch of all ranks"),
        Quantity(symbol="K b", value=K * b, meaning="the samples of a rank"),
        Quantity(symbol="C", value=max_grad_norm, meaning="the clipping bound"),
        Quantity(symbol="sqrt(T)", value=math.sqrt(T), meaning="T the sequence length"),
        Quantity(symbol="T", value=T, meaning="the sequence length"),
    )


def fingerprint(ratio: Ratio | None, known: tuple[Quantity, ...]) -> str:
    """The cause that `ratio` suggests, as the end of a sentence; empty if it suggests none."""
    if ratio is None:
        return ""
    if ratio.value == 0 and ratio.spread == 0:
        return "it is zero: left out altogether"
    if ratio.spread > 2 * _CLOSE or abs(ratio.value - 1) < _NEAR_ONE:
        return ""
    names = list(_matching(ratio.value, known))
    if names:
        return f"{ratio.value:.4g} times the baseline's, which is {' or '.join(names)}"
    return f"{ratio.value:.4g} times the baseline's throughout"


def _matching(value: float, known: tuple[Quantity, ...]) -> Iterator[str]:
    seen: set[str] = set()
    sign = "-" if value < 0 else ""
    if math.isclose(value, -1, rel_tol=_CLOSE):
        yield "its negative"
        return
    for quantity in known:
        for symbol, candidate in (
            (quantity.symbol, quantity.value),
            (f"1/{quantity.symbol}", 1 / quantity.value if quantity.value else math.nan),
        ):
            is_one = math.isfinite(candidate) and abs(candidate - 1) < _NEAR_ONE
            if not is_one and math.isclose(abs(value), candidate, rel_tol=_CLOSE):
                name = f"{sign}{symbol} ({quantity.meaning})"
                if name not in seen:
                    seen.add(name)
                    yield name
