"""Faults in DP-SGD, written without a look at the comparison.

Each class is `Correct` or `Sharded` of core.py with one deviation.

Steps and samples count from 0. `P("probe name")` is that parameter of the probe, or its counterpart
in minilm; where there is none, the fault shows on the probe only.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from core import Correct, Sharded, kinds_of, rank, world
from torch.utils.checkpoint import checkpoint

from dpsgd_track.privacy import layers as rules
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import ClippedSum
from dpsgd_track.privacy.loss import logits_of
from dpsgd_track.privacy.terms import Outer, Rows

_B = "bert.encoder.layer."
COUNTERPART = {
    "embedding.weight": "bert.embeddings.word_embeddings.weight",
    "position.weight": "bert.embeddings.position_embeddings.weight",
    "blocks.0.norm.weight": _B + "0.output.LayerNorm.weight",
    "blocks.0.norm.bias": _B + "0.output.LayerNorm.bias",
    "blocks.1.norm.weight": _B + "5.output.LayerNorm.weight",
    "blocks.1.norm.bias": _B + "5.output.LayerNorm.bias",
    "blocks.0.left.weight": _B + "0.intermediate.dense.weight",
    "blocks.1.left.weight": _B + "5.intermediate.dense.weight",
    "blocks.0.right.bias": _B + "0.intermediate.dense.bias",
    "blocks.1.right.bias": _B + "5.intermediate.dense.bias",
    "blocks.1.reused.weight": _B + "5.attention.self.query.weight",
    "blocks.0.down.weight": _B + "0.output.dense.weight",
    "blocks.0.down.bias": _B + "0.output.dense.bias",
    "blocks.1.down.weight": _B + "5.output.dense.weight",
    "blocks.1.down.bias": _B + "5.output.dense.bias",
    "gate.weight": "classifier.weight",
    "gate.bias": "classifier.bias",
    "norm.weight": "bert.embeddings.LayerNorm.weight",
}


def P(name):
    return (name, COUNTERPART.get(name, ""))


def with_inputs(batch, targets=None, **changed):
    inputs = {n: changed.get(n, t) for n, t in batch.inputs.items()}
    return Batch(inputs, batch.targets if targets is None else targets, args=batch.args)


# ------------------------------------------------------------------------------ data


class DataRankZero(Correct):
    """Rank 1 reads rank 0's samples (no distributed sampler)."""

    def prepare(self, batch):
        if world() == 1:
            return batch
        boxes = [None] * world()
        dist.all_gather_object(boxes, (batch.inputs, batch.targets))
        inputs, targets = boxes[0]
        n = len(batch)
        if len(targets) < n:
            return batch
        return Batch({k: v[:n] for k, v in inputs.items()}, targets[:n], args=batch.args)


class DataLastTwice(Correct):
    """The last sample of a micro-batch is read as the one before it."""

    def sample(self, batch, index):
        return batch.sample(max(index - 1, 0) if index == len(batch) - 1 else index)


class DataLabelsRolled(Correct):
    """Targets belong to the next sample of the micro-batch."""

    def prepare(self, batch):
        return with_inputs(batch, batch.targets.roll(1, 0)) if len(batch) > 1 else batch


class DataTruncated(Correct):
    """Samples of full length lose their last token (max_length one too small)."""

    def prepare(self, batch):
        mask = batch.inputs.get("attention_mask")
        if mask is None or len(batch) == 0:
            return batch
        full = mask.bool().all(dim=1)
        ids, mask, targets = batch.inputs["input_ids"].clone(), mask.clone(), batch.targets.clone()
        ids[full, -1], mask[full, -1] = 0, 0
        if targets.dim() == 2:
            targets[full, -1] = -100
        return with_inputs(batch, targets, input_ids=ids, attention_mask=mask)


class DataStaleBatch(Correct):
    """In step 2 the first micro-batch is still that of step 1 (double buffer not flipped)."""

    kept = None

    def prepare(self, batch):
        if self.micro_index == 0:
            kept, self.kept = self.kept, batch
            if self.step_index == 2 and kept is not None and len(kept) == len(batch):
                return kept
        return batch


class DataPositionsFromOne(Correct):
    """Positions begin at 1."""

    def prepare(self, batch):
        ids = batch.inputs.get("position_ids")
        return batch if ids is None else with_inputs(batch, position_ids=ids + 1)


class DataTokenCorrupt(Correct):
    """The first token of the fourth sample of rank 1 is lost to padding: it begins one late."""

    def prepare(self, batch):
        if rank() != 1 or len(batch) < 2:
            return batch
        ids = batch.inputs["input_ids"].clone()
        ids[min(3, len(batch) - 1)] = ids[min(3, len(batch) - 1)].roll(-1)
        return with_inputs(batch, input_ids=ids)


# ------------------------------------------------------------------- initial weights


class WeightsOneBf16(Correct):
    """One layer's weights were saved in bfloat16."""

    def before_optimizer(self, model):
        self._change(model, "blocks.1.down.weight", lambda p: p.bfloat16().float())

    def _change(self, model, name, change):
        named = dict(model.named_parameters())
        for n in P(name):
            if n in named:
                with torch.no_grad():
                    named[n].copy_(change(named[n]))
                return


class WeightsTransposed(WeightsOneBf16):
    """A square weight is loaded transposed (Conv1D layout)."""

    def before_optimizer(self, model):
        self._change(model, "blocks.1.reused.weight", lambda p: p.t().clone())


class WeightsRankDiffers(WeightsOneBf16):
    """Rank 1 starts from another draw of one layer (0.1 % of its std: no broadcast)."""

    def before_optimizer(self, model):
        if rank() == 1:
            g = torch.Generator().manual_seed(9)
            self._change(
                model,
                "blocks.0.left.weight",
                lambda p: p + 1e-3 * p.std() * torch.randn(p.shape, generator=g),
            )


class WeightsBiasZero(WeightsOneBf16):
    """A bias is missing in the checkpoint (strict=False) and is zero."""

    def before_optimizer(self, model):
        self._change(model, "blocks.0.right.bias", torch.zeros_like)


class WeightsRowLost(WeightsOneBf16):
    """The last row of a weight is lost when shards are put together: it repeats the row before."""

    def before_optimizer(self, model):
        def change(p):
            p = p.clone()
            p[-1] = p[-2]
            return p

        self._change(model, "blocks.0.down.weight", change)


# ------------------------------------------------------------------------------ loss


def lm(targets):
    return targets.dim() == 2


class LossPaddedLength(Correct):
    """The loss of a sample is divided by the padded length rather than by its own targets."""

    def loss(self, logits, targets, sample):
        loss = super().loss(logits, targets, sample)
        if not lm(targets):
            return loss
        t = targets[:, 1:]
        return loss * t.ne(-100).sum(1).clamp(min=1) / t.shape[1]


