"""Mistakes of clip factors, given the norms that the mode itself reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.attributes import law_of, scaled_by_attribute
from dpsgd_track.comparison.diagnose.hypotheses.changed_numbers import (
    changed,
    decimals_of,
    on_a_grid,
)
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Fitted,
    Hypothesis,
    Prediction,
    Subject,
)
from dpsgd_track.comparison.diagnose.hypotheses.name_groups import groups_of_names
from dpsgd_track.comparison.diagnose.hypotheses.samples import (
    mixed_up,
    of_all_ranks,
    of_other_places,
    rounded,
    to_bfloat16,
    to_float16,
)
from dpsgd_track.comparison.diagnose.sample_groups import group_in
from dpsgd_track.record.trajectory import UNUSED, Floats

_ALIKE = 1e-3
"""Relative spread up to which fitted constants are one."""


def clip_factors(bound: Floats, norm: Floats) -> Floats:
    """min(1, C / norm), which is 1 of a norm of 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.where(norm == 0, 1.0, np.minimum(1.0, bound / norm)))


def _right(facts: Facts) -> Floats:
    values = clip_factors(facts.bound, facts.norm)
    return np.where(np.isnan(facts.norm), np.nan, values)


def _formula(sentence: str, predict: Callable[[Floats, Floats], Floats]) -> Hypothesis:
    """Factors as a function of C, [S, 1], and the norms, [S, N]."""
    return Hypothesis(sentence=sentence, predict=lambda facts: predict(facts.bound, facts.norm))


def _at_bound(sentence: str, bound_of: Callable[[Facts], Floats | float]) -> Hypothesis:
    """Samples clipped at another bound."""

    def predict(facts: Facts) -> Prediction:
        return clip_factors(np.asarray(bound_of(facts)), facts.norm)

    return Hypothesis(sentence=f"samples are clipped not at C but at {sentence}", predict=predict)


def _bound_times(facts: Facts, symbol: str, power: int) -> Floats:
    """[S, 1] C times a power of a quantity of the run."""
    return facts.bound * _constant(facts, symbol) ** power


def _named_bounds() -> Sequence[Hypothesis]:
    known = (
        ("W", "the number of ranks"),
        ("K", "the number of micro-batches"),
        ("b", "the samples of a micro-batch"),
        ("B", "the expected batch size"),
        ("P", "the number of parameters"),
        ("sqrt(P)", "P the number of parameters"),
        ("sqrt(W)", "W the number of ranks"),
        ("2", ""),
    )
    return [
        _at_bound(
            f"{shown}" + f" ({meaning})" * bool(meaning),
            partial(_bound_times, symbol=symbol, power=power),
        )
        for symbol, meaning in known
        for power, shown in ((-1, f"C / {symbol}"), (1, f"{symbol} C"))
    ]


def _constant(facts: Facts, symbol: str) -> float:
    job, setup = facts.run.job, facts.run.setup
    if symbol == "2":
        return 2.0
    if symbol in ("P", "sqrt(P)"):
        P = float(len(facts.ours.parameter_names))
        return P if symbol == "P" else P**0.5
    if job is None or setup is None:
        return float("nan")
    W, K, b = float(job.num_ranks), float(setup.micro_batches), float(job.data.batch_size)
    return {"W": W, "K": K, "b": b, "B": W * K * b, "sqrt(W)": W**0.5}[symbol]


def _clipped(facts: Facts) -> np.ndarray:
    """[S, N] samples whose factor is a norm's share, and not 1."""
    theirs = facts.theirs.clip_factor
    return np.isfinite(theirs) & (theirs < 1 - 1e-6) & (theirs > 0)


def _typical(facts: Facts, values: Floats, used: np.ndarray) -> float | None:
    """Median of `values` [S, N] over the samples that are used in the rows that have to agree."""
    # A factor that is right tells nothing of a mistake.
    is_wrong = np.abs(facts.theirs.clip_factor - _right(facts)) > _FLOAT32
    used = used & is_wrong
    chosen = values[facts.rows][used[facts.rows]]
    return float(np.median(chosen)) if chosen.size else None


