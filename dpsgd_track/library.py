"""The modes as a library: any of them under a training loop of one's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpsgd_track.config import PrivacyConfig, require
from dpsgd_track.distributed.ranks import world_size
from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.reference import ReferenceMode
from dpsgd_track.modes.table import check_mode, is_private, spec_of
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.guards import ModelGuard
from dpsgd_track.privacy.ledger import PrivacyLedger
from dpsgd_track.privacy.loss import LOSSES, PerSampleLoss
from dpsgd_track.privacy.noise import NoiseSource, fresh_key
from dpsgd_track.privacy.spot_check import SpotCheck, SpotChecks

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

OWN_MODES = (ComposedMode, ReferenceMode)
"""Modes whose sum is bounded sample by sample, and of finite samples alone."""

_AUDITED_ELEMENTS = 4096
"""Of each parameter, elements in which another library's noise is looked for."""
_AUDIT_ROUNDING = 0.02
"""Error of a mean square that low precision may cause."""
_History = list[tuple[float, float | None, int]]
_HISTORY = "_dpsgd_track_history"
"""Attribute of a model with what was spent on it, one list that its parts share: it goes with each
of them into other models, and a copy of the model has a copy."""
_PRIVATE = "_dpsgd_track_private"
"""Attribute of an optimizer with what made it private last."""


