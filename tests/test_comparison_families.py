"""Mistakes that no formula was written for: each is named by the family that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison.diagnose.hypotheses.places import chosen_places, counted
from dpsgd_track.record.alternatives import NormFormula
from dpsgd_track.record.parts import (
    COLUMN_SQUARES,
    MOST_POSITIONS,
    NUM_PAIRS,
    NUM_SQUARES,
    NUM_SUM_PARTS,
    ROW_SQUARES,
    SumParts,
    products_of,
)
from dpsgd_track.record.trajectory import Trajectory
from tests.support.planted_records import (
    MODE,
    TRAINED,
    base,
    found,
    summed,
    with_factors,
    with_job,
    with_total,
)
from tests.support.synthetic_group import compared, mode_run, trajectory

T, R, C_ = 9, 7, 5
"""Positions, rows and columns of every parameter."""
WRONG = [1, 3]
"""Parameters whose norms or sums are wrong."""
NORM = base().sample_norm
BY_PARAMETER = base().sample_norm_by_parameter
FACTOR = base().clip_factor
C = base().max_grad_norm[:, None]
S, N, P = BY_PARAMETER.shape
TOKENS = np.tile(np.arange(4, 4 + N), (S, 1)) % 9 + 3.0


def resolved() -> Trajectory:
    """The base record with squares by position, row and column that make up the norms."""
    rng = np.random.default_rng(0)
    positions = rng.normal(0.1, 1, (S, N, P, T, 20))
    products = positions @ positions.swapaxes(-1, -2)
    products *= (np.square(BY_PARAMETER) / products.sum(axis=(-1, -2)))[..., None, None]
    parts = np.zeros((S, N, P, NUM_SQUARES))
    whole = np.zeros((S, N, P, MOST_POSITIONS, MOST_POSITIONS))
    whole[..., :T, :T] = products
    parts[..., :NUM_PAIRS] = whole[..., *np.triu_indices(MOST_POSITIONS)]
    for place, num in ((ROW_SQUARES, R), (COLUMN_SQUARES, C_)):
        shares = rng.uniform(0.1, 1, (S, N, P, num))
        shares *= (np.square(BY_PARAMETER) / shares.sum(axis=-1))[..., None]
        parts[..., place][..., :num] = shares
    sizes = np.stack([TOKENS, TOKENS - 1], axis=2)
    return replace(base(), sample_part_square=parts, sample_size=sizes)


OURS = resolved()
G = products_of(OURS.sample_part_square)[..., :T, :T]
ROWS = OURS.sample_part_square[..., ROW_SQUARES][..., :R]
COLUMNS = OURS.sample_part_square[..., COLUMN_SQUARES][..., :C_]
DIAGONAL = np.einsum("...tt->...t", G)
APART = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
LARGE = 4 * BY_PARAMETER[..., [3, 1]] ** 2


def with_norms(squares: Any, ours: Trajectory) -> Trajectory:
    """`ours` with other squared norms of the wrong parameters, and what follows from them."""
    norms = ours.sample_norm_by_parameter.copy()
    norms[..., WRONG] = np.sqrt(np.maximum(squares, 0.0))
    wrong = replace(ours, sample_norm_by_parameter=norms)
    return with_total(wrong, np.sqrt(np.square(norms).sum(axis=2)))


SQUARES = np.square(BY_PARAMETER[..., WRONG])
NEXT = np.roll(SQUARES.reshape(S, 4, 3, 2), -1, axis=2).reshape(S, N, 2)
NORMS = {
    "made of every second position, from number 0 on (counted from 0) alone": (
        G[..., ::2, ::2].sum(axis=(-1, -2))
    ),
    "made of all but the first 3 positions alone": G[..., 3:, 3:].sum(axis=(-1, -2)),
    "products of positions that are at most 2 apart": (G * (APART <= 2)).sum(axis=(-1, -2)),
    "without cross terms between tiles of 5 positions": (
        G[..., :5, :5].sum(axis=(-1, -2)) + G[..., 5:, 5:].sum(axis=(-1, -2))
    ),
    "the sum of the positions' norms |g_t|": np.sqrt(DIAGONAL).sum(axis=-1) ** 2,
    "squares |g_t|^2 of positions counted once (as is right) and their cross terms 0.5 times": (
        (DIAGONAL.sum(axis=-1) + G.sum(axis=(-1, -2))) / 2
    ),
    "made of all but the first 2 rows of the gradient alone": ROWS[..., 2:].sum(axis=-1),
    "made of the second half of the columns of the gradient alone": COLUMNS[..., 2:].sum(axis=-1),
    "the sum of the norms of 2 blocks of rows": (
        np.sqrt(ROWS[..., :4].sum(axis=-1)) + np.sqrt(ROWS[..., 4:].sum(axis=-1))
    )
    ** 2,
    "rows 1, 4 to 5 counted twice": ROWS @ [1, 2, 1, 1, 2, 2, 1],
}


@pytest.mark.parametrize("said", NORMS)
def test_norms_of_other_parts_of_gradients_are_named(said: str) -> None:
    assert said in found(with_norms(NORMS[said][..., WRONG], OURS), OURS).sentence


MIXED = {
    "0.7 times the right ones plus 0.3 times those of the next sample": 0.7 * SQUARES + 0.3 * NEXT,
    "model.layers.1.weight has that of model.layers.3.weight": SQUARES[..., ::-1],
    "multiplied by the root of the number of its tokens": SQUARES * TOKENS[..., None],
    "multiplied by 0.5 where the number of its tokens is 8 or more": (
        SQUARES * np.where(TOKENS >= 8, 0.25, 1)[..., None]
    ),
}


@pytest.mark.parametrize("said", MIXED)
def test_norms_that_depend_on_other_numbers_are_named(said: str) -> None:
    assert said in found(with_norms(MIXED[said], OURS), OURS).sentence


def test_a_share_of_a_known_formula_is_named() -> None:
    others = np.random.default_rng(0).uniform(0.1, 3.0, (S, N, P, len(NormFormula)))
    ours = replace(OURS, sample_other_norm=others)
    apart = np.square(others[..., WRONG, list(NormFormula).index(NormFormula.USES_APART)])
    said = found(with_norms(1.5 * SQUARES + 0.5 * apart, ours), ours).sentence
    wanted = "1.5 times the right ones plus 0.5 times those " + NormFormula.USES_APART.value
    assert wanted in said


@pytest.mark.parametrize("ours", [base(), OURS], ids=["unresolved", "resolved"])
def test_norms_without_a_law_are_not_named(ours: Trajectory) -> None:
    noise = np.random.default_rng(1).uniform(0.5, 2.0, SQUARES.shape)
    said = found(with_norms(SQUARES * noise, ours), ours).sentence
    assert "computes wrong per-sample norms: first at step 0" in said


FACTORS = {
    "not at C but at C multiplied by the number of its tokens, times 0.1": np.minimum(
        1, C * TOKENS / 10 / NORM
    ),
    "divided by the number of its tokens": FACTOR / TOKENS,
}


@pytest.mark.parametrize("said", FACTORS)
def test_factors_that_depend_on_the_sample_are_named(said: str) -> None:
    assert said in found(with_factors(OURS, FACTORS[said]), OURS).sentence


def in_parts() -> Trajectory:
    """The base record with parts that make up its clipped sums."""
    rng = np.random.default_rng(0)
    sums = base().gradient_sketch
    K = sums.shape[-1]
    parts = np.zeros((S, NUM_SUM_PARTS, P, K))
    for which, num in (
        (SumParts.POSITIONS, T),
        (SumParts.UNCLIPPED_POSITIONS, T),
        (SumParts.ROWS, R),
        (SumParts.UNCLIPPED_ROWS, R),
        (SumParts.COLUMNS, C_),
    ):
        own = rng.normal(0, 1, (S, num, P, K))
        if "UNCLIPPED" not in which.name:
            own[:, -1] = sums - own[:, :-1].sum(axis=1)
        parts[:, which.value][:, :num] = own
    return replace(base(), part_sketch=parts)


PARTS = in_parts()


def parts_of(which: SumParts, num: int) -> Any:
    return PARTS.part_sketch[:, which.value][:, :num, WRONG]


POSITIONS, UNCLIPPED = (
    parts_of(which, T) for which in (SumParts.POSITIONS, SumParts.UNCLIPPED_POSITIONS)
)
BEFORE = np.concatenate([np.zeros((1, 2, 8)), base().gradient_sketch[:-1, WRONG]])
SUMS = {
    "made of every second position, from number 0 on (counted from 0) alone": (
        POSITIONS[:, ::2].sum(axis=1)
    ),
    "not clipped in the second half of the positions": (
        POSITIONS[:, :4].sum(axis=1) + UNCLIPPED[:, 4:].sum(axis=1)
    ),
    "made of the first 2 rows alone": parts_of(SumParts.ROWS, R)[:, :2].sum(axis=1),
    "with columns 1 to 2 missing": parts_of(SumParts.COLUMNS, C_)[:, [0, 3, 4]].sum(axis=1),
    "the right one plus 0.3 times the right sum of the step before": (
        base().gradient_sketch[:, WRONG] + 0.3 * BEFORE
    ),
}


@pytest.mark.parametrize("said", SUMS)
def test_sums_of_other_parts_are_named(said: str) -> None:
    gradient = base().gradient_sketch.copy()
    gradient[:, WRONG] = SUMS[said]
    wrong = replace(PARTS, gradient_sketch=gradient, noised_sketch=gradient)
    assert said in found(wrong, PARTS).sentence


def test_weights_of_samples_that_follow_their_size_are_named() -> None:
    wrong = summed(OURS, FACTOR * TOKENS / 10)
    assert "multiplied by the number of its tokens, times 0.1" in found(wrong, OURS).sentence


TARGETS = np.random.default_rng(0).uniform(0.5, 8.0, (S, N, 12))
TARGETS[np.broadcast_to(np.arange(12), TARGETS.shape) >= TOKENS[..., None]] = np.nan
PLACES = np.arange(12) + 1.0
LOSSES: dict[str, Any] = {
    "means over all but the first 2 positions alone": np.nanmean(TARGETS[..., 2:], axis=2),
    "means with weights proportional to the position": (
        np.nansum(TARGETS * PLACES, axis=2) / np.nansum(PLACES * (TARGETS > 0), axis=2)
    ),
    "the focal loss with gamma 2": np.nanmean(TARGETS * (1 - np.exp(-TARGETS)) ** 2, axis=2),
    "min(l, 5): losses of targets are capped": np.nanmean(np.minimum(TARGETS, 5.0), axis=2),
    "multiplied by the root of the number of its targets": (
        np.nanmean(TARGETS, axis=2) * np.sqrt(TOKENS)
    ),
}


@pytest.mark.parametrize("said", LOSSES)
def test_losses_of_other_targets_are_named(said: str) -> None:
    right, wrong = np.nanmean(TARGETS, axis=2), LOSSES[said]
    ours = replace(
        base(),
        sample_target_loss=TARGETS,
        sample_size=np.stack([TOKENS + 3 * (TOKENS > 5), TOKENS], axis=2),
        sample_loss=right,
        loss=right.mean(axis=1),
    )
    assert said in found(replace(ours, sample_loss=wrong, loss=wrong.mean(axis=1)), ours).sentence


@pytest.mark.parametrize("num", [2, 3, 9, 17])
def test_choices_of_places_choose_some_of_them(num: int) -> None:
    choices = list(chosen_places(num, "row"))
    assert all(0 < mask.sum() < num for mask, _ in choices if mask.any())
    assert all(mask.shape == (num,) for mask, _ in choices)


COUNTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: np.array([0.0, 0, 1, 2]), "rows 0 to 1 missing and row 3 counted twice"),
    (lambda: np.array([1.0, 3, 1, 3]), "rows 1, 3 counted 3 times"),
]


@pytest.mark.parametrize(("counts", "said"), COUNTS, ids=["missing", "thrice"])
def test_counts_are_told_in_runs(counts: Callable[[], Any], said: str) -> None:
    assert counted(counts(), "row") == said


def noisy(noise: Any) -> str:
    """The sentence about a mode that adds other noise, [S, P, K], where noise is common."""
    t = trajectory(noise_std=100.0, samples=12)
    theirs = replace(
        t, noised_sketch=t.gradient_sketch + noise(t.noised_sketch - t.gradient_sketch)
    )
    runs = [
        mode_run("no_dp", record=t),
        mode_run("no_dp", record=t, replay="again"),
        mode_run(MODE, record=theirs, **with_job(TRAINED)),
    ]
    return next(mode for mode in compared(runs).modes if mode.label == MODE).sentence


STEPS = np.arange(4)[:, None, None]
NOISES: dict[str, Callable[[Any], Any]] = {
    "multiplied by the root of the number of the step, from 1": lambda z: z * np.sqrt(1 + STEPS),
    "multiplied by 0.9 from one step to the next (1 at step 0)": lambda z: z * 0.9**STEPS,
    "it is the noise of other steps: minus that of step 0 at step 1, minus that of step 2 at step "
    "3": lambda z: np.stack([z[0], -z[0], z[2], -z[2]]),
    "0.8 times its own plus 0.6 times that of step 2 at step 1": lambda z: np.stack(
        [z[0], 0.8 * z[1] + 0.6 * z[2], z[2], z[3]]
    ),
    "multiplied by 3 in model.layers.2.weight and 0.5 in model.layers.0.weight": lambda z: (
        z * np.array([0.5, 1, 3, 1])[:, None]
    ),
}


@pytest.mark.parametrize("said", NOISES)
def test_noise_that_is_scaled_or_of_other_steps_is_named(said: str) -> None:
    assert said in noisy(NOISES[said])
