"""Compares the engine with plain autograd during training, as the last line of defence.

Two things are compared on a batch, in the model's own mode and precision:

- the engine's sum of r_i g_i, with random r_i, and the gradient of sum_i r_i loss_i. They differ if
  the engine assigns gradients to the wrong samples, misses a use of a parameter, or uses a loss
  that depends on several samples, whatever sizes are equal by chance.
- the norms and clip factors of two samples of the batch, the one with the largest norm and a random
  one, and those of the gradient of each sample run alone. They differ if one sample's values reach
  another's gradient, or if the model depends on the size of the batch.

Sums are compared by a random projection of each parameter, so that nothing of the model's size is
kept. A difference counts if rounding does not explain it: if it exceeds a generous tolerance, and
then the spread of plain autograd's own results as the weights move by the unit roundoff.

Random numbers of a forward, such as dropout's, are the same in both computations of a batch. A
sample alone would draw others, so a model that draws any runs single samples in its eval mode, and
its training mode is checked on a batch of copies of the sample.

All ranks check together, on a sample of one rank at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.agreement import Agreement
from dpsgd_track.distributed.ranks import sum_over_ranks, world_size
from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.privacy.batch import Batch, RepeatableBatch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.random_state import RandomState
from dpsgd_track.privacy.tape import TapeError
from dpsgd_track.privacy.trial import kept_random_state

_logger = logging.getLogger(__name__)

REPEATED_EVERY = 5
"""Batches 1, 2^5, 2^10, 2^15, ... are always checked."""
SUMS_CHECKED = (2,)
"""Batches whose sums are always checked: a model that reorders samples by their values may have
left those of the first batch in order."""
MAX_PATHS = 16
"""Sequences of layer calls that are checked; some models have a new one in every batch."""

MAX_SINGLES = 8
"""Largest batch of which each sample's loss is recomputed alone, rather than in two halves."""
MAX_LOSSES_ALONE = 16
"""Samples whose losses are recomputed, each from its own logits."""

_FLOOR = 0.01
"""Fraction of the total norm below which a parameter's difference does not matter."""
_NUM_SPREADS, _SPREADS_ALLOWED = 3, 8.0


class SpotCheckError(ValueError):
    """The engine and plain autograd disagree."""


@dataclass
class SpotChecks:
    """Number and cost of the spot checks so far."""

    num_checks: int = 0
    seconds: float = 0.0
    """Wall time on this rank."""


