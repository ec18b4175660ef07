"""The cause of a wrong number: each mistake is made in a record, and named in the sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison.diagnose.causes import Cause, agreed, either
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Explanation,
    off_as_rounded,
    share_lost,
)
from dpsgd_track.comparison.diagnose.hypotheses.samples import to_bfloat16
from dpsgd_track.comparison.result import ModeVerdict
from dpsgd_track.record.alternatives import LossFormula, NormFormula, SumFormula
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
from tests.support.synthetic_group import (
    compared,
    mode_run,
    put,
    trajectory,
)

Change = Callable[[Trajectory], Trajectory]


def rolled(values: Any) -> Any:
    """Values of samples in micro-batches of three, each at its neighbour's place."""
    S, N = values.shape
    return np.roll(values.reshape(S, N // 3, 3), 1, axis=2).reshape(S, N)


def batches_before(values: Any) -> Any:
    """Those of the first micro-batch of each rank in place of the second's."""
    late = values.copy()
    late[:, 3:6], late[:, 9:12] = values[:, :3], values[:, 6:9]
    return late


def stale(values: Any) -> Any:
    """Those of the micro-batch before on the same rank, whatever its step."""
    S = len(values)
    by_batch = values.reshape(S, 2, 2, 3).transpose(1, 0, 2, 3).reshape(2, 2 * S, 3)
    late = np.concatenate([by_batch[:, :1], by_batch[:, :-1]], axis=1)
    return late.reshape(2, S, 2, 3).transpose(1, 0, 2, 3).reshape(values.shape)


C = base().max_grad_norm[:, None]
NORM = base().sample_norm
BY_PARAMETER = base().sample_norm_by_parameter
FACTOR = base().clip_factor
IS_RANK_1 = base().sample_rank == 1
IS_LAST = base().sample_micro_batch == 1

LINEAR = np.isin(base().parameter_names, [f"{name}.weight" for name in base().layer_names])


def partly_a_mean(of_linear: bool) -> Any:
    """Norms to which some layers contribute gradients of the mean over three samples."""
    return np.sqrt(np.square(np.where(of_linear == LINEAR, BY_PARAMETER / 3, BY_PARAMETER)).sum(2))


def over_ranks(norms: Any) -> Any:
    """Squares of the samples at one place of both ranks, added up."""
    return np.tile(np.sqrt(norms[:, :6] ** 2 + norms[:, 6:] ** 2), (1, 2))


NORMS = {
    "norms of linear layers alone are divided by the number of samples in the micro-batch, as": (
        partly_a_mean(True)
    ),
    "norms of layers other than linear alone are divided by the number": partly_a_mean(False),
    "as those of a mean loss are; and squares of different samples are added up over ranks": (
        over_ranks(partly_a_mean(True))
    ),
    "all samples of a micro-batch have their root mean square": np.sqrt(
        (NORM**2).reshape(-1, 4, 3).mean(axis=2)
    ).repeat(3, axis=1),
    "the root is missing": NORM**2,
    "the sum of the parameters' norms": BY_PARAMETER.sum(axis=2),
    "the largest of the parameters' norms": BY_PARAMETER.max(axis=2),
    "they leave out model.layers.2.weight": np.sqrt(NORM**2 - BY_PARAMETER[..., 2] ** 2),
    "they count model.layers.1.weight twice": np.sqrt(NORM**2 + BY_PARAMETER[..., 1] ** 2),
    "they leave out model.layers.1.weight, model.layers.3.weight and count model.layers.5.weight "
    "3 times": np.sqrt(np.square(BY_PARAMETER) @ [1, 0, 1, 0, 1, 3]),
    "number 1 that of 0, number 2 that of 0": NORM[:, ::3].repeat(3, axis=1),
    "each sample has its neighbour's": rolled(NORM),
    "the micro-batch before": batches_before(NORM),
    "squares of different samples are added up over ranks": over_ranks(NORM),
    "they are those of the samples at the same places in the step before": np.concatenate(
        [NORM[:1], NORM[:-1]]
    ),
    "0.01 is added to each of them": NORM + 0.01,
    "sqrt(n^2 + 1) in place of n": np.sqrt(NORM**2 + 1),
    "they are never above 3.4": np.minimum(NORM, np.median(NORM)),
    "they are rounded to 2 decimals": np.round(NORM, 2),
    "added up over the samples of a micro-batch, one after the other": np.sqrt(
        np.cumsum((NORM**2).reshape(-1, 4, 3), axis=2)
    ).reshape(NORM.shape),
    "smoothed: 0.1 of each is that of the sample at its place in the step before": (
        0.9 * NORM + 0.1 * np.concatenate([NORM[:1], NORM[:-1]])
    ),
    "smoothed: 0.25 of each is the mean of its micro-batch": (
        0.75 * NORM + 0.25 * NORM.reshape(-1, 4, 3).mean(2).repeat(3, axis=1)
    ),
    "the 4-norm of the parameters' norms": (BY_PARAMETER**4).sum(2) ** 0.25,
    "each 2 samples of a micro-batch have their largest": np.dstack(
        [NORM.reshape(-1, 4, 3)[..., :2].max(axis=2)] * 2 + [NORM.reshape(-1, 4, 3)[..., 2]]
    ).reshape(NORM.shape),
    "in another order, so that samples have each other's: samples are sorted by their norms, "
    "largest first": -np.sort(-NORM.reshape(-1, 4, 3), axis=2).reshape(NORM.shape),
    "the right values in another order": NORM[:, [5, 3, 8, 0, 11, 1, 2, 4, 6, 10, 7, 9]],
}
PAIRS = FACTOR.reshape(-1, 4, 3).copy()
PAIRS[..., :2] = 0.9 * PAIRS[..., :2].mean(axis=2, keepdims=True)
LATE = np.minimum(1, np.concatenate([C[:1], C[:-1]]) / NORM)
"""Factors with the C of the step before."""
DECIDED = np.where((NORM > C).reshape(-1, 4, 3).any(axis=2).repeat(3, axis=1), C / NORM, 1)
"""Factors that are all 1 in a micro-batch or all C / n."""
FACTORS = {
    "they are never below 0.77": np.maximum(FACTOR, 0.77),
    "all samples of a micro-batch have one factor": np.minimum(
        1, C / (NORM.reshape(-1, 4, 3).mean(axis=2) + 0.1)
    ).repeat(3, axis=1),
    "all ranks have the smallest of the samples at one place": np.tile(
        np.minimum(FACTOR[:, :6], FACTOR[:, 6:]), (1, 2)
    ),
    "each 2 samples of a micro-batch have one factor": PAIRS.reshape(FACTOR.shape),
    "no sample is clipped": np.ones_like(NORM),
    "each 2 samples of a micro-batch have their mean: they are handled in chunks of 2": np.dstack(
        [FACTOR.reshape(-1, 4, 3)[..., :2].mean(axis=2)] * 2 + [FACTOR.reshape(-1, 4, 3)[..., 2]]
    ).reshape(FACTOR.shape),
    "a new C is taken up late: micro-batch 0 of each step is clipped at C of the step before": (
        np.where(IS_LAST, FACTOR, LATE)
    ),
    "(C / n) tanh(n / C), a smooth function": C / NORM * np.tanh(NORM / C),
    "C / (n + r / (n + r)) with r = 0.1": C / (NORM + 0.1 / (NORM + 0.1)),
    "computed from other norms: they are those of the samples at the same places of the "
    "micro-batch before, even of the step before": np.minimum(1, C / stale(NORM)),
    "they are max(1, C / n) rather than min(1, C / n)": np.maximum(1, C / NORM),
    "samples are clipped not at C but at 1": np.minimum(1, 1 / NORM),
    "at C / W (the number of ranks) or K (the number of micro-batches) or 2": np.minimum(
        1, C / 2 / NORM
    ),
    "without the clamp at 1": C / NORM,
    "C / (n + 0.01)": C / (NORM + 0.01),
    "min(1, C / (n + 0.003))": np.minimum(1, C / (NORM + 0.003)),
    "divided by the squared norm": np.minimum(1, C / NORM**2),
    "(1 + (n / C)^8)^(-1/8)": (1 + (NORM / C) ** 8) ** (-1 / 8),
    "that of the first step": np.minimum(1, C[0] / NORM),
    "they are rounded to bfloat16": np.float64(
        (FACTOR.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    ),
    "are clipped not at C but at 0.9 C": np.minimum(1, 0.9 * C / NORM),
    "clipped not at C but at 1.11, 1.05, 35.7, 39.1 C (step by step)": np.minimum(
        1, np.quantile(NORM, 0.87, axis=1, keepdims=True) / NORM
    ),
    "not at C but at the 0.9 quantile norm in the step": np.minimum(
        1, np.quantile(NORM, 0.9, axis=1, keepdims=True) / NORM
    ),
    "not at C but at the median norm in the micro-batch, where that is less than C": np.minimum(
        1,
        np.minimum(C, np.median(NORM.reshape(-1, 4, 3), axis=2).repeat(3, axis=1)) / NORM,
    ),
    "they are rounded down to multiples of 1/8": np.floor(8 * FACTOR) / 8,
    "not clipped are the first sample of each micro-batch of rank 0": np.where(
        (np.arange(12) % 3 == 0) & (np.arange(12) < 6), 1, FACTOR
    ),
    "another function of n / C than min(1, C / n): 0.574 where n is 0.796 C": (
        1 / (1 + (NORM / C) ** 1.3)
    ),
    "they are tanh(C / n)": np.tanh(C / NORM),
    "they are min(1, C / n)^1.5": np.minimum(1, C / NORM) ** 1.5,
    "samples are clipped from 1.22 to 24.5 C on, and not below": np.where(
        NORM > 2 * C, C / NORM, 1
    ),
    "min(1, C / (n + 0.01)): a constant": np.where(NORM > C, C / (NORM + 0.01), 1),
    "they are rounded to 2 decimals": np.round(FACTOR, 2),
    "rounded down to powers of 2": 2.0 ** np.floor(np.log2(FACTOR)),
    "min(1, C / (n + 0.01 C))": np.minimum(1, C / (NORM + 0.01 * C)),
    "they are 0.5 + 0.5 c in place of the right factors c": (1 + FACTOR) / 2,
    "they are never above 0.5": np.minimum(0.5, FACTOR),
    "other norms: the largest of the parameters' norms": np.minimum(1, C / BY_PARAMETER.max(2)),
    "other norms: those without model.layers.2.weight": np.minimum(
        1, C / np.sqrt(NORM**2 - BY_PARAMETER[..., 2] ** 2)
    ),
    "computed from norms that are rounded to float16": np.minimum(
        1, C / np.float16(NORM).astype(float)
    ),
    "not clipped are all samples of rank 1 alone": np.where(IS_RANK_1, 1, FACTOR),
    "not clipped are the last sample of each micro-batch": np.where(
        np.arange(12) % 3 == 2, 1, FACTOR
    ),
}
SHUFFLED = FACTOR[:, [5, 3, 8, 0, 11, 1, 2, 4, 6, 10, 7, 9]]
THIRD = np.square(BY_PARAMETER[..., 3:4])
APART = np.sqrt(np.where(np.arange(6) == 3, THIRD, NORM[..., None] ** 2 - THIRD))
"""[S, N, P] norm of the one parameter's gradient, or of all the others'."""
SUMS = {
    "missing are 9 of 12 samples (1, 2, 3, 4, 6, 7, 8, 9, ...) at step 0": (
        FACTOR * np.isin(np.arange(12), [0, 5, 10])
    ),
    "samples count with 0.1 + 1 c in place of the factor c": FACTOR + 0.1,
    "counting twice are the first sample of each micro-batch and missing are the last sample": (
        FACTOR * np.tile([2, 1, 0], 4)
    ),
    "missing are micro-batch 1 of rank 0": np.where(IS_LAST & ~IS_RANK_1, 0, FACTOR),
    "they count with factor 1": np.ones_like(FACTOR),
    "clip factors are applied twice": FACTOR**2,
    "samples count with 1 + c": 1 + FACTOR,
    "all samples of a micro-batch have their mean": FACTOR.reshape(-1, 4, 3)
    .mean(axis=2)
    .repeat(3, axis=1),
    "each sample has its neighbour's": rolled(FACTOR),
    "at the full C": np.minimum(1, C[..., None] / BY_PARAMETER),
    "at C / sqrt(number of parameters)": np.minimum(1, C[..., None] / 6**0.5 / BY_PARAMETER),
    "it is the sum over rank 0 alone: it is not reduced": np.where(IS_RANK_1, 0, FACTOR),
    "the last micro-batch stands for all": np.where(IS_LAST, FACTOR, 0),
    "twice the last micro-batch": np.where(IS_LAST, 2 * FACTOR, 0),
    "the first micro-batch is lost": np.where(IS_LAST, FACTOR, 0),
    "the last micro-batch is lost": np.where(IS_LAST, 0, FACTOR),
    "the samples of rank 1 count 0.7 times": np.where(IS_RANK_1, 0.7 * FACTOR, FACTOR),
    "the samples of micro-batches 0, 1 count 3, 0 times": np.where(IS_LAST, 0, 3 * FACTOR),
    "the samples of micro-batch 1 count 0.3 times": np.where(IS_LAST, 0.3 * FACTOR, FACTOR),
    "multiplied by B (the expected batch size)": 12 * FACTOR,
    "zero, left out": 0 * FACTOR,
    "samples are multiplied by each other's clip factors": SHUFFLED,
    "clip factors are divided by the mean of those in the micro-batch": (
        FACTOR / FACTOR.reshape(-1, 4, 3).mean(axis=2).repeat(3, axis=1)
    ),
    "clip factors are divided by the sum of those in the step": (
        FACTOR / FACTOR.sum(axis=1, keepdims=True)
    ),
    "its samples count with C / n": C / NORM,
    "weighed by clip factors in bfloat16": to_bfloat16(FACTOR),
    "weighed by clip factors in float16": np.float16(FACTOR).astype(float),
    "samples count with c^1.5 in place of the factor c": FACTOR**1.5,
    "not clipped (counting with factor 1) are all samples of rank 1": np.where(
        IS_RANK_1, 1, FACTOR
    ),
    "missing are every second sample of each micro-batch": np.where(
        np.arange(12) % 3 == 1, 0, FACTOR
    ),
    "reduced over ranks again after each micro-batch": np.where(IS_LAST, FACTOR, 2 * FACTOR),
    "model.layers.3.weight and all other parameters are clipped apart, at C / sqrt(2) each": (
        np.minimum(1, C[..., None] / 2**0.5 / APART)
    ),
    "the whole sum is clipped as well, to a length of about 0.5 C": (
        FACTOR * np.minimum(1, 0.5 * C / summed(base(), FACTOR).grad_norm[:, None] / 12)
    ),
}


@pytest.mark.parametrize("said", NORMS)
def test_a_wrong_norm_is_explained(said: str) -> None:
    verdict = found(with_total(base(), NORMS[said]))
    assert verdict.culprit is not None
    assert verdict.culprit.stage == "per-sample norms"
    assert said in verdict.sentence


@pytest.mark.parametrize("said", FACTORS)
def test_a_wrong_factor_is_explained(said: str) -> None:
    verdict = found(with_factors(base(), FACTORS[said]))
    assert verdict.culprit is not None
    assert verdict.culprit.stage == "clip factors"
    assert said in verdict.sentence


@pytest.mark.parametrize("said", SUMS)
def test_a_wrong_sum_is_explained(said: str) -> None:
    verdict = found(summed(base(), SUMS[said]))
    assert verdict.culprit is not None
    assert verdict.culprit.stage == "clipped sum"
    assert said in verdict.sentence


def test_elements_that_are_missing_are_told_from_others() -> None:
    rng = np.random.default_rng(1)
    # Projections of all elements of 40 tensors, and of two thirds of them.
    elements, signs = rng.normal(0, 1, (5, 40, 300)), rng.choice([-1.0, 1.0], (40, 16, 300))
    kept = np.where(np.arange(300) % 3 == 0, 0.0, elements)
    whole, part = (np.einsum("spe,pke->spk", of, signs) for of in (elements, kept))
    assert share_lost(part, whole) == pytest.approx(1 / 3, abs=0.1)
    for other in (whole, 0.7 * whole, 0 * whole, rng.permutation(whole, axis=1)):
        assert share_lost(other, whole) is None


@pytest.mark.parametrize("formula", list(NormFormula))
def test_a_norm_by_a_known_wrong_formula_is_explained(formula: NormFormula) -> None:
    rng = np.random.default_rng(0)
    t = base()
    others = rng.uniform(0.1, 3.0, (*BY_PARAMETER.shape, len(NormFormula)))
    ours = replace(t, sample_other_norm=others)
    by_parameter = BY_PARAMETER.copy()
    column = list(NormFormula).index(formula)
    by_parameter[..., [1, 3]] = others[..., [1, 3], column]
    total = np.sqrt(np.square(by_parameter).sum(axis=2))
    wrong = with_total(replace(ours, sample_norm_by_parameter=by_parameter), total)
    assert formula.value in found(wrong, ours).sentence


def test_norms_that_are_scaled_as_if_micro_batches_were_full_are_explained() -> None:
    # A rank's first micro-batch has four samples and its second two, where three are full.
    uneven = replace(base(), sample_micro_batch=np.tile([0, 0, 0, 0, 1, 1], (len(NORM), 2)))
    scaled = NORM * np.tile([3 / 4] * 4 + [3 / 2] * 2, 2)
    said = found(with_total(uneven, scaled), uneven).sentence
    assert "as if each micro-batch were full: multiplied by 3 over its number of samples" in said


def test_factors_of_norms_of_a_mean_loss_are_explained() -> None:
    uneven = replace(base(), sample_micro_batch=np.tile([0, 0, 0, 0, 1, 1], (len(NORM), 2)))
    norm = NORM / np.tile([4] * 4 + [2] * 2, 2)
    said = found(with_factors(uneven, np.minimum(1, C / norm)), uneven).sentence
    assert "computed from other norms: they are divided by the number of samples" in said


def test_factors_of_the_first_of_three_micro_batches_are_explained() -> None:
    three = replace(base(), sample_micro_batch=np.tile([0, 0, 1, 1, 2, 2], (len(NORM), 2)))
    first = np.tile(FACTOR.reshape(len(NORM), 2, 6)[:, :, :2], 3).reshape(FACTOR.shape)
    said = found(with_factors(three, first), three).sentence
    assert "at the same places of the step's first micro-batch. First" in said


def test_a_step_that_is_left_out_is_not_blamed_on_the_optimizers_parameters() -> None:
    t = trajectory(noise_std=100.0, samples=12)
    path = -TRAINED.learning_rate * t.noised_sketch / t.expected_batch_size
    path[2:] = 0
    said = trained(t.noised_sketch, path, t).sentence
    assert "no weight moves, although the gradient is not zero: the step is left out" in said


def test_a_sum_of_which_only_the_last_micro_batch_is_reduced_is_explained() -> None:
    rng = np.random.default_rng(0)
    ours = replace(base(), sample_shard_sketch=rng.normal(0, 1, base().sample_sketch.shape))
    parts = np.where(IS_LAST[..., None, None], ours.sample_sketch, ours.sample_shard_sketch)
    total = (parts * FACTOR[..., None, None]).sum(axis=1)
    wrong = replace(ours, gradient_sketch=total, noised_sketch=total)
    assert (
        "only the last micro-batch is reduced over ranks: of earlier" in found(wrong, ours).sentence
    )


def test_a_sum_that_holds_noise_is_told_from_other_wrong_sums() -> None:
    rng = np.random.default_rng(0)
    t = trajectory(noise_std=0.2, samples=12, layers=5)
    sizes = np.array([64, 400, 900, 64, 256, 100])
    std = (0.2 * t.max_grad_norm / t.max_grad_norm[0])[:, None, None] * np.sqrt(sizes)[:, None]
    noise = 1.7 * std * rng.standard_normal(t.gradient_sketch.shape)
    ours = replace(t, parameter_sizes=sizes)
    noisy = t.gradient_sketch + noise
    said = found(replace(ours, gradient_sketch=noisy, noised_sketch=noisy), ours).sentence
    assert re.search(r"noise of std 1\.[5-9] sigma C is in it already", said)
    alike = t.gradient_sketch + rng.standard_normal(t.gradient_sketch.shape)
    said = found(replace(ours, gradient_sketch=alike, noised_sketch=alike), ours).sentence
    assert "already" not in said


def test_samples_that_were_read_in_the_place_of_others_are_named() -> None:
    loss = base().sample_loss.copy()
    loss[:, 6], loss[:, 9] = loss[:, 5], loss[:, 2]
    verdict = found(replace(base(), sample_loss=loss, loss=loss.mean(axis=1)))
    assert "were read in the place of some: sample 5 for 6, sample 2 for 9" in verdict.sentence


@pytest.mark.parametrize(("bits", "is_told"), [(7, False), (8, True), (9, False)])
def test_one_rounding_is_told_from_a_coarser_and_a_finer_one(bits: int, is_told: bool) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 6, 4000)) * np.geomspace(1, 2, 6)[:, None]
    unit = 2.0 ** (np.floor(np.log2(np.abs(weights))) + 1 - bits)
    error = np.round(weights / unit) * unit - weights
    size = np.sqrt(np.square(weights).sum(axis=2))
    right = size[..., None] * rng.standard_normal((4, 6, 16))
    off = np.sqrt(np.square(error).sum(axis=2))[..., None] * rng.standard_normal((4, 6, 16))
    assert off_as_rounded(right + off, right, size, is_once=True) == is_told


PARTS = {
    LossFormula.UNIFORM: ("label smoothing of 0.1", lambda right, part: 0.9 * right + 0.1 * part),
    LossFormula.SQUARED_LOG_SUM: ("a z-loss, 0.001 times", lambda right, part: right + 1e-3 * part),
}


@pytest.mark.parametrize("formula", list(LossFormula))
def test_a_known_wrong_loss_is_explained(formula: LossFormula) -> None:
    rng = np.random.default_rng(0)
    others = rng.uniform(1.0, 9.0, (*base().sample_loss.shape, len(LossFormula)))
    ours = replace(base(), sample_other_loss=others)
    other = others[..., list(LossFormula).index(formula)]
    said, change = PARTS.get(formula, (formula.value, lambda right, part: part))
    loss = change(ours.sample_loss, other)
    verdict = found(replace(ours, sample_loss=loss, loss=loss.mean(axis=1)), ours)
    assert verdict.culprit is not None
    assert verdict.culprit.stage == "loss"
    assert said in verdict.sentence


def test_shards_that_are_scaled_are_named_by_their_rank() -> None:
    rng = np.random.default_rng(0)
    t = base()
    S, P, K = t.gradient_sketch.shape
    moves = rng.normal(0, 1, (S, len(SumFormula), P, K))
    ours = replace(t, moved_sketch=moves)
    first = moves[:, list(SumFormula).index(SumFormula.FIRST_SHARD_ALONE), 2]
    gradient = t.gradient_sketch.copy()
    gradient[:, 2] = first + 0.5 * (gradient[:, 2] - first)
    wrong = replace(ours, gradient_sketch=gradient, noised_sketch=gradient)
    assert "the rows of rank 1 are multiplied by 0.5" in found(wrong, ours).sentence


@pytest.mark.parametrize("move", list(SumFormula))
def test_a_moved_gradient_is_explained(move: SumFormula) -> None:
    rng = np.random.default_rng(0)
    t = base()
    S, P, K = t.gradient_sketch.shape
    ours = replace(t, moved_sketch=rng.normal(0, 1, (S, len(SumFormula), P, K)))
    gradient = t.gradient_sketch.copy()
    gradient[:, 2] = ours.moved_sketch[:, list(SumFormula).index(move), 2]
    wrong = replace(ours, gradient_sketch=gradient, noised_sketch=gradient)
    assert move.value in found(wrong, ours).sentence


def test_a_sum_that_is_not_reduced_over_ranks_is_explained() -> None:
    rng = np.random.default_rng(0)
    ours = replace(base(), sample_shard_sketch=rng.normal(0, 1, base().sample_sketch.shape))
    total = (ours.sample_shard_sketch * FACTOR[..., None, None]).sum(axis=1)
    wrong = replace(ours, gradient_sketch=total, noised_sketch=total)
    assert "the sum is not reduced over ranks" in found(wrong, ours).sentence
    # What divides a reduced sum by the number of ranks is undone for one that is not reduced.
    wrong = replace(ours, gradient_sketch=2 * total, noised_sketch=2 * total)
    said = "a sum that is not reduced over the W ranks is taken for their mean"
    assert said in found(wrong, ours).sentence


def test_after_wrong_totals_a_sum_is_explained_by_the_modes_own_factors() -> None:
    silent = replace(base(), sample_norm_by_parameter=np.full_like(BY_PARAMETER, np.nan))
    wrong = with_total(silent, over_ranks(NORM))
    assert "Besides" not in found(wrong).sentence
    weights = np.repeat(wrong.clip_factor[..., None], BY_PARAMETER.shape[2], axis=2)
    weights[..., :-1] *= IS_LAST[..., None]
    weights[..., -1] = 0
    sentence = found(summed(wrong, weights)).sentence
    assert "squares of different samples are added up over ranks" in sentence
    assert "in model.layers.5.weight, it is zero, left out altogether" in sentence
    assert ".weight, the last micro-batch stands for all" in sentence


def test_a_sum_that_still_holds_the_step_before_is_explained() -> None:
    t = base()
    total = t.gradient_sketch.copy()
    for row in range(1, len(total)):
        total[row] += total[row - 1]
    wrong = replace(t, gradient_sketch=total, noised_sketch=total)
    assert "still in it: it is not cleared" in found(wrong).sentence


def test_micro_batches_that_count_by_a_law_of_their_sizes_are_explained() -> None:
    t = base()
    rank, number = t.sample_rank.copy(), t.sample_micro_batch.copy()
    rank[:, 6:8], number[:, 6:8] = 0, 1
    ours = replace(t, sample_rank=rank, sample_micro_batch=number)
    of_rank = np.where(rank == 0, 8, 4)
    of_batch = np.select([(rank == 0) & (number == 0), rank == 0, number == 0], [3, 5, 1], 3)
    sentence = found(summed(ours, FACTOR * of_batch / of_rank), ours).sentence
    said = "the samples of the micro-batch over the rank's samples in the step."
    assert f"each micro-batch's sum is multiplied by {said}" in sentence


def test_a_try_that_was_given_up_is_told_from_samples_that_count_twice() -> None:
    wrong = summed(base(), FACTOR + LATE)
    assert "the sum of a try that was given up" in found(wrong).sentence


def test_a_sum_of_the_right_length_in_other_places_is_told_by_its_length() -> None:
    t = base()
    total = np.roll(t.gradient_sketch, 1, axis=1)
    wrong = replace(t, gradient_sketch=total, noised_sketch=total)
    verdict = found(replace(wrong, layer_grad_norm=np.full_like(t.layer_grad_norm, np.nan)))
    assert "right in length as a whole" in verdict.sentence
    longer = replace(wrong, grad_norm=1.01 * t.grad_norm, grad_norm_noised=1.01 * t.grad_norm)
    assert "right in length as a whole" not in found(longer).sentence


def test_layers_that_are_exchanged_are_named() -> None:
    t = base()
    layers = np.array([name.removesuffix(".weight") for name in t.parameter_names.tolist()])
    norms = np.arange(1.0, 1 + len(layers)) * np.ones((t.num_steps, 1))
    ours = replace(t, layer_names=layers, layer_grad_norm=norms, layer_weight_norm=norms)
    rng = np.random.default_rng(0)
    gradient = t.gradient_sketch.copy()
    gradient[:, [0, 3]] = rng.normal(size=gradient[:, [0, 3]].shape)
    swapped = norms.copy()
    swapped[:, [0, 3]] = norms[:, [3, 0]]
    wrong = replace(ours, gradient_sketch=gradient, noised_sketch=gradient, layer_grad_norm=swapped)
    assert "model.layers.0 has that of model.layers.3" in found(wrong, ours).sentence


def trained(noised: Any, path: Any, t: Trajectory) -> ModeVerdict:
    """The verdict on a mode whose weights go along `path`, against one whose steps are right."""
    right = -TRAINED.learning_rate * noised / t.expected_batch_size
    start = np.full(noised.shape[1:], 3.0)
    ours, theirs = (
        replace(t, weight_sketch=start + np.cumsum(each, axis=0)) for each in (right, path)
    )
    runs = [
        mode_run("no_dp", record=ours),
        mode_run("no_dp", record=ours, replay="again"),
        mode_run(MODE, record=theirs, **with_job(TRAINED)),
    ]
    return next(mode for mode in compared(runs).modes if mode.label == MODE)


def steps_of_momentum(gradient: Any) -> Any:
    buffer, steps = np.zeros_like(gradient[0]), []
    for each in gradient:
        buffer = 0.9 * buffer + each
        steps.append(buffer)
    return np.stack(steps)


STEP = np.arange(4)[:, None, None]
UPDATES: dict[str, Callable[[Any, Any], Any]] = {
    "the step is the right one multiplied by W (the number of ranks) or 2": lambda n, s: 2 * n,
    "made of the clipped sum without its noise": lambda n, s: s,
    "momentum 0.9, which is not asked for": lambda n, s: steps_of_momentum(n),
    "the step is the negative of the right one": lambda n, s: -n,
    "made of the gradient of the step before": lambda n, s: np.concatenate([n[:1], n[:-1]]),
    "multiplied by 0.9 from one step to the next": lambda n, s: n * 0.9**STEP,
    "0.98 times the right one": lambda n, s: n * np.where(np.arange(4)[:, None] == 2, 0.98, 1),
    "the learning rate is 2, 1 times the right one from step 2 on": lambda n, s: (
        n * np.where(STEP == 2, 2, 1)
    ),
    "multiplied by 1 over the number of the step, from 1": lambda n, s: n / (1 + STEP),
    "multiplied by 0 at step 1": lambda n, s: n * (STEP != 1),
    "right in direction but not in length: each parameter is multiplied by a factor of its own": (
        lambda n, s: n / np.sqrt(np.square(n).mean(axis=2, keepdims=True))
    ),
}


@pytest.mark.parametrize("said", UPDATES)
def test_a_wrong_step_is_explained(said: str) -> None:
    t = trajectory(noise_std=100.0, samples=12)
    used = UPDATES[said](t.noised_sketch, t.gradient_sketch)
    path = -TRAINED.learning_rate * used / t.expected_batch_size
    sentence = trained(t.noised_sketch, path, t).sentence
    assert said in sentence or said.replace("W (the number of ranks) or 2", "2 or W") in sentence


def test_parameters_that_the_optimizer_lacks_are_named_without_a_baseline() -> None:
    t = trajectory(noise_std=100.0, samples=12)
    path = -TRAINED.learning_rate * t.noised_sketch / t.expected_batch_size
    path[:, 2] = 0
    alone = replace(t, weight_sketch=3.0 + np.cumsum(path, axis=0))
    run = mode_run(MODE, record=alone, setup=replace(TRAINED, optimizer="adamw"))
    (verdict,) = (mode for mode in compared([run]).modes)
    assert verdict.verdict == "BUG"
    assert "the optimizer lacks them" in verdict.sentence
    assert verdict.culprit is not None
    assert verdict.culprit.places == ("model.layers.2.weight",)


def test_a_scaled_division_is_not_called_noise() -> None:
    t = base()
    sentence = found(replace(t, noised_sketch=t.noised_sketch / 12)).sentence
    assert "divides the sum wrongly: it is the right one divided by B" in sentence
    assert "noise" not in sentence
    sentence = found(replace(t, noised_sketch=t.noised_sketch * 12 / 7)).sentence
    assert "it is divided by 7 rather than 12, the expected batch size" in sentence


def test_two_independent_errors_are_both_named() -> None:
    wrong = with_total(base(), NORM * 3)
    both = summed(wrong, np.where(IS_RANK_1, 0, wrong.clip_factor))
    sentence = found(both).sentence
    assert "computes wrong per-sample norms" in sentence
    assert "Besides, it computes a wrong clipped sum: it is the sum over rank 0 alone" in sentence
    assert "Besides" not in found(wrong).sentence


def test_a_sum_beyond_n_c_is_said_first_of_a_mode_that_reports_nothing() -> None:
    t = base()
    silent = {
        name: np.full_like(getattr(t, name), np.nan) for name in ("sample_norm", "clip_factor")
    }
    by_parameter = np.full_like(t.sample_norm_by_parameter, np.nan)
    long = t.max_grad_norm * t.num_samples * 1.5 / t.expected_batch_size
    wrong = replace(t, **silent, sample_norm_by_parameter=by_parameter, grad_norm=long)
    run = mode_run("package.mine:Mode", "clip", wrong)
    (verdict,) = (mode for mode in compared([run]).modes)
    assert verdict.verdict == "BUG"
    assert (
        "breaks the privacy bound (the clipped sum of 12 samples is 18 C long" in verdict.sentence
    )
    plain = mode_run("no_dp", "clip", wrong)
    (verdict,) = (mode for mode in compared([plain]).modes)
    assert "privacy" not in verdict.sentence


def test_the_stage_where_nan_began_is_on_the_ladder_and_in_the_sentence() -> None:
    wrong = put(base(), "gradient_sketch", np.nan, (2, 3))
    wrong = replace(wrong, noised_sketch=wrong.gradient_sketch)
    verdict = found(wrong)
    assert (
        "computes a wrong clipped sum (NaN): first at step 2 of clip, in model.layers.3.weight"
        in (verdict.sentence)
    )
    statuses = {r.stage.value: r.status.value for r in verdict.ladders["clip", "reference"]}
    assert (statuses["clipped sum"], statuses["noise"]) == ("introduced", "inherited")


def with_losses(t: Trajectory, sample_loss: Any) -> Trajectory:
    return replace(t, sample_loss=sample_loss, loss=sample_loss.mean(axis=1))


def test_weights_that_the_mode_changed_before_its_first_step_are_named() -> None:
    t, other = base(), base().weight_sketch.copy()
    other[:, 2] *= 1.1
    changed = with_losses(replace(t, weight_sketch=other), 1.01 * t.sample_loss)
    verdict = found(changed)
    assert "starts from other weights: first at step 0 of clip, in model.layers.2.weight" in (
        verdict.sentence
    )
    statuses = {r.stage.value: r.status.value for r in verdict.ladders["clip", "reference"]}
    assert (statuses["initial weights"], statuses["loss"]) == ("introduced", "inherited")
    # Right losses show that it was the step that moved them.
    assert "starts from other weights" not in found(replace(t, weight_sketch=other)).sentence


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_losses_of_other_weights_are_not_taken_for_weighed_or_rounded_ones(size: float) -> None:
    t = base()
    off = size * np.random.default_rng(0).standard_normal(t.sample_loss.shape)
    said = found(with_losses(t, t.sample_loss * (1 + off))).sentence
    assert "computes wrong losses" in said
    assert "numbers of targets" not in said
    assert ("bfloat16" in said) == (size < 2e-3)


def test_alternatives_that_another_comparison_rules_out_are_dropped() -> None:
    two, ranks, batches = (Explanation(sentence=s, name=s) for s in ("by 2", "by W", "by K"))
    first, second = Cause(explanations=(two, ranks)), Cause(explanations=(ranks, batches))
    assert agreed([first, Cause(), second]).sentence == "by W"
    assert agreed([first, Cause(explanations=(batches,))]).sentence == "by 2 or by W"
    assert agreed([]).sentence == ""
    assert (
        either(["it is by 2", "it is by W (ranks)", "it is by K"]) == "it is by 2 or W (ranks) or K"
    )
    assert (
        either(["the first is lost", "the last counts"]) == "the first is lost or the last counts"
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_record_is_too_odd_to_be_explained(seed: int) -> None:
    rng = np.random.default_rng(seed)
    odd = base()
    for name in ("sample_loss", "sample_norm", "clip_factor", "gradient_sketch", "noised_sketch"):
        values = getattr(odd, name).copy()
        values.flat[rng.integers(0, values.size, 3)] = rng.choice([np.nan, np.inf, 0.0, -1e100], 3)
        with np.errstate(all="ignore"):
            odd = replace(odd, **{name: values * rng.choice([0.0, 1.0, 1e-30, 1e30])})
    assert found(odd).verdict == "BUG"


def test_norms_that_scatter_about_the_right_ones_are_told_as_estimates() -> None:
    off = np.random.default_rng(0).normal(0, 0.2, BY_PARAMETER.shape)
    by_parameter = BY_PARAMETER * np.sqrt(1 + off)
    norm = np.sqrt(np.square(by_parameter).sum(axis=2))
    wrong = with_total(replace(base(), sample_norm_by_parameter=by_parameter), norm)
    assert "right on average only: squares scatter by " in found(wrong).sentence
    by_parameter = BY_PARAMETER * np.sqrt(1 + np.abs(off))
    norm = np.sqrt(np.square(by_parameter).sum(axis=2))
    wrong = with_total(replace(base(), sample_norm_by_parameter=by_parameter), norm)
    assert "on average" not in found(wrong).sentence


def test_a_healthy_mode_is_explained_by_nothing() -> None:
    verdict = found(base())
    assert verdict.verdict == "PASS"
    assert verdict.culprit is None
