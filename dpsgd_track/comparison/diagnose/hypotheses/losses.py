"""Mistakes of the samples' losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.attributes import scaled_by_attribute
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Fitted,
    Hypothesis,
    Prediction,
    Subject,
)
from dpsgd_track.comparison.diagnose.hypotheses.samples import (
    mixed_up,
    off_as_rounding,
    rounded,
)
from dpsgd_track.comparison.diagnose.hypotheses.target_losses import OF_TARGETS
from dpsgd_track.record.alternatives import LossFormula
from dpsgd_track.record.trajectory import Floats

_WHOLE = 2e-3
"""Distance from a whole number up to which a float32 ratio of losses is one."""
_LEAST_SPREAD = 1e-2
"""Least spread of weights that come from numbers of targets: one target in a hundred."""
_MOST_ROUNDED = 2.0**-8
"""Largest relative error of a loss whose logits were rounded to bfloat16."""


_MOST_SAMPLES = 0.7
"""Share of the samples that have to be off."""


def _ratio(facts: Facts) -> Floats:
    with np.errstate(all="ignore"):
        found: Floats = facts.theirs.sample_loss / facts.ours.sample_loss
    return found


def _are_whole(values: Floats, facts: Facts) -> bool:
    """True if `values` of all samples are whole numbers, and not all the same."""
    there = values[facts.rows]
    there = there[np.isfinite(there)]
    is_whole = bool(there.size) and float(np.abs(there - np.round(there)).max()) < _WHOLE
    return is_whole and len(np.unique(np.round(there))) > 1


def _positions(facts: Facts) -> float:
    return float(facts.run.job.data.seq_length) if facts.run.job else math.nan


def _over_all_positions(facts: Facts) -> Prediction:
    """Losses divided by the positions in place of a sample's own targets."""
    for positions in (_positions(facts) - 1, _positions(facts)):
        if _are_whole(_ratio(facts) * positions, facts):
            return facts.ours.sample_loss * np.round(_ratio(facts) * positions) / positions
    return None


def _summed(facts: Facts) -> Prediction:
    ratio = _ratio(facts)
    return facts.ours.sample_loss * np.round(ratio) if _are_whole(ratio, facts) else None


def _over_batch_targets(facts: Facts) -> Prediction:
    """Losses weighed by the numbers of targets, whose mean over a micro-batch is 1."""
    ratio, spread = _ratio(facts), 0.0
    for batch in facts.micro_batches:
        of_batch = ratio[batch.row, batch.places]
        if abs(of_batch.mean() - 1) > 1e-4:
            return None
        spread = max(spread, float(np.ptp(of_batch)))
    return facts.theirs.sample_loss if spread > _LEAST_SPREAD else None


def _other(facts: Facts, formula: LossFormula) -> Floats | None:
    """[S, N] what the reference recorded of a wrong loss; None if it did not."""
    place, num_recorded = (
        list(LossFormula).index(formula),
        facts.ours.shape_of("sample_other_loss")[2],
    )
    if place >= num_recorded:
        return None
    return np.asarray(facts.ours.sample_other_loss[..., place], dtype=np.float64)


def _with_part(facts: Facts, formula: LossFormula, *, is_mixed: bool) -> Prediction:
    """The right loss and a share of another one, the share that agrees best.

    Args:
        is_mixed: True if the right loss has the rest of the weight, not all of it.
    """
    other = _other(facts, formula)
    if other is None:
        return None
    right = facts.ours.sample_loss
    along = other - right if is_mixed else other
    off, there = (facts.theirs.sample_loss - right)[facts.rows], along[facts.rows]
    is_known = np.isfinite(off) & np.isfinite(there)
    square = float(np.square(there[is_known]).sum())
    if not square:
        return None
    share = float((off * there)[is_known].sum()) / square
    return Fitted(right + share * along, f"{share:.3g}")


def _of_other_samples(facts: Facts) -> Prediction:
    """Each wrong loss is that of another sample of the step."""
    right, observed = facts.ours.sample_loss, facts.theirs.sample_loss
    predicted, moved, relations = right.copy(), list[str](), list[set[str]]()
    for row in facts.rows.tolist():
        index = facts.ours.sample_index[row]
        for place in np.flatnonzero(np.isfinite(observed[row])):
            with np.errstate(all="ignore"):
                off = np.abs(right[row] / observed[row, place] - 1)
            source = place if off[place] < _SAME else int(np.nanargmin(off))
            if not off[source] < _SAME:
                return None
            predicted[row, place] = right[row, source]
            if source != place:
                moved.append(f"sample {index[source]} for {index[place]}")
                relations.append(set(_relations(facts, row, int(place), int(source))))
    if not moved:
        return None
    more = f" and {len(moved) - _FEW_NAMED} more" * (len(moved) > _FEW_NAMED)
    common = set.intersection(*relations) if len(moved) > 1 else set()
    rule = f"{' or '.join(sorted(common))}, " if common else ""
    return Fitted(predicted, f"{rule}{', '.join(moved[:_FEW_NAMED])}{more}")


