"""Mistakes of the clipped sum, given the factors that the mode itself reports.

A sum is predicted from projections of each sample's gradient, which the reference records: it is
their sum with the weights of the hypothesis.

Legend: S steps, N samples, P parameters, Q wrong parameters, K projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.batch_laws import law_of_batches
from dpsgd_track.comparison.diagnose.hypotheses.by_parameter import scaled_apart, scaled_each
from dpsgd_track.comparison.diagnose.hypotheses.factors import clip_factors
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts, MicroBatch
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Fitted,
    Hypothesis,
    Prediction,
    Subject,
    in_some_elements,
    off_as_rounded,
)
from dpsgd_track.comparison.diagnose.hypotheses.name_groups import (
    groups_of_names,
    pairs_of_names,
    unit_of,
)
from dpsgd_track.comparison.diagnose.hypotheses.resolved_sums import mixed_sums, of_parts
from dpsgd_track.comparison.diagnose.hypotheses.sample_weights import ALIKE, any_weights
from dpsgd_track.comparison.diagnose.hypotheses.samples import mixed_up, to_bfloat16, to_float16
from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.record.trajectory import UNUSED, Floats, sketch_distance, sketch_length

_MOST_EXCHANGED = 8
"""Layers of which each is looked for among the others."""


def _weighted(sentence: str, weights: Callable[[Facts], Floats | None]) -> Hypothesis:
    """The sum with other weights, [S, N] or [S, N, Q]."""

    def predict(facts: Facts) -> Prediction:
        if not facts.has_sketches or (found := weights(facts)) is None:
            return None
        return facts.weighted(found)

    return Hypothesis(sentence=sentence, predict=predict)


def _of_factors(sentence: str, change: Callable[[Floats], Floats]) -> Hypothesis:
    return _weighted(sentence, lambda facts: change(facts.factor))


def _of_batches(sentence: str, change: Callable[[Facts, MicroBatch], float]) -> Hypothesis:
    """Weights that are the factors times a number of each micro-batch."""

    def weights(facts: Facts) -> Floats | None:
        if not facts.micro_batches:
            return None
        found = facts.factor.copy()
        for batch in facts.micro_batches:
            found[batch.row, batch.places] *= change(facts, batch)
        return found

    return _weighted(sentence, weights)


def _of_places(sentence: str, place: int, factor: float) -> Hypothesis:
    """Weights that are the factors, times `factor` for one place of each micro-batch."""

    def weights(facts: Facts) -> Floats | None:
        found = facts.factor.copy()
        for batch in facts.micro_batches:
            found[batch.row, batch.places[place]] *= factor
        return found if facts.micro_batches else None

    return _weighted(sentence, weights)


def _last(facts: Facts, batch: MicroBatch) -> int:
    """Number of the last micro-batch of the batch's step, over all ranks."""
    return int(facts.theirs.sample_micro_batch[batch.row].max())


def _longest(facts: Facts, batch: MicroBatch) -> int:
    """Samples of the longest micro-batch of the batch's step."""
    return max(len(b.places) for b in facts.micro_batches if b.row == batch.row)


def _length_of_first(facts: Facts, batch: MicroBatch) -> int:
    """Samples of the first micro-batch of the batch's step and rank."""
    of_rank = [b for b in facts.micro_batches if (b.row, b.rank) == (batch.row, batch.rank)]
    return len(of_rank[0].places)


def _size_of_rank(facts: Facts, batch: MicroBatch) -> int:
    return int((facts.theirs.sample_rank[batch.row] == batch.rank).sum())


def _num_ranks(facts: Facts) -> int:
    return facts.run.job.num_ranks if facts.run.job else 1


def _one_by_one(
    sentence: str, groups: Callable[[Facts], Iterator[tuple[str, Floats]]]
) -> Hypothesis:
    """The sum over one of several groups of samples: the one that agrees best."""

    def predict(facts: Facts) -> Prediction:
        if not facts.has_sketches:
            return None
        tried = [(shown, facts.weighted(weights)) for shown, weights in groups(facts)]
        theirs, rows = facts.recorded_sum, facts.rows
        errors = [float(np.square((v - theirs)[rows]).sum()) for _, v in tried]
        if not tried:
            return None
        shown, values = tried[int(np.argmin(errors))]
        return Fitted(values, shown)

    return Hypothesis(sentence=sentence, predict=predict)


