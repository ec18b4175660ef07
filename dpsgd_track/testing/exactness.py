"""Holds one module in one mode against the oracle: plain autograd, one sample at a time, float64.

Compared are the samples' norms, over all parameters and of each, the clip factors, and the clipped
sum of each parameter: of a batch at a C that clips none, half and all of its samples, of two
micro-batches of unequal sizes, and of an empty one, where the mode takes it. Runs in this process,
on one device.
"""

from __future__ import annotations

import copy
import enum
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.config import PrivacyConfig, require
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import REFERENCE, is_of_opacus, is_private, runs_on_one_device
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loss import PerSampleLoss

BY_DEFAULT = (
    *("flash", "flash_bk", "flash_fuse", "flash_fuse_bk", "ghost_bk"),
    *("ghost", "grad_materialize"),
)
"""Modes that a module is checked in: those on one device, this package's and Opacus's."""
MEAN, SUM = "mean", "sum"
TOLERANCE = 1e-4
"""Relative error that float32 may come to; rounding alone comes to some 1e-6."""
_VANISHING = 1e-3
"""Share of the whole below which a part's error is measured against the whole."""
_UNCLIPPED = 1e30
_WORTH_THREADS = 1 << 20
"""Parameters from which on a module's operations are worth several threads."""


class Outcome(enum.StrEnum):
    """Outcome of a check, from the best to the worst."""

    EXACT = "exact"
    REFUSED = "refused"
    """The mode refuses the module in a sentence."""
    FAILED = "failed"
    """An exception that is no refusal."""
    WRONG = "wrong"


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A number that differs from the oracle's."""

    what: str
    """per-sample norms, clip factors, or clipped sum."""
    parameter: str
    """Name of the parameter; empty for what is over all of them."""
    error: float
    """Largest relative error; infinite for what is not finite."""
    batch: str
    """The batch that shows it, in words."""

    @property
    def sentence(self) -> str:
        """The error in words, without a full stop."""
        of = f" of {self.parameter}" if self.parameter else ""
        return f"{self.what}{of} off by {self.error:.2g} (relative) in {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A module in one mode."""

    mode: str
    reduction: str
    """Reduction of the loss over the samples that the mode was given: mean or sum."""
    outcome: Outcome
    wrong: tuple[Wrong, ...] = ()
    """Errors in the first batch that shows any; later ones show their consequences."""
    sentence: str = ""
    """Message of a refusal or an exception."""
    takes_empty_batches: bool = True

    @property
    def parameters(self) -> tuple[str, ...]:
        """Parameters with a wrong norm or sum."""
        return tuple(dict.fromkeys(each.parameter for each in self.wrong if each.parameter))

    @property
    def reason(self) -> str:
        """Reason that the outcome is not exact, in one line without a full stop."""
        return "; ".join(each.sentence for each in self.wrong) or self.sentence


@dataclass(frozen=True)
class _Trial:
    """Micro-batches of one step, and C."""

    name: str
    batches: tuple[Batch, ...]
    max_grad_norm: float


@dataclass(frozen=True)
class _Step:
    """Results of a mode for a trial, in float64."""

    norm_B: Tensor | None
    factor_B: Tensor | None
    norms: dict[str, Tensor]
    """[B] of each parameter; none where the mode does not tell."""
    sums: dict[str, Tensor]


def check(
    module: nn.Module,
    batch: Tensor | Sequence[Tensor] | Batch,
    *,
    modes: Sequence[str] = BY_DEFAULT,
    loss: PerSampleLoss | None = None,
) -> Iterator[Checked]:
    """Check `module` in each of `modes`, in those of Opacus with a mean and a summed loss.

    The module is copied, and neither it nor the batch is changed.

    Args:
        module: in float32 or float64, without dropout. Its output is a tensor, or a tuple that
            begins with one; dimension 0 is the sample.
        batch: its positional arguments, dimension 0 of each the sample, two samples or more; or a
            `Batch`.
        modes: names of modes on one device, or `package.module:factory`.
        loss: (output, targets) -> loss of each sample, [B]; needs a `Batch`. By default, a fixed
            weighted sum of each sample's output.

    Raises:
        ValueError: a mode cannot be checked here, or the module cannot be run on the batch.
    """
    for mode in modes:
        allowed = "a private mode on one device, other than reference"
        is_user = ":" in mode and not is_of_opacus(mode)
        is_checked = is_private(mode) and (runs_on_one_device(mode) or is_user)
        require(is_checked and mode != REFERENCE, "mode", mode, allowed)
    held = CheckedModule(module)
    with _few_threads(held):
        trials, weighted = _trials(held, batch, loss)
        truths = [
            _step(build_mode(REFERENCE, *_new(held, trial, weighted)), trial) for trial in trials
        ]
    for mode in modes:
        for reduction in (MEAN, SUM) if is_of_opacus(mode) else (SUM,):
            with _few_threads(held):
                checked = _checked(mode, reduction, held, trials, truths, weighted)
            yield checked


