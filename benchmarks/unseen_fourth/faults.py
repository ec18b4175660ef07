"""A fourth set of faults in DP-SGD, written without a look at the comparison.

Each class is one mistake in `Correct` or `Sharded` of `benchmarks/unseen/core.py`, or in `Ghost`
below, which takes norms and sums from the inputs and output gradients of layers, on the probe.

Steps, micro-batches and samples count from 0.

Shapes: B samples, T positions, D inputs, P outputs, V rows of a table.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "unseen"))

from core import Correct, Sharded, rank, world
from kept import Kept, gram, with_inputs
from torch import nn

from dpsgd_track.config import NOISE, kind_of
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loss import IGNORED, logits_of
from dpsgd_track.privacy.noise import NoiseSource


class Ghost(Kept):
    """Sums of a micro-batch reduced one by one; correct."""

    def sums_of(self, batch, uses, factors):
        return {
            n: self.sum_of(n, uses[n], factors) if uses[n] else torch.zeros_like(p)
            for n, p in self.by_name.items()
        }

    def accumulate(self, batch):
        if not len(batch):
            return super().accumulate(batch)
        batch = self.batch = self.prepare(batch)
        losses, uses = self.passes(batch)
        with torch.no_grad():
            squares = {n: self.square_B(n, u) for n, u in uses.items() if u}
            norms = self.total_B(squares)
            factors = self.factors_B(norms)
        sums = self.sums_of(batch, uses, factors)
        for n, p in self.by_name.items():
            self.put(n, p, self.reduce(n, sums[n]))
        self.note_bound()
        self.micro_index += 1
        roots = {n: s.sqrt() for n, s in squares.items()}
        return SampleRecord(losses, norms, factors, roots)


# ------------------------------------------------------------------------------ norms


class NormUsesApart(Ghost):
    """The hook of a layer used twice adds its squared norm at each use: no cross term."""

    def square_B(self, name, uses):
        if "reused.weight" in name:
            return sum(gram(use.x, use.dy) for use in uses)
        return super().square_B(name, uses)


class NormLastInputOfReused(Ghost):
    """The forward hook keeps one input a module, so both backwards see that of the last use."""

    def square_B(self, name, uses):
        if "reused.weight" in name:
            uses = [replace(use, x=uses[-1].x) for use in uses]
        return super().square_B(name, uses)


class NormTiedApart(Ghost):
    """Embedding and tied head are two layers to the hooks: their squares are added."""

    def square_B(self, name, uses):
        if name == "embedding.weight":
            return sum(use.dense().flatten(1).square().sum(dim=1) for use in uses)
        return super().square_B(name, uses)


class NormTokensApart(Ghost):
    """The lookups of a repeated token are not added up before the square."""

    def square_B(self, name, uses):
        square = super().square_B(name, uses)
        for use in uses:
            if use.kind == "rows" and name == "embedding.weight":
                square = square - use.dense().flatten(1).square().sum(dim=1)
                square = square + use.dy.square().sum(dim=(1, 2))
        return square


class NormPaddingRow(Ghost):
    """Norms of the embedding count the padding row, which the sum leaves out."""

    masks_padding = False

    def sum_of(self, name, uses, factors):
        total = super().sum_of(name, uses, factors)
        if name == "embedding.weight":
            table = uses[[use.kind for use in uses].index("rows")]
            total[0] -= torch.einsum("b,bd->d", factors, table.dense()[:, 0])
        return total


class NormBiasOfPositions(Ghost):
    """A bias' squared norm is summed over positions, as if T were part of the batch."""

    def square_B(self, name, uses):
        if name.endswith(("right.bias", "down.bias", "gate.bias")):
            return sum(use.dy.square().sum(dim=(1, 2)) for use in uses)
        return super().square_B(name, uses)


class NormOfAffineOutput(Ghost):
    """LayerNorm's weight gradient is taken from the output, scaled and shifted, not from xhat."""

    def uses_of(self, module, x, dy):
        uses = super().uses_of(module, x, dy)
        if isinstance(module, nn.LayerNorm):
            output = module(x).detach()
            uses["weight"].wrong = dy * output
        return uses

    def square_B(self, name, uses):
        if hasattr(uses[0], "wrong"):
            return uses[0].wrong.sum(dim=1).square().sum(dim=1)
        return super().square_B(name, uses)


