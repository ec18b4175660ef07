"""The engine against plain autograd: each kind of defect is found with its own guard off, and no
healthy model raises an alarm."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpsgd_track
from dpsgd_track.library import PrivateTraining
from dpsgd_track.privacy import capture as capture_module
from dpsgd_track.privacy.captured_layer import WatchedLayer
from dpsgd_track.privacy.layers import inventory, linear
from dpsgd_track.privacy.loss import LOSSES
from dpsgd_track.privacy.spot_check import SpotCheckError
from dpsgd_track.privacy.terms import Outer
from tests.support import model_zoo

B, D, V, CLASSES = 5, 6, 11, 3

Loss = Callable[[Tensor, Tensor], Tensor]


def _mean_over_positions(logits: Tensor, target_B: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(1)[:, :CLASSES], target_B, reduction="none")


class _Model(nn.Module):
    """Tokens and positions, two layers between which something may be done."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] | nn.Module = torch.tanh,
        positions: Callable[[Tensor], Tensor] = lambda p: p,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(B, D)
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES)
        self.between, self.of_positions = between, positions

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.positions(torch.arange(tokens.shape[1]))
        h = self.mix(self.tokens(tokens) + self.of_positions(rows))
        y: Tensor = self.head(self.between(h).mean(dim=1))
        return y


class _Used(_Model):
    """Begins to use the weight of `mix` a second time, behind its back."""

    is_used = False

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.is_used:
            return super().forward(tokens)
        h = F.linear(torch.tanh(self.mix(self.tokens(tokens))), self.mix.weight)
        y: Tensor = self.head(h.mean(dim=1))
        return y


class _Normed(_Model):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D, affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.mix(self.tokens(tokens)).mean(dim=1))
        y: Tensor = self.head(h)
        return y


class _OverBatchSize(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h / len(h)


def _sorted(h: Tensor) -> Tensor:
    return h[h.detach()[:, 0, 0].argsort()]


def _private(
    model: nn.Module, loss: Loss = _mean_over_positions, **changes: Any
) -> PrivateTraining:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.1,
        "expected_batch_size": B,
        "mode": "flash_bk",
        "loss": loss,
    }
    return dpsgd_track.make_private(model, optimizer, **(settings | changes))


def _data(size: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (size, B), generator=generator)
    return tokens, torch.randint(0, CLASSES, (size,), generator=generator)


def _contrastive(logits: Tensor, target_B: Tensor) -> Tensor:
    scores = logits @ logits.T
    return F.cross_entropy(scores, torch.arange(len(scores)) % len(scores), reduction="none")


def _samples_in_dimension_0(private: PrivateTraining) -> None:
    private.mode.engine.knows_sample_dims = True  # type: ignore[attr-defined]


def _spread_unseen(private: PrivateTraining) -> None:
    _samples_in_dimension_0(private)
    capture = private.mode.engine.capture  # type: ignore[attr-defined]
    layer = capture.captured["positions"].layer
    capture.register(WatchedLayer(capture, layer, is_spread=True))


def _double_factors(private: PrivateTraining) -> None:
    engine = private.mode.engine  # type: ignore[attr-defined]
    clip = engine.clip

    def clip_less(*args: Any) -> Any:
        record = clip(*args)
        record.clip_factor_B = (2 * record.clip_factor_B).clamp(max=1)
        return record

    engine.clip = clip_less


def _nothing(private: PrivateTraining) -> None:
    pass


KINDS: dict[str, tuple[Callable[[], nn.Module], Loss, Callable[[PrivateTraining], None]]] = {
    "positions-T=B": (_Model, _mean_over_positions, _samples_in_dimension_0),
    "first-copy-of-shared-rows": (
        lambda: _Model(positions=lambda p: p[0] if p.dim() == 3 else p),
        _mean_over_positions,
        _spread_unseen,
    ),
    "centred": (
        lambda: _Model(lambda h: torch.tanh(h - h.mean(dim=0))),
        _mean_over_positions,
        _nothing,
    ),
    "centred-by-values": (
        lambda: _Model(lambda h: torch.tanh(h - h.detach().mean(dim=0))),
        _mean_over_positions,
        _nothing,
    ),
    "sorted": (lambda: _Model(_sorted), _mean_over_positions, _nothing),
    "centred-with-dropout": (
        lambda: _Model(lambda h: F.dropout(h - h.detach().mean(dim=0), 0.3)),
        _mean_over_positions,
        _nothing,
    ),
    "divided-by-batch-size": (
        lambda: _Model(lambda h: torch.tanh(h) / len(h)),
        _mean_over_positions,
        _nothing,
    ),
    "divided-by-batch-size-with-dropout": (
        lambda: _Model(nn.Sequential(nn.Dropout(0.3), _OverBatchSize())),
        _mean_over_positions,
        _nothing,
    ),
    "contrastive-loss": (_Model, _contrastive, _nothing),
    "loss-over-batch-size": (
        _Model,
        lambda logits, y: _mean_over_positions(logits, y) / len(y),
        _nothing,
    ),
    "loss-that-averages": (
        _Model,
        lambda logits, y: _mean_over_positions(logits, y).mean().expand(len(y)),
        _nothing,
    ),
    "factors": (_Model, _mean_over_positions, _double_factors),
}