class LossSmoothing(Correct):
    """Label smoothing of 0.01 is left on."""

    def loss(self, logits, targets, sample):
        if not lm(targets):
            return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.01)
        x, t = logits[:, :-1], targets[:, 1:]
        each = F.cross_entropy(
            x.flatten(0, 1), t.flatten(), reduction="none", ignore_index=-100, label_smoothing=0.01
        ).view(t.shape)
        return each.sum(1) / t.ne(-100).sum(1).clamp(min=1)


class LossBatchTokens(Correct):
    """Tokens are averaged over the micro-batch: long samples weigh more."""

    def loss(self, logits, targets, sample):
        loss = super().loss(logits, targets, sample)
        if not lm(targets):
            return loss
        counts = self.batch.targets[:, 1:].ne(-100).sum(1).float()
        return loss * targets[:, 1:].ne(-100).sum(1) / counts.mean()


class LossCountsPadding(Correct):
    """The first padding position is predicted too (ignore_index off by one)."""

    def loss(self, logits, targets, sample):
        if lm(targets):
            length = int(targets.ne(-100).sum())
            if length < targets.shape[1]:
                targets = targets.clone()
                targets[0, length] = 0
        return super().loss(logits, targets, sample)


class LossLastTarget(Correct):
    """The last target of each sample is left out."""

    def loss(self, logits, targets, sample):
        if lm(targets):
            length = int(targets.ne(-100).sum())
            targets = targets.clone()
            targets[0, length - 1] = -100
        return super().loss(logits, targets, sample)


class LossBf16Logits(Correct):
    """Logits are rounded to bfloat16 before the loss."""

    def loss(self, logits, targets, sample):
        return super().loss(logits.bfloat16().float(), targets, sample)


class LossZ(Correct):
    """An auxiliary z-loss of 1e-4 is added."""

    def loss(self, logits, targets, sample):
        z = (
            torch.logsumexp(logits, -1).square().flatten(1).mean(1)
            if lm(targets)
            else (torch.logsumexp(logits, -1).square())
        )
        return super().loss(logits, targets, sample) + 1e-4 * z


class LossClassWeight(Correct):
    """Even-numbered classes weigh 1.01."""

    def loss(self, logits, targets, sample):
        weight = torch.ones(logits.shape[-1])
        weight[::2] = 1.01
        if not lm(targets):
            return F.cross_entropy(logits, targets, weight=weight, reduction="none")
        x, t = logits[:, :-1], targets[:, 1:]
        each = F.cross_entropy(
            x.flatten(0, 1), t.flatten(), reduction="none", ignore_index=-100, weight=weight
        ).view(t.shape)
        return each.sum(1) / t.ne(-100).sum(1).clamp(min=1)


class LossNormEps(Correct):
    """The last block's LayerNorm has eps 1e-3 in place of its own."""

    def before_optimizer(self, model):
        for n in P("blocks.1.norm.weight"):
            module = dict(model.named_modules()).get(n.rpartition(".")[0])
            if module is not None:
                module.eps = 1e-3


# ---------------------------------------------- gradients, norm and sum alike wrong


class GradReusedOnce(Correct):
    """The gradient of a layer that is called twice is that of its first call alone."""

    target = "blocks.1.reused"

    def __init__(self, model, context):
        super().__init__(model, context)
        module = dict(model.named_modules()).get(self.target)
        if module is None:
            return
        self.calls = 0

        def forward(x):
            self.calls += 1
            if self.calls % 2:
                return F.linear(x, module.weight, module.bias)
            return F.linear(x, module.weight.detach(), module.bias.detach())

        module.forward = forward

    def gradient(self, sample, index):
        self.calls = 0
        return super().gradient(sample, index)


class GradHeadFrozen(Correct):
    """The head is a frozen copy of the embedding, refreshed each step: its gradient is missing."""

    def gradient(self, sample, index):
        head = getattr(self.model, "head", None)
        if head is None:
            return super().gradient(sample, index)
        weight = head._parameters.pop("weight")
        head.weight = weight.detach()
        try:
            return super().gradient(sample, index)
        finally:
            del head.weight
            head._parameters["weight"] = weight


class GradByFrequency(Correct):
    """Rows of the embedding are divided by their token's count (scale_grad_by_freq)."""

    def before_optimizer(self, model):
        for n in P("embedding.weight"):
            module = dict(model.named_modules()).get(n.rpartition(".")[0])
            if module is not None:
                module.scale_grad_by_freq = True


class GradBiasForgotten(Correct):
    """A fused backward returns no gradient for one bias."""

    def all_gradients(self, gradients):
        name = self.at(*P("blocks.0.down.bias"))
        for g in gradients:
            g[name] = torch.zeros_like(g[name])
        return gradients


class GradDetachedBranch(Correct):
    """The branch of the gate is detached: layers before it get nothing through the gate."""

    def __init__(self, model, context):
        super().__init__(model, context)
        gate = dict(model.named_modules()).get("gate")
        if gate is not None:
            gate.register_forward_pre_hook(lambda m, args: (args[0].detach(),))


class GradScaledRow(Correct):
    """A kernel's grid misses the last output row of one weight: its gradient is zero."""

    def all_gradients(self, gradients):
        name = self.at(*P("blocks.1.left.weight"))
        for g in gradients:
            g[name] = g[name].clone()
            g[name][-1] = 0
        return gradients


class GradMicroStale(Correct):
    """A bias's buffer is not cleared: 5 % of the gradient of the sample before is added."""

    def all_gradients(self, gradients):
        name = self.at(*P("blocks.1.down.bias"))
        old = [g[name] for g in gradients]
        for i in range(1, len(gradients)):
            gradients[i][name] = old[i] + 0.05 * old[i - 1]
        return gradients


class GradHalfCast(Correct):
    """One layer's gradient passes through float16 unscaled: small elements vanish or round."""

    def all_gradients(self, gradients):
        name = self.at(*P("blocks.0.left.weight"))
        for g in gradients:
            g[name] = (g[name] / 1024).half().float() * 1024
        return gradients


# -------------------------------------------------------------- per-sample norms only


class NormNoBias(Correct):
    """Biases of linear layers are not in the norm."""

    def square(self, name, gradient):
        s = super().square(name, gradient)
        return s * 0 if name.endswith("bias") and self.kinds[name] == "Linear" else s


