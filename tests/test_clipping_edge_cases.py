"""Clip factors and norms at the edges of floating point, and the range of C that follows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsgd_track.config import MAX_GRAD_NORMS, PrivacyConfig, RegimeConfig
from dpsgd_track.kernels.embedding_norm import embedding_norm_sq
from dpsgd_track.kernels.flash_norm.reference import gram_form, outer_form
from dpsgd_track.kernels.weighted_sum import norms_sq
from dpsgd_track.privacy.clipping import clip_factors, total_norm

NAN, INF = float("nan"), float("inf")
SMALLEST, LARGEST = MAX_GRAD_NORMS
FLOATS = [torch.float32, torch.float64]
# A quotient of two numbers that were rounded, and its own rounding.
ROUNDING = {torch.float32: 2e-7, torch.float64: 4e-16}


def factor_of(norm: float, bound: float, dtype: torch.dtype = torch.float32) -> float:
    found = clip_factors(torch.tensor([norm], dtype=dtype), bound)
    assert found.dtype == dtype
    return float(found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bound", [SMALLEST, 1.0, LARGEST])
class TestEachRowOfTheTable:
    """Of `clip_factors`."""

    def test_norm_0(self, bound: float, dtype: torch.dtype) -> None:
        assert factor_of(0.0, bound, dtype) == 1

    def test_denormal_norm(self, bound: float, dtype: torch.dtype) -> None:
        smallest = torch.finfo(dtype).smallest_normal
        assert factor_of(smallest / 2, bound, dtype) == 1
        assert factor_of(smallest * torch.finfo(dtype).eps, bound, dtype) == 1

    def test_norm_up_to_c(self, bound: float, dtype: torch.dtype) -> None:
        assert factor_of(bound / 3, bound, dtype) == factor_of(bound, bound, dtype) == 1

    def test_norm_beyond_c(self, bound: float, dtype: torch.dtype) -> None:
        for ratio in (1.5, 3.0, 1e7):
            found = factor_of(bound * ratio, bound, dtype)
            assert found == pytest.approx(1 / ratio, rel=ROUNDING[dtype])

    def test_norm_far_beyond_c(self, bound: float, dtype: torch.dtype) -> None:
        for norm in torch.logspace(-300, 308, 2000, dtype=torch.float64).to(dtype).tolist():
            found = factor_of(norm, bound, dtype)
            if math.isinf(norm):
                assert found == 0
            else:
                # In float64, where the product is exact enough for either.
                assert found * norm <= bound * (1 + ROUNDING[dtype])
                assert found == 0 or found >= torch.finfo(dtype).tiny

    def test_infinite_norm(self, bound: float, dtype: torch.dtype) -> None:
        assert factor_of(INF, bound, dtype) == 0

    def test_norm_that_overflows(self, bound: float, dtype: torch.dtype) -> None:
        large = torch.tensor([torch.finfo(dtype).max ** 0.5 * 2], dtype=dtype)
        norm_B = total_norm({"w": large.square()})
        assert norm_B.isinf().all()
        assert clip_factors(norm_B, bound).tolist() == [0]

    def test_norm_nan(self, bound: float, dtype: torch.dtype) -> None:
        assert factor_of(NAN, bound, dtype) == 0

    def test_empty_batch(self, bound: float, dtype: torch.dtype) -> None:
        found = clip_factors(torch.zeros(0, dtype=dtype), bound)
        assert (found.shape, found.dtype) == ((0,), dtype)


def test_a_factor_with_too_few_bits_is_0() -> None:
    # 1.4e-45 is float32's smallest number: it would make 1.4 C of a norm of 1e36.
    assert float(torch.tensor(1e-9 / 1e36)) * 1e36 > 1.3e-9
    assert factor_of(1e36, 1e-9) == 0
    assert factor_of(2.0**127, 1.0) == 0


def test_a_denormal_norm_is_clipped_at_a_smaller_c() -> None:
    # Times 1 / norm, which is infinite, it would not be.
    assert factor_of(1e-40, 1e-41) == pytest.approx(0.1, rel=1e-3)


def test_a_c_beyond_float32_clips_nothing_finite() -> None:
    assert factor_of(3e38, 1e39) == factor_of(0.0, 1e39) == 1
    assert factor_of(INF, 1e39) == factor_of(NAN, 1e39) == 0


def test_factors_of_one_batch_do_not_touch_each_other() -> None:
    norm_B = torch.tensor([0.0, 1e-40, 0.5, 4.0, 1e30, INF, NAN])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.25, 1e-30, 0.0, 0.0])
    torch.testing.assert_close(clip_factors(norm_B, 1.0), expected, rtol=2e-7, atol=0)


def test_the_formula_alone_would_give_nan() -> None:
    """The planted bug: algorithm 1 as it is written."""
    assert (1.0 / torch.tensor([NAN])).clamp(max=1.0).isnan().all()
    assert (torch.tensor(1e39) / torch.tensor([INF])).clamp(max=1.0).isnan().all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_total_norm_keeps_what_is_not_finite_in_its_own_sample(bad: float) -> None:
    squares = {"w": torch.tensor([9.0, bad, 0.0]), "b": torch.tensor([16.0, 1.0, 0.0])}
    found = total_norm(squares)
    assert found[[0, 2]].tolist() == [5, 0]
    assert not found[1].isfinite()
    assert clip_factors(found, 1.0).tolist() == [pytest.approx(0.2), 0, 1]


def test_the_total_norm_is_infinite_where_only_the_sum_overflows() -> None:
    square = torch.tensor([2.0**127])
    assert total_norm({"w": square}).isfinite().all()
    assert total_norm({"w": square, "b": square}).isinf().all()


def test_the_total_norm_of_an_empty_batch_is_empty() -> None:
    assert total_norm({"w": torch.zeros(0), "b": torch.zeros(0)}).shape == (0,)


def _linear(form: Callable[[Tensor, Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Any, Any]:
    exact = torch.bmm(dy.double().mT, x.double()).square().sum(dim=(1, 2))
    return form(x, dy), exact


# All positions alike, so that nothing cancels; output gradients whose squares float32 holds as 0,
# beside one that it sees. Inputs have a norm of 1e5.
X = torch.full((1, 64, 1000), 1e5 / 64000**0.5)
DY = torch.full((1, 64, 1000), 2e-23)
UNDERFLOWING: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gram": lambda: _linear(gram_form, X, DY),
    "outer": lambda: _linear(outer_form, X * 1e-5, DY),
    "kept": lambda: (norms_sq([DY])[0], DY.double().square().sum(dim=(1, 2))),
    "rows": lambda: (
        embedding_norm_sq(torch.arange(64).view(1, 64), DY),
        DY.double().square().sum(dim=(1, 2)),
    ),
}


@pytest.mark.parametrize("name", UNDERFLOWING)
def test_what_underflows_in_a_norm_is_far_below_the_smallest_c(name: str) -> None:
    square, exact = UNDERFLOWING[name]()
    # The test has power: the gradient is not 0, and its norm is.
    assert float(square) == 0 < float(exact)
    contribution = float(exact) ** 0.5 * float(clip_factors(square.sqrt(), SMALLEST))
    assert contribution < 1e-3 * SMALLEST


def test_a_c_below_the_smallest_would_not_bound_a_gradient_that_underflows() -> None:
    square, exact = UNDERFLOWING["gram"]()
    tiny = 1e-17
    contribution = float(exact) ** 0.5 * float(clip_factors(square.sqrt(), tiny))
    assert contribution > 10 * tiny
    with pytest.raises(ValueError, match="max_grad_norm=1e-17: expected a number from 1e-06"):
        _privacy(max_grad_norm=tiny)


def _privacy(**changes: Any) -> PrivacyConfig:
    right = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 8}
    return PrivacyConfig(**(right | changes))


NO_NUMBERS = [NAN, INF, -INF, True, False, "1.0", None, 10**400, torch.tensor(1.0)]
REFUSED: dict[str, tuple[list[Any], str]] = {
    "max_grad_norm": (
        [*NO_NUMBERS, 0, 0.0, -1.0, SMALLEST / 2, 5e-324, LARGEST * 2, 1e39],
        "a number from 1e-06 to 1e+30. float32 cannot keep another bound.",
    ),
    "noise_multiplier": ([*NO_NUMBERS, -1.0, -1e-300], "a number >= 0."),
    "expected_batch_size": ([*NO_NUMBERS[:-2], 0, -1, 1.0, 1.5], "an integer >= 1."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_privacy_config_refuses_what_would_void_the_guarantee(name: str) -> None:
    values, allowed = REFUSED[name]
    setting = "sigma" if name == "noise_multiplier" else name
    for value in values:
        line = re.escape(f"{setting}={value!r}: expected {allowed}")
        with pytest.raises(ValueError, match=f"^{line}$"):
            _privacy(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": SMALLEST},
        {"max_grad_norm": LARGEST},
        {"max_grad_norm": 1},
        {"max_grad_norm": np.float32(0.5)},
        {"max_grad_norm": np.float64(0.5)},
        {"noise_multiplier": 0},
        {"noise_multiplier": 1e-3},
        {"expected_batch_size": np.int64(3)},
        {"expected_batch_size": 10**9},
    ],
    ids=str,
)
def test_the_privacy_config_takes_numbers_of_any_kind(changes: dict[str, Any]) -> None:
    _privacy(**changes)


@pytest.mark.parametrize("bound", [SMALLEST / 2, NAN, INF, True, "1.0"])
def test_a_regime_has_bounds_of_the_same_range(bound: Any) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm=.*: expected a number from 1e-06"):
        RegimeConfig(name="train", num_iter=2, max_grad_norms=(1.0, bound))
    RegimeConfig(name="train", num_iter=2, max_grad_norms=(SMALLEST, LARGEST))
