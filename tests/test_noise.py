"""The common noise depends on what it is for and on nothing else, and is calibrated to C."""

from __future__ import annotations

import math

import pytest
import torch

from dpsgd_track.distributed.sharding import LocalPart, row_range
from dpsgd_track.privacy.clipping import ClippedSum, clip_factors
from dpsgd_track.privacy.noise import BLOCK_ELEMENTS, NoiseSource, add_noise

SIGMA, C = 0.7, 0.37


def _parts(shape: tuple[int, ...], world_size: int, name: str = "w") -> list[LocalPart]:
    parts = []
    row = math.prod(shape[1:])
    for rank in range(world_size):
        first, last = row_range(shape[0], rank, world_size)
        local = torch.zeros(last - first, *shape[1:])
        parts.append(LocalPart(name, local, first * row, math.prod(shape)))
    return parts


def _whole(source: NoiseSource, shape: tuple[int, ...], world_size: int) -> torch.Tensor:
    return torch.cat([source.standard_normal(part) for part in _parts(shape, world_size)])


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_noise_has_the_same_bits_at_every_world_size(world_size: int) -> None:
    shape = (5, 3, BLOCK_ELEMENTS // 7)
    source = NoiseSource("42/common", 3)
    assert torch.equal(_whole(source, shape, world_size), _whole(source, shape, 1))


def test_rows_fewer_than_ranks_leave_some_ranks_without_noise() -> None:
    source = NoiseSource("42/common", 0)
    assert torch.equal(_whole(source, (3, 2), 4), _whole(source, (3, 2), 1))


@pytest.mark.parametrize(
    "other",
    [("43/common", 0, "w"), ("42/common", 1, "w"), ("42/common", 0, "v")],
    ids=["key", "step", "parameter"],
)
def test_noise_is_independent_across(other: tuple[str, int, str]) -> None:
    size = 100_000
    a = NoiseSource("42/common", 0).standard_normal(_parts((size,), 1)[0])
    b = NoiseSource(other[0], other[1]).standard_normal(_parts((size,), 1, other[2])[0])
    # The correlation of independent draws has a standard deviation of 1 / sqrt(size).
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 5 / math.sqrt(size)


def test_blocks_do_not_repeat() -> None:
    noise = _whole(NoiseSource("42/common", 0), (2 * BLOCK_ELEMENTS,), 1)
    first, second = noise.split(BLOCK_ELEMENTS)
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(BLOCK_ELEMENTS)


def _z_of_std(noise: torch.Tensor, std: float) -> float:
    n = noise.numel()
    return (noise.double().std().item() / std - 1) * math.sqrt(2 * n)


def test_the_noise_added_has_standard_deviation_sigma_c() -> None:
    parts = _parts((1000, 50), 2)
    clipped = ClippedSum({"w": parts[1].local}, C)
    add_noise(clipped, [parts[1]], SIGMA, NoiseSource("1/common", 0))
    added = clipped.gradients["w"]
    assert abs(_z_of_std(added, SIGMA * C)) < 5
    # The test has power: it rejects two thirds and three halves of sigma.
    assert abs(_z_of_std(added, SIGMA * C * 2 / 3)) > 5
    assert abs(_z_of_std(added, SIGMA * C * 3 / 2)) > 5


def test_noise_refuses_a_sum_without_a_bound() -> None:
    parts = _parts((2, 2), 1)
    with pytest.raises(ValueError, match="expected a finite bound"):
        add_noise(ClippedSum({"w": parts[0].local}, math.inf), parts, SIGMA, NoiseSource("1", 0))


def test_clip_factors_bound_and_never_enlarge() -> None:
    norms = torch.tensor([0.0, C / 2, C, 2 * C, 1e30])
    factors = clip_factors(norms, C)
    assert factors.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5, C / 1e30])
    assert clip_factors(torch.tensor([float("nan")]), C).isnan().all()
