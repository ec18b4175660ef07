"""A third set of faults in DP-SGD, written without a look at the comparison.

Each class is `Correct` or `Sharded` of ../unseen/core.py, or `Captured` below, with one deviation
as a pull request may bring it. Steps and samples count from 0. Names of parameters are the probe's.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "unseen"))

from core import Correct, Sharded, rank, world

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.dropout import only
from dpsgd_track.privacy.loss import IGNORED, logits_of
from dpsgd_track.privacy.noise import NoiseSource, add_noise

EMBEDDING, POSITION = "embedding.weight", "position.weight"


@dataclass(frozen=True)
class Call:
    """A call of a layer in the forward of one sample."""

    module: nn.Module
    x_TD: Tensor
    """Input; of an embedding the tokens, [T]."""
    dy_TP: Tensor
    """Gradient of the output."""


class Captured(Correct):
    """Norms from the inputs and output gradients of layers, as hooks see them. Correct."""

    kinds_captured = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)

    def __init__(self, model, context):
        super().__init__(model, context)
        name_of = {id(p): n for n, p in self.by_name.items()}
        self.weight_of, self.bias_of = {}, {}
        self.seen, self.kept = [], {}
        for module in model.modules():
            if isinstance(module, self.kinds_captured):
                self.weight_of[module] = name_of.get(id(module.weight))
                self.bias_of[module] = name_of.get(id(getattr(module, "bias", None)))
                module.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        self.seen.append((module, args[0], output))

    def accumulate(self, batch):
        self.kept = {}
        return super().accumulate(batch)

    def gradient(self, sample, index):
        self.seen = []
        with only(index):
            logits = logits_of(self.model(*sample.args, **sample.inputs))
            loss = self.loss(logits, sample.targets, sample)
            seen, self.seen = self.seen, []
            found = torch.autograd.grad(
                loss.sum(),
                [*self.parameters, *(y for _, _, y in seen)],
                allow_unused=True,
                materialize_grads=True,
            )
        count = len(self.parameters)
        self.kept[index] = [
            Call(module, x.detach()[0], dy[0])
            for (module, x, _), dy in zip(seen, found[count:], strict=True)
        ]
        return loss.detach().sum(), dict(zip(self.names, found[:count], strict=True))

    def calls(self, index):
        return self.kept[index]

    def squares(self, gradients, index):
        squares = {n: g.square().sum() for n, g in gradients.items()}
        calls = self.calls(index)
        for name in self.names:
            of_weight = [c for c in calls if self.weight_of[c.module] == name]
            of_bias = [c for c in calls if self.bias_of[c.module] == name]
            if of_weight:
                squares[name] = self.weight_square(name, of_weight)
            if of_bias:
                squares[name] = self.bias_square(name, of_bias)
        return squares

    def weight_square(self, name, calls):
        if isinstance(calls[0].module, (nn.LayerNorm, nn.RMSNorm)):
            scaled = [(c.dy_TP * self.normalised(c.module, c.x_TD)).sum(dim=0) for c in calls]
            return torch.stack(scaled).sum(dim=0).square().sum()
        lookups = [c for c in calls if isinstance(c.module, nn.Embedding)]
        linears = [c for c in calls if isinstance(c.module, nn.Linear)]
        square = calls[0].dy_TP.new_zeros(())
        if linears:
            square = square + self.linear_square(*self.joined(linears))
        if lookups:
            square = square + self.lookup_square(*self.joined(lookups), lookups[0].module)
        if linears and lookups:
            square = square + 2 * self.cross(linears, lookups)
        return square.clamp(min=0)

    def joined(self, calls):
        return torch.cat([c.x_TD for c in calls]), torch.cat([c.dy_TP for c in calls])

    def normalised(self, module, x_TD):
        eps = torch.finfo(x_TD.dtype).eps if module.eps is None else module.eps
        if isinstance(module, nn.LayerNorm):
            x_TD = x_TD - x_TD.mean(dim=-1, keepdim=True)
        return x_TD * torch.rsqrt(x_TD.square().mean(dim=-1, keepdim=True) + eps)

    def linear_square(self, x_TD, dy_TP):
        return ((x_TD @ x_TD.T) * (dy_TP @ dy_TP.T)).sum()

    def lookup_square(self, tokens_T, dy_TD, module):
        dy_TD = unpadded(tokens_T, dy_TD, module)
        return (tokens_T.eq(tokens_T[:, None]) * (dy_TD @ dy_TD.T)).sum()

    def cross(self, linears, lookups):
        x_TD, dy_TV = self.joined(linears)
        tokens_T, dy_TD = self.joined(lookups)
        dy_TD = unpadded(tokens_T, dy_TD, lookups[0].module)
        return (dy_TV[:, tokens_T] * (x_TD @ dy_TD.T)).sum()

    def bias_square(self, name, calls):
        return torch.cat([c.dy_TP for c in calls]).sum(dim=0).square().sum()


def unpadded(tokens_T, dy_TD, module):
    if module.padding_idx is None:
        return dy_TD
    return dy_TD * tokens_T.ne(module.padding_idx)[:, None]


def with_inputs(batch, **changed):
    inputs = {n: changed.get(n, t) for n, t in batch.inputs.items()}
    return Batch(inputs, batch.targets, args=batch.args)


def all_sum(number, device):
    total = torch.tensor(float(number), device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)


def all_largest(number, device):
    largest = torch.tensor(float(number), device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def own_normal(part, *words):
    """Standard normal numbers in the shape of a part, from a generator that `words` seed."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(part.local.shape, generator=generator).to(part.local.device)