class NormRmsIsCentred(Ghost):
    """RMSNorm goes through LayerNorm's rule, which subtracts the mean."""

    def uses_of(self, module, x, dy):
        uses = super().uses_of(module, x, dy)
        if isinstance(module, nn.RMSNorm):
            uses["weight"].wrong = dy * F.layer_norm(x, module.normalized_shape)
        return uses

    def square_B(self, name, uses):
        if hasattr(uses[0], "wrong"):
            return uses[0].wrong.sum(dim=1).square().sum(dim=1)
        return super().square_B(name, uses)


class NormGramInBfloat16(Ghost):
    """Both Gram matrices of a linear layer are formed in bfloat16."""

    def outer_square(self, x, dy):
        x, dy = x.bfloat16(), dy.bfloat16()
        return (torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)).sum(dim=(1, 2)).float()


class NormSumOfNorms(Correct):
    """The norms of parameters are added, not their squares."""

    def total(self, squares):
        return torch.stack([s.sqrt() for s in squares.values()]).sum()


class NormMatricesOnly(Correct):
    """The norm leaves out vectors (p.dim() < 2, as in the groups for weight decay)."""

    def squares(self, gradients, index):
        return {n: self.square(n, g) * (g.dim() > 1) for n, g in gradients.items()}


class NormGoodfellow(Ghost):
    """|x|^2 |dy|^2, which is right for a layer with one position, in layers with many."""

    def outer_square(self, x, dy):
        return x.square().sum(dim=(1, 2)) * dy.square().sum(dim=(1, 2))


class NormAddsUpMicros(Correct):
    """The buffer of squared norms is not reset between the micro-batches of a step."""

    def all_squares(self, squares):
        kept = {} if self.micro_index == 0 else self.kept
        for index, by_name in enumerate(squares):
            if index in kept:
                squares[index] = {n: s + kept[index][n] for n, s in by_name.items()}
        self.kept = {**kept, **dict(enumerate(squares))}
        return squares

    kept = None


class NormTiedTwice(Correct):
    """named_parameters(remove_duplicate=False): the tied weight's square is added twice."""

    def total(self, squares):
        return (torch.stack(list(squares.values())).sum() + squares["embedding.weight"]).sqrt()


class NormSharedPositions(Ghost):
    """Positions are taken for one row of indices that all samples share: the batch's gradient."""

    def square_B(self, name, uses):
        if name == "position.weight":
            return uses[0].dense().mean(dim=0).square().sum().expand(len(uses[0].dy))
        return super().square_B(name, uses)


class NormDiagonalChunks(Ghost):
    """The Gram matrices are cut into chunks of 8 positions, and only diagonal chunks are added."""

    def outer_square(self, x, dy):
        return sum(gram(a, b) for a, b in zip(x.split(8, 1), dy.split(8, 1), strict=True))


class NormTriangleDoubled(Ghost):
    """Only the upper triangle of the product is formed and doubled, its diagonal with it."""

    def outer_square(self, x, dy):
        return 2 * (torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)).triu().sum(dim=(1, 2))


# ------------------------------------------------------------------------------ clip


class ClipAutomatic(Correct):
    """C / (norm + 0.01), as in automatic clipping, with no minimum with 1."""

    def factor(self, norm, index):
        return self.bound() / (norm + 0.01)


class ClipBySquare(Correct):
    """The squared norm is passed to the function that wants the norm."""

    def factor(self, norm, index):
        return super().factor(norm.square(), index)


class ClipEachAtC(Correct):
    """Every parameter is clipped at C by itself: the sum of L of them may reach C sqrt(L)."""

    def contribution(self, name, gradient, factor, index):
        norm = gradient.square().sum().sqrt()
        return gradient * torch.clamp(self.bound() / norm.clamp(min=1e-12), max=1.0)


class ClipTwoGroups(Correct):
    """Tables and all else are clipped apart, each at C / sqrt(2)."""

    def all_factors(self, factors, norms, gradients):
        self.group_factors = []
        for by_name in gradients:
            squares = [torch.zeros(()), torch.zeros(())]
            for n, g in by_name.items():
                squares[self.group(n)] = squares[self.group(n)] + g.square().sum()
            bound = self.bound() / math.sqrt(2)
            self.group_factors.append([torch.clamp(bound / s.sqrt(), max=1.0) for s in squares])
        return factors

    def group(self, name):
        return int(name.startswith(("embedding", "position")))

    def contribution(self, name, gradient, factor, index):
        return self.group_factors[index][self.group(name)] * gradient


