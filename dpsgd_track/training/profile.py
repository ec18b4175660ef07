"""The profile regime: steps of a plain training loop, timed.

Every second recorded step is *tracked*: its loss and the norms of every linear layer are observed,
as in training that logs each step. The others are not, which shows the cost of tracking.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
import torch.distributed as dist

from dpsgd_track.config import JobConfig, RegimeConfig
from dpsgd_track.distributed.sharding import LocalPart, trainable_parameters
from dpsgd_track.modes.build import ModeBuilder, build_mode
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.noise import NoiseSource
from dpsgd_track.record.timings import Timings
from dpsgd_track.training.clock import GIB
from dpsgd_track.training.layer_norms import LayerNorms, StepNorms
from dpsgd_track.training.observe import largest_of_ranks, linear_layer_names
from dpsgd_track.training.prepare import PreparedRun

OnTracked = Callable[[int, StepNorms], object]
"""Called with the number of a recorded step, and its loss and norms."""


def is_tracked(step: int) -> bool:
    """True for observed steps: every second one, warm-up (steps below 0) included."""
    return step % 2 == 1


class ProfileRun(PreparedRun):
    """A mode over fresh weights, and the times of its steps."""

    def __init__(
        self,
        job: JobConfig,
        regime: RegimeConfig,
        device: torch.device,
        build: ModeBuilder = build_mode,
    ) -> None:
        """
        Args:
            build: builds the mode over the fresh weights.
        """
        super().__init__(job, regime, device)
        model = self._model()
        self.sampler = self._sampler(model)
        parameters = trainable_parameters(model)
        layers = [name for name in linear_layer_names(model) if f"{name}.weight" in parameters]
        self.mode = build(job.mode, model, self._context(model))
        self._source_key = self._noise_key()
        # On the device before the first step.
        self._rank_batches = [self.sampler.rank_batch(step) for step in range(regime.num_iter)]
        expected = self.sampler.expected_batch_size
        self._norms = LayerNorms(layers, list(parameters), expected, _add_up)

    def run(self, on_tracked: OnTracked) -> tuple[Timings, Timings]:
        """Take all steps; returns the times of the slowest rank, and this rank's own.

        Args:
            on_tracked: called with the observations, within the steps: it must not wait.
        """
        clock = _Clock(self.device)
        self.mode.set_max_grad_norm(self.regime.max_grad_norms[0])
        for step in range(-self.regime.warmup_iter, 0):
            self._step(step, on_tracked)
        # Objects from before the steps are frozen, so that garbage collection need not walk them.
        gc.collect()
        gc.freeze()
        dist.barrier()
        clock.start()
        for step in range(self.regime.num_iter):
            self._step(step, on_tracked)
            clock.tick()
        own_ms, own_gib = clock.stop()
        _hand_out(self._norms.read(), on_tracked)
        *times_ms, memory_gib = largest_of_ranks([*own_ms, own_gib], self.device)
        own = Timings(
            step_time_ms=tuple(own_ms),
            is_tracked=tuple(map(is_tracked, range(self.regime.num_iter))),
            num_tokens=self._num_tokens(),
            peak_memory_gib=own_gib,
        )
        slowest = replace(own, step_time_ms=tuple(times_ms), peak_memory_gib=memory_gib)
        return slowest, own

    def _step(self, step: int, on_tracked: OnTracked) -> None:
        mode = self.mode
        records = self._accumulate(self._rank_batches[step % len(self._rank_batches)], step)
        clipped = mode.clipped_sum()
        if is_tracked(step):
            self._track(step, clipped, records, on_tracked)
        mode.privatize(clipped, NoiseSource(self._source_key, step))
        mode.step()
        mode.zero_grad()

    def _track(
        self, step: int, clipped: ClippedSum, records: list[SampleRecord], on_tracked: OnTracked
    ) -> None:
        gradients = [
            LocalPart(p.name, clipped.gradients[p.name], p.start, p.num_elements, p.is_counted)
            for p in self._weights
        ]
        _hand_out(self._norms.observe(step, gradients, self._weights, records), on_tracked)

    @cached_property
    def _weights(self) -> list[LocalPart]:
        # An optimizer updates weights in place: their addresses stay the same.
        weights = self.mode.weight_parts()
        if self.mode.replicated and dist.get_rank() > 0:
            weights = [replace(part, is_counted=False) for part in weights]
        return weights

    def _num_tokens(self) -> tuple[int, ...]:
        each = self.sampler.dataset.num_tokens
        own = [len(rank_batch.indices) * each for rank_batch in self._rank_batches]
        total = torch.tensor(own, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())


def _hand_out(seen: tuple[int, StepNorms] | None, on_tracked: OnTracked) -> None:
    # Steps below 0 are warm-up.
    if seen is not None and seen[0] >= 0:
        on_tracked(*seen)


def _add_up(packed: torch.Tensor) -> None:
    if dist.get_world_size() > 1:
        dist.all_reduce(packed)


class _Clock:
    """Times consecutive steps without making the host wait for the device between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Start the first step; earlier memory peaks do not count."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self.tick()

    def tick(self) -> None:
        """End a step and begin the next."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._marks.append(time.perf_counter())

    def stop(self) -> tuple[list[float], float]:
        """Milliseconds of each step, and peak memory in GiB."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
            pairs = zip(self._events, self._events[1:], strict=False)
            times_ms = [before.elapsed_time(after) for before, after in pairs]
            return times_ms, torch.cuda.max_memory_allocated(self._device) / GIB
        marks = zip(self._marks, self._marks[1:], strict=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return [(after - before) * 1e3 for before, after in marks], peak / GIB
