"""Every tiled computation equals its definition, at shapes one past a tile in each dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dpsgd_track.kernels import left_out
from dpsgd_track.kernels.clipped_product import reference as product
from dpsgd_track.kernels.embedding_norm import embedding_norm_sq, per_sample_norm_sq
from dpsgd_track.kernels.flash_norm import flash_norm_sq, outer_norm_sq
from dpsgd_track.kernels.flash_norm.reference import TILE_P, TILE_T, gram_form, outer_form
from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, norm_and_sketch
from dpsgd_track.kernels.sketch.reference import BLOCK_ELEMENTS
from dpsgd_track.kernels.weighted_sum import reference as sums
from dpsgd_track.privacy.terms import Dense, Outer, Rows, Term, clipped_sums_of

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


NAN, INF = float("nan"), float("inf")
LEFT_OUT = [(0,), (1,), (3,), (0, 2, 3), (0, 1, 2, 3)]
"""Samples of four: the first, one in the middle, the last, several, all."""
Sum = Callable[[list[Tensor], Tensor], list[Tensor]]


def _rows(operands: list[Tensor], factor: Tensor) -> list[Tensor]:
    tokens = torch.arange(operands[0].shape[1]).remainder(3).expand(4, -1)[: len(factor)]
    return [Rows(tokens, operands[0], 5).clipped_sum(factor)]


def _joined(operands: list[Tensor], factor: Tensor) -> list[Tensor]:
    tokens = torch.zeros(operands[2].shape[:2], dtype=torch.int64)
    terms = (Outer(operands[0], operands[1]), Rows(tokens, operands[2], operands[1].shape[2]))
    joined: dict[str, tuple[Term, ...]] = {"tied": terms, "dense": (Dense(operands[3]),)}
    return list(clipped_sums_of(joined, dict.fromkeys(joined, factor)).values())


def _weighted(operands: list[Tensor], factor: Tensor) -> list[Tensor]:
    return sums.weighted_sums(operands, [factor] * len(operands))


# Name: (shapes of the operands, what forms clipped sums of them).
SUMS: dict[str, tuple[list[tuple[int, ...]], Sum]] = {
    "product, D < P": ([(17, 7), (17, 9)], lambda ops, c: [product.clipped_product(*ops, c)]),
    "product, D > P": ([(17, 9), (17, 7)], lambda ops, c: [product.clipped_product(*ops, c)]),
    "kept gradients": ([(33, 5), (), (7,), (2, 3, 4)], _weighted),
    "turned gradients": ([(33, 5)], lambda ops, c: _weighted([ops[0].mT], c)),
    "rows": ([(17, 6)], _rows),
    "joined terms": ([(17, 6), (17, 9), (4, 6), (3, 2)], _joined),
}


def _operands(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    found = [torch.randn(4, *shape, generator=generator).to(dtype) for shape in SUMS[name][0]]
    factor = torch.tensor([0.7, 1.0, 3e-4, 0.2])
    return found, factor.double() if dtype == torch.float64 else factor


@pytest.fixture(params=["cpu", "elsewhere"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """True if the factors may be inspected, as on a CPU; a GPU would make that wait."""
    if request.param == "elsewhere":
        monkeypatch.setattr(Tensor, "is_cpu", False)
    return bool(request.param == "cpu")


@contextmanager
def _nobody_looks(is_forbidden: bool) -> Iterator[None]:
    """Fail where a value is asked for, as that would wait for a device."""
    with pytest.MonkeyPatch.context() as patch:
        for look in ("__bool__", "item", "tolist", "nonzero") if is_forbidden else ():
            patch.setattr(Tensor, look, lambda *args: pytest.fail("waits for the device"))
        yield


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_a_sample_of_factor_0_adds_nothing_whatever_it_is(
    name: str, dtype: torch.dtype, value: float, looks: bool
) -> None:
    form = SUMS[name][1]
    for samples in LEFT_OUT:
        operands, factor = _operands(name, dtype)
        factor[list(samples)] = 0
        zeroed = [x.clone() for x in operands]
        for x in zeroed:
            x[list(samples)] = 0
        wanted = form(zeroed, factor)
        # In each operand by itself, as a NaN times 0 in the other would do, and in all.
        for spoilt in [*([x] for x in operands), operands]:
            before = [x.clone() for x in spoilt]
            for x in spoilt:
                x[list(samples)] = value
            with _nobody_looks(not looks):
                totals = form(operands, factor)
            for total, expected in zip(totals, wanted, strict=True):
                assert torch.equal(total, expected)
            for x, old in zip(spoilt, before, strict=True):
                x.copy_(old)


@pytest.mark.parametrize("name", SUMS)
def test_on_cpu_the_others_add_up_as_if_it_were_not_there(name: str) -> None:
    form = SUMS[name][1]
    for samples in LEFT_OUT:
        operands, factor = _operands(name, torch.float32)
        factor[list(samples)] = 0
        kept = [i for i in range(4) if i not in samples]
        wanted = form([x[kept] for x in operands], factor[kept])
        for x in operands:
            x[list(samples)] = NAN
        for total, expected in zip(form(operands, factor), wanted, strict=True):
            assert torch.equal(total, expected)


def _unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: nothing is left out, and 0 is a factor like any other."""
    for module in (left_out, product, sums):
        monkeypatch.setattr(module, "kept_samples", lambda factor_B: None)


@pytest.mark.parametrize("name", [name for name in SUMS if name != "rows"])
def test_without_the_mask_nan_would_poison_the_sum(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unmasked(monkeypatch)
    operands, factor = _operands(name, torch.float32)
    factor[1] = 0
    operands[0][1] = NAN
    assert any(total.isnan().any() for total in SUMS[name][1](operands, factor))


def test_where_all_samples_are_kept_a_cpu_copies_nothing() -> None:
    factor, x = torch.tensor([0.1, 1.0]), torch.ones(2, 3)
    assert left_out.kept_samples(factor) is None
    assert left_out.only_kept(x, None) is x


@pytest.mark.parametrize("name", SUMS)
def test_an_empty_batch_has_sums_of_zeros(name: str) -> None:
    operands, factor = _operands(name, torch.float32)
    for total in SUMS[name][1]([x[:0] for x in operands], factor[:0]):
        assert not total.any()