@pytest.mark.parametrize("mode", ["flash_bk", "flash_fuse"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_spot_check_finds_each_kind(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    make, loss, plant = KINDS[kind]
    model = make()
    private = _private(model, loss, mode=mode)
    plant(private)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(SpotCheckError, match="expected per-sample gradients as plain autograd"):
        private.backward(*_data())
    with pytest.raises(RuntimeError):
        private.mode.optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("mode", ["flash_bk", "flash_fuse"])
def test_it_is_the_spot_check_that_finds_them(mode: str) -> None:
    for kind in ("positions-T=B", "centred", "sorted", "contrastive-loss", "factors"):
        make, loss, plant = KINDS[kind]
        private = _private(make(), loss, mode=mode, spot_check=False)
        plant(private)
        private.backward(*_data())


@pytest.mark.parametrize("mode", ["flash_bk", "flash_fuse"])
def test_it_finds_what_guards_would_have_refused(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "refuse_unseen_uses", lambda names: None)
    used = _private(_Used(), mode=mode)
    used.backward(*_data())
    used.model.is_used = True
    with pytest.raises(SpotCheckError, match=r"mix\.weight"):
        used.backward(*_data())
    monkeypatch.setattr(inventory, "unfit_parts", lambda model: ())
    normed = _private(_Normed(), mode=mode)
    normed._guard = None
    with pytest.raises(SpotCheckError):
        normed.backward(*_data())
    model = _Model()
    model.mix.requires_grad_(False)
    unfrozen = _private(model, mode=mode)
    unfrozen._guard = None
    model.mix.requires_grad_(True)
    with pytest.raises(SpotCheckError, match=r"mix\.weight"):
        unfrozen.backward(*_data())


def test_masks_that_numpy_draws_are_the_same_in_both_computations() -> None:
    def masked(h: Tensor) -> Tensor:
        kept = torch.tensor(np.random.rand(*h.shape[:2]) + random.random() / 2 > 0.5)
        return torch.where(kept[..., None], h, 0.0)

    private = _private(_Model(masked))
    for seed in range(2):
        private.backward(*_data(seed=seed))


def test_it_finds_a_wrong_rule_in_float32_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear.terms

    def scaled(module: nn.Module, x: Tensor, dy: Tensor, by: float) -> Any:
        found = right(module, x, dy)
        if isinstance(module, nn.Linear) and module.out_features == D:
            weight = found["weight"]
            assert isinstance(weight, Outer)
            found["weight"] = Outer(weight.x_BTD * by, weight.dy_BTP)
        return found

    for dtype, by in ((torch.float32, 1.002), (torch.bfloat16, 1.3)):
        monkeypatch.setattr(linear, "terms", lambda m, x, dy, by=by: scaled(m, x, dy, by))
        with pytest.raises(SpotCheckError, match=r"mix\.weight"):
            _private(_Model(), mode="flash_bk", param_dtype=dtype).backward(*_data())
        monkeypatch.setattr(linear, "terms", right)
        _private(_Model(), mode="flash_bk", param_dtype=dtype).backward(*_data())


def test_what_begins_later_is_found_on_the_first_batch_of_its_kind() -> None:
    model = _Model(lambda h: h - h.mean(dim=0) if h.shape[0] == h.shape[1] else torch.tanh(h))
    private = _private(model)
    for size in (4, 3, 4, 6):
        private.backward(*_data(size))
    with pytest.raises(SpotCheckError):
        private.backward(*_data(B))


def test_what_more_samples_bring_is_found() -> None:
    model = _Model(lambda h: h - h.mean(dim=0) if len(h) > 8 else torch.tanh(h))
    private = _private(model)
    for size in (4, 6, 8, 7, 3):
        private.backward(*_data(size))
    with pytest.raises(SpotCheckError):
        private.backward(*_data(9))


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("is_alone", [False, True])
def test_samples_that_are_not_finite_hide_no_mixing(is_alone: bool, rate: float) -> None:
    """The finite rest is compared with the whole batch, and does not count as a check of others."""

    class Spoiled(_Model):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.mix(self.tokens(tokens))
            nan = tokens[:, 0].eq(0)[:, None, None]
            if len(h) > 1 and h.shape[1] == B and bool(nan.any()) == is_alone:
                h = h + h.detach().nan_to_num().mean(dim=0)
            h = F.dropout(h.masked_fill(nan, torch.nan), rate, self.training)
            y: Tensor = self.head(torch.tanh(h).mean(dim=1))
            return y

    private = _private(Spoiled())
    tokens, y = _data()
    tokens = tokens.clamp(min=1)
    spoiled = tokens.clone()
    spoiled[:-1, 0] = 0
    # As many samples, of another kind: from here on the number of samples calls for no check.
    private.backward(tokens.repeat(1, 2), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if is_alone:
            with pytest.raises(SpotCheckError, match="without those left out"):
                private.backward(spoiled, y)
        else:
            for _ in range(3):
                private.backward(spoiled, y)
            with pytest.raises(SpotCheckError):
                private.backward(tokens, y)


def test_a_sample_that_is_not_finite_spoils_no_other_unseen() -> None:
    class Spreading(_Model):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.mix(self.tokens(tokens)).masked_fill(tokens.eq(0)[..., None], torch.nan)
            y: Tensor = self.head(torch.tanh(h + 0 * h.detach().mean(dim=0)).mean(dim=1))
            return y

    tokens, y = _data()
    tokens = tokens.clamp(min=1)
    tokens[0] = 0
    with pytest.raises(SpotCheckError, match="sample 4: not finite in its batch, finite alone"):
        _private(Spreading()).backward(tokens, y)


def test_another_path_through_the_layers_is_checked() -> None:
    class Branching(_Model):
        is_deep = False

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.mix(self.tokens(tokens))
            if self.is_deep:
                h = self.mix(h - h.mean(dim=0))
            y: Tensor = self.head(torch.tanh(h).mean(dim=1))
            return y

    model = Branching()
    private = _private(model)
    for _ in range(5):
        private.backward(*_data())
    model.is_deep = True
    with pytest.raises(SpotCheckError):
        private.backward(*_data())


def test_weights_that_start_at_zero_are_checked_once_they_have_moved() -> None:
    class Adapted(_Model):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.head.weight)

        def forward(self, tokens: Tensor) -> Tensor:
            # No gradient reaches `mix` before the head has one.
            h = torch.tanh(self.mix(self.tokens(tokens))).mean(dim=1)
            y: Tensor = self.head(h - h.detach().mean(dim=0) * (self.head.weight[0, 0] != 0))
            return y

    private = _private(Adapted())
    private.backward(*_data())
    private.mode.optimizer.step()
    with pytest.raises(SpotCheckError):
        private.backward(*_data())


def test_checks_are_few_and_told() -> None:
    private = _private(_Model())
    for step in range(70):
        private.backward(*_data(B - step % 2, seed=step))
        private.mode.optimizer.step()
    # The first batch, the first whose number of positions is not that of samples, the 32nd.
    assert private.spot_checks.num_checks == 3
    assert private.spot_checks.seconds > 0


def test_a_check_changes_nothing_of_the_training() -> None:
    def weights(*, spot_check: bool) -> Tensor:
        torch.manual_seed(0)
        model = _Model(lambda h: F.dropout(h, 0.3))
        private = _private(model, spot_check=spot_check)
        for step in range(3):
            private.backward(*_data(seed=step))
            private.mode.optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(spot_check=True), weights(spot_check=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", model_zoo.ZOO)
def test_a_healthy_model_raises_no_alarm(name: str, dtype: torch.dtype) -> None:
    model = model_zoo.build(name)
    loss = LOSSES[model_zoo.ZOO[name].task]
    private = _private(model, loss, max_grad_norm=1.0, param_dtype=dtype)
    for size, seed in ((4, 0), (1, 1), (3, 2)):
        batch = model_zoo.batch(name, size, seed)
        private.backward(batch.inputs or batch.args, batch.targets)
        private.mode.optimizer.step()
    assert private.spot_checks.num_checks >= 2
