"""Mistakes of the optimizer's step, given the gradient that the mode itself reports.

They are those of SGD: w_t = w_{t-1} - lr g_t.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.by_parameter import scaled_apart, scaled_each
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Fitted,
    Hypothesis,
    Prediction,
    Subject,
    in_some_elements,
    off_as_rounded,
)
from dpsgd_track.comparison.diagnose.hypotheses.mixtures import in_words
from dpsgd_track.record.trajectory import Floats, sketch_length

_ROUNDING, _SMALL = 2.0**-22, 0.05
"""Rounding error of a difference of weights, and the least unit of an error, as a share."""
_ALIKE = 2e-3
"""Relative spread up to which fitted constants are one; rounding of weights moves them."""
_LEAST_CHANGE = 1e-4
"""Least relative change of the rate a step: the rounding of weights makes smaller ones."""


def _path(facts: Facts) -> Floats:
    """[S, Q, K] the way from the weights after the step before; NaN in the first row."""
    weights = facts.theirs.weight_sketch[:, facts.columns]
    return np.concatenate([np.full_like(weights[:1], np.nan), np.diff(weights, axis=0)])


def _gradient(facts: Facts) -> Floats:
    return np.asarray(facts.theirs.noised_sketch[:, facts.columns] / facts.divisor)


def _right(facts: Facts) -> Floats:
    return -facts.rate * _gradient(facts)


def _without_noise(facts: Facts) -> Prediction:
    theirs = facts.theirs
    return np.asarray(-facts.rate * theirs.gradient_sketch[:, facts.columns] / facts.divisor)


def _noise_alone(facts: Facts) -> Prediction:
    without = _without_noise(facts)
    assert isinstance(without, np.ndarray)
    return np.asarray(_right(facts) - without)


def _fitted_share(facts: Facts, direction: Floats, base: Floats) -> float:
    """The x for which base + x direction agrees best."""
    rows = facts.rows
    left, along = (_path(facts) - base)[rows], direction[rows]
    is_there = np.isfinite(left) & np.isfinite(along)
    square = float(np.square(along[is_there]).sum())
    return float((left * along)[is_there].sum()) / square if square else float("nan")


def _decayed(facts: Facts) -> Prediction:
    weights = facts.theirs.weight_sketch[:, facts.columns]
    before = np.concatenate([weights[:1], weights[:-1]])
    decay = _fitted_share(facts, -before, _right(facts))
    return Fitted(_right(facts) - decay * before, f"{decay / facts.rate:.3g}")


def _with_momentum(momentum: float, *, is_nesterov: bool) -> Callable[[Facts], Prediction]:
    def predict(facts: Facts) -> Prediction:
        # What the buffer holds is known from the first step of a run only.
        if facts.theirs.step[0] != 0:
            return None
        gradient = _gradient(facts)
        buffer, steps = np.zeros_like(gradient[0]), []
        for each in gradient:
            buffer = momentum * buffer + each
            steps.append(each + momentum * buffer if is_nesterov else buffer)
        return np.asarray(-facts.rate * np.stack(steps))

    return predict


def _shares(facts: Facts) -> Floats:
    """[rows] by what the step of each row is a multiple of the right one."""
    path, right = _path(facts)[facts.rows], _right(facts)[facts.rows]
    with np.errstate(all="ignore"):
        found: Floats = (path * right).sum(axis=(1, 2)) / np.square(right).sum(axis=(1, 2))
    return found


def _with_shares(facts: Facts, shown: str) -> Prediction:
    values = _right(facts).copy()
    values[facts.rows] *= _shares(facts)[:, None, None]
    return Fitted(values, shown)


def _clipped_again(facts: Facts) -> Prediction:
    """Steps that are as long as if the gradient had been clipped at one norm."""
    if len(facts.columns) < len(facts.ours.parameter_names):
        return None
    bounds = _shares(facts) * facts.theirs.grad_norm_noised[facts.rows]
    if len(bounds) < 2 or np.ptp(bounds) > _ALIKE * abs(bounds[0]):
        return None
    return _with_shares(facts, f"{bounds[0]:.4g}")


def _scheduled(facts: Facts) -> Prediction:
    """Steps whose rate changes by one factor a step."""
    shares = _shares(facts)
    if len(shares) < 3 or np.any(shares <= 0):
        return None
    ratios = shares[1:] / shares[:-1]
    if np.ptp(ratios) > _ALIKE or abs(float(np.mean(ratios)) - 1) < _LEAST_CHANGE:
        return None
    return _with_shares(facts, f"{float(np.mean(ratios)):.4g}")


def _other_rates(facts: Facts) -> Prediction:
    shares = _shares(facts)
    told = ", ".join(f"{s:.4g}" for s in shares[:4].tolist())
    return _with_shares(
        facts, f"{told} times the right one from step {facts.ours.step[facts.rows[0]]} on"
    )


def _of_gradient_before(facts: Facts) -> Prediction:
    right = _right(facts)
    return np.concatenate([right[:1], right[:-1]])


def _rounded(facts: Facts) -> Prediction:
    weights = sketch_length(facts.theirs.weight_sketch[:, facts.columns])
    return _if_off_as_rounded(facts, weights, is_once=True)


def _of_rounded_gradient(facts: Facts) -> Prediction:
    # Beside a small step, the rounding of float32 weights scatters the errors.
    return _if_off_as_rounded(facts, sketch_length(_right(facts)), is_once=False)


def _if_off_as_rounded(facts: Facts, size: Floats, *, is_once: bool) -> Prediction:
    """The recorded step, if rounding tensors of lengths `size` [S, Q] explains its error."""
    rows, path, right = facts.rows, _path(facts), _right(facts)
    is_explained = off_as_rounded(path[rows], right[rows], size[rows], is_once=is_once)
    return path if is_explained else None


def _along_others(facts: Facts) -> Prediction:
    """The recorded update, if steps are about as long as right ones and not along them."""
    path, right = _path(facts)[facts.rows], _right(facts)[facts.rows]
    with np.errstate(all="ignore"):
        ratio = sketch_length(path) / sketch_length(right)
        cosine = (path * right).sum(axis=2) / np.sqrt(
            np.square(path).sum(axis=2) * np.square(right).sum(axis=2)
        )
    is_as_long = bool(np.all((ratio > 0.3) & (ratio < 3)))
    is_elsewhere = bool(np.all(np.isfinite(cosine)) and abs(float(np.mean(cosine))) < 0.5)
    return _path(facts) if is_as_long and is_elsewhere and len(facts.columns) > 1 else None


def rounding_of(facts: Facts) -> float:
    """Error of a step that the rounding of float32 weights explains, in units of the step."""
    length = sketch_length(_right(facts))[facts.rows]
    total = np.sqrt(np.square(length).sum(axis=1, keepdims=True))
    weights = sketch_length(facts.theirs.weight_sketch[:, facts.columns])[facts.rows]
    with np.errstate(all="ignore"):
        share = _ROUNDING * weights / np.maximum(length, _SMALL * total)
    return float(np.nanmax(share, initial=0.0))


def _sizes(facts: Facts) -> Floats:
    return facts.ours.parameter_sizes[facts.columns].astype(np.float64)


def is_like_signs(facts: Facts) -> bool:
    """True if every weight moves by about the learning rate, as with Adam or a sign."""
    sizes = _sizes(facts)
    path = sketch_length(_path(facts))[facts.rows]
    if not sizes.all() or not facts.rate > 0 or np.isnan(path).any():
        return False
    ratio = path / (facts.rate * np.sqrt(sizes))
    return bool(np.median(ratio) > 0.3 and np.median(ratio) < 1.5 and ratio.max() < 3)


def _momenta() -> list[Hypothesis]:
    return [
        Hypothesis(
            sentence=f"{'Nesterov ' if is_nesterov else ''}momentum {momentum:g}, which is not "
            "asked for, is in it",
            predict=_with_momentum(momentum, is_nesterov=is_nesterov),
        )
        for is_nesterov in (False, True)
        for momentum in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
    ]


def _mixed(facts: Facts) -> Prediction:
    """The step as shares of the right one and of one or two others that came before."""
    path, right, rows = _path(facts), _right(facts), facts.rows
    weights = facts.theirs.weight_sketch[:, facts.columns]
    terms = (
        (_late(right), "the right step before"),
        (_late(_late(right)), "the right step two before"),
        (_late(path), "the step that was made before"),
        (_late(weights), "the weights"),
    )
    # Nothing is known of the step before the first one that is recorded.
    rows = rows[np.isfinite(np.stack([v[rows] for v, _ in terms])).all(axis=(0, 2, 3))]
    if len(rows) < _ENOUGH_ROWS:
        return None
    lengths = sketch_length(path)
    unit = np.maximum(lengths, _SMALL * np.nanmax(lengths))[rows][..., None]
    wanted, own = (path[rows] / unit).ravel(), (right[rows] / unit).ravel()
    for num in (1, 2):
        found: list[tuple[float, Fitted]] = []
        for chosen in combinations(terms, num):
            flat = [(values[rows] / unit).ravel() for values, _ in chosen]
            table = np.stack([own, *flat], axis=1)
            if not np.isfinite(table).all() or not np.isfinite(wanted).all():
                return None
            shares = np.linalg.lstsq(table, wanted, rcond=1e-8)[0]
            error = float(np.abs(table @ shares - wanted).max())
            mixed = shares[0] * right
            for share, (term, _) in zip(shares[1:], chosen, strict=True):
                mixed = mixed + share * term
            values = path.copy()
            values[rows] = mixed[rows]
            told = [(float(s), said) for s, (_, said) in zip(shares[1:], chosen, strict=True)]
            if np.abs(shares[1:]).min() > _ALIKE:
                said = in_words(float(shares[0]), told, "the right one")
                found.append((error, Fitted(values, said)))
        best = min(found, key=lambda each: each[0], default=None)
        if best is not None and best[0] < _MIXED:
            return best[1]
    return None


def _mixed_by_step(facts: Facts) -> Prediction:
    """Each step as shares of the right one and of the one or two before, which may differ."""
    path, right = _path(facts), _right(facts)
    terms = (
        (_late(path), "the step before"),
        (_late(right), "the right step before"),
        (_late(_late(path)), "the step two before"),
    )
    values, said, num_mixed = path.copy(), list[str](), 0
    for row in facts.rows.tolist():
        size = np.maximum(sketch_length(path[row]), _SMALL * sketch_length(path[row]).max())
        found = _mixed_in(path[row], right[row], [(v[row], s) for v, s in terms], size[:, None])
        if found is None:
            return None
        values[row], words = found
        num_mixed += " minus " in words or " plus " in words
        if words:
            said.append(f"{words} at step {facts.theirs.step[row]}")
    if num_mixed < _ENOUGH_MIXED:
        return None
    return Fitted(values, ", ".join(said[:_MOST_SAID]) + " and so on" * (len(said) > _MOST_SAID))


_ENOUGH_MIXED, _MOST_SAID = 2, 3
"""Steps that mixtures are told from, and those that are told."""


def _mixed_in(
    path: Floats, right: Floats, terms: list[tuple[Floats, str]], size: Floats
) -> tuple[Floats, str] | None:
    """One step, [Q, K], as a mixture, and it in words; no words where it is right."""
    for num in (0, 1, 2):
        for chosen in combinations(terms, num):
            table = np.stack([(v / size).ravel() for v in (right, *(v for v, _ in chosen))], axis=1)
            if not np.isfinite(table).all() or not np.isfinite(path).all():
                continue
            shares, _, rank, _ = np.linalg.lstsq(table, (path / size).ravel(), rcond=1e-6)
            if rank < num + 1:
                continue
            values = np.tensordot(shares, np.stack([right, *(v for v, _ in chosen)]), axes=1)
            if np.abs((values - path) / size).max() > _MIXED:
                continue
            told = [(float(x), text) for x, (_, text) in zip(shares[1:], chosen, strict=True)]
            is_right = not told and abs(shares[0] - 1) < _ALIKE
            return values, "" if is_right else in_words(float(shares[0]), told, "the right one")
    return None


_ENOUGH_ROWS = 3
"""Steps that a mixture is told from."""
_MIXED = 0.02
"""Largest error of a mixture, in units of a step's length, that is told at all."""