class SpotCheck:
    """Checks the first batch, each new kind of batch, and others at growing intervals.

    Two batches are of one kind if their tensors have the same types, sizes with the same powers of
    two above them, and the same sizes equal to the number of samples, and if the model is in the
    same mode and calls the same layers in the same order, and the loop's own code the same
    functions. A batch is also new if it has more samples, in powers of two, than any that was
    checked: there a limit, such as the capacity of an expert, may be exceeded for the first time.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine.capture is not None
        self.engine, self.capture = engine, engine.capture
        self.cost = SpotChecks()
        self._agreement = Agreement()
        self._num_batches = 0
        self._kinds: set[object] = set()
        self._most_samples = 0
        """Size of the largest batch that was checked, as an exponent of two."""
        self._paths: set[int] = set()
        self._codes: set[int] = set()
        """Hashes of loops' own code that are told apart."""
        self._modules = list(engine.model.modules())
        self._unproven = set(trainable_parameters(engine.model))
        """Parameters whose gradients were 0 in every check so far."""

    def note(self, batch: RepeatableBatch) -> None:
        """Note the next batch."""
        self._num_batches += 1
        self._kind = self._kind_of(batch)
        self._is_checked = False

    def before(self, batch: RepeatableBatch) -> None:
        """Check the batch before it is added, if a check is due that ranks need not agree on.

        Raises:
            SpotCheckError: naming the parameters whose gradients are not their samples' own.
        """
        # Equal on all ranks, also on one without samples so far.
        is_first = self.cost.num_checks == 0
        self._is_checked = is_first or (not self.capture.is_sharded and self._is_new(batch))
        if self._is_checked:
            self._check(batch)

    def after(self, batch: RepeatableBatch, record: SampleRecord) -> None:
        """Check a batch that was added, if a check is due on any rank. All ranks call it."""
        is_due = self._is_new(batch) or self._is_repeated() or self._is_new_path()
        is_due_anywhere = self._agreement.any(is_due or self._has_new_gradients(record))
        is_early = self._num_batches in SUMS_CHECKED and not self._is_checked
        if is_due_anywhere or is_early:
            try:
                self._check(batch, sums_alone=not is_due_anywhere)
            except torch.OutOfMemoryError:
                # The batch itself was added, and the next of its kind will be checked.
                _logger.warning("There was no memory left for a spot check.")

    def _kind_of(self, batch: RepeatableBatch) -> object:
        num_samples = len(batch)
        sizes = [
            (t.dtype, *((_exponent(size), size == num_samples) for size in t.shape[1:]))
            for t in batch.tensors()
        ]
        autocast = [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in {t.device.type for t in batch.tensors()}
        ]
        training = hash(tuple([module.training for module in self._modules]))
        code = batch.code()
        # Some loops have other code in every batch.
        if len(self._codes) < MAX_PATHS:
            self._codes.add(code)
        code = code if code in self._codes else 0
        return num_samples == 1, tuple(sizes), tuple(autocast), training, code

    def _is_new(self, batch: RepeatableBatch) -> bool:
        is_larger = _exponent(len(batch)) > self._most_samples
        return len(batch) > 0 and (is_larger or self._kind not in self._kinds)

    def _is_repeated(self) -> bool:
        num_batches = self._num_batches
        is_power = num_batches.bit_count() == 1
        return num_batches > 1 and is_power and (num_batches.bit_length() - 1) % REPEATED_EVERY == 0

    def _is_new_path(self) -> bool:
        is_new = self.capture.path not in self._paths and not self.engine.is_standing_in
        return is_new and len(self._paths) < MAX_PATHS

    def _has_new_gradients(self, record: SampleRecord) -> bool:
        # Weights that start at 0 keep other gradients at 0 until they move. Reading the norms waits
        # for the device, hence not in every batch.
        if not self._unproven or self._num_batches.bit_count() > 1 or not len(record.loss_B):
            return False
        norms = record.norm_by_parameter_B or {}
        unproven = [norms[name] for name in self._unproven if name in norms]
        return bool(unproven) and bool(torch.stack(unproven).any())

    def _check(self, batch: RepeatableBatch, *, sums_alone: bool = False) -> None:
        started = time.perf_counter()
        try:
            was_done = self._compare(batch, sums_alone=sums_alone)
        finally:
            self.engine.sharder.reshard()
            self.cost.seconds += time.perf_counter() - started
        if was_done:
            self.cost.num_checks += 1
            _logger.info(
                "spot check %d: the engine agrees with plain autograd; %.2f s so far",
                self.cost.num_checks,
                self.cost.seconds,
            )
            if len(batch) and not sums_alone:
                self._kinds.add(self._kind)

    def _compare(self, batch: RepeatableBatch, *, sums_alone: bool) -> bool:
        """Compare one batch of all ranks; False if no rank has a sample to compare."""
        whole, kept = batch, None
        comparison = _Comparison(self.engine, batch)
        if comparison.num_left_out:
            comparison.compare_left_out()
            losses_B = comparison.record.loss_B
            kept = batch.padded(comparison.finite_samples())
            batch = batch.rows(kept)
            # A single sample that is left of several does not show how they are treated together.
            self._kind = self._kind_of(batch) if len(batch) else None
            comparison = _Comparison(self.engine, batch)
        if not comparison.is_possible():
            return False
        comparison.compare_sums()
        if sums_alone:
            return True
        self._paths.add(self.capture.path)
        self._most_samples = max(self._most_samples, _exponent(len(batch)))
        seed = self.cost.num_checks
        if not comparison.is_random:
            self._unproven -= comparison.compare_samples(seed)
            comparison.compare_parts()
            if kept is not None:
                comparison.compare_whole(losses_B[kept])
            return True
        comparison.compare_copies(seed)
        with in_eval_mode(self.engine.model), torch.backends.cudnn.flags(enabled=False):
            alone = _Comparison(self.engine, batch)
            if not alone.is_possible():
                return False
            alone.compare_sums()
            if alone.is_random:
                _logger.warning(
                    "The model draws random numbers in its eval mode too: no sample can be run "
                    "alone and held against the batch."
                )
                return True
            self._unproven -= alone.compare_samples(seed)
            alone.compare_parts()
            if kept is not None:
                alone.compare_whole(_Comparison(self.engine, whole).record.loss_B[kept])
        return True


