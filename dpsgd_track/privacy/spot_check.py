"""The engine held against plain autograd while it trains: the net under every other guard.

Two things are compared on a batch, in the model's own mode and precision:

- the sum of r_i g_i that the engine forms, with random r_i, against the gradient of
  sum_i r_i loss_i. Gradients that belong to other samples than the engine says, that lack a use of
  a parameter or that depend on several samples' losses come out differently, whatever sizes are
  equal by chance;
- the norms and the clip factor of two samples of the batch, of the largest norm and at random,
  against the gradient of each run alone. A model in which one sample's values reach another's
  gradient, or that depends on the size of the batch, does not pass.

Sums are compared by a random projection of each parameter, so that nothing of the model's size is
kept. A difference counts if it is beyond what rounding explains: a generous tolerance first; where
that is passed, the spread of plain autograd's own result as the weights move by a unit of rounding.

Random numbers of a forward, such as dropout's, are drawn again alike for each comparison in the
mode at hand. A sample alone would draw others, so a model that draws any runs alone in its eval
mode, and its training mode is tried on a batch of copies of the sample.

All ranks check together, on a sample of one rank at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.agreement import Agreement
from dpsgd_track.distributed.ranks import sum_over_ranks, world_size
from dpsgd_track.distributed.sharding import as_local, trainable_parameters
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord, clip_factors
from dpsgd_track.privacy.engine import Engine
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.sample_dim import kept_random_state

_logger = logging.getLogger(__name__)

REPEATED_EVERY = 5
"""Batches 1, 2^5, 2^10, 2^15, ... are checked, whatever else is."""
SUMS_CHECKED = (2,)
"""Batches whose sums are checked: what reorders samples by their values may not have done so in the
first."""
MAX_PATHS = 16
"""Sequences of layer calls that are checked; a model may have a new one in every batch."""

MAX_SINGLES = 8
"""Samples of a batch up to which each one's loss is computed alone."""
MAX_LOSSES_ALONE = 16
"""Samples whose losses are computed again, each from its own logits."""

_FLOOR = 0.01
"""Share of the whole below which a parameter's difference is no matter."""
_NUM_SPREADS, _SPREADS_ALLOWED = 3, 8.0


class SpotCheckError(ValueError):
    """The engine and plain autograd disagree."""


@dataclass
class SpotChecks:
    """What checks have cost so far."""

    num_checks: int = 0
    seconds: float = 0.0
    """Wall time on this rank."""