def assert_exact(
    module: nn.Module,
    batch: Tensor | Sequence[Tensor] | Batch,
    *,
    mode: str = "flash",
    loss: PerSampleLoss | None = None,
) -> None:
    """Assert that `mode` computes the oracle's norms and sums of `module`; see `check`.

    Raises:
        AssertionError: it does not, or refuses the module; the message names parameters.
    """
    for checked in check(module, batch, modes=(mode,), loss=loss):
        how = f" with a {checked.reduction} loss" * is_of_opacus(mode)
        said = f"{type(module).__name__} in {mode}{how} is {checked.outcome}: {checked.reason}."
        assert checked.outcome is Outcome.EXACT, said


class CheckedModule(nn.Module):
    """`module` as a part of a model, whose output is a tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **inputs: Tensor) -> Tensor:
        output: Any = self.module(*args, **inputs)
        while isinstance(output, tuple | list):
            output = output[0]
        output = getattr(output, "logits", output)
        require(isinstance(output, Tensor), "output", type(output).__name__, "a tensor")
        tensor: Tensor = output
        return tensor


def _trials(
    held: CheckedModule, given: Tensor | Sequence[Tensor] | Batch, loss: PerSampleLoss | None
) -> tuple[list[_Trial], PerSampleLoss]:
    """The steps that are compared, and the loss."""
    for name, layer in held.module.named_modules():
        rate = getattr(layer, "p", 0.0) if "dropout" in type(layer).__name__.lower() else 0.0
        advice = f"Every call of {name or 'the module'} draws another mask."
        require(
            rate == 0 or not layer.training, "dropout", rate, "0, or a module in eval()", advice
        )
    if isinstance(given, Batch):
        batch, loss = given, loss or _weighted
    else:
        args = (given,) if isinstance(given, Tensor) else tuple(given)
        require(loss is None, "loss", loss, "none without a Batch, which has its targets")
        with torch.no_grad():
            output = copy.deepcopy(held)(*args)
        batch = Batch({}, _weights_of(output, len(args[0])), args=args)
        loss = _weighted
    require(len(batch) >= 2, "batch", len(batch), "two samples or more")
    context = _context(held, _UNCLIPPED, len(batch), loss)
    norm_B = _run(build_mode(REFERENCE, copy.deepcopy(held), context), (batch,)).norm_B
    assert norm_B is not None
    require(bool((norm_B > 0).all()), "norm", norm_B.tolist(), "a gradient in each sample")
    half, least = float(norm_B.median()), float(norm_B.min()) / 2
    first = batch.rows(torch.arange(len(batch) - 1))
    trials = [
        # First, as a wrong norm then changes no sum.
        _Trial("the batch, unclipped", (batch,), _UNCLIPPED),
        _Trial("the batch, all clipped", (batch,), least),
        _Trial("two micro-batches, half clipped", (first, batch.sample(len(batch) - 1)), half),
        _Trial("an empty batch", (batch.rows(torch.arange(0)),), half),
    ]
    return trials, loss


def _weights_of(output: Tensor, num_samples: int) -> Tensor:
    """A fixed weight for each element of `output`, as targets [B, ...]."""
    is_one_a_sample = output.ndim > 0 and len(output) == num_samples
    require(is_one_a_sample, "output", list(output.shape), f"{num_samples} samples in dimension 0")
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator).to(output.device)


def _weighted(output: Tensor, target: Tensor) -> Tensor:
    """Sum of each sample's output, weighted by its target, [B]."""
    exact = output.to(torch.promote_types(output.dtype, torch.float32))
    return (exact.flatten(1) * target.to(exact).flatten(1)).sum(dim=1)


def _context(
    held: CheckedModule, max_grad_norm: float, size: int, loss: PerSampleLoss
) -> ModeContext:
    parameter = next((p for p in held.parameters() if p.requires_grad), None)
    advice = "There is nothing to clip."
    require(parameter is not None, "module", held.module, "a trainable parameter", advice)
    assert parameter is not None
    return ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=max(size, 1)
        ),
        device=parameter.device,
        param_dtype=torch.float32,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        loss=loss,
    )


def _new(
    held: CheckedModule, trial: _Trial, loss: PerSampleLoss
) -> tuple[CheckedModule, ModeContext]:
    """A fresh copy of the module, and its context in `trial`."""
    size = sum(map(len, trial.batches))
    return copy.deepcopy(held), _context(held, trial.max_grad_norm, size, loss)


