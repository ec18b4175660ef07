"""Tensors that are the right ones times a factor of their own, by parameter or by step.

Legend: S steps, Q wrong parameters, K projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.comparison.diagnose.hypotheses.name_groups import groups_of_names
from dpsgd_track.record.trajectory import Floats, sketch_length

_ALIKE = 2e-3
"""Relative spread up to which factors are one."""
_POWERS = (0.5, -0.5, 1.0, -1.0)
_FEWEST, _MOST_VALUES = 3, 3
Of = Callable[[Facts], Floats]


def scaled_apart(of: Of, theirs: Of, *, be: str) -> tuple[Hypothesis, ...]:
    """The right tensors with one factor for each parameter, and with one for each step.

    Args:
        of: the right tensors, [S, Q, K].
        theirs: what the mode recorded.
        be: `it is`.
    """

    def by_parameter(facts: Facts) -> Prediction:
        right, observed = of(facts), theirs(facts)
        found = _factors(right[facts.rows], observed[facts.rows], axes=(0, 2))
        said = _parameters_in_words(facts, found) if np.isfinite(found).all() else ""
        return Fitted(right * found[:, None], said) if said else None

    def by_step(facts: Facts) -> Prediction:
        right, observed = of(facts), theirs(facts)
        found = _factors(right, observed, axes=(1, 2))
        chosen = found[facts.rows]
        said = _steps_in_words(facts, chosen) if np.isfinite(chosen).all() else ""
        return Fitted(right * found[:, None, None], said) if said else None

    return tuple(
        Hypothesis(sentence=f"{be} the right one multiplied by {{}}", predict=predict)
        for predict in (by_step, by_parameter)
    )


def scaled_each(of: Of, theirs: Of, *, be: str) -> tuple[Hypothesis, ...]:
    """The right tensors with one factor for each parameter and step, as `scaled_apart`."""

    def predict(facts: Facts) -> Prediction:
        right, observed = of(facts), theirs(facts)
        rows = facts.rows
        if right.shape[-1] < _ENOUGH_PROJECTIONS or len(facts.columns) < _FEWEST:
            return None
        with np.errstate(all="ignore"):
            factors = (right * observed).sum(axis=2) / np.square(right).sum(axis=2)
        chosen = factors[rows]
        apart = np.ptp(chosen, axis=1)
        if not np.isfinite(chosen).all() or apart.max() < _FAR_APART * np.abs(chosen).max():
            return None
        values = right * factors[..., None]
        low, high = float(chosen.min()), float(chosen.max())
        return Fitted(values, f"{low:.3g} to {high:.3g}{_law_of_lengths(facts, observed)}")

    return (
        Hypothesis(
            sentence=f"{be} right in direction but not in length: each parameter is multiplied by "
            "a factor of its own in each step, {}",
            predict=predict,
        ),
    )


_ENOUGH_PROJECTIONS, _FAR_APART, _SCATTER = 8, 0.02, 0.3
"""Projections that a factor is told from, least spread of factors, and spread that projections
give lengths that are one."""


def _law_of_lengths(facts: Facts, observed: Floats) -> str:
    """`, which makes it about 0.01 times as long as the weights`; empty for no law."""
    t, rows, columns = facts.theirs, facts.rows, facts.columns
    before = np.concatenate([t.weight_sketch[:1], t.weight_sketch[:-1]])
    sizes = np.sqrt(facts.ours.parameter_sizes.astype(np.float64))
    laws = (
        (np.ones((len(t.step), len(columns))), "equally long in all parameters: normalised"),
        (sketch_length(before)[:, columns], "{} times as long as the weights, as LARS makes it"),
        (sketch_length(t.gradient_sketch)[:, columns], "{} times as long as the clipped sum"),
        (np.broadcast_to(sizes[columns], (len(t.step), len(columns))), "equally large by element"),
    )
    fits: list[tuple[float, str]] = []
    for lengths, said in laws:
        with np.errstate(all="ignore"):
            shares = (sketch_length(observed) / lengths)[rows].ravel()
        if np.isfinite(shares).all() and (shares > 0).all():
            spread = float(np.std(np.log(shares)))
            fits.append((spread, said.format(f"{float(np.median(shares)):.2g}")))
    spread, said = min(fits, default=(np.inf, ""))
    return f", which makes it about {said}" if spread < _SCATTER else ""


def _factors(right: Floats, observed: Floats, axes: tuple[int, int]) -> Floats:
    is_known = np.isfinite(right) & np.isfinite(observed)
    a, b = np.where(is_known, right, 0.0), np.where(is_known, observed, 0.0)
    with np.errstate(all="ignore"):
        return np.asarray((a * b).sum(axis=axes) / np.square(a).sum(axis=axes))


def _parameters_in_words(facts: Facts, factors: Floats) -> str:
    if len(factors) < 2 or np.ptp(factors) < _ALIKE * np.abs(factors).max():
        return ""
    sizes = facts.ours.parameter_sizes[facts.columns].astype(np.float64)
    if np.all(sizes > 0) and np.all(factors > 0) and len(np.unique(sizes)) >= _FEWEST:
        for power in _POWERS:
            constants = factors / sizes**power
            if np.ptp(constants) < _ALIKE * constants.max():
                constant = float(np.median(constants))
                times = "" if abs(constant - 1) < _ALIKE else f"{constant:.3g} times "
                of = "the root of the parameter's size" if abs(power) == 0.5 else "its size"
                return f"{times}{of if power > 0 else f'1 over {of}'}"
    names = [str(facts.ours.parameter_names[c]) for c in facts.columns.tolist()]
    said: list[str] = []
    left = set(range(len(names)))
    while left and len(said) < _MOST_VALUES:
        value = factors[min(left)]
        alike = {i for i in left if abs(factors[i] - value) < _ALIKE * abs(value)}
        said.append(f"{value:.3g} in {_called(alike, names)}")
        left -= alike
    if not left:
        return " and ".join(said)
    shown = ", ".join(f"{factors[i]:.3g} in {names[i]}" for i in range(_MOST_VALUES))
    return f"a factor of its own in each parameter: {shown} and so on"


def _called(chosen: set[int], names: list[str]) -> str:
    """The parameters in as few groups as possible."""
    groups = sorted(groups_of_names(names), key=lambda group: -len(group[1]))
    said, left = [], set(chosen)
    for name, columns in groups:
        if left & set(columns) and set(columns) <= chosen:
            said.append(name)
            left -= set(columns)
    shown = said[:_MOST_VALUES]
    return ", ".join(shown) + f" and {len(said) - len(shown)} more" * (len(said) > len(shown))


def _laws(facts: Facts) -> Iterator[tuple[Floats, str]]:
    """Numbers of each step, [S], that a factor may be a power of."""
    t = facts.theirs
    yield t.step.astype(np.float64) + 1, "the number of the step, from 1"
    yield (
        np.asarray(facts.counts / facts.divisor, dtype=np.float64),
        "the samples that are there over the expected batch size",
    )
    yield facts.counts.astype(np.float64), "the samples that the step really has"
    yield t.max_grad_norm, "C"
    ranks, numbers = t.sample_rank, t.sample_micro_batch
    filled = np.array(
        [
            len({(r, n) for r, n in zip(a, b, strict=True) if n >= 0})
            for a, b in zip(ranks.tolist(), numbers.tolist(), strict=True)
        ],
        dtype=np.float64,
    )
    yield filled, "the micro-batches of all ranks that have samples"
    most = numbers.max(axis=1, initial=-1).astype(np.float64) + 1
    yield most, "the micro-batches of the step that have samples"


def _steps_in_words(facts: Facts, factors: Floats) -> str:
    """Law of the factors of the rows that are compared."""
    if len(factors) < _FEWEST or np.ptp(factors) < _ALIKE * np.abs(factors).max():
        return ""
    if np.all(factors > 0):
        for values, text in _laws(facts):
            of_rows = values[facts.rows]
            if np.any(of_rows <= 0) or len(np.unique(of_rows)) < 2:
                continue
            for power in _POWERS:
                constants = factors / of_rows**power
                if np.ptp(constants) > _ALIKE * constants.max():
                    continue
                constant = float(np.median(constants))
                times = "" if abs(constant - 1) < _ALIKE else f"{constant:.3g} times "
                root = "the root of " * (abs(power) == 0.5)
                return f"{times}{'1 over ' * (power < 0)}{root}{text}"
        ratios = factors[1:] / factors[:-1]
        if np.ptp(ratios) < _ALIKE:
            return (
                f"{ratios.mean():.4g} from one step to the next ({factors[0]:.4g} at step "
                f"{facts.theirs.step[facts.rows[0]]})"
            )
    is_zero = np.abs(factors) < _ALIKE
    is_one = np.abs(factors - 1) < _ALIKE
    if is_zero.any() and (is_zero | is_one).all():
        shown = ", ".join(map(str, facts.theirs.step[facts.rows][is_zero].tolist()))
        return f"0 at step{'s' * bool(is_zero.sum() > 1)} {shown}"
    return ""