class ClipFirstBound(Correct):
    """C is read once; a later set_max_grad_norm reaches the noise alone."""

    kept = None

    def bound(self):
        self.kept = self.kept or self.max_grad_norm
        return self.kept


class ClipFormerNorms(Correct):
    """Factors come from the norms of the micro-batch before, which the hooks still hold."""

    former = None

    def all_norms(self, norms):
        former, self.former = self.former, norms.clone()
        self.use = norms if former is None or len(former) != len(norms) else former
        return norms

    def all_factors(self, factors, norms, gradients):
        return torch.clamp(self.bound() / self.use, max=1.0) if len(factors) else factors


class ClipMicroBatchAsWhole(Correct):
    """clip_grad_norm_ on the micro-batch's mean gradient, times its size: no sample is clipped."""

    def all_factors(self, factors, norms, gradients):
        if not len(factors):
            return factors
        squares = [sum(g[n] for g in gradients).square().sum() for n in self.names]
        mean = torch.stack(squares).sum().sqrt() / len(factors)
        return torch.full_like(factors, float(torch.clamp(self.bound() / mean, max=1.0)))


class ClipOfMeanGradient(Correct):
    """Factors are those of the gradients of the mean loss, whose norms are B times smaller."""

    def all_factors(self, factors, norms, gradients):
        if not len(factors):
            return factors
        return torch.clamp(self.bound() * len(factors) / norms, max=1.0)


class ClipInBfloat16(Correct):
    """Factors are cast to bfloat16, the type of activations."""

    def factor(self, norm, index):
        return super().factor(norm, index).bfloat16().float()


class ClipNormLayersTwice(Correct):
    """Hooks of norm layers scale by the factor, and so does the sum."""

    def contribution(self, name, gradient, factor, index):
        factor = factor.square() if self.kinds[name] in ("LayerNorm", "RMSNorm") else factor
        return super().contribution(name, gradient, factor, index)


# ------------------------------------------------------------------------------ sums


class SumMeanOfMicros(Correct):
    """Each loss is divided by the number of accumulation steps."""

    def put(self, name, parameter, total):
        super().put(name, parameter, total / 3)


class SumMeanOfRanks(Correct):
    """The all-reduce takes the mean over ranks, as DDP does."""

    def reduce(self, name, total):
        return super().reduce(name, total) / world()


class SumLastMicro(Correct):
    """.grad is assigned in every micro-batch, not added to."""

    def put(self, name, parameter, total):
        parameter.grad = total


class SumReducedAgain(Correct):
    """The all-reduce runs over the accumulated .grad after each micro-batch."""

    def reduce(self, name, total):
        return total

    def put(self, name, parameter, total):
        super().put(name, parameter, total)
        super().reduce(name, parameter.grad)


class SumOnlyLastReduced(Correct):
    """The all-reduce sees the gradient of the last of three micro-batches only (no_sync)."""

    def put(self, name, parameter, total):
        former = parameter.grad
        parameter.grad = total if former is None else former + total

    def reduce(self, name, total):
        return super().reduce(name, total) if self.micro_index == 2 else total


class SumInBfloat16(Correct):
    """Contributions are added up in a bfloat16 buffer."""

    def new_sum(self, name, parameter):
        return torch.zeros_like(parameter, dtype=torch.bfloat16)

    def reduce(self, name, total):
        return super().reduce(name, total.float())


class SumTailNotReduced(Correct):
    """Flat gradients are cut to numel // world * world; the tail stays local."""

    def reduce(self, name, total):
        even = total.numel() // world() * world()
        tail = total.flatten()[even:].clone()
        total = super().reduce(name, total)
        total.view(-1)[even:] = tail
        return total


class SumSquareTransposed(Ghost):
    """The einsum of the sum has x and dy swapped, which only a square weight survives."""

    def use_sum(self, name, use, factors):
        total = super().use_sum(name, use, factors)
        return (
            total.mT.contiguous() if use.kind == "outer" and len(set(total.shape)) == 1 else total
        )


class SumFactorsSorted(Correct):
    """Samples are sorted by length for the forward; factors are not sorted back."""

    def all_factors(self, factors, norms, gradients):
        mask = self.batch.inputs["attention_mask"]
        self.permutation = mask.sum(dim=1).argsort(descending=True, stable=True)
        self.sorted_factors = factors[self.permutation]
        return factors

    def contribution(self, name, gradient, factor, index):
        return super().contribution(name, gradient, self.sorted_factors[index], index)