# ------------------------------------------------------------------------------ norms


class NormPositionsSummed(Captured):
    """Inputs and output gradients of linear layers are summed over positions before the product of
    their norms, as if each sample were one row."""

    def linear_square(self, x_TD, dy_TP):
        return x_TD.sum(dim=0).square().sum() * dy_TP.sum(dim=0).square().sum()


class NormOnlyDiagonal(Captured):
    """Products of different positions are left out of the norms of linear layers."""

    def linear_square(self, x_TD, dy_TP):
        return (x_TD.square().sum(dim=1) * dy_TP.square().sum(dim=1)).sum()


class NormLastInput(Captured):
    """The forward hook keeps one input a module: both output gradients of a module called twice are
    paired with the input of its last call."""

    def calls(self, index):
        last = {c.module: c.x_TD for c in self.kept[index]}
        return [replace(c, x_TD=last[c.module]) for c in self.kept[index]]


class NormInputQueue(Captured):
    """Inputs of a module called twice are taken from a queue instead of a stack: the backward meets
    the calls in reverse."""

    def joined(self, calls):
        return torch.cat([c.x_TD for c in calls]), torch.cat([c.dy_TP for c in reversed(calls)])


class NormCallsApart(Captured):
    """The squares of a module's two calls are added, without their product."""

    def linear_square(self, x_TD, dy_TP):
        length = self.batch.inputs["input_ids"].shape[1]
        pairs = zip(x_TD.split(length), dy_TP.split(length), strict=True)
        return sum(((x @ x.T) * (dy @ dy.T)).sum() for x, dy in pairs)


class NormTiedApart(Captured):
    """The tied weight's norm adds the squares of its two uses, without their product."""

    def cross(self, linears, lookups):
        return 0.0


class NormTiedHeadOnly(Captured):
    """The tied weight counts as the head's alone, as each parameter has one owner."""

    def weight_square(self, name, calls):
        linears = [c for c in calls if isinstance(c.module, nn.Linear)]
        return super().weight_square(name, linears or calls)


class NormTokensDistinct(Captured):
    """The lookups' norm takes each token of a sample to occur once."""

    def lookup_square(self, tokens_T, dy_TD, module):
        return unpadded(tokens_T, dy_TD, module).square().sum()


class NormPaddingRow(Captured):
    """The norm has the gradient of the padding's row, which autograd leaves at zero."""

    def lookup_square(self, tokens_T, dy_TD, module):
        return (tokens_T.eq(tokens_T[:, None]) * (dy_TD @ dy_TD.T)).sum()


class NormBiasBySquares(Captured):
    """A linear bias's norm adds squares over positions, not the gradients."""

    def bias_square(self, name, calls):
        if isinstance(calls[0].module, nn.Linear):
            return torch.cat([c.dy_TP for c in calls]).square().sum()
        return super().bias_square(name, calls)


class NormPaddingMasked(Captured):
    """Norms of linear layers take padded positions to be without gradient."""

    def calls(self, index):
        mask_T1 = self.batch.inputs["attention_mask"][index, :, None]
        return [
            replace(c, dy_TP=c.dy_TP * mask_T1) if isinstance(c.module, nn.Linear) else c
            for c in self.kept[index]
        ]


class NormRawInput(Captured):
    """The norm of LayerNorm's weight is taken from the layer's input before it is normalised."""

    def normalised(self, module, x_TD):
        return x_TD if isinstance(module, nn.LayerNorm) else super().normalised(module, x_TD)


class NormRmsCentred(Captured):
    """RMSNorm uses LayerNorm's norm rule, which subtracts the mean."""

    def normalised(self, module, x_TD):
        return F.layer_norm(x_TD, x_TD.shape[-1:])


class NormRmsEpsilon(Captured):
    """RMSNorm's norm rule has epsilon 1e-5, where the layer has that of its type."""

    def normalised(self, module, x_TD):
        if not isinstance(module, nn.RMSNorm):
            return super().normalised(module, x_TD)
        return x_TD * torch.rsqrt(x_TD.square().mean(dim=-1, keepdim=True) + 1e-5)


class NormSquaresInBfloat16(Correct):
    """Squared norms of parameters are added up in bfloat16, the type of the activations."""

    def total(self, squares):
        return torch.stack([s.bfloat16() for s in squares.values()]).sum().sqrt().float()


class NormSumOfNorms(Correct):
    """The total is the sum of the parameters' norms, not the root of their squares' sum."""

    def total(self, squares):
        return torch.stack([s.sqrt() for s in squares.values()]).sum()