def _late(values: Floats) -> Floats:
    return np.concatenate([np.zeros_like(values[:1]), values[:-1]])


UPDATE = Subject(
    observed=_path,
    right=_right,
    is_sketch=True,
    be="the step is",
    reasons={
        ("multiplied", "W"): "as where the learning rate or the gradient is scaled with the ranks",
        ("multiplied", "B"): "as where the division by it is undone",
        ("divided", "B"): "as where the gradient is divided by it once more",
    },
    zero="the weights do not move, although their gradient is not zero: the optimizer lacks them",
    zero_in_all="no weight moves, although the gradient is not zero: the step is left out",
    levels=(
        (
            Hypothesis(
                sentence="it is made of the clipped sum without its noise", predict=_without_noise
            ),
            Hypothesis(
                sentence="it is made of the noise without the clipped sum", predict=_noise_alone
            ),
            Hypothesis(
                sentence="it is made of the gradient of the step before",
                predict=_of_gradient_before,
            ),
            *_momenta(),
        ),
        (
            Hypothesis(
                sentence="weight decay of {}, which is not asked for, is in it", predict=_decayed
            ),
            Hypothesis(
                sentence="the noised gradient is clipped once more, at norm {}",
                predict=_clipped_again,
            ),
            Hypothesis(
                sentence="the learning rate is multiplied by {} from one step to the next: a "
                "schedule that is not asked for",
                predict=_scheduled,
            ),
        ),
    ),
    late=(
        scaled_apart(_right, _path, be="the step is"),
        (Hypothesis(sentence="the step is {}", predict=_mixed),),
        (Hypothesis(sentence="the step is {}", predict=_mixed_by_step),),
        scaled_each(_right, _path, be="the step is"),
        (
            Hypothesis(
                sentence="the learning rate is {}",
                predict=_other_rates,
            ),
            Hypothesis(
                sentence="the weights are off by as much as keeping them in bfloat16 makes them",
                predict=_rounded,
                is_hint=True,
            ),
            Hypothesis(
                sentence="the step is off by as much as rounding the gradient to bfloat16 makes it",
                predict=_of_rounded_gradient,
                is_hint=True,
            ),
            Hypothesis(
                sentence="weights move along other gradients than their own, as if those were "
                "exchanged",
                predict=_along_others,
                is_hint=True,
            ),
            Hypothesis(
                sentence="every weight moves by about the learning rate, as Adam or a sign makes "
                "it",
                predict=lambda facts: _path(facts) if is_like_signs(facts) else None,
                is_hint=True,
            ),
        ),
        (
            Hypothesis(
                sentence="it is made in some elements alone: about {} of it, by its square, is "
                "missing, as where some ranks or some rows are not updated",
                predict=lambda facts: in_some_elements(facts, _path(facts), _right(facts)),
                is_hint=True,
            ),
        ),
    ),
)
"""Way of the wrong parameters' weights in one step, [S, Q, K]."""
