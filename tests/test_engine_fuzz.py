"""Engines under random models and loops: right, or refused in a sentence, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_fuzz import (
    CRASH,
    EXACT,
    MODES,
    REFUSED,
    VOID,
    WRONG,
    Case,
    Outcome,
    Step,
    cases,
    has_truth,
    kinds,
    run,
    run_many,
    shares,
    summary,
)
from engine_fuzz_parts import HEADS, LOSSES, NONE, PIECES, RANDOM, SOURCES
from hypothesis import HealthCheck, given, settings

import dpsgd_track
from dpsgd_track.privacy import engine as engine_module

CASES_A_MODE = 25
SOAK_CASES = 2000
FLOOR = 0.9
"""Share of legal cases that are exact: with a truth, and nothing that an engine may refuse. The
rest is for layers that no rule knows and that cannot be mapped over samples."""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """That a module has no rule is said thousands of times."""
    caplog.set_level(logging.ERROR, logger="dpsgd_track")


def _report(case: Case, outcome: Outcome) -> str:
    return (
        f"{outcome.kind}: {outcome.detail}\n"
        f"PYTHONPATH=.:tests python -c 'from engine_fuzz import *; print(run({case}))'"
    )


@pytest.mark.parametrize("mode", MODES)
def test_what_an_engine_takes_is_right(mode: str) -> None:
    seen: list[tuple[Case, Outcome]] = []

    @settings(
        max_examples=CASES_A_MODE,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(mode))
    def check(case: Case) -> None:
        outcome = run(case)
        seen.append((case, outcome))
        assert outcome.kind in (EXACT, REFUSED, VOID), _report(case, outcome)

    check()
    assert shares(seen)[EXACT] >= FLOOR, kinds(seen, 10)


@pytest.mark.soak
def test_thousands_of_loops_are_right_or_refused() -> None:
    found = run_many(SOAK_CASES, seed=0)
    print(summary(found))
    wrong = [(case, outcome) for case, outcome in found if outcome.kind in (CRASH, WRONG)]
    assert not wrong, kinds(wrong, 60)
    assert shares(found)[EXACT] >= FLOOR, kinds(found, 60)


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


def _second_batch_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = dpsgd_track.library.PrivateTraining.backward

    def backward(self: Any, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
        sums = dict(self.mode.engine.sharder.sums) if self.num_steps == 1 else None
        losses = right(self, inputs, targets)
        if sums is not None:
            self.mode.engine.sharder.sums = sums
        return losses

    patch.setattr(dpsgd_track.library.PrivateTraining, "backward", backward)


def _raising(error: Exception) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        patch.setattr(dpsgd_track.library.PrivateTraining, "backward", fail)

    return plant


PLANTED: dict[str, tuple[Plant, Case, str]] = {
    "unclipped": (_unclipped, PLAIN, "weights"),
    "norms-too-small": (_norms_too_small, PLAIN, "norms"),
    "a-batch-forgotten": (_second_batch_forgotten, PLAIN, "weights"),
}


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
