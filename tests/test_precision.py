"""bfloat16: norms are as good as plain autograd's, and what is added is what was measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.config import PrivacyConfig
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.noise import NoiseSource
from tests.support.model_zoo import ZOO, batch, build

NUM_SAMPLES, NUM_CONTRIBUTIONS = 200, 1000
# Each strategy and each way to watch.
SOAK = pytest.mark.soak
MODES = ("flash", "flash_fuse_bk")


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def _mode(
    name: str,
    model: str,
    max_grad_norm: float,
    device: torch.device,
    reference: torch.dtype = torch.float64,
) -> Mode:
    context = ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=1
        ),
        device=device,
        param_dtype=torch.bfloat16,
        reference_dtype=reference,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=ZOO[model].loss,
    )
    return build_mode(name, build(model).to(device), context)


def _norms(mode: Mode, model: str, num_samples: int = NUM_SAMPLES) -> tuple[Tensor, Tensor]:
    """Norm of each sample's gradient, and of what it adds to the clipped sum."""
    everything = batch(model, NUM_CONTRIBUTIONS, seed=1)
    norms, added = [], []
    for index in range(num_samples):
        record = mode.accumulate(_on(everything.sample(index), mode.context.device))
        assert record.norm_B is not None
        norms.append(record.norm_B.double()[0].cpu())
        gradients = mode.clipped_sum().gradients.values()
        added.append(torch.stack([g.double().norm() for g in gradients]).norm().cpu())
        mode.zero_grad()
    return torch.stack(norms), torch.stack(added)


def _on(sample: Batch, device: torch.device) -> Batch:
    inputs = {name: t.to(device) for name, t in sample.inputs.items()}
    return Batch(inputs, sample.targets.to(device))


@pytest.mark.parametrize("model", ["llama", "tied-gpt2"])
def test_norms_err_at_most_twice_as_far_as_plain_autograd(model: str, device: torch.device) -> None:
    exact, _ = _norms(_mode("reference", model, 1e9, device), model)
    rounded, _ = _norms(_mode("reference", model, 1e9, device, torch.bfloat16), model)
    error_of_autograd = ((rounded - exact) / exact).abs()
    for name in MODES:
        norms, _ = _norms(_mode(name, model, 1.0, device), model)
        error = ((norms - exact) / exact).abs()
        assert error.max() <= 2 * error_of_autograd.max(), name
        assert error.square().mean() <= 4 * error_of_autograd.square().mean(), name


@pytest.mark.parametrize("name", [MODES[0], *(pytest.param(n, marks=SOAK) for n in MODES[1:])])
def test_of_a_thousand_samples_none_adds_more_than_c(name: str, device: torch.device) -> None:
    free, _ = _norms(_mode(name, "tied-gpt2", 1e9, device), "tied-gpt2")
    # Most are clipped, by factors that are no powers of two.
    bound = free.quantile(0.1).item()
    mode = _mode(name, "tied-gpt2", bound, device)
    norms, added = _norms(mode, "tied-gpt2", NUM_CONTRIBUTIONS)
    assert (norms > bound).double().mean() > 0.8
    # The last bits of float32 remain.
    assert (added / bound).max() <= 1 + 1e-5


@pytest.mark.parametrize("name", MODES)
def test_the_weights_that_are_updated_are_float32(name: str) -> None:
    mode = _mode(name, "llama", 1.0, torch.device("cpu"))
    parameters = dict(mode.model.named_parameters())
    before = [p.detach().clone() for p in parameters.values()]
    mode.accumulate(batch("llama", 2, seed=1))
    mode.privatize(mode.clipped_sum(), NoiseSource("", 0))
    mode.step()
    after = dict(mode.model.named_parameters())
    assert all(after[name] is p and p.dtype == torch.float32 for name, p in parameters.items())
    assert any(not torch.equal(a, b) for a, b in zip(before, after.values(), strict=True))
