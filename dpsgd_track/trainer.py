"""transformers' Trainer with private steps, Poisson sampling and epsilon in its logs.

On several ranks the model is sharded by FSDP2, by a mode of this package and not by Accelerate.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from dpsgd_track.config import FLAT, require
from dpsgd_track.distributed.ranks import sum_over_ranks, world_size
from dpsgd_track.distributed.sharding import reshard, shard_state, sharded_state, whole
from dpsgd_track.library import PrivateTraining, make_private
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loader import refuse_unindexed
from dpsgd_track.privacy.loss import (
    LOSSES,
    PerSampleLoss,
    classification_loss,
    logits_of,
    loss_named,
)
from dpsgd_track.step_metrics import StepMetrics

PRIVACY_FILE = "privacy.json"
"""File of a checkpoint that holds what was spent."""

_TASKS = {
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "sequence-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
}
"""Task of a model by the end of its class's name."""

_OWN_LOSS = "Give `loss` a function (logits, labels) -> [B]."

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """Privacy of a `PrivateTrainer`. C is `max_grad_norm` of its `TrainingArguments`."""

    delta: float
    """Probability at which epsilon may fail; below 1 / samples."""
    noise_multiplier: float | None = None
    """sigma; None takes the least that keeps to `target_epsilon`."""
    target_epsilon: float | None = None
    """Epsilon of the whole training."""
    accountant: str = "rdp"
    """rdp, prv or pld."""
    clipping: str = FLAT
    """flat, automatic or per_layer."""
    passes: int | None = None
    """Backwards of a step: 1 is faster, 2 takes less memory; None is 1."""
    memory_budget: int | str | None = None
    """Bytes on each rank, such as "2GiB", that one pass may keep; None keeps everything."""
    seed: int | None = None
    """Seed of noise and sampling, for tests; None takes a secret key from the operating system."""


