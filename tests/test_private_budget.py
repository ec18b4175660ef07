"""Noise for a target epsilon, changes of settings, and epsilon of loops over other batches."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpsgd_track
from dpsgd_track.privacy.accounting import epsilon_rdp, sequential_history
from dpsgd_track.privacy.calibration import Budget, noise_multiplier_for
from dpsgd_track.privacy.ledger import PrivacyLedger
from tests.support.dp_accounting_values import GRID, PATH, History

B, C, DELTA = 4, 0.5, 1e-5
GRID_PLD = json.loads(PATH.read_text(encoding="utf-8"))["grid_pld"]


def _made(model: nn.Module | None = None, **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"max_grad_norm": C, "expected_batch_size": B, "seed": 3, "spot_check": False}
    if "target_epsilon" not in changes:
        settings["noise_multiplier"] = 1.0
    return dpsgd_track.make_private(model, optimizer, **(settings | changes)), optimizer


def _data(size: int) -> tuple[Tensor, Tensor]:
    return torch.ones(size, 3), torch.zeros(size, dtype=torch.long)


def _step(private: Any, optimizer: torch.optim.Optimizer, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        private.backward(*_data(B))
        optimizer.step()


# ---- Epsilon of whole loops


def _trained(history: History, *, resumes: bool) -> Any:
    """A loop of the stages of `history`, in one process or several."""
    private, optimizer = _made(noise_multiplier=history[0][0])
    for number, (sigma, q, num_steps) in enumerate(history):
        if resumes and number % 2:
            state = json.loads(json.dumps(private.state_dict()))
            private, optimizer = _made(noise_multiplier=sigma)
            private.load_state_dict(state)
        elif number:
            private.change(noise_multiplier=sigma, max_grad_norm=C / (1 + number))
        loader = private.loader(TensorDataset(*_data(round(B / q))), num_steps=num_steps)
        for batches in loader:
            for x, y in batches:
                private.backward(x, y)
            optimizer.step()
    return private


def test_epsilon_of_fifty_loops_is_within_the_bounds_of_rdp_and_pld() -> None:
    """Loops with several noise multipliers, sample rates and bounds, some of them resumed."""
    assert len(GRID) == len(GRID_PLD) == len(set(GRID)) == 50
    for number, ((history, delta), pld) in enumerate(zip(GRID, GRID_PLD, strict=True)):
        private = _trained(history, resumes=number % 2 == 0)
        epsilon = private.epsilon(delta)
        assert pld <= epsilon <= epsilon_rdp(history, delta) * (1 + 1e-12)
        if number % 25 == 0:
            assert pld <= private.epsilon(delta, accountant="prv") <= min(epsilon, pld + 0.013)
        # Planted bugs: the noise of the last stage for all, and a resume that forgets.
        at_most = [(3.0, q, steps) for _, q, steps in history]
        if max(sigma for sigma, _, _ in history) > min(sigma for sigma, _, _ in history):
            assert PrivacyLedger(at_most).epsilon(delta) < epsilon
        if len(history) > 1:
            assert PrivacyLedger(history[1:]).epsilon(delta) < epsilon


# ---- Noise for a target


@pytest.mark.parametrize(
    ("target", "q", "num_steps"), [(0.3, 0.01, 500), (2.0, 0.2, 1), (8.0, 1.0, 500)]
)
def test_the_least_noise_within_a_target(target: float, q: float, num_steps: int) -> None:
    sigma = noise_multiplier_for(target, DELTA, sample_rate=q, num_steps=num_steps)
    assert epsilon_rdp(((sigma, q, num_steps),), DELTA) <= target
    assert epsilon_rdp(((sigma / (1 + 2e-4), q, num_steps),), DELTA) > target


def test_prv_needs_less_noise_than_rdp() -> None:
    settings: dict[str, Any] = {"sample_rate": 0.05, "num_steps": 100}
    rdp = noise_multiplier_for(2.0, DELTA, **settings)
    prv = noise_multiplier_for(2.0, DELTA, accountant="prv", **settings)
    assert prv < 0.98 * rdp
    assert PrivacyLedger([(prv, 0.05, 100)]).epsilon(DELTA, "prv") <= 2.0


def test_a_least_noise_that_prv_cannot_tell_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accountant='prv'.*Use rdp"):
        noise_multiplier_for(99.0, DELTA, sample_rate=1.0, num_steps=1, accountant="prv")


TARGET: dict[str, Any] = {
    "target_epsilon": 2.0,
    "target_delta": DELTA,
    "num_steps": 20,
    "sample_rate": 0.1,
}


def test_a_training_spends_its_target_and_no_step_more() -> None:
    private, optimizer = _made(**TARGET)
    assert private.noise_multiplier == noise_multiplier_for(
        2.0, DELTA, sample_rate=0.1, num_steps=20
    )
    _step(private, optimizer, 20)
    assert 1.999 < private.epsilon(DELTA) <= 2.0
    private.backward(*_data(B))
    with pytest.raises(RuntimeError, match="step 21: expected at most num_steps=20, for which"):
        optimizer.step()
    assert private.num_steps == 20


def test_steps_before_count_for_the_target() -> None:
    private, optimizer = _made(sample_rate=0.1, noise_multiplier=2.0)
    _step(private, optimizer, 10)
    with pytest.warns(UserWarning, match="10 private steps were taken on this model"):
        again, optimizer = _made(private.model, **TARGET)
    sigma = again.noise_multiplier
    assert sigma != noise_multiplier_for(2.0, DELTA, sample_rate=0.1, num_steps=20)
    _step(again, optimizer, 10)
    assert again.num_steps == 20
    assert 1.999 < again.epsilon(DELTA) <= 2.0
    with pytest.raises(ValueError, match="num_steps=20: expected more than the 20 steps"):
        _made(again.model, **TARGET)


def test_a_resumed_training_keeps_its_noise_and_its_target() -> None:
    whole, optimizer = _made(**TARGET)
    _step(whole, optimizer, 8)
    resumed, optimizer = _made(**TARGET)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.noise_multiplier == whole.noise_multiplier
    _step(resumed, optimizer, 12)
    assert 1.999 < resumed.epsilon(DELTA) <= 2.0
    # With less noise before, no noise would do.
    loud, optimizer = _made(noise_multiplier=0.5, sample_rate=0.1)
    _step(loud, optimizer, 8)
    after, _ = _made(**TARGET)
    with pytest.raises(ValueError, match=r"expected at least .* 8 steps were taken already"):
        after.load_state_dict(loud.state_dict())
    assert after.num_steps == 0


def test_a_training_that_is_longer_once_resumed_keeps_its_target_by_more_noise() -> None:
    short, optimizer = _made(**TARGET)
    _step(short, optimizer, 8)
    longer, optimizer = _made(**(TARGET | {"num_steps": 40}))
    planned = longer.noise_multiplier
    longer.load_state_dict(short.state_dict())
    assert longer.noise_multiplier > planned > short.noise_multiplier
    _step(longer, optimizer, 32)
    assert 1.999 < longer.epsilon(DELTA) <= 2.0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too-small": ({"target_epsilon": 1e-3}, r"target_epsilon=0\.001: expected at least 0\.1"),
    "negative": ({"target_epsilon": -1.0}, r"target_epsilon=-1\.0: expected a finite number > 0"),
    "delta": ({"target_delta": 1.0}, r"delta=1\.0: expected a number between 0 and 1"),
    "steps": ({"num_steps": 0}, "num_steps=0: expected an integer"),
    "no-steps": ({"num_steps": None}, "Give it, or target_epsilon, target_delta and num_steps"),
    "no-rate": ({"sample_rate": None}, "For target_epsilon give expected_batch_size / samples"),
    "both": ({"noise_multiplier": 1.0}, r"target_epsilon=2\.0: expected None beside a noise"),
    "accountant": ({"accountant": "gdp"}, "accountant='gdp'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_target_is_refused(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        _made(**(TARGET | changes))


def test_a_past_beyond_the_target_is_told() -> None:
    budget = Budget(target_epsilon=2.0, target_delta=DELTA, num_steps=100)
    with pytest.raises(ValueError, match=r"expected at least .* 50 steps were taken already"):
        budget.noise_multiplier([(0.6, 0.1, 50)], 0.1)


# ---- Changes within a training


def test_noise_follows_a_change_and_each_step_counts_at_its_own() -> None:
    model = nn.Linear(1000, 20)
    private, optimizer = _made(model, noise_multiplier=0.7, sample_rate=0.1)
    nothing = torch.zeros(0, 1000), torch.zeros(0, dtype=torch.long)
    settings = ((0.7, C, 0.1), (2.0, C, 0.1), (2.0, 3.0, 0.1), (1.0, 3.0, 0.2))
    for sigma, bound, rate in settings:
        private.change(noise_multiplier=sigma, max_grad_norm=bound, sample_rate=rate)
        before = model.weight.detach().clone()
        private.backward(*nothing)
        optimizer.step()
        noise = (before - model.weight.detach()) / 0.1 * B
        z = (noise.std() / (sigma * bound) - 1) * math.sqrt(2 * noise.numel())
        assert abs(z) < 5
    history = ((0.7, 0.1, 1), (2.0, 0.1, 2), (1.0, 0.2, 1))
    assert private.epsilon(DELTA) == epsilon_rdp(history, DELTA)


@pytest.mark.parametrize("mode", ["flash_bk", "flash", "ghost", "grad_materialize", "reference"])
@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_samples_are_clipped_at_the_bound_of_the_change(mode: str) -> None:
    private, optimizer = _made(mode=mode, noise_multiplier=0.0)
    _step(private, optimizer)
    private.change(max_grad_norm=0.01)
    before = torch.cat([p.detach().double().flatten() for p in private.model.parameters()])
    _step(private, optimizer)
    after = torch.cat([p.detach().double().flatten() for p in private.model.parameters()])
    # Four equal samples at C each, over four, times the learning rate.
    assert float((after - before).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_change_that_is_not_possible_changes_nothing() -> None:
    private, optimizer = _made(**TARGET)
    _step(private, optimizer, 3)
    sigma = private.noise_multiplier
    refused: list[tuple[dict[str, Any], str]] = [
        ({"noise_multiplier": 0.5}, "expected enough for an epsilon of 2"),
        ({"sample_rate": 0.9}, "expected enough for an epsilon of 2"),
        ({"noise_multiplier": -1.0}, r"sigma=-1\.0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0"),
        ({"sample_rate": 2.0}, r"sample_rate=2\.0"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            private.change(**changes)
    private.backward(*_data(B))
    with pytest.raises(ValueError, match="expected a call between steps"):
        private.change(max_grad_norm=2.0)
    optimizer.step()
    assert private.noise_multiplier == sigma
    assert private.state_dict()["history"] == [[sigma, 0.1, 4]]


def test_a_loader_follows_a_change_of_the_batch_size_between_its_passes() -> None:
    private, optimizer = _made()
    loader = private.loader(TensorDataset(*_data(20)), num_steps=5)

    def a_pass() -> None:
        for batches in loader:
            for x, y in batches:
                private.backward(x, y)
            optimizer.step()

    a_pass()
    private.change(expected_batch_size=10)
    a_pass()
    assert private.epsilon(DELTA) == epsilon_rdp(((1.0, 0.2, 5), (1.0, 0.5, 5)), DELTA)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(ValueError, match=r"expected a call between passes of private\.loader"):
        private.change(expected_batch_size=5)


# ---- Loops over other batches


def test_epsilon_of_unknown_batches_is_refused_with_the_choices() -> None:
    private, optimizer = _made()
    _step(private, optimizer, 3)
    with pytest.raises(ValueError, match=r"sample_rate=None") as refusal:
        private.epsilon(DELTA)
    for choice in ("private.loader(dataset)", "make_private", "1.0", "steps_per_sample=epochs"):
        assert choice in str(refusal.value)
    # Steps of a loop of one's own stay unknown beside those of a loader.
    private.loader(TensorDataset(*_data(40)))
    with pytest.raises(ValueError, match="It is not known for 3 of 3 steps"):
        private.epsilon(DELTA)


def test_shuffled_batches_have_the_bound_of_their_epochs() -> None:
    private, optimizer = _made()
    num_epochs, steps_of_an_epoch = 3, 5
    _step(private, optimizer, num_epochs * steps_of_an_epoch)
    got = private.epsilon(DELTA, steps_per_sample=num_epochs)
    history = sequential_history(1.0, 15, batch_size=B, num_samples=B * steps_of_an_epoch)
    assert got == pytest.approx(epsilon_rdp(history, DELTA), rel=1e-12)
    assert got == pytest.approx(epsilon_rdp(((1.0, 1.0, 3),), DELTA), rel=1e-12)
    # A sample was in no more steps than were taken.
    assert private.epsilon(DELTA, steps_per_sample=99) == epsilon_rdp(((1.0, 1.0, 15),), DELTA)


def test_a_sample_is_taken_to_be_in_the_steps_with_the_least_noise() -> None:
    ledger = PrivacyLedger([(2.0, None, 4), (1.0, 0.1, 1), (4.0, None, 4)])
    assert ledger.without_sampling(3).history == ((1.0, 1.0, 1), (2.0, 1.0, 2))
    with pytest.raises(ValueError, match="steps_per_sample=0: expected an integer >= 1"):
        ledger.without_sampling(0)