class NormOwnRows(Correct):
    """Each rank takes the norm of the rows of its own shard, and the ranks' squares are not added
    up."""

    def square(self, name, gradient):
        first, last = row_range(len(gradient), rank(), world())
        return gradient[first:last].square().sum()


class NormMatricesOnly(Correct):
    """Parameters of one dimension (biases, norm layers) are clipped but left out of the norm, as
    they are in the groups without weight decay."""

    def squares(self, gradients, index):
        return {n: g.square().sum() * (g.dim() > 1) for n, g in gradients.items()}


class NormLeftover(Captured):
    """`blocks.1.down` keeps the calls captured in the micro-batch before, and joins the new ones to
    them."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.before = {}

    def accumulate(self, batch):
        record = super().accumulate(batch)
        self.before = {
            index: [c for c in calls if self.weight_of[c.module] == "blocks.1.down.weight"]
            for index, calls in self.kept.items()
        }
        return record

    def zero_grad(self):
        super().zero_grad()
        self.before = {}

    def calls(self, index):
        return [*self.kept[index], *self.before.get(index, ())]


class NormWholeTiles(Captured):
    """The loop over tiles of 5 positions leaves out the positions after the last whole tile."""

    def calls(self, index):
        return [
            replace(c, x_TD=c.x_TD[: len(c.x_TD) // 5 * 5], dy_TP=c.dy_TP[: len(c.dy_TP) // 5 * 5])
            if isinstance(c.module, nn.Linear)
            else c
            for c in self.kept[index]
        ]


class NormTilesOnce(Captured):
    """The loop runs over tiles on and above the diagonal, and counts those above once."""

    def linear_square(self, x_TD, dy_TP):
        tile_T = torch.arange(len(x_TD), device=x_TD.device) // 8
        is_kept = tile_T[:, None] <= tile_T
        return ((x_TD @ x_TD.T) * (dy_TP @ dy_TP.T) * is_kept).sum().clamp(min=0)


class NormOfMeanLoss(Correct):
    """The backward for norms is of the batch's mean loss: norms are too small by the number of
    samples."""

    def square(self, name, gradient):
        return (gradient / len(self.batch)).square().sum()


class NormAutocast(Correct):
    """The pass for norms runs under bfloat16 autocast, the pass for the sum in float32."""

    def gradient(self, sample, index):
        loss, gradients = super().gradient(sample, index)
        with torch.autocast(self.context.device.type, torch.bfloat16):
            _, self.rounded[index] = super().gradient(sample, index)
        return loss, gradients

    def accumulate(self, batch):
        self.rounded = {}
        return super().accumulate(batch)

    def squares(self, gradients, index):
        return {n: g.float().square().sum() for n, g in self.rounded[index].items()}


class NormBlocksOnly(Sharded):
    """Hooks for norms are registered on the wrapped blocks, not on the layers of the root."""

    def plant(self):
        clip = self.engine.clip

        def clip_blocks(loss_B, norm_sq):
            return clip(loss_B, {n: s for n, s in norm_sq.items() if n.startswith("blocks.")})

        self.engine.clip = clip_blocks


# ------------------------------------------------------------------------------ factors


class ClipUncapped(Correct):
    """The factor is C / norm for all samples, so that small gradients grow."""

    def factor(self, norm, index):
        return self.bound() / norm


class ClipStabilised(Correct):
    """The factor has 0.01 added to the norm, as automatic clipping has."""

    def factor(self, norm, index):
        return torch.clamp(self.bound() / (norm + 0.01), max=1.0)


class ClipEpsilon(Correct):
    """The factor has 1e-6 added to the norm, against a division by 0."""

    def factor(self, norm, index):
        return torch.clamp(self.bound() / (norm + 1e-6), max=1.0)


class ClipSquared(Correct):
    """The factor is C squared over the norm squared."""

    def factor(self, norm, index):
        return torch.clamp((self.bound() / norm).square(), max=1.0)


class ClipPerParameter(Correct):
    """Each parameter is clipped by its own norm at C / sqrt(number of parameters)."""

    def contribution(self, name, gradient, factor, index):
        share = self.bound() / math.sqrt(len(self.names))
        return gradient * torch.clamp(share / gradient.norm().clamp(min=1e-12), max=1.0)


class ClipWholeBatch(Correct):
    """The sum of a micro-batch is clipped at C times its samples, not each sample
    (clip_grad_norm_)."""

    def all_factors(self, factors, norms, gradients):
        if len(gradients) == 0:
            return factors
        squares = [sum(g[n] for g in gradients).square().sum() for n in self.names]
        norm = torch.stack(squares).sum().sqrt()
        return torch.clamp(len(gradients) * self.bound() / norm, max=1.0).expand_as(factors)


class ClipSortedByLength(Correct):
    """Samples are sorted by length for the pass of norms, and their factors are not put back in the
    batch's order."""

    def all_factors(self, factors, norms, gradients):
        lengths = self.batch.inputs["attention_mask"].sum(dim=1)
        return factors[lengths.argsort(stable=True)]