class PrivateTrainer(Trainer):
    """A Trainer whose steps are those of DP-SGD, on one device or, under torchrun, on several.

    Each step draws each sample with probability batch size / samples. The batch size of a step is
    expected to be `per_device_train_batch_size` times `gradient_accumulation_steps` and the number
    of ranks, in micro-batches of at most `per_device_train_batch_size` samples. The model is called
    without its labels, and `loss` takes its logits and them. Checkpoints hold what was spent, and a
    training resumed from one, on any number of ranks, continues its draws. Logs have `epsilon`
    beside `loss` and `clip_fraction`, which are of all ranks' training samples, and not private.

    Everything else is the Trainer's: optimizer, schedule, mixed precision, evaluation, callbacks.
    """

    def __init__(
        self,
        *args: Any,
        privacy: PrivacyArguments,
        loss: str | PerSampleLoss | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: of `transformers.Trainer`.
            privacy: the guarantee.
            loss: a task's name (see `dpsgd_track.privacy.loss`), or a function
                (logits, labels) -> [B]; None takes that of the model's class.

        Raises:
            ValueError: a setting does not fit.
        """
        super().__init__(*args, **kwargs)
        given: TrainingArguments = self.args  # type: ignore[has-type]
        _refuse_unfit(given)
        bound = given.max_grad_norm
        has_own = self.compute_loss_func is not None
        require(not has_own, "compute_loss_func", "a function", "None", _OWN_LOSS)
        self.privacy = privacy
        self.private: PrivateTraining | None = None
        """Set when training begins."""
        self._since_log: Tensor | None = None
        """Samples of all ranks, and those of them that were clipped, since the last log, [2]."""
        self._loss = _loss_of(self.model, loss)
        self._bound = float(bound)
        self._micro_batch_size = given.per_device_train_batch_size
        self._batch_size = self._micro_batch_size * given.gradient_accumulation_steps * world_size()
        # A step's micro-batches are one item of the loader, and its sum is clipped already.
        self.args = copy.copy(given)
        self.args.gradient_accumulation_steps = 1
        self.args.max_grad_norm = 0.0
        # A draw is a function of the steps taken: a resumed training has nothing to skip.
        self.args.ignore_data_skip = True
        # One process trains on one GPU: the copies of DataParallel would not be seen.
        self.args._n_gpu = min(given.n_gpu, 1)
        self._train_batch_size = self.args.train_batch_size
        # Losses are by sample, or a model's own mean: none is a sum over the ranks' tokens.
        self.model_accepts_loss_kwargs = False
        _take_models_as_they_are(self.accelerator)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, or go on from a checkpoint.

        Raises:
            ValueError: the checkpoint was not written to its end.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if isinstance(checkpoint, str) and Path(checkpoint).is_dir():
            is_whole = (Path(checkpoint) / TRAINER_STATE_NAME).is_file()
            allowed = f"a whole checkpoint, which has a {TRAINER_STATE_NAME}"
            advice = "Its writing was interrupted: delete it, and go on from the one before."
            require(is_whole, "resume_from_checkpoint", checkpoint, allowed, advice)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, and make it private."""
        reshard(self.model)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        privacy, steps = self.privacy, self.get_train_dataloader()
        has_target = privacy.target_epsilon is not None
        num_steps = self.args.max_steps
        if num_steps <= 0:
            num_steps = math.ceil(self.args.num_train_epochs * len(steps))
        self.private = make_private(
            self.model,
            optimizer,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=self._bound,
            expected_batch_size=self._batch_size,
            target_epsilon=privacy.target_epsilon,
            target_delta=privacy.delta if has_target else None,
            num_steps=num_steps if has_target else None,
            accountant=privacy.accountant,
            passes=privacy.passes,
            memory_budget=privacy.memory_budget,
            loss=self._loss,
            clipping=privacy.clipping,
            sample_rate=self._batch_size / len(steps.dataset),
            seed=privacy.seed,
        )
        if world_size() > 1:
            # Checkpoints hold whole tensors.
            self.model.register_load_state_dict_pre_hook(shard_state)
        return optimizer

    def get_train_dataloader(self) -> Any:
        """The steps of an epoch in expectation, each as a list of micro-batches."""
        return _Steps(self, self.train_dataset)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Samples that a step is expected to hold, over all ranks."""
        return self._batch_size

    def training_step(
        self, model: nn.Module, inputs: list[Inputs], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add a step's micro-batches; returns the mean of the losses of all ranks' samples.

        NaN for a step that has drawn none, which the Trainer leaves out of the loss that it logs.
        """
        assert self.private is not None
        model.train()
        added = [self._add(model, self._prepare_inputs(each)) for each in inputs]
        loss_B = torch.cat([record.loss_B for record in added]).float()
        is_clipped_B = torch.cat([record.is_clipped_B for record in added])
        num_samples = torch.full_like(loss_B.sum(), len(loss_B))
        total = torch.stack([loss_B.sum(), num_samples, is_clipped_B.sum().to(num_samples)])
        sum_over_ranks(total)
        self._since_log = total[1:] if self._since_log is None else self._since_log + total[1:]
        return total[0] / total[1]

    def _add(self, model: nn.Module, inputs: Inputs) -> SampleRecord:
        """Add one micro-batch."""
        assert self.private is not None
        labels = [inputs.pop(name) for name in self.label_names if name in inputs]
        allowed = "a batch with one of them"
        require(len(labels) == 1, "label_names", self.label_names, allowed)
        with self.compute_loss_context_manager(), self.private.batch(len(labels[0])):
            logits = logits_of(model(**inputs))
            self.private.backward(self._loss(logits, labels[0]))
        assert self.private.last is not None
        return self.private.last

    @property
    def history(self) -> list[StepMetrics]:
        """Metrics at each log of the training, those before a checkpoint included.

        `loss` is the mean over the steps since the log before, and `clip_fraction` over their
        samples. Without noise epsilon is infinite.
        """
        return [
            StepMetrics(
                step=entry["step"],
                loss=entry["loss"],
                clip_fraction=entry["clip_fraction"],
                epsilon=entry.get("epsilon", math.inf),
                delta=self.privacy.delta,
            )
            for entry in self.state.log_history
            if "clip_fraction" in entry
        ]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with `clip_fraction`, and `epsilon` of the steps so far, beside a training loss."""
        private = self.private
        is_of_training = "loss" in logs or "train_loss" in logs
        if private is not None and private.noise_multiplier > 0 and is_of_training:
            privacy = self.privacy
            logs["epsilon"] = private.epsilon(privacy.delta, accountant=privacy.accountant)
        if self._since_log is not None and "loss" in logs:
            num_samples, num_clipped = self._since_log.tolist()
            logs["clip_fraction"] = num_clipped / num_samples if num_samples else math.nan
            self._since_log = None
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Operations of a step's micro-batches."""
        each = inputs if isinstance(inputs, list) else [inputs]
        return sum(super(PrivateTrainer, self).floating_point_ops(one) for one in each)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # As many micro-batches on every rank, which gather their numbers.
        for each in inputs if isinstance(inputs, list) else [inputs]:
            super()._track_num_input_tokens(each)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: each trial spends epsilon of its own, and the best one's would be logged.

        Raises:
            ValueError: always.
        """
        allowed = "trainings of yours, each by a PrivateTrainer"
        advice = "The best of several spends more than its own epsilon: account for all."
        require(False, "hyperparameter_search", "a call", allowed, advice)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        # The norm of the clipped sum is not private, and `.grad` does not hold the sum.
        return None

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        is_writer = self.args.should_save
        if state_dict is None and world_size() > 1:
            # As the parameters themselves, so that a tied weight is known by any of its names.
            state_dict = whole(self.model.state_dict(keep_vars=True), is_kept=is_writer)
        if is_writer:
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        private, is_writer = self.private, self.args.should_save
        assert private is not None
        optimizer = private.mode.optimizer
        state = whole(optimizer.state_dict(), is_kept=is_writer)
        hook = optimizer.register_state_dict_post_hook(lambda optimizer, sharded: state)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            hook.remove()
        if is_writer:
            text = json.dumps(private.state_dict())
            (Path(output_dir) / PRIVACY_FILE).write_text(text, encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path, private = Path(checkpoint) / PRIVACY_FILE, self.private
        advice = "What was spent before is not known without it."
        require(path.is_file(), "resume_from_checkpoint", checkpoint, f"a {PRIVACY_FILE}", advice)
        path, advice = Path(checkpoint) / OPTIMIZER_NAME, "Without it the steps would be others."
        require(path.is_file(), "resume_from_checkpoint", checkpoint, f"an {path.name}", advice)
        assert private is not None
        hook = private.mode.optimizer.register_load_state_dict_pre_hook(sharded_state)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            hook.remove()
        private.load_state_dict(_spent(Path(checkpoint) / PRIVACY_FILE))


def _spent(path: Path) -> dict[str, Any]:
    """The steps that were spent before, from the file of a checkpoint."""
    try:
        spent: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected what was spent, as JSON, got {error}. Go on from another checkpoint."
        ) from error
    return spent


class _Steps:
    """Steps of a private trainer's epoch; its loader exists once the optimizer is private."""

    def __init__(self, trainer: PrivateTrainer, dataset: Any) -> None:
        self.trainer, self.dataset = trainer, dataset
        self.batch_size = trainer._batch_size
        refuse_unindexed("train_dataset", dataset)
        allowed = f"at least the {self.batch_size} samples that a step is expected to hold"
        require(len(dataset) >= self.batch_size, "train_dataset", len(dataset), allowed)

    def __len__(self) -> int:
        return max(1, round(len(self.dataset) / self.batch_size))

    def __iter__(self) -> Iterator[list[Inputs]]:
        trainer = self.trainer
        assert trainer.private is not None
        if trainer.state.global_step >= trainer.state.max_steps:
            # Resumed from its end: the Trainer would take, and spend, one step more.
            return
        # A generator of its own: the global one goes on from where a checkpoint has left it.
        generator = torch.Generator().manual_seed(trainer.args.seed + trainer.state.global_step)
        loader = trainer.private.loader(
            self.dataset,
            physical_batch_size=trainer._micro_batch_size,
            num_steps=len(self),
            collate_fn=trainer._get_collator_with_removed_columns(trainer.data_collator),
            generator=generator,
            num_workers=trainer.args.dataloader_num_workers,
            pin_memory=trainer.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        for micro_batches in loader:
            yield list(micro_batches)


def _refuse_unfit(given: TrainingArguments) -> None:
    """Refuse arguments that private steps do not go with."""
    for name in ("fsdp", "deepspeed"):
        advice = "Several ranks shard the model by FSDP2 as it is."
        require(not getattr(given, name), name, getattr(given, name), "none", advice)
    refused = {
        "fp16": "Take bf16: the scale of float16 follows the samples, and no noise protects it.",
        "auto_find_batch_size": "Steps begun anew spend again; a smaller micro-batch keeps the "
        "batch size where gradient_accumulation_steps grow with it.",
    }
    if world_size() > 1:
        casts = "FSDP2 cannot cast a sharded model: evaluate a saved one on a single rank."
        refused |= {"fp16_full_eval": casts, "bf16_full_eval": casts}
    for name, advice in refused.items():
        require(not getattr(given, name), name, getattr(given, name), "False", advice)
    bound, advice = given.max_grad_norm, "It is C, the bound on a sample's gradient."
    require(bound is not None and bound > 0, "max_grad_norm", bound, "a number > 0", advice)
    smoothing, advice = given.label_smoothing_factor, "Give `loss` a function that smooths."
    require(smoothing == 0, "label_smoothing_factor", smoothing, "0", advice)


def _take_models_as_they_are(accelerator: Any) -> None:
    """Have `accelerator` prepare models for mixed precision, and neither move nor wrap them."""
    prepare = accelerator.prepare_model

    def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        prepared: nn.Module = prepare(model, device_placement=False, evaluation_mode=True)
        return prepared

    accelerator.prepare_model = prepare_model


def _loss_of(model: nn.Module, loss: str | PerSampleLoss | None) -> PerSampleLoss:
    """The loss of a task, of a function, or of the model's class and its kind of problem."""
    if loss is not None:
        return loss_named(loss)
    kind, config = type(model).__name__, getattr(model, "config", None)
    tasks = [task for end, task in _TASKS.items() if kind.endswith(end)]
    allowed = f"one of {', '.join(LOSSES)}, or a function, for {kind}"
    require(bool(tasks), "loss", None, allowed)
    (task,) = tasks
    if task != "sequence-classification":
        return loss_named(task)
    problem = getattr(config, "problem_type", None)
    is_regression = problem == "regression" or getattr(config, "num_labels", 0) == 1
    if is_regression:
        return loss_named("regression")
    allowed = "single_label_classification or regression, without a `loss`"
    require(problem != "multi_label_classification", "problem_type", problem, allowed, _OWN_LOSS)
    return _single_label_loss


def _single_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`classification_loss`, which floating labels are refused for: models take them for several.

    Raises:
        ValueError: the labels are not the numbers of classes.
    """
    is_number = not labels.is_floating_point()
    require(is_number, "labels", str(labels.dtype), "numbers of classes", _OWN_LOSS)
    return classification_loss(logits, labels)
