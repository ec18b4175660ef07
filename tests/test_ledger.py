"""Epsilon is that of all steps of a training, each at its own noise multiplier and sample rate."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import sys
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpsgd_track.privacy import accounting, ledger
from dpsgd_track.privacy.accounting import epsilon_prv, epsilon_rdp
from dpsgd_track.privacy.ledger import MAX_NUM_STEPS, PrivacyLedger
from tests.support.dp_accounting_values import (
    DELTAS,
    HISTORIES,
    ORDERS_KEPT,
    PATH,
    History,
    accountants_of,
)

DELTA = 1e-5
FIRST, SECOND = (0.6, 0.1, 50), (4.0, 0.1, 1)
VALUES = {
    tuple(tuple(stage) for stage in row["history"]): row
    for row in json.loads(PATH.read_text(encoding="utf-8"))["values"]
}


def _name(history: History) -> str:
    stages = [f"{sigma:g}-{q:g}-{steps}" for sigma, q, steps in history[:3]]
    return "+".join(stages + [f"{len(history)}-stages"] * (len(history) > 3))


each_history = pytest.mark.parametrize("history", HISTORIES, ids=_name)


def _resumed(private: PrivacyLedger) -> PrivacyLedger:
    """State that a later process reads from the file that this one wrote."""
    file = io.BytesIO()
    torch.save(private.state_dict(), file)
    file.seek(0)
    resumed = PrivacyLedger()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


def _trained() -> PrivacyLedger:
    """50 steps, and one more with other noise after a resume."""
    first = PrivacyLedger()
    for _ in range(FIRST[2]):
        first.record(*FIRST[:2])
    second = _resumed(first)
    second.record(*SECOND[:2])
    return second


# ---- What is recorded


def test_equal_steps_in_a_row_are_one_stage() -> None:
    private = PrivacyLedger()
    for sigma, q in ((1.0, 0.1), (1.0, 0.1), (2.0, 0.1), (1.0, 0.1), (1.0, None), (1.0, None)):
        private.record(sigma, q)
    assert private.history == ((1.0, 0.1, 2), (2.0, 0.1, 1), (1.0, 0.1, 1), (1.0, None, 2))
    assert private.num_steps == 6


def test_extend_adds_the_steps_of_another_ledger() -> None:
    private, other = PrivacyLedger([(1.0, 0.1, 3)]), PrivacyLedger([(1.0, 0.1, 2), (2.0, None, 1)])
    private.extend(other)
    assert private.history == ((1.0, 0.1, 5), (2.0, None, 1))
    private.extend(private)
    assert private.num_steps == 12
    with pytest.raises(ValueError, match="expected a PrivacyLedger"):
        private.extend([(1.0, 0.1, 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf, 10**400, True, "1", None])
def test_a_noise_multiplier_out_of_range_is_not_recorded(sigma: Any) -> None:
    private = PrivacyLedger()
    with pytest.raises(ValueError, match=r"^noise_multiplier=.*: expected a finite number >= 0"):
        private.record(sigma, 0.1)
    assert private.num_steps == 0


@pytest.mark.parametrize("q", [0, -0.1, 1.5, math.nan, True, "0.1", Fraction(1, 10**400)])
def test_a_sample_rate_out_of_range_is_not_recorded(q: Any) -> None:
    private = PrivacyLedger()
    with pytest.raises(ValueError, match=r"^sample_rate=.*: expected a number above 0"):
        private.record(1.0, q)
    assert private.num_steps == 0


def test_numbers_of_numpy_are_recorded_as_those_of_python() -> None:
    private = PrivacyLedger()
    private.record(np.float64(1.0), np.float32(0.5))
    private.record(1, 0.5)
    assert private.history == ((1.0, 0.5, 2),)
    assert json.loads(json.dumps(private.state_dict())) == private.state_dict()


def test_ledgers_can_be_copied_compared_and_read() -> None:
    private = PrivacyLedger([FIRST, SECOND])
    for copied in (copy.deepcopy(private), copy.copy(private), pickle.loads(pickle.dumps(private))):
        assert copied == private
        copied.record(*SECOND[:2])
        assert copied != private
        assert (copied.num_steps, private.num_steps) == (52, 51)
        assert private.history == (FIRST, SECOND)
    assert private != [FIRST, SECOND]
    assert repr(private) == "PrivacyLedger([(0.6, 0.1, 50), (4.0, 0.1, 1)])"
    assert eval(repr(private)) == private
    long = PrivacyLedger([(1.0 + k, 0.1, 1) for k in range(1000)])
    assert repr(long).startswith("PrivacyLedger([(1.0, 0.1, 1), ")
    assert "... 995 more ..., (999.0, 0.1, 1)" in repr(long)


# ---- What was spent


def test_nothing_is_spent_before_the_first_step() -> None:
    for accountant in ledger.ACCOUNTANTS:
        assert PrivacyLedger().epsilon(DELTA, accountant) == 0.0


def test_the_steps_before_a_resume_are_priced_at_their_own_noise() -> None:
    private = _trained()
    assert private.history == (FIRST, SECOND)
    before = PrivacyLedger([FIRST]).epsilon(DELTA)
    assert private.epsilon(DELTA) == epsilon_rdp((FIRST, SECOND), DELTA) >= before
    # The test has power: what forgets the first stage, or prices all of it at the last sigma.
    for wrong in ((SECOND,), ((*SECOND[:2], 51),)):
        assert epsilon_rdp(wrong, DELTA) < 0.2 * before


@pytest.mark.parametrize("compute", [epsilon_rdp, epsilon_prv])
def test_epsilon_does_not_depend_on_the_order_of_stages(compute: Any) -> None:
    assert compute((FIRST, SECOND), DELTA) == pytest.approx(compute((SECOND, FIRST), DELTA), 1e-9)


def _holds(history: History) -> bool:
    """True if the accountants agree with dp-accounting on the whole history."""
    private = PrivacyLedger(history)
    row = VALUES[history]
    for delta, rdp, pld in zip(DELTAS, row["rdp"], row["pld"], strict=True):
        epsilon = private.epsilon(delta)
        # Ours has fractional orders besides, and takes the least. Where dp-accounting says 0, it
        # is by a bound that Opacus does not have.
        if not (epsilon <= rdp * (1 + 1e-6) or rdp == 0) or epsilon < pld:
            return False
    return True


@each_history
def test_rdp_is_no_more_than_that_of_dp_accounting_and_no_less_than_pld(history: History) -> None:
    assert _holds(history)


@each_history
def test_each_stage_counts(history: History) -> None:
    """Planted bugs: the earlier stages are forgotten, or priced at the settings of the last."""
    stages = PrivacyLedger(history).history
    if len(stages) == 1:
        return
    right = [PrivacyLedger(history).epsilon(delta) for delta in DELTAS]
    last = [PrivacyLedger(stages[-1:]).epsilon(delta) for delta in DELTAS]
    assert last <= right
    num_steps = sum(stage.num_steps for stage in stages)
    at_last = [PrivacyLedger([(*stages[-1][:2], num_steps)]).epsilon(delta) for delta in DELTAS]
    assert at_last != pytest.approx(right, rel=1e-6)


def test_the_values_of_dp_accounting_tell_planted_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    history = (FIRST, SECOND)
    assert _holds(history)
    accountable = PrivacyLedger.accountable_history

    def forgets(private: PrivacyLedger) -> History:
        return accountable(private)[-1:]

    def prices_all_at_the_last(private: PrivacyLedger) -> History:
        return ((*accountable(private)[-1][:2], private.num_steps),)

    for bug in (forgets, prices_all_at_the_last):
        monkeypatch.setattr(PrivacyLedger, "accountable_history", bug)
        assert not _holds(history)


@each_history
def test_divergences_at_whole_orders_are_those_of_dp_accounting(history: History) -> None:
    orders = accounting._orders()
    spent = sum(
        accounting._rdp_of_step(sigma, q) * steps for sigma, q, steps in accounting._merged(history)
    )
    for order in ORDERS_KEPT:
        # dp-accounting rounds log A of each step at about 1e-15.
        expected = VALUES[history]["rdp_at_order"][str(order)]
        num_steps = sum(steps for _, _, steps in history)
        got = spent[orders.index(order)]
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-13 * num_steps)


@each_history
def test_prv_is_within_its_error_of_pld(history: History) -> None:
    """PRV adds its error of 0.01, and asks for a thousandth of delta less; PLD is rounded up."""
    if max(sigma for sigma, _, _ in history) > 1e3:
        with pytest.raises(ValueError, match="computes rightly and in time"):
            PrivacyLedger(history).epsilon(DELTA, "prv")
        return
    private, pld = PrivacyLedger(history), VALUES[history]["pld"][DELTAS.index(DELTA)]
    prv = private.epsilon(DELTA, "prv")
    assert pld <= prv <= pld + 0.013
    assert prv <= private.epsilon(DELTA)


def _log_a(sigma: float, q: float, order: float) -> float:
    """log A(order) by adding what exceeds 1, over z of the standard normal distribution."""
    z = np.linspace(-12, 12 + order / sigma, 100_001)
    u = q * np.expm1(z / sigma - 0.5 / sigma**2)
    # (1 + u)^order - 1 - order u, of which u has mean 0; by its series where that cancels.
    excess = np.expm1(order * np.log1p(u)) - order * u
    small = np.abs(u) < 1e-3 / order
    v = np.where(small, u, 0.0)
    square = order * (order - 1) / 2 * v * v
    series = square * (1 + (order - 2) / 3 * v * (1 + (order - 3) / 4 * v))
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return math.log1p(float((np.where(small, series, excess) * density).sum() * (z[1] - z[0])))


@pytest.mark.parametrize("q", [1e-8, 1e-4, 0.01, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("sigma", [2.0, 10.0, 1e3, 1e8])
def test_the_divergence_of_a_step_is_that_of_numerical_integration(sigma: float, q: float) -> None:
    """Opacus's own was below 0 at q = 1e-8, and failed at sigma = 1e8 and q = 0.1."""
    divergences = accounting._rdp_of_step(sigma, q)
    orders = accounting._orders()
    for order in (1.1, 1.5, 2.0, 3.7, 8.0, 10.5, 30.0):
        got = divergences[orders.index(order)] * (order - 1)
        exact = _log_a(sigma, q, order)
        # Whole orders are exact. Where log A is so small that rounding shows, others are on the
        # chord. For small q and large sigma, log A is a (a - 1) times a constant, and the chord
        # is above it by a share f (1 - f) / (a (a - 1)); by a hundredth of that more elsewhere.
        f = order % 1
        chord = f * (1 - f) / (order * (order - 1))
        assert exact * (1 - 1e-7) <= got <= exact * (1 + 1e-7 + 1.01 * chord)


