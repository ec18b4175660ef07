"""Prepares a regime's run before its first step: model, data, context and noise key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from dpsgd_track.config import (
    AUTO,
    CLIP,
    NOISE,
    PERMUTED,
    PLAIN,
    PROBE_ACCURACY,
    PROBE_CLIP,
    ULP,
    JobConfig,
    PrivacyConfig,
    RegimeConfig,
    num_bytes,
)
from dpsgd_track.demands import declined_by, model_demands
from dpsgd_track.distributed.sharding import trainable_parameters
from dpsgd_track.modes.protocol import Mode, ModeContext, ProtocolError
from dpsgd_track.modes.table import REFERENCE, is_private, takes_memory_budget, takes_norm_plan
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.dropout import KeyedDropout
from dpsgd_track.privacy.loss import LOSSES
from dpsgd_track.privacy.noise import fresh_key
from dpsgd_track.training import stall_watch
from dpsgd_track.training.data import (
    RankBatch,
    RankSampler,
    build_dataset,
    extra_inputs_of,
    input_names_of,
)
from dpsgd_track.training.model import build_model, check_length, perturb_inputs
from dpsgd_track.training.sample_observer import SampleObserver
from dpsgd_track.training.task_source import num_labels_of, population_of

MOST_OBSERVED = 1 << 20
"""Trainable elements of the largest model of which each sample's gradient is observed. That takes
longer than the reference's step, and the probe, which has fewer, shows most causes."""


class PreparedRun:
    """A mode with fresh weights and the data of its steps."""

    mode: Mode
    sampler: RankSampler

    def __init__(self, job: JobConfig, regime: RegimeConfig, device: torch.device) -> None:
        """The subclass builds the model, the sampler and the mode, in this order."""
        self.job, self.regime, self.device = job.run_in(regime), regime, device
        # In torch 2.11 the gradients of cuDNN's attention are NaN (64 positions, H100) where a
        # query may attend to nothing, as padding on the left may not.
        torch.backends.cuda.enable_cudnn_sdp(self.job.data.padding != "left")

    def _model(self) -> nn.Module:
        """The unsharded model; its weights are a function of the seed."""
        job = self.job
        labels = num_labels_of(job.model, job.data)
        model = build_model(job.model, num_labels=labels, seed=job.seed, device=self.device)
        check_length(model, job.data.seq_length)
        if self.regime.replay == ULP:
            perturb_inputs(model, job.seed)
        return model

    def _accumulate(self, rank_batch: RankBatch, step: int) -> list[SampleRecord]:
        records, indices = [], iter(rank_batch.indices)
        for batch in rank_batch.batches:
            stall_watch.beat()
            with self._dropout(step, list(islice(indices, len(batch)))):
                record = self.mode.accumulate(batch)
            _require_record(self.mode, record, len(batch))
            records.append(record)
        return records

    def _dropout(self, step: int, samples: list[int]) -> AbstractContextManager[None]:
        if not self.job.model.dropout:
            return nullcontext()
        return KeyedDropout(seed=self.job.seed, step=step, samples=samples)

    def _sampler(self, model: nn.Module) -> RankSampler:
        job, regime = self.job, self.regime
        sizes = _uneven_sizes(job, regime)
        dataset = build_dataset(job.model, job.data, model, seed=job.seed)
        return RankSampler(
            dataset=dataset,
            batch_size=job.data.batch_size,
            micro_batches=regime.micro_batches,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=self.device,
            extra_inputs=extra_inputs_of(model),
            names=input_names_of(model, dataset),
            is_permuted=regime.replay == PERMUTED,
            population=None if sizes else population_of(job.data, job.model.task),
            sizes=sizes,
        )

    def _context(self, model: nn.Module) -> ModeContext:
        regime, performance = self.regime, self.job.performance
        is_plain = regime.replay == PLAIN
        dtype = performance.param_dtype if is_plain else performance.reference_dtype
        is_reference = regime.kind == CLIP and not regime.replay and self.job.mode == REFERENCE
        size = sum(p.numel() for p in trainable_parameters(model).values())
        adds_noise = regime.noise_matched or is_private(self.job.mode)
        return ModeContext(
            privacy=PrivacyConfig(
                noise_multiplier=regime.noise_multiplier if adds_noise else 0.0,
                # Before calibration nothing is clipped.
                max_grad_norm=(regime.max_grad_norms or (1e30,))[0],
                expected_batch_size=self.sampler.expected_batch_size,
                clipping=regime.clipping,
            ),
            device=self.device,
            param_dtype=getattr(torch, performance.param_dtype),
            reference_dtype=getattr(torch, dtype),
            make_optimizer=_optimizer_of(regime),
            num_replicas=performance.num_replicas,
            norm_plan=performance.plan
            if takes_norm_plan(self.job.mode, performance.plan)
            else AUTO,
            memory_budget=num_bytes(performance.memory_budget)
            if takes_memory_budget(self.job.mode)
            else None,
            loss=LOSSES[self.job.model.task],
            regime=regime.name,
            observer=SampleObserver() if is_reference and size <= MOST_OBSERVED else None,
        )

    def _noise_key(self) -> str:
        # All modes share matched noise; otherwise each mode draws its own.
        if self.regime.noise_matched:
            return f"{self.job.seed}/common"
        if self.job.noise_from == "os":
            return fresh_key(None, self.device)
        return f"{self.job.seed}/{self.job.mode}"


