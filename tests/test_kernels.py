"""Every tiled computation equals its definition, at shapes one past a tile in each dimension."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dpsgd_track.kernels.embedding_norm import embedding_norm_sq, per_sample_norm_sq
from dpsgd_track.kernels.flash_norm import flash_norm_sq, outer_norm_sq
from dpsgd_track.kernels.flash_norm.reference import TILE_P, TILE_T, gram_form, outer_form
from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, norm_and_sketch
from dpsgd_track.kernels.sketch.reference import BLOCK_ELEMENTS

SHAPES = [
    (1, 1, 1, 1),
    (2, 17, 33, 31),
    (3, TILE_T + 1, 7, 5),
    (2, 5, 9, TILE_P + 1),
    (2, 2 * TILE_T + 1, 3, 2),
]


def _pair(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, D, P = shape
    generator = torch.Generator().manual_seed(B + T + D + P)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    return x, torch.randn(B, T, P, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("form", [gram_form, outer_form, flash_norm_sq])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-D{}-P{}".format(*s))
def test_each_form_equals_the_definition(form, shape) -> None:
    x, dy = _pair(shape)
    torch.testing.assert_close(form(x, dy), outer_norm_sq(x, dy), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", [gram_form, outer_form])
def test_low_precision_inputs_are_accumulated_in_float32(form) -> None:
    x, dy = _pair((2, 300, 64, 64))
    low_x, low_dy = x.bfloat16(), dy.bfloat16()
    got = form(low_x, low_dy)
    assert got.dtype == torch.float32
    # Of the rounded inputs the norm is exact to float32; rounding sums to bf16 costs 1e-2.
    exact = outer_norm_sq(low_x.double(), low_dy.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


def test_nan_stays_in_its_own_sample() -> None:
    x, dy = _pair((3, TILE_T + 1, 8, 8))
    dy[1, 0, 0] = float("nan")
    for form in (gram_form, outer_form):
        assert form(x, dy).isnan().tolist() == [False, True, False]


def test_the_embedding_norm_adds_repeated_tokens_before_squaring() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (4, 19), generator=generator)
    dy = torch.randn(4, 19, 6, generator=generator, dtype=torch.float64)
    expected = per_sample_norm_sq(tokens, dy, 5)
    torch.testing.assert_close(embedding_norm_sq(tokens, dy), expected, rtol=1e-12, atol=0)
    # The test has power: treating every position as its own row gives another number.
    assert not torch.allclose(dy.square().sum(dim=(1, 2)), expected, rtol=1e-2)


def _cut(whole: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    edges = [0, *cuts, whole.numel()]
    found = [norm_and_sketch("w", whole[a:b], a, whole.numel()) for a, b in pairwise(edges)]
    return torch.stack(found).sum(dim=0)


def test_the_sketch_does_not_depend_on_how_the_tensor_is_cut() -> None:
    size = 2 * BLOCK_ELEMENTS + 77
    whole = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = _cut(whole, [])
    for cuts in ([1], [BLOCK_ELEMENTS], [BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS], [0, size]):
        torch.testing.assert_close(_cut(whole, cuts), expected, rtol=1e-12, atol=1e-12)
    assert expected[0].item() == pytest.approx(whole.square().sum().item(), rel=1e-12)


def test_the_sketch_estimates_norms_without_bias() -> None:
    # 400 parameters' independent signs: the mean ratio has a standard error of about 0.018.
    ratios = []
    for number in range(400):
        x = torch.randn(300, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        found = norm_and_sketch(f"p{number}", x, 0, 300)
        ratios.append((found[1:].square().mean() / found[0]).item())
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.08)
    assert len(found) == 1 + NUM_PROJECTIONS


def test_the_sketch_sees_a_permutation_that_norms_do_not() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = norm_and_sketch("w", x, 0, 5000), norm_and_sketch("w", x.roll(1), 0, 5000)
    assert a[0].item() == pytest.approx(b[0].item(), rel=1e-12)
    distance = (a[1:] - b[1:]).square().mean().sqrt() / x.norm()
    assert distance > 0.5
