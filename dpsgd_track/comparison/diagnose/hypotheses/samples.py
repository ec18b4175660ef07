"""Mistakes that any number of a sample can suffer: mixed up, stale, rounded, or another's.

Legend: S steps, N samples, n those of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts, MicroBatch
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.record.parts import TARGETS, TOKENS
from dpsgd_track.record.trajectory import Floats

Of = Callable[[Facts], Floats]
"""A number of each sample, [S, N, ...]."""
Combine = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class _Places:
    """Numbers of the samples at the same places of other micro-batches or ranks."""

    facts: Facts

    def of_batch_before(self, values: Floats, combine: Combine, *, is_reset: bool) -> Floats | None:
        """Each micro-batch combined with what the one before it became.

        Args:
            combine: of a micro-batch's numbers and those before, cut to the shorter length.
            is_reset: True if nothing is left of the step before.
        """
        if not self.facts.micro_batches:
            return None
        changed = values.copy()
        for batch, kept in self._with_kept(is_reset=is_reset):
            own = values[batch.row, batch.places].copy()
            before = kept.get(batch.rank)
            if before is not None:
                length = min(len(own), len(before))
                own[:length] = combine(own[:length], before[:length])
            kept[batch.rank] = own
            changed[batch.row, batch.places] = own
        return changed

    def stale(self, values: Floats, *, is_reset: bool, only_equal: bool) -> Floats | None:
        """Each micro-batch with the numbers of the one before it."""
        if not self.facts.micro_batches:
            return None
        changed = values.copy()
        for batch, kept in self._with_kept(is_reset=is_reset):
            own = values[batch.row, batch.places]
            before = kept.get(batch.rank)
            if before is not None and (not only_equal or len(before) == len(own)):
                length = min(len(own), len(before))
                changed[batch.row, batch.places[:length]] = before[:length]
            kept[batch.rank] = own
        return changed

    def of_first(self, values: Floats) -> Floats | None:
        """Each micro-batch with the numbers of its rank's first one of the step."""
        if not self.facts.micro_batches:
            return None
        changed, first = values.copy(), dict[tuple[int, int], Floats]()
        for batch in self.facts.micro_batches:
            own = first.setdefault((batch.row, batch.rank), values[batch.row, batch.places])
            length = min(len(own), len(batch.places))
            changed[batch.row, batch.places[:length]] = own[:length]
        return changed

    def _with_kept(self, *, is_reset: bool) -> Iterator[tuple[MicroBatch, dict[int, Floats]]]:
        """Each micro-batch, and what the caller kept of earlier ones, by rank.

        Args:
            is_reset: True if nothing is left of the step before.
        """
        kept: dict[int, Floats] = {}
        row = -1
        for batch in self.facts.micro_batches:
            if is_reset and batch.row != row:
                kept.clear()
            row = batch.row
            yield batch, kept

    def of_step_before(self, values: Floats) -> Floats | None:
        """Each micro-batch's numbers are those of the same one in the step before."""
        if not self.facts.micro_batches:
            return None
        changed = values.copy()
        known = {(b.row, b.rank, b.number): b.places for b in self.facts.micro_batches}
        for batch in self.facts.micro_batches:
            before = known.get((batch.row - 1, batch.rank, batch.number))
            if before is not None:
                length = min(len(before), len(batch.places))
                changed[batch.row, batch.places[:length]] = values[batch.row - 1, before[:length]]
        return changed

    def over_ranks(self, values: Floats, combine: Callable[[Floats], Floats]) -> Floats | None:
        """Numbers of the samples at one place of all ranks, combined; a missing one is 0."""
        if not self.facts.micro_batches:
            return None
        changed = values.copy()
        groups: dict[tuple[int, int], list[np.ndarray]] = {}
        for batch in self.facts.micro_batches:
            groups.setdefault((batch.row, batch.number), []).append(batch.places)
        ranks = int(self.facts.theirs.sample_rank.max(initial=0)) + 1
        for (row, _), places in groups.items():
            longest = max(map(len, places))
            table = np.zeros((ranks, longest, *values.shape[2:]))
            for rank, own in enumerate(places):
                table[rank, : len(own)] = values[row, own]
            together = combine(table)
            for own in places:
                changed[row, own] = together[: len(own)]
        return changed