def _with_addend(facts: Facts, *, is_clamped: bool) -> Prediction:
    """C / (n + gamma), with the gamma that agrees best."""
    theirs = facts.theirs.clip_factor
    used = _clipped(facts) if is_clamped else np.isfinite(theirs) & (theirs > 0)
    addend = _typical(facts, facts.bound / theirs - facts.norm, used)
    if addend is None:
        return None
    values = facts.bound / (facts.norm + addend)
    values = np.minimum(1.0, values) if is_clamped else values
    return Fitted(values, f"{addend:.3g}")


def _adaptive(facts: Facts) -> Prediction:
    """C / (n + r / (n + r)), with the r that agrees best."""
    theirs = facts.theirs.clip_factor
    with np.errstate(all="ignore"):
        share = facts.bound / theirs - facts.norm
        values = share * facts.norm / (1 - share)
    r = _typical(facts, values, np.isfinite(theirs) & (theirs > 0))
    if r is None or not r > 0:
        return None
    return Fitted(facts.bound / (facts.norm + r / (facts.norm + r)), f"{r:.3g}")


def _late_in_batches(facts: Facts) -> Prediction:
    """C of the step before in some micro-batches of each step, by their number."""
    theirs, right, numbers = (
        facts.theirs.clip_factor,
        _right(facts),
        facts.theirs.sample_micro_batch,
    )
    late = clip_factors(_earlier_bound(facts, back=1), facts.norm)
    chosen = []
    for number in sorted(set(numbers.flat) - {UNUSED}):
        own = (numbers == number)[facts.rows]
        off = [np.nanmax(np.abs(v - theirs)[facts.rows][own], initial=0.0) for v in (right, late)]
        if off[0] > _FLOAT32 and off[1] <= _FLOAT32 + _ALIKE * off[0]:
            chosen.append(number)
    every = set(numbers.flat) - {UNUSED}
    if not chosen or len(chosen) == len(every):
        return None
    many = len(chosen) > 1
    said = f"micro-batch{'es' * many} {', '.join(map(str, chosen))} of each step"
    said += " are" if many else " is"
    return Fitted(
        np.where(np.isin(numbers, chosen), late, right),
        f"{said} clipped at C of the step before, the others at C",
    )


def _with_share_of_bound(facts: Facts) -> Prediction:
    """C / (n + a C), with the a that agrees best."""
    ratios = 1 / facts.theirs.clip_factor - facts.norm / facts.bound
    share = _typical(facts, ratios, _clipped(facts))
    if share is None:
        return None
    values = clip_factors(facts.bound, facts.norm + share * facts.bound)
    return Fitted(values, f"{share:.3g}")


def _smooth(facts: Facts) -> Prediction:
    """(1 + (n / C)^p)^(-1/p), with the p that agrees best."""
    ratio = facts.norm / facts.bound
    powers = (1, 2, 3, 4, 6, 8, 10, 12, 16)
    tried = [(1 + ratio**p) ** (-1 / p) for p in powers]
    errors = [
        float(np.nanmax(np.abs(t - facts.theirs.clip_factor)[facts.rows], initial=0.0))
        for t in tried
    ]
    best = int(np.argmin(errors))
    return Fitted(tried[best], f"(1 + (n / C)^{powers[best]})^(-1/{powers[best]})")


def _with_floor(facts: Facts) -> Prediction:
    """The right factors, but never below the least of the mode's."""
    least = float(np.nanmin(facts.theirs.clip_factor[facts.rows], initial=np.inf))
    if not 0 < least < 1:
        return None
    return Fitted(np.maximum(_right(facts), least), f"{least:.3g}")


def _decided_together(facts: Facts) -> Prediction:
    """C / n for all samples of a micro-batch in which one exceeds C, and 1 in others."""
    exceeds = (facts.norm > facts.bound).astype(np.float64)
    together = facts.by_batch(exceeds, lambda own: np.broadcast_to(own.max(), own.shape))
    if together is None:
        return None
    with np.errstate(all="ignore"):
        values = np.where(together > 0, facts.bound / facts.norm, 1.0)
    there = np.isfinite(facts.norm)[facts.rows]
    # Where every micro-batch has such a sample, the clamp may be missing as well.
    is_told = not (together > 0)[facts.rows][there].all()
    off = np.abs(values - facts.theirs.clip_factor)[facts.rows]
    return values if is_told and np.nanmax(off, initial=0.0) <= _ALIKE else None


