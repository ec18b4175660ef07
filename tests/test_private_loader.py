"""Batches that the library draws are Poisson samples, and epsilon is that of their steps."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dpsgd_track
from dpsgd_track.privacy import sampling
from dpsgd_track.privacy.accounting import epsilon_rdp
from dpsgd_track.privacy.sampling import Indices, PoissonSampler
from tests.support.forked_ranks import ForkedRanks
from tests.support.torchrun_loader import EXPECTED, NUM_SAMPLES, NUM_STEPS, train

N, B = 40, 4
X, Y = torch.arange(float(N))[:, None] / N, torch.arange(N) % 2
DATA = TensorDataset(X, Y)


def _made(**changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": B, "seed": 3}
    return dpsgd_track.make_private(model, optimizer, **(settings | changes)), optimizer


def _pass(private: Any, optimizer: torch.optim.Optimizer, **settings: Any) -> list[list[int]]:
    """One pass over the loader; the samples of each step."""
    drawn: list[list[int]] = []
    for batches in private.loader(DATA, **settings):
        drawn.append([])
        for x, y in batches:
            private.backward(x, y)
            drawn[-1] += (x[:, 0] * N).round().int().tolist()
        optimizer.step()
    return drawn


def _joined(batches: Iterable[list[int]]) -> list[int]:
    return [*chain.from_iterable(batches)]


def _weights(private: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in private.model.parameters()])


# ---- The draws are Poisson samples


def _draws(num_steps: int = 4000, seed: int = 0) -> np.ndarray:
    """[steps, N] true where the step takes the sample."""
    sampler = PoissonSampler(
        key=str(seed), num_samples=N, sample_rate=B / N, rank=0, num_ranks=1, batch_size=3
    )
    taken = np.zeros((num_steps, N), dtype=bool)
    for step in range(num_steps):
        for indices in sampler.micro_batches(step):
            assert len(indices) <= 3
            taken[step, indices] = True
    return taken


def _defects(taken: np.ndarray) -> set[str]:
    """Ways in which draws are not independent with probability q: each is 5 standard errors off."""
    q = B / N
    num_steps = len(taken)
    z = (taken - q) / math.sqrt(q * (1 - q))
    defects = set()
    if abs(z.mean() * math.sqrt(z.size)) > 5:
        defects.add("rate")
    # Mean of each sample over steps, products of pairs of samples, of steps in a row.
    if np.abs(z.mean(axis=0) * math.sqrt(num_steps)).max() > 5:
        defects.add("frequency")
    pairs = (z.T @ z / math.sqrt(num_steps))[np.triu_indices(N, 1)]
    if np.abs(pairs).max() > 6 or abs(pairs.sum() / math.sqrt(len(pairs))) > 5:
        defects.add("samples")
    for lag in (1, 2):
        if abs((z[lag:] * z[:-lag]).sum() / math.sqrt((num_steps - lag) * N)) > 5:
            defects.add("steps")
    # Sizes are binomial: their variance is N q (1 - q), to sqrt(2 / steps).
    spread = taken.sum(axis=1).var() / (N * q * (1 - q)) - 1
    if abs(spread) > 5 * math.sqrt(2.2 / num_steps):
        defects.add("sizes")
    return defects


def test_draws_are_independent_with_probability_q() -> None:
    assert _defects(_draws()) == set()
    assert not np.array_equal(_draws(50, seed=1), _draws(50, seed=2))


def test_draws_of_a_fixed_size_or_of_the_same_steps_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fixed_size(random: np.random.Generator, num_samples: int, rate: float) -> Indices:
        return np.sort(random.permutation(num_samples)[: round(num_samples * rate)])

    def of_another_rate(random: np.random.Generator, num_samples: int, rate: float) -> Indices:
        return np.flatnonzero(random.random(num_samples) < 1.1 * rate)

    right = _draws()
    assert _defects(np.repeat(right[::2], 2, axis=0)) == {"steps"}
    monkeypatch.setattr(sampling, "poisson_draw", fixed_size)
    assert "sizes" in _defects(_draws())
    monkeypatch.setattr(sampling, "poisson_draw", of_another_rate)
    assert "rate" in _defects(_draws())


def test_ranks_share_a_draw_that_does_not_depend_on_their_number() -> None:
    def sampler(rank: int, num_ranks: int, size: int | None) -> PoissonSampler:
        return PoissonSampler(
            key="k",
            num_samples=N,
            sample_rate=B / N,
            rank=rank,
            num_ranks=num_ranks,
            batch_size=size,
        )

    for step in range(50):
        whole = sampler(0, 1, None).micro_batches(step)
        assert len(whole) == 1
        for num_ranks in (2, 3, 7):
            parts = [sampler(r, num_ranks, 2).micro_batches(step) for r in range(num_ranks)]
            assert len({len(part) for part in parts}) == 1
            assert _joined(chain.from_iterable(parts)) == whole[0]


# ---- The loop


def test_a_pass_is_an_epoch_in_expectation_and_its_rate_is_accounted() -> None:
    private, optimizer = _made()
    loader = private.loader(DATA)
    assert len(loader) == N // B
    assert loader.sample_rate == B / N
    drawn = _pass(private, optimizer, physical_batch_size=2)
    assert len(drawn) == N // B
    assert len({len(samples) for samples in drawn}) > 1
    assert private.epsilon(1e-5) == epsilon_rdp(((1.0, B / N, N // B),), 1e-5)


def _z_of_recorded_rate() -> float:
    """Distance of the samples drawn from the rate that the ledger has, in standard errors."""
    private, optimizer = _made(spot_check=False)
    drawn = _pass(private, optimizer, num_steps=400)
    ((_, rate, num_steps),) = private.state_dict()["history"]
    num_trials = N * num_steps
    spread = math.sqrt(num_trials * rate * (1 - rate))
    return (sum(map(len, drawn)) - num_trials * rate) / spread


def test_the_ledger_has_the_rate_of_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(_z_of_recorded_rate()) < 5
    draw = sampling.poisson_draw

    # Planted bug: a loader at another rate than the ledger's.
    def more(random: np.random.Generator, num_samples: int, rate: float) -> Indices:
        return draw(random, num_samples, 1.2 * rate)

    monkeypatch.setattr(sampling, "poisson_draw", more)
    assert _z_of_recorded_rate() > 5


def _resume(num_before: int) -> tuple[list[list[int]], Tensor]:
    first, optimizer = _made()
    drawn = _pass(first, optimizer, num_steps=num_before)
    second, resumed = _made()
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    drawn += _pass(second, resumed, num_steps=12 - num_before)
    return drawn, _weights(second)


def test_a_resumed_run_continues_the_very_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    private, optimizer = _made()
    whole, weights = _pass(private, optimizer, num_steps=12), _weights(private)
    drawn, resumed = _resume(5)
    assert drawn == whole
    assert torch.equal(resumed, weights)

    # Planted bug: steps are counted from the start of the process.
    draw = PoissonSampler.global_draw
    monkeypatch.setattr(PoissonSampler, "global_draw", lambda self, k: draw(self, k % 5))
    drawn, _ = _resume(5)
    assert drawn[5:10] == drawn[:5]
    assert drawn != whole


def test_without_a_seed_the_draws_are_secret() -> None:
    first, second = (_pass(*_made(seed=None), num_steps=12) for _ in range(2))
    assert first != second


def test_a_loop_that_was_left_goes_on_with_the_next_step() -> None:
    private, optimizer = _made()
    whole = _pass(private, optimizer, num_steps=6)
    private, optimizer = _made()
    drawn = []
    for num_steps in (2, 4):
        for number, batches in enumerate(private.loader(DATA)):
            if number == num_steps:
                break
            ((x, y),) = batches
            private.backward(x, y)
            drawn.append((x[:, 0] * N).round().int().tolist())
            optimizer.step()
    assert drawn == whole


def _no_step(private: Any, optimizer: torch.optim.Optimizer) -> None:
    for batches in private.loader(DATA):
        for x, y in batches:
            private.backward(x, y)


def _second_step(private: Any, optimizer: torch.optim.Optimizer) -> None:
    for batches in private.loader(DATA):
        for x, y in batches:
            private.backward(x, y)
            optimizer.step()
        private.backward(X[:0], Y[:0])
        optimizer.step()


def _unread(private: Any, optimizer: torch.optim.Optimizer) -> None:
    for batches in private.loader(DATA, physical_batch_size=1):
        private.backward(*next(batches))
        optimizer.step()


def _unread_and_left(private: Any, optimizer: torch.optim.Optimizer) -> None:
    for batches in private.loader(DATA, physical_batch_size=1):
        private.backward(*next(batches))
        break
    optimizer.step()


def _added_twice(private: Any, optimizer: torch.optim.Optimizer) -> None:
    for batches in private.loader(DATA, num_steps=50):
        for x, y in batches:
            private.backward(x, y)
            private.backward(x, y)
        optimizer.step()


def _left_out(private: Any, optimizer: torch.optim.Optimizer) -> None:
    for batches in private.loader(DATA, num_steps=50):
        for x, y in batches:
            private.backward(x[:1], y[:1])
        optimizer.step()


WRONG_LOOPS = {
    "no-step": (_no_step, r"expected optimizer\.step\(\) before the next draw"),
    "second-step": (_second_step, r"expected one optimizer\.step\(\) for each draw, got 1 more"),
    "unread": (_unread, r"of the step's \d+ micro-batches left"),
    "unread-and-left": (_unread_and_left, r"of the step's \d+ micro-batches left"),
    "added-twice": (_added_twice, "samples added: expected the"),
    "left-out": (_left_out, "1 samples added: expected the"),
}


@pytest.mark.parametrize("name", WRONG_LOOPS)
def test_a_step_of_other_samples_than_were_drawn_is_refused(name: str) -> None:
    loop, message = WRONG_LOOPS[name]
    with pytest.raises(RuntimeError, match=message):
        loop(*_made())


Pair = namedtuple("Pair", ["x", "rest"])


def _nested(samples: list[tuple[Tensor, Tensor]]) -> Pair:
    x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    names = [f"sample {i}" for i in range(len(y))]
    return Pair({"ids": x.long(), "y": y}, (x.half(), names))


def test_an_empty_step_looks_like_any_other_without_its_rows() -> None:
    private, optimizer = _made(expected_batch_size=1)
    sizes = []
    for batches in private.loader(DATA, collate_fn=_nested, num_steps=30):
        (batch,) = batches
        assert isinstance(batch, Pair)
        assert batch.x["ids"].dtype == batch.x["y"].dtype == torch.long
        half, names = batch.rest
        assert half.dtype == torch.half
        assert half.shape == (len(names), 1)
        sizes.append(len(names))
        with private.batch(len(half)):
            logits = private.model(half.float())
            losses = nn.functional.cross_entropy(logits, batch.x["y"], reduction="none")
            private.backward(losses)
        optimizer.step()
    assert 0 in sizes
    assert max(sizes) > 0


def test_what_cannot_be_emptied_is_named() -> None:
    def loop(private: Any, optimizer: torch.optim.Optimizer) -> None:
        for batches in private.loader(DATA, collate_fn=len):
            for size in batches:
                private.backward(X[:size], Y[:size])
            optimizer.step()

    with pytest.raises(ValueError, match="collate_fn='int': expected tensors in dicts"):
        loop(*_made(expected_batch_size=1))


def test_workers_load_the_same_batches() -> None:
    private, optimizer = _made()
    whole = _pass(private, optimizer, physical_batch_size=3)
    private, optimizer = _made()
    assert _pass(private, optimizer, physical_batch_size=3, num_workers=1) == whole


class _Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "iterable": (_Endless(), {}, "dataset='_Endless': expected a data set with a length"),
    "loader": (DataLoader(DATA), {}, "dataset='DataLoader'"),
    "small": (TensorDataset(X[:3]), {}, "dataset=3: expected at least the 4 samples"),
    "size": (DATA, {"physical_batch_size": 0}, "physical_batch_size=0: expected an integer >= 1"),
    "steps": (DATA, {"num_steps": 1.5}, r"num_steps=1\.5: expected an integer"),
    "rate": (TensorDataset(X[:20]), {}, r"sample_rate=0\.1: expected 0\.2, which is 4 of 20"),
    "twice": (DATA, {"batch_size": 3}, "batch_sampler"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loader_that_does_not_fit_is_refused(name: str) -> None:
    dataset, settings, message = WRONG[name]
    private, _ = _made(sample_rate=0.1)
    with pytest.raises(ValueError, match=message):
        next(iter(private.loader(dataset, **settings)))


# ---- Two ranks


def test_ranks_draw_together_and_some_have_no_samples(
    tmp_path: Path, rank_host: ForkedRanks
) -> None:
    done = rank_host.run("tests.support.torchrun_loader", str(tmp_path), num_ranks=2)
    assert done.code == 0, done.log[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for kind in ("seed", "secret"):
        left, right = (rank[kind]["drawn"] for rank in ranks)
        assert [len(batches) for batches in left] == [len(batches) for batches in right]
        for batches, others in zip(left, right, strict=True):
            drawn = _joined(batches + others)
            assert len(set(drawn)) == len(drawn)
        assert any(_joined(a) and not _joined(b) for a, b in zip(left, right, strict=True))
        for rank in ranks:
            assert rank[kind]["history"] == [[0.5, EXPECTED / NUM_SAMPLES, NUM_STEPS]]
        assert ranks[0][kind]["weights"] == ranks[1][kind]["weights"]
    alone = train("flash_bk", 5)
    together = [a + b for a, b in zip(*(rank["seed"]["drawn"] for rank in ranks), strict=True)]
    assert [*map(_joined, together)] == [*map(_joined, alone["drawn"])]
    assert ranks[0]["seed"]["weights"] == pytest.approx(alone["weights"], abs=1e-6)
