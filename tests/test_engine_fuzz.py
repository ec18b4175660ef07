"""Engines under random models and loops: right, or refused in a sentence, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import dpsgd_track
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.privacy import engine as engine_module
from dpsgd_track.privacy.clipping import ClippedSum
from dpsgd_track.privacy.spot_check import SpotCheck
from tests.support.engine_fuzz import (
    CRASH,
    EXACT,
    MODES,
    REFUSED,
    WRONG,
    Case,
    Outcome,
    Step,
    cases,
    has_truth,
    kinds,
    reproduction,
    run,
    run_many,
    shares,
    smallest,
    summary,
)
from tests.support.engine_fuzz_parts import HEADS, LOSSES, NONE, PIECES, RANDOM, SOURCES

CASES_A_MODE = 15
SOAK_CASES = 2000
FLOOR = 0.9
"""Share of legal cases that are exact, void ones aside; legal is what has a truth and nothing that
an engine may refuse. The rest is for arguments that have as many rows as the batch has samples by
chance, such as attention's mask [T, T]."""


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """That a module has no rule is said thousands of times."""
    logger = logging.getLogger("dpsgd_track")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def _judge(found: list[tuple[Case, Outcome]], *, most: int = 10) -> None:
    """Fail with the smallest case of each kind unless all are right, or refused with reason."""
    failed = [(case, outcome) for case, outcome in found if outcome.kind in (CRASH, WRONG)]
    assert not failed, kinds(failed, most)


Found = dict[str, list[tuple[Case, Outcome]]]


@pytest.fixture(scope="module")
def found(_quiet: None) -> Found:
    """Cases of each mode, and what came of them."""
    return {mode: run_many(CASES_A_MODE, seed=0, mode=mode) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_what_an_engine_takes_is_right(found: Found, mode: str) -> None:
    _judge(found[mode])


def test_most_of_what_is_legal_is_exact(found: Found) -> None:
    whole = [pair for pairs in found.values() for pair in pairs]
    share = shares(whole)[EXACT]
    assert share >= FLOOR, f"{share:.2f}\n{kinds(whole, 10)}"


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    # `smallest` is quicker than hypothesis is, as it knows what to leave out.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_what_is_near_a_case_is_right_as_well(case: Case) -> None:
    """Hypothesis changes a case a little at a time."""
    outcome = run(case)
    if outcome.kind in (CRASH, WRONG):
        case, outcome = smallest(case, outcome)
        pytest.fail(f"{outcome.kind}: {outcome.detail}\n{reproduction(case)}")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_loops_are_right_or_refused() -> None:
    thousands = run_many(SOAK_CASES, seed=0)
    print(summary(thousands))
    _judge(thousands, most=60)
    assert shares(thousands)[EXACT] >= FLOOR, kinds(thousands, 60)


def _contracts() -> dict[str, tuple[dict[str, Any], str]]:
    # After a layer, so that gradients which are mixed are those of parameters.
    after = "floats-linear"
    found = {
        f"piece-{n}": ({"source": after, "pieces": (n,)}, p.contract) for n, p in PIECES.items()
    }
    found |= {f"source-{n}": ({"source": n}, p.contract) for n, p in SOURCES.items()}
    found |= {f"head-{n}": ({"head": n}, p.contract) for n, p in HEADS.items()}
    return found | {f"loss-{n}": ({"loss": n}, its) for n, (_, its) in LOSSES.items()}


def test_what_is_said_of_a_part_is_what_is_measured() -> None:
    """Three samples of four positions see each other in exactly the parts that say so."""
    differing = []
    for name, (parts, contract) in _contracts().items():
        case = Case(steps=(Step(((3, 4),)),), num_features=3, num_classes=4, seed=1, **parts)
        if contract != RANDOM and has_truth(case) == (contract == NONE):
            differing.append(name)
    assert not differing


# The fuzz with a planted bug.

PLAIN = Case(steps=(Step(((3, 4),)), Step(((2, 3),))), num_features=3, num_classes=4, seed=1)
Plant = Callable[[pytest.MonkeyPatch], None]


def _unclipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine_module, "clip_factors", lambda norm_B, _: torch.ones_like(norm_B))


def _norms_too_small(patch: pytest.MonkeyPatch) -> None:
    right = engine_module.total_norm
    patch.setattr(engine_module, "total_norm", lambda squares: right(squares) * 0.9999)


def _second_step_empty(patch: pytest.MonkeyPatch) -> None:
    right = ComposedMode.clipped_sum
    calls: list[ComposedMode] = []

    def clipped_sum(self: ComposedMode) -> ClippedSum:
        clipped = right(self)
        calls.append(self)
        if len(calls) == 2:
            for gradient in clipped.gradients.values():
                gradient.zero_()
        return clipped

    patch.setattr(ComposedMode, "clipped_sum", clipped_sum)


def _raising(error: Exception) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        patch.setattr(dpsgd_track.library.PrivateTraining, "backward", fail)

    return plant


PLANTED: dict[str, tuple[Plant, Case, str]] = {
    "unclipped": (_unclipped, PLAIN, "weights"),
    "norms-too-small": (_norms_too_small, PLAIN, "norms"),
    "second-step-empty": (_second_step_empty, PLAIN, "weights"),
}


@pytest.fixture
def no_spot_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzz alone, without what the library itself would find."""
    for method in ("before", "after"):
        monkeypatch.setattr(SpotCheck, method, lambda self, *args: None)


@pytest.mark.usefixtures("no_spot_check")
@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_engine_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case, what = PLANTED[name]
    assert run(case).kind == EXACT
    plant(monkeypatch)
    outcome = run(case)
    assert outcome.kind == WRONG
    assert outcome.detail.startswith(what)


def test_noise_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(sigma=0.7)
    assert run(case).kind == EXACT
    right = dpsgd_track.library.make_private

    def without_noise(model: Any, optimizer: Any, **settings: Any) -> Any:
        is_the_twin = settings["mode"] == "reference"
        return right(
            model, optimizer, **settings | ({} if is_the_twin else {"noise_multiplier": 0})
        )

    monkeypatch.setattr(dpsgd_track, "make_private", without_noise, raising=False)
    assert run(case).kind == WRONG


@pytest.mark.parametrize(
    "error",
    [KeyError("pieces.0.a"), IndexError("index out of range"), ValueError("no"), TypeError("x")],
    ids=lambda error: type(error).__name__,
)
def test_an_obscure_error_is_no_refusal(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(error)(monkeypatch)
    assert run(PLAIN).kind == CRASH


def test_to_refuse_everything_is_no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dpsgd_track.library.require

    def refuse(is_met: bool, setting: str, *more: Any) -> None:
        right(False, setting, *more)

    monkeypatch.setattr(dpsgd_track.library, "require", refuse)
    found = [(PLAIN, run(PLAIN))]
    assert found[0][1].kind == REFUSED
    assert shares(found)[EXACT] < FLOOR


def test_a_case_is_the_same_again() -> None:
    assert run_many(5, seed=3) == run_many(5, seed=3)