@pytest.mark.parametrize("q", [1e-300, 1e-8, 0.1, 1.0])
@pytest.mark.parametrize("sigma", [1e-320, 1e-200, 1e-3, 1.0, 1e8, 1e200, 1e308])
@pytest.mark.parametrize("delta", [5e-324, 1e-5, 1 - 2**-53])
def test_edges_have_an_epsilon(sigma: float, q: float, delta: float) -> None:
    epsilon = PrivacyLedger([(sigma, q, 10**6), (1.0, 0.01, 10)]).epsilon(delta)
    assert epsilon >= PrivacyLedger([(1.0, 0.01, 10)]).epsilon(delta) >= 0


def test_many_stages_are_priced_in_the_time_of_their_different_settings() -> None:
    stages = [(1.0 + 0.5 * (k % 4), 0.01, 1 + k % 2) for k in range(100_000)]
    private = PrivacyLedger(stages)
    assert len(private.history) == 100_000
    few = [(1.0 + 0.5 * k, 0.01, 25_000 * (1 + k % 2)) for k in range(4)]
    assert private.epsilon(DELTA) == PrivacyLedger(few).epsilon(DELTA)


def test_epsilon_needs_noise_in_every_step() -> None:
    private = PrivacyLedger([(1.0, 0.1, 7), (0.0, 0.1, 3)])
    message = (
        r"^noise_multiplier=0\.0: expected a number > 0\. Without noise epsilon is infinite, and "
        r"3 of 10 steps had none\.$"
    )
    with pytest.raises(ValueError, match=message):
        private.epsilon(DELTA)


