"""bfloat16: norms and clipped sums lie around those of plain autograd in the same type.

Rounding makes single norms wrong by a percent, and nothing on average. A mode that is wrong on
average, because it adds in too few bits or with an epsilon of another type, hides below it. Both
compute from the same rounded weights and the same samples, so they are compared sample by sample,
and what rounding does to both alike cancels:

    norms: x_i = log(n_i of the mode / n_i of plain),    sums: e = sum (S - P) . P / sum P . P

over samples and steps. A mean is a bias if it lies further from zero than `TOLERATED` and than
chance can explain. What plain autograd rounds itself has the size of what is tolerated: on CPU,
torch keeps the statistics of a LayerNorm in bfloat16, and adds up the gradients of its weights so.

Of a single check the smallest bias that is found in 95 % of cases is its `resolution`. With 64
samples in 16 steps, on CPU, it is 0.11 % for a norm and 0.15 % for a sum in the median over checks,
0.21 and 0.26 % for all but a twentieth of them, and 0.24 and 0.38 % at worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from dpsgd_track.config import AUTO, GRADIENTS, GRAM, TILED, PrivacyConfig
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import MODES, takes_norm_plan
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Site
from dpsgd_track.privacy import fused_linear
from dpsgd_track.privacy.engine import Batch
from dpsgd_track.privacy.loss import regression_loss
from dpsgd_track.privacy.terms import Dense, Outer, Term
from tests.support.bf16_layers import KINDS, build, make_batch

TOLERATED, TOLERATED_IN_TOTAL = 2**-10, 2**-12
"""Bias of one parameter, and of the norm over all of them."""
FALSE_ALARMS, MAX_NUM_CHECKS = 1e-2, 3000
"""How often the file fails by chance, and what it may check for that."""
ALPHA = FALSE_ALARMS / MAX_NUM_CHECKS
WORST_RESOLUTION = 5e-3
"""No check may be coarser."""
NUM_SAMPLES, BATCH_SIZE = 64, 4
NUM_SAMPLES_SOAK = 384
TOTAL = "all parameters"

OURS = [
    name
    for name, spec in MODES.items()
    if spec.strategy in ("two_pass", "bookkeeping") and spec.runs_on_one_device
]
PLANNED = [
    f"{name}/{plan}"
    for name in OURS
    for plan in (GRADIENTS, GRAM, TILED)
    if takes_norm_plan(name, plan)
]
"""Modes with a plan for all linear layers, `mode/plan`."""
BRIEF = ["flash_bk", "flash_fuse"]
"""Modes between which the others differ in linear layers alone."""
ALSO_PLANNED = ("linear", "transposed-linear", "convolution-2d", "tied")
"""Kinds that run in every plan; in the exhaustive form all do that have a choice."""
CASES = [
    (kind, mode) for kind in KINDS for mode in (OURS + PLANNED if kind in ALSO_PLANNED else BRIEF)
]
SOAK_CASES = [
    (kind, mode) for kind in KINDS for mode in OURS + (PLANNED if KINDS[kind].has_plans else [])
]

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@dataclass(frozen=True)
class Measured:
    """What a mode did with every sample and every step, in float64."""

    norms: dict[str, Tensor]
    """By parameter, [samples]."""
    sums: dict[str, Tensor]
    """By parameter, [steps, elements]."""


@dataclass(frozen=True)
class Bias:
    """What a parameter's norms, or its clipped sums, differ by on average, relative to plain's."""

    what: str
    mean: float
    standard_error: float
    degrees_of_freedom: int
    tolerated: float

    @property
    def limit(self) -> float:
        """What is tolerated, and chance on top."""
        return self.tolerated + _quantile(self.degrees_of_freedom) * self.standard_error

    @property
    def resolution(self) -> float:
        """The smallest bias that is found in 95 % of cases."""
        return self.limit + 1.645 * self.standard_error

    @property
    def is_one(self) -> bool:
        """Whether it is more than is tolerated and more than chance."""
        # What is no number is none that can be tolerated.
        return not abs(self.mean) <= self.limit

    def __str__(self) -> str:
        return f"{self.what}: {self.mean:+.2e} on average, expected within {self.limit:.1e}"


@cache
def _quantile(degrees_of_freedom: int) -> float:
    return float(stats.t.ppf(1 - ALPHA / 2, degrees_of_freedom))


def biases(found: Measured, plain: Measured) -> list[Bias]:
    """One for the norm and one for the sum of every parameter, and one for the total norm."""
    assert set(found.norms) == set(plain.norms)
    assert set(found.sums) == set(plain.sums)
    checks = []
    for name, norms in found.norms.items():
        ratios = (norms / plain.norms[name]).log()
        checks.append(
            Bias(
                f"norm of {name}",
                float(ratios.mean()),
                float(ratios.std()) / math.sqrt(len(ratios)),
                len(ratios) - 1,
                TOLERATED_IN_TOTAL if name == TOTAL else TOLERATED,
            )
        )
    for name, sums in found.sums.items():
        along = ((sums - plain.sums[name]) * plain.sums[name]).sum(dim=1)
        whole = plain.sums[name].square().sum(dim=1)
        mean = along.sum() / whole.sum()
        # Of a ratio of two sums over steps.
        num_steps = len(along)
        spread = ((along - mean * whole).square().sum() * num_steps / (num_steps - 1)).sqrt()
        checks.append(
            Bias(
                f"clipped sum of {name}",
                float(mean),
                float(spread / whole.sum()),
                num_steps - 1,
                TOLERATED,
            )
        )
    return checks


def mode_of(
    name: str,
    kind: str,
    max_grad_norm: float,
    device: torch.device,
    reference_dtype: torch.dtype = torch.float64,
) -> Mode:
    """A mode over the kind's model, by its name or `mode/plan`."""
    name, _, plan = name.partition("/")
    context = ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=1
        ),
        device=device,
        param_dtype=KINDS[kind].param_dtype,
        reference_dtype=reference_dtype,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=regression_loss,
        norm_plan=plan or AUTO,
    )
    return build_mode(name, build(kind, device), context)


