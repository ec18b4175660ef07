"""The planner: which way a layer's norm is found, and when memory says otherwise."""

from __future__ import annotations

import pytest
import torch

from dpsgd_track.config import AUTO, GRADIENTS, GRAM, TILED
from dpsgd_track.privacy.norm_planner import LinearShape, NormPlanner

H200 = torch.device("cuda")
GIB = 2**30


class Memory:
    """Of a device: what is free of it, and planners that are told so."""

    free_bytes = 100 * GIB

    def planner(self, *, keeps: bool, forced: str = AUTO) -> NormPlanner:
        return NormPlanner(keeps=keeps, forced=forced, free_bytes=lambda device: self.free_bytes)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def shape(B: int, T: int, D: int, P: int, dtype: torch.dtype = torch.bfloat16) -> LinearShape:
    return LinearShape(B, T, D, P, dtype, H200)


@pytest.mark.parametrize("T", [1024, 4096, 16384])
@pytest.mark.parametrize(("D", "P"), [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)])
def test_long_sequences_keep_gradients(T: int, D: int, P: int, memory: Memory) -> None:
    # They cost what the gradient costs without privacy; anything else is a product more.
    assert memory.planner(keeps=True).choose("weight", shape(2, T, D, P)) == GRADIENTS


def test_short_sequences_keep_factors(memory: Memory) -> None:
    assert memory.planner(keeps=True).choose("weight", shape(64, 16, 2048, 8192)) == GRAM


@pytest.mark.parametrize(("T", "plan"), [(1024, GRAM), (8192, TILED)])
def test_two_passes_take_the_form_with_fewer_products(T: int, plan: str) -> None:
    assert NormPlanner(keeps=False).choose("weight", shape(2, T, 2048, 2048)) == plan


def test_what_does_not_fit_is_not_kept(memory: Memory) -> None:
    one = shape(8, 1024, 2048, 8192)
    assert one.gradients_bytes > one.factors_bytes
    memory.free_bytes = 3 * one.gradients_bytes
    chooses = memory.planner(keeps=True)
    # Half of what is free is room for one layer's gradients.
    plans = [chooses.choose(f"{number}.weight", one) for number in range(3)]
    assert plans[0] == GRADIENTS
    assert GRADIENTS not in plans[1:]


def test_where_nothing_fits_the_smallest_is_kept(memory: Memory) -> None:
    memory.free_bytes = 0
    large = shape(2, 65536, 512, 512)
    assert large.factors_bytes > large.gradients_bytes
    assert memory.planner(keeps=True).choose("weight", large) == GRADIENTS


def test_a_shared_weight_keeps_factors_even_where_gradients_are_forced(memory: Memory) -> None:
    for forced in ("auto", GRADIENTS):
        chooses = memory.planner(keeps=True, forced=forced)
        assert chooses.choose("weight", shape(2, 4096, 64, 64), is_shared=True) != GRADIENTS


def test_a_layer_keeps_its_plan_for_a_shape(memory: Memory) -> None:
    chooses = memory.planner(keeps=True)
    one = shape(2, 1024, 2048, 2048)
    first = chooses.choose("weight", one)
    memory.free_bytes = 0
    assert chooses.choose("weight", one) == first
    assert chooses.summary() == {"weight": f"{first} (B=2, T=1024)"}


def test_two_passes_cannot_be_made_to_keep_gradients() -> None:
    with pytest.raises(ValueError, match=r"plan='gradients': expected one of auto, gram, tiled"):
        NormPlanner(keeps=False, forced=GRADIENTS)