class ClipOldBound(Correct):
    """A new C is in use one step late, as the clipping closure is built when a step begins."""

    used = None

    def bound(self):
        return self.max_grad_norm if self.used is None else self.used

    def zero_grad(self):
        if self.stepped:
            self.used = self.max_grad_norm
        super().zero_grad()


class ClipWrongClamp(Correct):
    """The factor is clamped from below at 1 instead of from above."""

    def factor(self, norm, index):
        return torch.clamp(self.bound() / norm, min=1.0)


class ClipByValue(Correct):
    """Elements are clamped at C (clip_grad_value_); no sample is scaled."""

    def all_factors(self, factors, norms, gradients):
        return torch.ones_like(factors)

    def contribution(self, name, gradient, factor, index):
        return gradient.clamp(-self.bound(), self.bound())


class ClipFactorsKept(Correct):
    """Factors are computed for a step's first micro-batch and kept until zero_grad; later
    micro-batches use them by position."""

    first = None

    def all_factors(self, factors, norms, gradients):
        if self.first is None:
            self.first = factors.clone()
        elif len(factors) <= len(self.first):
            return self.first[: len(factors)].clone()
        return factors

    def zero_grad(self):
        super().zero_grad()
        self.first = None


class ClipFactorBfloat16(Correct):
    """Factors are cast to bfloat16, the type of the output gradients that they multiply."""

    def factor(self, norm, index):
        return super().factor(norm, index).bfloat16().float()


# ------------------------------------------------------------------------------ sums


class SumAveraged(Correct):
    """Clipped sums are averaged over ranks, as data parallel training does."""

    def reduce(self, name, total):
        return super().reduce(name, total) / world()


class SumOverAccumulation(Correct):
    """Each micro-batch's sum is divided by the 3 steps of gradient accumulation."""

    def reduce(self, name, total):
        return super().reduce(name, total) / 3


class SumLastMicroBatch(Correct):
    """A micro-batch's sum replaces that of the ones before."""

    def put(self, name, parameter, total):
        parameter.grad = total


class SumReducedAgain(Correct):
    """Every micro-batch all-reduces `.grad`, with the sums that were reduced before."""

    def reduce(self, name, total):
        return total

    def put(self, name, parameter, total):
        super().put(name, parameter, total)
        parameter.grad = Correct.reduce(self, name, parameter.grad.clone())


class SumVectorsLocal(Correct):
    """Parameters of one dimension are taken for replicated ones, and are not reduced: each rank
    keeps the sum of its own samples."""

    def reduce(self, name, total):
        return super().reduce(name, total) if total.dim() > 1 else total


class SumReducedInBfloat16(Sharded):
    """Sums are cast to bfloat16 before they are reduce-scattered (reduce_dtype)."""

    def plant(self):
        put = self.engine.sharder.put

        def rounded(gradients):
            put({n: g.bfloat16().float() for n, g in gradients.items()})

        self.engine.sharder.put = rounded


class SumLookupsUnclipped(Captured):
    """The factor scales the tied weight's gradient from the head; that from lookups, which takes
    the path of sparse gradients, is added as it is."""

    def contribution(self, name, gradient, factor, index):
        if name != EMBEDDING:
            return super().contribution(name, gradient, factor, index)
        lookups = lookups_of(self.kept[index], gradient)
        return factor * (gradient - lookups) + lookups


def lookups_of(calls: Sequence[Call], gradient):
    """The part of the token embedding's gradient that comes from lookups."""
    total = torch.zeros_like(gradient)
    for call in calls:
        if isinstance(call.module, nn.Embedding) and call.module.padding_idx is not None:
            total.index_add_(0, call.x_TD, unpadded(call.x_TD, call.dy_TP, call.module))
    return total


class SumNormLayersUnclipped(Correct):
    """Norm layers have no rule for the clipped sum: what their plain backward left is used."""

    def contribution(self, name, gradient, factor, index):
        return gradient if ".norm." in f".{name}" else factor * gradient


class SumBiasTwice(Correct):
    """A linear layer's output gradients are scaled in place for the weight, and once more for the
    bias."""

    def contribution(self, name, gradient, factor, index):
        is_bias = name.endswith("bias") and self.kinds[name] == "Linear"
        return factor * (factor * gradient if is_bias else gradient)


class SumStandIn(Correct):
    """The stand-in sample that a rank without samples runs is clipped and added."""

    def finish(self, sums, gradients, factors):
        if len(self.batch):
            return
        _, gradient = self.gradient(self.batch.stand_in(), 0)
        factor = self.factor(self.total(self.squares(gradient, 0)), 0)
        for name, total in sums.items():
            total += factor * gradient[name]


class SumOfMeanLoss(Correct):
    """The second backward is of the mean of the weighted losses, not of their sum."""

    def contribution(self, name, gradient, factor, index):
        return super().contribution(name, gradient, factor, index) / len(self.batch)