def measure(mode: Mode, batch: Batch) -> Measured:
    """Steps of `BATCH_SIZE` samples each, with weights that stand still."""
    norms: dict[str, list[Tensor]] = {}
    sums: dict[str, list[Tensor]] = {}
    for start in range(0, len(batch), BATCH_SIZE):
        pick = slice(start, start + BATCH_SIZE)
        record = mode.accumulate(Batch({}, batch.targets[pick], args=(batch.args[0][pick],)))
        assert record.norm_B is not None
        assert record.norm_by_parameter_B is not None
        for name, values in (record.norm_by_parameter_B | {TOTAL: record.norm_B}).items():
            norms.setdefault(name, []).append(values)
        for name, total in mode.clipped_sum().gradients.items():
            sums.setdefault(name, []).append(total.flatten().clone())
        mode.zero_grad()
    return Measured(
        {name: torch.cat(values).double().cpu() for name, values in norms.items()},
        {name: torch.stack(totals).double().cpu() for name, totals in sums.items()},
    )


@dataclass(frozen=True)
class Plain:
    """Plain autograd on samples one at a time, at a bound that clips half of them."""

    batch: Batch
    max_grad_norm: float
    rounded: Measured
    """In the type that modes compute in."""
    exact: Measured
    """In float32, from the same weights."""


@cache
def plain_autograd(kind: str, device: torch.device, num_samples: int, seed: int) -> Plain:
    batch = make_batch(kind, num_samples, device, seed)

    def run(dtype: torch.dtype, max_grad_norm: float) -> Measured:
        return measure(mode_of("reference", kind, max_grad_norm, device, dtype), batch)

    # An epsilon that depends on the type is float32's in bfloat16, too.
    exact = run(torch.float32, 1e9)
    bound = float(exact.norms[TOTAL].median())
    return Plain(batch, bound, run(KINDS[kind].param_dtype, bound), exact)


def biases_of(
    kind: str,
    name: str,
    device: torch.device,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    plant: Callable[[Site], object] = lambda site: None,
) -> list[Bias]:
    """Of a mode, with something planted in it, against plain autograd."""
    plain = plain_autograd(kind, device, num_samples, seed)
    mode = mode_of(name, kind, plain.max_grad_norm, device)
    site = Site(mode)
    try:
        plant(site)
        found = measure(mode, plain.batch)
    finally:
        site.close()
    return biases(found, plain.rounded)


def complaints(checks: list[Bias]) -> list[str]:
    return [str(bias) for bias in checks if bias.is_one]


@pytest.mark.parametrize(("kind", "mode"), CASES, ids=map("-".join, CASES))
def test_norms_and_clipped_sums_have_no_bias(kind: str, mode: str, device: torch.device) -> None:
    checks = biases_of(kind, mode, device)
    assert complaints(checks) == []
    # Or it might just have been too coarse to find one.
    assert max(bias.resolution for bias in checks) < WORST_RESOLUTION


def test_there_are_no_more_checks_than_false_alarms_are_shared_out_among() -> None:
    num_parameters = {kind: len(list(build(kind, CPU).parameters())) for kind in KINDS}
    assert sum(2 * num_parameters[kind] + 1 for kind, _ in CASES) <= MAX_NUM_CHECKS


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_compared_cancels(kind: str, device: torch.device) -> None:
    plain = plain_autograd(kind, device, NUM_SAMPLES, 0)
    for name, norms in plain.rounded.norms.items():
        # The norm of what is rounding only would be all over the place.
        assert (norms / plain.exact.norms[name]).log().square().mean().sqrt() < 0.05, name


