"""Relations that hold for any batch and need no reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpsgd_track.config import PrivacyConfig
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.batch import Batch
from tests.support.model_zoo import ZOO, batch, build

OURS = [
    name
    for name, spec in MODES.items()
    if spec.strategy in ("two_pass", "bookkeeping") and spec.runs_on_one_device
]
MODELS = ("reused-mlp", "tied-gpt2")
# Sums of a few float32 gradients, each rounded to 6e-8 of it.
ROUNDING = 1e-5

_built: dict[tuple[str, str], Mode] = {}


def _mode(name: str, model: str) -> Mode:
    """Built once; a batch leaves nothing behind that the next would see."""
    if (name, model) not in _built:
        context = ModeContext(
            privacy=PrivacyConfig(noise_multiplier=0, max_grad_norm=1.0, expected_batch_size=1),
            device=torch.device("cpu"),
            param_dtype=torch.float32,
            make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            loss=ZOO[model].loss,
        )
        _built[name, model] = build_mode(name, build(model), context)
    return _built[name, model]


def _sum(mode: Mode, batches: list[Batch], max_grad_norm: float) -> Tensor:
    """The clipped sum of some micro-batches, flat."""
    mode.set_max_grad_norm(max_grad_norm)
    for part in batches:
        mode.accumulate(part)
    gradients = mode.clipped_sum().gradients
    flat = torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])
    mode.zero_grad()
    return flat


def _norms(mode: Mode, whole: Batch, max_grad_norm: float) -> Tensor:
    """Norm of each sample's gradient."""
    mode.set_max_grad_norm(max_grad_norm)
    norms = mode.accumulate(whole).norm_B
    mode.zero_grad()
    assert norms is not None
    return norms


def _pick(whole: Batch, indices: list[int]) -> Batch:
    inputs = {name: t[indices] for name, t in whole.inputs.items()}
    return Batch(inputs, whole.targets[indices], args=tuple(t[indices] for t in whole.args))


def _properties(function: Any) -> Any:
    bounded = settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    bounds = st.floats(1e-3, 1e3)
    given_these = given(size=st.integers(1, 5), seed=st.integers(0, 10**6), bound=bounds)
    by_mode = pytest.mark.parametrize("mode", OURS)
    return by_mode(pytest.mark.parametrize("model", MODELS)(bounded(given_these(function))))


@_properties
def test_removing_a_sample_moves_the_sum_by_at_most_c(
    mode: str, model: str, size: int, seed: int, bound: float
) -> None:
    built, whole = _mode(mode, model), batch(model, size, seed)
    everything = _sum(built, [whole], bound)
    for removed in range(size):
        kept = [i for i in range(size) if i != removed]
        without = _sum(built, [_pick(whole, kept)], bound)
        moved = (everything - without).norm()
        assert moved <= bound * (1 + ROUNDING) + ROUNDING * everything.norm()


@_properties
def test_singletons_add_up(mode: str, model: str, size: int, seed: int, bound: float) -> None:
    built, whole = _mode(mode, model), batch(model, size, seed)
    everything = _sum(built, [whole], bound)
    alone = [_sum(built, [whole.sample(i)], bound) for i in range(size)]
    assert all(part.norm() <= bound * (1 + ROUNDING) for part in alone)
    scale = sum(part.norm() for part in alone)
    assert (everything - torch.stack(alone).sum(dim=0)).norm() <= ROUNDING * scale


@_properties
def test_the_cut_into_micro_batches_and_the_order_change_nothing(
    mode: str, model: str, size: int, seed: int, bound: float
) -> None:
    built, whole = _mode(mode, model), batch(model, size, seed)
    everything = _sum(built, [whole], bound)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    middle = seed % (size + 1)  # either part may be empty
    cut = _sum(built, [_pick(whole, order[:middle]), _pick(whole, order[middle:])], bound)
    scale = sum(_sum(built, [whole.sample(i)], bound).norm() for i in range(size))
    assert (everything - cut).norm() <= ROUNDING * scale


@_properties
def test_where_all_are_clipped_the_sum_is_homogeneous_in_c(
    mode: str, model: str, size: int, seed: int, bound: float
) -> None:
    built, whole = _mode(mode, model), batch(model, size, seed)
    norms = _norms(built, whole, bound)
    small = norms[norms > 0].min().item() * min(bound, 1.0) * 0.9
    once, thrice = _sum(built, [whole], small / 3), _sum(built, [whole], small)
    assert (3 * once - thrice).norm() <= ROUNDING * small * size


@_properties
def test_without_clipping_the_sum_no_longer_depends_on_c(
    mode: str, model: str, size: int, seed: int, bound: float
) -> None:
    built, whole = _mode(mode, model), batch(model, size, seed)
    norms = _norms(built, whole, bound)
    large = norms.max().item() * (1 + bound)
    assert torch.equal(_sum(built, [whole], large), _sum(built, [whole], 10 * large))