def _of_rounded(C: Floats, n: Floats, rounding: Callable[[Floats], Floats]) -> Floats:
    return np.asarray(np.minimum(1.0, C / rounding(n)))


def _all_ones(facts: Facts) -> Prediction:
    """Ones, if all that is recorded is 1."""
    theirs = facts.theirs.clip_factor[facts.rows]
    is_one = np.abs(theirs[np.isfinite(theirs)] - 1) < _ALIKE
    return np.ones_like(facts.norm) if is_one.all() else None


def _with_cap(facts: Facts) -> Prediction:
    """The right factors, but never above the largest of the mode's."""
    most = float(np.nanmax(facts.theirs.clip_factor[facts.rows], initial=0.0))
    return Fitted(np.minimum(_right(facts), most), f"{most:.3g}") if 0 < most < 0.99 else None


def _on_a_grid(facts: Facts) -> Prediction:
    """The recorded factors, if they are the right ones to a few decimals or to a power of 2."""
    theirs, right = facts.theirs.clip_factor, _right(facts)
    with np.errstate(all="ignore"):
        powers = np.log2(right)
    grids = (
        *decimals_of(right),
        (np.exp2(np.floor(powers)), "rounded down to powers of 2"),
        (np.exp2(np.round(powers)), "rounded to powers of 2"),
        *(
            (change(right * parts) / parts, f"{how} to multiples of 1/{parts}")
            for parts in _PARTS
            for change, how in (
                (np.floor, "rounded down"),
                (np.round, "rounded"),
                (np.ceil, "rounded up"),
            )
        ),
    )
    return on_a_grid(facts, theirs, grids, allowed=_FLOAT32)


_PARTS = (2, 3, 4, 5, 8, 16, 20, 32, 50, 64, 127, 128, 200, 255, 256, 512, 1023, 1024)
"""Numbers of equal parts of 1 that factors may be rounded to."""


def _affine(facts: Facts) -> Prediction:
    """a + b c with the constants that agree best."""
    theirs, right = facts.theirs.clip_factor, _right(facts)
    of, wanted = right[facts.rows].ravel(), theirs[facts.rows].ravel()
    is_there = np.isfinite(of) & np.isfinite(wanted)
    if is_there.sum() < _ENOUGH_SAMPLES or np.ptp(of[is_there]) < _ALIKE:
        return None
    slope, start = np.polyfit(of[is_there], wanted[is_there], 1)
    return Fitted(start + slope * right, f"{start:.3g} + {slope:.3g}")


def _some_unclipped(facts: Facts) -> Prediction:
    """The right factors, but 1 where the mode has 1."""
    theirs, right = facts.theirs.clip_factor, _right(facts)
    is_there = np.isfinite(theirs) & np.isfinite(right)
    is_spared = is_there & (np.abs(theirs - 1) < _FLOAT32) & (right < 1 - _ALIKE)
    is_clipped = is_there & ~is_spared & (right < 1 - _ALIKE)
    rows = facts.rows
    if not is_spared[rows].any():
        return None
    with np.errstate(all="ignore"):
        ratio = facts.norm / facts.bound
    values, said = np.where(is_spared, 1.0, right), "some samples that exceed C are not clipped"
    exceeding = is_spared | is_clipped
    if which := group_in(is_spared, facts.theirs, rows, among=exceeding, baseline=facts.ours):
        said = f"not clipped are {which}"
    if is_clipped[rows].any():
        most, least = ratio[rows][is_spared[rows]].max(), ratio[rows][is_clipped[rows]].min()
        if most < least:
            said = f"samples are clipped from {most:.3g} to {least:.3g} C on, and not below"
    return Fitted(values, f"{said}: factors are 1 where n exceeds C")


def _dropped(facts: Facts) -> Prediction:
    """The right factors, but 0 from some multiple of C on."""
    theirs, right = facts.theirs.clip_factor, _right(facts)
    with np.errstate(all="ignore"):
        ratio = (facts.norm / facts.bound)[facts.rows]
    is_zero, is_kept = (theirs == 0)[facts.rows], (theirs > 0)[facts.rows]
    if not is_zero.any() or not is_kept.any():
        return None
    least, most = float(ratio[is_zero].min()), float(ratio[is_kept].max())
    if not 1 < most < least:
        return None
    return Fitted(
        np.where(theirs == 0, 0.0, right), f"a bound between {most:.3g} and {least:.3g} C"
    )