LINEAR_KINDS = ("linear", "linear-2d", "linear-4d", "transposed-linear", "group-norm")


def losses_of(name: str, kind: str, device: torch.device) -> Tensor:
    return mode_of(name, kind, 1.0, device).accumulate(make_batch(kind, 8, device)).loss_B


@pytest.mark.parametrize("mode", OURS + PLANNED)
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_linear_layer_rounds_as_in_plain_training(
    kind: str, mode: str, device: torch.device
) -> None:
    found, wanted = (losses_of(name, kind, device) for name in (mode, "no_dp_single"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_product_that_is_rounded_before_its_bias_is_added_is_found(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def twice_rounded(x: Tensor, weight_PD: Tensor, bias: Tensor | None) -> Tensor:
        product = F.linear(x, weight_PD)
        return product if bias is None else product + bias

    monkeypatch.setattr(fused_linear, "linear_forward", twice_rounded)
    found, wanted = (
        losses_of(name, "linear", device) for name in ("flash_fuse_bk/tiled", "no_dp_single")
    )
    assert not torch.equal(found, wanted)


def epsilon_of_bfloat16(site: Site) -> None:
    """What a default of the inputs' type, rather than of the type computed in, comes to."""

    def terms(original: Any, module: nn.RMSNorm, x: Tensor, dy: Tensor) -> dict[str, Term]:
        epsilon, module.eps = module.eps, torch.finfo(x.dtype).eps
        try:
            found: dict[str, Term] = original(module, x, dy)
            return found
        finally:
            module.eps = epsilon

    site.wrap(Seam.RMS_NORM_TERMS, terms)


def test_an_epsilon_of_the_wrong_type_is_found(device: torch.device) -> None:
    found = complaints(biases_of("rms-norm", "flash_bk", device, plant=epsilon_of_bfloat16))
    blamed = {complaint.partition(":")[0] for complaint in found}
    weights = "layers.0.weight", "layers.3.weight"
    assert blamed >= {f"{what} of {name}" for what in ("norm", "clipped sum") for name in weights}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("linear", "layers.0.weight"),
        ("linear", "layers.2.bias"),
        ("embedding", "layers.0.weight"),
        ("layer-norm", "layers.3.weight"),
        ("unknown-bare", "layers.1.gain"),
    ],
)
@pytest.mark.parametrize(
    ("seam", "what"), [(Seam.NORM_SQ_OF, "norm"), (Seam.SUM_OF, "clipped sum")]
)
def test_three_in_a_thousand_in_one_layer_are_found(
    kind: str, name: str, seam: Seam, what: str, device: torch.device
) -> None:
    factor = 1.003**2 if seam is Seam.NORM_SQ_OF else 1.003

    def plant(site: Site) -> None:
        def larger(original: Any, parameter: str, *args: Any) -> Tensor:
            value: Tensor = original(parameter, *args)
            return value * factor if parameter == name else value

        site.wrap(seam, larger)

    found = complaints(biases_of(kind, "flash_bk", device, plant=plant))
    assert f"{what} of {name}" in [complaint.partition(":")[0] for complaint in found]


def norm_added_in_bfloat16(site: Site) -> None:
    """Squares that are small beside the sum so far are lost."""

    def norm_sq_of(original: Any, name: str, terms: tuple[Term, ...]) -> Tensor:
        (term,) = terms
        assert isinstance(term, Outer | Dense)
        squares = term.materialised().grad_B.flatten(1).square().bfloat16()
        total = torch.zeros_like(squares[:, 0])
        for column in squares.unbind(1):
            total += column
        return total.float()

    site.wrap(Seam.NORM_SQ_OF, norm_sq_of)


def test_a_norm_added_up_in_bfloat16_is_found(device: torch.device) -> None:
    found = complaints(biases_of("linear", "flash_bk", device, plant=norm_added_in_bfloat16))
    assert any(complaint.startswith("norm of layers.0.weight") for complaint in found)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("kind", "mode"), SOAK_CASES, ids=map("-".join, SOAK_CASES))
def test_many_samples_have_no_bias(kind: str, mode: str, seed: int, device: torch.device) -> None:
    checks = biases_of(kind, mode, device, num_samples=NUM_SAMPLES_SOAK, seed=seed)
    assert complaints(checks) == []
    assert max(bias.resolution for bias in checks) < WORST_RESOLUTION / 2