class NormLocalRows(Correct):
    """Each sample's norm counts only the rows that its rank would hold under sharding."""

    def square(self, name, gradient):
        rows = gradient.shape[0]
        chunk = -(-rows // world())
        return gradient[rank() * chunk : (rank() + 1) * chunk].square().sum()


class NormGateOnRankOne(Correct):
    """Rank 1, which would hold no row of the gate, leaves the gate out of its samples' norms."""

    def square(self, name, gradient):
        s = super().square(name, gradient)
        return s * 0 if rank() == 1 and name == self.at(*P("gate.weight")) else s


class NormWorldTimes(Correct):
    """The squares of the gate, which is replicated, are added once for each rank."""

    def square(self, name, gradient):
        s = super().square(name, gradient)
        return s * world() if name in (self.at(*P("gate.weight")), self.at(*P("gate.bias"))) else s


class NormOneLayerHalfPercent(Correct):
    """One layer's norm is 0.5 % too large."""

    def square(self, name, gradient):
        s = super().square(name, gradient)
        return s * 1.005**2 if name == self.at(*P("blocks.1.left.weight")) else s


class NormEmbeddingSmallBias(Correct):
    """The embedding's norm is 1 % too small."""

    def square(self, name, gradient):
        s = super().square(name, gradient)
        return s * 0.99**2 if name == self.at(*P("embedding.weight")) else s


class NormHalfSquares(Correct):
    """Squares of biases' gradients are taken in float16, where those below 2.4e-4 lose bits."""

    def square(self, name, gradient):
        if name.endswith("bias"):
            return gradient.half().square().float().sum()
        return super().square(name, gradient)


class NormBf16Total(Correct):
    """Squares are added over parameters in bfloat16."""

    def total(self, squares):
        total = torch.zeros((), dtype=torch.bfloat16)
        for s in squares.values():
            total = total + s.bfloat16()
        return total.float().sqrt()


class NormLayerNormAdded(Correct):
    """Weight and bias of a LayerNorm: (|w| + |b|)^2 in place of |w|^2 + |b|^2."""

    def squares(self, gradients, index):
        out = super().squares(gradients, index)
        for name in out:
            if self.kinds[name] == "LayerNorm" and name.endswith("weight"):
                bias = name[: -len("weight")] + "bias"
                out[name] = (out[name].sqrt() + out[bias].sqrt()).square() - out[bias]
        return out


class NormAveragedOverBatch(Correct):
    """The last norm layer's norm is the micro-batch's root mean square, for each sample."""

    def all_squares(self, squares):
        name = self.at(*P("norm.weight"))
        if squares:
            mean = torch.stack([s[name] for s in squares]).mean()
            for s in squares:
                s[name] = mean
        return squares


class NormShiftedSample(Correct):
    """One layer's norms are those of the next sample."""

    def all_squares(self, squares):
        name = self.at(*P("blocks.0.left.weight"))
        old = [s[name] for s in squares]
        for i, s in enumerate(squares):
            s[name] = old[(i + 1) % len(old)]
        return squares


class NormStaleLayer(Correct):
    """One bias's norm is that of the micro-batch before (buffer read too early)."""

    kept = None

    def all_squares(self, squares):
        name = self.at(*P("blocks.1.reused.bias"), _B + "5.attention.self.query.bias")
        new = [s[name] for s in squares]
        if self.kept is not None:
            for i, s in enumerate(squares):
                if i < len(self.kept):
                    s[name] = self.kept[i]
        self.kept = new or self.kept
        return squares


class NormMicroScaled(Correct):
    """Norms are of the gradient divided by the number of micro-batches (here 3)."""

    def all_norms(self, norms):
        return norms / 3


class NormRecordedLate(Correct):
    """From step 2 on the last block's norm layer is not in the norm (hooks are lost at an eval)."""

    def square(self, name, gradient):
        s = super().square(name, gradient)
        lost = self.step_index >= 2 and name in P("blocks.1.norm.weight") + P("blocks.1.norm.bias")
        return s * 0 if lost else s


class NormFinalLayerInf(Correct):
    """The norm of gate.weight is its largest element (inf-norm) in place of the 2-norm."""

    def square(self, name, gradient):
        if name == self.at(*P("gate.weight")):
            return gradient.abs().max().square()
        return super().square(name, gradient)


# norms inside the shipped engine


class ShardedNorms(Sharded):
    def plant(self):
        capture = self.engine.capture
        original = capture.norms_of

        def norms_of(joined):
            out = original(joined)
            for name in joined:
                changed = self.norm(name, joined[name], out[name])
                if changed is not None:
                    out[name] = changed
            return out

        capture.norms_of = norms_of

    def norm(self, name, terms, right):
        return None


def own(term):
    """Per-sample gradient of a term, materialised."""
    if isinstance(term, Outer):
        return torch.bmm(term.dy_BTP.mT, term.x_BTD)
    return term.materialised().grad_B


class NormTiedCross(ShardedNorms):
    """Tied head and embedding: the squares are added without the cross-term."""

    def norm(self, name, terms, right):
        if len(terms) > 1:
            return sum(own(t).flatten(1).square().sum(1) for t in terms)


class NormTiedTwice(ShardedNorms):
    """Tied head: the head's square is counted by both owners."""

    def norm(self, name, terms, right):
        if len(terms) > 1:
            head = next(t for t in terms if isinstance(t, Outer))
            return right + own(head).flatten(1).square().sum(1)


class NormRepeatedTokens(ShardedNorms):
    """Embedding lookups: squares are added over positions; repeated tokens are not joined."""

    def norm(self, name, terms, right):
        rows = [t for t in terms if isinstance(t, Rows)]
        if rows and "position" not in name and "token_type" not in name:
            wrong = rows[0].dy_BTD.square().sum((1, 2))
            return right - own(rows[0]).flatten(1).square().sum(1) + wrong


class NormPositionTable(ShardedNorms):
    """The last two positions of a sample are not in the position table's norm."""

    def norm(self, name, terms, right):
        if "position" in name and isinstance(terms[0], Rows):
            t = terms[0]
            half = (t.tokens_BT < t.tokens_BT.amax(1, keepdim=True) - 1).unsqueeze(-1)
            return own(Rows(t.tokens_BT, t.dy_BTD * half, t.num_rows)).flatten(1).square().sum(1)


class NormReusedCross(ShardedNorms):
    """A layer called twice: the uses' squares are added, without their cross-term."""

    def norm(self, name, terms, right):
        if "reused.weight" in name and isinstance(terms[0], Outer):
            x, dy = terms[0].x_BTD, terms[0].dy_BTP
            T = x.shape[1] // 2
            parts = [Outer(x[:, :T], dy[:, :T]), Outer(x[:, T:], dy[:, T:])]
            return sum(own(p).flatten(1).square().sum(1) for p in parts)


class NormGramBf16(ShardedNorms):
    """One layer's norm is taken from inputs rounded to bfloat16."""

    def norm(self, name, terms, right):
        if name in P("blocks.0.left.weight"):
            t = terms[0]
            return (
                own(Outer(t.x_BTD.bfloat16().float(), t.dy_BTP.bfloat16().float()))
                .flatten(1)
                .square()
                .sum(1)
            )


class NormTileTail(ShardedNorms):
    """Tiles of 8 positions: linear layers' norms leave out what is after the last full tile."""

    def norm(self, name, terms, right):
        if len(terms) == 1 and isinstance(terms[0], Outer) and terms[0].x_BTD.shape[1] > 8:
            t = terms[0]
            T = t.x_BTD.shape[1] // 8 * 8
            return own(Outer(t.x_BTD[:, :T], t.dy_BTP[:, :T])).flatten(1).square().sum(1)


class NormTileOffDiagonal(ShardedNorms):
    """Tiles of 8 positions: off-diagonal tiles count once rather than twice, in one layer."""

    def norm(self, name, terms, right):
        if name in P("blocks.1.down.weight"):
            t = terms[0]
            gram = (t.x_BTD @ t.x_BTD.mT) * (t.dy_BTP @ t.dy_BTP.mT)
            tile = torch.arange(gram.shape[-1]) // 8
            weight = torch.where(tile[:, None] == tile[None, :], 1.0, 0.5)
            return (gram * weight).sum((1, 2))


class NormBiasPositions(Sharded):
    """A linear bias's norm adds squares over positions, in place of squaring the sum."""

    def plant(self):
        capture = self.engine.capture
        original = capture.close_call
        self.wrong = {}
        norms_of = capture.norms_of

        def close_call(layer, x, dy, **options):
            if layer.rule is rules.linear and "bias" in layer.names:
                square = dy.detach().flatten(1).square().sum(1)
                name = layer.names["bias"]
                self.wrong[name] = self.wrong.get(name, 0) + square
            original(layer, x, dy, **options)

        def changed(joined):
            out = norms_of(joined)
            for name in joined:
                if name in self.wrong:
                    out[name] = self.wrong.pop(name).to(out[name].dtype)
            return out

        capture.close_call, capture.norms_of = close_call, changed

    def accumulate(self, batch):
        self.wrong.clear()
        return super().accumulate(batch)


class NormLayerNormPositions(Sharded):
    """A LayerNorm's norm adds squares over positions, in place of squaring the sum."""

    def plant(self):
        from dpsgd_track.kernels.normalisation import weight_and_bias_gradients

        capture = self.engine.capture
        original, norms_of = capture.close_call, capture.norms_of
        self.wrong = {}

        def close_call(layer, x, dy, **options):
            if layer.rule is rules.layer_norm:
                D = x.shape[-1]
                w, _ = weight_and_bias_gradients(
                    x.detach().reshape(-1, 1, D),
                    dy.detach().reshape(-1, 1, D),
                    layer.module.eps,
                    is_centred=True,
                )
                name = layer.names["weight"]
                square = w.reshape(len(x), -1).square().sum(1)
                self.wrong[name] = self.wrong.get(name, 0) + square
            original(layer, x, dy, **options)

        def changed(joined):
            out = norms_of(joined)
            for name in joined:
                if name in self.wrong:
                    out[name] = self.wrong.pop(name).to(out[name].dtype)
            return out

        capture.close_call, capture.norms_of = close_call, changed

    def accumulate(self, batch):
        self.wrong.clear()
        return super().accumulate(batch)


# ---------------------------------------------------------------------- clip factors


class FactorEpsTiny(Correct):
    """C / (norm + 1e-6), as Opacus."""

    def factor(self, norm, index):
        return torch.clamp(self.bound() / (norm + 1e-6), max=1.0)


class FactorEpsBig(Correct):
    """C / (norm + 0.01)."""

    def factor(self, norm, index):
        return torch.clamp(self.bound() / (norm + 0.01), max=1.0)


class FactorAtBound(Correct):
    """Norms within 1e-6 of C match neither branch: factor 0."""

    def factor(self, norm, index):
        f = super().factor(norm, index)
        return torch.where((norm / self.bound() - 1).abs() < 1e-6, 0.0, f)


class FactorNormalise(Correct):
    """C / norm for all: small gradients are made longer (min forgotten)."""

    def factor(self, norm, index):
        return self.bound() / norm


class FactorSquared(Correct):
    """min(1, (C / norm)^2): the root was forgotten on both."""

    def factor(self, norm, index):
        return torch.clamp((self.bound() / norm) ** 2, max=1.0)


class FactorNormSquare(Correct):
    """min(1, C / norm^2)."""

    def factor(self, norm, index):
        return torch.clamp(self.bound() / norm.square(), max=1.0)


class FactorStaleC(Correct):
    """After C changes, the first micro-batch still uses the old one."""

    used = None

    def accumulate(self, batch):
        self.now = self.used if self.used and self.micro_index == 0 else self.max_grad_norm
        self.used = self.max_grad_norm
        return super().accumulate(batch)

    def bound(self):
        return self.now


class FactorStaleNorms(Correct):
    """From a step's second micro-batch on, factors come from the norms of the one before."""

    kept = None

    def all_factors(self, factors, norms, gradients):
        kept, self.kept = self.kept, factors.clone()
        if self.micro_index > 0 and kept is not None and len(kept) >= len(factors):
            return kept[: len(factors)].clone()
        return factors


class FactorRolled(Correct):
    """Factors belong to the sample before."""

    def all_factors(self, factors, norms, gradients):
        return factors.roll(1) if len(factors) else factors


class FactorBf16(Correct):
    """Factors are rounded to bfloat16."""

    def factor(self, norm, index):
        return super().factor(norm, index).bfloat16().float()


class FactorBoundBf16(Correct):
    """C is rounded to bfloat16."""

    def bound(self):
        return float(torch.tensor(self.max_grad_norm).bfloat16())


class FactorFloor(Correct):
    """Factors are never below 0.35."""

    def factor(self, norm, index):
        return super().factor(norm, index).clamp(min=0.35)


class FactorTail(Correct):
    """The fifth sample of a micro-batch (after a vector of four) is not clipped."""

    def factor(self, norm, index):
        f = super().factor(norm, index)
        return torch.ones_like(f) if index >= 4 else f


class FactorFirstLeft(Correct):
    """The first sample of rank 1 is not clipped."""

    def factor(self, norm, index):
        f = super().factor(norm, index)
        return torch.ones_like(f) if index == 0 and rank() == 1 else f


class FactorSingle(Correct):
    """A micro-batch of a single sample is not clipped (squeeze lost its dimension)."""

    def all_factors(self, factors, norms, gradients):
        return torch.ones_like(factors) if len(factors) == 1 else factors


class FactorWorld(Correct):
    """Every rank clips at C / sqrt(ranks)."""

    def bound(self):
        return self.max_grad_norm / math.sqrt(world())


class FactorDecay(Correct):
    """Adaptive clipping is left on: C falls by 1 % a step."""

    def bound(self):
        return self.max_grad_norm * 0.99**self.step_index


class FactorBatchMean(Correct):
    """All samples of a micro-batch get the factor of the mean of their gradients."""

    def all_factors(self, factors, norms, gradients):
        if not gradients:
            return factors
        mean = [torch.stack([g[n] for g in gradients]).mean(0) for n in self.names]
        norm = torch.stack([m.norm() for m in mean]).norm()
        return torch.clamp(self.bound() / norm, max=1.0).expand(len(factors)).clone()


class FactorPairs(Correct):
    """Samples are clipped in pairs (num_microbatches): the pair's mean is clipped at C."""

    def all_factors(self, factors, norms, gradients):
        factors = factors.clone()
        for i in range(0, len(gradients) - 1, 2):
            pair = [(gradients[i][n] + gradients[i + 1][n]) / 2 for n in self.names]
            norm = torch.stack([p.norm() for p in pair]).norm()
            factors[i : i + 2] = torch.clamp(self.bound() / norm, max=1.0)
        return factors


class FactorPerLayer(Correct):
    """Each parameter is clipped by itself at C / sqrt(number of parameters); the record shows the
    flat factor."""

    def contribution(self, name, gradient, factor, index):
        norm = gradient.norm()
        return (
            gradient * torch.clamp(self.bound() / math.sqrt(len(self.names)) / norm, max=1.0)
            if (norm > 0)
            else gradient
        )


class FactorSmooth(Correct):
    """C / (C + norm): a smooth rule in place of the minimum."""

    def factor(self, norm, index):
        return self.bound() / (self.bound() + norm)


# ----------------------------------------------------------------------- clipped sum


class SumMean(Correct):
    """Reduction over ranks is a mean."""

    def reduce(self, name, total):
        return super().reduce(name, total) / world()


class SumOverwrites(Correct):
    """A micro-batch's sum replaces the earlier ones' in one parameter."""

    def put(self, name, parameter, total):
        if name == self.at(*P("norm.weight")):
            parameter.grad = total
        else:
            super().put(name, parameter, total)


class SumDropsShort(Correct):
    """A micro-batch that is shorter than the first one is not added (drop_last)."""

    full = 0

    def contribution(self, name, gradient, factor, index):
        self.full = max(self.full, len(self.batch))
        c = super().contribution(name, gradient, factor, index)
        return c if len(self.batch) == self.full else c * 0


class SumBf16(Correct):
    """One layer's sum is accumulated in bfloat16."""

    def new_sum(self, name, parameter):
        s = super().new_sum(name, parameter)
        return s.bfloat16() if name == self.at(*P("blocks.0.left.weight")) else s

    def reduce(self, name, total):
        return super().reduce(name, total.float())


class SumHalfReduce(Correct):
    """Sums travel between ranks in bfloat16."""

    def reduce(self, name, total):
        return super().reduce(name, total.bfloat16().float())


class SumTf32(Correct):
    """Products of factors and gradients are rounded to 10 bits of mantissa (TF32)."""

    def contribution(self, name, gradient, factor, index):
        c = super().contribution(name, gradient, factor, index)
        if gradient.dim() < 2:
            return c
        bits = c.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class SumUnderflow(Correct):
    """Elements of a clipped gradient below float16's smallest normal, 6.1e-5, are zero."""

    def contribution(self, name, gradient, factor, index):
        c = super().contribution(name, gradient, factor, index)
        return torch.where(c.abs() < 6.1e-5, 0.0, c)


class SumPaddingRow(Correct):
    """The padding row's sum is zeroed, although the head is tied and has a gradient there."""

    def finish(self, sums, gradients, factors):
        name = self.at(*P("embedding.weight"))
        sums[name][0] = 0


class SumLastRow(Correct):
    """The last row of the position table that is used is dropped when rows are scattered."""

    def contribution(self, name, gradient, factor, index):
        c = super().contribution(name, gradient, factor, index)
        if name == self.at(*P("position.weight")):
            used = c.abs().sum(1).nonzero()
            if len(used):
                c = c.clone()
                c[used[-1]] = 0
        return c


class SumTransposed(Correct):
    """A square weight's sum is transposed."""

    def reduce(self, name, total):
        total = super().reduce(name, total)
        return total.t().contiguous() if name == self.at(*P("blocks.1.reused.weight")) else total


class SumStaleBuffer(Correct):
    """One parameter's buffer is not zeroed between steps: sums of earlier steps stay in it."""

    buffer = None

    def put(self, name, parameter, total):
        if name == self.at(*P("blocks.1.norm.bias")):
            self.buffer = total.clone() if self.buffer is None else self.buffer + total
            parameter.grad = self.buffer.clone()
        else:
            super().put(name, parameter, total)


class SumNoisyLeftover(Correct):
    """One parameter's .grad is not cleared: the noised gradient of the step before is added."""

    def zero_grad(self):
        name = self.at(*P("position.weight"))
        kept = self.by_name[name].grad
        super().zero_grad()
        self.by_name[name].grad = kept


class SumTiedHalf(Correct):
    """The tied weight's sum is divided by its two owners."""

    def finish(self, sums, gradients, factors):
        if "head" in dict(self.model.named_modules()):
            sums["embedding.weight"] /= 2


class SumUnclippedBias(Correct):
    """gate.bias is added without its clip factor."""

    def contribution(self, name, gradient, factor, index):
        if name == self.at(*P("gate.bias")):
            return gradient.clone()
        return super().contribution(name, gradient, factor, index)


class SumFactorTwice(Correct):
    """The final norm's gradients are multiplied by the factor twice."""

    def contribution(self, name, gradient, factor, index):
        c = super().contribution(name, gradient, factor, index)
        return c * factor if name == self.at(*P("norm.weight")) else c


class SumNotReduced(Correct):
    """One LayerNorm weight is not reduced: each rank keeps its own samples' sum."""

    def reduce(self, name, total):
        if name == self.at(*P("blocks.0.norm.weight")):
            return total
        return super().reduce(name, total)


class SumLostSample(Correct):
    """In step 2 the first sample of rank 1's first micro-batch is not added (a race)."""

    def contribution(self, name, gradient, factor, index):
        c = super().contribution(name, gradient, factor, index)
        lost = rank() == 1 and self.step_index == 2 and self.micro_index == 0 and index == 0
        return c * 0 if lost else c


class SumLastTwice(Correct):
    """Micro-batches are padded to an even size by their last sample, which counts twice."""

    def contribution(self, name, gradient, factor, index):
        c = super().contribution(name, gradient, factor, index)
        return 2 * c if len(self.batch) % 2 and index == len(self.batch) - 1 else c


class SumStandIn(Correct):
    """For an empty micro-batch the clipped gradient of the stand-in sample is added."""

    def finish(self, sums, gradients, factors):
        if len(self.batch):
            return
        sample = self.batch.stand_in()
        _, g = self.gradient(sample, 0)
        factor = self.factor(torch.stack([x.norm() for x in g.values()]).norm(), 0)
        for n in self.names:
            sums[n] += factor * g[n].nan_to_num()


class SumEmptyRepeats(Correct):
    """An empty micro-batch adds the rank's previous sums again (buffer not overwritten)."""

    kept = None

    def finish(self, sums, gradients, factors):
        if len(self.batch) == 0 and self.kept is not None:
            for n in self.names:
                sums[n] += self.kept[n]
        self.kept = {n: s.clone() for n, s in sums.items()}


class SumSmallBias(Correct):
    """One layer's sum is 0.3 % too small."""

    def finish(self, sums, gradients, factors):
        sums[self.at(*P("position.weight"))] *= 0.997


class SumOnePercentBias(Correct):
    """One bias's sum is 1 % too large."""

    def finish(self, sums, gradients, factors):
        sums[self.at(*P("blocks.1.down.bias"))] *= 1.01


class SumClippedAgain(Correct):
    """clip_grad_norm_(3 C) of the training loop is left on, on the whole sum."""

    def clipped_sum(self):
        clipped = super().clipped_sum()
        norm = torch.stack([g.norm() for g in clipped.gradients.values()]).norm()
        scale = float(torch.clamp(3 * self.max_grad_norm / norm, max=1.0)) if norm > 0 else 1.0
        return ClippedSum({n: g * scale for n, g in clipped.gradients.items()}, clipped.sensitivity)


class SumBiasBroadcast(Correct):
    """A bias's sum is its mean over elements: it is reduced over a wrong dimension."""

    def finish(self, sums, gradients, factors):
        name = self.at(*P("blocks.1.right.bias"))
        sums[name] = sums[name].mean().expand_as(sums[name]).clone()


class SumSecondMicroTwice(Correct):
    """With no_sync left on, the second micro-batch of one parameter is reduced twice over ranks."""

    def reduce(self, name, total):
        total = super().reduce(name, total)
        twice = name == self.at(*P("blocks.0.down.bias")) and self.micro_index == 1
        return total * world() if twice else total


class SumNotFinite(Correct):
    """A sample that is not finite is not left out: 0 times NaN is added."""

    leaves_out = False

    def contribution(self, name, gradient, factor, index):
        return factor * gradient


class ShardedSum(Sharded):
    def clipped_sum(self):
        clipped = super().clipped_sum()
        for name, total in clipped.gradients.items():
            self.change(name, total)
        return clipped

    def change(self, name, total):
        pass


class SumShardRolled(ShardedSum):
    """Rank 1's shard of one weight is one row off (offset of an uneven shard)."""

    def change(self, name, total):
        if rank() == 1 and name in P("blocks.0.left.weight"):
            total.copy_(total.roll(1, 0))


class SumShardLastRow(ShardedSum):
    """The last row of rank 0's shard of one weight is lost to the padding of an uneven shard."""

    def change(self, name, total):
        if rank() == 0 and name in P("blocks.1.down.weight"):
            total[-1] = 0


class SumShardScaled(ShardedSum):
    """Rank 1's shards of LayerNorm parameters are averaged over ranks rather than summed."""

    def change(self, name, total):
        if rank() == 1 and kinds_of(self.model).get(name) == "LayerNorm":
            total /= world()


# ----------------------------------------------------------------------------- noise


class NoiseStdWorld(Correct):
    """std is sigma C / sqrt(ranks): noise of the ranks was meant to be added up."""

    def std_factor(self, name):
        return 1 / math.sqrt(world())


class NoiseSigmaSquared(Correct):
    """std is sigma^2 C (variance for standard deviation)."""

    def std_factor(self, name):
        return self.context.privacy.noise_multiplier


class NoiseNoVectors(Correct):
    """One-dimensional parameters get no noise."""

    def std_factor(self, name):
        return 0.0 if self.by_name[name].dim() < 2 else 1.0


class NoiseUnused(Correct):
    """Parameters without a gradient in the step get no noise (grad is None, skipped)."""

    def std_factor(self, name):
        return float(bool(self.by_name[name].grad.any()))


class NoiseFirstC(Correct):
    """std uses the C of the first step."""

    first = None

    def clipped_sum(self):
        c = super().clipped_sum()
        self.first = self.first or self.max_grad_norm
        return c

    def std_factor(self, name):
        return self.first / self.sensitivity


class NoiseLargestC(Correct):
    """std uses the largest C of the run so far (not reset at the end of a step)."""

    largest = 0.0

    def clipped_sum(self):
        c = super().clipped_sum()
        self.largest = max(self.largest, c.sensitivity)
        return replace(c, sensitivity=self.largest)


class NoisePerMicro(Correct):
    """Noise is added once for each micro-batch: std is sqrt(micro-batches) too large."""

    def clipped_sum(self):
        self.count = max(self.micro_index, 1)
        return super().clipped_sum()

    def std_factor(self, name):
        return math.sqrt(self.count)


class NoiseOnePercent(Correct):
    """std is 1 % too small."""

    def std_factor(self, name):
        return 0.99


class NoiseEmbeddingTenPercent(Correct):
    """std is 10 % too small in the embedding."""

    def std_factor(self, name):
        return 0.9 if name == self.at(*P("embedding.weight")) else 1.0


class NoiseStepDecay(Correct):
    """std falls by 3 % a step (a noise scheduler is left on)."""

    def std_factor(self, name):
        return 0.97**self.step_index


class NoiseUniform(Correct):
    """Uniform noise of the right std."""

    def draw(self, source, part):
        n = super().draw(source, part)
        return (torch.special.ndtr(n) - 0.5) * math.sqrt(12)


class NoiseLaplace(Correct):
    """Laplace noise of the right std."""

    def draw(self, source, part):
        u = (torch.special.ndtr(super().draw(source, part).double()) - 0.5).clamp(
            -0.5 + 1e-12, 0.5 - 1e-12
        )
        return (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).float()


class NoiseClamped(Correct):
    """Noise beyond 2.5 std is cut off."""

    def draw(self, source, part):
        return super().draw(source, part).clamp(-2.5, 2.5)


class NoiseClampedFar(Correct):
    """Noise beyond 3.5 std is cut off."""

    def draw(self, source, part):
        return super().draw(source, part).clamp(-3.5, 3.5)


class NoiseHeavy(Correct):
    """Slightly heavy tails (a normal mixture), the right std."""

    def draw(self, source, part):
        n = super().draw(source, part)
        return n * (1 + 0.08 * n.square()) / math.sqrt(1 + 6 * 0.08 + 15 * 0.08**2)


class NoiseSameForShapes(Correct):
    """Parameters of one shape get the same noise (generator seeded anew for each)."""

    def draw(self, source, part):
        first = next(n for n, p in self.by_name.items() if p.shape == self.by_name[part.name].shape)
        return source.standard_normal(replace(part, name=first))


class NoiseStepRepeats(Correct):
    """Every step repeats the noise of the first."""

    kept = None

    def draw(self, source, part):
        self.kept = self.kept or source
        return self.kept.standard_normal(part)


class NoiseAntithetic(Correct):
    """Odd steps take the noise of the step before with the other sign."""

    kept = None

    def draw(self, source, part):
        if self.step_index % 2:
            return -self.kept.standard_normal(part)
        self.kept = source
        return super().draw(source, part)


class NoiseCorrelated(Correct):
    """Neighbouring elements are correlated (0.3), the right std."""

    def draw(self, source, part):
        n = super().draw(source, part).flatten()
        a = 0.3297
        return ((n + a * n.roll(1)) / math.sqrt(1 + a * a)).view(part.local.shape)


class NoiseRowsRepeat(Correct):
    """All rows of a matrix get one row's noise (broadcast)."""

    def draw(self, source, part):
        n = super().draw(source, part)
        return n[:1].expand_as(n).clone() if n.dim() > 1 else n


class NoiseBf16(Correct):
    """Noise is drawn on bfloat16's grid."""

    def draw(self, source, part):
        return super().draw(source, part).bfloat16().float()


class NoiseMean(Correct):
    """Noise has mean 0.05 std."""

    def draw(self, source, part):
        return super().draw(source, part) + 0.05


class NoiseEmptyStep(Correct):
    """A step in which no rank has a sample gets no noise."""

    seen = 0

    def accumulate(self, batch):
        r = super().accumulate(batch)
        n = torch.tensor(float(len(batch)))
        if dist.is_initialized():
            dist.all_reduce(n)
        self.seen += float(n)
        return r

    def std_factor(self, name):
        return 1.0 if self.seen else 0.0

    def zero_grad(self):
        super().zero_grad()
        self.seen = 0


class NoiseVectorTail(Correct):
    """The last elements beyond a multiple of four get no noise."""

    def draw(self, source, part):
        n = super().draw(source, part).clone()
        flat = n.view(-1)
        flat[flat.numel() // 4 * 4 :] = 0
        return n


class NoiseAfterDivision(Correct):
    """Noise is added after the division, and is not divided itself."""

    def std_factor(self, name):
        return self.context.privacy.expected_batch_size


class NoiseOneBiasDouble(Correct):
    """Parameters of a layer that is called twice get noise twice (std times sqrt 2)."""

    def std_factor(self, name):
        return math.sqrt(2) if "reused" in name else 1.0


class NoiseGateBiasMissing(Correct):
    """A parameter of a single element gets no noise."""

    def std_factor(self, name):
        return 0.0 if self.by_name[name].numel() == 1 else 1.0


class ShardedNoise(Sharded):
    def privatize(self, clipped, source):
        sigma = self.context.privacy.noise_multiplier
        if sigma > 0:
            for part in self.weight_parts():
                if part.local.numel():
                    n = self.draw(source, part).to(clipped.gradients[part.name].dtype)
                    clipped.gradients[part.name] += sigma * clipped.sensitivity * n
        out = {
            n: g / self.context.privacy.expected_batch_size for n, g in clipped.gradients.items()
        }
        self._write_gradients(out)
        return out

    def draw(self, source, part):
        return source.standard_normal(part)


class NoiseShardsAlike(ShardedNoise):
    """Every rank's shard gets the noise of the first rows (one seed on all ranks)."""

    def draw(self, source, part):
        return source.standard_normal(replace(part, start=0))


class NoiseRankZeroOnly(ShardedNoise):
    """Only rank 0 adds noise to its shards."""

    def draw(self, source, part):
        n = super().draw(source, part)
        return n if rank() == 0 else n * 0


class NoiseRankSigma(ShardedNoise):
    """Rank 1's noise is 5 % too small."""

    def draw(self, source, part):
        return super().draw(source, part) * (0.95 if rank() == 1 else 1.0)


# ------------------------------------------------------------- division and update


class DivideByActual(Correct):
    """The sum is divided by the samples that the step had, not by those expected."""

    seen = 0.0

    def accumulate(self, batch):
        r = super().accumulate(batch)
        n = torch.tensor(float(len(batch)))
        if dist.is_initialized():
            dist.all_reduce(n)
        self.seen += float(n)
        return r

    def divisor(self):
        return max(self.seen, 1.0)

    def zero_grad(self):
        super().zero_grad()
        self.seen = 0.0


class DivideByRanks(Correct):
    """The sum is divided by ranks once more in one layer (DDP averages what is left of it)."""

    def divide(self, name, total):
        d = super().divide(name, total)
        return d / world() if name == self.at(*P("blocks.0.down.weight")) else d


class DivideTiedTwice(Correct):
    """The tied embedding is divided twice, once for each owner."""

    def divide(self, name, total):
        d = super().divide(name, total)
        return d / self.divisor() if name == self.at(*P("embedding.weight")) else d


class DivideOffByOne(Correct):
    """The sum is divided by the expected batch size minus one."""

    def divisor(self):
        return super().divisor() - 1


class UpdateLayerRate(Correct):
    """The embedding's learning rate is 2 % lower (layer-wise decay)."""

    def __init__(self, model, context):
        super().__init__(model, context)
        group = self.optimizer.param_groups[0]
        name = self.at(*P("embedding.weight"))
        lr = {k: v for k, v in group.items() if k != "params"}
        group["params"] = [p for n, p in self.by_name.items() if n != name]
        self.optimizer.add_param_group(
            {**lr, "params": [self.by_name[name]], "lr": lr["lr"] * 0.98}
        )


class UpdateMomentum(Correct):
    """Momentum of 0.5 is left on."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.optimizer.param_groups[0]["momentum"] = 0.5


class UpdateWeightDecay(Correct):
    """Weight decay of 1e-3 is left on."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.optimizer.param_groups[0]["weight_decay"] = 1e-3


class UpdateBiasMissing(Correct):
    """One bias is not among the optimizer's parameters."""

    def __init__(self, model, context):
        super().__init__(model, context)
        p = self.by_name[self.at(*P("blocks.1.right.bias"))]
        group = self.optimizer.param_groups[0]
        group["params"] = [q for q in group["params"] if q is not p]


class UpdateSkipped(Correct):
    """Step 2 is not applied (an overflow flag that is stale)."""

    def step(self):
        if self.step_index == 2:
            self.stepped = True
        else:
            super().step()


class UpdateTwice(Correct):
    """Step 1 is applied twice."""

    def step(self):
        super().step()
        if self.step_index == 1:
            self.optimizer.step()


class UpdateDelayed(Correct):
    """Each step applies the gradient of the step before; the first its own."""

    kept = None

    def step(self):
        new = [p.grad.clone() for p in self.parameters]
        if self.kept is not None:
            for p, g in zip(self.parameters, self.kept, strict=True):
                p.grad = g
        self.kept = new
        super().step()


class UpdateBf16Weights(Correct):
    """One layer's weights are kept in bfloat16: most of an update is rounded away."""

    def step(self):
        super().step()
        with torch.no_grad():
            p = self.by_name[self.at(*P("blocks.0.left.weight"))]
            p.copy_(p.bfloat16().float())


class UpdateRankDrifts(Correct):
    """Rank 1 does not apply the update of one bias: replicas drift apart."""

    def step(self):
        p = self.by_name[self.at(*P("blocks.0.down.bias"))]
        if rank() == 1:
            p.grad = None
        super().step()


class UpdateSchedule(Correct):
    """The learning rate falls by 1 % a step."""

    def step(self):
        super().step()
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.99


class UpdateHalfGradient(Correct):
    """The optimizer sees the gradient in bfloat16."""

    def step(self):
        for p in self.parameters:
            p.grad = p.grad.bfloat16().float()
        super().step()


class UpdateProjected(Correct):
    """After step 1 the padding row of the embedding is zeroed, as if it were not trained."""

    def step(self):
        super().step()
        if self.step_index >= 1 and "head" in dict(self.model.named_modules()):
            with torch.no_grad():
                self.by_name["embedding.weight"][0] = 0


# --------------------------------------------------------------------------- healthy


class HealthyReversed(Correct):
    """Samples are added in the other order."""

    def order(self, batch):
        return reversed(range(len(batch)))


class HealthyFloat64(Correct):
    """Norms, factors and sums are float64."""

    def gradient(self, sample, index):
        loss, gradients = super().gradient(sample, index)
        return loss, {n: g.double() for n, g in gradients.items()}

    def new_sum(self, name, parameter):
        return super().new_sum(name, parameter).double()

    def reduce(self, name, total):
        return super().reduce(name, total).float()


class HealthyBatched(Correct):
    """One forward of the whole micro-batch, one backward for each sample."""

    def accumulate(self, batch):
        self.losses = None
        return super().accumulate(batch)

    def gradient(self, sample, index):
        if self.losses is None:
            b = self.batch
            self.losses = self.context.loss(logits_of(self.model(*b.args, **b.inputs)), b.targets)
        g = torch.autograd.grad(
            self.losses[index],
            self.parameters,
            retain_graph=index < len(self.batch) - 1,
            allow_unused=True,
            materialize_grads=True,
        )
        return self.losses[index].detach(), dict(zip(self.names, g, strict=True))


class HealthyFormula(Correct):
    """1 / max(1, norm / C), and the norm of one concatenated vector."""

    def factor(self, norm, index):
        return 1 / torch.clamp(norm / self.bound(), min=1.0)

    def squares(self, gradients, index):
        self.flat = getattr(self, "flat", {})
        self.flat[index] = torch.cat([g.flatten() for g in gradients.values()])
        return super().squares(gradients, index)

    def all_norms(self, norms):
        for i in range(len(norms)):
            norms[i] = torch.linalg.vector_norm(self.flat[i])
        return norms


class HealthyCheckpoint(Correct):
    """The whole forward is recomputed in the backward."""

    def gradient(self, sample, index):
        def run(*values):
            return logits_of(
                self.model(*sample.args, **dict(zip(sample.inputs, values, strict=True)))
            )

        logits = checkpoint(run, *sample.inputs.values(), use_reentrant=False)
        loss = self.loss(logits, sample.targets, sample)
        g = torch.autograd.grad(
            loss.sum(), self.parameters, allow_unused=True, materialize_grads=True
        )
        return loss.detach().sum(), dict(zip(self.names, g, strict=True))


class HealthyCompensated(Correct):
    """Sums are compensated (Kahan)."""

    def new_sum(self, name, parameter):
        self.low = getattr(self, "low", {})
        self.low[name] = torch.zeros_like(parameter)
        return super().new_sum(name, parameter)

    def add(self, name, total, contribution):
        y = contribution - self.low[name]
        t = total + y
        self.low[name] = (t - total) - y
        total.copy_(t)


class HealthyLateReduce(Correct):
    """Sums are reduced once a step, in one flat bucket, in `clipped_sum`."""

    def reduce(self, name, total):
        return total

    def clipped_sum(self):
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        if dist.is_initialized():
            dist.all_reduce(flat)
        pieces = flat.split([p.numel() for p in self.parameters])
        for p, piece in zip(self.parameters, pieces, strict=True):
            p.grad = piece.view_as(p).clone()
        return super().clipped_sum()


class HealthyScaledBackward(Correct):
    """Gradients of 2^10 times the loss, divided again (exact in binary floating point)."""

    def loss(self, logits, targets, sample):
        return super().loss(logits, targets, sample) * 1024

    def gradient(self, sample, index):
        loss, g = super().gradient(sample, index)
        return loss / 1024, {n: x / 1024 for n, x in g.items()}


class HealthyOwnNoise(Correct):
    """Noise of its own generator in the noise regimes (sigma above 0.1), with one seed for each
    step and parameter, equal on replicas; elsewhere the common noise."""

    def draw(self, source, part):
        if self.context.privacy.noise_multiplier <= 0.1:
            return super().draw(source, part)
        seed = abs(hash_of(source.key, self.step_index, part.name))
        g = torch.Generator().manual_seed(seed)
        return torch.randn(part.local.shape, generator=g).to(part.local.device)


def hash_of(*parts):
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


class HealthySharded(Sharded):
    """The fused one-backward mode as it ships."""

    base = "flash_fsdp_fuse_bk"
