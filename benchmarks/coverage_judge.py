"""Holds `make_private` against plain autograd, one sample at a time, from the outside."""

from __future__ import annotations

import functools
import importlib.util
import re
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import dpsgd_track
from benchmarks.coverage_zoo import Architecture, Samples
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.privacy.clipping import layer_of
from dpsgd_track.privacy.expanded import ExpandedLayer

ROOT = Path(__file__).resolve().parent.parent
EXACT, REFUSED, SKIPPED, CRASH, WRONG = "exact", "refused", "skipped", "crash", "wrong"
"""Outcomes, from the best to the worst."""
OUTCOMES = (EXACT, REFUSED, SKIPPED, CRASH, WRONG)
FAILURES = (CRASH, WRONG)
FEW = 3
"""Samples of a batch whose size is no other length of a model."""
APART, SAME, THEN = "B != T", "B = T", "B != T, then B = T"
NORM_LIMITS = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative error that a sample's norm may have; rounding comes to some 1e-15 and 1e-6."""
SUM_LIMIT = 1e-4
"""Norm of the clipped sum's error, over the norm of the sum."""
VANISHING = 1e-6
"""Norm of a gradient below which rounding would be judged."""
VERBS = "freeze use call choose give move detach change set pass replace put train add make switch"
WAYS_OUT = re.compile(
    rf"(?:^|[.;:,] |\b(?:or|and) )(?:{'|'.join(VERBS.split())})\b",
    re.IGNORECASE,
)
"""Advice that a refusal gives."""


class Judged:
    """A row with an outcome, which can only become worse."""

    outcome: str
    sentence: str

    def fail(self, outcome: str, sentence: str) -> None:
        """Make it the worse of what it was and `outcome`."""
        if OUTCOMES.index(outcome) > OUTCOMES.index(self.outcome):
            self.outcome, self.sentence = outcome, " ".join(sentence.split())


@dataclass(kw_only=True)
class Row(Judged):
    """Outcome of one architecture, batch and mode."""

    architecture: str
    kind: str
    batch: str
    """Quantity that the batch size is equal to."""
    batch_sizes: str
    """Of the batches that are made for it, to which parts of the first are added."""
    mode: str
    dtype: str = ""
    outcome: str = EXACT
    norm_error: float | None = None
    """Largest relative error of a sample's norm."""
    sum_error: float | None = None
    """Norm of the clipped sum's error over that of the sum."""
    slowdown: float | None = None
    """Time of a private step over that of a plain one; says little at these sizes."""
    num_on_copies: int = 0
    """Layers that ran on one copy of their parameters for each sample."""
    num_by_sample: int = 0
    """Layers that ran sample by sample."""
    seconds: float = 0.0
    sentence: str = ""
    """Message of the exception, or the quantities that were wrong."""
    torch: str = field(default_factory=lambda: version("torch"))
    transformers: str = field(default_factory=lambda: version("transformers"))
    commit: str = field(default_factory=lambda: revision())


@dataclass(frozen=True)
class Truth:
    """Per-sample gradients by plain autograd, one sample at a time."""

    gradients_BN: Tensor
    """Of all trainable parameters, in the order of their names, float64."""

    @property
    def norm_B(self) -> Tensor:
        return self.gradients_BN.norm(dim=1)

    def take(self, indices: list[int]) -> Truth:
        """That of some of the samples."""
        return Truth(self.gradients_BN[indices])

    def clipped_sum(self, max_grad_norm: float) -> Tensor:
        """sum_i min(1, C / ||g_i||) g_i, [N]."""
        return (max_grad_norm / self.norm_B).clamp(max=1.0) @ self.gradients_BN


@dataclass(frozen=True)
class Trial:
    """Batches that a model goes through, and what is true of them; shared by all modes."""

    batches: tuple[tuple[Samples, Truth], ...]
    dtype: torch.dtype
    norm_limit: float
    max_grad_norm: float
    """C, at which more than half of the first batch's samples are clipped, and not all."""
    leaves_one_out: bool
    """True if the second batch is the first without its sample of the largest gradient."""


def judge(name: str, architecture: Architecture, seconds: float = 60.0) -> Iterator[Row]:
    """One row for each batch and mode; an exception is a row as well."""
    for batch, sizes in batches_of(architecture).items():
        modes = architecture.modes if batch in (APART, SAME) else architecture.modes[:1]
        about = {"architecture": name, "kind": architecture.kind, "batch": batch}
        rows = [Row(**about, batch_sizes=" ".join(map(str, sizes)), mode=mode) for mode in modes]
        if architecture.needs and importlib.util.find_spec(architecture.needs) is None:
            for row in rows:
                row.fail(SKIPPED, f"{architecture.needs} is not installed.")
            yield from rows
            continue
        with _quiet():
            find_trial = functools.cache(lambda sizes=sizes: prepare(architecture, sizes))
            for row in rows:
                started = time.monotonic()
                try:
                    with _limited(seconds):
                        judge_mode(row, find_trial(), architecture)
                except Exception as error:
                    row.fail(CRASH, f"{type(error).__name__}: {error}")
                row.seconds = time.monotonic() - started
                yield row