def _of_rank(facts: Facts) -> Iterator[tuple[str, Floats]]:
    ranks = facts.theirs.sample_rank
    for rank in sorted(set(ranks.flat) - {UNUSED}):
        yield f"rank {rank}", np.where(ranks == rank, facts.factor, 0.0)


def _without_rank(facts: Facts) -> Iterator[tuple[str, Floats]]:
    ranks = facts.theirs.sample_rank
    for rank in sorted(set(ranks.flat) - {UNUSED}):
        yield f"rank {rank}", np.where(ranks == rank, 0.0, facts.factor)


def _reduced_last(facts: Facts) -> Iterator[tuple[str, Floats]]:
    ranks, numbers = facts.theirs.sample_rank, facts.theirs.sample_micro_batch
    last = numbers.max(axis=1, keepdims=True)
    for rank in sorted(set(ranks.flat) - {UNUSED}):
        yield f"rank {rank}", np.where((ranks == rank) | (numbers == last), facts.factor, 0.0)


def _of_number(facts: Facts) -> Iterator[tuple[str, Floats]]:
    """One of the micro-batches of every rank, lost or counted more than once."""
    numbers = facts.theirs.sample_micro_batch
    counted = {_num_ranks(facts): f"counts {_num_ranks(facts)} times, once for each rank"}
    counted |= {0: "is lost", 2: "counts twice"}
    for number in sorted(set(numbers.flat) - {UNUSED}):
        for factor, what in counted.items():
            changed = np.where(numbers == number, factor * facts.factor, facts.factor)
            yield f"micro-batch {number} {what}", changed


def _layers(facts: Facts) -> list[str]:
    return [name.rpartition(".")[0] for name in facts.ours.parameter_names.tolist()]


def _blocks(facts: Facts) -> list[str]:
    return [unit_of(name) for name in facts.ours.parameter_names.tolist()]


def _clipped_by(facts: Facts, groups: Sequence[str], *, shares: bool) -> Floats:
    """[S, N, Q] factors of groups of parameters that are clipped by themselves.

    Args:
        groups: name of each parameter's group.
        shares: True if each is clipped at C / sqrt(number of groups) rather than C.
    """
    names = list(dict.fromkeys(groups))
    bound = facts.bound / (len(names) ** 0.5 if shares else 1.0)
    squares = np.square(facts.by_parameter)
    columns = [np.array([g == name for g in groups]) for name in names]
    factors = {
        name: clip_factors(bound, np.sqrt(squares[:, :, of].sum(axis=2)))
        for name, of in zip(names, columns, strict=True)
    }
    return np.stack([factors[groups[c]] for c in facts.columns.tolist()], axis=2)


def _all_parameters(facts: Facts) -> list[str]:
    return [str(name) for name in facts.ours.parameter_names.tolist()]


def _parameter_clipping() -> Iterator[Hypothesis]:
    for what, parts_of in (
        ("parameter", _all_parameters),
        ("layer", _layers),
        ("block", _blocks),
    ):
        for shares in (True, False):
            bound = f"C / sqrt(number of {what}s)" if shares else "the full C"
            breach = "" if shares else ", so that a sample can add more than C"
            yield _weighted(
                f"each {what} is clipped by itself, at {bound}{breach}",
                partial(_clipped_by_parts, parts_of=parts_of, shares=shares),
            )


def _clipped_by_parts(
    facts: Facts, parts_of: Callable[[Facts], Sequence[str]], *, shares: bool
) -> Floats:
    return _clipped_by(facts, parts_of(facts), shares=shares)


def _two_groups(facts: Facts) -> Iterator[tuple[str, Floats]]:
    """Some of the parameters and all others, each clipped by themselves."""
    names = _all_parameters(facts)
    for shares, bound in ((True, "C / sqrt(2)"), (False, "the full C")):
        for group, columns in (*groups_of_names(names), *pairs_of_names(names)):
            parts = [str(column in columns) for column in range(len(names))]
            said = f"{group} and all other parameters are clipped apart, at {bound} each"
            yield said, _clipped_by(facts, parts, shares=shares)