def _checked(
    mode: str,
    reduction: str,
    held: CheckedModule,
    trials: Sequence[_Trial],
    truths: Sequence[_Step],
    loss: PerSampleLoss,
) -> Checked:
    wrong: tuple[Wrong, ...] = ()
    takes_empty, built = True, None
    try:
        for trial, truth in zip(trials, truths, strict=True):
            model, context = _new(held, trial, loss)
            built = None
            with _silence():
                built = _build(mode, reduction, model, context)
                takes_empty = built.takes_empty_batches
                if not all(map(len, trial.batches)) and not takes_empty:
                    continue
                found = _step(built, trial)
            if wrong := tuple(_differences(found, truth, trial)):
                break
    except Exception as error:
        # Others refuse a module when they are built. This package's modes may also do so later.
        may_refuse = built is None or not is_of_opacus(mode)
        is_refusal = isinstance(error, ValueError | NotImplementedError) and may_refuse
        return Checked(
            mode=mode,
            reduction=reduction,
            outcome=Outcome.REFUSED if is_refusal else Outcome.FAILED,
            sentence=("" if is_refusal else f"{type(error).__name__}: ")
            + " ".join(str(error).split()).rstrip(". "),
        )
    return Checked(
        mode=mode,
        reduction=reduction,
        outcome=Outcome.WRONG if wrong else Outcome.EXACT,
        wrong=wrong,
        takes_empty_batches=takes_empty,
    )


@contextmanager
def _few_threads(held: CheckedModule) -> Iterator[None]:
    """Context in which small operations have one thread: others would wait for work, and spin."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in held.parameters()) < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _silence() -> Iterator[None]:
    """Context without warnings: the layer is judged, not what its library says of it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _build(mode: str, reduction: str, model: nn.Module, context: ModeContext) -> Mode:
    if not is_of_opacus(mode):
        return build_mode(mode, model, context)
    from dpsgd_track.modes.opacus import OpacusMode
    from dpsgd_track.modes.table import spec_of

    spec = spec_of(mode)
    assert spec is not None
    return OpacusMode(spec.grad_sample_mode, model, context, loss_reduction=reduction)


def _step(mode: Mode, trial: _Trial) -> _Step:
    """Run the trial's micro-batches as the step loop does."""
    mode.set_max_grad_norm(trial.max_grad_norm)
    return _run(mode, trial.batches)


def _run(mode: Mode, batches: Sequence[Batch]) -> _Step:
    records = [mode.accumulate(batch) for batch in batches]
    sums = mode.clipped_sum().gradients
    by_parameter = [record.norm_by_parameter_B for record in records]
    names = list(sums)
    norms: dict[str, Tensor] = {}
    if all(each is not None for each in by_parameter):
        norms = {
            name: torch.cat(
                [
                    _exact(each.get(name, torch.zeros(len(record.loss_B))))
                    for record, each in zip(records, by_parameter, strict=True)
                    if each is not None
                ]
            )
            for name in names
        }
    return _Step(
        norm_B=_column(records, lambda record: record.norm_B),
        factor_B=_column(records, lambda record: record.clip_factor_B),
        norms=norms,
        sums={name: _exact(total) for name, total in sums.items()},
    )


def _column(
    records: Sequence[SampleRecord], of: Callable[[SampleRecord], Tensor | None]
) -> Tensor | None:
    values = [value for record in records if (value := of(record)) is not None]
    return torch.cat([_exact(value) for value in values]) if len(values) == len(records) else None


def _exact(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64, copy=True)


def _differences(found: _Step, truth: _Step, trial: _Trial) -> Iterator[Wrong]:
    """Quantities that differ, parameters first: they name the place."""
    assert truth.norm_B is not None
    assert truth.factor_B is not None
    pairs: list[tuple[str, str, Tensor | None, Tensor, Tensor]] = []
    for name, norm_B in found.norms.items():
        whole = truth.norm_B.clamp(min=torch.finfo(torch.float64).tiny)
        pairs.append(("norms", name, norm_B, truth.norms[name], whole))
    total = torch.stack([s.norm() for s in truth.sums.values()]).norm()
    # Of an empty batch nothing may come.
    whole = total if total > 0 else torch.tensor(trial.max_grad_norm, dtype=torch.float64)
    for name, wanted in truth.sums.items():
        pairs.append(("clipped sum", name, found.sums.get(name), wanted, whole))
    pairs.append(("norms", "", found.norm_B, truth.norm_B, truth.norm_B))
    pairs.append(("clip factors", "", found.factor_B, truth.factor_B, torch.ones(1)))
    lost: set[str] = set()
    for what, name, got, wanted, whole in pairs:
        if got is None and what != "clipped sum":
            continue
        error = _error(what, got, wanted, whole)
        if what == "norms" and math.isinf(error):
            lost.add(name)
        # A factor that is not finite spoils the sums of all parameters.
        follows = what == "clipped sum" and math.isinf(error) and lost and name not in lost
        if not error <= TOLERANCE and not follows:
            shown = name.removeprefix("module.")
            yield Wrong(what=what, parameter=shown, error=error, batch=trial.name)


def _error(what: str, got: Tensor | None, wanted: Tensor, whole: Tensor) -> float:
    """Largest relative error; NaN becomes infinite."""
    if got is None or got.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    if what == "clipped sum":
        error = (got - wanted).norm() / torch.maximum(wanted.norm(), _VANISHING * whole)
    else:
        error = ((got - wanted).abs() / torch.maximum(wanted.abs(), _VANISHING * whole)).max()
    return float(error.nan_to_num(nan=float("inf")))