def batches_of(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Batch sizes by what they are equal to.

    After a single one comes the same batch without one sample, and in the end one sample alone.
    """
    longest, *_ = architecture.sizes.values()
    equal = {f"B = {name}": (size,) for name, size in architecture.sizes.items()}
    return {APART: (FEW,), **equal, THEN: (FEW, longest)}


def prepare(architecture: Architecture, sizes: tuple[int, ...]) -> Trial | None:
    """Find the true gradients of batches, in float64 where the model can.

    None where the model cannot run one sample alone, as with BatchNorm's statistics.
    """
    for dtype in NORM_LIMITS:
        try:
            model = architecture.make().to(dtype)
            batches = [true_batch(model, size, architecture) for size in sizes]
            if all(truth.gradients_BN.isfinite().all() for _, truth in batches):
                break
        except ValueError:
            return None
        except RuntimeError:
            # Some have parts that are made for float32.
            continue
    else:
        raise RuntimeError("the plain model runs neither in float64 nor in float32")
    (batch, truth), *_ = batches
    if float(truth.norm_B.min()) < VANISHING:
        raise RuntimeError(
            "the plain model has no gradient to speak of; feed it with other samples"
        )
    # Where parts round to float32, one sample alone is rounded otherwise than in a batch.
    apart = (_gradient(model, batch, architecture) - truth.gradients_BN.sum(0)).norm()
    rounds = bool(apart > 1e-11 * truth.gradients_BN.sum(0).norm())
    largest = int(truth.norm_B.argmax())
    parts = [[largest]]
    leaves_one_out = len(sizes) == 1
    if leaves_one_out:
        parts.insert(0, [i for i in range(len(batch)) if i != largest])
    batches += [(batch.take(part), truth.take(part)) for part in parts]
    return Trial(
        batches=tuple(batches),
        dtype=dtype,
        norm_limit=NORM_LIMITS[torch.float32 if rounds else dtype],
        max_grad_norm=0.7 * float(truth.norm_B.median()),
        leaves_one_out=leaves_one_out,
    )


def judge_mode(row: Row, trial: Trial | None, architecture: Architecture) -> None:
    """Run the trial in one mode, and fill in the row."""
    dtype = trial.dtype if trial else torch.float32
    row.dtype = str(dtype).removeprefix("torch.")
    model = architecture.make().to(dtype)
    names = {*dict(model.named_modules()), *dict(model.named_parameters())}
    run = None
    try:
        if trial is None:
            run = PrivateRun(model, row.mode, architecture, max_grad_norm=1.0)
            run.step(architecture.make_samples(FEW, torch.Generator().manual_seed(0)))
            row.fail(WRONG, "a model that cannot run one sample alone was taken")
            return
        run = PrivateRun(model, row.mode, architecture, trial.max_grad_norm)
        (judge_dropped if architecture.drops else judge_exact)(row, run, trial)
        row.slowdown = _slowdown(run, trial.batches[0][0], architecture, dtype)
    except ValueError as error:
        if is_refusal(str(error), names):
            row.fail(REFUSED, str(error))
        else:
            row.fail(CRASH, f"ValueError without a way out: {error}")
    finally:
        if run is not None:
            row.num_on_copies, row.num_by_sample = run.slow_layers()


class PrivateRun:
    """A model under `make_private`, with weights that are put back after every step."""

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        architecture: Architecture,
        max_grad_norm: float,
        *,
        noise_multiplier: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        self.private = dpsgd_track.make_private(
            model,
            self.optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=FEW,
            mode=mode,
            loss=architecture.loss,
        )

    def slow_layers(self) -> tuple[int, int]:
        """Layers that run on one copy of their parameters for each sample, and of these and others
        those whose gradients have been formed sample by sample."""
        mode = self.private.mode
        if not isinstance(mode, ComposedMode) or mode.engine.capture is None:
            return 0, 0
        capture = mode.engine.capture
        layers = capture.captured.values()
        on_copies = [layer for layer in layers if isinstance(layer, ExpandedLayer)]
        by_sample = len(set(map(layer_of, capture.by_sample)))
        by_sample += sum(not layer.is_vectorised for layer in on_copies)
        return len(on_copies), by_sample

    def step(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Norms [B] and the clipped sum [N], read off what a step does to the weights."""
        before = _weights(self.model)
        self.private.backward(samples.inputs, samples.targets)
        self.optimizer.step()
        self.optimizer.zero_grad()
        step = flat(before) - flat(_weights(self.model))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])
        record = self.private.last
        assert record is not None
        assert record.norm_B is not None
        return record.norm_B.double(), step * FEW