def test_epsilon_needs_the_sample_rate_of_every_step() -> None:
    private = PrivacyLedger([(1.0, None, 3), (1.0, 0.1, 7)])
    with pytest.raises(ValueError, match=r"^sample_rate=None: .* not known for 3 of 10 steps\."):
        private.epsilon(DELTA)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, True, None, "1e-5"])
def test_a_delta_out_of_range_is_refused(delta: Any) -> None:
    with pytest.raises(ValueError, match=r"^delta=.*: expected a number between 0 and 1\.$"):
        _trained().epsilon(delta)


def test_an_unknown_accountant_is_refused_even_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="accountant='gdp': expected rdp, prv or pld"):
        PrivacyLedger().epsilon(DELTA, "gdp")


@pytest.mark.parametrize(
    ("stages", "delta"),
    [
        ([(0.05, 1.0, 1)], DELTA),
        ([(1.0, 0.01, 1000)], 1e-13),
        ([(1.0 + k, 0.01, 1) for k in range(21)], DELTA),
    ],
    ids=["epsilon-of-hundreds", "delta-near-rounding", "many-settings"],
)
def test_prv_is_not_asked_for_what_it_gets_wrong_or_takes_long_for(
    stages: list[tuple[float, float, int]], delta: float
) -> None:
    private = PrivacyLedger(stages)
    message = f"got about {private.epsilon(delta):.3g} at delta={delta:g}. Use rdp."
    with pytest.raises(ValueError, match="accountant='prv'") as refusal:
        private.epsilon(delta, "prv")
    assert str(refusal.value).endswith(message)