def _normalised_factors() -> Iterator[Hypothesis]:
    """Factors that are divided by their sum or mean, as a weighted average has them."""
    for what, of in (("mean", np.nanmean), ("sum", np.nansum), ("largest", np.nanmax)):

        def by_batch(facts: Facts, of: Callable[..., Floats] = of) -> Floats | None:
            return facts.by_batch(facts.factor, lambda own: own / of(own))

        def by_step(facts: Facts, of: Callable[..., Floats] = of) -> Floats:
            return np.asarray(facts.factor / of(facts.factor, axis=1, keepdims=True))

        for weights, where in ((by_batch, "micro-batch"), (by_step, "step")):
            said = f"clip factors are divided by the {what} of those in the {where}"
            yield _weighted(said, weights)


def _mixed_up_factors() -> Iterator[Hypothesis]:
    """Sums with the factors of other samples."""

    def right(facts: Facts) -> Floats:
        return facts.factor

    # Scaled micro-batches have hypotheses of their own.
    for hypothesis in mixed_up(right, right, is_scaled=False):
        yield _weighted(
            f"samples are not weighed by their own clip factors: {hypothesis.sentence}",
            partial(_plain, hypothesis=hypothesis),
        )


def _plain(facts: Facts, hypothesis: Hypothesis) -> Floats | None:
    """The values that a hypothesis predicts."""
    predicted = hypothesis.predict(facts)
    return predicted.values if isinstance(predicted, Fitted) else predicted


def _mean_size(facts: Facts, batch: MicroBatch) -> float:
    """Mean over ranks of the samples in the micro-batches of the same number."""
    t = facts.theirs
    return float((t.sample_micro_batch[batch.row] == batch.number).sum()) / _num_ranks(facts)


def _one_factor_each(facts: Facts, *, of_step: bool) -> Prediction:
    """Unclipped gradients, with one fitted factor for each micro-batch, or for the whole step."""
    if not facts.has_sketches:
        return None
    gradients = facts.ours.sample_sketch[:, :, facts.columns].astype(np.float64)
    predicted = np.full(facts.right_sum.shape, np.nan)
    for row in facts.rows.tolist():
        places = [b.places for b in facts.micro_batches if b.row == row]
        if of_step:
            places = [np.flatnonzero(facts.theirs.sample_index[row] != UNUSED)]
        elif len({b.number for b in facts.micro_batches if b.row == row}) > 1:
            numbers = facts.theirs.sample_micro_batch[row]
            places = [np.flatnonzero(numbers == n) for n in sorted(set(numbers) - {UNUSED})]
        if not places:
            return None
        table = np.stack([gradients[row, own].sum(axis=0).ravel() for own in places])
        wanted = facts.theirs.gradient_sketch[row, facts.columns].ravel()
        if not np.isfinite(table).all() or not np.isfinite(wanted).all():
            return None
        weights = np.linalg.lstsq(table.T, wanted, rcond=None)[0]
        predicted[row] = (weights @ table).reshape(predicted[row].shape)
    return predicted


def _not_reduced(facts: Facts, times: Callable[[Facts], float] = lambda facts: 1.0) -> Prediction:
    """Rows of each rank from its own samples alone."""
    alone = facts.own_rows(facts.factor)
    return None if alone is None else times(facts) * alone


def _reduced_last_by_rows(facts: Facts) -> Prediction:
    """Rows of each rank from its own samples, but from all samples of the last micro-batch."""
    numbers = facts.theirs.sample_micro_batch
    is_last = numbers == numbers.max(axis=1, keepdims=True)
    earlier = facts.own_rows(np.where(is_last, 0.0, facts.factor))
    if earlier is None or is_last[facts.rows].all():
        return None
    return earlier + facts.weighted(np.where(is_last, facts.factor, 0.0))


