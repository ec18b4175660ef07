"""One regime of one mode: fresh weights, then its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpsgd_track.config import (
    CLIP,
    NOISE,
    PROBE_CLIP,
    JobConfig,
    RegimeConfig,
    is_probe,
    layer_norm_steps,
)
from dpsgd_track.distributed.sharding import LocalPart, trainable_parameters
from dpsgd_track.modes.build import ModeBuilder, build_mode
from dpsgd_track.modes.protocol import ModeContext
from dpsgd_track.modes.table import is_private
from dpsgd_track.privacy.accounting import (
    epsilon_prv,
    epsilon_rdp,
    poisson_history,
    sequential_history,
)
from dpsgd_track.privacy.noise import NoiseSource, fresh_key
from dpsgd_track.record import names
from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.record.parts import NUM_SUM_PARTS
from dpsgd_track.training import noise_draws, noise_samples
from dpsgd_track.training.clip_bounds import AT_BOUND, NUM_MIXED, SAME_BOUND, bounds_of
from dpsgd_track.training.clock import StepClock
from dpsgd_track.training.observe import (
    GatheredSamples,
    gather_samples,
    largest_of_ranks,
    linear_layer_names,
    local_samples,
    measure,
    weights_digest,
)
from dpsgd_track.training.other_sums import other_sums
from dpsgd_track.training.prepare import PreparedRun, require_taken
from dpsgd_track.training.recorder import Recorder, StepObservation
from dpsgd_track.training.sample_observer import SampleObserver
from dpsgd_track.training.target_losses import sizes_of

DRAWS = -1
"""Step number of the noise-only steps of the noise regime, which have one batch and one C."""


class NotFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite."""


@dataclass(frozen=True)
class Step:
    """One observed step, ready to be logged."""

    seen: StepObservation
    """Observations over all ranks."""
    local: GatheredSamples
    """This rank's samples."""
    local_time_ms: float
    local_memory_gib: float