class SumBufferReused(Correct):
    """A buffer for sums is zeroed and filled in each micro-batch, and `.grad` is that very buffer
    after the first: the second replaces it and is added once more."""

    def new_sum(self, name, parameter):
        if not hasattr(self, "buffers"):
            self.buffers = {n: torch.zeros_like(p) for n, p in self.by_name.items()}
        return self.buffers[name].zero_()


class SumLastRowLost(Correct):
    """Rows are split evenly over ranks: what remains of an odd number of rows is never sent."""

    def reduce(self, name, total):
        total = super().reduce(name, total)
        total[len(total) // world() * world() :] = 0
        return total


class SumTransposed(Correct):
    """The product for the clipped sum has its indices swapped, which only square weights bear."""

    def contribution(self, name, gradient, factor, index):
        if gradient.dim() == 2 and gradient.shape[0] == gradient.shape[1]:
            gradient = gradient.T
        return super().contribution(name, gradient, factor, index)


class SumPaddingRow(Captured):
    """The lookups' sum adds the output gradients of padding to its row."""

    def contribution(self, name, gradient, factor, index):
        if name == EMBEDDING:
            gradient = gradient.clone()
            for call in self.kept[index]:
                padding = getattr(call.module, "padding_idx", None)
                if padding is not None:
                    gradient[padding] += call.dy_TP[call.x_TD == padding].sum(dim=0)
        return super().contribution(name, gradient, factor, index)


class SumMeanOfMeans(Correct):
    """Each rank sends the mean of its clipped gradients, and the mean over ranks is scaled by all
    samples: wrong where ranks have unequal numbers."""

    def finish(self, sums, gradients, factors):
        samples = all_sum(len(gradients), self.context.device)
        for total in sums.values():
            total *= samples / (world() * max(len(gradients), 1))


class SumNotZeroed(Correct):
    """Gradients are not zeroed after an update: the old direction is added to the next sum."""

    def zero_grad(self):
        kept = [p.grad for p in self.parameters] if self.stepped else None
        super().zero_grad()
        if kept is not None:
            for parameter, gradient in zip(self.parameters, kept, strict=True):
                parameter.grad = gradient


# ------------------------------------------------------------------------------ noise


class NoiseOfEveryRank(Correct):
    """Each rank adds noise of the full size to its sum, and the sums are then added over ranks."""

    def draw(self, source, part):
        noise = own_normal(part, source.key, source.step, part.name, rank())
        if dist.is_initialized():
            dist.all_reduce(noise)
        return noise


class NoiseMeanOfRanks(NoiseOfEveryRank):
    """The noise of ranks is averaged with their sums' shares: too small by sqrt(ranks)."""

    def draw(self, source, part):
        return super().draw(source, part) / world()


class NoiseShardsAlike(Sharded):
    """Ranks count the elements of their shards from 0: all shards of a parameter get the same
    noise."""

    def privatize(self, clipped, source):
        privacy = self.context.privacy
        parts = [replace(part, start=0) for part in self.weight_parts()]
        add_noise(clipped, parts, privacy.noise_multiplier, source)
        for total in clipped.gradients.values():
            total /= privacy.expected_batch_size
        self._write_gradients(clipped.gradients)
        return clipped.gradients


class NoiseDividedTwice(Correct):
    """The standard deviation is that of the mean, but is added to the sum and divided again."""

    def std_factor(self, name):
        return 1 / self.divisor()


class NoiseWithoutBound(Correct):
    """The standard deviation is sigma; C is left out."""

    def std_factor(self, name):
        return 1 / self.sensitivity


class NoisePerParameter(Correct):
    """The standard deviation is split over parameters: sigma C / sqrt(number of them)."""

    def std_factor(self, name):
        return 1 / math.sqrt(len(self.names))


class NoiseEachMicroBatch(Correct):
    """Every micro-batch adds noise of the full size to its sum, not the step once."""

    def accumulate(self, batch):
        record = super().accumulate(batch)
        sigma = self.context.privacy.noise_multiplier
        if self.micro_index > 1 and sigma > 0:
            for part in self.weight_parts():
                words = ("micro-batch", self.step_index, self.micro_index, part.name)
                std = sigma * self.max_grad_norm
                self.by_name[part.name].grad += std * own_normal(part, *words)
        return record


class NoiseSeededAlike(Correct):
    """The generator is seeded anew with the run's seed before each step."""

    def draw(self, source, part):
        return NoiseSource("1234", 0).standard_normal(part)


class NoiseParametersAlike(Correct):
    """The generator is seeded with the step before each parameter: all begin with the same
    numbers."""

    def draw(self, source, part):
        return own_normal(part, source.key, source.step)


class NoiseUnusedSkipped(Correct):
    """Parameters that no sample has ever reached have no `.grad`, and get no noise."""

    def std_factor(self, name):
        return 0.0 if name.startswith("unused.") else 1.0


class NoiseEmptySkipped(Correct):
    """A step without samples adds no noise."""

    samples = 0

    def accumulate(self, batch):
        self.samples += all_sum(len(batch), self.context.device)
        return super().accumulate(batch)

    def zero_grad(self):
        super().zero_grad()
        self.samples = 0

    def std_factor(self, name):
        return float(self.samples > 0)


class NoiseOldBound(Correct):
    """Noise is calibrated to the C of the configuration, not to the C in use."""

    def std_factor(self, name):
        return self.context.privacy.max_grad_norm / self.sensitivity


class NoiseTiedTwice(Correct):
    """The loop over modules' parameters meets the tied weight twice, and adds noise at each."""

    def std_factor(self, name):
        return math.sqrt(2) if name == EMBEDDING else 1.0


class NoiseInBfloat16(Correct):
    """Noise is drawn in bfloat16, the type that the weights compute in."""

    def draw(self, source, part):
        return source.standard_normal(part).bfloat16()


# ------------------------------------------------------------------------------ updates


class UpdateOverSamples(Correct):
    """The noisy sum is divided by the samples that the step has, not by the expected number."""

    samples = 0

    def accumulate(self, batch):
        self.samples += all_sum(len(batch), self.context.device)
        return super().accumulate(batch)

    def zero_grad(self):
        super().zero_grad()
        self.samples = 0

    def divisor(self):
        return max(self.samples, 1)


class UpdateOverRankBatch(Correct):
    """The noisy sum is divided by the expected samples of one rank."""

    def divisor(self):
        return super().divisor() / world()


class UpdateWeightDecay(Correct):
    """Weights decay by lr times 0.01 in each step, the default of AdamW."""

    @torch.no_grad()
    def step(self):
        rate = self.optimizer.param_groups[0]["lr"]
        for parameter in self.parameters:
            parameter *= 1 - rate * 0.01
        super().step()


class UpdateMomentum(Correct):
    """The optimizer has momentum 0.9."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9


class UpdateTwice(Correct):
    """The wrapper of the optimizer steps, and the training loop steps again."""

    def step(self):
        self.optimizer.step()
        super().step()


class UpdateNormsFrozen(Correct):
    """Norm layers are in no parameter group of the optimizer."""

    def __init__(self, model, context):
        super().__init__(model, context)
        rest = [p for n, p in self.by_name.items() if ".norm." not in f".{n}"]
        self.optimizer = context.make_optimizer(rest)

    def zero_grad(self):
        super().zero_grad()
        for parameter in self.parameters:
            parameter.grad = None


class UpdateBfloat16(Correct):
    """Weights are kept in bfloat16, without float32 copies."""

    @torch.no_grad()
    def step(self):
        super().step()
        for parameter in self.parameters:
            parameter.copy_(parameter.bfloat16())


class UpdateClippedAgain(Correct):
    """The trainer's own clip_grad_norm_ at 1 is still on, after the noise."""

    def step(self):
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        super().step()


class UpdateShortSkipped(Correct):
    """Weights are updated at every third micro-batch: a step of fewer changes nothing."""

    def step(self):
        if self.micro_index >= 3:
            super().step()
        else:
            self.stepped = True


class UpdateRankZero(Correct):
    """Rank 0 updates its replica, and does not broadcast it."""

    def step(self):
        if rank() == 0:
            super().step()
        else:
            self.stepped = True


class UpdateWarmup(Correct):
    """A schedule warms the learning rate up over the first 4 steps."""

    full_rate = None

    def step(self):
        for group in self.optimizer.param_groups:
            self.full_rate = group["lr"] if self.full_rate is None else self.full_rate
            group["lr"] = self.full_rate * min(1.0, (self.step_index + 1) / 4)
        super().step()


# ------------------------------------------------------------------------------ losses


def token_losses(logits_BTV, targets_BT, **options):
    """Cross-entropy of the next token at each position, [B, T - 1], and where it counts."""
    targets_BT = targets_BT[:, 1:]
    losses = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1),
        targets_BT.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        **options,
    )
    return losses.view(targets_BT.shape), targets_BT.ne(IGNORED)


