"""Loss, clip fraction and epsilon of each step, and the page that draws them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpsgd_track import PrivateTraining, StepMetrics, make_private, write_training_page
from dpsgd_track.privacy.accounting import epsilon_rdp
from dpsgd_track.report.training_page import smoothed

SIGMA, DELTA, RATE, C = 1.0, 1e-5, 0.1, 1.0


def made(**changes: Any) -> tuple[PrivateTraining, torch.optim.Optimizer]:
    """A weight w of one number; the loss of x is x w, so that the gradient is x."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings: dict[str, Any] = {
        "noise_multiplier": SIGMA,
        "max_grad_norm": C,
        "expected_batch_size": 4,
        "sample_rate": RATE,
        "loss": lambda y, _: y[:, 0],
    }
    return make_private(model, optimizer, **(settings | changes)), optimizer


def column(*values: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([[value] for value in values]), torch.zeros(len(values))


def test_metrics_are_of_all_samples_of_the_step() -> None:
    private, optimizer = made()
    private.backward(*column(0.5, 3.0, 4.0))
    private.backward(*column(0.25))
    optimizer.step()
    metrics = private.step_metrics(DELTA)
    assert metrics.step == 1
    assert metrics.loss == pytest.approx(7.75 / 4)
    assert metrics.clip_fraction == 0.5
    assert metrics.epsilon == epsilon_rdp(((SIGMA, RATE, 1),), DELTA)
    assert metrics.logged == {
        "loss": metrics.loss,
        "clip_fraction": 0.5,
        "epsilon": metrics.epsilon,
    }


def test_batches_that_were_dropped_are_not_measured() -> None:
    private, optimizer = made()
    private.backward(*column(5.0))
    optimizer.zero_grad()
    private.backward(*column(0.5))
    optimizer.step()
    first = private.step_metrics(DELTA)
    assert (first.loss, first.clip_fraction) == (0.5, 0.0)
    private.backward(*column(7.0))
    optimizer.zero_grad()
    assert private.step_metrics(DELTA) == first


def test_a_step_without_samples_has_neither_loss_nor_clip_fraction() -> None:
    private, optimizer = made()
    private.backward(torch.zeros(0, 1), torch.zeros(0))
    optimizer.step()
    metrics = private.step_metrics(DELTA)
    assert math.isnan(metrics.loss)
    assert math.isnan(metrics.clip_fraction)
    assert metrics.epsilon > 0


def test_a_mode_that_does_not_clip_has_a_clip_fraction_of_0() -> None:
    private, optimizer = made(mode="no_dp_single", noise_multiplier=0.0)
    private.backward(*column(5.0, 6.0))
    optimizer.step()
    with pytest.raises(ValueError, match="Without noise epsilon is infinite"):
        private.step_metrics(DELTA)


def test_before_the_first_step_there_is_nothing_to_measure() -> None:
    private, _ = made()
    private.backward(*column(1.0))
    with pytest.raises(RuntimeError, match=r"expected a call after optimizer.step\(\)"):
        private.step_metrics(DELTA)


def steps(number: int, **changes: float) -> list[StepMetrics]:
    return [
        StepMetrics(
            **{
                "step": step,
                "loss": 2.0 / step,
                "clip_fraction": 1.0 / step,
                "epsilon": step**0.5,
                "delta": DELTA,
            }
            | changes
        )
        for step in range(1, number + 1)
    ]


def drawn(page: Path) -> dict[str, Any]:
    """The page's figure."""
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    figure: dict[str, Any] = json.loads(data)
    return figure


def test_the_page_has_each_curve_and_the_outcome(tmp_path: Path) -> None:
    page = write_training_page(steps(60), tmp_path / "training.html", title="<b>Mine</b>")
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;Mine&lt;/b&gt;" in text
    assert "60 steps" in text
    assert f"epsilon {60**0.5:.2f} at delta 1e-05" in text
    assert "no noise protects them" in text
    names = [trace["name"] for trace in drawn(page)["data"]]
    assert names == ["loss"] * 2 + ["samples clipped"] * 2 + ["epsilon"]
    assert [trace["yaxis"] for trace in drawn(page)["data"]] == ["y", "y", "y2", "y2", "y3"]


def test_few_steps_are_drawn_as_they_are(tmp_path: Path) -> None:
    page = write_training_page(steps(3), tmp_path / "training.html")
    assert [trace["name"] for trace in drawn(page)["data"]] == [
        "loss",
        "samples clipped",
        "epsilon",
    ]
    assert "loss 2 at first, 0.667 at the end" in page.read_text(encoding="utf-8")


def test_a_page_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the metrics of one step at least"):
        write_training_page([], tmp_path / "training.html")


def test_smoothing_keeps_a_straight_line_and_leaves_gaps_out() -> None:
    line = np.arange(48.0)
    np.testing.assert_allclose(smoothed(line)[2:-2], line[2:-2])
    with_gap = np.where(line == 20, np.nan, 7.0)
    np.testing.assert_allclose(smoothed(with_gap), 7.0)