class RegimeRun(PreparedRun):
    """A mode over fresh weights, and the records of its steps."""

    def __init__(
        self,
        job: JobConfig,
        regime: RegimeConfig,
        device: torch.device,
        silent: Mapping[int, noise_samples.Floats] | None = None,
        build: ModeBuilder = build_mode,
    ) -> None:
        """
        Args:
            silent: in the noise regime, `taken` of the twin without noise.
            build: builds the mode over the fresh weights.
        """
        super().__init__(job, regime, device)
        self.silent = silent
        self.taken: dict[int, noise_samples.Floats] = {}
        """[P, M] for each step: sampled elements of this rank's update, times the expected batch
        size. Only in the noise regime, where DRAWS is the noise-only step."""
        model = self._model()
        self.sampler = self._sampler(model)
        self._begin(model, self._context(model), build)

    def _begin(self, model: nn.Module, context: ModeContext, build: ModeBuilder) -> None:
        """Build the mode over `model`, and start its records."""
        job, regime = self.job, self.regime
        digest = weights_digest(model)
        layer_names = linear_layer_names(model)
        self.parameter_names = list(trainable_parameters(model))
        sizes = {name: p.numel() for name, p in trainable_parameters(model).items()}
        self.mode = build(job.mode, model, context)
        require_taken(self.mode, job, regime.name)
        self.weights = measure(self.mode, self.mode.weight_parts())
        self.noise_key = self._noise_key()
        self.max_grad_norms = regime.max_grad_norms or self._calibrate()
        self.records = [
            Recorder(
                layer_names,
                sizes,
                self.sampler.expected_batch_size,
                digest,
                self.mode.context.privacy.noise_multiplier * self.max_grad_norms[0],
                layer_norm_steps(job.layer_norms, regime.num_iter),
            )
            for _ in ("all ranks", "this rank")
        ]

    def steps(self) -> Iterable[tuple[Step, dict[str, float]]]:
        """Run the regime; yields each step with its metrics over all ranks.

        Raises:
            NotFiniteError: after the step that became NaN or infinite was yielded.
        """
        for _ in range(self.regime.warmup_iter):
            self._accumulate(self.sampler.rank_batch(0), 0)
            self.mode.clipped_sum()
            self.mode.zero_grad()
        left_out = self.left_out_steps()
        for step in range(self.regime.num_iter):
            if step in left_out:
                continue
            done = self._step(step)
            metrics = self.records[0].add(done.seen)
            own = replace(done.seen, samples=done.local, step_time_ms=done.local_time_ms)
            self.records[1].add(replace(own, peak_memory_gib=done.local_memory_gib))
            yield done, metrics
            _require_finite(step, metrics)
        if self.regime.kind == NOISE:
            self._draw_noise()

    def accounting(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Each recorded step with the epsilon spent after it; none without protecting noise.

        Nor are there any in the noise regime, whose weights never move, or on the probe.
        RDP's epsilon is given at every step. PRV's is given after 1, 2, 4, 8, ... steps and the
        last, unless it would take too long.
        """
        sigma, job = self.mode.context.privacy.noise_multiplier, self.job
        is_told_nothing = self.regime.kind == NOISE or is_probe(self.regime.name)
        if sigma == 0 or not is_private(job.mode) or is_told_nothing:
            return
        sampler = self.sampler
        done = [row["step"] + 1 for row in self.records[0].rows]
        for num_steps in done:
            step_is = sigma, num_steps, sampler.expected_batch_size
            if sampler.population is None:
                history = sequential_history(*step_is, sampler.dataset.num_samples)
            else:
                history = poisson_history(*step_is, sampler.population)
            ((_, sampling_rate, steps),) = history
            metrics = {
                names.EPSILON_RDP: epsilon_rdp(history, job.delta),
                names.ACCOUNTED_SIGMA: sigma,
                names.ACCOUNTED_SAMPLING_RATE: sampling_rate,
                names.ACCOUNTED_STEPS: float(steps),
            }
            if num_steps == done[-1] or num_steps.bit_count() == 1:
                prv = epsilon_prv(history, job.delta)
                metrics |= {} if prv is None else {names.EPSILON_PRV: prv}
            yield num_steps - 1, metrics

    def left_out_steps(self) -> list[int]:
        """Steps with an empty micro-batch on some rank, left out for a mode that takes none."""
        if not self.sampler.sizes or self.mode.takes_empty_batches:
            return []
        steps = range(self.regime.num_iter)
        return [step for step in steps if self.sampler.leaves_some_empty(step)]

    def _step(self, step: int) -> Step:
        mode, clock = self.mode, StepClock(self.device)
        rank_batch = self.sampler.rank_batch(step)
        source = NoiseSource(self.noise_key, step)
        max_grad_norm = self._bound(step)
        mode.set_max_grad_norm(max_grad_norm)
        if self._observer:
            # A warm-up's samples, and those of a calibration, are none of the step's.
            self._observer.discard()
        with clock.running():
            records = self._accumulate(rank_batch, step)
            clipped = mode.clipped_sum()
        parts = [replace(p, local=clipped.gradients[p.name]) for p in mode.weight_parts()]
        gradient = measure(mode, parts)
        moved_sketch, part_sketch = self._moved_sketch(parts), self._part_sketch()
        with clock.running():
            mode.privatize(clipped, source)
        # Before `mode.step`: noise added in there would be missing in another training loop.
        noised_parts = mode.gradient_parts()
        noised = measure(mode, noised_parts)
        noise = self._noise(step, noised_parts)
        with clock.running():
            mode.step()
        mode.zero_grad()
        observed = self._observer.take() if self._observer else None
        local = local_samples(
            records,
            rank_batch.indices,
            rank_batch.digests,
            self.parameter_names,
            observed,
            sizes_of(mode.context.loss, rank_batch.batches),
        )
        weights_before, self.weights = self.weights, measure(mode, mode.weight_parts())
        time_ms, memory_gib = largest_of_ranks(
            [clock.elapsed_ms, clock.peak_memory_gib], self.device
        )
        samples = gather_samples(local, self.device)
        num_tokens = len(samples.index) * self.sampler.dataset.num_tokens
        seen = StepObservation(
            step=step,
            samples=samples,
            gradient=gradient,
            moved_sketch=moved_sketch,
            part_sketch=part_sketch,
            noised=noised,
            weights_before=weights_before,
            weights_after=self.weights,
            noise=noise,
            max_grad_norm=max_grad_norm,
            step_time_ms=time_ms,
            peak_memory_gib=memory_gib,
            tokens_per_second=num_tokens / time_ms * 1e3,
        )
        return Step(seen, local, clock.elapsed_ms, clock.peak_memory_gib)

    @property
    def _observer(self) -> SampleObserver | None:
        observer = self.mode.context.observer
        return observer if isinstance(observer, SampleObserver) else None

    def _moved_sketch(self, parts: list[LocalPart]) -> NDArray[np.float64]:
        """[V, P, K] sketch of the wrong clipped sum of each `SumFormula`; K may be 0."""
        if self._observer is None:
            return np.empty((len(SumFormula), len(parts), 0))
        return other_sums(self.mode, parts, self._observer.sums())

    def _part_sketch(self) -> NDArray[np.float64]:
        """[M, P, K] sketch of the clipped sum by part; K may be 0."""
        if self._observer is None:
            return np.empty((NUM_SUM_PARTS, len(self.parameter_names), 0))
        return self._observer.part_sketches(self.parameter_names, self.device)

    def _noise(self, step: int, parts: list[LocalPart]) -> NDArray[np.float32]:
        """[W, P, M] sampled elements of the noise on each rank's shards; empty if not recorded."""
        if self.regime.kind == NOISE:
            self.taken[step] = noise_samples.take(parts, self.sampler.expected_batch_size)
            if self.silent is not None:
                noise = self.taken[step] - self.silent[step]
                return noise_samples.gather(self.mode, parts, noise, self.device)
        return np.empty((0, len(parts), 0), dtype=np.float32)

    def _draw_noise(self) -> None:
        """Run the noise-only steps and record their sums; the twin without noise runs one."""
        mode, divisor, bound = self.mode, self.sampler.expected_batch_size, self.max_grad_norms[0]
        most = noise_draws.num_elements(mode.weight_parts(), self.device)
        is_bare = mode.takes_empty_batches
        # After the batches of the recorded steps come an empty one, and one of a sample a rank.
        rank_batch = self.sampler.rank_batch(self.regime.num_iter + (0 if is_bare else 1))
        key = fresh_key(None, self.device)

        def take(step: int) -> tuple[list[LocalPart], noise_samples.Floats]:
            mode.set_max_grad_norm(bound)
            self._accumulate(rank_batch, DRAWS)
            mode.privatize(mode.clipped_sum(), NoiseSource(key, step))
            parts = mode.gradient_parts()
            taken = noise_samples.take(parts, divisor, most)
            mode.step()
            mode.zero_grad()
            return parts, taken

        def draw(step: int) -> tuple[NDArray[np.float32], int]:
            assert self.silent is not None
            parts, taken = take(step)
            # NaN is past the end of a shard.
            is_lost = np.isnan(taken) & ~np.isnan(self.silent[DRAWS])
            drawn = np.where(is_lost, np.inf, taken - self.silent[DRAWS])
            noise = noise_samples.gather(mode, parts, drawn, self.device)
            return noise, noise_draws.significant_bits(parts)

        if self.silent is None:
            self.taken[DRAWS] = take(0)[1]
        else:
            self.records[0].noise_draws = noise_draws.draw_noise(
                draw,
                key,
                noise_multiplier=mode.context.privacy.noise_multiplier,
                max_grad_norm=bound,
                expected_batch_size=divisor,
                is_bare=is_bare,
            )

    def _calibrate(self) -> tuple[float, ...]:
        """C of each step from this mode's own norms; `bounds_of` says which."""
        if self.regime.kind != CLIP or not is_private(self.job.mode):
            raise ValueError(
                f"max_grad_norms=(): expected one value a step in regime {self.regime.name}."
            )
        steps = [self._dry_samples(step) for step in range(self.regime.num_iter)]
        if not sum(len(samples.norm) for samples in steps[:NUM_MIXED]):
            raise ValueError(
                f"batch_size={self.sampler.batch_size}: expected samples in the first steps of "
                f"regime {CLIP}. Poisson sampling chose none: raise --batch-size."
            )
        bounds = bounds_of(steps)
        if not all(bound > 0 and math.isfinite(bound) for bound in bounds):
            raise NotFiniteError(f"clipping bounds became {min(bounds)} to {max(bounds)}")
        return bounds

    def _bound(self, step: int) -> float:
        """C of a step. In AT_BOUND of the probe's clip regime it is the norm of one sample, as the
        mode itself computes it, whose last bit differs from mode to mode.
        """
        bound = self.max_grad_norms[step]
        if self.regime.name == PROBE_CLIP and step == AT_BOUND:
            norms = self._dry_samples(step).norm
            nearest = float(norms[np.abs(norms - bound).argmin()]) if len(norms) else math.nan
            if math.isclose(nearest, bound, rel_tol=SAME_BOUND):
                return nearest
        return bound

    def _dry_samples(self, step: int) -> GatheredSamples:
        """The samples of a step, whose sum is forgotten."""
        rank_batch = self.sampler.rank_batch(step)
        records = self._accumulate(rank_batch, step)
        self.mode.clipped_sum()
        self.mode.zero_grad()
        local = local_samples(records, rank_batch.indices, rank_batch.digests, self.parameter_names)
        return gather_samples(local, self.device)


def _require_finite(step: int, metrics: dict[str, float]) -> None:
    for name in ("loss", "grad_norm", "grad_norm_noised"):
        if not math.isfinite(metrics[name]):
            raise NotFiniteError(f"{name} became {metrics[name]} at step {step}")
