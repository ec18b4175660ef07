"""Wrong samples are told as the group that they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpsgd_track.comparison.diagnose.sample_groups import group_in, group_of
from dpsgd_track.record.trajectory import UNUSED, Trajectory
from tests.support.synthetic_group import trajectory

RANK = [0, 0, 0, 0, 0, 1, 1, 1, 1, UNUSED]
BATCH = [0, 0, 0, 1, 1, 0, 0, 0, 1, UNUSED]
FACTOR = [1.0, 0.5, 1.0, 1.0, 0.2, 0.9, 1.0, 1.0, 1.0, np.nan]


def record() -> Trajectory:
    """Two ranks; rank 0 has micro-batches of 3 and 2 samples, rank 1 of 3 and 1."""
    t = trajectory(noise_std=0.0, samples=10)
    index = np.array([*range(9), UNUSED])
    columns = {"sample_index": index, "sample_rank": RANK, "sample_micro_batch": BATCH}
    columns["clip_factor"] = FACTOR
    return replace(
        t, **{name: np.tile(np.array(row), (t.num_steps, 1)) for name, row in columns.items()}
    )


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([5, 6, 7, 8], "all samples of rank 1 alone"),
        ([3, 4, 8], "micro-batch 1 of every rank"),
        ([0, 3, 5, 8], "the first sample of each micro-batch"),
        ([2, 4, 7, 8], "the last sample of each micro-batch"),
        ([1, 2, 4, 6, 7], "all but the first sample of each micro-batch"),
        ([2, 7], "all samples after number 1 of each micro-batch"),
        ([2, 7, 8], "the last sample of each micro-batch of an odd number of them"),
        ([1, 4, 5], "the samples that are clipped"),
        (
            [0, 2, 3, 6, 7],
            "the samples that are not clipped, beside others of their micro-batch that are",
        ),
        ([3, 4], "micro-batch 1 of rank 0"),
        ([0, 1, 2, 5, 6, 7], "micro-batch 0 of every rank"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "the micro-batches of more than one sample"),
        ([0, 4], ""),
        ([8], ""),
        ([], ""),
    ],
)
def test_a_group_of_samples_is_told(samples: list[int], said: str) -> None:
    assert group_of(np.array(samples, dtype=np.int64), record(), 1) == said


TOKENS = [9.0, 4.0, 5.0, 9.0, 2.0, 7.0, 3.0, 9.0, 6.0, np.nan]


def sized() -> Trajectory:
    """The same record with the samples' numbers of tokens."""
    t = record()
    sizes = np.tile(np.array(TOKENS)[:, None], (t.num_steps, 1, 2))
    return replace(t, sample_size=sizes)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([0, 3, 7], "the samples without padding"),
        ([1, 2, 4, 5, 6, 8], "the samples with padding"),
        ([0, 3, 5, 7], "the samples of 7 tokens or more"),
        ([1, 2, 4, 6], "the samples of less than 6 tokens"),
        ([0, 3, 7, 8], "the longest samples of each micro-batch"),
        ([1, 4, 8], "the samples of an even number of tokens"),
    ],
)
def test_a_group_of_samples_is_told_by_size(samples: list[int], said: str) -> None:
    chosen = np.array(samples, dtype=np.int64)
    assert group_of(chosen, record(), 1, baseline=sized()) == said
    assert group_of(chosen, record(), 1) == ""


def test_a_group_of_all_steps_is_told() -> None:
    t = record()
    chosen = np.zeros((t.num_steps, 10), dtype=bool)
    rows = np.arange(t.num_steps)
    chosen[:, [0, 3]] = True
    said = "the first sample of each micro-batch of rank 0"
    assert group_in(chosen, t, rows) == said
    # One sample of a step is in too many groups, of all steps it is in one.
    late = np.where(np.arange(t.num_steps)[:, None] == 0, [True] * 4 + [False] * 6, True)
    could = (t.sample_index != UNUSED) & late
    assert group_in(chosen & could, t, rows, among=could) == said
    chosen[1, 1] = True
    assert group_in(chosen, t, rows) == ""
