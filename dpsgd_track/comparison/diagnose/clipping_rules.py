"""Other clipping rules that a mode's numbers are consistent with, in place of flat clipping.

Flat clipping multiplies a sample's gradient by min(1, C / norm). Other rules in use are:

- automatic: by C / (norm + gamma), or with gamma = 0 normalisation (Bu et al., 2023, "Automatic
  clipping"); the factors that the mode reports show it;
- per layer: each part of the gradient by a factor of its own, min(1, B / norm of the part), where
  B is C / sqrt(L) of L parts, so that the whole is bounded by C (McMahan et al., 2018, "Learning
  differentially private recurrent language models"); the lengths of the clipped sum of each
  parameter show it, beside the oracle's norm of each sample and parameter.

Such a mode computes something else than the baseline. The rule is only a hint at why.

Legend: S steps, N samples, P parameters, G parts (layers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.measure.alignment import Aligned
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_length

_MOST_STEPS = 16
_FEWEST_FACTORS = 4
"""Fewest factors unlike those of flat clipping that show a rule."""
_CLOSE = 2e-3
"""Largest relative error of a reported factor."""
_FEWEST_SUMS = 8
"""Fewest lengths of clipped sums that show a rule."""
_MEDIAN_OFF, _MOST_OFF = 0.1, 0.35
"""Error of the predicted logarithms of lengths: the median, and the ninth decile. How much samples
point in one direction is taken to be the same in all pairs of samples."""
_EXACTLY_OFF = 0.02
"""The same where a step has one sample, which makes the prediction exact."""
_BETTER = 0.4
"""The error has to be smaller than that of ordinary faults, in this proportion."""
_TELLING = 0.7
"""Least spread of the predicted logarithms: one factor for all parameters is no rule."""


def clipping_rule(pair: Aligned) -> str:
    """The rule, as the end of a sentence; empty if no rule explains the mode's numbers."""
    ours, theirs = (side.rows(0, _MOST_STEPS) for side in (pair.baseline, pair.other))
    return _automatic(ours, theirs) or _per_layer(ours, theirs)


def _automatic(ours: Trajectory, theirs: Trajectory) -> str:
    # The norms that the mode clipped by, if it reports them, are free of the baseline's rounding.
    norm = np.where(np.isfinite(theirs.sample_norm), theirs.sample_norm, ours.sample_norm)
    factor = theirs.clip_factor
    bound = np.broadcast_to(ours.max_grad_norm[:, None], norm.shape)
    is_known = np.isfinite(norm) & np.isfinite(factor) & (factor > 0)
    norm, factor, bound = norm[is_known], factor[is_known], bound[is_known]
    is_unlike = np.abs(factor - np.minimum(1, bound / norm)) > _CLOSE * factor
    if is_unlike.sum() < _FEWEST_FACTORS:
        return ""
    for symbol, numerator in (("C", bound), ("1", np.ones_like(bound))):
        surplus = numerator / factor - norm
        gamma = float(np.median(surplus))
        spread = np.abs(surplus - gamma)
        if (spread > _CLOSE * numerator / factor).any():
            continue
        if abs(gamma) <= 3 * float(spread.max()):
            if (norm >= numerator).all():
                # So would a bound of 1 be, in place of C.
                continue
            return f"consistent with normalisation, {symbol} / norm in place of min(1, C / norm)"
        if gamma > 0:
            return (
                f"consistent with automatic clipping, {symbol} / (norm + {gamma:.2g}) in place of "
                "min(1, C / norm)"
            )
    return ""


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Clipping of each part of the gradient by itself."""

    part: str
    """Name of a part."""
    parts: NDArray[np.int64]
    """[P] part of each parameter."""
    bound: str
    """Bound of a part, in terms of C and L."""
    share: float
    """The same as a fraction of C."""

    @property
    def told(self) -> str:
        return (
            f"consistent with clipping each {self.part} by itself at {self.bound}"
            + f", where L = {self.parts.max() + 1}" * ("L" in self.bound)
        )


_PARTS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("layer", lambda name: name.rpartition(".")[0]),
    ("parameter", lambda name: name),
    ("block", lambda name: re.split(r"(?<=\.\d)\.|(?<=\.\d\d)\.", name, maxsplit=1)[0]),
)


def _rules(names: list[str]) -> Iterator[_Rule]:
    seen: list[list[int]] = []
    for part, of in _PARTS:
        places = list(dict.fromkeys(map(of, names)))
        parts = [places.index(of(name)) for name in names]
        if len(places) < 2 or parts in seen:
            continue
        seen.append(parts)
        num = len(places)
        for bound, share in (("C/sqrt(L)", num**-0.5), ("C/L", 1 / num), ("C", 1.0)):
            yield _Rule(part=part, parts=np.array(parts), bound=bound, share=share)


def _per_layer(ours: Trajectory, theirs: Trajectory) -> str:
    norms = np.nan_to_num(ours.sample_norm_by_parameter)
    if not np.isfinite(ours.sample_norm_by_parameter).any():
        return ""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        lengths = [sketch_length(side.gradient_sketch) for side in (ours, theirs)]
        observed = np.log(lengths[1] / lengths[0])
        flat = np.broadcast_to(np.nan_to_num(ours.clip_factor)[:, :, None], norms.shape)
        found = [
            (off, rule.told)
            for rule in _rules(ours.parameter_names.tolist())
            if (off := _error(observed, norms, flat, _factors(rule, norms, ours), lengths[0]))
            is not None
        ]
    return min(found)[1] if found else ""


def _factors(rule: _Rule, norms: Floats, ours: Trajectory) -> Floats:
    """[S, N, P] factors by which `rule` multiplies each parameter's gradient."""
    in_part = rule.parts[:, None] == np.arange(rule.parts.max() + 1)
    of_part = np.sqrt(np.square(norms) @ in_part)[:, :, rule.parts]
    bound = rule.share * ours.max_grad_norm[:, None, None]
    return np.minimum(1, np.divide(bound, of_part, out=np.ones_like(of_part), where=of_part > 0))