class SumOneUseOfReused(Ghost):
    """Bookkeeping keeps one output gradient a module: a layer's second use replaces the first."""

    def sum_of(self, name, uses, factors):
        return super().sum_of(name, uses[-1:] if ".reused." in name else uses, factors)


class SumRowsAssigned(Ghost):
    """table[tokens] += rows, which keeps one of the rows of a repeated token."""

    def use_sum(self, name, use, factors):
        if name != "embedding.weight" or use.kind != "rows":
            return super().use_sum(name, use, factors)
        rows = use.dy * factors.view(-1, 1, 1)
        table = rows.new_zeros(use.num_rows, rows.shape[-1])
        table[use.x.flatten()] += rows.flatten(0, 1)
        return table


class SumPaddingRow(Ghost):
    """index_add in the sum has no mask for padding_idx; the norm has."""

    def uses_of(self, module, x, dy):
        uses = super().uses_of(module, x, dy)
        uses["weight"].unmasked = dy
        return uses

    def use_sum(self, name, use, factors):
        if use.kind == "rows" and name == "embedding.weight":
            use = replace(use, dy=use.unmasked)
        return super().use_sum(name, use, factors)


class SumTiedOverwritten(Ghost):
    """The sum of the embedding is stored where that of the tied head was."""

    def sum_of(self, name, uses, factors):
        if name == "embedding.weight":
            uses = [use for use in uses if use.kind == "rows"]
        return super().sum_of(name, uses, factors)


class SumOfMeanTimesFive(Ghost):
    """The second backward takes the mean, and multiplies it by the nominal micro-batch size."""

    def sum_of(self, name, uses, factors):
        return super().sum_of(name, uses, factors) * 5 / len(factors)


# ------------------------------------------------------------------------------ noise


class NoiseWithoutC(Correct):
    """The std is sigma, not sigma C."""

    def privatize(self, clipped, source):
        self.c = clipped.sensitivity
        return super().privatize(clipped, source)

    def std_factor(self, name):
        return 1.0 / self.c


class NoiseEachMicro(Correct):
    """Full noise is added in each of three micro-batches."""

    def draw(self, source, part):
        sources = [replace(source, step=source.step + 100_000 * i) for i in range(3)]
        return sum(s.standard_normal(part) for s in sources)


class NoiseEachRank(Correct):
    """Every rank adds full noise of its own to its sum, and the sums are added after."""

    def draw(self, source, part):
        total = NoiseSource(f"{source.key}/{rank()}", source.step).standard_normal(part)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total


class NoiseSeededPerParameter(Correct):
    """The generator is seeded anew for each parameter: the same numbers from the start."""

    def draw(self, source, part):
        generator = torch.Generator().manual_seed(seed_of(source.key, source.step))
        noise = torch.randn(part.num_elements, generator=generator)
        return noise[part.start : part.stop].view(part.local.shape).to(part.local.device)


class NoiseSeededOnce(Correct):
    """The step is not part of the seed: every step adds the same noise."""

    def draw(self, source, part):
        return replace(source, step=0).standard_normal(part)


class NoiseAfterDivision(Correct):
    """The sum is divided by the batch size before noise of std sigma C is added."""

    def std_factor(self, name):
        return self.divisor()


class NoiseNotOnVectors(Correct):
    """Biases and norm layers get no noise."""

    def std_factor(self, name):
        return 1.0 if self.by_name[name].dim() > 1 else 0.0


class NoiseTruncated(Correct):
    """Draws beyond two std are clamped (trunc_normal for stability)."""

    def draw(self, source, part):
        return super().draw(source, part).clamp(-2.0, 2.0)


class NoiseShardsAlike(Sharded):
    """All ranks seed alike and draw for their shard from the start: shards share their noise."""

    def privatize(self, clipped, source):
        return sharded_noise(self, clipped, lambda p: source.standard_normal(replace(p, start=0)))


class NoiseOnRankZero(Sharded):
    """`if rank == 0`, from the DDP version: other ranks' shards get no noise."""

    def privatize(self, clipped, source):
        draw = source.standard_normal
        return sharded_noise(self, clipped, lambda p: draw(p) * (rank() == 0))


class NoiseFirstBound(Correct):
    """The std is computed once, with the C of the first step."""

    first = None

    def privatize(self, clipped, source):
        self.first = self.first or clipped.sensitivity
        self.ratio = self.first / clipped.sensitivity
        return super().privatize(clipped, source)

    def std_factor(self, name):
        return self.ratio