def _power(facts: Facts) -> Prediction:
    """min(1, C / n)^p, with the p that agrees best."""
    theirs, right = facts.theirs.clip_factor, _right(facts)
    with np.errstate(all="ignore"):
        powers = np.log(theirs) / np.log(right)
    power = _typical(facts, powers, _clipped(facts) & (right < 1 - _ALIKE))
    if power is None or not np.isfinite(power) or abs(power - 1) < _ALIKE:
        return None
    return Fitted(right**power, f"min(1, C / n)^{power:.3g}, another power than 1")


def _by_attribute(facts: Facts) -> Prediction:
    """Bounds that follow from what a sample is, told by the samples that are clipped."""
    with np.errstate(all="ignore"):
        shares = facts.theirs.clip_factor * facts.norm / facts.bound
    found = law_of(facts, np.where(_clipped(facts), shares, np.nan))
    if found is None:
        return None
    share, said = found
    return Fitted(clip_factors(facts.bound * share, facts.norm), said)


def _function_of_ratio(facts: Facts) -> Prediction:
    """The recorded factors, if they fall with n / C and depend on nothing else."""
    theirs = facts.theirs.clip_factor
    with np.errstate(all="ignore"):
        ratio = facts.norm / facts.bound
    ratios, factors = ratio[facts.rows].ravel(), theirs[facts.rows].ravel()
    is_there = np.isfinite(ratios) & np.isfinite(factors)
    ratios, factors = ratios[is_there], factors[is_there]
    num_bounds = len(np.unique(facts.bound[facts.rows]))
    if len(ratios) < _ENOUGH_SAMPLES or num_bounds < 2:
        return None
    order = np.argsort(ratios)
    ratios, factors = ratios[order], factors[order]
    if np.any(np.diff(factors) > _FLOAT32) or np.ptp(factors) < _ALIKE:
        return None
    shown = {int(np.abs(ratios - wanted).argmin()) for wanted in (0.5, 1.0, 2.0, 5.0)}
    said = [f"{factors[place]:.3g} where n is {ratios[place]:.3g} C" for place in sorted(shown)]
    return Fitted(theirs, ", ".join(said))


_FLOAT32, _ENOUGH_SAMPLES = 1e-6, 12
"""Rounding error of a factor, and samples to fit a function."""


def _of_groups(facts: Facts, size: int | None) -> Prediction:
    """The recorded factors, if each group of a micro-batch's samples has one; None if all are 1.

    Args:
        size: samples of a group; None for the whole micro-batch.
    """
    theirs, num_clipped = facts.theirs.clip_factor, 0
    for batch in facts.micro_batches:
        if batch.row not in facts.rows:
            continue
        length = len(batch.places)
        for start in range(0, length, size or length):
            group = theirs[batch.row, batch.places[start : start + (size or length)]]
            if np.ptp(group) > _ALIKE * group.max():
                return None
            num_clipped += len(group) > 1 and group.max() < 1
    return theirs if num_clipped else None


def _of_statistics(facts: Facts) -> Prediction:
    """Bounds that are a statistic of the norms in the micro-batch, the step, or the one before."""
    theirs, right, norm = facts.theirs.clip_factor, _right(facts), facts.norm
    is_wrong = np.zeros(right.shape, dtype=bool)
    with np.errstate(invalid="ignore"):
        is_wrong[facts.rows] = (np.abs(theirs - right) > _FLOAT32)[facts.rows]
    used = is_wrong & _clipped(facts)
    if used.sum() < _FEWEST:
        return None
    implied = theirs * norm
    for values, said in _statistics(facts, norm):
        with np.errstate(all="ignore"):
            shares = (implied / values)[used]
        if not np.isfinite(shares).all():
            continue
        share = float(np.median(shares))
        if np.abs(shares / share - 1).max() > _ALIKE:
            continue
        times = "" if abs(share - 1) < _ALIKE else f"{share:.4g} times "
        own = np.where(np.isfinite(values), share * values, facts.bound)
        for bound, how in (
            (own, ""),
            (np.minimum(own, facts.bound), ", where that is less than C"),
            (np.maximum(own, facts.bound), ", where that is more than C"),
        ):
            predicted = clip_factors(bound, norm)
            off = np.abs(predicted - theirs)[facts.rows]
            if float(np.nanmax(off, initial=0.0)) < _ALIKE:
                return Fitted(predicted, f"{times}{said}{how}")
    return None


