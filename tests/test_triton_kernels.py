"""Every Triton kernel equals its reference: on a GPU for real, elsewhere under the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="needs triton")

from dpsgd_track.kernels.clipped_product import reference as product_reference  # noqa: E402
from dpsgd_track.kernels.clipped_product import triton as product  # noqa: E402
from dpsgd_track.kernels.embedding_norm import reference as embedding_reference  # noqa: E402
from dpsgd_track.kernels.embedding_norm import triton as embedding  # noqa: E402
from dpsgd_track.kernels.flash_norm import outer_norm_sq  # noqa: E402
from dpsgd_track.kernels.flash_norm import triton as flash  # noqa: E402
from dpsgd_track.kernels.gaussian_noise import reference as noise_reference  # noqa: E402
from dpsgd_track.kernels.gaussian_noise import triton as noise  # noqa: E402
from dpsgd_track.kernels.normalisation import reference as normalisation_reference  # noqa: E402
from dpsgd_track.kernels.normalisation import triton as normalisation  # noqa: E402
from dpsgd_track.kernels.position_sum import triton as position_sum  # noqa: E402
from dpsgd_track.kernels.weighted_sum import reference as sum_reference  # noqa: E402
from dpsgd_track.kernels.weighted_sum import triton as weighted_sum  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter's products take float16, and not bfloat16.
LOW = torch.bfloat16 if ON_GPU else torch.float16
# Sums of up to 300 float32 products, beside the same in float64.
TOLERANCE = 2e-6

# One past a tile in every dimension, and less than one.
SHAPES = [(1, 1, 1, 1), (2, 65, 257, 129), (3, 129, 65, 17)]


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in zip("BTDP", shape, strict=False))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel is given to write to is full of NaN."""
    plain = Tensor.new_empty

    def new_empty(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        found = plain(tensor, *args, **kwargs)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    return


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def uniform(num_samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_samples, generator=generator).to(DEVICE)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def factors(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    B, T, D, P = shape
    return random(B, T, D, dtype=LOW), random(B, T, P, dtype=LOW, seed=1)


@pytest.mark.parametrize("form", ["outer_form", "gram_form"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_flash_norm_equals_its_definition(form: str, shape: tuple[int, int, int, int]) -> None:
    x, dy = factors(shape)
    found = getattr(flash, form)(x, dy)
    assert found.dtype == torch.float32
    # The Gram form adds T^2 products of either sign.
    assert relative_error(found, outer_norm_sq(x.double(), dy.double())) < 10 * TOLERANCE


def test_the_flash_norm_reads_factors_that_are_parts_of_a_tensor() -> None:
    whole = random(2, 40, 3 * 32, dtype=LOW)
    x, dy = whole[..., :32], whole[..., 64:]
    wanted = outer_norm_sq(x.double(), dy.double())
    assert relative_error(flash.outer_form(x, dy), wanted) < TOLERANCE
    assert relative_error(flash.gram_form(x.mT.contiguous().mT, dy), wanted) < 10 * TOLERANCE


@pytest.mark.parametrize("form", ["outer_form", "gram_form"])
def test_nan_stays_in_its_own_sample(form: str) -> None:
    x, dy = factors((3, 65, 17, 33))
    dy[1, 64, 32] = float("nan")
    assert getattr(flash, form)(x, dy).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_norms_beside_gradients_are_those_of_the_gradients_as_stored(
    shape: tuple[int, int, int, int],
) -> None:
    x, dy = factors(shape)
    grad, norms = flash.gradients_and_norms(x, dy)
    assert grad.dtype == LOW
    exact = torch.einsum("btp,btd->bpd", dy.double(), x.double())
    # One rounding to 16 bits.
    assert relative_error(grad, exact) < torch.finfo(LOW).eps
    assert relative_error(norms, grad.double().square().sum(dim=(1, 2))) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_clipped_product_weighs_each_sample(shape: tuple[int, int, int, int]) -> None:
    x, dy = factors(shape)
    # Factors of very unlike size: each sample must have its own.
    factor = torch.tensor([1.0, 3e-4, 0.7][: len(x)], device=DEVICE)
    found = product.clipped_product(x, dy, factor)
    wanted = product_reference.clipped_product(x.double(), dy.double(), factor.double())
    assert relative_error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 9, 16])
def test_the_clipped_product_of_samples_in_parts(
    num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy = factors((num_samples, 70, 40, 24))
    factor = uniform(num_samples) + 1e-3
    wanted = product_reference.clipped_product(x.double(), dy.double(), factor.double())
    for num_parts in range(1, 9):
        monkeypatch.setattr(product, "num_parts_of", lambda *_, n=num_parts: n)
        found = product.clipped_product(x, dy, factor)
        assert relative_error(found, wanted) < TOLERANCE


def layers() -> list[tuple[Tensor, Tensor]]:
    """Factors of layers of one batch: on tiles and beside them, transposed, at odd addresses."""
    shapes = [(3, 64, 128, 128), (3, 65, 257, 129), (3, 1, 1, 1), (3, 128, 64, 128)]
    found = [factors(shape) for shape in shapes]
    x, dy = factors((3, 33, 48, 40))
    return [
        *found,
        (x.mT.contiguous().mT, dy),
        (x[:, 1:, 1:], dy[:, :-1, :-1]),
        (x[:, ::2], dy[:, ::2]),
    ]


def test_many_layers_in_one_launch_have_the_norms_of_each() -> None:
    norms = flash.gram_forms(layers())
    for found, (x, dy) in zip(norms, layers(), strict=True):
        assert relative_error(found, outer_norm_sq(x.double(), dy.double())) < 10 * TOLERANCE


def test_many_layers_in_one_launch_have_the_clipped_products_of_each() -> None:
    factor = torch.tensor([1.0, 3e-4, 0.7], device=DEVICE)
    sums = product.clipped_products(layers(), [factor] * len(layers()))
    for found, (x, dy) in zip(sums, layers(), strict=True):
        wanted = product_reference.clipped_product(x.double(), dy.double(), factor.double())
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("gap", [0, 1, 16])
def test_clipped_products_go_to_the_rows_of_ranks(
    num_ranks: int, num_parts: int, gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "num_parts_of", lambda *_: num_parts)
    factor = torch.tensor([1.0, 3e-4, 0.7], device=DEVICE)
    shapes = [(dy.shape[2], x.shape[2]) for x, dy in layers()]
    widths = [-(-rows // num_ranks) * columns for rows, columns in shapes]
    sizes = [size for width in widths for size in (width, gap)]
    sent = torch.full((num_ranks, sum(sizes)), float("nan"), device=DEVICE)
    outs = sent.split(sizes, dim=1)[::2]
    product.clipped_products_into(outs, layers(), [factor] * len(outs))
    for out, (x, dy) in zip(outs, layers(), strict=True):
        exact = product_reference.clipped_product(x.double(), dy.double(), factor.double())
        found = out.flatten()
        assert relative_error(found[: exact.numel()], exact.flatten()) < TOLERANCE
        # Nothing beyond the end is touched.
        assert found[exact.numel() :].isnan().all()
    for between in sent.split(sizes, dim=1)[1::2]:
        assert between.isnan().all()


def gradients() -> list[Tensor]:
    """Of several sizes, types and orders in memory, one of them at an odd address."""
    B = 3
    return [
        random(B, 5, dtype=LOW),
        random(B, 1, 4096 * 8 + 1),
        random(B, 65, 33, dtype=LOW),
        random(B, 65, 129, dtype=LOW).mT,
        random(B, 64, 64).mT,
        random(B, 1, dtype=torch.float16),
        random(B * 7 + 1, dtype=torch.float16)[1:].view(B, 7),
        random(B, dtype=torch.float32),
        random(B, 2, 3, 4, dtype=LOW),
    ]


def even_gradients() -> list[Tensor]:
    """Such as real layers have: 16 bytes at a time are read and written."""
    return [random(3, 64, 128, dtype=LOW).mT, random(3, 32, 16, dtype=LOW), random(3, 1, 4096 * 9)]


@pytest.fixture(params=[gradients, even_gradients], ids=["odd", "even"])
def grads(request: pytest.FixtureRequest) -> list[Tensor]:
    found: list[Tensor] = request.param()
    return found


def test_kept_gradients_have_the_norms_of_the_reference(grads: list[Tensor]) -> None:
    found = weighted_sum.norms_sq(grads)
    wanted = sum_reference.norms_sq([grad.double() for grad in grads])
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE, atol=0)


def test_kept_gradients_are_weighed_and_laid_out_like_the_parameter(grads: list[Tensor]) -> None:
    factor = torch.tensor([0.3, 1.0, 2e-3], device=DEVICE)
    found = weighted_sum.weighted_sums(grads, [factor] * len(grads))
    for grad, total in zip(grads, found, strict=True):
        assert total.shape == grad.shape[1:]
        assert total.is_contiguous()
        wanted = torch.tensordot(factor.double(), grad.double(), dims=1)
        assert relative_error(total, wanted) < TOLERANCE


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(65, 33), (64, 128)], ids=["odd", "even"])
def test_gradients_that_lie_apart_are_weighed_where_they_are(
    shape: tuple[int, int], is_transposed: bool
) -> None:
    # A column of what several ranks have sent, side by side.
    size = shape[0] * shape[1]
    received = random(3, 16 + size + 48, dtype=LOW)
    grad = received[:, 16 : 16 + size].unflatten(1, shape)
    grad = grad.mT if is_transposed else grad
    factor = torch.tensor([0.3, 0.0, 2e-3], device=DEVICE)
    (total,) = weighted_sum.weighted_sums([grad], [factor])
    wanted = torch.tensordot(factor.double(), grad.double(), dims=1)
    assert total.is_contiguous()
    assert relative_error(total, wanted) < TOLERANCE


@pytest.mark.parametrize("is_centred", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 33), (3, 16, 64)], ids=shape_id)
def test_normalisation_layers_have_the_gradients_of_the_reference(
    shape: tuple[int, int, int], is_centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Off centre, or the mean would hardly matter.
    x, dy = random(*shape) + 1, random(*shape, seed=1)
    wanted = normalisation_reference.weight_and_bias_parts(
        x.double(), dy.double(), 1e-5, is_centred=is_centred
    )
    for least in (1, 5, normalisation.MIN_POSITIONS):
        monkeypatch.setattr(normalisation, "MIN_POSITIONS", least)
        found = normalisation.weight_and_bias_parts(x, dy, 1e-5, is_centred=is_centred)
        for parts, exact in zip(found, wanted, strict=True):
            assert parts.shape[1] == -(-shape[1] // least)
            total = parts.double().sum(dim=1, keepdim=True)
            torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-5)


def positions() -> list[Tensor]:
    """By position: beside tiles, of one position, transposed, at an odd address, in a slice."""
    B = 3
    return [
        random(B, 33, 129, dtype=LOW),
        random(B, 1, 5),
        random(B, 7, 64).mT,
        random(B * 35 * 3 + 1, dtype=torch.float16)[1:].view(B, 35, 3),
        random(B, 40, 256, dtype=LOW)[:, ::2, :130],
    ]


def even_positions() -> list[Tensor]:
    return [random(3, 64, 128, dtype=LOW), random(3, 32, 16), random(3, 31, 144, dtype=LOW)]


@pytest.mark.parametrize("make", [positions, even_positions], ids=["odd", "even"])
def test_positions_of_many_layers_are_summed(make: Callable[[], list[Tensor]]) -> None:
    found = position_sum.position_sums(make())
    for total, gradient in zip(found, make(), strict=True):
        exact = gradient.double().sum(dim=1)
        assert total.shape == exact.shape
        assert relative_error(total, exact) < TOLERANCE


def test_each_layer_has_factors_of_its_own(grads: list[Tensor]) -> None:
    many = [uniform(3, seed=n) + 0.1 * n for n in range(len(grads))]
    for total, grad, factor in zip(
        weighted_sum.weighted_sums(grads, many), grads, many, strict=True
    ):
        wanted = torch.tensordot(factor.double(), grad.double(), dims=1)
        assert relative_error(total, wanted) < TOLERANCE
    many = [uniform(3, seed=n) + 0.1 * n for n in range(len(layers()))]
    for total, (x, dy), factor in zip(
        product.clipped_products(layers(), many), layers(), many, strict=True
    ):
        exact = product_reference.clipped_product(x.double(), dy.double(), factor.double())
        assert relative_error(total, exact) < TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 5, 1000], ids=lambda n: f"V{n}")
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 33), (2, 35, 513)], ids=shape_id)
def test_the_embedding_norm_adds_equal_tokens(shape: tuple[int, int, int], num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    tokens = torch.randint(0, num_tokens, shape[:2], generator=generator).to(DEVICE)
    dy = random(*shape, dtype=LOW)
    found = embedding.embedding_norm_sq(tokens, dy)
    assert relative_error(found, embedding_reference.embedding_norm_sq(tokens, dy.double())) < (
        TOLERANCE
    )


def test_philox_gives_the_published_words() -> None:
    # Random123's known answers, of Salmon et al., 2011.
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    found = noise_reference.philox(
        tuple(np.array([word], dtype=np.uint64) for word in counter), (0xA4093822, 0x299F31D0)
    )
    assert [int(words[0]) for words in found] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


KEYS = [(0x12345678, 0x9ABCDEF0, 0xDEADBEEF, 0xFFFFFFFF), (1, 2, 3, 4), (1, 2, 3, 5)]


@pytest.mark.parametrize("start", [0, 3, 4 * 256, 2**33 + 1])
def test_the_noise_of_a_shard_is_that_of_the_reference(start: int) -> None:
    sizes = [1029, 1, 4]
    found = [random(size) for size in sizes]
    wanted = [x.double() for x in found]
    noise.add_gaussian(found, [start, 5, 0], KEYS, std=2.5)
    noise_reference.add_gaussian(wanted, [start, 5, 0], KEYS, std=2.5)
    for x, y in zip(found, wanted, strict=True):
        # float32 rounds the angle and the root of the logarithm.
        torch.testing.assert_close(x.double(), y, rtol=0, atol=5e-5)


def test_the_noise_of_an_element_does_not_depend_on_the_shard() -> None:
    whole, parts = torch.zeros(4099, device=DEVICE), torch.zeros(4099, device=DEVICE)
    noise.add_gaussian([whole], [0], KEYS[:1], std=1.0)
    cuts = [0, 1, 1030, 1032, 4099]
    pieces = [parts[a:b] for a, b in itertools.pairwise(cuts)]
    noise.add_gaussian(pieces, cuts[:-1], KEYS[:1] * len(pieces), std=1.0)
    assert torch.equal(whole, parts)


def test_the_noise_is_normal_and_other_keys_draw_other_noise() -> None:
    draws = noise_reference.standard_normal(0, 200_000, KEYS[1])
    assert abs(draws.mean()) < 5 / np.sqrt(len(draws))
    assert abs(draws.std() - 1) < 5 / np.sqrt(2 * len(draws))
    # The fourth moment of a normal is 3, its estimate's deviation the root of 96 / n.
    assert abs((draws**4).mean() - 3) < 5 * np.sqrt(96 / len(draws))
    for lag in (1, 2, 3, 4):
        assert abs((draws[lag:] * draws[:-lag]).mean()) < 5 / np.sqrt(len(draws))
    others = noise_reference.standard_normal(0, 200_000, KEYS[2])
    assert abs((draws * others).mean()) < 5 / np.sqrt(len(draws))


@pytest.mark.parametrize("width_of", [lambda n: n, lambda n: -(-n // 2), lambda n: -(-n // 3)])
def test_weighed_sums_go_to_the_rows_of_ranks(
    grads: list[Tensor], width_of: Callable[[int], int]
) -> None:
    # As parameters are divided: by whole rows, the last ranks holding fewer or none.
    grads = [grad for grad in grads if grad.dim() > 1]
    factor = torch.tensor([0.3, 1.0, 2e-3], device=DEVICE)
    widths = [width_of(grad.shape[1]) * grad.shape[2:].numel() for grad in grads]
    packed = torch.full((3, sum(widths)), float("nan"), device=DEVICE)
    outs = packed.split(widths, dim=1)
    weighted_sum.weighted_sums_into(outs, grads, [factor] * len(grads))
    for out, grad in zip(outs, grads, strict=True):
        total = torch.tensordot(factor.double(), grad.double(), dims=1).flatten()
        found = out.flatten()
        assert relative_error(found[: len(total)], total) < TOLERANCE
        # Nothing beyond the end is touched.
        assert found[len(total) :].isnan().all()


# The first sample, one in the middle, the last, several, all of four.
LEFT_OUT = [(0,), (1,), (3,), (0, 2), (0, 1, 2, 3)]
NAN, INF = float("nan"), float("inf")
# Too small a number to be divided by: the product leaves such a sample out as well.
DENORMAL = 1e-39


def four_factors(samples: tuple[int, ...], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Factors of four samples, `value` for some, and the indices of the others."""
    factor = torch.tensor([0.7, 1.0, 3e-4, 0.2])
    factor[list(samples)] = value
    return factor.to(DEVICE), [i for i in range(4) if i not in samples]


def spoilt(whole: Tensor, samples: tuple[int, ...], value: float | None) -> Tensor:
    """A copy in the same order in memory, with `value` in all of some samples' elements."""
    found = whole.clone(memory_format=torch.preserve_format)
    if value is not None:
        found[list(samples)] = value
    return found


@pytest.mark.parametrize("max_parts", [1, 8])
@pytest.mark.parametrize("small", [0.0, DENORMAL])
@pytest.mark.parametrize("samples", LEFT_OUT, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 129, 17), (64, 128, 128)], ids=shape_id)
def test_the_clipped_product_leaves_out_samples_of_factor_0(
    shape: tuple[int, int, int],
    samples: tuple[int, ...],
    small: float,
    max_parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(product, "MAX_PARTS", max_parts)
    x, dy = factors((4, *shape))
    factor, kept = four_factors(samples, small)
    if max_parts == 1:
        # Bit for bit what the other samples' batch has, so that no division has touched it.
        wanted = product.clipped_product(x[kept], dy[kept], factor[kept])
    else:
        # Divided among programs, the others are added in another order.
        zeros = spoilt(x, samples, 0.0), spoilt(dy, samples, 0.0)
        wanted = product.clipped_product(*zeros, factor)
    exact = product_reference.clipped_product(
        x[kept].double(), dy[kept].double(), factor[kept].double()
    )
    assert relative_error(wanted, exact) < TOLERANCE if kept else not wanted.any()
    for value_x, value_dy in ((NAN, None), (None, INF), (None, NAN), (-INF, INF)):
        bad_x, bad_dy = spoilt(x, samples, value_x), spoilt(dy, samples, value_dy)
        assert torch.equal(product.clipped_product(bad_x, bad_dy, factor), wanted)
        # The test has power: such a sample times a factor of 0 is NaN.
        terms = torch.einsum("b,btp,btd->pd", factor, bad_dy.float(), bad_x.float())
        assert not terms.isfinite().any()


@pytest.mark.parametrize("samples", LEFT_OUT, ids=str)
def test_weighed_sums_leave_out_samples_of_factor_0(samples: tuple[int, ...]) -> None:
    factor, kept = four_factors(samples)
    whole = [
        random(4, dtype=torch.bfloat16),
        random(4, 4097),
        random(4, 65, 33, dtype=torch.float16),
        random(4, 64, 64, dtype=torch.bfloat16),
        random(4, 65, 129).mT,
        random(4, 65, 3, dtype=torch.float16).mT,
        random(4, 64, 64, dtype=torch.bfloat16).mT,
    ]
    zeroed = weighted_sum.weighted_sums(
        [spoilt(grad, samples, 0.0) for grad in whole], [factor] * len(whole)
    )
    for value in (NAN, INF):
        bad = [spoilt(grad, samples, value) for grad in whole]
        found = weighted_sum.weighted_sums(bad, [factor] * len(bad))
        for grad, total, wanted in zip(bad, found, zeroed, strict=True):
            assert torch.equal(total, wanted)
            # The test has power: such a sample times 0 is NaN.
            assert not torch.tensordot(factor, grad.float(), dims=1).isfinite().any()
    if kept:
        others = [g.mT[kept].mT if weighted_sum._is_transposed(g) else g[kept] for g in whole]
        alone = weighted_sum.weighted_sums(others, [factor[kept]] * len(others))
        assert all(map(torch.equal, zeroed, alone))
