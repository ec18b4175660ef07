"""Opacus's modes are run as we understand them: on one device each equals the oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from opacus.grad_sample import get_gsm_class
from opacus.optimizers import optimizer
from torch import Tensor, nn

from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.opacus import OpacusMode
from dpsgd_track.modes.opacus_source import installed_modes
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.batch import Batch
from tests.support import torchrun_modes
from tests.support.torchrun_modes import Spec

# What Opacus and torch say to every user: the noise is not cryptographically secure, no input
# needs a gradient, and (functorch) token numbers are no type to compute in.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]

CPU = torch.device("cpu")
SPEC = Spec(models=["llama", "roberta"], modes=[], cut=[[3, 3]], regimes=[])
# float32 rounding is 6e-8; sums over 17 positions and 4 layers stay well below 1e-5.
TOLERANCE = 1e-5
# Opacus divides C by (norm + 1e-6), which moves a clip factor by 1e-6 / norm.
MODES = ("grad_materialize", "ghost", "opacus:functorch", "opacus:ew")
# torch's expanded weights know no product of a weight and a tensor, which an RMSNorm is.
CASES = [
    (model, mode)
    for model in ("llama", "roberta")
    for mode in MODES
    if (model, mode) != ("llama", "opacus:ew")
]


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """For each model: itself, its micro-batches and C by regime."""
    found = {}
    for name in SPEC.models:
        model = torchrun_modes.model_of(SPEC, name, CPU)
        batches = torchrun_modes.batches_of(SPEC, name, CPU)
        oracle = build_mode("reference", copy.deepcopy(model), _context(1e30))
        found[name] = model, batches, torchrun_modes.bounds(oracle, batches)
    return found


def _context(max_grad_norm: float) -> ModeContext:
    # Both models are classifiers.
    return torchrun_modes.context_of(SPEC, "llama", max_grad_norm, CPU)


def _rows(mode: Mode, model: nn.Module, batches: list[Batch], bound: float) -> dict[str, Any]:
    oracle = build_mode("reference", copy.deepcopy(model), _context(bound))
    wanted = torchrun_modes.one_step(oracle, batches)
    found = torchrun_modes.one_step(mode, batches)
    return torchrun_modes.row_of("", "", bound, "", found, wanted)


@pytest.mark.parametrize(("model", "mode"), CASES)
@pytest.mark.parametrize(("regime", "clipped"), [("none", 0.0), ("mixed", 0.5), ("all", 1.0)])
def test_norms_sums_noise_and_weights_equal_the_oracle(
    models: Any, model: str, mode: str, regime: str, clipped: float
) -> None:
    whole, batches, bounds = models[model]
    assert len(batches) == 2
    # C is set as the step loop sets it: everything Opacus keeps it in must follow.
    built = build_mode(mode, copy.deepcopy(whole), _context(1e30))
    built.set_max_grad_norm(bounds[regime])
    row = _rows(built, whole, batches, bounds[regime])
    assert row["clipped"] == clipped
    for error in ("norm_error", "sum_error", "noised_error", "weights_error"):
        assert row[error] < TOLERANCE, row


@pytest.mark.parametrize(("model", "mode"), CASES)
def test_factors_and_norms_by_parameter_equal_the_oracle(
    models: Any, model: str, mode: str
) -> None:
    whole, batches, bounds = models[model]
    context = _context(bounds["mixed"])
    found = build_mode(mode, copy.deepcopy(whole), context).accumulate(batches[0])
    wanted = build_mode("reference", copy.deepcopy(whole), context).accumulate(batches[0])
    assert found.norm_by_parameter_B is not None
    assert found.norm_by_parameter_B.keys() == wanted.norm_by_parameter_B.keys()
    for name, norm_B in wanted.norm_by_parameter_B.items():
        # A key's bias under softmax has no gradient; what is found there is rounding.
        error = (found.norm_by_parameter_B[name] - norm_B).abs() / wanted.norm_B
        assert error.max() < TOLERANCE, name
    assert (found.clip_factor_B - wanted.clip_factor_B).abs().max() < TOLERANCE
    assert (found.loss_B - wanted.loss_B).abs().max() < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_a_discarded_step_of_two_micro_batches_leaves_nothing_behind(
    models: Any, mode: str
) -> None:
    whole, batches, bounds = models["roberta"]
    built = build_mode(mode, copy.deepcopy(whole), _context(bounds["mixed"]))
    for batch in batches:
        built.accumulate(batch)
    built.zero_grad()
    assert _rows(built, whole, batches, bounds["mixed"])["sum_error"] < TOLERANCE


def test_expanded_weights_cannot_run_an_rms_norm(models: Any) -> None:
    whole, batches, _ = models["llama"]
    mode = build_mode("opacus:ew", copy.deepcopy(whole), _context(1.0))
    with pytest.raises(RuntimeError, match="Expanded Weights encountered but cannot handle"):
        mode.accumulate(batches[0])


def test_no_op_says_that_nothing_computes_gradients(models: Any) -> None:
    whole, batches, _ = models["roberta"]
    mode = build_mode("opacus:no_op", copy.deepcopy(whole), _context(1.0))
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        mode.accumulate(batches[0])


def test_an_unknown_mode_is_answered_with_those_of_the_library(models: Any) -> None:
    assert installed_modes() == ("ew", "functorch", "ghost", "ghost_fsdp", "hooks", "no_op")
    assert all(get_gsm_class(name) for name in installed_modes())
    with pytest.raises(ValueError, match=r"'flash': expected one of ew, functorch, ghost, ghost_f"):
        build_mode("opacus:flash", models["roberta"][0], _context(1.0))


def test_one_device_modes_refuse_several_ranks(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"nproc_per_node=2: expected 1 .*ghost_fsdp"):
        build_mode("ghost", models["roberta"][0], _context(1.0))


def test_replicas_are_refused(models: Any) -> None:
    context = replace(_context(1.0), num_replicas=2)
    with pytest.raises(ValueError, match=r"num_replicas=2: expected 1.*FSDP2Wrapper shards over"):
        build_mode("ghost_fsdp", models["roberta"][0], context)


def test_one_device_modes_refuse_bfloat16(models: Any) -> None:
    context = replace(_context(1.0), param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="param_dtype='bfloat16': expected float32"):
        build_mode("ghost", models["roberta"][0], context)


class _Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("scale", torch.ones(2))


class _Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.odd_layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.odd_layer(x)
        return y


@pytest.mark.parametrize("mode", ["hooks", "ghost", "ghost_fsdp"])
def test_a_layer_that_opacus_refuses_is_named(mode: str) -> None:
    with pytest.raises(ValueError, match=f"expected one that Opacus's {mode} takes.*odd_layer"):
        OpacusMode(mode, _Model(_Scaled()), _context(1.0))


def test_a_batch_norm_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="BatchNorm cannot support training with diff"):
        OpacusMode("hooks", _Model(nn.BatchNorm1d(3)), _context(1.0))


def test_opacus_draws_its_own_noise_again_after_a_step(models: Any) -> None:
    whole, batches, _ = models["roberta"]
    before = optimizer._generate_noise
    mode = build_mode("grad_materialize", copy.deepcopy(whole), _context(1.0))
    torchrun_modes.one_step(mode, batches)
    assert optimizer._generate_noise is before


def _inline(draw: Any) -> Any:
    """An `add_noise` that draws by itself, as forks have."""

    def add_noise(self: Any) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            p.grad = (p.summed_grad + std * draw(p.summed_grad)).view_as(p)

    return add_noise


def test_noise_that_is_drawn_inline_is_replaced_and_told(models: Any, monkeypatch: Any) -> None:
    whole, batches, bounds = models["roberta"]
    monkeypatch.setattr(optimizer.DPOptimizer, "add_noise", _inline(torch.randn_like))
    mode = build_mode("grad_materialize", copy.deepcopy(whole), _context(bounds["mixed"]))
    assert mode.notices() == ()
    assert _rows(mode, whole, batches, bounds["mixed"])["noised_error"] < TOLERANCE
    (notice,) = mode.notices()
    assert "draws its noise with torch.randn_like" in notice


def test_noise_that_cannot_be_replaced_is_told(models: Any, monkeypatch: Any) -> None:
    whole, batches, bounds = models["roberta"]
    monkeypatch.setattr(
        optimizer.DPOptimizer, "add_noise", _inline(lambda total: torch.randn(total.shape))
    )
    mode = build_mode("grad_materialize", copy.deepcopy(whole), _context(bounds["mixed"]))
    assert _rows(mode, whole, batches, bounds["mixed"])["noised_error"] > 0.1
    assert "could not be replaced by the common noise" in mode.notices()[0]


def test_healthy_modes_have_no_notices(models: Any) -> None:
    whole, batches, bounds = models["roberta"]
    mode = build_mode("ghost", copy.deepcopy(whole), _context(bounds["mixed"]))
    torchrun_modes.one_step(mode, batches)
    assert mode.notices() == ()


def test_norms_that_an_opacus_does_not_keep_are_not_computed(models: Any, monkeypatch: Any) -> None:
    whole, batches, bounds = models["roberta"]
    mode: Any = build_mode("ghost", copy.deepcopy(whole), _context(bounds["mixed"]))
    backward = mode.backward

    def without_norms(batch: Batch) -> Tensor:
        loss_B: Tensor = backward(batch)
        for parameter in mode.model.parameters():
            del parameter._norm_sample
        return loss_B

    monkeypatch.setattr(mode, "backward", without_norms)
    record = mode.accumulate(batches[0])
    assert record.norm_by_parameter_B is None
    assert record.norm_B is not None
    assert record.clip_factor_B is not None