def _added_late(facts: Facts) -> Prediction:
    """The last micro-batch added in the next step."""
    if not facts.has_sketches or not facts.micro_batches:
        return None
    last = np.zeros_like(facts.factor)
    for batch in facts.micro_batches:
        if batch.number == _last(facts, batch):
            last[batch.row, batch.places] = facts.factor[batch.row, batch.places]
    late = facts.weighted(last)
    before = np.concatenate([np.zeros_like(late[:1]), late[:-1]])
    return np.asarray(facts.right_sum - late + before)


def _not_cleared(facts: Facts) -> Prediction:
    """The mode's own sum of the step before, added."""
    theirs = facts.recorded_sum
    return np.concatenate([facts.right_sum[:1], facts.right_sum[1:] + theirs[:-1]])


def _not_cleared_once(facts: Facts) -> Prediction:
    """The right sum of the step before, added."""
    return np.concatenate([facts.right_sum[:1], facts.right_sum[1:] + facts.right_sum[:-1]])


def _not_cleared_divided(facts: Facts) -> Prediction:
    """The sum with the gradient that the optimizer was given in the step before added."""
    before = facts.theirs.noised_sketch[:-1, facts.columns] / facts.divisor
    return np.concatenate([facts.right_sum[:1], facts.right_sum[1:] + before])


def _idle_sends_again(facts: Facts) -> Prediction:
    """The sum with a rank's last share added for each micro-batch of which it has no samples."""
    if not facts.has_sketches or not facts.micro_batches:
        return None
    batches = {(b.row, b.number, b.rank): b for b in facts.micro_batches}
    predicted = facts.right_sum.copy()
    sent: dict[int, Floats] = {}
    for row in range(len(predicted)):
        last = max((number for r, number, _ in batches if r == row), default=0)
        for number in range(last + 1):
            for rank in range(_num_ranks(facts)):
                batch = batches.get((row, number, rank))
                if batch is None:
                    predicted[row] += sent.get(rank, 0.0)
                    continue
                sent[rank] = facts.sum_of_batch(batch)
    return predicted


def _exchanged(facts: Facts) -> Prediction:
    """The recorded sum, if each wrong layer's gradient is as long as another one's."""
    ours, theirs = facts.ours.layer_grad_norm, facts.theirs.layer_grad_norm
    layers = facts.ours.layer_names.tolist()
    names = [str(facts.ours.parameter_names[c]) for c in facts.columns.tolist()]
    wrong = [layers.index(n.removesuffix(".weight")) for n in names if n[:-7] in layers]
    if len(wrong) != len(names) or not 2 <= len(wrong) <= _MOST_EXCHANGED:
        return None
    rows, pairs = facts.rows, []
    for layer in wrong:
        near = [
            other
            for other in wrong
            if other != layer and np.allclose(theirs[rows, layer], ours[rows, other], 1e-4, 0.0)
        ]
        if len(near) != 1:
            return None
        pairs.append(f"{layers[layer]} has that of {layers[near[0]]}")
    return Fitted(facts.recorded_sum, " and ".join(pairs))


def _kept_from_a_try(facts: Facts) -> Floats:
    """[S, N] factors, added to those with the C of the step before."""
    before = np.concatenate([facts.bound[:1], facts.bound[:-1]])
    return np.asarray(facts.factor + clip_factors(before, facts.norm))


def _right_in_length(facts: Facts) -> Prediction:
    """The recorded sum, if it is as long as the right one although its parameters are not."""
    ours, theirs = (t.grad_norm[facts.rows] for t in (facts.ours, facts.theirs))
    lengths = [sketch_length(each)[facts.rows] for each in (facts.right_sum, facts.recorded_sum)]
    with np.errstate(all="ignore"):
        is_off = np.abs(lengths[1] / lengths[0] - 1) > _SKETCHED
    if len(facts.columns) < _ENOUGH_SCALED or not is_off.any() or not np.all(ours > 0):
        return None
    whole = np.sqrt(np.square(sketch_length(facts.theirs.gradient_sketch)).sum(axis=1))
    whole = whole[facts.rows] / facts.divisor
    # Projections have to tell the same length, up to their scatter.
    if np.abs(whole / theirs - 1).max() > _SKETCHED:
        return None
    return facts.recorded_sum if np.abs(theirs / ours - 1).max() < _SAME_LENGTH else None