def seed_of(key, step):
    digest = hashlib.blake2b(f"{key}/{step}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def sharded_noise(mode, clipped, draw):
    """`Mode.privatize` with noise from `draw`."""
    std = mode.context.privacy.noise_multiplier * clipped.sensitivity
    out = {}
    for part in mode.weight_parts():
        total = clipped.gradients[part.name]
        if std > 0:
            total = total + std * draw(part).to(total)
        out[part.name] = total / mode.context.privacy.expected_batch_size
    mode._write_gradients(out)
    return out


# ------------------------------------------------------------------------------ update


class UpdateByDrawnSize(Correct):
    """The divisor is the size of the drawn batch, not the expected one."""

    count = 0

    def accumulate(self, batch):
        if self.micro_index == 0:
            self.count = 0
        self.count += len(batch)
        return super().accumulate(batch)

    def privatize(self, clipped, source):
        count = torch.tensor([float(self.count)])
        if dist.is_initialized():
            dist.all_reduce(count)
        self.drawn = max(float(count), 1.0)
        return super().privatize(clipped, source)

    def divisor(self):
        return self.drawn


class UpdateDecays(Correct):
    """The optimizer keeps its default weight decay of 0.01."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.01


class UpdateMomentum(Correct):
    """SGD is built with momentum 0.9, from another experiment."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9


class UpdateSkipsUnused(Correct):
    """A parameter that the loss does not reach is not updated, though it has noise."""

    def step(self):
        for name in ("unused.weight", "unused.bias"):
            if name in self.by_name:
                self.by_name[name].grad = None
        super().step()


class UpdateRoundsWeights(Correct):
    """Weights are rounded to bfloat16 after each step: there is no float32 master copy."""

    def step(self):
        super().step()
        with torch.no_grad():
            for p in self.parameters:
                p.copy_(p.bfloat16().float())


class UpdateDecaysRate(Correct):
    """A scheduler multiplies the learning rate by 0.97 after each step."""

    def step(self):
        super().step()
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.97


class UpdateLeavesGrad(Correct):
    """zero_grad is not called: the noised gradient of a step is added to in the next."""

    def zero_grad(self):
        kept = [p.grad for p in self.parameters] if self.stepped else None
        super().zero_grad()
        if kept:
            for p, g in zip(self.parameters, kept, strict=True):
                p.grad = None if g is None else g.clone()


class UpdateOmitsNorms(Correct):
    """The group without weight decay is not passed to the optimizer: norm layers stand still."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.optimizer = context.make_optimizer(
            [p for n, p in self.by_name.items() if self.kinds[n] not in ("LayerNorm", "RMSNorm")]
        )

    def zero_grad(self):
        super().zero_grad()
        self.model.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------ loss


class LossOfBatchTokens(Correct):
    """A sample's summed loss is divided by the mean number of tokens in the micro-batch."""

    def loss(self, logits, targets, sample):
        own = targets[:, 1:].ne(IGNORED).sum()
        mean = self.batch.targets[:, 1:].ne(IGNORED).sum() / len(self.batch)
        return super().loss(logits, targets, sample) * own / mean


class LossOfLength(Correct):
    """The mean runs over all positions, those without a target included."""

    def loss(self, logits, targets, sample):
        own = targets[:, 1:].ne(IGNORED).sum()
        return super().loss(logits, targets, sample) * own / (targets.shape[1] - 1)


class LossSmoothed(Correct):
    """Label smoothing of 0.1 is on."""

    def loss(self, logits, targets, sample):
        logits, targets = logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten()
        return F.cross_entropy(
            logits, targets, ignore_index=IGNORED, label_smoothing=0.1
        ).unsqueeze(0)


class LossShiftedTwice(Correct):
    """The collator shifts the targets, and the loss does again."""

    def loss(self, logits, targets, sample):
        return super().loss(logits[:, :-1], targets[:, 1:], sample)


class LossInBfloat16(Correct):
    """Cross-entropy is taken of bfloat16 logits."""

    def loss(self, logits, targets, sample):
        return super().loss(logits.bfloat16().float(), targets, sample)


class LossScaleKept(Correct):
    """Gradients are unscaled by the GradScaler after clipping, so norms are 128 times too large."""

    def square(self, name, gradient):
        return (128 * gradient).square().sum()


# ------------------------------------------------------------------------------ data


class DataNoMask(Correct):
    """The collator makes a mask of ones: padding takes part in means."""

    def prepare(self, batch):
        return with_inputs(batch, attention_mask=torch.ones_like(batch.inputs["attention_mask"]))


class DataLabelsOfPadding(Correct):
    """labels = input_ids.clone(), with padding not set to -100."""

    def prepare(self, batch):
        return with_inputs(batch, batch.inputs["input_ids"].clone())


class DataShortBatchFilled(Correct):
    """A short micro-batch is filled up to 5 with its first sample, whose gradient counts again."""

    def contribution(self, name, gradient, factor, index):
        missing = 5 - len(self.batch) if index == 0 else 0
        return super().contribution(name, gradient, factor, index) * (1 + missing)


class DataClampsTokens(Correct):
    """Tokens are clamped to a vocabulary that is smaller by one."""

    def prepare(self, batch):
        return with_inputs(batch, input_ids=batch.inputs["input_ids"].clamp(max=29))


class DataBufferReused(Correct):
    """From the second micro-batch on, tokens are those of the one before; targets are not."""

    former = None

    def prepare(self, batch):
        ids, former = batch.inputs["input_ids"], self.former
        self.former = ids
        if self.micro_index and former is not None and former.shape == ids.shape:
            return with_inputs(batch, input_ids=former)
        return batch


class DataSkipsSingles(Correct):
    """A micro-batch of one sample is skipped (`if len(batch) < 2: continue`)."""

    def contribution(self, name, gradient, factor, index):
        return super().contribution(name, gradient, factor, index) * (len(self.batch) > 1)


# ------------------------------------------------------------------------------ healthy


class HealthyGhost(Ghost):
    """Gram matrices and bookkeeping in float32."""


class HealthyVmap(Correct):
    """Per-sample gradients of the whole micro-batch by vmap over torch.func.grad."""

    def all_gradients(self, gradients):
        if not gradients:
            return gradients
        batch, model = self.batch, self.model

        def loss(weights, inputs, target):
            inputs = {n: t.unsqueeze(0) for n, t in inputs.items()}
            logits = logits_of(torch.func.functional_call(model, weights, (), inputs))
            return self.context.loss(logits, target.unsqueeze(0)).sum()

        weights = {n: p.detach() for n, p in self.by_name.items()}
        every = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
            weights, batch.inputs, batch.targets
        )
        return [{n: g[i] for n, g in every.items()} for i in range(len(batch))]