class PrivateTraining:
    """A model and its optimizer, made private; see `make_private`.

    `backward` takes the place of `loss.backward()`. The optimizer's `step` then adds the noise
    before it updates the weights, and raises where there is nothing that was clipped.
    """

    def __init__(
        self,
        mode: Mode,
        optimizer: Optimizer,
        history: _History,
        *,
        noise_key: str,
        sample_rate: float | None,
        spot_check: bool,
    ) -> None:
        self.mode = mode
        self.model = mode.model
        self.last: SampleRecord | None = None
        """Losses, norms and clip factors of the last batch's samples, and which were left out. Not
        private: noise protects the weights, and nothing else."""
        self._optimizer = optimizer
        self._history = history
        self._privacy = mode.context.privacy
        self._noise_key = noise_key
        self._sample_rate = sample_rate
        self._num_batches = 0
        self._num_own_steps = 0
        self._spoiled: BaseException | None = None
        self._gradients = _GradientWatch(mode)
        self._left_out = _LeftOut()
        self._is_clearing = False
        self._is_closed = False
        self._guard = ModelGuard(mode.model) if mode.clips else None
        can_check = spot_check and isinstance(mode, ComposedMode) and mode.clips
        self._spot_check = SpotCheck(mode.engine) if can_check else None  # type: ignore[attr-defined]
        self._updated = _parameters_of(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._plain_zero_grad = optimizer.zero_grad
        optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        setattr(optimizer, _PRIVATE, self)

    @property
    def num_steps(self) -> int:
        """Noisy steps taken on the model so far, those before it was last made private included."""
        return self._ledger.num_steps

    @property
    def _ledger(self) -> PrivacyLedger:
        return PrivacyLedger(self._history)

    @property
    def spot_checks(self) -> SpotChecks:
        """How often the engine was held against plain autograd, and what that took."""
        return self._spot_check.cost if self._spot_check is not None else SpotChecks()

    @property
    def num_left_out(self) -> int:
        """Samples so far that added nothing because their loss or gradient was not finite."""
        return self._left_out.count()

    def backward(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """Add the clipped gradients of a batch, or of one micro-batch of several.

        Under several ranks each calls it equally often, with samples of its own; any of them may
        have none, as happens under Poisson sampling.

        Args:
            inputs: what the model is called with: one tensor, several, or keyword arguments.
                Dimension 0 of every tensor is the sample.
            targets: what the loss compares with, likewise.
        Returns:
            Loss of each sample, [B], without a graph.
        Raises:
            ValueError: the model or its loss has become one whose per-sample gradients are not
                known exactly, or an input is none. Nothing is updated with the batch.
            RuntimeError: gradients are switched off, or the step cannot go on.
        """
        self._refuse_unless_whole()
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "backward() under torch.no_grad() or inference_mode(): expected gradients to be "
                "enabled. Without them a step would be noise alone. Call it outside."
            )
        self._gradients.check()
        batch = _batch(inputs, targets)
        is_added = False
        try:
            with self._guarded():
                if self._spot_check is not None:
                    self._spot_check.before(batch)
                self.last = self.mode.accumulate(batch)
                is_added = True
                self._refuse_what_is_not_finite(self.last)
                if self._spot_check is not None:
                    self._spot_check.after(batch, self.last)
        except BaseException as error:
            if is_added or not self.mode.is_atomic:
                self._spoiled = error
            raise
        self._gradients.take()
        self._left_out.add(self.last)
        self._num_batches += 1
        return self.last.loss_B

    def epsilon(self, delta: float, *, accountant: str = "rdp") -> float:
        """What has been spent on the model so far, at `delta`, over its whole life.

        Args:
            delta: probability at which the bound may fail, between 0 and 1.
            accountant: rdp (never too small), prv (tighter), or pld (tighter, and never too small;
                needs dp-accounting).
        Raises:
            ValueError: a step had no noise, or its sample rate is not known.
        """
        sigma = self._privacy.noise_multiplier
        advice = "Without noise epsilon is infinite."
        require(sigma > 0, "noise_multiplier", sigma, "a number > 0", advice)
        rate, allowed = self._sample_rate, "a number from 0 to 1"
        advice = "Give it to make_private, or 1.0 for batches that are not sampled."
        require(rate is not None, "sample_rate", rate, allowed, advice)
        return self._ledger.epsilon(delta, accountant)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, beside the model's and the optimizer's state."""
        return self._ledger.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a run whose state this was: what it spent counts; no noise is drawn twice.

        Raises:
            ValueError: it is not such a state, steps were taken already, or it knows less than
                the model.
        """
        require(
            self._num_own_steps == 0,
            "state",
            f"after {self._num_own_steps} steps",
            "one that is loaded before the first step",
        )
        self._refuse_unless_whole()
        loaded = PrivacyLedger()
        loaded.load_state_dict(state)
        require(
            loaded.num_steps >= self.num_steps,
            "state",
            f"{loaded.num_steps} steps",
            f"the {self.num_steps} that were taken on this model, or more",
        )
        self._note(loaded)

    def close(self) -> None:
        """Give the optimizer back as it was. Nothing can be added from then on."""
        for handle in self._handles:
            handle.remove()
        vars(self._optimizer).pop("zero_grad", None)
        vars(self._optimizer).pop(_PRIVATE, None)
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
        if vars(self.model).get(_HISTORY) is not self._history:
            raise RuntimeError(
                "The model was made private again as a part of another: use what that returned, "
                "which knows what both have spent."
            )
        if self._spoiled is not None:
            raise RuntimeError(
                f"A batch of this step has failed ({type(self._spoiled).__name__}) and may be in "
                "the sum in part. Call optimizer.zero_grad(), and add the step's batches again."
            ) from self._spoiled

    def _refuse_what_is_not_finite(self, record: SampleRecord) -> None:
        # Our own modes leave such a sample out; another's has it in its sum.
        if type(self.mode) in OWN_MODES or not record.num_left_out:
            return
        raise ValueError(
            f"batch: expected finite losses and gradients, got {record.num_left_out} samples "
            f"without. {type(self.mode).__name__} has them in its sum. Leave them out, or use a "
            "mode that does."
        )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(given is not None for given in (*args[1:], kwargs.get("closure"))):
            raise ValueError("closure: expected none. It would compute gradients after the noise.")
        self._refuse_unless_whole()
        if self._num_batches == 0:
            raise RuntimeError(
                "step() without a clipped gradient: call backward() of what make_private returned "
                "in place of loss.backward(), whose gradients are not clipped."
            )
        if _parameters_of(optimizer) != self._updated:
            raise ValueError(
                "optimizer: expected the parameters that it had when it was made private, got "
                "others. Call make_private again after a change of parameter groups."
            )
        self._gradients.check()
        self._gradients.release()
        clipped = self.mode.clipped_sum()
        audited = None
        if type(self.mode) not in OWN_MODES:
            _check_sum(self.mode, clipped, self._privacy.max_grad_norm)
            audited = _NoiseAudit(clipped, self._privacy)
        # What is divided and has noise must not be taken for a sum again.
        self._spoiled = RuntimeError("a step did not end")
        noised = self.mode.privatize(clipped, NoiseSource(self._noise_key, self.num_steps))
        if audited is not None:
            audited.check(noised)
        ledger = self._ledger
        ledger.record(self._privacy.noise_multiplier, self._sample_rate)
        self._num_own_steps += 1
        self._note(ledger)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._zero_grad()

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the step's gradients and batches, the optimizer's own and the mode's."""
        self._plain_zero_grad(set_to_none)
        if self._is_clearing:
            return
        self._is_clearing = True
        try:
            self.mode.zero_grad()
        finally:
            self._is_clearing = False
        self._gradients.release()
        self._num_batches = 0
        self._spoiled = None

    def _note(self, ledger: PrivacyLedger) -> None:
        # Plain tuples, so that a saved model needs nothing of ours.
        self._history[:] = [(*stage,) for stage in ledger.history]


class _GradientWatch:
    """Sees what others do to `.grad` while batches are being added.

    Our own modes keep their sums elsewhere; a parameter's gradient of zeros then stands for them.
    """

    def __init__(self, mode: Mode) -> None:
        parameters = list(trainable_parameters(mode.model).values())
        self._keeps_sums_elsewhere = isinstance(mode, ComposedMode) and mode.clips
        if self._keeps_sums_elsewhere:
            parameters = sorted(parameters, key=Tensor.numel)[:1]
        self._parameters = parameters
        self._taken: list[tuple[Tensor | None, int]] = []

    def take(self) -> None:
        """Remember the gradients as they are after a batch was added."""
        if self._keeps_sums_elsewhere and not self._taken:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self._taken = [(p.grad, _version(p.grad)) for p in self._parameters]

    def check(self) -> None:
        """
        Raises:
            RuntimeError: somebody has cleared a gradient, or added to it, since.
        """
        for parameter, (gradient, version) in zip(self._parameters, self._taken, strict=False):
            if parameter.grad is gradient and _version(gradient) == version:
                continue
            was_cleared = parameter.grad is None or not bool(as_local(parameter.grad).any())
            what = (
                "one that was cleared, as model.zero_grad() does. Call optimizer.zero_grad(): it "
                "forgets the batches too"
                if was_cleared
                else "another. A backward of another loss has added to it, and it is not clipped"
            )
            raise RuntimeError(f".grad: expected the gradient that backward() left, got {what}.")

    def release(self) -> None:
        """Take away what stands for sums that are kept elsewhere."""
        if self._keeps_sums_elsewhere and self._taken:
            for parameter, (gradient, _) in zip(self._parameters, self._taken, strict=True):
                if parameter.grad is gradient:
                    parameter.grad = None
        self._taken = []


def _version(gradient: Tensor | None) -> int:
    return 0 if gradient is None else gradient._version


class _LeftOut:
    """Counts samples that added nothing because they were not finite; warns of the first.

    A GPU is not waited for: its answer is read when it has come.
    """

    def __init__(self) -> None:
        self.total = 0
        self._pending: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._has_warned = False

    def add(self, record: SampleRecord) -> None:
        """Count the samples of one batch."""
        if record.clip_factor_B is None or not len(record.clip_factor_B):
            return
        count = record.clip_factor_B.eq(0).sum()
        if count.is_cuda:
            on_host = torch.empty((), dtype=count.dtype, pin_memory=True)
            on_host.copy_(count, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((on_host, event))
        else:
            self._pending.append((count, None))
        self._read(waits=False)

    def count(self) -> int:
        """Samples left out so far."""
        self._read(waits=True)
        return self.total

    def _read(self, *, waits: bool) -> None:
        while self._pending:
            count, event = self._pending[0]
            if event is not None and waits:
                event.synchronize()
            elif event is not None and not event.query():
                return
            del self._pending[0]
            self.total += int(count)
        if self.total and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "The loss or the gradient of a sample is not finite: such samples add nothing. "
                "PrivateTraining.num_left_out counts them.",
                stacklevel=4,
            )


class _NoiseAudit:
    """Whether a library's own step has added the noise that it was asked for."""

    def __init__(self, clipped: ClippedSum, privacy: PrivacyConfig) -> None:
        self.privacy = privacy
        self.before = {
            name: total.flatten()[:_AUDITED_ELEMENTS].double().clone()
            for name, total in clipped.gradients.items()
        }

    def check(self, noised: Mapping[str, Tensor]) -> None:
        """
        Raises:
            RuntimeError: the noise is missing or of another size.
        """
        sigma = self.privacy.noise_multiplier
        if sigma == 0:
            return
        noise = torch.cat(
            [
                noised[name].flatten()[: len(before)].double() * self.privacy.expected_batch_size
                - before
                for name, before in self.before.items()
            ]
        )
        z = noise / (sigma * self.privacy.max_grad_norm)
        # Of n normal numbers, the mean square is within six standard errors of 1.
        off = abs(float(z.square().mean()) - 1)
        if off > 6 * math.sqrt(2 / max(len(z), 1)) + _AUDIT_ROUNDING:
            raise RuntimeError(
                f"noise: expected a standard deviation of {sigma * self.privacy.max_grad_norm:.4g} "
                f"on the sum, got {float(noise.std()):.4g}. Nothing was updated."
            )


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: int,
    mode: str = "flash_bk",
    loss: str | PerSampleLoss = "sequence-classification",
    sample_rate: float | None = None,
    seed: int | None = None,
    param_dtype: torch.dtype = torch.float32,
    num_replicas: int = 1,
    spot_check: bool = True,
) -> PrivateTraining:
    """Make a training loop private.

    The contract, exact or refused in a sentence. For every mode of our own:

    1. One sample's contribution to the clipped sum is no longer than C, and is min(1, C / norm)
       times its gradient: whatever layers the model has, however they share parameters
       (`test_capture`), and wherever they have the samples
       (`test_samples_are_told_apart_wherever_they_are`). What would not be so is refused by name
       before anything is updated (`test_what_would_not_be_exact_is_refused_by_name`).
    2. The loss is one number a sample; a mean, a sum or [B, T] is refused
       (`test_a_loss_that_is_not_one_number_a_sample_is_refused`).
    3. The engine is held against plain autograd on the first batch, on each new kind of batch and
       at growing intervals; where they disagree beyond rounding, it raises
       (`test_the_spot_check_finds_each_kind`). `spot_check=False` takes this net away.
    4. A sample whose loss or gradient is not finite adds nothing and is counted
       (`test_a_sample_that_is_not_finite_adds_nothing`).
    5. A batch is added whole or not at all (`test_a_batch_that_failed_can_be_added_in_halves`), and
       `optimizer.zero_grad()` forgets it (`test_zero_grad_forgets_the_batch`).
    6. What changes later, such as BatchNorm in training mode, a parameter frozen or unfrozen, a
       layer replaced, a weight used behind its module's back, or a buffer that keeps data, raises
       in the batch in which it begins (`test_what_changes_later_is_refused_at_once`).
    7. No step is taken without its noise, whatever a mode overrides
       (`test_a_mode_that_could_skip_the_noise_is_refused`).
    8. `epsilon` tells of every step taken on the model or a part of it, at its own sigma and sample
       rate, resumes and other calls included (`test_epsilon_tells_the_whole_life`,
       `test_epsilon_tells_the_life_of_every_part`).
    9. A copy of the model is an ordinary module with weights of its own
       (`test_a_copy_is_an_ordinary_module`).

    Args:
        model: whole and unsharded, or sharded by `fully_shard` already for a mode under FSDP2. It
            is changed in place, under FSDP2 alone.
        optimizer: over the model's parameters, torch's own, and not used yet unless it was private
            already. It stays the one to use; under FSDP2 it is handed the sharded parameters.
        noise_multiplier: sigma, the standard deviation of the noise in units of `max_grad_norm`.
        max_grad_norm: C, the bound on the norm of one sample's gradient.
        expected_batch_size: samples that a step is expected to hold over all ranks and
            micro-batches; the divisor of the noisy sum. Fixed, whatever a batch holds.
        mode: any mode: `python launch.py modes` lists them.
        loss: a task's name (see `dpsgd_track.privacy.loss`), or a function
            (logits, targets) -> [B] in which no sample's loss depends on another.
        sample_rate: probability with which a step takes each sample, for `epsilon`; 1.0 where
            batches are not drawn by Poisson sampling.
        seed: noise from a seed, the same at every run, for tests; None draws a key from the
            operating system.
        param_dtype: what the forward and backward compute in, with float32 weights.
        num_replicas: copies of the model among the ranks, under FSDP2.
        spot_check: hold the engine against plain autograd now and then (see
            `dpsgd_track.privacy.spot_check`). It runs the model's forward more often than there
            are batches.

    Raises:
        ValueError: a setting is out of range, the mode cannot clip a parameter exactly, or it
            could take a step whose noise nobody can vouch for.
    """
    check_mode(mode)
    needs_no_bound = is_private(mode) or noise_multiplier == 0
    allowed = f"0 for {mode}, which does not clip"
    require(needs_no_bound, "noise_multiplier", noise_multiplier, allowed)
    if isinstance(loss, str):
        require(loss in LOSSES, "loss", loss, f"one of {', '.join(LOSSES)}, or a function")
        loss = LOSSES[loss]
    rate_is_known = sample_rate is None or 0 < sample_rate <= 1
    require(rate_is_known, "sample_rate", sample_rate, "a number from 0 to 1, or None")
    spec = spec_of(mode)
    if spec is not None and spec.runs_on_one_device:
        advice = "Choose a mode under FSDP2, such as flash_fsdp_bk."
        require(world_size() == 1, "mode", mode, "a mode for several ranks", advice)
    _take_over(optimizer)
    device = next(model.parameters()).device
    repoint = _Repointed(model, optimizer)
    context = ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        ),
        device=device,
        param_dtype=param_dtype,
        make_optimizer=lambda parameters: repoint(),
        loss=loss,
        num_replicas=num_replicas,
    )
    key = fresh_key(None, device) if seed is None else str(seed)
    built = build_mode(mode, model, context)
    _refuse_own_updates(mode, built, optimizer)
    return PrivateTraining(
        built,
        optimizer,
        _history_of(built.model),
        noise_key=key,
        sample_rate=sample_rate,
        spot_check=spot_check,
    )


