"""The modes as a library: runs any of them under the user's own training loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from dpsgd_track.config import FLAT, PER_LAYER, PrivacyConfig, num_bytes, require
from dpsgd_track.distributed.ranks import rank, world_size
from dpsgd_track.distributed.sharding import fsdp_units, trainable_parameters
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.reference import ReferenceMode
from dpsgd_track.modes.table import (
    check_mode,
    is_of_package,
    is_private,
    runs_on_one_device,
    takes_memory_budget,
)
from dpsgd_track.privacy.adaptive import AdaptiveBound, AdaptiveClipping
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.calibration import Budget, budget_of
from dpsgd_track.privacy.clipping import SampleRecord, clip_fraction, mean_loss
from dpsgd_track.privacy.foreign_mode import NoiseAudit, check_sum
from dpsgd_track.privacy.guards import GradientGuard, ModelGuard
from dpsgd_track.privacy.history import SharedHistory, histories, history_of, is_history_of
from dpsgd_track.privacy.ledger import RATE_ADVICE, PrivacyLedger
from dpsgd_track.privacy.left_out_counter import LeftOutCounter
from dpsgd_track.privacy.loader import PrivateLoader, refuse_unindexed
from dpsgd_track.privacy.loss import PerSampleLoss, loss_named
from dpsgd_track.privacy.noise import NoiseSource, fresh_key
from dpsgd_track.privacy.open_batch import OpenBatch
from dpsgd_track.privacy.optimizers import HookedOptimizers, Optimizers, StepCalls, close_earlier
from dpsgd_track.privacy.sampling import OpenDraw, PoissonSampler
from dpsgd_track.privacy.spot_check import SpotCheck, SpotChecks
from dpsgd_track.privacy.why import LayerAccount, accounts_of
from dpsgd_track.step_metrics import StepMetrics

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

OWN_MODES = (ComposedMode, ReferenceMode)
"""Modes that bound every sample's contribution and leave out samples that are not finite."""

FLASH_ON_ONE_DEVICE = ("flash_bk", "flash")
FLASH_UNDER_FSDP2 = ("flash_fsdp_bk", "flash_fsdp")
"""Modes that `make_private` chooses from: of one backward, and of two."""

_BOUND = "max_grad_norm"
"""Key of C in the state of a training whose C is adaptive."""