class SpotCheck:
    """Checks the first batch, each new kind of batch, and others at growing intervals.

    A batch is new, too, where it has more samples than any that was checked, in powers of two: what
    overflows, such as the capacity of an expert, does so there. Batches are of one kind where their
    tensors have the same types and, but for the number of samples, sizes in the same powers of two,
    the same sizes equal to that number, and the model is in the same mode and calls the same layers
    in the same order.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cost = SpotChecks()
        self._agreement = Agreement()
        self._num_batches = 0
        self._kinds: set[object] = set()
        self._most_samples = 0
        """Of a batch that was checked, as an exponent of two."""
        self._paths: set[int] = set()
        self._modules = list(engine.model.modules())
        self._unproven = set(trainable_parameters(engine.model))
        """Parameters whose gradients were 0 in every check so far."""

    @property
    def _is_sharded(self) -> bool:
        capture = self.engine.capture
        return capture is not None and capture.is_sharded

    def before(self, batch: Batch) -> None:
        """Check a batch before it is added, if it is due and nobody else needs to be asked.

        Raises:
            SpotCheckError: naming the parameters whose gradients are not their samples' own.
        """
        self._num_batches += 1
        self._kind = self._kind_of(batch)
        # The same on all ranks, also on one that has had no sample yet.
        is_first = self.cost.num_checks == 0
        self._is_checked = is_first or (not self._is_sharded and self._is_new(batch))
        if self._is_checked:
            self._check(batch)

    def after(self, batch: Batch, record: SampleRecord) -> None:
        """Check a batch that was added, if it is due on any rank; all ranks call it."""
        is_due = self._is_new(batch) or self._is_repeated() or self._is_new_path()
        is_due_anywhere = self._agreement.any(is_due or self._has_new_gradients(record))
        is_early = self._num_batches in SUMS_CHECKED and not self._is_checked
        if is_due_anywhere or is_early:
            try:
                self._check(batch, sums_alone=not is_due_anywhere)
            except torch.OutOfMemoryError:
                # The batch itself was added; another of its kind will be checked.
                _logger.warning("There was no memory left for a spot check.")

    def _kind_of(self, batch: Batch) -> object:
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
        return num_samples == 1, tuple(sizes), tuple(autocast), training

    def _is_new(self, batch: Batch) -> bool:
        is_larger = _exponent(len(batch)) > self._most_samples
        return len(batch) > 0 and (is_larger or self._kind not in self._kinds)

    def _is_repeated(self) -> bool:
        num_batches = self._num_batches
        is_power = num_batches.bit_count() == 1
        return num_batches > 1 and is_power and (num_batches.bit_length() - 1) % REPEATED_EVERY == 0

    def _is_new_path(self) -> bool:
        capture = self.engine.capture
        assert capture is not None
        is_new = capture.path not in self._paths and not self.engine.is_standing_in
        return is_new and len(self._paths) < MAX_PATHS

    def _has_new_gradients(self, record: SampleRecord) -> bool:
        # Weights that start at 0 keep the gradients of others at 0 until they move. To look takes a
        # wait for the device.
        if not self._unproven or self._num_batches.bit_count() > 1 or not len(record.loss_B):
            return False
        norms = record.norm_by_parameter_B or {}
        mine = [norms[name] for name in self._unproven if name in norms]
        return bool(mine) and bool(torch.stack(mine).any())

    def _check(self, batch: Batch, *, sums_alone: bool = False) -> None:
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

    def _compare(self, batch: Batch, *, sums_alone: bool) -> bool:
        """Compare a batch of all ranks; False where that has to wait for another."""
        whole, kept = batch, None
        comparison = _Comparison(self.engine, batch)
        if comparison.has_left_out():
            comparison.compare_left_out()
            losses_B, kept = comparison.record.loss_B, comparison.finite_samples()
            batch = batch.rows(kept)
            # One sample that is left of several shows nothing of how they are treated together.
            self._kind = self._kind_of(batch) if len(batch) else None
            comparison = _Comparison(self.engine, batch)
        if not comparison.is_possible():
            return False
        comparison.compare_sums()
        if sums_alone:
            return True
        capture = self.engine.capture
        assert capture is not None
        self._paths.add(capture.path)
        self._most_samples = max(self._most_samples, _exponent(len(batch)))
        chosen = self.cost.num_checks
        if not comparison.is_random:
            self._unproven -= comparison.compare_samples(chosen)
            comparison.compare_parts()
            if kept is not None:
                comparison.compare_whole(losses_B[kept])
            return True
        comparison.compare_copies(chosen)
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
            self._unproven -= alone.compare_samples(chosen)
            alone.compare_parts()
            if kept is not None:
                alone.compare_whole(_Comparison(self.engine, whole).record.loss_B[kept])
        return True


class _Comparison:
    """One batch of each rank, by the engine and by plain autograd."""

    def __init__(self, engine: Engine, batch: Batch) -> None:
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
        """Whether a forward draws random numbers; known once sums were compared."""
        self._form_sums()

    def is_possible(self) -> bool:
        """False where no rank has a sample, or one is not finite."""
        return self.num_left_out == 0 and any(self.num_samples)

    def has_left_out(self) -> bool:
        """Whether a sample of any rank is not finite."""
        return self.num_left_out > 0

    def finite_samples(self) -> Tensor:
        """Indices of this rank's samples that are finite."""
        left_out = self.record.is_left_out_B
        assert left_out is not None
        return (~left_out).nonzero().flatten()

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
        """The engine's weighted sums against autograd's."""
        wanted, problem, is_random = self._plain_projections()
        self.is_random = self._is_any(is_random)
        self._raise_together(problem)
        norms = self.record.norm_by_parameter_B or {}
        weight_B = self.weight_B[: len(self.batch)].abs()
        scale = self._column(lambda name: (norms[name].float() * weight_B).sum(), norms)
        sum_over_ranks(scale)
        self._hold(
            "sum over the samples, weighted at random",
            self.projections,
            wanted,
            scale,
            lambda: self._plain_projections()[0],
        )

    def compare_samples(self, chosen: int) -> set[str]:
        """Norms and factors of two samples against each run alone.

        Args:
            chosen: which samples, in the order of checks.
        Returns:
            Parameters whose gradient was not 0.
        """
        proven: set[str] = set()
        for rank, index in self._choose(chosen):
            mine = self.batch.sample(index) if rank == self.rank else None

            def norms_alone(mine: Batch | None = mine) -> Tensor:
                return self._norms_alone(mine)

            try:
                wanted = norms_alone()
            except (ValueError, RuntimeError, IndexError) as error:
                if world_size() > 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                # Some layers take no batch of one, such as GroupNorm of a single value.
                _logger.warning("The model does not run on a sample alone: %s", error)
                return proven
            got = self._norms_told(index if rank == self.rank else None)
            proven |= {n for n, norm in zip(self.names, wanted.tolist(), strict=False) if norm}
            which = f"sample {index}" + (f" of rank {rank}" if world_size() > 1 else "")
            self._hold(f"gradient norm of {which}", got, wanted, wanted, norms_alone)
        return proven

    def compare_parts(self) -> None:
        """Losses of all samples against those in smaller batches: of every other sample, or of one
        where there are few."""
        loss_B = torch.zeros_like(self.record.loss_B)
        most = max(self.num_samples)
        num_parts = most if most <= MAX_SINGLES else 2
        for first in range(num_parts):
            part = self.batch.rows(torch.arange(first, len(self.batch), num_parts))
            runs = part if len(part) else self.batch.stand_in()
            with torch.no_grad(), kept_random_state(runs), self.engine.in_rounded_dtype():
                loss_B[first::num_parts] = self.engine.losses(runs)[: len(part)]
        problem = ""
        if len(self.batch):
            problem = self._unlike_losses(self.record.loss_B, loss_B, "in a part of it")
        self._raise_together(problem)

    def compare_left_out(self) -> None:
        """The first and the last sample of each rank that is left out: so is each when alone."""
        left_out_B = self.record.is_left_out_B
        assert left_out_B is not None
        indices = left_out_B.nonzero().flatten() if len(self.batch) else torch.arange(0)
        problem = ""
        for index in (indices[:1], indices[-1:]):
            alone = _Comparison(self.engine, self.batch.rows(index))
            if len(index) and not alone.record.num_left_out:
                problem = f"sample {int(index)}: not finite in its batch, finite alone"
        self._raise_together(problem)

    def compare_whole(self, loss_B: Tensor) -> None:
        """Losses of all samples against theirs in a batch with others, which are left out."""
        problem = ""
        if len(self.batch):
            problem = self._unlike_losses(loss_B, self.record.loss_B, "without those left out")
        self._raise_together(problem)

    def compare_copies(self, chosen: int) -> None:
        """Losses of two samples against those in batches of copies of each.

        Random numbers are the same for a sample in its place.
        """
        for rank, index in self._choose(chosen):
            is_mine = rank == self.rank
            batch = self.batch.copies(index, len(self.batch)) if is_mine else self.batch
            batch = batch if len(batch) else batch.stand_in()
            with torch.no_grad(), kept_random_state(batch), self.engine.in_rounded_dtype():
                before = _random_state(self.device)
                loss_B = self.engine.losses(batch)
                draws = not torch.equal(before, _random_state(self.device))
            problem = ""
            if is_mine and draws:
                got, wanted = self.record.loss_B[index], loss_B[index]
                problem = self._unlike(index, got, wanted, "among copies of itself")
            self._raise_together(problem)

    def _choose(self, chosen: int) -> Iterator[tuple[int, int]]:
        """(rank, index) of the sample with the largest norm of one rank, and of one at random."""
        ranks = [rank for rank, count in enumerate(self.num_samples) if count]
        for turn in range(2):
            rank = ranks[(chosen + turn) % len(ranks)]
            index = 0
            if rank == self.rank:
                assert self.record.norm_B is not None
                index = int(self.record.norm_B.argmax())
                if turn == 1:
                    # Another one, where there is one.
                    generator = torch.Generator().manual_seed(chosen)
                    size = self.num_samples[rank]
                    index += int(torch.randint(max(size - 1, 1), (), generator=generator)) + 1
                    index %= size
            yield rank, index

    def _plain_projections(self) -> tuple[Tensor, str, bool]:
        """Autograd's sums, what is wrong with the losses, and whether the forward is random."""
        with kept_random_state(self.batch):
            before = _random_state(self.device)
            logits, loss_B, gradients = self.engine.plain_gradients(self.batch, self.weight_B)
            is_random = not torch.equal(before, _random_state(self.device))
        problem = self._problem_of_losses(logits, loss_B) if len(self.batch) else ""
        return self._projected(gradients), problem, is_random

    def _projected(self, gradients: dict[str, Tensor]) -> Tensor:
        """Product of each parameter's gradient with a random one, over all ranks."""
        generator = torch.Generator(self.device).manual_seed(self.rank)

        def product(name: str) -> Tensor:
            parameter = self.parameters[name]
            # A parameter that the engine does not know of has no sum.
            gradient = gradients.get(name, torch.zeros_like(as_local(parameter))).flatten()
            other = torch.randn(len(gradient), generator=generator, device=self.device)
            return torch.dot(gradient.double(), other.double())

        products = torch.stack([product(name) for name in self.names])
        sum_over_ranks(products)
        return products / self.engine.sharder.num_copies

    def _norms_alone(self, batch: Batch | None) -> Tensor:
        """Norm of each parameter's gradient, of all, and the clip factor, of one rank's sample."""
        weight = torch.ones(1, device=self.device) * (batch is not None)
        if batch is None:
            batch = self.batch.sample(0) if len(self.batch) else self.batch
        with kept_random_state(batch):
            _, _, gradients = self.engine.plain_gradients(batch, weight)
        squares = torch.stack([gradients[n].double().square().sum() for n in self.names])
        sum_over_ranks(squares)
        return self._with_total((squares / self.engine.sharder.num_copies).sqrt())

    def _norms_told(self, index: int | None) -> Tensor:
        """The same as the engine has recorded them."""
        told = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=self.device)
        if index is not None:
            record = self.record
            assert record.norm_B is not None
            assert record.clip_factor_B is not None
            norms = record.norm_by_parameter_B or {}
            told[:-2] = self._column(lambda name: norms[name][index], norms)
            told[-2], told[-1] = record.norm_B[index], record.clip_factor_B[index]
        sum_over_ranks(told)
        return told

    def _with_total(self, norms: Tensor) -> Tensor:
        total = norms.square().sum().sqrt()
        factor = clip_factors(total, self.engine.max_grad_norm)
        return torch.cat([norms, total[None], factor[None]])

    def _column(self, value: Callable[[str], Tensor], there: Container[str]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack([value(n).double() if n in there else zero for n in self.names])

    def _hold(
        self, what: str, got: Tensor, wanted: Tensor, scale: Tensor, again: Callable[[], Tensor]
    ) -> None:
        """Raise where `got` is not `wanted`, up to rounding at that scale."""
        num = len(self.names)
        whole = scale[:num].square().sum().sqrt()
        allowed = self._tolerance * (scale + _FLOOR * whole) + _FLOOR * self._unit
        allowed[num + 1 :] = self._tolerance * scale[num + 1 :]
        is_near = (got - wanted).abs() <= allowed
        if bool(is_near.all()):
            return
        for seed in range(_NUM_SPREADS):
            with self._moved_weights(seed):
                spread = (again() - wanted).abs()
            allowed = torch.maximum(allowed, _SPREADS_ALLOWED * spread)
        off = (got - wanted).abs() / allowed.clamp(min=1e-300)
        is_near = (got - wanted).abs() <= allowed
        if bool(is_near.all()):
            return
        labels = [*self.names, "all parameters", "clip factor"]
        worst = sorted(
            (i for i, near in enumerate(is_near.tolist()) if not near), key=lambda i: -off[i]
        )
        named = "; ".join(
            f"{labels[i]} {float(got[i]):.6g} by the engine, {float(wanted[i]):.6g} by autograd"
            for i in worst[:5]
        )
        more = f" (and {len(worst) - 5} more)" if len(worst) > 5 else ""
        self._raise(f"{what}: {named}{more}")

    def _problem_of_losses(self, logits: Tensor, loss_B: Tensor) -> str:
        """What is wrong where losses are not the model's, or depend on other samples' logits."""
        told_B = self.record.loss_B
        problem = self._unlike_losses(told_B, loss_B, "without the engine")
        if problem:
            return problem
        if len(logits) != len(self.batch):
            return ""
        step = -(-len(self.batch) // MAX_LOSSES_ALONE)
        for index in range(0, len(self.batch), step):
            sample = self.batch.sample(index)
            with torch.no_grad():
                (alone,) = self.engine.loss(logits[index : index + 1], sample.targets)
            problem = self._unlike(index, loss_B[index], alone, "by its own logits alone")
            if problem:
                return problem
        return ""

    def _unlike_losses(self, got_B: Tensor, wanted_B: Tensor, where: str) -> str:
        worst = int((got_B - wanted_B).abs().argmax())
        return self._unlike(worst, got_B[worst], wanted_B[worst], where)

    def _unlike(self, index: int, got: Tensor, wanted: Tensor, where: str) -> str:
        if abs(float(got) - float(wanted)) <= self._tolerance * (abs(float(wanted)) + 1):
            return ""
        return f"loss of sample {index}: {float(got):.6g} in its batch, {float(wanted):.6g} {where}"

    def _is_any(self, is_so: bool) -> bool:
        """Whether it is so on any rank."""
        total = torch.tensor(float(is_so), device=self.device)
        sum_over_ranks(total)
        return bool(total)

    def _raise_together(self, problem: str) -> None:
        """Raise on all ranks where one has found a problem."""
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
        """Unit of rounding of the coarsest type that the model computes in."""
        capture = self.engine.capture
        assert capture is not None
        types = {p.dtype for p in self.parameters.values()} | capture.dtypes
        return max(_unit_of(dtype, self.device) for dtype in types if dtype.is_floating_point)

    @contextmanager
    def _moved_weights(self, seed: int) -> Iterator[None]:
        """Within it every weight is off by up to a unit of rounding."""
        generator = torch.Generator(self.device).manual_seed(seed)
        held = {name: as_local(p).clone() for name, p in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                local = as_local(parameter)
                move = torch.rand(local.shape, generator=generator, device=self.device) * 2 - 1
                local.copy_((held[name] * (1 + self._unit * move)).to(local.dtype))
            yield
        finally:
            for name, parameter in self.parameters.items():
                as_local(parameter).copy_(held[name])


def _exponent(size: int) -> int:
    """That of the least power of two which is not below `size`."""
    return max(size - 1, 0).bit_length()


def _unit_of(dtype: torch.dtype, device: torch.device) -> float:
    # Models in float64 compute parts in float32: norms, rotary angles, attention's scores.
    unit = max(float(torch.finfo(dtype).eps), float(torch.finfo(torch.float32).eps))
    if device.type == "cuda" and dtype == torch.float32:
        # Convolutions round to TensorFloat-32 unless told otherwise, products if told to.
        takes_tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return 2.0**-10 if takes_tf32 else unit
    return unit


def _random_state(device: torch.device) -> Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