def judge_exact(row: Row, run: PrivateRun, trial: Trial) -> None:
    """Hold norms and clipped sums of all batches against the truth."""
    C, sums = trial.max_grad_norm, []
    for place, (samples, truth) in zip(("first", "second", "third"), trial.batches, strict=True):
        # One after the other: an exception in the second must not hide that the first was wrong.
        norm_B, clipped_sum = run.step(samples)
        sums.append(clipped_sum)
        true_sum = truth.clipped_sum(C)
        norm_error = float(((norm_B - truth.norm_B).abs() / truth.norm_B).max())
        sum_error = float((clipped_sum - true_sum).norm() / true_sum.norm())
        row.norm_error = _worst(row.norm_error, norm_error)
        row.sum_error = _worst(row.sum_error, sum_error)
        # A NaN is above every limit.
        if not norm_error <= trial.norm_limit:
            row.fail(WRONG, f"a norm of the {place} batch is {norm_error:.1e} off")
        if not sum_error <= SUM_LIMIT:
            row.fail(WRONG, f"the clipped sum of the {place} batch is {sum_error:.1e} off")
    if trial.leaves_one_out:
        change = float((sums[0] - sums[1]).norm() / C)
        if not change <= 1 + SUM_LIMIT:
            row.fail(WRONG, f"without one sample the clipped sum changes by {change:.2f} C")


def judge_dropped(row: Row, run: PrivateRun, trial: Trial) -> None:
    """Hold clipped sums against the norms that the engine gives, where masks are drawn anew."""
    C = trial.max_grad_norm
    for samples, _ in trial.batches:
        norm_B, clipped_sum = run.step(samples)
        excess = float(clipped_sum.norm() / norm_B.clamp(max=C).sum()) - 1
        if not excess <= SUM_LIMIT or not (norm_B > 0).all():
            row.fail(WRONG, f"the clipped sum is {1 + excess:.3f} times its samples' bound")
        # That of one sample is as long as it was clipped to; several may point apart.
        if len(samples) == 1:
            row.sum_error = abs(excess)
            if not abs(excess) <= SUM_LIMIT:
                row.fail(WRONG, f"one sample's sum is {1 + excess:.3f} times its clipped norm")


def true_batch(model: nn.Module, size: int, architecture: Architecture) -> tuple[Samples, Truth]:
    """Samples, and their gradients one by one."""
    dtype = next(model.parameters()).dtype
    samples = architecture.make_samples(size, torch.Generator().manual_seed(size)).to(dtype)
    alone = [_gradient(model, samples.take([i]), architecture) for i in range(size)]
    return samples, Truth(torch.stack(alone))


def _gradient(model: nn.Module, samples: Samples, architecture: Architecture) -> Tensor:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss_B = architecture.loss(samples.run(model), samples.targets)
    gradients = torch.autograd.grad(
        loss_B.sum(), list(trained.values()), allow_unused=True, materialize_grads=True
    )
    return flat(dict(zip(trained, gradients, strict=True)))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All elements, [N], in the order of the names."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def _slowdown(
    run: PrivateRun, samples: Samples, architecture: Architecture, dtype: torch.dtype
) -> float:
    """The lesser of two private steps over the lesser of two plain ones."""
    plain = architecture.make().to(dtype)
    plain_step, private_step = steps_of(run, plain, samples, architecture)
    return min(map(timed, [private_step] * 2)) / min(map(timed, [plain_step] * 2))


def steps_of(
    run: PrivateRun, plain: nn.Module, samples: Samples, architecture: Architecture
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of the same model without privacy, and a private one."""
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1e-6)

    def plain_step() -> None:
        architecture.loss(samples.run(plain), samples.targets).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def private_step() -> None:
        run.private.backward(samples.inputs, samples.targets)
        run.optimizer.step()
        run.optimizer.zero_grad()

    run.optimizer.param_groups[0]["lr"] = 1e-6
    return plain_step, private_step


def timed(step: Callable[[], None]) -> float:
    """Seconds that a step takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def is_refusal(message: str, names: Iterable[str]) -> bool:
    """True if it names a module, a parameter or a setting, and says what to do."""
    named = "|".join(re.escape(name) for name in names if name)
    names_something = re.match(r"\w+(=|: expected)", message) or (
        named and re.search(rf"(?<![\w.])(?:{named})(?!\w)", message)
    )
    return bool(names_something and WAYS_OUT.search(message))


@contextmanager
def _quiet() -> Iterator[None]:
    """Models warn of what does not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _worst(so_far: float | None, value: float) -> float:
    # A NaN is worse than anything.
    return value if so_far is None or not value <= so_far else so_far


@functools.cache
def revision() -> str:
    """The checkout's commit; `unknown` outside of one."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"