_FEWEST = 4
"""Factors that a statistic is told from."""


def _statistics(facts: Facts, norm: Floats) -> Iterator[tuple[Floats, str]]:
    """[S, N] statistics of norms that bounds may be taken from."""
    known: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("median", np.median),
        ("lower median", partial(np.quantile, q=0.5, method="lower")),
        ("mean", np.mean),
        ("largest", np.max),
        ("smallest", np.min),
        ("root mean square", lambda n: np.sqrt(np.mean(np.square(n)))),
        *((f"{q:g} quantile", partial(np.quantile, q=q)) for q in (0.9, 0.75, 0.25, 0.1)),
    )
    shape = norm.shape
    for name, of in known:
        own, before = np.full(shape, np.nan), np.full(shape, np.nan)
        last: dict[int, float] = {}
        for batch in facts.micro_batches:
            value = float(of(norm[batch.row, batch.places]))
            own[batch.row, batch.places] = value
            before[batch.row, batch.places] = last.get(batch.rank, np.nan)
            last[batch.rank] = value
        yield own, f"the {name} norm in the micro-batch"
        yield before, f"the {name} norm in the micro-batch before"
        steps = np.full((shape[0], 1), np.nan)
        for row in range(shape[0]):
            there = norm[row][np.isfinite(norm[row])]
            steps[row] = of(there) if len(there) else np.nan
        late = np.concatenate([np.full((1, 1), np.nan), steps[:-1]])
        yield np.broadcast_to(steps, shape), f"the {name} norm in the step"
        yield np.broadcast_to(late, shape), f"the {name} norm in the step before"


def _by_rank(facts: Facts) -> Prediction:
    """Another bound in each step and on each rank."""
    return _at_own_bounds(facts, facts.theirs.sample_rank, "on rank")


def _by_micro_batch(facts: Facts) -> Prediction:
    """Another bound in each step and in each micro-batch of a rank, by its number."""
    return _at_own_bounds(facts, facts.theirs.sample_micro_batch, "in micro-batch")


def _at_own_bounds(facts: Facts, part_of: np.ndarray, what: str) -> Prediction:
    """Another bound in each part of a step, fitted to its clipped samples.

    Args:
        part_of: [S, N] part that a sample is of.
    """
    theirs, values, used = facts.theirs.clip_factor, _right(facts), _clipped(facts)
    bounds: dict[int, list[float]] = {}
    for row in facts.rows.tolist():
        implied = (theirs * facts.norm)[row]
        of_step = implied[used[row]]
        is_one = len(of_step) > 0 and np.ptp(of_step) < _ALIKE * of_step.max()
        for part in sorted(set(part_of[row].tolist()) - {UNUSED}):
            of_part = part_of[row] == part
            here = used[row] if is_one else used[row] & of_part
            if here.any():
                bound = float(np.median(implied[here]))
                values[row, of_part] = clip_factors(np.array(bound), facts.norm[row, of_part])
                bounds.setdefault(part, []).append(bound / float(facts.bound[row, 0]))
    if not bounds:
        return None
    return Fitted(values, _bounds_in_words(bounds, what))


def _bound_of_each_batch(facts: Facts) -> Prediction:
    """The recorded factors, if the clipped samples of each micro-batch have one bound."""
    theirs, used, bounds, num_shared = facts.theirs.clip_factor, _clipped(facts), [], 0
    for batch in facts.micro_batches:
        if batch.row not in facts.rows:
            continue
        is_clipped = used[batch.row, batch.places]
        implied = (theirs * facts.norm)[batch.row, batch.places]
        if not is_clipped.any():
            continue
        bound = float(np.median(implied[is_clipped]))
        expected = clip_factors(np.array(bound), facts.norm[batch.row, batch.places])
        if np.abs(expected - theirs[batch.row, batch.places]).max() > _ALIKE:
            return None
        num_shared += is_clipped.sum() > 1
        bounds.append(bound / float(facts.bound[batch.row, 0]))
    if num_shared < _FEWEST:
        return None
    shown = ", ".join(f"{each:.3g}" for each in bounds[:_FEWEST])
    return Fitted(theirs, f"{shown} C in the first micro-batches, one rank after the other")