def _error(
    observed: Floats, norms: Floats, flat: Floats, factors: Floats, lengths: Floats
) -> float | None:
    """Median error of the predicted lengths; None if they do not show the rule.

    Args:
        observed: [S, P] logarithm of the mode's length over the baseline's.
        norms: [S, N, P] norms of the samples' gradients.
        flat, factors: [S, N, P] factors of flat clipping and of the rule.
        lengths: [S, P] lengths of the baseline's clipped sums.
    """
    # The square of a sum of N vectors is D + rho (E - D), D the sum of their squares and E the
    # square of the sum of their lengths. The baseline's sum tells rho.
    alone, aligned = _extremes(flat * norms)
    rho = np.clip((np.square(lengths) - alone) / (aligned - alone), -1.0, 1.0)
    is_one = (norms > 0).sum(axis=1) == 1
    rho = np.where(is_one, 0.0, rho)
    wanted_alone, wanted_aligned = _extremes(factors * norms)
    square = wanted_alone + rho * (wanted_aligned - wanted_alone)
    predicted = 0.5 * np.log(square / (alone + rho * (aligned - alone)))
    is_known = np.isfinite(observed) & np.isfinite(predicted)
    is_known &= lengths > 1e-4 * np.nanmax(lengths, axis=1, keepdims=True)
    if is_known.sum() < _FEWEST_SUMS:
        return None
    wanted, off = predicted[is_known], np.abs(observed - predicted)[is_known]
    low, high = np.quantile(wanted, [0.05, 0.95])
    exact = off[is_one[is_known]]
    # Flat clipping, and none at all, each with any factor of its own in each step.
    unclipped = _extremes(norms)
    none = 0.5 * np.log((unclipped[0] + rho * (unclipped[1] - unclipped[0])) / square)
    others = [_spread(observed, is_known), _spread(observed - predicted - none, is_known)]
    is_explained = (
        high - low >= _TELLING
        and np.median(off) <= _MEDIAN_OFF
        and np.quantile(off, 0.9) <= _MOST_OFF
        and float(np.sqrt(np.square(off).mean())) <= _BETTER * min(others)
        and not (exact > _EXACTLY_OFF).any()
    )
    return float(np.median(off)) if is_explained else None


def _spread(off: Floats, is_known: NDArray[np.bool_]) -> float:
    """Root mean square of [S, P] errors about the median of their step."""
    # A step of which nothing is known has no median.
    is_told = is_known.any(axis=1)
    known = np.where(is_known, off, np.nan)[is_told]
    return float(np.sqrt(np.nanmean(np.square(known - np.nanmedian(known, axis=1)[:, None]))))


def _extremes(lengths: Floats) -> tuple[Floats, Floats]:
    """[S, P] square of a sum of vectors of [S, N, P] `lengths`: at right angles, and in line."""
    return np.square(lengths).sum(axis=1), np.square(lengths.sum(axis=1))