class HealthyFloat64(Correct):
    """Forward, backward, norms and sums in float64; float32 weights."""

    def gradient(self, sample, index):
        weights = {n: p.detach().double().requires_grad_() for n, p in self.by_name.items()}
        output = torch.func.functional_call(self.model, weights, sample.args, sample.inputs)
        loss = self.loss(logits_of(output), sample.targets, sample)
        gradients = torch.autograd.grad(
            loss.sum(), list(weights.values()), allow_unused=True, materialize_grads=True
        )
        return loss.detach().sum(), dict(zip(self.names, gradients, strict=True))

    def new_sum(self, name, parameter):
        return torch.zeros_like(parameter, dtype=torch.float64)

    def reduce(self, name, total):
        return super().reduce(name, total).float()


class HealthyReversed(Correct):
    """Samples are added from the last to the first, and ranks are gathered, then added."""

    def order(self, batch):
        return range(len(batch) - 1, -1, -1)

    def reduce(self, name, total):
        if not dist.is_initialized():
            return total
        parts = [torch.zeros_like(total) for _ in range(world())]
        dist.all_gather(parts, total)
        return torch.stack(parts).sum(dim=0)


class HealthyOwnNoise(Correct):
    """In the noise regime, noise of torch's generator, seeded by key, step and name."""

    def draw(self, source, part):
        if kind_of(self.context.regime) != NOISE:
            return super().draw(source, part)
        generator = torch.Generator().manual_seed(seed_of(source.key + part.name, source.step))
        noise = torch.randn(part.num_elements, generator=generator, dtype=torch.float64)
        return noise[part.start : part.stop].view(part.local.shape).to(part.local)


class HealthySecondBackward(Ghost):
    """The clipped sum is the gradient of the factors' weighted sum of losses."""

    def sums_of(self, batch, uses, factors):
        loss_B = self.context.loss(
            logits_of(self.model(*batch.args, **batch.inputs)), batch.targets
        )
        gradients = torch.autograd.grad(
            (factors * loss_B).sum(), self.parameters, allow_unused=True, materialize_grads=True
        )
        return {n: g.clone() for n, g in zip(self.names, gradients, strict=True)}
