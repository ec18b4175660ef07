"""The common noise depends on what it is for and on nothing else, and is calibrated to C."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from dpsgd_track.distributed.sharding import LocalPart, row_range
from dpsgd_track.privacy.clipping import ClippedSum, clip_factors
from dpsgd_track.privacy.noise import BLOCK_ELEMENTS, NoiseSource, add_noise, fresh_key
from tests.support.forked_ranks import ForkedRanks

SIGMA, C = 0.7, 0.37
STEPS = 400
# Fewer rows than ranks, a single row, and rows that no number of ranks divides.
SHAPES = {"bias": (3,), "row": (1, 301), "cube": (5, 3, 7)}
WORLD_SIZES = (1, 2, 3, 4)
LIMIT = 5.0
"""Standard errors. Seeds are fixed, so that what passes once passes always; at random, one
statistic in two million would lie beyond."""


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


def _z_of_std(noise: torch.Tensor, std: float) -> float:
    """Standard errors by which the mean square differs from std^2.

    The square of a normal variable has variance 2 std^4, and the mean is known to be zero.
    """
    n = noise.numel()
    return (noise.double().square().mean().item() / std**2 - 1) * math.sqrt(n / 2)


def _z_of_correlation(a: torch.Tensor, b: torch.Tensor, std: float) -> float:
    """Standard errors by which the mean product differs from zero.

    The product of two independent normal variables has variance std^4.
    """
    product = a.double() * b.double()
    return (product.sum() / product.numel() ** 0.5).item() / std**2


def _shards(key: str, name: str, shape: tuple[int, ...], world_size: int) -> list[torch.Tensor]:
    """Noise that each rank with elements draws: [elements, STEPS]."""
    parts = [part for part in _parts(shape, world_size, name) if part.local.numel()]
    sources = [NoiseSource(key, step) for step in range(STEPS)]
    return [
        torch.stack([s.standard_normal(part).flatten() for s in sources], dim=1) for part in parts
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_noise_of_each_layer_and_each_shard_has_std_one(name: str, world_size: int) -> None:
    shards = _shards("1/flash", name, SHAPES[name], world_size)
    for noise in [torch.cat(shards), *shards]:
        assert abs(_z_of_std(noise, 1.0)) < LIMIT
        # The test has power: noise of two thirds or three halves of the size is rejected.
        assert abs(_z_of_std(noise * 2 / 3, 1.0)) > LIMIT
        assert abs(_z_of_std(noise * 3 / 2, 1.0)) > LIMIT


def _pairs(
    key: str, name: str, world_size: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    shape = SHAPES[name]
    shards = _shards(key, name, shape, world_size)
    for a, b in combinations(shards, 2):
        # Of two shards of unlike size, what both have is compared.
        n = min(len(a), len(b))
        yield "shards", a[:n], b[:n]
    whole = torch.cat(shards)
    yield "steps", whole[:, 1:], whole[:, :-1]
    yield "layers", whole, torch.cat(_shards(key, f"{name}.twin", shape, world_size))
    yield "modes", whole, torch.cat(_shards("1/ghost", name, shape, world_size))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_noise_is_uncorrelated_across_shards_steps_layers_and_modes(
    name: str, world_size: int
) -> None:
    seen = set()
    for across, a, b in _pairs("1/flash", name, world_size):
        assert abs(_z_of_correlation(a, b, 1.0)) < LIMIT, across
        # The test has power: half of the one in the other is found.
        assert abs(_z_of_correlation(a, b + a / 2, 1.0)) > LIMIT, across
        seen.add(across)
    held = min(SHAPES[name][0], world_size)
    assert seen == {"steps", "layers", "modes"} | ({"shards"} if held > 1 else set())


def test_shards_that_share_a_seed_are_rejected() -> None:
    source = NoiseSource("1/flash", 0)
    # Each rank takes its shard for the whole, as a generator of one seed on all ranks would.
    alike = [
        source.standard_normal(replace(part, start=0, num_elements=part.local.numel()))
        for part in _parts((40, 25), 4)
    ]
    for a, b in combinations(alike, 2):
        assert _z_of_correlation(a, b, 1.0) > LIMIT
    for noise in alike:
        assert abs(_z_of_std(noise, 1.0)) < LIMIT


def test_no_two_of_many_blocks_are_alike() -> None:
    # Of as many 32-bit seeds, one pair or more would be expected to be equal.
    part = LocalPart("w", torch.zeros(4), 0, 4)
    many = range(100_000)
    drawn = {tuple(NoiseSource("1/os", step).standard_normal(part).tolist()) for step in many}
    assert len(drawn) == len(many)


def test_keys_of_the_operating_system_never_repeat_and_draw_sound_noise() -> None:
    keys = [fresh_key(None, torch.device("cpu")) for _ in range(2)]
    assert keys[0] != keys[1]
    assert all(len(bytes.fromhex(key)) == 32 for key in keys)
    part = _parts((1_000_000,), 1)[0]
    a, b = (NoiseSource(key, 0).standard_normal(part) for key in keys)
    # Nothing is fixed here. Three statistics beyond six standard errors: one run in 10^8.
    assert abs(_z_of_std(a, 1.0)) < 6
    assert abs(_z_of_std(b, 1.0)) < 6
    assert abs(_z_of_correlation(a, b, 1.0)) < 6


def test_ranks_share_the_key_of_the_operating_system(
    tmp_path: Path, rank_host: ForkedRanks
) -> None:
    done = rank_host.run("tests.support.torchrun_keys", str(tmp_path), num_ranks=2)
    assert done.code == 0, done.log[-3000:]
    first, second = (tmp_path / "key0").read_text(), (tmp_path / "key1").read_text()
    assert first == second
    assert len(bytes.fromhex(first)) == 32


def test_blocks_do_not_repeat() -> None:
    noise = _whole(NoiseSource("42/common", 0), (2 * BLOCK_ELEMENTS,), 1)
    first, second = noise.split(BLOCK_ELEMENTS)
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(BLOCK_ELEMENTS)


def test_the_noise_added_has_standard_deviation_sigma_c() -> None:
    parts = _parts((1000, 50), 2)
    clipped = ClippedSum({"w": parts[1].local}, C)
    add_noise(clipped, [parts[1]], SIGMA, NoiseSource("1/common", 0))
    added = clipped.gradients["w"]
    assert abs(_z_of_std(added, SIGMA * C)) < LIMIT
    assert abs(_z_of_std(added, SIGMA * C * 2 / 3)) > LIMIT
    assert abs(_z_of_std(added, SIGMA * C * 3 / 2)) > LIMIT


def test_noise_refuses_a_sum_without_a_bound() -> None:
    parts = _parts((2, 2), 1)
    with pytest.raises(ValueError, match="expected a finite bound"):
        add_noise(ClippedSum({"w": parts[0].local}, math.inf), parts, SIGMA, NoiseSource("1", 0))


def test_clip_factors_bound_and_never_enlarge() -> None:
    norms = torch.tensor([0.0, C / 2, C, 2 * C, 1e30])
    factors = clip_factors(norms, C)
    assert factors.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5, C / 1e30])
    assert clip_factors(torch.tensor([float("nan")]), C).tolist() == [0.0]