def not_optimized(mode: Mode) -> tuple[str, ...]:
    """Trainable parameters that the optimizer of `mode` lacks, by name.

    No names if it has none of them: it may well step copies of its own.
    """
    trainable = trainable_parameters(mode.model)
    optimizer = getattr(mode, "optimizer", None)
    groups = optimizer.param_groups if optimizer else []
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    lacking = tuple(name for name, p in trainable.items() if id(p) not in stepped)
    return lacking if len(lacking) < len(trainable) else ()


def require_taken(mode: Mode, job: JobConfig, regime: str) -> None:
    """Raise ProtocolError if the model of `regime` makes a demand that `mode` declines.

    A launch leaves such a regime out, by what the mode's factory says.
    """
    for demand in sorted(model_demands(regime) & set(declined_by(mode))):
        raise ProtocolError(
            f"{job.mode} takes no {demand}, which the model of {regime} has. "
            f"Say {demand.attribute} = False on the factory as well, so that it is left out."
        )


def _require_record(mode: Mode, record: object, num_samples: int) -> None:
    """Refuse what is no record of `num_samples` samples.

    Raises:
        ProtocolError: `accumulate` returned something else.
    """
    expected = f"accumulate() of {type(mode).__name__}: expected a SampleRecord"
    if not isinstance(record, SampleRecord):
        raise ProtocolError(f"{expected}, got {type(record).__name__}.")
    if record.loss_B.shape != (num_samples,):
        shape = list(record.loss_B.shape)
        raise ProtocolError(f"{expected} of {num_samples} samples, got losses of shape {shape}.")


def _uneven_sizes(job: JobConfig, regime: RegimeConfig) -> tuple[int, ...]:
    """Samples of each step in regimes with uneven batches, so that ranks and micro-batches differ.

    With G samples in a full batch, the noise regime repeats G, G - 1, 0, 1; batches of no sample
    and of one a rank follow, for noise-only steps. The probe's clip regime has G - 1, G / 3 + 1 (a
    full micro-batch on each of several ranks and one more sample), G, 1, and its accuracy regime G
    in each of four steps; later steps are there for faults that begin late, and have G / 10 samples
    but two at least. A mode on one device, which runs the micro-batches of all ranks, has the same.
    """
    full = dist.get_world_size() * job.data.batch_size * regime.micro_batches
    steps = range(regime.num_iter)
    if regime.kind == NOISE:
        sizes = (full, max(full - 1, 1), 0, 1)
        in_turn = tuple(sizes[step % len(sizes)] for step in steps)
        return (*in_turn, 0, dist.get_world_size())
    if regime.name == PROBE_CLIP:
        sizes = (max(full - 1, 1), min(full // 3 + 1, full), full, 1)
    elif regime.name == PROBE_ACCURACY:
        sizes = (full,) * 4
    else:
        return ()
    late = min(max(full // 10, 2), full)
    return tuple(sizes[step] if step < len(sizes) else late for step in steps)


def _optimizer_of(
    regime: RegimeConfig,
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    if regime.optimizer == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=regime.learning_rate)
    return lambda parameters: torch.optim.SGD(parameters, lr=regime.learning_rate)
