"""The page for users of Opacus: both of its programs, run and compared."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support import ROOT

SIGMA, C, BATCH_SIZE, DELTA, NUM_SAMPLES = 0.9, 0.5, 8, 1e-4, 40

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def programs() -> dict[str, str]:
    """The page's programs, by the comment that they begin with."""
    page = (ROOT / "docs" / "from_opacus.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    return dict(blocks)


def run(program: str, batch_size: int = BATCH_SIZE, **changes: Any) -> dict[str, Any]:
    """Names of a program after it ran on fresh weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(NUM_SAMPLES, 6), torch.randint(0, 3, (NUM_SAMPLES,))
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "dataset": TensorDataset(x, y),
        "criterion": nn.CrossEntropyLoss(),
        "DataLoader": DataLoader,
        **{"BATCH_SIZE": batch_size, "SIGMA": SIGMA, "C": C, "DELTA": DELTA},
    }
    exec(program, names | changes, names)
    return names


def weights(names: dict[str, Any]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in names["model"].parameters()])


def test_both_programs_spend_the_same() -> None:
    both = {name: run(program) for name, program in programs().items()}
    # Opacus's PRV is within 0.01 of the true epsilon, and so is ours, which is the same.
    assert both["dpsgd-track"]["epsilon"] == pytest.approx(both["opacus"]["epsilon"], abs=1e-6)
    assert both["dpsgd-track"]["private"].num_steps == NUM_SAMPLES // BATCH_SIZE


def test_without_noise_both_programs_take_the_same_step() -> None:
    # Where each step draws every sample, both take the same samples.
    text = {
        name: re.sub("noise_multiplier=SIGMA", "noise_multiplier=0.0", program)
        for name, program in programs().items()
    }
    text = {name: re.sub("epsilon = .*", "", program) for name, program in text.items()}
    moved = {name: weights(run(program, NUM_SAMPLES)) for name, program in text.items()}
    torch.testing.assert_close(moved["dpsgd-track"], moved["opacus"], rtol=1e-4, atol=1e-6)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    before = weights({"model": copy.deepcopy(start)})
    assert not torch.allclose(moved["opacus"], before)


def test_the_loop_here_differs_in_few_lines() -> None:
    lines = {name: program.strip().splitlines() for name, program in programs().items()}
    assert len(lines["dpsgd-track"]) <= len(lines["opacus"]) + 1