def _bounds_in_words(bounds: dict[int, list[float]], what: str) -> str:
    lists = list(bounds.values())
    longest = max(lists, key=len)
    # A part that lacks clipped samples in some steps is told by those where it has them.
    are_one = all(np.allclose(each, longest[0], rtol=_ALIKE) for each in lists)
    are_alike = are_one or all(
        len(each) == len(longest) and np.allclose(each, longest, rtol=_ALIKE) for each in lists
    )
    if are_alike:
        return _shares(longest)
    wrong = {k: each for k, each in bounds.items() if not np.allclose(each, 1.0, rtol=_ALIKE)}
    said = " and ".join(f"{_shares(each)} {what} {part}" for part, each in wrong.items())
    return f"{said}, and at C elsewhere" if len(wrong) < len(bounds) else said


def _shares(values: Sequence[float]) -> str:
    if np.allclose(values, values[0], rtol=_ALIKE):
        return f"{values[0]:.4g} C"
    return f"{', '.join(f'{v:.3g}' for v in values)} C (step by step)"


def _earlier_bound(facts: Facts, *, back: int | None) -> Floats:
    """[S, 1] C of the first step, or of `back` steps before."""
    bound = facts.bound
    if back is None:
        return np.broadcast_to(bound[:1], bound.shape)
    return np.concatenate([bound[:back], bound[:-back]])


def _late_on_one_rank(rank_of: Callable[[Facts], int]) -> Callable[[Facts], Prediction]:
    def predict(facts: Facts) -> Prediction:
        rank = rank_of(facts)
        late = clip_factors(_earlier_bound(facts, back=1), facts.norm)
        values = np.where(facts.theirs.sample_rank == rank, late, _right(facts))
        return Fitted(values, str(rank))

    return predict


def _last_rank(facts: Facts) -> int:
    return int(facts.theirs.sample_rank.max(initial=0))


def _of_other_norms() -> Sequence[Hypothesis]:
    """Factors that are computed from the norms of other samples, or from scaled ones."""

    def right(facts: Facts) -> Floats:
        return facts.norm

    def predict(facts: Facts, of: Hypothesis) -> Prediction:
        norms = of.predict(facts)
        if norms is None:
            return None
        if isinstance(norms, Fitted):
            return Fitted(clip_factors(facts.bound, norms.values), norms.shown)
        return clip_factors(facts.bound, norms)

    return [
        Hypothesis(
            sentence=f"they are computed from other norms: {hypothesis.sentence}",
            predict=partial(predict, of=hypothesis),
        )
        for hypothesis in (
            *mixed_up(right, right),
            *changed(right, _implied_norms),
            *_other_totals(),
        )
    ]


def _implied_norms(facts: Facts) -> Floats:
    """[S, N] C / c of the samples that are clipped, NaN of the others."""
    with np.errstate(all="ignore"):
        return np.where(_clipped(facts), facts.bound / facts.theirs.clip_factor, np.nan)


def _other_totals() -> Sequence[Hypothesis]:
    """Totals that are made of the norms by parameter in another way."""
    ways: Sequence[tuple[str, Callable[[Floats], Floats]]] = (
        ("the largest of the parameters' norms", lambda n: n.max(axis=2)),
        ("the sum of the parameters' norms", lambda n: n.sum(axis=2)),
        (
            "the root of the mean, not the sum, of the parameters' squares",
            lambda n: np.sqrt(np.square(n).mean(axis=2)),
        ),
    )
    found = [Hypothesis(sentence=said, predict=partial(_total_of, of=of)) for said, of in ways]
    return [*found, Hypothesis(sentence="those without {}", predict=_without_some)]


def _total_of(facts: Facts, of: Callable[[Floats], Floats]) -> Prediction:
    return of(facts.by_parameter)