class _Comparison:
    """Compares the engine's results for one batch of each rank with plain autograd's."""

    def __init__(self, engine: Engine, batch: RepeatableBatch) -> None:
        self.engine, self.batch = engine, batch
        self.parameters = trainable_parameters(engine.model)
        self.names = list(self.parameters)
        self.device = next(iter(self.parameters.values())).device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        generator = torch.Generator().manual_seed(self.rank)
        size = torch.rand(max(len(batch), 1), generator=generator) + 0.5
        sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
        self.weight_B = (size * sign).to(self.device)
        self.is_random = False
        """True if a forward draws random numbers; set by `compare_sums`."""
        self._form_sums()

    def is_possible(self) -> bool:
        """True if a rank has samples, and all samples are finite."""
        return self.num_left_out == 0 and any(self.num_samples)

    def finite_samples(self) -> Tensor:
        """Indices of this rank's samples that are finite."""
        left_out_B = self.record.is_left_out_B
        assert left_out_B is not None
        return (~left_out_B).nonzero().flatten()

    def _form_sums(self) -> None:
        with kept_random_state(self.batch):
            self.record, sums = self.engine.weighted_sum(self.batch, self.weight_B)
        self.projections = self._projected(sums)
        del sums
        counts = torch.zeros(world_size() + 1, device=self.device)
        counts[self.rank] = len(self.batch)
        counts[-1] = self.record.num_left_out
        sum_over_ranks(counts)
        *self.num_samples, self.num_left_out = map(int, counts.tolist())

    def compare_sums(self) -> None:
        """Compare the engine's weighted sums with autograd's."""
        expected, problem, is_random = self._autograd_projections()
        self.is_random = self._is_any(is_random)
        self._raise_together(problem)
        norms = self.record.norm_by_parameter_B or {}
        weight_B = self.weight_B[: len(self.batch)].abs()
        scale = self._column(lambda name: (norms[name].float() * weight_B).sum(), norms)
        sum_over_ranks(scale)
        self._refuse_difference(
            "sum over the samples, weighted at random",
            self.projections,
            expected,
            scale,
            lambda: self._autograd_projections()[0],
        )

    def compare_samples(self, seed: int) -> set[str]:
        """Compare norms and clip factors of two samples with those of each sample run alone.

        Args:
            seed: determines the samples; another for each check.
        Returns:
            Parameters whose gradients were not 0.
        """
        proven: set[str] = set()
        for rank, index in self._choose_samples(seed):
            norms_alone = partial(self._norms_alone, index if rank == self.rank else None)
            try:
                expected = norms_alone()
            except (ValueError, RuntimeError, IndexError) as error:
                if world_size() > 1 or isinstance(error, torch.OutOfMemoryError | TapeError):
                    raise
                # Some layers refuse a batch of one, such as GroupNorm of a single value.
                _logger.warning("The model does not run on a sample alone: %s", error)
                return proven
            recorded = self._recorded_norms(index if rank == self.rank else None)
            proven |= {n for n, norm in zip(self.names, expected.tolist(), strict=False) if norm}
            which = f"sample {index}" + (f" of rank {rank}" if world_size() > 1 else "")
            what = f"gradient norm of {which}"
            self._refuse_difference(what, recorded, expected, expected, norms_alone)
        return proven

    def compare_parts(self) -> None:
        """Compare all losses with those in smaller batches: two halves, or single samples if the
        batch is small."""
        loss_B = torch.zeros_like(self.record.loss_B)
        largest = max(self.num_samples)
        num_parts = largest if largest <= MAX_SINGLES else 2
        for first in range(num_parts):
            indices = torch.arange(len(self.batch))[first::num_parts]
            part_loss_B, _ = self._losses(self.batch.rows(self.batch.padded(indices)))
            loss_B[first::num_parts] = part_loss_B[: len(indices)]
        problem = ""
        if len(self.batch):
            problem = self._largest_difference(self.record.loss_B, loss_B, "in a part of it")
        self._raise_together(problem or self._error_of_halves())

    def _error_of_halves(self) -> str:
        """Error if outputs differ in halves of a batch whose losses need all of it; else ""."""
        problem, engine = "", self.engine
        with torch.no_grad(), engine.in_rounded_dtype():
            halves = self.batch.outputs_in_halves(engine.model, engine.rounded_dtype)
            for outputs, of_halves in halves:
                scale = outputs.abs().amax() + 1 if outputs.numel() else 1
                excess = (outputs - of_halves).abs() - self._tolerance * scale
                if len(self.batch) and not bool((excess <= 0).all()):
                    index = int(excess.amax(dim=1).argmax())
                    problem = f"outputs of sample {index}: others in a half of its batch"
        return problem

    def compare_left_out(self) -> None:
        """Run each rank's first and last sample that is left out alone: it must be left out too."""
        left_out_B = self.record.is_left_out_B
        assert left_out_B is not None
        indices = left_out_B.nonzero().flatten()
        problem = ""
        for index in (indices[:1], indices[-1:]):
            # Ranks without such a sample take part with an empty batch.
            alone = _Comparison(self.engine, self.batch.rows(self.batch.padded(index)))
            if len(index) and not alone.record.num_left_out:
                problem = f"sample {int(index)}: not finite in its batch, finite alone"
        self._raise_together(problem)

    def compare_whole(self, loss_B: Tensor) -> None:
        """Compare all losses with `loss_B`, theirs in the whole batch before some were left out."""
        problem = ""
        if len(self.batch):
            where = "without those left out"
            problem = self._largest_difference(loss_B, self.record.loss_B, where)
        self._raise_together(problem)

    def compare_copies(self, seed: int) -> None:
        """Compare the losses of two samples with those in batches of copies of each.

        At its own index, a sample is given the same random numbers as in its batch.
        """
        for rank, index in self._choose_samples(seed):
            is_mine = rank == self.rank
            rows = torch.full((len(self.batch),), index) if is_mine else torch.arange(0)
            loss_B, is_random = self._losses(self.batch.rows(rows))
            problem = ""
            if is_mine and is_random:
                losses = self.record.loss_B[index], loss_B[index]
                problem = self._difference(index, *losses, "among copies of itself")
            self._raise_together(problem)

    def _losses(self, batch: RepeatableBatch) -> tuple[Tensor, bool]:
        """(losses of `batch`, or of a stand-in if it is empty; True if the forward is random)."""
        batch = batch if len(batch) else batch.stand_in()
        with torch.no_grad(), kept_random_state(batch), self.engine.in_rounded_dtype():
            before = RandomState(self.device.type)
            loss_B = self.engine.losses(batch)
            return loss_B, not before.equals(RandomState(self.device.type))

    def _choose_samples(self, seed: int) -> Iterator[tuple[int, int]]:
        """(rank, index) of one rank's sample with the largest norm, and of another at random."""
        ranks = [rank for rank, count in enumerate(self.num_samples) if count]
        for turn in range(2):
            rank = ranks[(seed + turn) % len(ranks)]
            index = 0
            if rank == self.rank:
                assert self.record.norm_B is not None
                index = int(self.record.norm_B.argmax())
                if turn == 1:
                    # Another sample, if there is one.
                    generator = torch.Generator().manual_seed(seed)
                    size = self.num_samples[rank]
                    index += int(torch.randint(max(size - 1, 1), (), generator=generator)) + 1
                    index %= size
            yield rank, index

    def _autograd_projections(self) -> tuple[Tensor, str, bool]:
        """Projections of autograd's sums, any error of the losses, and if a forward is random."""
        with kept_random_state(self.batch):
            before = RandomState(self.device.type)
            logits, loss_B, gradients = self.engine.autograd_gradients(self.batch, self.weight_B)
            is_random = not before.equals(RandomState(self.device.type))
        problem = self._error_of_losses(logits, loss_B) if len(self.batch) else ""
        return self._projected(gradients), problem, is_random

    def _projected(self, gradients: dict[str, Tensor]) -> Tensor:
        """Product of each parameter's gradient with a random tensor, over all ranks."""
        generator = torch.Generator(self.device).manual_seed(self.rank)

        def product(name: str) -> Tensor:
            parameter = self.parameters[name]
            # The engine has no sum of a parameter that it missed.
            gradient = gradients.get(name, torch.zeros_like(as_local(parameter))).flatten()
            other = torch.randn(len(gradient), generator=generator, device=self.device)
            return torch.dot(gradient.double(), other.double())

        products = torch.stack([product(name) for name in self.names])
        sum_over_ranks(products)
        return products / self.engine.sharder.num_copies

    def _norms_alone(self, index: int | None) -> Tensor:
        """Norms by parameter, total norm and clip factor of one rank's sample, run alone."""
        batch, weight_B = self.batch, torch.zeros(1, device=self.device)
        if len(batch):
            batch = batch.rows(batch.padded(torch.tensor([index or 0])))
            weight_B = torch.zeros(len(batch), device=self.device)
            weight_B[0] = index is not None
        with kept_random_state(batch):
            _, _, gradients = self.engine.autograd_gradients(batch, weight_B)
        squares = torch.stack([gradients[n].double().square().sum() for n in self.names])
        sum_over_ranks(squares)
        squares = squares / self.engine.sharder.num_copies
        total = squares.sum().sqrt()
        by_parameter = dict(zip(self.names, squares[:, None], strict=True))
        factor = self.engine.factors_of(by_parameter, total[None])
        return torch.cat([squares.sqrt(), total[None], factor])

    def _recorded_norms(self, index: int | None) -> Tensor:
        """Norms and clip factor of one rank's sample as the engine has recorded them."""
        recorded = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=self.device)
        if index is not None:
            record = self.record
            assert record.norm_B is not None
            assert record.clip_factor_B is not None
            norms = record.norm_by_parameter_B or {}
            recorded[:-2] = self._column(lambda name: norms[name][index], norms)
            recorded[-2], recorded[-1] = record.norm_B[index], record.clip_factor_B[index]
        sum_over_ranks(recorded)
        return recorded

    def _column(self, value: Callable[[str], Tensor], present: Container[str]) -> Tensor:
        """Values by parameter, float64; 0 for those that are not `present`."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack([value(n).double() if n in present else zero for n in self.names])

    def _refuse_difference(
        self,
        what: str,
        got: Tensor,
        expected: Tensor,
        scale: Tensor,
        recompute: Callable[[], Tensor],
    ) -> None:
        """Raise if `got` differs from `expected` by more than rounding at that scale.

        Args:
            recompute: computes `expected` again, to measure its spread.
        """
        num = len(self.names)
        total = scale[:num].square().sum().sqrt()
        allowed = self._tolerance * (scale + _FLOOR * total) + _FLOOR * self._unit
        allowed[num + 1 :] = self._tolerance * scale[num + 1 :]
        difference = (got - expected).abs()
        if bool((difference <= allowed).all()):
            return
        for seed in range(_NUM_SPREADS):
            with self._moved_weights(seed):
                spread = (recompute() - expected).abs()
            allowed = torch.maximum(allowed, _SPREADS_ALLOWED * spread)
        excess = difference / allowed.clamp(min=1e-300)
        # A comparison with NaN is false: NaN counts as different.
        is_far = ~(difference <= allowed)
        if not bool(is_far.any()):
            return
        labels = [*self.names, "all parameters", "clip factor"]
        worst = sorted(is_far.nonzero().flatten().tolist(), key=lambda i: -excess[i])
        named = "; ".join(
            f"{labels[i]} {float(got[i]):.6g} by the engine, {float(expected[i]):.6g} by autograd"
            for i in worst[:5]
        )
        more = f" (and {len(worst) - 5} more)" if len(worst) > 5 else ""
        self._raise(f"{what}: {named}{more}")

    def _error_of_losses(self, logits: Tensor | None, loss_B: Tensor) -> str:
        """Error if losses are not the model's, or depend on other samples' logits; else ""."""
        problem = self._largest_difference(self.record.loss_B, loss_B, "without the engine")
        if problem or not isinstance(self.batch, Batch):
            return problem
        if logits is None or len(logits) != len(self.batch):
            return problem
        step = -(-len(self.batch) // MAX_LOSSES_ALONE)
        for index in range(0, len(self.batch), step):
            sample = self.batch.sample(index)
            with torch.no_grad():
                (alone,) = self.engine.loss(logits[index : index + 1], sample.targets)
            problem = self._difference(index, loss_B[index], alone, "by its own logits alone")
            if problem:
                return problem
        return ""

    def _largest_difference(self, got_B: Tensor, expected_B: Tensor, where: str) -> str:
        worst = int((got_B - expected_B).abs().argmax())
        return self._difference(worst, got_B[worst], expected_B[worst], where)

    def _difference(self, index: int, got: Tensor, expected: Tensor, where: str) -> str:
        """Error if two losses of a sample differ beyond rounding; else ""."""
        loss, loss_alone = float(got), float(expected)
        if abs(loss - loss_alone) <= self._tolerance * (abs(loss_alone) + 1):
            return ""
        return f"loss of sample {index}: {loss:.6g} in its batch, {loss_alone:.6g} {where}"

    def _is_any(self, is_true: bool) -> bool:
        """True if `is_true` is on any rank."""
        total = torch.tensor(float(is_true), device=self.device)
        sum_over_ranks(total)
        return bool(total)

    def _raise_together(self, problem: str) -> None:
        """Raise on all ranks if one has a problem."""
        if self._is_any(bool(problem)):
            self._raise(problem or "Another rank's losses are not its samples' own")

    def _raise(self, what: str) -> None:
        raise SpotCheckError(
            f"model: expected per-sample gradients as plain autograd has them. {what}. A layer "
            "mixes samples or has them elsewhere than the engine sees them; the batch is not "
            "added. Freeze the layers named, or change them so that each sample is treated by "
            "itself."
        )

    @property
    def _tolerance(self) -> float:
        return self._unit**0.5

    @property
    def _unit(self) -> float:
        """Unit roundoff of the coarsest type that the model computes in."""
        capture = self.engine.capture
        assert capture is not None
        types = {p.dtype for p in self.parameters.values()} | capture.dtypes
        return max(_unit_of(dtype, self.device) for dtype in types if dtype.is_floating_point)

    @contextmanager
    def _moved_weights(self, seed: int) -> Iterator[None]:
        """Context in which each weight is moved at random by up to the unit roundoff."""
        generator = torch.Generator(self.device).manual_seed(seed)
        original = {name: as_local(p).clone() for name, p in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                local = as_local(parameter)
                move = torch.rand(local.shape, generator=generator, device=self.device) * 2 - 1
                local.copy_((original[name] * (1 + self._unit * move)).to(local.dtype))
            yield
        finally:
            for name, parameter in self.parameters.items():
                as_local(parameter).copy_(original[name])


def _exponent(size: int) -> int:
    """Exponent of the smallest power of two that is at least `size`."""
    return max(size - 1, 0).bit_length()


def _unit_of(dtype: torch.dtype, device: torch.device) -> float:
    # Models in float64 compute parts in float32: norms, rotary angles, attention scores.
    unit = max(float(torch.finfo(dtype).eps), float(torch.finfo(torch.float32).eps))
    if device.type == "cuda" and dtype == torch.float32:
        # Convolutions round to TensorFloat-32 by default, matrix products if allowed to.
        takes_tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return 2.0**-10 if takes_tf32 else unit
    return unit