# ---- dp-accounting's accountant


def test_pld_says_which_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    accounting.epsilon_pld.cache_clear()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ValueError, match="Run pip install dp-accounting, or use rdp or prv"):
        _trained().epsilon(DELTA, "pld")


class _Composed:
    """In the place of dp-accounting's PLD accountant: epsilon is the number of steps composed."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, int]] = []

    def compose(self, event: tuple[float, float], count: int) -> None:
        sigma, q = event
        self.steps.append((sigma, q, count))

    def get_epsilon(self, delta: float) -> float:
        assert self.steps == [(0.6, 0.1, 52), (4.0, 0.1, 1)]
        return 53.0 if delta > 1e-12 else math.inf


def test_pld_composes_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where dp-accounting is not installed."""
    events = SimpleNamespace(
        GaussianDpEvent=lambda sigma: sigma, PoissonSampledDpEvent=lambda q, sigma: (sigma, q)
    )
    monkeypatch.setitem(sys.modules, "dp_accounting", SimpleNamespace(dp_event=events))
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", SimpleNamespace(PLDAccountant=_Composed))
    accounting.epsilon_pld.cache_clear()
    private = PrivacyLedger([FIRST, SECOND, (*FIRST[:2], 2)])
    assert private.epsilon(DELTA, "pld") == 53.0
    with pytest.raises(ValueError, match="accountant='pld': expected an epsilon that it computes"):
        private.epsilon(1e-13, "pld")
    accounting.epsilon_pld.cache_clear()


@pytest.mark.parametrize("history", [(FIRST, SECOND), HISTORIES[2], HISTORIES[18]], ids=_name)
def test_pld_is_that_of_dp_accounting(history: History) -> None:
    pytest.importorskip("dp_accounting")
    accounting.epsilon_pld.cache_clear()
    rdp, pld = accountants_of(history)
    got = PrivacyLedger(history).epsilon(DELTA, "pld")
    assert got == pytest.approx(pld.get_epsilon(DELTA), rel=1e-9)
    # What is stored is what it says.
    row = VALUES[history]
    assert row["pld"][DELTAS.index(DELTA)] == pytest.approx(got, rel=1e-4)
    assert row["rdp"][DELTAS.index(DELTA)] == pytest.approx(rdp.get_epsilon(DELTA), rel=1e-9)


def test_pld_is_not_asked_for_what_takes_all_memory() -> None:
    pytest.importorskip("dp_accounting")
    with pytest.raises(ValueError, match="accountant='pld'"):
        PrivacyLedger([(0.01, 1.0, 1)]).epsilon(DELTA, "pld")


# ---- The state


def test_a_state_is_what_json_and_a_checkpoint_hold() -> None:
    private = PrivacyLedger([FIRST, (1.0, None, 2), (0.0, 1.0, 3)])
    assert private.state_dict() == {
        "kind": "dpsgd_track.privacy_ledger",
        "version": 1,
        "num_steps": 55,
        "history": [[0.6, 0.1, 50], [1.0, None, 2], [0.0, 1.0, 3]],
    }
    assert _resumed(private) == private
    from_json = PrivacyLedger()
    from_json.load_state_dict(json.loads(json.dumps(private.state_dict())))
    assert from_json == private
    assert _resumed(PrivacyLedger()) == PrivacyLedger()


def test_a_state_does_not_change_with_its_ledger() -> None:
    private = PrivacyLedger([FIRST])
    state = private.state_dict()
    private.record(*FIRST[:2])
    assert state["history"] == [list(FIRST)]
    resumed = PrivacyLedger()
    resumed.load_state_dict(state)
    resumed.record(*FIRST[:2])
    assert state["history"] == [list(FIRST)]


def test_steps_that_are_recorded_already_are_neither_lost_nor_counted_twice() -> None:
    private = _trained()
    with pytest.raises(ValueError, match="num_steps=51: expected a ledger without steps"):
        private.load_state_dict(private.state_dict())
    assert private.history == (FIRST, SECOND)