_SAME_LENGTH = 5e-6
"""Relative error up to which float32 lengths of sums are equal."""


def _rounded(facts: Facts, bits: int) -> Prediction:
    """The recorded sum, if rounding to `bits` explains its error; else None."""
    theirs = facts.recorded_sum
    length = sketch_length(facts.right_sum)
    return theirs if off_as_rounded(theirs, facts.right_sum, length, bits=bits) else None


def _noised(facts: Facts) -> Prediction:
    """The recorded sum, if its errors are of one size for each element, as noise is."""
    theirs = facts.recorded_sum
    sizes = facts.ours.parameter_sizes[facts.columns].astype(np.float64)
    is_large = sizes >= _MANY_ELEMENTS
    std = facts.theirs.noise_stds[facts.rows]
    if is_large.sum() < _MANY_PARAMETERS or not np.all(std > 0):
        return None
    # Errors of like tensors are of one size whatever they are.
    if sizes.max() < _UNLIKE * sizes[is_large].min():
        return None
    off = sketch_distance(theirs, facts.right_sum)[facts.rows][:, is_large]
    size = off / np.sqrt(sizes[is_large]) / std[:, None]
    if not np.all(size > 0) or np.quantile(size, 0.9) > 2 * np.quantile(size, 0.1):
        return None
    return Fitted(theirs, f"{float(np.median(size)):.2g}")


_MANY_ELEMENTS, _MANY_PARAMETERS, _UNLIKE = 16, 4, 4.0
"""Least elements of a parameter, least parameters, and least ratio of the largest to the smallest
of them, that errors of one size are told from."""


def _where_a_rank_is_idle(facts: Facts) -> Prediction:
    """The recorded sum, if only steps with an empty micro-batch are wrong; else None."""
    if not facts.micro_batches:
        return None
    theirs = facts.recorded_sum
    there = {(b.row, b.number, b.rank) for b in facts.micro_batches}
    idle = [
        any(
            (row, number, rank) not in there
            for number in {n for r, n, _ in there if r == row}
            for rank in range(_num_ranks(facts))
        )
        for row in range(len(theirs))
    ]
    if not 0 < sum(idle[row] for row in facts.rows.tolist()) < len(facts.rows):
        return None
    return np.where(np.array(idle)[:, None, None], theirs, facts.right_sum)


def _of_step_before(facts: Facts) -> Prediction:
    return np.concatenate([facts.right_sum[:1], facts.right_sum[:-1]])


def _of_move(facts: Facts, move: SumFormula) -> Floats | None:
    """[S, Q, K] the right sum with its elements moved or lost; None if it is not recorded."""
    place, shape = list(SumFormula).index(move), facts.ours.shape_of("moved_sketch")
    if place >= shape[1] or not shape[-1]:
        return None
    return np.asarray(facts.ours.moved_sketch[:, place][:, facts.columns], dtype=np.float64)


def _moves() -> Iterator[Hypothesis]:
    for move in SumFormula:
        is_moved = move in _MOVED
        places = "the gradient is right in length but its elements are in the wrong places: "
        yield Hypothesis(
            sentence=f"{places * is_moved}it is {move.value}", predict=partial(_of_move, move=move)
        )


_FORMULAS = list(SumFormula)
_MOVED = frozenset(
    [
        *_FORMULAS[: _FORMULAS.index(SumFormula.LAST_ROW_LOST)],
        *_FORMULAS[_FORMULAS.index(SumFormula.COLUMNS_REVERSED) :],
    ]
)
"""Those in which elements are in other places."""