def _take_over(optimizer: Optimizer) -> None:
    """Undo what made the optimizer private before; raise where its steps are unknown."""
    name = type(optimizer).__name__
    is_own = isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")
    advice = "Make it private before another library wraps it."
    require(is_own, "optimizer", name, "an optimizer of torch's own kind", advice)
    before: PrivateTraining | None = getattr(optimizer, _PRIVATE, None)
    if before is not None:
        before.close()
        return
    has_stepped = any(int(state.get("step", 1)) != 0 for state in optimizer.state.values())
    require(not has_stepped, "optimizer", name, "one without a past step")


def _history_of(model: nn.Module) -> _History:
    """What was spent on the model and its parts before, in the list that all of them share.

    Parts that were trained apart have lists of their own, whose steps add up.
    """
    modules = list(model.modules())
    lists: dict[int, _History] = {
        id(vars(module)[_HISTORY]): vars(module)[_HISTORY]
        for module in modules
        if _HISTORY in vars(module)
    }
    (history,) = lists.values() if len(lists) == 1 else ([*chain(*lists.values())],)
    vars(model)[_HISTORY] = history
    for module in modules:
        if any(parameter.requires_grad for parameter in module.parameters()):
            vars(module)[_HISTORY] = history
    if history:
        warnings.warn(
            f"{type(model).__name__}: {PrivacyLedger(history).num_steps} private steps were taken "
            "on this model, or on what it was copied from or made of. epsilon() goes on from what "
            "they spent.",
            stacklevel=3,
        )
    return history