_ENOUGH_SAMPLES = 8
_TYPICAL = 0.2
"""Least median of rounding errors in units of their root mean square: most samples are off."""
_LOW, _HIGH = 2.0**-13, 2.0**-7
"""Errors of a computation in bfloat16, whose numbers are rounded by up to 2^-9."""


def mixed_up(of: Of, theirs: Of, *, is_scaled: bool = True) -> Sequence[Hypothesis]:
    """The right numbers at the wrong samples, or one for several.

    Args:
        of: the right numbers.
        theirs: what the mode recorded, [S, N].
        is_scaled: True for numbers scaled by the samples of the micro-batch as well.
    """

    def rolled(by: int) -> Callable[[Facts], Prediction]:
        return lambda facts: facts.by_batch(of(facts), lambda own: np.roll(own, by, axis=0))

    def reverse(facts: Facts) -> Prediction:
        return facts.by_batch(of(facts), lambda own: own[::-1])

    def stale(facts: Facts, **options: bool) -> Prediction:
        return _Places(facts).stale(of(facts), **options)

    batch_before = "they are those of the samples at the same places of the micro-batch before"
    return (
        Hypothesis(
            sentence="each sample has its neighbour's in the micro-batch", predict=rolled(1)
        ),
        Hypothesis(
            sentence="each sample has its neighbour's in the micro-batch", predict=rolled(-1)
        ),
        Hypothesis(sentence="they are in reverse order within the micro-batch", predict=reverse),
        *(
            Hypothesis(
                sentence=batch_before,
                predict=partial(stale, is_reset=True, only_equal=only_equal),
            )
            for only_equal in (True, False)
        ),
        *(
            Hypothesis(
                sentence=f"{batch_before}, even of the step before",
                predict=partial(stale, is_reset=False, only_equal=only_equal),
            )
            for only_equal in (True, False)
        ),
        Hypothesis(
            sentence="they are those of the samples at the same places of the step's first "
            "micro-batch",
            predict=lambda facts: _Places(facts).of_first(of(facts)),
        ),
        Hypothesis(
            sentence="they are those of the samples at the same places in the step before",
            predict=lambda facts: _step_before(of(facts)),
        ),
        Hypothesis(
            sentence="they are those of the same micro-batch in the step before",
            predict=lambda facts: _Places(facts).of_step_before(of(facts)),
        ),
        Hypothesis(
            sentence="they are those of rank 0's samples on every rank",
            predict=lambda facts: _Places(facts).over_ranks(of(facts), lambda table: table[0]),
        ),
        Hypothesis(
            sentence="they are the right values in another order, so that samples have each "
            "other's{}",
            predict=lambda facts: _in_another_order(facts, of(facts), theirs(facts)),
        ),
        *_alike(of),
        *(_scaled(of) if is_scaled else ()),
    )