def _reduced_in_part(facts: Facts) -> Prediction:
    """In each step, the nearest of the sums that are not reduced, or not of all micro-batches."""
    formulas = (
        SumFormula.ONLY_LAST_REDUCED,
        SumFormula.ONLY_FIRST_REDUCED,
        SumFormula.LAST_NOT_REDUCED,
        SumFormula.REDUCED_TO_FIRST_RANK,
        SumFormula.NOT_REDUCED,
    )
    found = [_of_move(facts, formula) for formula in formulas]
    known = [values for values in found if values is not None]
    if len(known) < len(formulas):
        return None
    theirs = facts.recorded_sum
    table = np.stack([*known, facts.right_sum])
    errors = np.nan_to_num(np.square(table - theirs).sum(axis=(2, 3)), nan=np.inf)
    nearest = errors.argmin(axis=0)
    used = [formulas[n].value for n in nearest[facts.rows].tolist() if n < len(formulas)]
    shown = ", in other steps ".join(dict.fromkeys(used))
    return Fitted(table[nearest, np.arange(len(nearest))], shown) if used else None


def _shards_apart(facts: Facts) -> Prediction:
    """Rows of rank 0 and those of the others, multiplied by the factors that agree best."""
    first = _of_move(facts, SumFormula.FIRST_SHARD_ALONE)
    if first is None or _num_ranks(facts) == 1:
        return None
    parts = np.stack([first, facts.right_sum - first], axis=-1)
    rows = facts.rows
    wanted = facts.theirs.gradient_sketch[rows][:, facts.columns]
    if not np.isfinite(parts[rows]).all() or not np.isfinite(wanted).all():
        return None
    factors = np.linalg.lstsq(parts[rows].reshape(-1, 2), wanted.ravel(), rcond=None)[0]
    others = "of rank 1" if _num_ranks(facts) == 2 else "of the other ranks"
    said = [
        f"the rows {who} are multiplied by {factor:.3g}"
        for who, factor in zip(("of rank 0", others), factors.tolist(), strict=True)
        if abs(factor - 1) > ALIKE
    ]
    return Fitted(np.asarray(parts @ factors), " and ".join(said)) if said else None


def _clipped_whole(facts: Facts) -> Prediction:
    """The right sum, scaled down to one length of so many C where it is longer."""
    right = np.sqrt(np.square(facts.ours.gradient_sketch).mean(axis=2).sum(axis=1))
    theirs = np.sqrt(np.square(facts.theirs.gradient_sketch).mean(axis=2).sum(axis=1))
    bound = facts.bound[:, 0]
    rows = facts.rows[theirs[facts.rows] < right[facts.rows] * (1 - ALIKE)]
    if not len(rows) or len(facts.columns) < _ENOUGH_SCALED:
        return None
    with np.errstate(all="ignore"):
        factor = np.where(right > 0, theirs / right, 1.0)
    for what, length in ((" C", theirs / bound), ("", theirs)):
        told = length[rows]
        if len(rows) > 1 and np.ptp(told) < _SKETCHED * told.mean():
            scaled = facts.right_sum * factor[:, None, None]
            return Fitted(scaled, f"{told.mean():.3g}{what}")
    return None


_ENOUGH_SCALED = 4
"""Parameters that have to be wrong, for the whole sum to be scaled."""
_SKETCHED = 0.25
"""Relative spread of lengths that are known by a few projections of each parameter."""


