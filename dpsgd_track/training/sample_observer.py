"""Records of each sample's gradient in the reference, with which the comparison explains errors.

Legend: N samples, P trainable parameters, K projections, V wrong norms, F wrong losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, norm_and_sketch
from dpsgd_track.modes.protocol import SampleRun
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import PerSampleLoss
from dpsgd_track.record.alternatives import LossFormula, NormFormula
from dpsgd_track.record.parts import MOST_POSITIONS, NUM_SQUARES, NUM_SUM_PARTS
from dpsgd_track.training.gradient_parts import GradientParts
from dpsgd_track.training.layer_calls import LayerCalls, Share
from dpsgd_track.training.norm_formulas import NORM_PLACES, formulas
from dpsgd_track.training.other_losses import other_losses
from dpsgd_track.training.target_losses import target_losses
from dpsgd_track.training.wrong_gradients import other_inputs, wrong_gradients
from dpsgd_track.training.wrong_sums import WrongSums

Floats = NDArray[np.float64]
MOST_KEPT = 1 << 16
"""Parameters of the largest model of which samples are kept, to be mistaken for later ones."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Records of N samples."""

    sketch: Floats
    """[N, P, 2 K] projections of the gradients, and of their ranks' rows."""
    other_norm: Floats
    """[N, P, V] value of each `NormFormula`."""
    other_loss: Floats
    """[N, F] value of each `LossFormula`."""
    part_square: Floats
    """[N, P, X] squares of the gradients by part; X is 0 of a large model."""
    target_loss: Floats
    """[N, T] loss of each target; NaN of positions without one."""


@dataclass
class _MicroBatch:
    """The samples of one micro-batch so far."""

    shares: list[Mapping[str, list[Share]]] = field(default_factory=list)
    gradients: list[Mapping[str, Tensor]] = field(default_factory=list)
    batch: Batch | None = None

    def __len__(self) -> int:
        return len(self.gradients)

    @property
    def size(self) -> int:
        """Samples of the whole micro-batch."""
        return 0 if self.batch is None else len(self.batch)