def _state(**changes: Any) -> dict[str, Any]:
    return PrivacyLedger([FIRST, SECOND]).state_dict() | changes


def _of_stage(*stage: Any) -> dict[str, Any]:
    return _state(history=[list(FIRST), list(stage)])


SIGMA, RATE = r"history'\]\[1\]: noise_multiplier=", r"history'\]\[1\]: sample_rate="
STEPS = r"history'\]\[1\]: num_steps="
DAMAGED: dict[str, tuple[Any, str]] = {
    "not-a-dict": ([1, 2], "state="),
    "empty": ({}, "Its keys are none"),
    "foreign": ({"state": {}, "param_groups": []}, "Its keys are state, param_groups"),
    "other-kind": (_state(kind="opacus"), r"state\['kind'\]='opacus'"),
    "no-version": ({k: v for k, v in _state().items() if k != "version"}, "'version'.=None"),
    "version-0": (_state(version=0), r"'version'.=0: expected 1\.$"),
    "version-true": (_state(version=True), r"'version'.=True: expected 1\.$"),
    "version-text": (_state(version="2"), r"'version'.='2': expected 1\.$"),
    "newer": (_state(version=2), "newer dpsgd-track; upgrade"),
    "no-history": ({k: v for k, v in _state().items() if k != "history"}, "the keys kind"),
    "another-key": (_state(seed=1), "the keys kind"),
    "history-is-text": (_state(history="abc"), "a list of stages"),
    "stage-of-two": (_of_stage(1.0, 0.1), r"history'\]\[1\]=\[1.0, 0.1\]"),
    "stage-is-text": (_state(history=["abc"]), "noise multiplier, sample rate, number"),
    "sigma-negative": (_of_stage(-1.0, 0.1, 1), SIGMA),
    "sigma-nan": (_of_stage(math.nan, 0.1, 1), SIGMA),
    "sigma-infinite": (_of_stage(math.inf, 0.1, 1), SIGMA),
    "sigma-true": (_of_stage(True, 0.1, 1), SIGMA),
    "sigma-none": (_of_stage(None, 0.1, 1), SIGMA),
    "rate-zero": (_of_stage(1.0, 0.0, 1), RATE),
    "rate-negative": (_of_stage(1.0, -0.1, 1), RATE),
    "rate-above-1": (_of_stage(1.0, 1.01, 1), RATE),
    "rate-nan": (_of_stage(1.0, math.nan, 1), RATE),
    "steps-negative": (_of_stage(1.0, 0.1, -1), STEPS),
    "steps-zero": (_of_stage(1.0, 0.1, 0), STEPS),
    "steps-float": (_of_stage(1.0, 0.1, 1.0), STEPS),
    "steps-true": (_of_stage(1.0, 0.1, True), STEPS),
    "steps-nan": (_of_stage(1.0, 0.1, math.nan), STEPS),
    "steps-huge": (_of_stage(1.0, 0.1, MAX_NUM_STEPS + 1), STEPS),
    "sum-huge": (_of_stage(1.0, 0.1, MAX_NUM_STEPS), r"num_steps=.* at most 2\*\*53 in all"),
    "sum-differs": (_state(num_steps=50), "=50: expected 51, the sum over its history"),
    "sum-float": (_state(num_steps=51.0), "=51.0: expected 51, the sum"),
    "version-0.1": ({"num_steps": 50}, "did not record the noise multiplier and sample rate"),
    "version-0.1-no-steps": ({"num_steps": 0}, "It holds no steps"),
}


@pytest.mark.parametrize(("state", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_state_is_refused(state: Any, message: str) -> None:
    private = PrivacyLedger()
    with pytest.raises(ValueError, match=message) as refusal:
        private.load_state_dict(state)
    assert ": expected" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert private == PrivacyLedger()


def test_a_state_of_version_0_1_can_be_given_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="PrivacyLedger") as refusal:
        PrivacyLedger().load_state_dict({"num_steps": 50})
    advice = str(refusal.value).partition("load ")[2].removesuffix(" instead.")
    assert advice.startswith("dpsgd_track.privacy.ledger.PrivacyLedger(")
    expression = advice.removeprefix("dpsgd_track.privacy.ledger.")
    given = eval(
        expression, {"PrivacyLedger": PrivacyLedger}, {"noise_multiplier": 0.6, "sample_rate": 0.1}
    )
    private = PrivacyLedger()
    private.load_state_dict(given)
    assert private.history == (FIRST,)