SUM = Subject(
    observed=lambda facts: facts.recorded_sum,
    right=lambda facts: facts.right_sum,
    is_sketch=True,
    be="it is",
    reasons={
        ("multiplied", "2"): "as where it is added up twice",
        ("multiplied", "W"): "as where it is reduced over ranks twice",
        ("divided", "W"): "as where the ranks' mean is taken for their sum",
    },
    levels=(
        (
            _of_factors("its samples are not clipped: they count with factor 1", np.ones_like),
            _of_factors(
                "clip factors are applied twice: samples count with their squares", np.square
            ),
            _of_factors("its samples count with the root of their factors", np.sqrt),
            _of_factors(
                "the unclipped gradient is added to the clipped one: samples count with 1 + c",
                lambda c: 1 + c,
            ),
            _of_factors("its samples count with 1 - c in place of c", lambda c: 1 - c),
            _of_factors("its samples are divided by their factors", lambda c: 1 / c),
            _weighted(
                "its samples count with C / n: small gradients are scaled up to C",
                lambda facts: facts.bound / facts.norm,
            ),
            _of_factors("its samples are weighed by clip factors in bfloat16", to_bfloat16),
            _of_factors("its samples are weighed by clip factors in float16", to_float16),
            _weighted(
                "its samples count twice, once with the C of the step before: the sum of a try "
                "that was given up (zero_grad without a step) is still in it",
                _kept_from_a_try,
            ),
            *_normalised_factors(),
            *_parameter_clipping(),
            _one_by_one("{}", _two_groups),
        ),
        (
            _one_by_one("it is the sum over {} alone: it is not reduced over ranks", _of_rank),
            _one_by_one("the samples of {} are missing", _without_rank),
            _one_by_one(
                "only the last micro-batch is reduced over ranks; earlier ones are those of {} "
                "alone",
                _reduced_last,
            ),
            _of_batches(
                "the last micro-batch stands for all: earlier ones are overwritten",
                lambda f, b: float(b.number == _last(f, b)),
            ),
            _of_batches(
                "it is twice the last micro-batch, in place of the sum of all",
                lambda f, b: min(_last(f, b) + 1, 2) * float(b.number == _last(f, b)),
            ),
            _of_batches(
                "it is K times the last micro-batch, in place of the sum of all",
                lambda f, b: (_last(f, b) + 1) * float(b.number == _last(f, b)),
            ),
            _of_batches(
                "the first micro-batch stands for all: later ones are lost",
                lambda f, b: float(b.number == 0),
            ),
            _of_batches(
                "the first micro-batch is lost",
                lambda f, b: float(b.number > 0 or _last(f, b) == 0),
            ),
            *(
                _of_places(f"the {which} sample of each micro-batch {what}", place, factor)
                for which, place in (("first", 0), ("last", -1))
                for what, factor in (("is lost", 0.0), ("counts twice", 2.0))
            ),
            _of_batches(
                "the last micro-batch is lost",
                lambda f, b: float(b.number < _last(f, b) or _last(f, b) == 0),
            ),
            _of_batches(
                "the first micro-batch counts twice", lambda f, b: 2.0 if b.number == 0 else 1.0
            ),
            _of_batches(
                "the last micro-batch counts twice",
                lambda f, b: 2.0 if b.number == _last(f, b) else 1.0,
            ),
            _of_batches(
                "micro-batches that are shorter than the step's longest are not added",
                lambda f, b: float(len(b.places) == _longest(f, b)),
            ),
            _of_batches(
                "micro-batches that are shorter than the rank's first are not added",
                lambda f, b: float(len(b.places) >= _length_of_first(f, b)),
            ),
            _of_batches(
                "what has been added up is reduced over ranks again after each micro-batch, so "
                "that earlier ones count W times as often",
                lambda f, b: float(_num_ranks(f)) ** (_last(f, b) - b.number),
            ),
            _one_by_one("{} (in these parameters)", _of_number),
            _of_batches(
                "it is divided by the number of samples in each micro-batch of a rank, as the "
                "gradient of a mean loss is",
                lambda f, b: 1 / len(b.places),
            ),
            _of_batches(
                "micro-batches are scaled as if each were full: multiplied by the samples of a "
                "full one over their own",
                lambda f, b: f.full_size / len(b.places),
            ),
            _of_batches(
                "each micro-batch is multiplied by its number of samples",
                lambda f, b: float(len(b.places)),
            ),
            _of_batches(
                "each rank's share is divided by the rank's number of samples",
                lambda f, b: 1 / _size_of_rank(f, b),
            ),
            _of_batches(
                "ranks are weighed alike, whatever their numbers of samples: a mean of the ranks' "
                "means",
                lambda f, b: _mean_size(f, b) / len(b.places),
            ),
            _of_batches(
                "ranks are weighed alike, whatever their numbers of samples: a mean of the ranks' "
                "means",
                lambda f, b: f.counts[b.row] / _num_ranks(f) / _size_of_rank(f, b),
            ),
            *_mixed_up_factors(),
        ),
        (
            Hypothesis(
                sentence="the sum of the step before is still in it: it is not cleared",
                predict=_not_cleared,
            ),
            Hypothesis(
                sentence="the sum of the step before is still in it: it is not cleared",
                predict=_not_cleared_once,
            ),
            Hypothesis(
                sentence="the gradient of the step before is still in it: it is not cleared",
                predict=_not_cleared_divided,
            ),
            Hypothesis(sentence="it is the sum of the step before", predict=_of_step_before),
            Hypothesis(
                sentence="a rank without samples adds again what it sent before",
                predict=_idle_sends_again,
            ),
            Hypothesis(
                sentence="each rank's rows are of its own samples alone: the sum is not reduced "
                "over ranks",
                predict=_not_reduced,
            ),
            Hypothesis(
                sentence="only the last micro-batch is reduced over ranks: of earlier ones, each "
                "rank's rows are of its own samples alone",
                predict=_reduced_last_by_rows,
            ),
            Hypothesis(
                sentence="each rank's rows are W times those of its own samples alone: a sum that "
                "is not reduced over the W ranks is taken for their mean",
                predict=partial(_not_reduced, times=_num_ranks),
            ),
            Hypothesis(sentence="layers have each other's gradients: {}", predict=_exchanged),
            Hypothesis(sentence="the last micro-batch is added a step late", predict=_added_late),
            *_moves(),
            Hypothesis(sentence="{}", predict=_shards_apart),
            Hypothesis(
                sentence="all samples of the step count with one factor, whatever their own: the "
                "batch's gradient is clipped, not each sample's",
                predict=lambda facts: _one_factor_each(facts, of_step=True),
            ),
            Hypothesis(
                sentence="all samples of a micro-batch count with one factor, whatever their own: "
                "the micro-batch's gradient is clipped, not each sample's",
                predict=lambda facts: _one_factor_each(facts, of_step=False),
            ),
        ),
        *of_parts(),
    ),
    late=(
        (Hypothesis(sentence="it is {}", predict=_reduced_in_part),),
        (
            Hypothesis(
                sentence="the whole sum is clipped as well, to a length of about {}: it is scaled "
                "down in the steps in which it is longer",
                predict=_clipped_whole,
            ),
        ),
        (
            Hypothesis(
                sentence="each micro-batch's sum is multiplied by {}", predict=law_of_batches
            ),
        ),
        (Hypothesis(sentence="{}", predict=any_weights),),
        scaled_apart(lambda facts: facts.right_sum, lambda facts: facts.recorded_sum, be="it is"),
        (Hypothesis(sentence="it is {}", predict=mixed_sums),),
        scaled_each(lambda facts: facts.right_sum, lambda facts: facts.recorded_sum, be="it is"),
        (
            Hypothesis(
                sentence="it is right in length as a whole, though most parameters are wrong: "
                "their elements are in other places, as in a flat buffer that is read in another "
                "order, or from another place on, than it was filled",
                predict=_right_in_length,
                is_hint=True,
            ),
        ),
        tuple(
            Hypothesis(
                sentence=f"it is off by as much as rounding to {name} makes it, in all of these "
                "parameters alike: it is added up, reduced over ranks or multiplied in that type",
                predict=partial(_rounded, bits=bits),
                is_hint=True,
            )
            for name, bits in (("bfloat16", 8), ("TF32 or float16 (11 bits)", 11))
        ),
        (
            Hypothesis(
                sentence="noise of std {} sigma C is in it already, or its elements are rounded to "
                "a grid, which looks alike",
                predict=_noised,
                is_hint=True,
            ),
        ),
        (
            Hypothesis(
                sentence="it is wrong in just those steps in which a rank has an empty "
                "micro-batch: what that rank does without samples changes the sum",
                predict=_where_a_rank_is_idle,
                is_hint=True,
            ),
        ),
        (
            Hypothesis(
                sentence="it is right in some elements, and in others zero or without a part of "
                "its terms: about {} of it, by its square, is missing",
                predict=lambda facts: in_some_elements(facts, facts.recorded_sum, facts.right_sum),
                is_hint=True,
            ),
        ),
    ),
)
"""Clipped sum of the wrong parameters, [S, Q, K]."""