class PrivateTraining:
    """A model and its optimizer, made private by `make_private`.

    `backward` replaces `loss.backward()`; inside of `batch` the loop's own code calls the model and
    forms the losses. The optimizer's `step` then adds the noise before it
    updates the weights, and raises if no clipped gradient was added.

    The contract is in the docstring of `make_private`.
    """

    def __init__(
        self,
        mode: Mode,
        optimizers: Optimizers,
        history: SharedHistory,
        *,
        noise_key: str,
        sample_rate: float | None,
        budget: Budget | None,
        adaptive: AdaptiveClipping | None,
        spot_check: bool,
    ) -> None:
        self.mode = mode
        self.model = mode.model
        self.last: SampleRecord | None = None
        """Losses, norms and clip factors of the last batch's samples. Not private: noise protects
        the weights alone."""
        self._history = history
        self._privacy = mode.context.privacy
        self._noise_key = noise_key
        self._sample_rate = sample_rate
        self._budget = budget
        device = mode.context.device
        self._bound = AdaptiveBound(adaptive, device) if adaptive is not None else None
        self._next_bound: float | None = None
        """C of the next step, once this one has counted its samples."""
        self._set_privacy(self._privacy)
        self._draw = OpenDraw()
        self._has_loader = False
        self._added: list[SampleRecord] = []
        """Records of the current step's batches."""
        self._stepped: list[SampleRecord] = []
        """Records of the last step's batches."""
        self._open: OpenBatch | None = None
        """The batch that the loop's own code is forming the losses of."""
        self._told_sizes: set[int] = set()
        """Sizes of batches by which the loop's own code seems to scale."""
        self._shared = WeakTensorKeyDictionary()
        """Tensors in the loop's own code that belong to no sample, such as class weights."""
        self._is_added = False
        """True once the current batch is in the sum."""
        self._num_own_steps = 0
        self._spoiled: BaseException | None = None
        self._gradients = GradientGuard(
            mode.model, keeps_sums_elsewhere=isinstance(mode, ComposedMode) and mode.clips
        )
        self._left_out = LeftOutCounter()
        self._is_closed = False
        self._guard = ModelGuard(mode.model) if mode.clips else None
        can_check = spot_check and isinstance(mode, ComposedMode) and mode.clips
        self._spot_check = SpotCheck(mode.engine) if can_check else None  # type: ignore[attr-defined]
        calls = StepCalls(
            begin=self._begin_step,
            drop=self._drop_step,
            end=self._end_step,
            refuse_clearing=self._refuse_clearing,
        )
        self._optimizers = HookedOptimizers(optimizers, calls, self)

    @property
    def num_steps(self) -> int:
        """Noisy steps taken on the model so far, also before this call of `make_private`."""
        return self._ledger.num_steps

    @property
    def noise_multiplier(self) -> float:
        """sigma of the next step."""
        return self._privacy.noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """C of the next step."""
        return self._privacy.max_grad_norm

    @property
    def _num_added(self) -> int:
        """Samples of the current step on this rank."""
        return sum(len(record.loss_B) for record in self._added)

    @property
    def _ledger(self) -> PrivacyLedger:
        return PrivacyLedger(self._history)

    @property
    def spot_checks(self) -> SpotChecks:
        """Number and time of the comparisons with plain autograd so far."""
        return self._spot_check.cost if self._spot_check is not None else SpotChecks()

    def why(self) -> list[LayerAccount]:
        """Account of each layer: its way to per-sample gradients, the cost, and a remedy.

        Empty for modes that do not go layer by layer. The first batch may change it.
        """
        capture = self.mode.engine.capture if isinstance(self.mode, ComposedMode) else None
        return [] if capture is None else list(accounts_of(capture))

    @property
    def num_left_out(self) -> int:
        """Samples that were left out so far as their loss or gradient was not finite."""
        return self._left_out.count()

    def backward(self, inputs: Inputs, targets: Tensor | None = None) -> Tensor:
        """Add the clipped gradients of a batch, or of one micro-batch of several.

        Each rank calls it equally often, with its own samples. A batch may be empty, as happens
        under Poisson sampling.

        Args:
            inputs: arguments of the model: one tensor, several, or keyword arguments. Dimension 0
                of every tensor is the sample. Inside of `batch`, the loss of each sample, [B].
            targets: second argument of the loss; dimension 0 is the sample. Left out inside of
                `batch`.

        Returns:
            Loss of each sample, [B], detached.

        Raises:
            ValueError: the model or its loss has become one whose per-sample gradients are not
                known exactly, or an input is not a tensor with a row for each sample. The batch is
                not added.
            RuntimeError: gradients are disabled, or an earlier failure leaves the step unusable.
        """
        if self._open is not None:
            allowed = "none inside of batch(), where backward() takes the losses alone"
            require(targets is None, "targets", type(targets).__name__, allowed)
            return self._finish(self._open, inputs)
        advice = "Call backward(inputs, targets), or backward(losses) inside of batch()."
        require(targets is not None, "targets", targets, "a tensor", advice)
        assert targets is not None
        self._refuse_unless_ready()
        batch, check = _batch(inputs, targets), self._spot_check
        with self._adding():
            if check is not None:
                check.note(batch)
                check.before(batch)
            self.last = self.mode.accumulate(batch)
            self._is_added = True
            self._refuse_non_finite(self.last)
            if check is not None:
                check.after(batch, self.last)
        return self.last.loss_B

    @contextmanager
    def batch(self, num_samples: int) -> Iterator[None]:
        """Context in which the loop's own code calls the model, and forms the loss of each sample.

            with private.batch(len(x)):
                logits = model(x)
                private.backward(F.cross_entropy(logits, y, reduction="none"))

        The model may be called with any arguments, and return anything. Under FSDP2 each rank opens
        equally many batches, and calls the model equally often in each. Without samples the code
        sees outputs without rows.

        Args:
            num_samples: B, samples of the batch, or of one micro-batch of several, on this rank.
                Dimension 0 of every tensor that the model is called with has this size.

        Raises:
            ValueError: as `backward`; or the code reads a number from several samples, which may
                go into the losses, or calls functions that torch does not report, so that the
                losses cannot be checked.
            RuntimeError: as `backward`; or `backward` was not called.
        """
        is_number = isinstance(num_samples, int) and num_samples >= 0
        require(is_number, "num_samples", num_samples, "a number of samples")
        mode, check = self.mode, self._spot_check
        name, allowed = type(mode).__name__, "a mode of this package but `reference`"
        advice = "Call backward(inputs, targets)."
        require(isinstance(mode, ComposedMode), "mode", name, allowed, advice)
        assert isinstance(mode, ComposedMode)
        require(self._open is None, "batch", "a second one", "one at a time")
        self._refuse_unless_ready()
        with self._adding():
            opened = OpenBatch(
                mode.engine, num_samples, records=check is not None, shared=self._shared
            )
            self._open = opened
            try:
                with opened:
                    yield
            finally:
                self._open = None
            if opened.is_scaled_by_size and num_samples not in self._told_sizes:
                self._told_sizes.add(num_samples)
                warnings.warn(
                    f"batch({num_samples}): something was multiplied or divided by {num_samples}. "
                    "A loss that depends on the number of samples depends on the other samples, "
                    "and is not private: leave the division to expected_batch_size.",
                    stacklevel=3,
                )
            if check is not None:
                assert self.last is not None
                batch = opened.recorded()
                check.note(batch)
                check.after(batch, self.last)

    def _finish(self, opened: OpenBatch, loss_B: Any) -> Tensor:
        require(not opened.is_done, "backward", "a second one", "one in each batch()")
        self.last = opened.finish(loss_B)
        self._is_added = True
        self.mode.note_bound()
        return self.last.loss_B

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """Context in which a batch is added to the step."""
        self._is_added = False
        try:
            with self._guarded():
                yield
        except BaseException as error:
            if self._is_added or not self.mode.is_atomic:
                self._spoiled = error
            raise
        assert self.last is not None
        self._gradients.note()
        self._left_out.add(self.last)
        if self._bound is not None:
            self._bound.note(self.last, self._privacy.max_grad_norm)
        self._added.append(self.last)

    def _refuse_unless_ready(self) -> None:
        """Raise unless a batch can be added now."""
        self._refuse_unless_whole()
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "backward() under torch.no_grad() or inference_mode(): expected gradients to be "
                "enabled. Without them a step would be noise alone. Call it outside."
            )
        self._gradients.check()

    def loader(
        self,
        dataset: Any,
        *,
        physical_batch_size: int | None = None,
        num_steps: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **loading: Any,
    ) -> PrivateLoader:
        """Poisson-sampled batches of `dataset`, whose sample rate `epsilon` then knows.

            for batches in private.loader(dataset, physical_batch_size=64):
                for x, y in batches:
                    private.backward(x, y)
                optimizer.step()

        Each step takes each sample with probability expected batch size / samples, over all ranks.
        A rank gets its share in micro-batches: as many on every rank, those without samples as
        tensors without rows. The draw is a function of the secret key, or the seed, and of
        `num_steps` of this object.

        Args:
            dataset: has a length, and a sample for each index below it. The same on every rank.
            physical_batch_size: most samples of a micro-batch; None for one micro-batch a step.
            num_steps: steps of one pass; None for an epoch in expectation.
            collate_fn: makes a micro-batch of a list of samples; torch's default if None.
            loading: further arguments of `torch.utils.data.DataLoader`, such as `num_workers`.

        Raises:
            ValueError: a setting is out of range, or `make_private` was given another sample rate.
            RuntimeError: in the loop: a step was not taken, or of other samples than were drawn.
        """
        refuse_unindexed("dataset", dataset)
        for name, got in (("physical_batch_size", physical_batch_size), ("num_steps", num_steps)):
            is_count = got is None or (type(got) is int and got >= 1)
            require(is_count, name, got, "an integer >= 1, or None")
        make_sampler = partial(self._sampler, len(dataset), physical_batch_size)
        make_sampler()
        self._has_loader = True
        return PrivateLoader(
            dataset,
            make_sampler,
            num_steps=num_steps,
            steps_taken=lambda: self.num_steps,
            opened=self._draw,
            collate_fn=collate_fn,
            loading=loading,
        )

    def _sampler(self, num_samples: int, batch_size: int | None) -> PoissonSampler:
        """Sampler of that many samples by the current settings."""
        expected = self._privacy.expected_batch_size
        allowed = f"at least the {expected} samples that a step is expected to hold"
        require(num_samples >= expected, "dataset", num_samples, allowed)
        rate = expected / num_samples
        is_same = self._sample_rate is None or math.isclose(self._sample_rate, rate)
        allowed = f"{rate!r}, which is {expected} of {num_samples} samples"
        require(is_same, "sample_rate", self._sample_rate, allowed, "Leave it out, or change both.")
        return PoissonSampler(
            key=self._noise_key,
            num_samples=num_samples,
            sample_rate=rate,
            rank=rank(),
            num_ranks=world_size(),
            batch_size=batch_size,
        )

    def change(
        self,
        *,
        noise_multiplier: float | None = None,
        max_grad_norm: float | None = None,
        expected_batch_size: int | None = None,
        sample_rate: float | None = None,
    ) -> None:
        """Train by other settings from the next step on. Each step counts at its own.

        A resumed training changes them again: they are no part of `state_dict`.

        Args:
            noise_multiplier: sigma; None leaves it as it is, and so for the others.
            max_grad_norm: C. The noise has the standard deviation sigma C, so epsilon stays.
            expected_batch_size: the divisor. `loader` follows in its next pass.
            sample_rate: of batches that the loop draws by itself, or as it was given to
                `make_private` for `target_epsilon`.

        Raises:
            ValueError: a setting is out of range, a batch of the step was added already, the rate
                would change within a pass of `loader`, or epsilon would exceed `target_epsilon`.
                Nothing is changed then.
        """
        self._refuse_unless_whole()
        require(not self._added, "change", "within a step", "a call between steps")
        is_of_rate = expected_batch_size is not None or sample_rate is not None
        allowed = "a call between passes of private.loader"
        is_apart = not (is_of_rate and self._draw.is_in_pass)
        require(is_apart, "change", "of the sample rate within a pass", allowed)
        given: dict[str, Any] = {
            "noise_multiplier": noise_multiplier,
            "max_grad_norm": max_grad_norm,
            "expected_batch_size": expected_batch_size,
        }
        changed = {name: value for name, value in given.items() if value is not None}
        allowed = "None, as C is adaptive"
        require(
            self._bound is None or max_grad_norm is None, "max_grad_norm", max_grad_norm, allowed
        )
        privacy = replace(self._privacy, **changed)
        sigma = privacy.noise_multiplier
        allowed = "0 for a mode that does not clip"
        require(self.mode.clips or sigma == 0, "noise_multiplier", sigma, allowed)
        rate = self._sample_rate if sample_rate is None else sample_rate
        _check_sample_rate(rate)
        if self._budget is not None:
            assert rate is not None
            self._budget.refuse_beyond(self._history, sigma, rate)
        self._set_privacy(privacy)
        self._sample_rate = rate

    def _set_privacy(self, privacy: PrivacyConfig) -> None:
        """Clip and add noise by other settings from the next step on."""
        of_sum = privacy if self._bound is None else self._bound.of_sum(privacy)
        if of_sum != self.mode.context.privacy:
            self.mode.set_privacy(of_sum)
        self._privacy = privacy

    def epsilon(
        self, delta: float, *, accountant: str = "rdp", steps_per_sample: int | None = None
    ) -> float:
        """Epsilon of all steps taken on the model so far, at `delta`.

        It holds for batches by Poisson sampling at the sample rate that each step was told: those
        of `loader`, or of the loop's own drawing. For other batches, such as shuffled ones of a
        fixed size, give `steps_per_sample`: a bound without amplification by sampling, for data
        sets in one of which the gradients of one sample are zero.

        Args:
            delta: probability at which the bound may fail, between 0 and 1.
            accountant: rdp (never too small), prv (tighter), or pld (tighter, and never too small;
                needs dp-accounting).
            steps_per_sample: most steps that had any one sample, each once, over the model's whole
                life. With shuffled batches, epochs begun, those begun anew after a resume included.

        Raises:
            ValueError: a step had no noise, or its sample rate is not known.
        """
        sigma = self._privacy.noise_multiplier
        advice = "Without noise epsilon is infinite."
        require(sigma > 0, "noise_multiplier", sigma, "a number > 0", advice)
        if steps_per_sample is not None:
            unsampled = self._ledger.without_sampling(steps_per_sample)
            return unsampled.epsilon(delta, accountant)
        is_known = self._has_loader or self._sample_rate is not None
        require(is_known, "sample_rate", None, "a number from 0 to 1", RATE_ADVICE)
        return self._ledger.epsilon(delta, accountant)

    def step_metrics(self, delta: float, *, accountant: str = "rdp") -> StepMetrics:
        """Loss, clip fraction and epsilon of the step that was taken last, to be tracked.

            optimizer.step()
            metrics = private.step_metrics(delta=1e-5)
            mlflow.log_metrics(metrics.logged, step=metrics.step)

        Loss and clip fraction are of this rank's samples, over all micro-batches, and are not
        private. On a GPU this waits for the device.

        Args:
            delta, accountant: as for `epsilon`.

        Raises:
            ValueError: as `epsilon`.
            RuntimeError: no step was taken yet.
        """
        if self._num_own_steps == 0:
            raise RuntimeError("step_metrics(): expected a call after optimizer.step().")
        return StepMetrics(
            step=self.num_steps,
            loss=mean_loss(self._stepped),
            clip_fraction=clip_fraction(self._stepped),
            epsilon=self.epsilon(delta, accountant=accountant),
            delta=delta,
        )

    def state_dict(self) -> dict[str, Any]:
        """The ledger's state, to be saved beside the model's and the optimizer's.

        With the bound of adaptive clipping, `max_grad_norm`.
        """
        state = self._ledger.state_dict()
        return state if self._bound is None else state | {_BOUND: self._privacy.max_grad_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the run that saved `state`: its steps count, and no noise is drawn twice.

        With a `target_epsilon` and more steps than that run had planned, sigma becomes what keeps
        to the target.

        Raises:
            ValueError: it is not such a state, steps were taken already, it has fewer steps than
                the model has taken, or no noise keeps to the target.
        """
        require(
            self._num_own_steps == 0,
            "state",
            f"after {self._num_own_steps} steps",
            "one that is loaded before the first step",
        )
        self._refuse_unless_whole()
        bound = state.get(_BOUND) if isinstance(state, Mapping) else None
        allowed = "a state of the same kind of clipping, adaptive or not"
        require((bound is None) == (self._bound is None), "state", "another", allowed)
        loaded = PrivacyLedger()
        loaded.load_state_dict({k: v for k, v in state.items() if k != _BOUND} if bound else state)
        privacy = self._privacy if bound is None else replace(self._privacy, max_grad_norm=bound)
        require(
            loaded.num_steps >= self.num_steps,
            "state",
            f"{loaded.num_steps} steps",
            f"the {self.num_steps} that were taken on this model, or more",
        )
        if self._budget is not None:
            assert self._sample_rate is not None
            # Of a training that is longer now, the steps before were planned with less noise.
            sigma = self._budget.noise_within(
                loaded.history, privacy.noise_multiplier, self._sample_rate
            )
            privacy = replace(privacy, noise_multiplier=sigma)
        self._set_privacy(privacy)
        self._note(loaded)

    def close(self) -> None:
        """Restore the optimizer. No batch can be added afterwards."""
        self._optimizers.unhook()
        self._is_closed = True

    def __deepcopy__(self, memo: dict[int, Any]) -> PrivateTraining:
        raise TypeError(
            "PrivateTraining cannot be copied: copy the model, and make the copy private if it is "
            "to be trained. What was spent on the model counts for the copy."
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "PrivateTraining cannot be pickled: save the state_dict() of it, of the model and of "
            "the optimizer."
        )

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        if self._guard is None:
            yield
            return
        self._guard.check()
        with self._guard.watching_forward():
            yield

    def _refuse_unless_whole(self) -> None:
        if self._is_closed:
            raise RuntimeError("The optimizer was made private again: use what that returned.")
        if not is_history_of(self.model, self._history):
            raise RuntimeError(
                "The model was made private again as a part of another: use what that returned, "
                "which accounts for the steps of both."
            )
        self._optimizers.refuse_unless_all_stepped()
        if self._spoiled is not None:
            raise RuntimeError(
                f"A batch of this step has failed ({type(self._spoiled).__name__}) and may be in "
                "the sum in part. Call optimizer.zero_grad(), and add the step's batches again."
            ) from self._spoiled

    def _refuse_non_finite(self, record: SampleRecord) -> None:
        # Our own modes leave such a sample out; another library's has added it.
        if type(self.mode) in OWN_MODES or not record.num_left_out:
            return
        raise ValueError(
            f"batch: expected finite losses and gradients, got {record.num_left_out} samples "
            f"without. {type(self.mode).__name__} has them in its sum. Leave them out, or use a "
            "mode that does."
        )

    def _begin_step(self) -> None:
        """Write the step's noisy gradients into every `.grad`."""
        if self._open is not None:
            raise RuntimeError(
                "step() inside of batch(): expected it after the batch, which is added when the "
                "context ends. Move it out of the `with`."
            )
        self._refuse_unless_whole()
        if not self._added:
            raise RuntimeError(
                "step() without a clipped gradient: call backward() of what make_private returned "
                "in place of loss.backward(), whose gradients are not clipped."
            )
        draw = self._draw.of_step(self._num_added)
        if self._budget is not None:
            self._budget.refuse_step(self.num_steps + 1)
        self._gradients.check()
        self._gradients.release()
        clipped = self.mode.clipped_sum()
        audit = None
        if type(self.mode) not in OWN_MODES:
            check_sum(type(self.mode).__name__, clipped, self._privacy.max_grad_norm)
            audit = NoiseAudit(clipped, self._privacy)
        # From here on the sum is divided and noisy, and must not be taken for a sum again.
        self._spoiled = RuntimeError("a step did not end")
        source = NoiseSource(self._noise_key, self.num_steps)
        noised = self.mode.privatize(clipped, source)
        if self._bound is not None:
            self._next_bound = self._bound.next_bound(self._privacy, source)
        if audit is not None:
            audit.check(noised)
        ledger = self._ledger
        rate = self._sample_rate if draw is None else draw.sample_rate
        ledger.record(self._privacy.noise_multiplier, rate)
        if draw is not None:
            draw.is_taken = True
        self._num_own_steps += 1
        self._stepped = self._added
        self._note(ledger)

    def _end_step(self) -> None:
        if self._next_bound is not None:
            self._set_privacy(replace(self._privacy, max_grad_norm=self._next_bound))
            self._next_bound = None

    def _refuse_clearing(self) -> None:
        # The batch would be in part of the step and in part not.
        if self._open is not None:
            raise RuntimeError(
                "optimizer.zero_grad() inside of batch(): expected it outside. Call it before "
                "batch(), or after the step."
            )

    def _drop_step(self) -> None:
        self.mode.zero_grad()
        self._gradients.release()
        self._added = []
        if self._bound is not None:
            self._bound.drop()
        self._draw.drop_left()
        self._spoiled = None

    def _note(self, ledger: PrivacyLedger) -> None:
        # Plain tuples, so that a saved model needs nothing of ours.
        self._history[:] = [(*stage,) for stage in ledger.history]


def make_private(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    noise_multiplier: float | None = None,
    max_grad_norm: float,
    expected_batch_size: int,
    sample_rate: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    num_steps: int | None = None,
    accountant: str = "rdp",
    clipping: str = FLAT,
    adaptive: AdaptiveClipping | None = None,
    loss: str | PerSampleLoss = "sequence-classification",
    seed: int | None = None,
    spot_check: bool = True,
    mode: str | None = None,
    passes: int | None = None,
    param_dtype: torch.dtype = torch.float32,
    num_replicas: int = 1,
    memory_budget: int | str | None = None,
    capture: bool = False,
) -> PrivateTraining:
    """Make a training loop private.

    The contract: exact, or refused in a sentence. For every mode of this package:

    1. One sample contributes min(1, C / norm) times its gradient to the clipped sum, which is no
       longer than C, whatever layers the model has, however they share parameters
       (`test_capture`), and whichever dimension holds the samples
       (`test_samples_are_told_apart_wherever_they_are`). A model for which this would not hold is
       refused by name before anything is updated
       (`test_what_would_not_be_exact_is_refused_by_name`).
    2. The loss is one number a sample; a mean, a sum or [B, T] is refused
       (`test_a_loss_that_is_not_one_number_a_sample_is_refused`).
    3. The engine is compared with plain autograd on the first batch, on each new kind of batch and
       at growing intervals. A difference beyond rounding raises
       (`test_the_spot_check_finds_each_kind`), also in a loop's own code
       (`test_losses_that_are_not_each_samples_own_are_refused`). `spot_check=False` removes this
       check.
    4. A sample whose loss or gradient is not finite adds nothing and is counted
       (`test_a_sample_that_is_not_finite_adds_nothing`). With `clipping="per_layer"` that holds
       layer by layer, if its loss is finite.
    5. A batch is added whole or not at all (`test_a_batch_that_failed_can_be_added_in_halves`), and
       `optimizer.zero_grad()` drops it (`test_zero_grad_forgets_the_batch`).
    6. Later changes, such as BatchNorm in training mode, a parameter frozen or unfrozen, a layer
       replaced, a weight used without a call of its module, or a buffer that keeps data, raise in
       the first batch that they affect (`test_what_changes_later_is_refused_at_once`).
    7. No step is taken without its noise, whatever a mode overrides
       (`test_a_mode_that_could_skip_the_noise_is_refused`).
    8. `epsilon` accounts for every step taken on the model or a part of it, at its own sigma and
       sample rate, resumes and other calls included (`test_epsilon_tells_the_whole_life`,
       `test_epsilon_tells_the_life_of_every_part`).
    9. A copy of the model is an ordinary module with weights of its own
       (`test_a_copy_is_an_ordinary_module`).
    10. A step over `PrivateTraining.loader` is of the samples that were drawn for it, each once
       (`test_a_step_of_other_samples_than_were_drawn_is_refused`). No step exceeds
       `target_epsilon` (`test_a_training_spends_its_target_and_no_step_more`).

    Args:
        model: unsharded, or sharded by `fully_shard` already for a mode under FSDP2. Only a mode
            under FSDP2 changes it, in place.
        optimizer: a torch optimizer over the model's parameters that has not stepped, unless it was
            private before, or Accelerate's wrapper of one. It stays in use; under FSDP2 it is given
            the sharded parameters. Of several, with each parameter in one of them, the first to
            step adds the noise for all; each steps once, or skips the step by its `zero_grad`.
        noise_multiplier: sigma, the standard deviation of the noise in units of `max_grad_norm`.
            Left out, it is the least that keeps to the target.
        max_grad_norm: C, the bound on the norm of one sample's gradient.
        expected_batch_size: samples that a step is expected to hold over all ranks and
            micro-batches; the divisor of the noisy sum, whatever a batch's own size.
        sample_rate: probability with which a step takes each sample, where the loop draws batches
            by Poisson sampling itself; `PrivateTraining.loader` knows its own. 1.0 if batches are
            not sampled (see also `PrivateTraining.epsilon`).
        target_epsilon: largest epsilon after `num_steps` steps, in place of a `noise_multiplier`;
            needs `sample_rate`.
        target_delta: delta at which it holds.
        num_steps: steps in all, those taken on the model before included. One more is refused.
        accountant: of `target_epsilon`: rdp, prv or pld (see `PrivateTraining.epsilon`).
        clipping: rule by which a sample is clipped: flat, automatic (normalised) or per_layer,
            which keeps nothing (see `dpsgd_track.privacy.clipping`). It adds at most C under each.
        adaptive: have C follow a quantile of the norms from step to step, beginning at
            `max_grad_norm`. The step is accounted as a whole at `noise_multiplier` (see
            `dpsgd_track.privacy.adaptive`). For flat clipping, without `capture`.
        loss: a task's name (see `dpsgd_track.privacy.loss`), or a function
            (logits, targets) -> [B] in which no sample's loss depends on another.
        seed: seed of the noise, which makes runs reproducible, for tests; None takes a secret key
            from the operating system.
        spot_check: compare the engine with plain autograd now and then (see
            `dpsgd_track.privacy.spot_check`), which runs extra forwards of the model.
        mode: any mode: `dpsgd-track modes` lists them. None chooses the flash mode with that number
            of `passes`, under FSDP2 where there are several ranks or the model is sharded.
        passes: backwards of a step: 1 is faster, 2 takes less memory. None is 1. Given in place of
            a mode.
        param_dtype: type of the forward and backward; weights stay float32.
        num_replicas: copies of the model among the ranks, under FSDP2.
        memory_budget: on each rank, bytes that one backward may keep for the clipped sums, as a
            number or as "2GiB". A second backward does the layers that do not fit, from the loss
            down, so that a step takes as long as one pass to two (see
            `dpsgd_track.privacy.memory_budget`). None keeps everything, 0 is two passes. For modes
            of one pass, flat or automatic clipping, without `capture`.
        capture: on one GPU, record `PrivateTraining.backward` of inputs and targets as a CUDA graph
            for each kind of batch, and replay it, which spares the host's part of a step (see
            `dpsgd_track.privacy.replay`). The model's Python code, its hooks included, runs only
            when a graph is recorded or checked. Code inside of `batch` runs as it does without.

    The settings from `mode` on settle what a step costs, and change no guarantee.

    Raises:
        ValueError: a setting is out of range, the mode cannot clip a parameter exactly, or it
            overrides methods that add the noise.
    """
    mode = _mode_of(model, mode, passes)
    _check_sample_rate(sample_rate)
    budget = budget_of(noise_multiplier, target_epsilon, target_delta, num_steps, accountant)
    sigma = _noise_within(budget, model, sample_rate) if budget else noise_multiplier
    assert sigma is not None
    _check_settings(mode, sigma)
    optimizers = Optimizers(model, optimizer)
    context = ModeContext(
        make_optimizer=optimizers.rebound,
        privacy=PrivacyConfig(
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            clipping=clipping,
        ),
        device=next(model.parameters()).device,
        param_dtype=param_dtype,
        loss=loss_named(loss),
        num_replicas=num_replicas,
        memory_budget=num_bytes(memory_budget),
        capture=capture,
    )
    _check_choices(adaptive, mode, context)
    built = _built(mode, model, context, optimizers, adaptive)
    # Not before: where this is refused, the earlier training remains in use.
    close_earlier(optimizers)
    return PrivateTraining(
        built,
        optimizers,
        history_of(built.model),
        noise_key=fresh_key(None, context.device) if seed is None else str(seed),
        sample_rate=sample_rate,
        budget=budget,
        adaptive=adaptive,
        spot_check=spot_check,
    )


def _mode_of(model: nn.Module, mode: str | None, passes: int | None) -> str:
    """The mode, or the flash mode with that number of backwards for this model and these ranks."""
    require(passes is None or mode is None, "passes", passes, f"none beside mode={mode!r}")
    if mode is not None:
        return mode
    require(passes in (None, 1, 2), "passes", passes, "1 or 2")
    is_sharded = world_size() > 1 or bool(fsdp_units(model))
    one_pass, two_pass = FLASH_UNDER_FSDP2 if is_sharded else FLASH_ON_ONE_DEVICE
    return two_pass if passes == 2 else one_pass


def _noise_within(budget: Budget, model: nn.Module, sample_rate: float | None) -> float:
    """The least noise multiplier within the budget, after the steps taken on the model before."""
    advice = "For target_epsilon give expected_batch_size / samples of the data set."
    require(sample_rate is not None, "sample_rate", None, "a number", advice)
    assert sample_rate is not None
    return budget.noise_multiplier(chain(*histories(model).values()), sample_rate)


def _check_sample_rate(sample_rate: float | None) -> None:
    is_probability = sample_rate is None or 0 < sample_rate <= 1
    require(is_probability, "sample_rate", sample_rate, "a number from 0 to 1, or None")


def _check_settings(mode: str, noise_multiplier: float) -> None:
    check_mode(mode)
    needs_no_bound = is_private(mode) or noise_multiplier == 0
    allowed = f"0 for {mode}, which does not clip"
    require(needs_no_bound, "noise_multiplier", noise_multiplier, allowed)
    fits_ranks = world_size() == 1 or not runs_on_one_device(mode)
    advice = "Choose a mode under FSDP2, such as flash_fsdp_bk."
    require(fits_ranks, "mode", mode, "a mode for several ranks", advice)


def _check_choices(adaptive: AdaptiveClipping | None, mode: str, context: ModeContext) -> None:
    """Refuse what does not go with the mode, or with one another."""
    _check_memory_budget(mode, context)
    _check_adaptive(adaptive, mode, context)


def _check_memory_budget(mode: str, context: ModeContext) -> None:
    """Refuse a budget where nothing is kept, or where the plan would be part of a graph."""
    budget, clipping = context.memory_budget, context.privacy.clipping
    if budget is None:
        return
    allowed = f"none for {mode}, which keeps nothing"
    advice = "Choose a mode of one pass, such as flash_bk."
    require(takes_memory_budget(mode), "memory_budget", budget, allowed, advice)
    allowed = f"none beside clipping={clipping!r}, which keeps nothing"
    require(clipping != PER_LAYER, "memory_budget", budget, allowed)
    require(not context.capture, "memory_budget", budget, "none beside capture=True")


def _check_adaptive(adaptive: AdaptiveClipping | None, mode: str, context: ModeContext) -> None:
    """Refuse an adaptive C where nothing is clipped at it, or where it is part of a graph."""
    if adaptive is None:
        return
    is_of_kind = isinstance(adaptive, AdaptiveClipping)
    require(is_of_kind, "adaptive", adaptive, "an AdaptiveClipping, or None")
    clipping, capture = context.privacy.clipping, context.capture
    require(is_private(mode), "mode", mode, "one that clips where C is adaptive")
    require(clipping == FLAT, "clipping", clipping, f"{FLAT} where C is adaptive")
    require(not capture, "capture", capture, "False where C is adaptive")
    # Raises where the count has too little noise.
    adaptive.sum_multiplier(context.privacy)


def _built(
    name: str,
    model: nn.Module,
    context: ModeContext,
    optimizers: Optimizers,
    adaptive: AdaptiveClipping | None,
) -> Mode:
    """The mode; refused if it cannot do what was asked for, or would step by itself."""
    allowed = f"one optimizer, as {name} is not of this package"
    has_one = len(optimizers.each) == 1
    require(has_one or is_of_package(name), "optimizer", optimizers.kinds, allowed)
    mode = build_mode(name, model, context)
    is_own = isinstance(mode, ComposedMode)
    allowed = f"False for {name}, which is not of this package's engine"
    require(is_own or not context.capture, "capture", context.capture, allowed)
    allowed = "a mode of this package's own engine where C is adaptive"
    require(adaptive is None or isinstance(mode, OWN_MODES), "mode", name, allowed)
    _refuse_own_updates(name, mode, optimizers)
    return mode


def _refuse_own_updates(name: str, mode: Mode, optimizers: Optimizers) -> None:
    """Refuse a mode that could take a step without this package's noise."""
    for method in ("privatize", "step", "_write_gradients", "weight_parts"):
        package = getattr(type(mode), method).__module__.split(".")[0]
        is_replaced = method in vars(mode) or package != __name__.split(".")[0]
        advice = "The noise would be the mode's own matter, and epsilon() a guess."
        require(not is_replaced, "mode", name, f"a mode without a {method}() of its own", advice)
    updated = {id(parameter) for parameter in optimizers.parameters}
    trained = trainable_parameters(mode.model)
    missing = [name for name, parameter in trained.items() if id(parameter) not in updated]
    allowed = f"a mode that trains the optimizer's parameters; it lacks {', '.join(missing)}"
    require(not missing, "mode", name, allowed)


def _batch(inputs: Inputs, targets: Tensor) -> Batch:
    args: tuple[Tensor, ...] = ()
    named: dict[str, Tensor] = {}
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    require(isinstance(targets, Tensor), "targets", type(targets).__name__, "a tensor")
    allowed = "a tensor with the samples in dimension 0"
    require(targets.dim() > 0, "targets", tuple(targets.shape), allowed)
    advice = "Give the model other arguments in a wrapper module of its own."
    for key, value in (*enumerate(args), *named.items()):
        is_batched = isinstance(value, Tensor) and value.shape[:1] == targets.shape[:1]
        got = tuple(value.shape) if isinstance(value, Tensor) else value
        allowed = f"a tensor with the {len(targets)} samples of the targets in dimension 0"
        require(is_batched, f"inputs[{key!r}]", got, allowed, advice)
    return Batch(named, targets, args=args)
