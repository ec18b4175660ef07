"""The samples of a step that are wrong, as a group that a reader knows.

Legend: N samples of one step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.parts import TOKENS
from dpsgd_track.record.trajectory import UNUSED, Trajectory

_FEWEST = 2
"""Samples that make a group: one sample is in too many of them."""
Mask = NDArray[np.bool_]


def group_of(
    samples: NDArray[np.int64],
    record: Trajectory,
    row: int,
    among: Mask | None = None,
    baseline: Trajectory | None = None,
) -> str:
    """The group that `samples` are, in words that follow "of"; empty if they are none.

    Args:
        samples: their places in the record.
        row: the step's.
        among: [N] those that could be in it; all by default.
        baseline: record of the right factors, and of the samples' sizes where it has them.
    """
    if len(samples) < _FEWEST:
        return ""
    wrong = np.zeros(record.sample_index.shape[1], dtype=bool)
    wrong[samples] = True
    could = np.ones_like(wrong) if among is None else among
    groups = _groups(record, row, record if baseline is None else baseline)
    found = (words for words, mask in groups if np.array_equal(mask & could, wrong))
    return next(found, "")


def group_in(
    chosen: Mask,
    record: Trajectory,
    rows: NDArray[np.int64],
    among: Mask | None = None,
    baseline: Trajectory | None = None,
) -> str:
    """The group that the chosen samples are in all of some steps, as `group_of`.

    Args:
        chosen: [S, N].
        rows: the steps that count.
        among: [S, N] those that could be in it; all by default.
    """
    could = record.sample_index != UNUSED if among is None else among
    names: list[str] | None = None
    if chosen[rows].sum() < _FEWEST:
        return ""
    for row in rows.tolist():
        if not could[row].any():
            continue
        groups = _groups(record, row, record if baseline is None else baseline)
        fits = {w: np.array_equal(mask & could[row], chosen[row]) for w, mask in groups}
        is_none = not chosen[row].any()
        if names is not None:
            # A group that a step has no samples of is not told of there.
            names = [words for words in names if fits.get(words, is_none)]
        elif not is_none:
            names = [words for words, is_one in fits.items() if is_one]
    return names[0] if names else ""


def _groups(record: Trajectory, row: int, baseline: Trajectory) -> Iterator[tuple[str, Mask]]:
    """Groups of the step's samples, [N] each, the simplest first."""
    rank, number = record.sample_rank[row], record.sample_micro_batch[row]
    there = record.sample_index[row] != UNUSED
    place, size = _places(record, row)
    for each in sorted(set(rank[there].tolist())):
        yield f"all samples of rank {each} alone", there & (rank == each)
    yield from _of_numbers(number, there, "micro-batch", "the step's micro-batches")
    yield "the first sample of each micro-batch", there & (place == 0)
    yield "the last sample of each micro-batch", there & (place == size - 1)
    yield "all but the first sample of each micro-batch", there & (place > 0)
    yield "all but the last sample of each micro-batch", there & (place < size - 1)
    yield "every second sample of each micro-batch", there & (place % 2 == 1)
    yield "every second sample of each micro-batch, from the first", there & (place % 2 == 0)
    is_last, is_odd = there & (place == size - 1), size % 2 == 1
    yield "the last sample of each micro-batch of an odd number of them", is_last & is_odd
    yield "the last sample of each micro-batch of an even number of them", is_last & ~is_odd
    for last in range(1, int(place.max(initial=0))):
        yield f"all samples after number {last} of each micro-batch", there & (place > last)
    if len(set(size[there].tolist())) > 1:
        yield "the micro-batches of one sample", there & (size == 1)
        yield "the micro-batches of more than one sample", there & (size > 1)
        longest = size.max(initial=0)
        yield "the micro-batches that are shorter than others", there & (size < longest)
        yield "the longest micro-batches", there & (size == longest)
    with np.errstate(invalid="ignore"):
        is_clipped = baseline.clip_factor[row] < 1
    yield "the samples that are clipped", there & is_clipped
    yield "the samples that are not clipped", there & ~is_clipped
    others = there & ~is_clipped & _beside(is_clipped & there, rank, number)
    yield "the samples that are not clipped, beside others of their micro-batch that are", others
    yield from _of_sizes(baseline, row, there)
    for at_rank in sorted(set(rank[there].tolist())):
        own = there & (rank == at_rank)
        yield f"the first sample of each micro-batch of rank {at_rank}", own & (place == 0)
        yield f"the last sample of each micro-batch of rank {at_rank}", own & (place == size - 1)
        yield f"all but the first sample of each micro-batch of rank {at_rank}", own & (place > 0)
        yield f"the samples of rank {at_rank} that are clipped", own & is_clipped
        for at_number in sorted(set(number[there].tolist())):
            mask = there & (rank == at_rank) & (number == at_number)
            yield f"micro-batch {at_number} of rank {at_rank}", mask


def _of_sizes(baseline: Trajectory, row: int, there: Mask) -> Iterator[tuple[str, Mask]]:
    """Groups by numbers of tokens."""
    if not baseline.shape_of("sample_size")[-1]:
        return
    tokens = baseline.sample_size[row, :, TOKENS]
    levels = sorted(set(tokens[there & np.isfinite(tokens)].tolist()))
    if len(levels) < 2:
        return
    yield "the samples without padding", there & (tokens == levels[-1])
    yield "the samples with padding", there & (tokens < levels[-1])
    for least in levels[1:-1]:
        yield f"the samples of {least:g} tokens or more", there & (tokens >= least)
        yield f"the samples of less than {least:g} tokens", there & (tokens < least)
    rank, number = baseline.sample_rank[row], baseline.sample_micro_batch[row]
    longest = np.zeros_like(there)
    for one, other in {*zip(rank[there].tolist(), number[there].tolist(), strict=True)}:
        own = there & (rank == one) & (number == other)
        longest |= own & (tokens == tokens[own].max())
    yield "the longest samples of each micro-batch", longest
    yield "all but the longest samples of each micro-batch", there & ~longest
    yield "the samples of an odd number of tokens", there & (tokens % 2 == 1)
    yield "the samples of an even number of tokens", there & (tokens % 2 == 0)


def _of_numbers(
    number: NDArray[np.int64], there: Mask, one: str, all_of: str
) -> Iterator[tuple[str, Mask]]:
    known = sorted(set(number[there].tolist()) - {UNUSED})
    for each in known:
        yield f"{one} {each} of every rank", there & (number == each)
    if len(known) > 2:
        yield f"all but the first of {all_of}", there & (number > known[0])
        yield f"all but the last of {all_of}", there & (number < known[-1])


def _beside(mask: Mask, rank: NDArray[np.int64], number: NDArray[np.int64]) -> Mask:
    """[N] samples whose micro-batch has one of `mask`."""
    keys = np.stack([rank, number])
    is_same: Mask = (keys[:, :, None] == keys[:, None, mask]).all(axis=0)
    return np.asarray(is_same.any(axis=1))


def _places(record: Trajectory, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[N] place of each sample in its micro-batch, and the number of samples there."""
    index = record.sample_index[row]
    place, size = np.zeros_like(index), np.zeros_like(index)
    keys = np.stack([record.sample_rank[row], record.sample_micro_batch[row]])
    for key in np.unique(keys[:, index != UNUSED], axis=1).T:
        own = np.flatnonzero((keys == key[:, None]).all(axis=0) & (index != UNUSED))
        place[own[np.argsort(index[own])]] = np.arange(len(own))
        size[own] = len(own)
    return place, size
