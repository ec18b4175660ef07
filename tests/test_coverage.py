"""Gradients of many architectures are exact, or refused by a sentence that helps."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dpsgd_track
from benchmarks.coverage_judge import (
    CRASH,
    EXACT,
    FAILURES,
    REFUSED,
    SAME,
    SKIPPED,
    WRONG,
    Row,
    is_refusal,
    judge,
)
from benchmarks.coverage_page import page
from benchmarks.coverage_zoo import ARCHITECTURES, Architecture
from dpsgd_track.privacy import engine
from dpsgd_track.privacy.spot_check import SpotCheck

ROOT = Path(__file__).resolve().parent.parent
TELLING = (
    "nanogpt",
    "relative-bias",
    "torchvision-vit",
    "coordinate-grid",
    "lstm-time-first",
    "time-first",
    "label-table",
    "textcnn",
    "functional-linear",
    "batchnorm-train",
)
"""Cheap ones that an engine can get wrong: what is no sample has the length of the batch."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows_of(name: str) -> list[Row]:
    return list(judge(name, ARCHITECTURES[name]))


@pytest.mark.parametrize("name", TELLING)
def test_telling_architecture_is_exact_or_refused(name: str) -> None:
    assert [row for row in rows_of(name) if row.outcome not in (EXACT, REFUSED)] == []


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_architecture_is_exact_or_refused() -> None:
    rows = [row for name in ARCHITECTURES for row in rows_of(name)]
    assert [row for row in rows if row.outcome in FAILURES] == []
    assert len(ARCHITECTURES) > 60


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_architecture_is_exact_or_refused_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "ranks.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage_ranks.py"), str(out)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=850)
    with out.open(encoding="utf-8", newline="") as file:
        outcomes = {row["architecture"]: row["outcome"] for row in csv.DictReader(file)}
    assert list(outcomes.values()).count(EXACT) >= 25


def test_zoo_has_architectures_of_every_kind() -> None:
    kinds = {architecture.kind for architecture in ARCHITECTURES.values()}
    assert kinds == {
        "causal LM",
        "masked LM, encoder",
        "seq2seq",
        "vision",
        "speech",
        "recurrent",
        "PEFT",
        "classic",
    }


@pytest.mark.usefixtures("no_spot_check")
@pytest.mark.parametrize("name", ["textcnn", "mlp-dropout"])
def test_gradients_that_are_not_clipped_are_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unclipped(norm_B: Tensor, max_grad_norm: float) -> Tensor:
        return torch.ones_like(norm_B)

    monkeypatch.setattr(engine, "clip_factors", unclipped)
    assert {row.outcome for row in rows_of(name)} == {WRONG}


@pytest.fixture
def no_spot_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge alone, without what the library itself would find."""
    for method in ("before", "after"):
        monkeypatch.setattr(SpotCheck, method, lambda self, *args: None)


def test_norm_that_is_a_millionth_off_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.total_norm
    monkeypatch.setattr(engine, "total_norm", lambda squares: original(squares) * (1 + 1e-6))
    rows = rows_of("textcnn")
    assert {row.outcome for row in rows} == {WRONG}
    assert "norm of the first batch is 1.0e-06 off" in rows[0].sentence


@pytest.mark.usefixtures("no_spot_check")
def test_first_batch_stays_wrong_where_the_second_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.total_norm
    sizes = []

    def off_once(squares: Any) -> Tensor:
        sizes.append(1)
        if len(sizes) > 1:
            raise RuntimeError("second batch")
        return original(squares) * 2

    monkeypatch.setattr(engine, "total_norm", off_once)
    row = next(judge("textcnn", ARCHITECTURES["textcnn"]))
    assert row.outcome == WRONG


def _raises(error: Exception) -> Callable[..., Any]:
    def make_private(*args: Any, **kwargs: Any) -> Any:
        raise error

    return make_private


RAISED: dict[str, tuple[Exception, str]] = {
    "refused": (ValueError("head: expected a plain module. Freeze it."), REFUSED),
    "without-a-way-out": (ValueError("head: cannot be told apart."), CRASH),
    "without-a-name": (ValueError("expected 2 values. Use other ones."), CRASH),
    "obscure": (IndexError("index out of range in self"), CRASH),
}


@pytest.mark.parametrize("name", RAISED)
def test_exception_is_refusal_or_crash(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, outcome = RAISED[name]
    monkeypatch.setattr(dpsgd_track, "make_private", _raises(error))
    row = next(judge("textcnn", ARCHITECTURES["textcnn"]))
    assert row.outcome == outcome
    assert str(error) in row.sentence


def test_setting_counts_as_a_name() -> None:
    assert is_refusal("max_grad_norm=-1: expected a number > 0. Give a greater one.", ())
    assert is_refusal("model='Net': these can't be clipped: a (mixes; use GroupNorm).", ())
    assert not is_refusal("max_grad_norm=-1: expected a number > 0.", ())


def test_case_that_takes_too_long_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(10)

    monkeypatch.setattr(dpsgd_track, "make_private", slow)
    row = next(judge("textcnn", ARCHITECTURES["textcnn"], seconds=0.3))
    assert (row.outcome, row.sentence) == (CRASH, "TimeoutError: took more than 0.3 s")


def test_missing_package_is_skipped_with_its_name() -> None:
    textcnn = ARCHITECTURES["textcnn"]
    missing = Architecture(
        kind=textcnn.kind,
        build=textcnn.build,
        make_samples=textcnn.make_samples,
        loss=textcnn.loss,
        needs="no_such_package",
    )
    (row, *_) = judge("missing", missing)
    assert (row.outcome, row.sentence) == (SKIPPED, "no_such_package is not installed.")


def test_page_shows_the_worst_of_an_architecture() -> None:
    def row(batch: str, mode: str, outcome: str) -> Row:
        sentence = "" if outcome == EXACT else f"{outcome} | said"
        return Row(
            architecture="net",
            kind="classic",
            batch=batch,
            batch_sizes="3",
            mode=mode,
            outcome=outcome,
            sentence=sentence,
        )

    text = page([row(SAME, "flash", EXACT), row(SAME, "flash_bk", WRONG)])
    assert "1 architectures: 1 exact, 1 wrong." in text
    assert r"| net |  | **wrong** |  |  | 0 |  | wrong \| said |" in text