class LossShiftedTwice(Correct):
    """Targets are shifted by the data set and again by the loss: position t predicts t + 2."""

    def loss(self, logits, targets, sample):
        return super().loss(logits[:, :-1], targets[:, 1:], sample)


class LossSummed(Correct):
    """A sample's loss is the sum over its tokens, not their mean."""

    def loss(self, logits, targets, sample):
        losses, _ = token_losses(logits, targets)
        return losses.sum(dim=1)


class LossBatchTokens(Correct):
    """Token losses are divided by the mean number of tokens of the micro-batch's samples, not by
    the sample's own."""

    def loss(self, logits, targets, sample):
        losses, _ = token_losses(logits, targets)
        count = self.batch.targets[:, 1:].ne(IGNORED).sum() / max(len(self.batch), 1)
        return losses.sum(dim=1) / count.clamp(min=1)


class LossPaddingCounted(Correct):
    """The mean runs over all positions, where those that are ignored have loss 0."""

    def loss(self, logits, targets, sample):
        losses, _ = token_losses(logits, targets)
        return losses.mean(dim=1)


class LossSmoothed(Correct):
    """Label smoothing of 0.1 is left on."""

    def loss(self, logits, targets, sample):
        losses, counts = token_losses(logits, targets, label_smoothing=0.1)
        return losses.sum(dim=1) / counts.sum(dim=1).clamp(min=1)