def _in_another_order(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    """The right numbers of each step in the order of the mode's, and what that follows."""
    values = _in_order_of(right, theirs)
    for keys, text in _sort_keys(facts):
        for sign, way in ((1.0, ""), (-1.0, ", largest first")):
            for is_inverse in (False, True):
                ordered = _sorted_by(facts, right, sign * keys, is_inverse=is_inverse)
                off = np.abs(ordered - theirs)[facts.rows]
                if np.nanmax(off, initial=0.0) <= _SAME * np.nanmax(theirs, initial=0.0):
                    said = f": samples are sorted by {text}{way}, and not put back in order"
                    return Fitted(values, said)
    return Fitted(values, "")


def _sort_keys(facts: Facts) -> Iterator[tuple[Floats, str]]:
    """[S, N] numbers that samples may be sorted by."""
    if facts.ours.shape_of("sample_size")[-1]:
        yield facts.ours.sample_size[..., TOKENS], "their numbers of tokens"
        yield facts.ours.sample_size[..., TARGETS], "their numbers of targets"
    yield facts.ours.sample_loss, "their losses"
    yield facts.ours.sample_norm, "their norms"


def _sorted_by(facts: Facts, values: Floats, keys: Floats, *, is_inverse: bool) -> Floats:
    changed = values.copy()
    for batch in facts.micro_batches:
        order = np.argsort(keys[batch.row, batch.places], kind="stable")
        order = np.argsort(order, kind="stable") if is_inverse else order
        changed[batch.row, batch.places] = values[batch.row, batch.places][order]
    return changed


def _in_chunks(values: Floats, size: int, combine: Callable[[Floats], Floats]) -> Floats:
    """Numbers of a micro-batch's samples, [n, ...], one for each chunk of them."""
    changed = values.copy()
    for start in range(0, len(values), size):
        changed[start : start + size] = combine(values[start : start + size])
    return changed


def _root_mean_square(values: Floats) -> Floats:
    return np.asarray(np.sqrt(np.square(values).mean(axis=0)))


def _alike(of: Of) -> Sequence[Hypothesis]:
    """One number for several samples."""
    chunks = tuple(
        Hypothesis(
            sentence=f"each {size} samples of a micro-batch have their {what}: they are handled in "
            f"chunks of {size}",
            predict=partial(_of_chunks, of=of, size=size, combine=combine),
        )
        for size in (2, 3, 4)
        for what, combine in (
            ("root mean square", _root_mean_square),
            ("mean", lambda own: own.mean(axis=0)),
            ("largest", lambda own: own.max(axis=0)),
        )
    )
    return (
        *chunks,
        Hypothesis(
            sentence="all samples of a micro-batch have their mean",
            predict=lambda facts: facts.by_batch(
                of(facts), lambda own: np.broadcast_to(own.mean(axis=0), own.shape)
            ),
        ),
        Hypothesis(
            sentence="all samples of a micro-batch have their root mean square",
            predict=lambda facts: facts.by_batch(
                of(facts),
                lambda own: np.broadcast_to(np.sqrt(np.square(own).mean(axis=0)), own.shape),
            ),
        ),
        Hypothesis(
            sentence="all samples of a step have their mean",
            predict=lambda facts: np.broadcast_to(
                np.nanmean(of(facts), axis=1, keepdims=True), of(facts).shape
            ),
        ),
        Hypothesis(
            sentence="all samples of a micro-batch have the largest",
            predict=lambda facts: facts.by_batch(
                of(facts), lambda own: np.broadcast_to(own.max(axis=0), own.shape)
            ),
        ),
        Hypothesis(
            sentence="all samples of a micro-batch have the smallest",
            predict=lambda facts: facts.by_batch(
                of(facts), lambda own: np.broadcast_to(own.min(axis=0), own.shape)
            ),
        ),
    )


def _of_chunks(
    facts: Facts, *, of: Of, size: int, combine: Callable[[Floats], Floats]
) -> Prediction:
    return facts.by_batch(of(facts), partial(_in_chunks, size=size, combine=combine))


def _scaled(of: Of) -> Sequence[Hypothesis]:
    """Numbers that depend on how many samples there are."""
    return (
        Hypothesis(
            sentence="they are divided by the number of samples in the micro-batch, as those of a "
            "mean loss are",
            predict=lambda facts: facts.by_batch(of(facts), lambda own: own / len(own)),
        ),
        Hypothesis(
            sentence="they are multiplied by the number of samples in the micro-batch",
            predict=lambda facts: facts.by_batch(of(facts), lambda own: own * len(own)),
        ),
        Hypothesis(
            sentence="they are scaled as if each micro-batch were full: multiplied by {} over its "
            "number of samples",
            predict=lambda facts: _as_if_full(facts, of(facts)),
        ),
    )


def _as_if_full(facts: Facts, values: Floats) -> Prediction:
    full = facts.full_size
    changed = facts.by_batch(values, lambda own: own * full / len(own))
    return None if changed is None else Fitted(changed, f"{full:g}")


def of_other_places(of: Of, theirs: Of) -> Hypothesis:
    """Numbers of other samples of the same micro-batch, the same places in each.

    Args:
        of: the right numbers, [S, N].
        theirs: what the mode recorded, [S, N].
    """

    def predict(facts: Facts) -> Prediction:
        right, observed = of(facts), theirs(facts)
        sources = _sources(facts, right, observed)
        if not sources or all(place == source for place, source in sources.items()):
            return None
        changed = facts.by_batch(right, lambda own: own[[sources[i] for i in range(len(own))]])
        moved = {place: source for place, source in sources.items() if place != source}
        shown = ", ".join(f"number {place} that of {source}" for place, source in moved.items())
        return None if changed is None else Fitted(changed, shown)

    return Hypothesis(
        sentence="samples have another's of their micro-batch (counted from 0): {}", predict=predict
    )


_SAME = 1e-5
"""Relative error up to which one number is another."""


def _sources(facts: Facts, right: Floats, observed: Floats) -> dict[int, int]:
    """Place in a micro-batch that each place has its number from; empty if one has none."""
    batches = [b for b in facts.micro_batches if b.row in facts.rows]
    longest = max((len(b.places) for b in batches), default=0)
    sources: dict[int, int] = {}
    for place in range(longest):
        holding = [b for b in batches if len(b.places) > place]

        def fits(source: int, holding: list[MicroBatch] = holding, place: int = place) -> bool:
            if any(len(b.places) <= source for b in holding):
                return False
            wanted = [observed[b.row, b.places[place]] for b in holding]
            return np.allclose([right[b.row, b.places[source]] for b in holding], wanted, _SAME, 0)

        found = next((s for s in (place, *range(longest)) if fits(s)), None)
        if found is None:
            return {}
        sources[place] = found
    return sources


def of_all_ranks(of: Of) -> Sequence[Hypothesis]:
    """One number for the samples at one place of all ranks."""

    def combined(facts: Facts, combine: Callable[..., Floats]) -> Prediction:
        def of_those_there(table: Floats) -> Floats:
            return np.asarray(combine(np.where(table == 0, np.nan, table), axis=0))

        return _Places(facts).over_ranks(of(facts), of_those_there)

    return tuple(
        Hypothesis(
            sentence=f"all ranks have the {which} of the samples at one place of their "
            "micro-batches",
            predict=partial(combined, combine=combine),
        )
        for which, combine in (
            ("smallest", np.nanmin),
            ("largest", np.nanmax),
            ("mean", np.nanmean),
        )
    )


def added_up(of: Of) -> Sequence[Hypothesis]:
    """Norms that samples' norms have been combined with."""

    def squares(a: Floats, b: Floats) -> Floats:
        return np.sqrt(np.square(a) + np.square(b))

    def over(facts: Facts, combine: Callable[[Floats], Floats]) -> Prediction:
        return _Places(facts).over_ranks(of(facts), combine)

    def kept(facts: Facts, *, is_reset: bool) -> Prediction:
        return _Places(facts).of_batch_before(of(facts), squares, is_reset=is_reset)

    return (
        Hypothesis(
            sentence="squares of different samples are added up over ranks: each norm is that of "
            "the samples at one place on all ranks",
            predict=lambda facts: over(facts, lambda table: np.sqrt(np.square(table).sum(axis=0))),
        ),
        Hypothesis(
            sentence="norms of different samples are averaged over ranks",
            predict=lambda facts: over(facts, lambda table: table.mean(axis=0)),
        ),
        Hypothesis(
            sentence="norms of different samples are added up over ranks",
            predict=lambda facts: over(facts, lambda table: table.sum(axis=0)),
        ),
        Hypothesis(
            sentence="all ranks have the largest of the samples at one place on any rank",
            predict=lambda facts: over(facts, lambda table: table.max(axis=0)),
        ),
        Hypothesis(
            sentence="squares are added up over the micro-batches of a step: the buffer of norms "
            "is not reset between them",
            predict=lambda facts: kept(facts, is_reset=True),
        ),
        Hypothesis(
            sentence="squares are added up over micro-batches and steps: the buffer of norms is "
            "never reset",
            predict=lambda facts: kept(facts, is_reset=False),
        ),
    )


def rounded(of: Of, of_theirs: Of) -> Sequence[Hypothesis]:
    """Numbers that have been through a type of fewer bits.

    Args:
        of: the right numbers.
        of_theirs: what the mode recorded.
    """
    return (
        Hypothesis(
            sentence="they are rounded to bfloat16",
            predict=lambda facts: _if_rounded(of(facts), of_theirs(facts), to_bfloat16),
        ),
        Hypothesis(
            sentence="they are rounded to float16",
            predict=lambda facts: _if_rounded(
                of(facts), of_theirs(facts), to_float16, unless=to_bfloat16
            ),
        ),
    )


def off_as_rounding(observed: Floats, right: Floats) -> bool:
    """True if numbers of samples are off by as much as a computation in bfloat16 makes them.

    Such errors have both signs, and those of most samples are alike in size.
    """
    with np.errstate(all="ignore"):
        off = (observed / right - 1).ravel()
    off = off[np.isfinite(off)]
    if off.size < _ENOUGH_SAMPLES:
        return False
    size = float(np.sqrt(np.mean(np.square(off))))
    if float(np.median(np.abs(off))) < _TYPICAL * size:
        return False
    below = float(np.mean(off < 0))
    return _LOW < size < _HIGH and 0.2 < below < 0.8


def _if_rounded(
    right: Floats,
    values: Floats,
    rounding: Callable[[Floats], Floats],
    unless: Callable[[Floats], Floats] | None = None,
) -> Prediction:
    """`values` if they are such as `rounding` leaves, which float32 numbers are not by chance.

    Args:
        unless: a coarser rounding, which they are not to have been through.
    """
    if unless is not None and _if_rounded(right, values, unless) is not None:
        return None
    with np.errstate(all="ignore"):
        off = np.abs(values / right - 1)
    # Other numbers, such as shares of powers of two, are on the grid of a type as well.
    if np.nanmax(np.where(np.isfinite(off), off, 0.0), initial=0.0) > _ROUNDED_OFF:
        return None
    is_there = np.isfinite(values) & (values != 0) & (values != 1)
    if not is_there.any() or np.any(rounding(values)[is_there] != values[is_there]):
        return None
    return values


_ROUNDED_OFF = 2.0**-7
"""Largest relative error that one rounding makes, and what was rounded before it."""


def to_float16(values: Floats) -> Floats:
    """`values` rounded to 11 significant bits."""
    return values.astype(np.float16).astype(np.float64)


def to_bfloat16(values: Floats) -> Floats:
    """`values` rounded to 8 significant bits, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.asarray(rounded.astype(np.uint32).view(np.float32).astype(np.float64))


def _step_before(values: Floats) -> Floats:
    return np.concatenate([values[:1], values[:-1]])


def _in_order_of(right: Floats, theirs: Floats) -> Floats:
    """[S, N] the right numbers of each step in the order of the mode's."""
    ranks = np.argsort(np.argsort(theirs, axis=1, kind="stable"), axis=1)
    return np.take_along_axis(np.sort(right, axis=1), ranks, axis=1)
