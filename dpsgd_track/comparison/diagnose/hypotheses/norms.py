"""Mistakes of per-sample norms: of the total, and of each parameter's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.attributes import scaled_by_attribute
from dpsgd_track.comparison.diagnose.hypotheses.changed_numbers import changed
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Fitted,
    Hypothesis,
    Prediction,
    Subject,
)
from dpsgd_track.comparison.diagnose.hypotheses.mixtures import (
    Term,
    in_words,
    mixed,
    mixture,
    of_neighbours,
)
from dpsgd_track.comparison.diagnose.hypotheses.name_groups import groups_of_names, unit_of
from dpsgd_track.comparison.diagnose.hypotheses.resolved_norms import resolved_norms
from dpsgd_track.comparison.diagnose.hypotheses.samples import (
    added_up,
    mixed_up,
    of_other_places,
    off_as_rounding,
    rounded,
    to_bfloat16,
)
from dpsgd_track.record.alternatives import NormFormula
from dpsgd_track.record.trajectory import Floats

_SMALL = 1e-3
"""Least unit of an error, as a share of the largest norm."""
_FITS = 1e-4
"""Relative error up to which a norm equals a formula's value."""
_LEAST_TOLD = 0.75
"""Least share of the wrong parameters that has to follow a formula."""
_MOST_ALIKE = 3
"""Formulas of equal values that are told."""
_MOST_FORMULAS = 2
"""Formulas that the wrong parameters may follow, one for each kind of layer."""


def _right_total(facts: Facts) -> Floats:
    """[S, N] the total of the norms by parameter that the mode reports, or else the baseline's."""
    own = facts.theirs.sample_norm_by_parameter
    if np.isnan(own).all():
        return facts.ours.sample_norm
    return np.asarray(np.sqrt(np.square(own).sum(axis=2)))


def _total(sentence: str, predict: Callable[[Floats], Floats]) -> Hypothesis:
    """A hypothesis on the total as a function of the norms by parameter, [S, N, P]."""
    return Hypothesis(sentence=sentence, predict=lambda facts: predict(facts.by_parameter))


def _added_in_bfloat16(norms: Floats) -> Floats:
    """Total of norms [S, N, P] by a running sum of squares that is rounded at each step."""
    total = np.zeros(norms.shape[:2])
    for column in range(norms.shape[2]):
        total = to_bfloat16(total + to_bfloat16(np.square(norms[..., column])))
    return np.sqrt(total)


def _changed_by(sign: float) -> Callable[[Facts], Prediction]:
    """The total with some parameters' squares left out or counted twice: those that agree best."""

    def predict(facts: Facts) -> Prediction:
        squares = np.square(facts.by_parameter)
        total = squares.sum(axis=2)
        wanted = np.square(facts.theirs.sample_norm[facts.rows])
        # Where a total is right, a mistake that does not happen there is none.
        is_wrong = np.abs(total[facts.rows] - wanted) > _FITS * wanted
        best, least = None, np.inf
        for name, columns in groups_of_names(facts.ours.parameter_names.tolist()):
            values = total + sign * squares[:, :, columns].sum(axis=2)
            errors = np.abs(values[facts.rows] - wanted) / wanted
            error = float(np.nanmax(errors[is_wrong], initial=0.0))
            if error < least:
                best, least = Fitted(np.sqrt(np.maximum(values, 0.0)), name), error
        return best

    return predict


def _recounted(facts: Facts) -> Prediction:
    """The total with each parameter's square counted as often as agrees best."""
    # Norms of the mode's own explain its totals in every step, whatever came before.
    is_own = not np.isnan(facts.theirs.sample_norm_by_parameter).all()
    rows = np.arange(facts.theirs.num_steps) if is_own else facts.rows
    squares, wanted = np.square(facts.by_parameter), np.square(facts.theirs.sample_norm[rows])
    is_there = np.isfinite(wanted) & np.isfinite(squares[rows]).all(axis=2) & (wanted > 0)
    shares = squares[rows][is_there] / wanted[is_there][:, None]
    told = np.flatnonzero(shares.max(axis=0, initial=0.0) > _LEAST_SHARE)
    if len(shares) < len(told) + _MORE_SAMPLES:
        return None
    size = shares[:, told].max(axis=0)
    rest = 1 - np.delete(shares, told, axis=1).sum(axis=1)
    counts = np.ones(shares.shape[1])
    fitted = np.linalg.lstsq(shares[:, told] / size, rest, rcond=None)[0] / size
    counts[told] = np.round(2 * fitted) / 2
    if np.any(counts < 0) or np.all(counts == 1):
        return None
    names = facts.ours.parameter_names.tolist()
    # Whatever is too small to be told may belong to a group that is named.
    free = set(range(len(names))) - set(told.tolist())
    said = []
    for count in sorted(set(counts.tolist()) - {1.0}):
        which = _named({int(c) for c in np.flatnonzero(counts == count)}, free, names)
        said.append(f"leave out {which}" if not count else f"count {which} {_times(count)}")
    return Fitted(np.sqrt(squares @ counts), " and ".join(said))


