"""The modes as a library: any of them under a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpsgd_track.config import PrivacyConfig, require
from dpsgd_track.distributed.ranks import world_size
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import check_mode, is_private, spec_of
from dpsgd_track.privacy.accounting import epsilon_prv, epsilon_rdp
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Batch
from dpsgd_track.privacy.loss import LOSSES, PerSampleLoss
from dpsgd_track.privacy.noise import NoiseSource, fresh_key

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class PrivateTraining:
    """A model and its optimizer, made private; see `make_private`.

    `backward` takes the place of `loss.backward()`. The optimizer's `step` then adds the noise
    before it updates the weights, and raises where there is nothing that was clipped.
    """

    def __init__(self, mode: Mode, noise_key: str, sample_rate: float | None) -> None:
        self.mode = mode
        self.model = mode.model
        self.num_steps = 0
        """Noisy steps taken so far."""
        self.last: SampleRecord | None = None
        """Losses, norms and clip factors of the last batch's samples. Not private: noise protects
        the weights, and nothing else."""
        self._noise_key = noise_key
        self._sample_rate = sample_rate
        self._num_batches = 0

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
        """
        self.last = self.mode.accumulate(_batch(inputs, targets))
        self._num_batches += 1
        return self.last.loss_B

    def epsilon(self, delta: float, *, accountant: str = "rdp") -> float:
        """What has been spent so far, at `delta`.

        Args:
            delta: probability at which the bound may fail, between 0 and 1.
            accountant: rdp (never too small) or prv (tighter).
        Raises:
            ValueError: there is no noise, or the sample rate is not known.
        """
        sigma = self.mode.context.privacy.noise_multiplier
        require(
            sigma > 0,
            "noise_multiplier",
            sigma,
            "a number > 0",
            "Without noise epsilon is infinite.",
        )
        require(0 < delta < 1, "delta", delta, "a number between 0 and 1")
        require(accountant in ("rdp", "prv"), "accountant", accountant, "rdp or prv")
        if self._sample_rate is None:
            advice = "Give it to make_private, or 1.0 for batches that are not sampled."
            raise ValueError(f"sample_rate=None: expected a number from 0 to 1. {advice}")
        if self.num_steps == 0:
            return 0.0
        history = ((sigma, self._sample_rate, self.num_steps),)
        if accountant == "rdp":
            return epsilon_rdp(history, delta)
        found = epsilon_prv(history, delta)
        if found is None:
            raise ValueError(
                f"accountant='prv': expected an epsilon that it computes in time, got about "
                f"{epsilon_rdp(history, delta):.3g}. Use rdp."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, beside the model's and the optimizer's state."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a run whose state this was; no noise is drawn a second time."""
        self.num_steps = int(state["num_steps"])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise ValueError("closure: expected none. It would compute gradients after the noise.")
        if self._num_batches == 0:
            raise RuntimeError(
                "step() without a clipped gradient: call backward() of what make_private returned "
                "in place of loss.backward(), whose gradients are not clipped."
            )
        clipped = self.mode.clipped_sum()
        self.mode.privatize(clipped, NoiseSource(self._noise_key, self.num_steps))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.num_steps += 1
        self._num_batches = 0
        self.mode.zero_grad()


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
) -> PrivateTraining:
    """Make a training loop private.

    Args:
        model: whole and unsharded, or sharded by `fully_shard` already for a mode under FSDP2. It
            is changed in place.
        optimizer: over the model's parameters, and not used yet. It stays the one to use; under
            FSDP2 it is handed the sharded parameters.
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

    Raises:
        ValueError: a setting is out of range, or the mode cannot clip a parameter exactly.
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
    require(not optimizer.state, "optimizer", type(optimizer).__name__, "one without a past step")
    spec = spec_of(mode)
    if spec is not None and spec.runs_on_one_device:
        advice = "Choose a mode under FSDP2, such as flash_fsdp_bk."
        require(world_size() == 1, "mode", mode, "a mode for several ranks", advice)
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
    private = PrivateTraining(build_mode(mode, model, context), key, sample_rate)
    optimizer.register_step_pre_hook(private._before_step)
    optimizer.register_step_post_hook(private._after_step)
    return private


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
        return Batch(dict(inputs), targets)
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return Batch({}, targets, args=args)
