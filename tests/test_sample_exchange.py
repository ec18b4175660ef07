"""Per-sample gradients that are sent while a backward runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dpsgd_track.distributed.sample_exchange import Formed, Matrix, SampleExchange, code_of
from dpsgd_track.kernels.weighted_sum import weighted_sums

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(autouse=True)
def memory_that_nothing_has_written_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


NAMES = ("a", "b", "c")
WEIGHT_B = torch.tensor([0.5, 0.0, 2.0])


def exchange(num_samples: int = 4) -> SampleExchange:
    """One rank's, of two groups: a and b, then c, which is transposed in memory."""
    plain, transposed = (Formed(torch.float32, is_transposed, 1) for is_transposed in (False, True))
    a, b, c = (torch.Size(shape) for shape in ((5, 3), (2, 4), (3, 6)))
    groups = [[Matrix("a", a, plain), Matrix("b", b, plain)], [Matrix("c", c, transposed)]]
    group = dist.group.WORLD
    assert group is not None
    return SampleExchange(groups, torch.device("cpu"), group, agree=lambda: num_samples)


def gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (5, 3), "b": (2, 4), "c": (6, 3)}
    made = {name: torch.randn(3, *shape, generator=generator) for name, shape in shapes.items()}
    return made | {"c": made["c"].mT}


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_sums_are_those_of_all_samples_whatever_order_they_come_in(order: str) -> None:
    sent, grads = exchange(), gradients()
    whole = []
    for name in order:
        if given := sent.give(name, grads[name]):
            whole.append(set(given))
            sent.send()
    assert sorted(whole, key=len) == [{"c"}, {"a", "b"}]
    assert not sent.unsent()
    sums = dict(sent.sums(WEIGHT_B, weighted_sums))
    assert set(sums) == set(NAMES)
    for name in NAMES:
        torch.testing.assert_close(sums[name], torch.tensordot(WEIGHT_B, grads[name], dims=1))


def test_a_gradient_that_never_comes_counts_as_zeros_and_holds_up_nothing_for_good() -> None:
    sent, grads = exchange(), gradients()
    assert not sent.give("a", grads["a"])
    assert set(sent.give("c", grads["c"])) == {"c"}
    sent.send()
    # Its norm is still to be taken.
    assert set(sent.unsent()) == {"a"}
    sums = dict(sent.sums(WEIGHT_B, weighted_sums))
    for name in ("a", "c"):
        torch.testing.assert_close(sums[name], torch.tensordot(WEIGHT_B, grads[name], dims=1))
    assert not sums["b"].any()


def test_a_sample_of_weight_zero_adds_nothing_even_if_it_is_nan() -> None:
    sent, grads = exchange(), gradients()
    for name in NAMES:
        grads[name][1] = torch.nan
        sent.give(name, grads[name])
    for name, total in sent.sums(WEIGHT_B, weighted_sums):
        kept = torch.tensordot(WEIGHT_B[::2], grads[name][::2], dims=1)
        torch.testing.assert_close(total, kept)


def test_nothing_is_taken_if_a_rank_does_not_take_part() -> None:
    sent = exchange(num_samples=0)
    assert all(sent.may_take(name) and not sent.takes(name) for name in NAMES)


def test_ranks_tell_forms_apart_that_would_be_read_wrongly() -> None:
    def one(**forms: Formed) -> dict[str, Formed]:
        return forms

    forms = [
        one(a=Formed(torch.bfloat16, False, 1)),
        one(a=Formed(torch.float16, False, 1)),
        one(a=Formed(torch.bfloat16, True, 1)),
        one(b=Formed(torch.bfloat16, False, 1)),
        one(a=Formed(torch.bfloat16, False, 1), b=Formed(torch.bfloat16, False, 1)),
        one(),
    ]
    assert len(set(map(code_of, forms))) == len(forms)
    # A rank may have longer samples than another.
    assert code_of(forms[0]) == code_of(one(a=Formed(torch.bfloat16, False, 2)))
