"""A clipping bound that follows a quantile of the norms, and what it costs of the privacy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpsgd_track
from dpsgd_track import AdaptiveClipping
from dpsgd_track.library import PrivateTraining
from tests.support.forked_ranks import ForkedRanks
from tests.support.torchrun_adaptive import SIZES, bounds

B, D, CLASSES = 8, 5, 3


def made(**changes: Any) -> PrivateTraining:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.5,
        "expected_batch_size": B,
        "adaptive": AdaptiveClipping(),
        "seed": 1,
    }
    model = nn.Linear(D, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=changes.pop("lr", 0.1))
    return dpsgd_track.make_private(model, optimizer, **(settings | changes))


def batch(num_samples: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, D, generator=generator)
    return x, torch.randint(0, CLASSES, (num_samples,), generator=generator)


def step(private: PrivateTraining, *batches: tuple[Tensor, Tensor]) -> Tensor:
    norms = []
    for x, y in batches:
        private.backward(x, y)
        assert private.last is not None
        assert private.last.norm_B is not None
        norms.append(private.last.norm_B)
    private.mode.optimizer.step()
    return torch.cat(norms)


@pytest.mark.parametrize("sizes", [(B,), (5, 3), (4, 0, 2)])
def test_without_noise_the_bound_moves_by_the_fraction_within_it(sizes: tuple[int, ...]) -> None:
    private = made(adaptive=AdaptiveClipping(quantile=0.3, learning_rate=0.4))
    bound = private.max_grad_norm
    for number in range(3):
        norms = step(private, *(batch(size, seed=10 * number + size) for size in sizes))
        # Of the samples that a step is expected to hold; a missing one counts as half within.
        within = (int((norms <= bound).sum()) - len(norms) / 2) / B + 0.5
        bound *= math.exp(0.4 * (0.3 - within))
        assert private.max_grad_norm == pytest.approx(bound, rel=1e-6)


def test_the_next_step_is_clipped_at_the_new_bound() -> None:
    private = made(max_grad_norm=1e-3)
    for _ in range(5):
        bound = private.max_grad_norm
        norms = step(private, batch())
        assert private.last is not None
        torch.testing.assert_close(private.last.factors_B, (bound / norms).clamp(max=1.0))
        assert private.max_grad_norm > bound


def test_the_bound_finds_the_quantile() -> None:
    # Weights that stay, so that the norms do.
    private = made(
        noise_multiplier=1.0, expected_batch_size=256, max_grad_norm=50.0, lr=0.0, spot_check=False
    )
    for _ in range(60):
        norms = step(private, batch(256))
    assert private.max_grad_norm == pytest.approx(float(norms.quantile(0.5)), rel=0.1)


def test_count_and_sum_together_are_as_private_as_one_sum() -> None:
    sigma, count_noise = 0.8, 2.0
    private = made(noise_multiplier=sigma, adaptive=AdaptiveClipping(count_noise=count_noise))
    of_sum = private.mode.context.privacy.noise_multiplier
    # rho of Gaussian mechanisms adds up: 1 / (2 multiplier^2), the count's sensitivity being 1/2.
    assert of_sum**-2 + (count_noise / 0.5) ** -2 == pytest.approx(sigma**-2)
    assert private.noise_multiplier == sigma
    private.change(noise_multiplier=0.5)
    of_sum = private.mode.context.privacy.noise_multiplier
    assert of_sum**-2 + (count_noise / 0.5) ** -2 == pytest.approx(0.5**-2)
    step(private, batch())
    assert private.state_dict()["history"] == [[0.5, None, 1]]


def test_one_sample_moves_the_count_by_a_half_at_most() -> None:
    x, y = batch()
    counts = []
    for rows in (slice(0, B), slice(0, B - 1)):
        private = made(noise_multiplier=1.0)
        private.backward(x[rows], y[rows])
        assert private._bound is not None
        counts.append(float(private._bound._count))
    assert abs(counts[0] - counts[1]) == 0.5


def test_the_count_has_noise_of_its_own_in_each_step() -> None:
    moves = []
    for seed in (1, 2):
        private = made(noise_multiplier=1.0, seed=seed, lr=0.0)
        for _ in range(3):
            bound = private.max_grad_norm
            step(private, batch())
            moves.append(math.log(private.max_grad_norm / bound))
    assert len({round(move, 9) for move in moves}) == 6


def test_samples_that_are_not_finite_are_not_within_the_bound() -> None:
    private = made()
    x, y = batch()
    x[0] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        private.backward(x, y)
    assert private._bound is not None
    assert private.last is not None
    assert private.last.norm_B is not None
    within = int((private.last.norm_B <= 0.5).sum())
    assert float(private._bound._count) == within - B / 2


def test_a_batch_that_is_dropped_is_not_counted() -> None:
    private = made()
    private.backward(*batch(seed=5))
    private.mode.optimizer.zero_grad()
    norms = step(private, batch())
    within = float((norms <= 0.5).double().mean())
    assert private.max_grad_norm == pytest.approx(0.5 * math.exp(0.2 * (0.5 - within)))


def test_a_training_that_is_resumed_goes_on_with_its_bound() -> None:
    whole = made(noise_multiplier=1.0)
    for number in range(4):
        step(whole, batch(seed=number))
    begun = made(noise_multiplier=1.0)
    for number in range(2):
        step(begun, batch(seed=number))
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = made(noise_multiplier=1.0)
    resumed.model.load_state_dict(begun.model.state_dict())
    resumed.load_state_dict(state)
    assert resumed.max_grad_norm == begun.max_grad_norm
    for number in range(2, 4):
        step(resumed, batch(seed=number))
    assert resumed.max_grad_norm == whole.max_grad_norm
    assert torch.equal(resumed.model.weight, whole.model.weight)
    with pytest.raises(ValueError, match="adaptive or not"):
        made(adaptive=None).load_state_dict(state)
    with pytest.raises(ValueError, match="adaptive or not"):
        made().load_state_dict(made(adaptive=None).state_dict())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clipping": "automatic"}, "clipping='automatic': expected flat where C is adaptive"),
        ({"clipping": "per_layer"}, "where C is adaptive"),
        ({"mode": "no_dp_single"}, "where C is adaptive"),
        ({"mode": "ghost"}, "this package's own engine"),
        ({"capture": True}, "expected False where C is adaptive"),
        ({"adaptive": 0.5}, "an AdaptiveClipping"),
        (
            {"noise_multiplier": 4.0, "adaptive": AdaptiveClipping(count_noise=2.0)},
            "count_noise=2.0: expected more than 2, half of the noise multiplier",
        ),
    ],
)
def test_what_has_no_adaptive_bound_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        made(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"quantile": 1.0}, {"quantile": 0.0}, {"learning_rate": 0.0}, {"count_noise": 0.0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        AdaptiveClipping(**changes)


def test_all_ranks_have_the_bound_of_one_device(tmp_path: Path, rank_host: ForkedRanks) -> None:
    done = rank_host.run("tests.support.torchrun_adaptive", str(tmp_path), num_ranks=2)
    assert done.code == 0, done.log[-3000:]
    wanted = bounds([list(range(sum(sizes))) for sizes in SIZES], "flash_bk")
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(wanted, rel=1e-6)


def test_the_bound_cannot_be_changed_by_hand() -> None:
    private = made()
    with pytest.raises(ValueError, match="None, as C is adaptive"):
        private.change(max_grad_norm=1.0)
    private.change(expected_batch_size=4)
    assert private.max_grad_norm == 0.5