def _without_some(facts: Facts) -> Prediction:
    """Norms without the parameters whose loss agrees best."""
    squares = np.square(facts.by_parameter)
    best, least = None, np.inf
    for name, columns in groups_of_names(facts.ours.parameter_names.tolist()):
        left = np.sqrt(np.maximum(squares.sum(axis=2) - squares[:, :, columns].sum(axis=2), 0.0))
        off = (clip_factors(facts.bound, left) - facts.theirs.clip_factor)[facts.rows]
        error = float(np.nanmax(np.abs(off), initial=0.0))
        if error < least:
            best, least = Fitted(left, name), error
    return best


FACTORS = Subject(
    zero="they are 0: samples are dropped rather than clipped",
    observed=lambda facts: facts.theirs.clip_factor,
    right=_right,
    levels=(
        (Hypothesis(sentence="they are all 1: no sample is clipped", predict=_all_ones),),
        (
            _at_bound("1: C is ignored", lambda facts: 1.0),
            _at_bound(
                "that of the first step",
                lambda facts: _earlier_bound(facts, back=None),
            ),
            _at_bound(
                "that of the step before",
                lambda facts: _earlier_bound(facts, back=1),
            ),
            *_named_bounds(),
            _at_bound("C^2", lambda facts: facts.bound**2),
            _at_bound("sqrt(C)", lambda facts: np.sqrt(facts.bound)),
            Hypothesis(
                sentence="whether to clip is decided once for the whole micro-batch, not for each "
                "sample: where one sample exceeds C, those within C are scaled up to it as well",
                predict=_decided_together,
            ),
            _formula(
                "they are C / n rather than min(1, C / n): without the clamp at 1, small gradients "
                "are scaled up",
                lambda C, n: C / n,
            ),
            _formula(
                "they are max(1, C / n) rather than min(1, C / n): large gradients are not "
                "clipped, and small ones are scaled up",
                lambda C, n: np.maximum(1.0, C / n),
            ),
            _formula(
                "they are min(1, C / n^2): C is divided by the squared norm",
                lambda C, n: np.minimum(1.0, C / n**2),
            ),
            _formula(
                "they are min(1, (C / n)^2): the factor is squared",
                lambda C, n: np.minimum(1.0, C / n) ** 2,
            ),
            _formula(
                "they are the root of the right ones", lambda C, n: np.sqrt(np.minimum(1.0, C / n))
            ),
            _formula("they are the reciprocal, max(1, n / C)", lambda C, n: np.maximum(1.0, n / C)),
            _formula("they are n / C, upside down", lambda C, n: n / C),
            _formula("they are min(1, n / C), upside down", lambda C, n: np.minimum(1.0, n / C)),
            Hypothesis(
                sentence="samples that exceed {} are dropped (factor 0) rather than clipped",
                predict=_dropped,
            ),
            _formula(
                "samples that exceed C are dropped (factor 0) rather than clipped",
                lambda C, n: (n <= C).astype(np.float64),
            ),
        ),
        (
            Hypothesis(
                sentence="they are min(1, C / (n + {})): a constant that is too large is added to "
                "the norm",
                predict=lambda facts: _with_addend(facts, is_clamped=True),
            ),
            Hypothesis(
                sentence="they are C / (n + {}), which is automatic clipping (no clamp at 1)",
                predict=lambda facts: _with_addend(facts, is_clamped=False),
            ),
            Hypothesis(sentence="they are {}, a smooth function", predict=_smooth),
            Hypothesis(
                sentence="they are C / (n + r / (n + r)) with r = {}, the weights of per-sample "
                "adaptive clipping (no clamp at 1)",
                predict=_adaptive,
            ),
            Hypothesis(
                sentence="rank {} clips at C of the step before, a step late",
                predict=_late_on_one_rank(_last_rank),
            ),
            Hypothesis(sentence="a new C is taken up late: {}", predict=_late_in_batches),
            Hypothesis(
                sentence="rank {} clips at C of the step before, a step late",
                predict=_late_on_one_rank(lambda facts: 0),
            ),
            Hypothesis(sentence="they are never above {}", predict=_with_cap),
            Hypothesis(sentence="they are {}", predict=_on_a_grid),
            Hypothesis(sentence="they are {} c in place of the right factors c", predict=_affine),
            *(
                _formula(
                    f"they are computed from norms that are rounded to {name}",
                    partial(_of_rounded, rounding=rounding),
                )
                for name, rounding in (("bfloat16", to_bfloat16), ("float16", to_float16))
            ),
            *mixed_up(_right, lambda facts: facts.theirs.clip_factor),
            *of_all_ranks(_right),
            *rounded(_right, lambda facts: facts.theirs.clip_factor),
        ),
        tuple(_of_other_norms()),
        (
            Hypothesis(sentence="they are {}", predict=_power),
            *(
                _formula(f"they are {said}, a smooth function", predict)
                for said, predict in (
                    ("min(1, exp(1 - n / C))", lambda C, n: np.minimum(1.0, np.exp(1 - n / C))),
                    ("exp(-n / C)", lambda C, n: np.exp(-n / C)),
                    ("1 - exp(-C / n)", lambda C, n: 1 - np.exp(-C / n)),
                    ("tanh(C / n)", lambda C, n: np.tanh(C / n)),
                    ("(2 / pi) atan(C / n)", lambda C, n: np.arctan(C / n) * 2 / np.pi),
                    ("1 / (1 + (n / C)^2)", lambda C, n: 1 / (1 + (n / C) ** 2)),
                    ("2 / (1 + exp(n / C))", lambda C, n: 2 / (1 + np.exp(n / C))),
                    ("log(1 + n / C) / (n / C)", lambda C, n: np.log1p(n / C) / (n / C)),
                    ("max(0, 1 - n / C)", lambda C, n: np.maximum(0.0, 1 - n / C)),
                    ("(C / n) tanh(n / C)", lambda C, n: C / n * np.tanh(n / C)),
                    ("(C / n) (1 - exp(-n / C))", lambda C, n: C / n * -np.expm1(-n / C)),
                    (
                        "(C / n) (2 / pi) atan(n / C)",
                        lambda C, n: C / n * np.arctan(n / C) * 2 / np.pi,
                    ),
                    ("(C / n) atan(n / C)", lambda C, n: C / n * np.arctan(n / C)),
                    ("1 / max(1, (n / C)^2)", lambda C, n: 1 / np.maximum(1.0, (n / C) ** 2)),
                    ("max(0, min(1, 2 - n / C))", lambda C, n: np.clip(2 - n / C, 0.0, 1.0)),
                )
            ),
        ),
        (
            Hypothesis(sentence="samples are clipped not at C but at {}", predict=_of_statistics),
            Hypothesis(sentence="samples are clipped not at C but at C {}", predict=_by_attribute),
            scaled_by_attribute(_right, lambda facts: facts.theirs.clip_factor),
        ),
        (of_other_places(_right, lambda facts: facts.theirs.clip_factor),),
        (
            Hypothesis(sentence="they are never below {}", predict=_with_floor),
            Hypothesis(
                sentence="all samples of a micro-batch have one factor: their mean or their sum is "
                "clipped, not each sample",
                predict=lambda facts: _of_groups(facts, None),
            ),
        ),
        (
            *(
                Hypothesis(
                    sentence=f"each {size} samples of a micro-batch have one factor: they are "
                    "clipped together, as a batch of their own",
                    predict=partial(_of_groups, size=size),
                )
                for size in (2, 3, 4)
            ),
        ),
        tuple(
            Hypothesis(sentence="samples are clipped not at C but at {}", predict=own_bounds)
            for own_bounds in (_by_rank, _by_micro_batch)
        ),
    ),
    late=(
        (
            Hypothesis(
                sentence="they are min(1, C / (n + {} C)): a share of C is added to the norm",
                predict=_with_share_of_bound,
            ),
        ),
        (Hypothesis(sentence="{}", predict=_some_unclipped),),
        (
            Hypothesis(
                sentence="samples of a micro-batch are clipped at one bound, but not at C: {}",
                predict=_bound_of_each_batch,
                is_hint=True,
            ),
        ),
        (
            Hypothesis(
                sentence="they are another function of n / C than min(1, C / n): {}",
                predict=_function_of_ratio,
                is_hint=True,
            ),
        ),
    ),
)
"""Clip factors, [S, N], as they follow from the mode's own norms."""