_LEAST_SHARE = 1e-3
"""Least share of a squared total, in the sample where it is largest, that a count is told from."""
_MORE_SAMPLES = 4
"""Samples beyond the number of counts that are fitted."""


def _times(count: float) -> str:
    return "twice" if count == 2 else f"{count:g} times"


def _named(columns: set[int], free: set[int], names: Sequence[str]) -> str:
    """The parameters in as few groups as possible, which may hold those in `free` as well."""
    groups = [(name, set(own)) for name, own in groups_of_names(names)]
    said, left = [], set(columns)
    while left:
        name, own = max(
            ((n, own) for n, own in groups if own <= columns | free),
            key=lambda group: len(group[1] & left),
        )
        said.append(name)
        left -= own
    return ", ".join(said)


def _two_parts_added(facts: Facts) -> Prediction:
    """Norms of some parameters and of all others added, not their squares."""
    squares = np.square(facts.by_parameter)
    total, wanted = squares.sum(axis=2), facts.theirs.sample_norm
    best, least = None, np.inf
    for name, columns in groups_of_names(facts.ours.parameter_names.tolist()):
        part = squares[:, :, columns].sum(axis=2)
        values = np.sqrt(part) + np.sqrt(np.maximum(total - part, 0.0))
        error = float(np.nanmax(np.abs(values / wanted - 1)[facts.rows], initial=0.0))
        if error < least:
            best, least = Fitted(values, name), error
    return best


def _mixed_total(facts: Facts) -> Prediction:
    """Squared totals as a sum of the right ones and those of other samples."""
    squares, observed = np.square(_right_total(facts)), np.square(facts.theirs.sample_norm)
    off = np.abs(observed - squares) > _FITS * np.maximum(squares, observed)
    is_wrong = np.zeros(squares.shape, dtype=bool)
    is_wrong[facts.rows] = off[facts.rows]
    terms = [t for t in of_neighbours(facts, squares) if np.isfinite(t.values[is_wrong]).any()]
    flat = [Term(t.values[is_wrong], t.text) for t in terms]
    found = mixture(squares[is_wrong], flat, observed[is_wrong], observed[is_wrong])
    if found is None:
        return None
    every, told, own = found
    total = mixed(every, squares, terms)
    total = np.where(is_wrong, np.where(np.isfinite(total), total, observed), squares)
    return Fitted(np.sqrt(np.maximum(total, 0.0)), in_words(own, told, "the right ones"))


def _unlike_in_linear() -> Iterator[Hypothesis]:
    """Totals in which linear layers have gradients of another reduction of the loss than others."""
    kinds = {"linear layers": True, "layers other than linear": False}
    for (kind, is_linear), (how, power) in product(
        kinds.items(), (("divided", -2), ("multiplied", 2))
    ):
        said = f"norms of {kind} alone are {how} by the number of samples in the micro-batch"
        said += ", as those of a mean loss are" * (power < 0)

        def total(facts: Facts, *, is_linear: bool = is_linear, power: int = power) -> Floats:
            squares = np.square(facts.by_parameter)
            linear = {str(name) for name in facts.ours.layer_names}
            names = facts.ours.parameter_names.tolist()
            chosen = np.array([(n.rpartition(".")[0] in linear) is is_linear for n in names])
            changed = facts.by_batch(
                squares, lambda own: np.where(chosen, own * float(len(own)) ** power, own)
            )
            known = squares if changed is None else changed
            return np.asarray(np.sqrt(known.sum(axis=2)))

        yield Hypothesis(sentence=said, predict=total)
        for each in added_up(total):
            yield replace(each, sentence=f"{said}; and {each.sentence}")


def _of_parts() -> Iterator[Hypothesis]:
    """Totals whose parts' norms are combined as squares should be."""
    for what, part_of in (
        ("layers'", lambda name: name.rpartition(".")[0]),
        ("blocks'", unit_of),
    ):
        for how, combine in (
            (f"the sum of the {what} norms, not the root of the sum of their squares", np.sum),
            (f"the largest of the {what} norms", np.max),
        ):
            yield Hypothesis(
                sentence=f"they are {how}",
                predict=partial(_combined, part_of=part_of, combine=combine),
            )
    for power in (3, 4):
        yield _total(
            f"they are the {power}-norm of the parameters' norms, not the 2-norm",
            partial(_power_mean, power=power),
        )
    yield _total(
        "they are the sum of the parameters' norms over sqrt(P), P the number of parameters",
        lambda n: n.sum(axis=2) / n.shape[2] ** 0.5,
    )