def _refuse_own_updates(name: str, mode: Mode, optimizer: Optimizer) -> None:
    """Raise where a step could be one that nobody here has added noise to."""
    for method in ("privatize", "step", "_write_gradients", "weight_parts"):
        found = getattr(type(mode), method)
        is_ours = found.__module__.split(".")[0] == __name__.split(".")[0]
        is_replaced = method in vars(mode) or not is_ours
        advice = "The noise would be the mode's own matter, and epsilon() a guess."
        require(not is_replaced, "mode", name, f"a mode without a {method}() of its own", advice)
    updated = {id(parameter) for parameter in _parameters_of(optimizer)}
    trained = trainable_parameters(mode.model)
    lost = [name for name, parameter in trained.items() if id(parameter) not in updated]
    allowed = f"a mode that trains the optimizer's parameters; it lacks {', '.join(lost)}"
    require(not lost, "mode", name, allowed)


def _check_sum(mode: Mode, clipped: ClippedSum, max_grad_norm: float) -> None:
    """Raise unless a mode's own sum is finite, and bounded as noise was asked for."""
    name = type(mode).__name__
    advice = "Noise is calibrated to it."
    is_bounded = clipped.sensitivity >= max_grad_norm
    require(is_bounded, "sensitivity", clipped.sensitivity, f"{max_grad_norm} of {name}", advice)
    for parameter, total in clipped.gradients.items():
        if not bool(total.isfinite().all()):
            raise RuntimeError(
                f"{parameter}: expected a finite clipped sum of {name}, got another."
            )


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Repointed:
    """Hands an optimizer the parameters that a mode has put in the place of its own."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [
            [name_of.get(id(parameter), "") for parameter in group["params"]]
            for group in optimizer.param_groups
        ]
        known = {name for names in self.names for name in names}
        missing = {n for n, p in model.named_parameters() if p.requires_grad} - known
        require("" not in known, "optimizer", type(optimizer).__name__, "the model's parameters")
        advice = "Add them, or freeze them."
        require(not missing, "optimizer", type(optimizer).__name__, _all_of(missing), advice)

    def __call__(self) -> Optimizer:
        parameters = dict(self.model.named_parameters())
        for group, names in zip(self.optimizer.param_groups, self.names, strict=True):
            group["params"] = [parameters[name] for name in names]
        return self.optimizer


def _all_of(missing: set[str]) -> str:
    return f"all trainable parameters; it lacks {', '.join(sorted(missing))}"


def _batch(inputs: Inputs, targets: Tensor) -> Batch:
    if isinstance(inputs, Mapping):
        batch = Batch(dict(inputs), targets)
    else:
        batch = Batch({}, targets, args=(inputs,) if isinstance(inputs, Tensor) else tuple(inputs))
    named = [(f"inputs[{k!r}]", x) for k, x in (*enumerate(batch.args), *batch.inputs.items())]
    for name, tensor in [("targets", targets), *named]:
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name}: expected a tensor, got {type(tensor).__name__}. Set it in a module that "
                "calls the model, or leave it out."
            )
        if tensor.dim() == 0 or len(tensor) != len(targets):
            raise ValueError(
                f"{name}: expected a tensor of the {len(targets)} samples that the targets have, "
                f"got one of shape {tuple(tensor.shape)}. Give each sample a row of its own."
            )
    return batch
