"""Clipping rules: every mode against gradients clipped by hand, and the bound on a contribution."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpsgd_track
from dpsgd_track.comparison.measure.clip_factors import clipped_share, factors_by
from dpsgd_track.config import REGIMES, RegimeConfig
from dpsgd_track.launcher.choices import TrainingChoices
from dpsgd_track.launcher.regimes import regimes_of
from dpsgd_track.launcher.suites import Suite
from dpsgd_track.library import PrivateTraining
from dpsgd_track.modes.table import MODES
from tests.support.synthetic_group import compared, mode_run, trajectory
from tests.support.workspace import Workspace

B, T, D, V, CLASSES = 6, 4, 5, 9, 3
OURS = [
    name
    for name, spec in MODES.items()
    if spec.runs_on_one_device and spec.is_private and spec.strategy != "opacus"
]
RULES = ("flat", "automatic", "per_layer")


class Model(nn.Module):
    """A tied embedding, a layer without a rule, one that is unused, one with two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.rnn = nn.GRU(D, D, batch_first=True)
        self.norm, self.unused = nn.LayerNorm(D), nn.Linear(D, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.rnn(self.embedding(tokens))
        y: Tensor = self.head(torch.tanh(self.mix(self.norm(h)).mean(dim=1)))
        return y


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def data(seed: int = 0, size: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (size, T), generator=generator)
    return tokens, torch.randint(0, V, (size,), generator=generator)


def private_of(model: nn.Module, **changes: Any) -> tuple[PrivateTraining, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    settings: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.8,
        "expected_batch_size": 1,
        "seed": 1,
    }
    return dpsgd_track.make_private(model, optimizer, **(settings | changes)), optimizer


def gradients_of(model: nn.Module, tokens: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Each sample's gradient by parameter, by plain autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for i in range(len(tokens)):
        loss = F.cross_entropy(model(tokens[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def length(gradient: dict[str, Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt())


def flat(gradient: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    factor = min(1.0, bound / max(length(gradient), 1e-30))
    return {name: factor * g for name, g in gradient.items()}


def automatic(gradient: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    factor = bound / (length(gradient) + 0.01)
    return {name: factor * g for name, g in gradient.items()}


def per_layer(gradient: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, g in gradient.items():
        layers.setdefault(name.split(".")[0], {})[name] = g
    share = bound / len(layers) ** 0.5
    return {name: g for layer in layers.values() for name, g in flat(layer, share).items()}


BY_HAND: dict[str, Callable[[dict[str, Tensor], float], dict[str, Tensor]]] = {
    "flat": flat,
    "automatic": automatic,
    "per_layer": per_layer,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("is_own", [False, True], ids=["backward", "batch"])
def test_norms_factors_and_sums_are_those_by_hand(mode: str, rule: str, is_own: bool) -> None:
    if is_own and mode == "reference":
        pytest.skip("reference takes inputs and targets")
    model, (tokens, y) = fresh(), data()
    each = gradients_of(model, tokens, y)
    bound = float(torch.tensor([length(g) for g in each]).median())
    clipped = [BY_HAND[rule](g, bound) for g in each]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    private, optimizer = private_of(model, mode=mode, clipping=rule, max_grad_norm=bound)
    if is_own:
        with private.batch(B):
            private.backward(F.cross_entropy(model(tokens), y, reduction="none"))
    else:
        private.backward(tokens, y)
    record = private.last
    assert record is not None
    assert record.norm_B is not None
    assert record.clip_factor_B is not None
    optimizer.step()
    norms = torch.tensor([length(g) for g in each])
    torch.testing.assert_close(record.norm_B.float(), norms, rtol=1e-5, atol=0)
    factors = torch.tensor([length(c) / length(g) for c, g in zip(clipped, each, strict=True)])
    torch.testing.assert_close(record.clip_factor_B.float(), factors, rtol=1e-5, atol=0)
    after = dict(private.model.named_parameters())
    for name, weight in before.items():
        total = torch.stack([c[name] for c in clipped]).sum(dim=0)
        moved = weight - after[name].detach().float()
        torch.testing.assert_close(moved, total, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_adds_at_most_c(rule: str) -> None:
    tokens, y = data()
    for bound in (1e-3, 0.3, 100.0):
        sums = []
        for kept in (slice(0, B), slice(0, B - 1)):
            private, _ = private_of(fresh(), clipping=rule, max_grad_norm=bound)
            private.backward(tokens[kept], y[kept])
            clipped = private.mode.clipped_sum()
            assert clipped.sensitivity == bound
            sums.append(clipped.gradients)
        moved = {name: total - sums[1][name] for name, total in sums[0].items()}
        assert length(moved) <= 1.0001 * bound
        if rule == "automatic" and bound > 1:
            assert length(moved) > 0.9 * bound, "samples are normalised"


@pytest.mark.parametrize("rule", ["automatic", "per_layer"])
@pytest.mark.filterwarnings("ignore:The loss or the gradient of a sample")
def test_a_sample_without_a_finite_loss_adds_nothing(rule: str) -> None:
    tokens, y = data()
    weights = []
    for num_lost in (0, 1):
        model = fresh()

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            lost = targets < 0
            return F.cross_entropy(logits, targets.clamp(min=0), reduction="none") / ~lost

        private, optimizer = private_of(model, clipping=rule, loss=loss)
        own = y.clone()
        own[2] = -1
        kept = torch.arange(B) != 2
        private.backward(*((tokens, own) if num_lost else (tokens[kept], y[kept])))
        assert private.num_left_out == num_lost
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)


def test_automatic_clipping_differs_from_flat_below_c() -> None:
    # A planted mistake: the flat rule under another name would pass where all are clipped.
    tokens, y = data()
    factors = {}
    for rule in RULES:
        private, _ = private_of(copy.deepcopy(fresh()), clipping=rule, max_grad_norm=1e3)
        private.backward(tokens, y)
        assert private.last is not None
        factors[rule] = private.last.factors_B
    assert bool((factors["flat"] == 1).all())
    assert bool((factors["per_layer"] == 1).all())
    assert bool((factors["automatic"] > 10).all())


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="clipping='layer'"):
        private_of(fresh(), clipping="layer")


FLAT_MODE = "tests.support.defective_modes:FlatRule"


@pytest.mark.parametrize("rule", RULES)
def test_every_regime_of_a_launch_clips_by_the_rule_asked_for(rule: str) -> None:
    training = TrainingChoices(clipping=rule)
    regimes = regimes_of("flash_fsdp", REGIMES, Suite.FULL, training, "cpu")
    assert {regime.kind for regime in regimes} >= {"accuracy", "clip", "noise", "train", "profile"}
    assert {regime.clipping for regime in regimes} == {rule}


def ruled(rule: str, factors: str) -> dict[str, Any]:
    """Verdict and sentence of a mode by whether its factors are those of its rule."""
    base = trajectory(noise_std=0.0)
    runs = []
    for mode in ("reference", "flash_fsdp"):
        by = rule if mode == "reference" else factors
        record = replace(base, clip_factor=factors_by(by, base))
        setting = RegimeConfig(name="clip", num_iter=4, optimizer="adamw", clipping=rule)
        runs.append(mode_run(mode, "clip", record, setup=setting))
    (mode,) = [m for m in compared(runs).modes if m.label == "flash_fsdp"]
    return {"verdict": mode.verdict, "sentence": " ".join(f.sentence for f in mode.findings)}


@pytest.mark.parametrize("rule", ["per_layer", "automatic"])
def test_factors_are_judged_by_the_rule_asked_for(rule: str) -> None:
    assert "clip factor" not in ruled(rule, rule)["sentence"]
    wrong = ruled(rule, "flat")
    assert wrong["verdict"] == "BUG"
    assert "clip factor" in wrong["sentence"]


@pytest.mark.soak
@pytest.mark.parametrize("rule", ["per_layer", "automatic"])
def test_a_launch_judges_by_the_rule_asked_for(rule: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    modes = f"flash_fsdp_fuse_bk,{FLAT_MODE}"
    launch = ["quick", "--regime", "probe-clip", "--mode", modes, "--clipping", rule]
    launch += ["--nproc-per-node", "1"]
    workspace.run("launch.py", *launch, "--group", "g")
    workspace.run("compare.py", "g", "--no-png")
    drift = json.loads((tmp_path / "results" / "g" / "drift.json").read_text())
    told = {mode["label"]: mode for mode in drift["modes"]}
    assert told["flash_fsdp_fuse_bk"]["verdict"] == "PASS"
    assert told[FLAT_MODE]["verdict"] == "BUG"
    assert "wrong clip factors" in told[FLAT_MODE]["sentence"]
    assert "which is flat clipping" in told[FLAT_MODE]["sentence"]


@pytest.mark.parametrize("rule", RULES)
def test_factors_of_a_record_are_those_of_its_rule(rule: str) -> None:
    norms = np.array([[[3.0, 4.0, 12.0], [0.3, 0.4, 0.0]]])
    names = np.array(["a.weight", "a.bias", "b.weight"])
    t = replace(
        trajectory(steps=1, samples=2, layers=2),
        max_grad_norm=np.array([2.0]),
        parameter_names=names,
        sample_norm=np.array([[13.0, 0.5]]),
        sample_norm_by_parameter=norms,
    )
    wanted = {
        "flat": [2 / 13, 1.0],
        "automatic": [2 / 13.01, 2 / 0.51],
        # Each of two layers at sqrt(2): both of the first sample's are clipped.
        "per_layer": [2 / 13, 1.0],
    }
    np.testing.assert_allclose(factors_by(rule, t)[0], wanted[rule])
    shares = {"flat": t.clip_fraction[0], "automatic": t.clip_fraction[0], "per_layer": 0.5}
    assert clipped_share(rule, t)[0] == shares[rule]


def test_opacus_clips_by_no_other_rule(tmp_path: Path) -> None:
    done = Workspace(tmp_path).run("launch.py", "full", "--clipping", "per_layer")
    assert done.returncode == 2
    assert "clipping='per_layer': expected flat for Opacus. Leave ghost_fsdp out" in done.stderr
    assert "--mode no_dp,flash_fsdp,flash_fsdp_bk" in done.stderr