def _power_mean(norms: Floats, power: int) -> Floats:
    return np.asarray((norms**power).sum(axis=2) ** (1 / power))


def _combined(
    facts: Facts, part_of: Callable[[str], str], combine: Callable[..., Floats]
) -> Prediction:
    parts = np.array([part_of(name) for name in facts.ours.parameter_names.tolist()])
    squares = np.square(facts.by_parameter)
    table = [np.sqrt(squares[:, :, parts == part].sum(axis=2)) for part in np.unique(parts)]
    return np.asarray(combine(np.stack(table), axis=0)) if len(table) > 1 else None


TOTAL = Subject(
    observed=lambda facts: facts.theirs.sample_norm,
    right=_right_total,
    levels=(
        (
            _total(
                "they are the squared norms: the root is missing",
                lambda n: np.square(n).sum(axis=2),
            ),
            _total(
                "they are the sum of the parameters' norms rather than the root of the sum of "
                "their squares",
                lambda n: n.sum(axis=2),
            ),
            _total("they are the largest of the parameters' norms", lambda n: n.max(axis=2)),
            _total(
                "they are the root of the norms",
                lambda n: np.sqrt(np.sqrt(np.square(n).sum(axis=2))),
            ),
            _total(
                "squares are averaged over parameters rather than added up",
                lambda n: np.sqrt(np.square(n).mean(axis=2)),
            ),
            _total("squares are added up in bfloat16", _added_in_bfloat16),
            Hypothesis(sentence="they leave out {}", predict=_changed_by(-1.0)),
            Hypothesis(sentence="they count {} twice", predict=_changed_by(1.0)),
        ),
        (
            *mixed_up(_right_total, lambda facts: facts.theirs.sample_norm),
            *added_up(_right_total),
            *rounded(_right_total, lambda facts: facts.theirs.sample_norm),
        ),
        tuple(changed(_right_total, lambda facts: facts.theirs.sample_norm)),
        tuple(_of_parts()),
        tuple(_unlike_in_linear()),
        (
            Hypothesis(sentence="they {}", predict=_recounted),
            Hypothesis(
                sentence="they are the norm of {} plus that of all other parameters, not the root "
                "of the sum of their squares",
                predict=_two_parts_added,
            ),
            Hypothesis(sentence="their squares are {}", predict=_mixed_total),
            scaled_by_attribute(_right_total, lambda facts: facts.theirs.sample_norm),
            of_other_places(_right_total, lambda facts: facts.theirs.sample_norm),
        ),
    ),
)
"""Total norms of samples, [S, N], as they follow from the norms by parameter."""


def _chosen(facts: Facts) -> Floats:
    return np.asarray(facts.ours.sample_norm_by_parameter[:, :, facts.columns])


def _reported(facts: Facts) -> Floats:
    return np.asarray(facts.theirs.sample_norm_by_parameter[:, :, facts.columns])


def _formulas(facts: Facts) -> Prediction:
    """Each wrong parameter by a formula that agrees, of as few formulas as possible."""
    values = facts.ours.sample_other_norm[:, :, facts.columns].astype(np.float64)
    if not values.shape[-1]:
        return None
    observed, right = _reported(facts), _chosen(facts)
    unit = np.maximum(np.abs(right), _SMALL * np.nanmax(right))
    # A number that is right is no evidence for a formula, nor is padding.
    is_wrong = np.abs(observed - right) > _FITS * unit
    errors = np.abs(values - observed[..., None]) / np.maximum(unit, observed)[..., None]
    errors = np.nan_to_num(np.where(is_wrong[..., None], errors, 0.0), nan=np.inf)
    agrees = errors[facts.rows].max(axis=(0, 1), initial=0.0) <= _FITS
    used = _fewest(agrees)
    is_told = agrees[:, used].any(axis=1)
    if not used or is_told.mean() < _LEAST_TOLD:
        return None
    predicted = right.copy()
    for column in range(predicted.shape[2]):
        # The few parameters that no formula fits have other layers' gradients in them.
        formula = next((f for f in used if agrees[column, f]), None)
        of_column = observed[..., column] if formula is None else values[..., column, formula]
        wrong = is_wrong[..., column]
        predicted[..., column][wrong] = of_column[wrong]
    shown = ", others ".join(_alternatives(agrees, f) for f in used)
    of_some = f" (in {is_told.sum()} of {len(is_told)} parameters)" * (not is_told.all())
    return Fitted(predicted, f"{shown}{of_some}")