def _relations(facts: Facts, row: int, place: int, source: int) -> Iterator[str]:
    """Relations of the sample that was read to the one that it stands for."""
    batches = {
        at: (batch, batch.places.tolist().index(at))
        for batch in facts.micro_batches
        if batch.row == row
        for at in batch.places.tolist()
    }
    if place not in batches or source not in batches:
        return
    (own, at), (other, from_) = batches[place], batches[source]
    if own is other:
        last = len(own.places) - 1
        ends = {0: "first", last: "last"}
        if from_ in ends:
            yield f"the {ends[from_]} of its micro-batch for {'the last' if at == last else 'it'}"
        if abs(at - from_) == 1:
            yield f"the one {'after' if from_ > at else 'before'} it in its micro-batch"
    elif at == from_:
        is_rank = own.rank != other.rank and own.number == other.number
        yield f"the one at its place {'on another rank' if is_rank else 'in another micro-batch'}"


_SAME, _FEW_NAMED = 2e-6, 4
"""Relative error up to which two losses are one, and samples that are named."""


def _others() -> Iterator[Hypothesis]:
    parts = LossFormula.UNIFORM, LossFormula.SQUARED_LOG_SUM
    for formula in LossFormula:
        if formula not in parts:
            yield Hypothesis(
                sentence=f"they are {formula.value}", predict=partial(_other, formula=formula)
            )
    mixed, added = parts
    yield Hypothesis(
        sentence="label smoothing of {}, which is not asked for, is in them",
        predict=partial(_with_part, formula=mixed, is_mixed=True),
    )
    yield Hypothesis(
        sentence="a z-loss, {} times the squared logarithm of the softmax's denominator, is added",
        predict=partial(_with_part, formula=added, is_mixed=False),
    )


def _of_rounded_logits(facts: Facts) -> Prediction:
    """The recorded losses, if they are off by no more than rounded logits make them."""
    observed, right = (side.sample_loss[facts.rows] for side in (facts.theirs, facts.ours))
    is_close = float(np.nanmax(np.abs(observed / right - 1))) < _MOST_ROUNDED
    return facts.theirs.sample_loss if is_close and off_as_rounding(observed, right) else None


def _of_other_weights(facts: Facts) -> Prediction:
    """The recorded losses, if all was right before the weights first moved."""
    first = int(facts.rows[0])
    if facts.theirs.step[0] != 0 or first == 0 or not facts.rate > 0:
        return None
    with np.errstate(all="ignore"):
        is_off = np.abs(_ratio(facts)[first] - 1) > _WHOLE
    # Of other weights, all samples' losses are others.
    if np.mean(is_off[np.isfinite(_ratio(facts)[first])]) < _MOST_SAMPLES:
        return None
    before = slice(0, first)
    is_right = np.allclose(
        facts.theirs.sample_loss[before], facts.ours.sample_loss[before], 1e-4, 0.0, equal_nan=True
    )
    return facts.theirs.sample_loss if is_right else None


LOSS = Subject(
    observed=lambda facts: facts.theirs.sample_loss,
    right=lambda facts: facts.ours.sample_loss,
    levels=(
        (
            Hypothesis(
                sentence="they are sums over targets, not each sample's mean", predict=_summed
            ),
            Hypothesis(
                sentence="they are divided by all positions rather than by the sample's own "
                "targets: ignored (padding) targets stay in the mean",
                predict=_over_all_positions,
            ),
            Hypothesis(
                sentence="samples are weighed by their numbers of targets: the mean is over the "
                "targets of the micro-batch, not over each sample's own",
                predict=_over_batch_targets,
            ),
        ),
        (
            *mixed_up(lambda facts: facts.ours.sample_loss, lambda facts: facts.theirs.sample_loss),
            *rounded(lambda facts: facts.ours.sample_loss, lambda facts: facts.theirs.sample_loss),
        ),
        tuple(_others()),
        (OF_TARGETS,),
        (
            scaled_by_attribute(
                lambda facts: facts.ours.sample_loss, lambda facts: facts.theirs.sample_loss
            ),
        ),
        (
            Hypothesis(
                sentence="other samples of the step were read in the place of some: {}",
                predict=_of_other_samples,
            ),
        ),
    ),
    late=(
        (
            Hypothesis(
                sentence="they are right until weights move, and then those of other weights than "
                "the optimizer has left: stale, or not the same on all ranks",
                predict=_of_other_weights,
            ),
        ),
        (
            Hypothesis(
                sentence="they are off by as much as computing them in bfloat16 (from logits that "
                "are rounded) makes them",
                predict=_of_rounded_logits,
                is_hint=True,
            ),
        ),
    ),
)
"""Loss of each sample, [S, N]."""