class SampleObserver:
    """Projections of each sample's gradient, its norms by wrong formulas, and wrong sums of it."""

    def __init__(self) -> None:
        self._calls: LayerCalls | None = None
        self._num_parameters = self._num_tokens = 0
        self._keeps_samples = False
        self._sketches: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._target_losses: list[Tensor] = []
        self._parts = GradientParts()
        self._sums = WrongSums()
        self._now, self._before = _MicroBatch(), _MicroBatch()
        self._of_last_step = _MicroBatch()
        self._first: Batch | None = None
        """The step's first micro-batch that has samples."""

    def watch(self, model: nn.Module) -> None:
        """Note the calls of the layers of `model`."""
        self._calls = LayerCalls(model)
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        self._num_tokens = tables[0].num_embeddings if tables else 0
        trained = [p for _, p in model.named_parameters() if p.requires_grad]
        self._num_parameters = len(trained)
        self._keeps_samples = sum(p.numel() for p in trained) <= MOST_KEPT

    def outputs(self) -> list[Tensor]:
        """Outputs of the layers in the sample's forward."""
        return self._calls.outputs if self._calls else []

    def see(self, gradients: Mapping[str, Tensor], output_gradients: Sequence[Tensor]) -> None:
        """Record one sample's gradient.

        Args:
            gradients: by parameter.
            output_gradients: of `outputs`.
        """
        assert self._calls is not None, "the model is watched before its first sample"
        # Thousands of operations on small tensors, each of which a GPU would wait for.
        gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
        shares = self._calls.shares(output_gradients)
        self._calls.clear()
        place, now, before = len(self._now), self._now, self._before
        others = other_inputs(
            shares,
            before=now.shares[-1] if now.shares else None,
            batch_before=before.shares[place] if place < len(before.shares) else None,
            is_as_large=now.size == before.size,
        )
        wrong = {
            name: wrong_gradients(name, gradient, shares.get(name, ()), others)
            for name, gradient in gradients.items()
        }
        self._sums.see(gradients, shares, wrong)
        self._sketches.append(torch.stack([_sketch(n, g) for n, g in gradients.items()]))
        norms = [formulas(g, shares.get(n, ()), wrong[n]) for n, g in gradients.items()]
        self._norms.append(torch.stack(norms))
        now.gradients.append(gradients if self._keeps_samples else {})
        if self._keeps_samples:
            now.shares.append(shares)
            self._note_added(place)
            known = {name: shares.get(name, ()) for name in gradients if wrong[name]}
            self._squares.append(self._parts.see(gradients, known))

    def _note_added(self, place: int) -> None:
        """Record the norms of the last sample's gradient with another's added."""
        now, before = self._now.gradients, self._before.gradients
        others = {NormFormula.ADDED_TO_BEFORE: now[place - 1] if place else None}
        others[NormFormula.ADDED_TO_BATCH_BEFORE] = before[place] if place < len(before) else None
        for formula, other in others.items():
            if other:
                added = [(g + other[name]).norm() for name, g in now[place].items()]
                self._norms[-1][:, NORM_PLACES[formula]] = torch.stack(added).double()

    def weigh(self, factors: Sequence[Tensor]) -> None:
        """Add the sample that was seen last to the sums.

        Args:
            factors: by parameter; 0 of a sample that is left out.
        """
        of_parameters = [float(factor) for factor in factors]
        self._sums.weigh(of_parameters)
        if self._keeps_samples:
            self._parts.weigh(of_parameters)

    def end_batch(self) -> None:
        """The samples seen since the last call are one micro-batch."""
        now = self._now
        if now.gradients and self._keeps_samples:
            totals = {n: sum(g[n] for g in now.gradients) for n in now.gradients[0]}
            of_sum = torch.stack([torch.as_tensor(t).norm() for t in totals.values()]).double()
            for norms in self._norms[-len(now) :]:
                norms[:, NORM_PLACES[NormFormula.OF_SUM]] = of_sum
                norms[:, NORM_PLACES[NormFormula.OF_MEAN]] = of_sum / len(now)
        self._sums.end_batch()
        self._before, self._now = now, _MicroBatch()

    def see_losses(self, loss: PerSampleLoss, batch: Batch, index: int, run: SampleRun) -> None:
        """Record a sample's wrong losses."""
        self._now.batch = batch
        before, tokens = self._before.batch, self._num_tokens
        self._first = self._first or batch
        values = other_losses(
            loss, batch, index, run, before=before, first=self._first, num_tokens=tokens
        )
        self._losses.append(values)
        sample = batch.sample(index)
        self._target_losses.append(target_losses(loss, sample, run))

    def discard(self) -> None:
        """Forget what was seen since the last `take`."""
        before = self._of_last_step
        self.take()
        self._before = self._of_last_step = before

    def sums(self) -> WrongSums:
        """Wrong clipped sums of this rank's samples since the last call of `take`."""
        return self._sums

    def part_sketches(self, names: Sequence[str], device: torch.device) -> Floats:
        """[M, P, K] projections of the parts of all ranks' clipped sums; K is 0 of a large model.

        Args:
            names: of all parameters.
        """
        if not self._keeps_samples:
            return np.empty((NUM_SUM_PARTS, len(names), 0))
        return self._parts.sketches(names, device)

    def take(self) -> Observed:
        """Records since the last call."""
        N, P, X = len(self._losses), self._num_parameters, NUM_SQUARES if self._keeps_samples else 0
        observed = Observed(
            sketch=_taken(self._sketches, P, 2 * NUM_PROJECTIONS),
            other_norm=_taken(self._norms, P, len(NormFormula)),
            other_loss=_taken(self._losses, len(LossFormula)),
            part_square=_taken(self._squares, P, X) if X else np.empty((N, P, 0)),
            target_loss=_taken(self._target_losses, MOST_POSITIONS),
        )
        self._sums, self._first, self._parts = WrongSums(), None, GradientParts()
        self._now, self._of_last_step = _MicroBatch(), self._before
        return observed


def _taken(values: list[Tensor], *shape: int) -> Floats:
    """[N, *shape] what was kept of each sample, which is forgotten.

    Of a large model some is kept of no sample, and has no elements.
    """
    taken = torch.stack(values).double().numpy() if values else np.empty((0, *shape))
    values.clear()
    return taken


def _sketch(name: str, gradient: Tensor) -> Tensor:
    """[2 K] projections of a gradient: of the whole, and of this rank's rows if it were sharded."""
    first, last = row_range(len(gradient), dist.get_rank(), dist.get_world_size())
    start = first * gradient[0].numel()
    whole = norm_and_sketch(name, gradient, 0, gradient.numel())
    own = norm_and_sketch(name, gradient[first:last], start, gradient.numel())
    return torch.cat([whole[1:], own[1:]])