def _scattered(facts: Facts) -> Prediction:
    """The recorded norms, if their squares are right on average, and alike in all parameters."""
    observed, right = _reported(facts), _chosen(facts)
    with np.errstate(all="ignore"):
        ratios = np.square(observed / right)[facts.rows].reshape(-1, right.shape[2])
    ratios = ratios[np.isfinite(ratios).all(axis=1)]
    if len(ratios) < _ENOUGH_SCATTERED or ratios.shape[1] < _FEW_PARAMETERS:
        return None
    off = ratios.mean(axis=0) - 1
    spreads = ratios.std(axis=0)
    is_alike = bool(spreads.min() > 0 and spreads.max() < _UNLIKE * spreads.min())
    is_large = _LEAST_SCATTER < float(np.median(spreads)) < _MOST_SCATTER
    below = float(np.mean(ratios < 1))
    # Samples of one step may share what is drawn, so that their means are less certain.
    is_centred = bool(np.median(np.abs(off) / spreads) < _OFF_CENTRE) and 0.3 < below < 0.7
    if not (is_alike and is_large and is_centred):
        return None
    return Fitted(observed, f"{np.median(spreads):.0%}")


_ENOUGH_SCATTERED, _FEW_PARAMETERS, _UNLIKE, _OFF_CENTRE = 16, 3, 4.0, 0.5
"""Samples and parameters that a scatter is told from, largest ratio of the parameters' scatters,
and of the error of a mean to them."""
_LEAST_SCATTER, _MOST_SCATTER = 0.02, 1.0
"""Scatter of squares that is told as one."""


def _with_sibling(facts: Facts, combine: Callable[[Floats, Floats], Floats]) -> Prediction:
    """Norms by parameter that are combined with those of the bias of the same layer, or its weight.

    Args:
        combine: the parameter's norms and the sibling's, to those that are reported.
    """
    names = facts.ours.parameter_names.tolist()
    norms, right = facts.ours.sample_norm_by_parameter, _chosen(facts)
    predicted = right.copy()
    siblings = {".weight": ".bias", ".bias": ".weight"}
    for place, column in enumerate(facts.columns.tolist()):
        stem, dot, kind = names[column].rpartition(".")
        other = stem + siblings.get(dot + kind, "")
        if other == stem or other not in names:
            return None
        w, b = right[..., place], norms[..., names.index(other)]
        predicted[..., place] = combine(w, b)
    return predicted


def _alternatives(agrees: np.ndarray, formula: int) -> str:
    """A formula and those that cannot be told from it, in words.

    Args:
        agrees: [Q, V]
    """
    formulas = list(NormFormula)
    same = np.flatnonzero((agrees == agrees[:, [formula]]).all(axis=0)).tolist()[:_MOST_ALIKE]
    return " or ".join(formulas[f].value for f in same)


def _fewest(agrees: np.ndarray) -> list[int]:
    """The few formulas that most columns agree with.

    Args:
        agrees: [Q, V]
    """
    used: list[int] = []
    for _ in range(_MOST_FORMULAS):
        left = ~agrees[:, used].any(axis=1)
        if not agrees[left].any():
            break
        used.append(int(agrees[left].sum(axis=0).argmax()))
    return used


BY_PARAMETER = Subject(
    observed=_reported,
    right=_chosen,
    levels=(
        (Hypothesis(sentence="they are {}", predict=_formulas),),
        (
            Hypothesis(
                sentence="they are the squared norms: the root is missing",
                predict=lambda facts: np.square(_chosen(facts)),
            ),
            Hypothesis(
                sentence="they are the root of the norms",
                predict=lambda facts: np.sqrt(_chosen(facts)),
            ),
            *(
                Hypothesis(
                    sentence="norms of a layer's weight and bias are added before they are "
                    "squared: (|w| + |b|)^2 in place of |w|^2 + |b|^2",
                    predict=partial(_with_sibling, combine=combine),
                )
                # The whole of the cross term with one of the two, or all with both.
                for combine in (lambda w, b: np.sqrt(np.square(w) + 2 * w * b), np.add)
            ),
            Hypothesis(
                sentence="the bias of the same layer is counted in them as well",
                predict=partial(_with_sibling, combine=np.hypot),
            ),
            *mixed_up(_chosen, _reported),
            *added_up(_chosen),
            *rounded(_chosen, _reported),
        ),
        *resolved_norms(),
        (scaled_by_attribute(_chosen, _reported),),
    ),
    late=(
        (
            Hypothesis(
                sentence="they are off by as much as computing in bfloat16 makes them",
                predict=lambda facts: (
                    _reported(facts)
                    if off_as_rounding(_reported(facts)[facts.rows], _chosen(facts)[facts.rows])
                    else None
                ),
                is_hint=True,
            ),
        ),
        (
            Hypothesis(
                sentence="they are right on average only: squares scatter by {} about the right "
                "ones in both directions, as an estimate from random projections or from a part of "
                "the positions does",
                predict=_scattered,
                is_hint=True,
            ),
        ),
    ),
)
"""Norms of samples by parameter, [S, N, Q]."""