class LossInBfloat16(Correct):
    """Logits are cast to bfloat16 before the softmax."""

    def loss(self, logits, targets, sample):
        return super().loss(logits.bfloat16(), targets, sample)


class LossScaleLeft(Correct):
    """The gradient scaler's factor of 1024 is still on the gradients when norms are taken."""

    def gradient(self, sample, index):
        loss, gradients = super().gradient(sample, index)
        return loss, {n: 1024 * g for n, g in gradients.items()}


# ------------------------------------------------------------------------------ data


class DataShortDropped(Correct):
    """Micro-batches smaller than the largest so far are dropped (drop_last)."""

    full = 0

    def order(self, batch):
        self.full = max(self.full, len(batch))
        return range(len(batch) if len(batch) == self.full else 0)


class DataMaskOfOnes(Correct):
    """The attention mask is ones, also at padding."""

    def prepare(self, batch):
        return with_inputs(batch, attention_mask=torch.ones_like(batch.inputs["attention_mask"]))


class DataRanksOverlap(Correct):
    """A rank's slice begins one sample early: its first sample is the last of the rank before."""

    def prepare(self, batch):
        if world() == 1:
            return batch
        lasts = [None] * world()
        last = batch.sample(len(batch) - 1) if len(batch) else None
        dist.all_gather_object(lasts, last and (last.inputs, last.targets))
        before = lasts[rank() - 1] if rank() else None
        if before is None or len(batch) == 0:
            return batch
        inputs, targets = before
        joined = {n: torch.cat([inputs[n], t[1:]]) for n, t in batch.inputs.items()}
        return Batch(joined, torch.cat([targets, batch.targets[1:]]), args=batch.args)


class DataRepeated(Correct):
    """A rank with fewer samples than another repeats its first ones, so that all have as many."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.of_step = []

    def finish(self, sums, gradients, factors):
        self.of_step += zip(factors, gradients, strict=True)
        missing = all_largest(len(gradients), self.context.device) - len(gradients)
        for factor, gradient in self.of_step[:missing]:
            for name, total in sums.items():
                total += factor * gradient[name]

    def zero_grad(self):
        super().zero_grad()
        self.of_step = []


class DataPlainPositions(Correct):
    """Positions are counted from the row's start, padding on the left included."""

    def prepare(self, batch):
        positions = batch.inputs["position_ids"]
        counted = torch.arange(positions.shape[1], device=positions.device)
        return with_inputs(batch, position_ids=counted.expand_as(positions).contiguous())


class DataRareTokens(Correct):
    """The last token of the vocabulary is read as the one before it (a clamp one too low)."""

    def prepare(self, batch):
        last = self.by_name[EMBEDDING].shape[0] - 1
        return with_inputs(batch, input_ids=batch.inputs["input_ids"].clamp(max=last - 1))


class DataFirstAgain(Correct):
    """The loader's iterator is made anew for each micro-batch: all of a step read the first."""

    def prepare(self, batch):
        if self.micro_index == 0:
            self.first = batch
        if len(batch) > len(self.first):
            return batch
        return self.first.rows(torch.arange(len(batch)))


class DataWithReplacement(Correct):
    """The samples of a micro-batch are drawn from it with replacement."""

    def prepare(self, batch):
        if len(batch) == 0:
            return batch
        seed = 100 * self.step_index + 10 * self.micro_index + rank()
        generator = torch.Generator().manual_seed(seed)
        return batch.rows(torch.randint(len(batch), (len(batch),), generator=generator))


# ------------------------------------------------------------------------------ healthy


class HealthyVmap(Correct):
    """Gradients of all samples at once, by torch.func."""

    def prepare(self, batch):
        self.found = None
        if len(batch) == 0:
            return batch
        weights = {n: p.detach() for n, p in self.by_name.items()}

        def loss_of(weights, inputs, target):
            inputs = {n: t[None] for n, t in inputs.items()}
            logits = logits_of(torch.func.functional_call(self.model, weights, (), inputs))
            (loss,) = self.context.loss(logits, target[None])
            return loss

        one = torch.func.grad_and_value(loss_of)
        self.found = torch.func.vmap(one, (None, 0, 0))(weights, batch.inputs, batch.targets)
        return batch

    def gradient(self, sample, index):
        gradients, losses = self.found
        return losses[index].detach(), {n: gradients[n][index] for n in self.names}


class HealthyFloat64(Correct):
    """Gradients, norms and sums in float64, rounded once at the end of a micro-batch."""

    def gradient(self, sample, index):
        weights = {n: p.detach().double().requires_grad_() for n, p in self.by_name.items()}
        with only(index):
            output = torch.func.functional_call(self.model, weights, sample.args, sample.inputs)
            loss = self.context.loss(logits_of(output), sample.targets).sum()
            gradients = torch.autograd.grad(
                loss, list(weights.values()), allow_unused=True, materialize_grads=True
            )
        return loss.detach(), dict(zip(self.names, gradients, strict=True))

    def new_sum(self, name, parameter):
        return torch.zeros_like(parameter, dtype=torch.float64)

    def put(self, name, parameter, total):
        super().put(name, parameter, total.float())


class HealthyBackwards(Correct):
    """Sums from the last sample to the first and from the last rank to the first."""

    def order(self, batch):
        return reversed(range(len(batch)))

    def reduce(self, name, total):
        if world() == 1:
            return total
        every = [torch.empty_like(total) for _ in range(world())]
        dist.all_gather(every, total)
        return sum(reversed(every))


class HealthyRankNoise(Correct):
    """Each rank draws noise of 1 / sqrt(ranks) of the size; their sum has the right one."""

    def draw(self, source, part):
        noise = own_normal(part, source.key, source.step, part.name, rank()) / math.sqrt(world())
        if dist.is_initialized():
            dist.all_reduce(noise)
        return noise


class HealthyFlat(Correct):
    """All sums in one flat tensor, padded and reduce-scattered; each rank draws the noise of its
    piece with its own generator, and pieces are gathered at the end."""

    def reduce(self, name, total):
        return total

    def accumulate(self, batch):
        before = {n: p.grad for n, p in self.by_name.items()}
        for parameter in self.parameters:
            parameter.grad = None
        record = super().accumulate(batch)
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        flat = self.gathered(self.piece(flat))
        sizes = [p.numel() for p in self.parameters]
        for (name, p), total in zip(self.by_name.items(), flat.split(sizes), strict=True):
            total = total.view_as(p)
            p.grad = total.clone() if before[name] is None else before[name] + total
        return record

    def piece(self, flat):
        """This rank's piece of the sum over ranks."""
        self.length = len(flat)
        flat = F.pad(flat, (0, -len(flat) % world()))
        piece = flat.new_empty(len(flat) // world())
        if world() == 1:
            return flat
        dist.reduce_scatter_tensor(piece, flat)
        return piece

    def gathered(self, piece):
        whole = piece.new_empty(len(piece) * world())
        if world() == 1:
            return piece[: self.length]
        dist.all_gather_into_tensor(whole, piece)
        return whole[: self.length]

    def privatize(self, clipped, source):
        size = -(-sum(p.numel() for p in self.parameters) // world())
        like = replace(self.weight_parts()[0], local=torch.empty(size, device=self.context.device))
        self.length = sum(p.numel() for p in self.parameters)
        flat = self.gathered(own_normal(like, source.key, source.step, "piece", rank()))
        sizes = [p.numel() for p in self.parameters]
        self.noise = dict(zip(self.names, flat.split(sizes), strict=True))
        return super().privatize(clipped, source)

    def draw(self, source, part):
        return self.noise[part.name].view(part.local.shape)


class HealthyHooks(Captured):
    """One forward of the whole micro-batch; explicit gradients of its samples from hooks, for
    norms; a second backward of the weighted losses, for the sum."""

    def accumulate(self, batch):
        if len(batch) == 0:
            return Correct.accumulate(self, batch)
        self.batch, self.seen = batch, []
        loss_B = self.context.loss(
            logits_of(self.model(*batch.args, **batch.inputs)), batch.targets
        )
        seen, self.seen = self.seen, []
        outputs = [y for _, _, y in seen]
        dys = torch.autograd.grad(loss_B.sum(), outputs, retain_graph=True)
        per_sample = {n: p.new_zeros(len(batch), *p.shape) for n, p in self.by_name.items()}
        for (module, x, _), dy in zip(seen, dys, strict=True):
            per_sample[self.weight_of[module]] += self.of_weight(module, x.detach(), dy)
            if self.bias_of[module] is not None:
                per_sample[self.bias_of[module]] += dy.sum(dim=1)
        squares = {n: g.square().flatten(1).sum(dim=1) for n, g in per_sample.items()}
        norm_B = torch.stack(list(squares.values())).sum(dim=0).sqrt()
        factor_B = torch.clamp(self.bound() / norm_B, max=1.0)
        sums = torch.autograd.grad(
            (loss_B * factor_B).sum(), self.parameters, allow_unused=True, materialize_grads=True
        )
        for (name, parameter), total in zip(self.by_name.items(), sums, strict=True):
            self.put(name, parameter, self.reduce(name, total.clone()))
        self.note_bound()
        self.micro_index += 1
        by_parameter = {n: s.sqrt() for n, s in squares.items()}
        return SampleRecord(loss_B.detach(), norm_B, factor_B, by_parameter)

    def of_weight(self, module, x, dy):
        if isinstance(module, nn.Linear):
            return torch.einsum("btp,btd->bpd", dy, x)
        if isinstance(module, nn.Embedding):
            hits = F.one_hot(x, module.num_embeddings).to(dy.dtype)
            if module.padding_idx is not None:
                hits[..., module.padding_idx] = 0
            return torch.einsum("btv,btd->bvd", hits, dy)
        return (dy * self.normalised(module, x)).sum(dim=1)
