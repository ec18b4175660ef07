"""Faults in DP-SGD implementations, written from the mathematics, blind to the comparison.

`Hooked` is a correct mode: it captures each layer's inputs and output gradients in one batched
backward, takes per-sample norms by inner products of these terms (ghost norms), and sums them
weighted by the clip factors. `Sharded` is flash_fsdp as it ships. Every other class is one of these
with one deviation, which its docstring says. Steps, micro-batches and samples count from 0.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.dropout import only


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------- terms


@dataclass
class Outer:
    """Gradient of a linear weight: sum over positions of g_t (outer) a_t."""

    a: Tensor  # [B, T, in]
    g: Tensor  # [B, T, out]

    def weighted(self, w_B):
        return torch.einsum("bto,bti,b->oi", self.g, self.a, w_B)

    def each(self):
        return torch.einsum("bto,bti->boi", self.g, self.a)


@dataclass
class Rows:
    """Gradient of an embedding: g_t is added to row ids_t."""

    ids: Tensor  # [B, T]
    g: Tensor  # [B, T, D]
    rows: int

    def weighted(self, w_B):
        flat = (self.g * w_B[:, None, None]).flatten(0, 1)
        out = flat.new_zeros(self.rows, flat.shape[1])
        return out.index_add_(0, self.ids.flatten(), flat)

    def each(self):
        out = self.g.new_zeros(len(self.ids), self.rows, self.g.shape[2])
        index = self.ids[:, :, None].expand_as(self.g)
        return out.scatter_add_(1, index, self.g)


@dataclass
class Vec:
    """Gradient of a bias or a scale: sum over positions of v_t."""

    v: Tensor  # [B, T, D]

    def weighted(self, w_B):
        return torch.einsum("btd,b->d", self.v, w_B)

    def each(self):
        return self.v.sum(1)


def gram(x, y):
    return x @ y.transpose(1, 2)


def inner(x, y):
    """<gradient of term x, gradient of term y> of each sample, [B]."""
    if isinstance(x, Rows) and isinstance(y, Outer):
        x, y = y, x
    if isinstance(x, Vec):
        return (x.each() * y.each()).sum(1)
    if isinstance(x, Outer) and isinstance(y, Outer):
        return (gram(x.a, y.a) * gram(x.g, y.g)).sum((1, 2))
    if isinstance(x, Rows) and isinstance(y, Rows):
        same = x.ids[:, :, None] == y.ids[:, None, :]
        return (gram(x.g, y.g) * same).sum((1, 2))
    T = x.g.shape[1]
    picked = x.g.gather(2, y.ids[:, None, :].expand(-1, T, -1))
    return (gram(x.a, y.g) * picked).sum((1, 2))


def norm_sq_of(terms):
    """Squared norm of each sample's gradient of one parameter, cross terms included."""
    total = 0.0
    for i, x in enumerate(terms):
        total = total + inner(x, x)
        for y in terms[i + 1 :]:
            total = total + 2 * inner(x, y)
    return total


def positions(x):
    """[B, ..., D] as [B, T, D]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


# -------------------------------------------------------------------------- healthy bases


class Counted:
    """Counts steps, and the micro-batches of each."""

    step_index = 0
    micro_index = 0
    has_stepped = False

    def step(self):
        self.update()
        self.has_stepped = True

    def update(self):
        super().step()

    def zero_grad(self):
        super().zero_grad()
        if self.has_stepped:
            self.step_index += 1
        self.has_stepped = False
        self.micro_index = 0


class Hooked(Counted, Mode):
    """Ghost norms and weighted sums from hooks, on a replicated model. Correct."""

    replicated = True

    def __init__(self, model, context):
        super().__init__(context)
        self.model = model
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.by_name = named
        self.names, self.parameters = list(named), list(named.values())
        self.name_of = {id(p): n for n, p in named.items()}
        self.optimizer = context.make_optimizer(self.optimized())
        self.sums = {}
        self.calls = []
        self.capturing = False
        for fqn, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_hook(self._hook(fqn))
        self.patch(model)

    def patch(self, model):
        pass

    def optimized(self):
        return self.parameters

    def _hook(self, fqn):
        def hook(module, inputs, output):
            if self.capturing:
                self.calls.append((fqn, module, inputs[0].detach(), output))

        return hook

    # --- data, forward and loss
    def prepare(self, batch):
        return batch

    def forward(self, batch):
        return batch.run(self.model)

    def loss(self, logits, targets, batch):
        return self.context.loss(logits, targets)

    # --- terms
    def capture(self, batch):
        """(loss of each sample, terms by parameter)."""
        self.calls, self.capturing = [], True
        try:
            loss_B = self.loss(self.forward(batch), batch.targets, batch)
        finally:
            self.capturing = False
        calls = self.calls
        grads = torch.autograd.grad(
            self.total_loss(loss_B),
            [output for *_, output in calls],
            allow_unused=True,
            materialize_grads=True,
        )
        terms = {n: [] for n in self.names}
        seen = [
            (fqn, module, x, self.output_grad(fqn, g, loss_B))
            for (fqn, module, x, _), g in zip(calls, grads, strict=True)
        ]
        for fqn, module, x, g in self.pairs(seen):
            for local, term in self.terms_of(fqn, module, x, g).items():
                name = self.name_of.get(id(getattr(module, local)))
                if name is not None:
                    terms[name].append(term)
        self.calls = []
        return loss_B.detach(), terms

    def total_loss(self, loss_B):
        return loss_B.sum()

    def output_grad(self, fqn, g, loss_B):
        return g

    def pairs(self, seen):
        return seen

    def terms_of(self, fqn, module, x, g):
        out = {}
        if isinstance(module, nn.Embedding):
            ids = x.reshape(x.shape[0], -1)
            g = positions(g)
            if module.padding_idx is not None:
                g = g * (ids != module.padding_idx)[:, :, None]
            out["weight"] = Rows(ids, g, module.num_embeddings)
        elif isinstance(module, nn.Linear):
            out["weight"] = Outer(positions(x), positions(g))
            if module.bias is not None:
                out["bias"] = Vec(positions(g))
        elif isinstance(module, nn.LayerNorm):
            hat = self.hat(fqn, module, x)
            out["weight"] = Vec(positions(g * hat))
            out["bias"] = Vec(positions(g))
        elif "RMSNorm" in type(module).__name__:
            out["weight"] = Vec(positions(g * self.hat(fqn, module, x)))
        else:
            raise TypeError(f"{fqn}: no rule for {type(module).__name__}")
        return out

    def hat(self, fqn, module, x):
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    # --- norms
    def norm_sq(self, name, terms, batch):
        if not terms:
            return torch.zeros(len(batch), device=self.context.device)
        return norm_sq_of(terms).clamp(min=0)

    def total(self, squares):
        return torch.stack(list(squares.values())).sum(0).sqrt()

    def all_norms(self, norm_B):
        return norm_B

    # --- factors
    def bound(self):
        return self.max_grad_norm

    def factors(self, norm_B, batch):
        return (self.bound() / norm_B).clamp(max=1.0)

    # --- sums
    def weighted(self, name, terms, w_B):
        total = torch.zeros_like(self.by_name[name])
        for term in terms:
            total += term.weighted(w_B)
        return total

    def local_sums(self, batch, terms, w_B):
        return {n: self.weighted(n, terms[n], w_B) for n in self.names}

    def keep(self, name, total):
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def on_empty(self):
        pass

    def keep_all(self, sums):
        for n, total in sums.items():
            self.keep(n, total)

    def accumulate(self, batch):
        batch = self.prepare(batch)
        num = len(batch)
        empty = torch.zeros(0, device=self.context.device)
        if num == 0:
            with torch.no_grad():
                self.on_empty()
                self.all_norms(empty)
            record = SampleRecord(empty, empty, empty, dict.fromkeys(self.names, empty))
        else:
            loss_B, terms = self.capture(batch)
            with torch.no_grad():
                squares = {n: self.norm_sq(n, terms[n], batch) for n in self.names}
                norm_B = self.all_norms(self.total(squares))
                factor_B = self.factors(norm_B, batch)
                counts = self.counts(loss_B, norm_B)
                factor_B = torch.where(counts, factor_B, 0.0)
            with torch.no_grad():
                self.keep_all(self.local_sums(batch, terms, factor_B))
            by_name = {n: s.sqrt() for n, s in squares.items()}
            record = self.record(batch, SampleRecord(loss_B, norm_B, factor_B, by_name))
        self.note_bound()
        self.micro_index += 1
        return record

    def counts(self, loss_B, norm_B):
        return loss_B.isfinite() & norm_B.isfinite()

    def record(self, batch, record):
        return record

    def reduce(self, name, total):
        return all_reduce(total)

    def reduce_all(self):
        for n, p in self.by_name.items():
            total = self.sums.get(n)
            self.sums[n] = self.reduce(n, torch.zeros_like(p) if total is None else total)

    def clipped_sum(self):
        with torch.no_grad():
            self.reduce_all()
        for n, p in self.by_name.items():
            p.grad = self.sums[n]
        return super().clipped_sum()

    def zero_grad(self):
        super().zero_grad()
        self.sums = {}

    # --- noise
    def noise(self, source, part, std):
        return std * source.standard_normal(part)

    def std(self, clipped, name):
        return self.context.privacy.noise_multiplier * clipped.sensitivity

    def divisor(self):
        return self.context.privacy.expected_batch_size

    def privatize(self, clipped, source):
        out = {}
        for part in self.weight_parts():
            total = clipped.gradients[part.name]
            if self.context.privacy.noise_multiplier > 0:
                std = self.std(clipped, part.name)
                total = total + self.noise(source, part, std).to(total.dtype)
            out[part.name] = total / self.divisor()
        self._write_gradients(out)
        return out


class Sharded(Counted, ComposedMode):
    """flash_fsdp as it ships. Correct."""

    base = "flash_fsdp"

    def __init__(self, model, context):
        super().__init__(MODES[self.base], model, context)

    def accumulate(self, batch):
        record = super().accumulate(batch)
        self.micro_index += 1
        return record


class Materialised(Hooked):
    """The same terms, multiplied out to one gradient a sample before norms and sums. Correct."""

    def norm_sq(self, name, terms, batch):
        if not terms:
            return torch.zeros(len(batch), device=self.context.device)
        return sum(term.each() for term in terms).flatten(1).square().sum(1)


def generator(*what):
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)


def own_normal(part, *what):
    """Standard normal noise of the mode's own, in the shape of `part`, alike on all ranks."""
    drawn = torch.randn(part.local.shape, generator=generator(*what, part.name))
    return drawn.to(part.local.device)


def lengths(batch):
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(batch.targets)
    return mask.reshape(len(batch), -1).sum(1)


def with_inputs(batch, targets=None, **changed):
    inputs = {n: changed.get(n, t) for n, t in batch.inputs.items()}
    return Batch(inputs, batch.targets if targets is None else targets, args=batch.args)


# ================================================================== norms, 16


class NormCallsPairedInOrder(Hooked):
    """Inputs of a layer called twice are popped from the front in the backward: calls are mixed."""

    def pairs(self, seen):
        inputs = {}
        for fqn, _, x, _ in seen:
            inputs.setdefault(fqn, []).append(x)
        # The backward runs from the last call to the first; pop() would have been right.
        return [(fqn, module, inputs[fqn].pop(0), g) for fqn, module, _, g in reversed(seen)]


class NormPositionsUnique(Hooked):
    """A position embedding's norm takes each position to occur once; padding repeats one."""

    def norm_sq(self, name, terms, batch):
        if name.startswith("position") or "position_embeddings" in name:
            return sum(x.g.square().sum((1, 2)) for x in terms)
        return super().norm_sq(name, terms, batch)


class NormLayerNormRawInput(Hooked):
    """The norm of a LayerNorm's weight is taken with the layer's input, not the normalised one."""

    def terms_of(self, fqn, module, x, g):
        out = super().terms_of(fqn, module, x, g)
        if isinstance(module, nn.LayerNorm):
            out["weight"].raw = positions(g * x)
        return out

    def norm_sq(self, name, terms, batch):
        raw = [Vec(x.raw) if hasattr(x, "raw") else x for x in terms]
        return super().norm_sq(name, raw, batch)


class NormRmsCentred(Hooked):
    """RMSNorm's scale has the norm rule of LayerNorm: its input is centred as well."""

    def terms_of(self, fqn, module, x, g):
        out = super().terms_of(fqn, module, x, g)
        if "RMSNorm" in type(module).__name__:
            out["weight"].raw = positions(g * F.layer_norm(x, x.shape[-1:]))
        return out

    def norm_sq(self, name, terms, batch):
        raw = [Vec(x.raw) if hasattr(x, "raw") else x for x in terms]
        return super().norm_sq(name, raw, batch)


class NormLocalNamesCollide(Hooked):
    """The total runs over a dict keyed by the name inside a block: block 1 overwrites block 0."""

    def total(self, squares):
        by_local = {}
        for n, s in squares.items():
            parts = n.split(".")
            digits = [i for i, part in enumerate(parts) if part.isdigit()]
            by_local[".".join(parts[digits[0] + 1 :] if digits else parts)] = s
        return super().total(by_local)


class NormAddedOverRanks(Hooked):
    """Squared norms are added over ranks as if parameters, not samples, were spread over them."""

    def all_norms(self, norm_B):
        most = all_reduce(
            torch.tensor(
                [len(norm_B) * (i == rank()) for i in range(world())], device=norm_B.device
            )
        ).max()
        squares = torch.zeros(int(most), device=norm_B.device)
        squares[: len(norm_B)] = norm_B.square()
        return all_reduce(squares)[: len(norm_B)].sqrt()


class NormScaledByFullBatch(Hooked):
    """Output gradients of a mean loss are scaled back by the full micro-batch's size."""

    full = 0

    def total_loss(self, loss_B):
        self.full = max(self.full, len(loss_B))
        return loss_B.mean()

    def output_grad(self, fqn, g, loss_B):
        return g * self.full


class NormPaddingMasked(Hooked):
    """Norms of linear weights skip padding positions, whose gradients are not zero here."""

    def norm_sq(self, name, terms, batch):
        mask = batch.inputs.get("attention_mask")
        kept = []
        for x in terms:
            if isinstance(x, Outer) and mask is not None and x.g.shape[1] == mask.shape[1]:
                x = Outer(x.a, x.g * mask[:, :, None])
            kept.append(x)
        return super().norm_sq(name, kept, batch)


class NormInputsKeptByShape(Hooked):
    """Inputs are kept in one slot per shape: the next linear layer of that shape overwrites it."""

    def pairs(self, seen):
        out, k = list(seen), 0
        while k + 1 < len(out):
            (f1, m1, x1, g1), (f2, m2, x2, _) = out[k], out[k + 1]
            both = isinstance(m1, nn.Linear) and isinstance(m2, nn.Linear) and f1 != f2
            if both and x1.shape == x2.shape:
                out[k] = (f1, m1, x2, g1)
            k += 1
        return out


class NormSingleSqueezed(Hooked):
    """squeeze() drops the sample axis of a single sample: linear norms lose their cross terms."""

    def norm_sq(self, name, terms, batch):
        if len(batch) == 1 and terms and all(isinstance(x, Outer) for x in terms):
            return sum((x.a.square().sum(2) * x.g.square().sum(2)).sum(1) for x in terms)
        return super().norm_sq(name, terms, batch)


class NormLayerNormFromOutput(Hooked):
    """A LayerNorm's weight norm is taken with its output, scale and shift included."""

    def terms_of(self, fqn, module, x, g):
        out = super().terms_of(fqn, module, x, g)
        if isinstance(module, nn.LayerNorm):
            out["weight"].raw = positions(
                g * (self.hat(fqn, module, x) * module.weight + module.bias).detach()
            )
        return out

    def norm_sq(self, name, terms, batch):
        raw = [Vec(x.raw) if hasattr(x, "raw") else x for x in terms]
        return super().norm_sq(name, raw, batch)


class NormBiasFoldedIn(Hooked):
    """A bias is folded into its weight as a column of ones, and is counted again alone."""

    def norm_sq(self, name, terms, batch):
        folded = []
        for x in terms:
            if isinstance(x, Outer) and name.rpartition(".")[0] + ".bias" in self.by_name:
                x = Outer(F.pad(x.a, (0, 1), value=1.0), x.g)
            folded.append(x)
        return super().norm_sq(name, folded, batch)


class NormSketched(Hooked):
    """Large weights' norms come from 64 random projections of the gradient (as JL estimates do)."""

    def norm_sq(self, name, terms, batch):
        if not terms or self.by_name[name].numel() < 2000 or self.by_name[name].dim() < 2:
            return super().norm_sq(name, terms, batch)
        each = sum(x.each() for x in terms).flatten(1)
        drawn = torch.randn(each.shape[1], 64, generator=generator("jl", name)).to(each.device)
        return (each @ drawn).square().mean(1)


class NormTotalOfRounded(Hooked):
    """Layers' norms are logged with two decimals, and the total is taken of what was logged."""

    def total(self, squares):
        rounded = {n: (s.sqrt() * 100).round().div(100).square() for n, s in squares.items()}
        return super().total(rounded)


class NormPerCallSqrt(Hooked):
    """The norm of a layer called twice is the sum of its calls' norms (triangle inequality)."""

    def norm_sq(self, name, terms, batch):
        if len(terms) < 2:
            return super().norm_sq(name, terms, batch)
        return sum(inner(x, x).clamp(min=0).sqrt() for x in terms).square()


class NormPaddingRowCounted(Hooked):
    """An embedding's norm counts what reaches the padding row, which the sum leaves out."""

    def terms_of(self, fqn, module, x, g):
        out = super().terms_of(fqn, module, x, g)
        if isinstance(module, nn.Embedding):
            out["weight"].raw = positions(g)
        return out

    def norm_sq(self, name, terms, batch):
        raw = [Rows(x.ids, x.raw, x.rows) if hasattr(x, "raw") else x for x in terms]
        return super().norm_sq(name, raw, batch)


# ================================================================== factors, 8


class FactorSortedByLength(Hooked):
    """Samples are sorted by length for the norms, and the factors are not sorted back."""

    def factors(self, norm_B, batch):
        order = lengths(batch).argsort(descending=True, stable=True)
        return super().factors(norm_B, batch)[order]


class FactorOutliersDropped(Hooked):
    """Samples with a norm beyond 1.5 times the micro-batch's median are dropped (a spike guard)."""

    def factors(self, norm_B, batch):
        return torch.where(norm_B <= 1.5 * norm_B.median(), super().factors(norm_B, batch), 0.0)


class FactorLargestOfBatch(Hooked):
    """All samples of a micro-batch get the factor of its largest norm."""

    def factors(self, norm_B, batch):
        return super().factors(norm_B.max().expand_as(norm_B), batch)


class FactorNormsSmoothed(Hooked):
    """Norms are smoothed: a tenth is the mean norm of the micro-batch before."""

    mean = None

    def factors(self, norm_B, batch):
        self.mean = norm_B.mean() if self.mean is None else self.mean
        blended = 0.9 * norm_B + 0.1 * self.mean
        self.mean = norm_B.mean()
        return super().factors(blended, batch)


class FactorBoundPerMicro(Hooked):
    """C is divided by the root of the number of micro-batches (here 3) as well."""

    full = 0

    def bound(self):
        num = self.context.privacy.expected_batch_size / (world() * max(self.full, 1))
        return self.max_grad_norm / math.sqrt(num)

    def factors(self, norm_B, batch):
        self.full = max(self.full, len(norm_B))
        return super().factors(norm_B, batch)


class FactorRanksAgree(Hooked):
    """Factors are synchronised: samples of one index get the smallest factor of all ranks."""

    def agree(self, factor_B):
        num = [torch.zeros((), dtype=torch.long, device=factor_B.device) for _ in range(world())]
        if not dist.is_initialized():
            return factor_B
        dist.all_gather(num, torch.tensor(len(factor_B), device=factor_B.device))
        padded = torch.ones(int(max(num)), device=factor_B.device)
        padded[: len(factor_B)] = factor_B
        dist.all_reduce(padded, op=dist.ReduceOp.MIN)
        return padded[: len(factor_B)]

    def factors(self, norm_B, batch):
        return self.agree(super().factors(norm_B, batch))

    def on_empty(self):
        self.agree(torch.zeros(0, device=self.context.device))


class FactorChunkIndex(Hooked):
    """Factors are looked up by the index in a chunk of 3 samples, not in the micro-batch."""

    def factors(self, norm_B, batch):
        return super().factors(norm_B, batch)[torch.arange(len(norm_B)) % 3]


class FactorCalibrationStep(Hooked):
    """The first step is for calibration, and clips nothing, but its sum is used."""

    def factors(self, norm_B, batch):
        factor_B = super().factors(norm_B, batch)
        return torch.ones_like(factor_B) if self.step_index == 0 else factor_B


# ================================================================== sums, 14


class SumFactorsNotDetached(Hooked):
    """The second backward of sum c_i loss_i runs through c_i too: detach() is missing."""

    def local_sums(self, batch, terms, w_B):
        with torch.enable_grad():
            sums = {n: torch.zeros_like(p) for n, p in self.by_name.items()}
            for i in range(len(batch)):
                with only(i):
                    sample = batch.sample(i)
                    loss = self.loss(self.forward(sample), sample.targets, sample)[0]
                    grads = torch.autograd.grad(
                        loss, self.parameters, create_graph=True, allow_unused=True
                    )
                    norm = sum(g.square().sum() for g in grads if g is not None).sqrt()
                    factor = (self.bound() / norm).clamp(max=1.0)
                    second = torch.autograd.grad(
                        factor * loss, self.parameters, allow_unused=True, materialize_grads=True
                    )
                for n, g in zip(self.names, second, strict=True):
                    sums[n] += g
        return sums


class SumTiedHeadUnweighted(Hooked):
    """The factors are applied to a tied weight's use as an embedding, not to that as a head."""

    def weighted(self, name, terms, w_B):
        if {Outer, Rows} != {type(x) for x in terms}:
            return super().weighted(name, terms, w_B)
        ones = torch.ones_like(w_B)
        return sum(x.weighted(ones if isinstance(x, Outer) else w_B) for x in terms)


class SumIndexPut(Hooked):
    """An embedding's rows are written, not added: of a repeated token the last stays."""

    def weighted(self, name, terms, w_B):
        total = torch.zeros_like(self.by_name[name])
        for x in terms:
            if isinstance(x, Rows):
                part = torch.zeros_like(total)
                for b in range(len(x.ids)):
                    row = torch.zeros_like(total)
                    row[x.ids[b]] = x.g[b] * w_B[b]
                    part += row
                total += part
            else:
                total += x.weighted(w_B)
        return total


class SumTiedReducedTwice(Hooked):
    """A tied weight is reached under both of its names, and is reduced over ranks twice."""

    def reduce(self, name, total):
        uses = sum(
            p is self.by_name[name] for _, p in self.model.named_parameters(remove_duplicate=False)
        )
        for _ in range(uses):
            total = all_reduce(total)
        return total


class SumNormScaleAveraged(Hooked):
    """Scales of LayerNorm and RMSNorm are averaged over positions in the sum, not added."""

    def weighted(self, name, terms, w_B):
        total = super().weighted(name, terms, w_B)
        module = self.model.get_submodule(name.rpartition(".")[0])
        if "Norm" in type(module).__name__ and name.endswith("weight"):
            total = total / terms[0].v.shape[1]
        return total


class SumBucketTail(Hooked):
    """Sums are reduced in flat buckets of 4096; the last, incomplete bucket is not reduced."""

    def reduce_all(self):
        flat = torch.cat(
            [self.sums.get(n, torch.zeros_like(p)).flatten() for n, p in self.by_name.items()]
        )
        for start in range(0, len(flat) // 4096 * 4096, 4096):
            bucket = flat[start : start + 4096].clone()
            flat[start : start + 4096] = all_reduce(bucket)
        at = 0
        for n, p in self.by_name.items():
            self.sums[n] = flat[at : at + p.numel()].view_as(p).clone()
            at += p.numel()


class SumOnlyLastSynced(Hooked):
    """Micro-batches but the last run under no_sync, and what they added is never reduced."""

    def keep_all(self, sums):
        self.last = sums
        super().keep_all(sums)

    def on_empty(self):
        self.last = None

    def reduce(self, name, total):
        if getattr(self, "last", None) is None:
            last = torch.zeros_like(total)
        else:
            last = self.last[name].clone()
        return total - last + all_reduce(last.clone())


class SumSameShapeSwapped(Hooked):
    """Sums are handed over by shape, the last first: two weights of one shape in a block swap."""

    def keep_all(self, sums):
        swapped = dict(sums)
        groups = {}
        for n, s in sums.items():
            if s.dim() == 2:
                groups.setdefault((n.rpartition(".")[0].rpartition(".")[0], s.shape), []).append(n)
        for names in groups.values():
            for n, other in zip(names, reversed(names), strict=True):
                swapped[n] = sums[other]
        super().keep_all(swapped)


class SumHooksPileUp(Hooked):
    """The hooks of each block's last layer are registered anew each step, and add once more."""

    def weighted(self, name, terms, w_B):
        total = super().weighted(name, terms, w_B)
        return total * (1 + self.step_index) if ".down." in name or ".mlp.down" in name else total


class SumChunkTailLost(Hooked):
    """Sums are formed in B // 2 chunks of two samples: of an odd number the last one is lost."""

    def local_sums(self, batch, terms, w_B):
        w_B = w_B.clone()
        w_B[len(w_B) // 2 * 2 :] = 0
        return super().local_sums(batch, terms, w_B)


class SumWeightsNormalised(Hooked):
    """A sum is a weighted average times its size: factors are divided by their mean."""

    def local_sums(self, batch, terms, w_B):
        return super().local_sums(batch, terms, w_B / w_B.mean())


class SumQuantised(Hooked):
    """Each rank's sum goes to the others in 8 bits, with one scale for a tensor."""

    def reduce(self, name, total):
        scale = total.abs().max() / 127
        if scale > 0:
            total = (total / scale).round() * scale
        return all_reduce(total)


class SumUnusedShifts(Hooked):
    """Layers never used are left out of the flat bucket, not of its table of offsets."""

    def reduce_all(self):
        sums = {n: self.sums.get(n, torch.zeros_like(p)) for n, p in self.by_name.items()}
        used = [n for n in self.names if not n.rpartition(".")[0].endswith("unused")]
        flat = torch.cat([sums[n].flatten() for n in used])
        flat = all_reduce(F.pad(flat, (0, sum(p.numel() for p in self.parameters) - len(flat))))
        at = 0
        for n, p in self.by_name.items():
            self.sums[n] = flat[at : at + p.numel()].view_as(p).clone()
            at += p.numel()


class SumStaleInputs(Hooked):
    """One layer's inputs in the sum are those of the micro-batch before, if that was as large."""

    before = None

    def weighted(self, name, terms, w_B):
        if name == "blocks.1.left.weight" or name.endswith("layers.1.mlp.gate_proj.weight"):
            (term,) = terms
            before, self.before = self.before, term.a
            if before is not None and before.shape == term.a.shape:
                terms = [Outer(before, term.g)]
        return super().weighted(name, terms, w_B)


# ================================================================== noise, 14


class OwnDraws(Hooked):
    """Correct: faults that need a generator of their own draw from it in the noise regimes only.

    Elsewhere noise is from `source`, as a mode with other numbers would differ for that alone.
    """

    def noise(self, source, part, std):
        if self.context.privacy.noise_multiplier > 0.1:
            return std * self.drawn(source, part).to(part.local.device)
        return super().noise(source, part, std)

    def drawn(self, source, part):
        return source.standard_normal(part)


class NoiseEachRankAdds(Hooked):
    """Each rank adds the whole noise, its own, before the reduction: std is sqrt(W) too large."""

    def noise(self, source, part, std):
        mine = source.standard_normal(replace(part, name=f"{part.name}/{rank()}"))
        return all_reduce(std * mine)


class NoiseTruncated(Hooked):
    """Noise is drawn by trunc_normal_(std=std), whose cut at -2 and 2 is absolute."""

    def noise(self, source, part, std):
        cut = math.erf(2 / std / math.sqrt(2))
        z = source.standard_normal(part).double()
        # Each normal number goes to the truncated one of the same quantile, as in trunc_normal_.
        u = (torch.erf(z / math.sqrt(2)) * cut).clamp(-1 + 1e-15, 1 - 1e-15)
        drawn = torch.where(z.abs() < 4, torch.erfinv(u) * math.sqrt(2), z)
        return (std * drawn).clamp(-2, 2).float()


class NoiseBoxMullerOneUniform(OwnDraws):
    """Box-Muller takes radius and angle from one uniform number where two are needed."""

    def drawn(self, source, part):
        g = generator(source.key, source.step, part.name)
        u = 1 - torch.rand(part.local.shape, generator=g)
        return (-2 * u.log()).sqrt() * torch.cos(2 * math.pi * u)


class NoiseSeedsAdded(OwnDraws):
    """Seed is step + number of the parameter: the next parameter's noise is the next step's."""

    def drawn(self, source, part):
        seed = self.names.index(part.name) + source.step
        return torch.randn(part.local.shape, generator=generator(source.key, seed))


class NoiseOneBuffer(OwnDraws):
    """One buffer of noise a step: each parameter takes its beginning."""

    def drawn(self, source, part):
        most = max(p.numel() for p in self.parameters)
        buffer = torch.randn(most, generator=generator(source.key, source.step))
        return buffer[: part.local.numel()].view(part.local.shape)


class NoiseMirroredHalves(Hooked):
    """The second half of each tensor gets the first half's noise negated (variance reduction)."""

    def noise(self, source, part, std):
        drawn = super().noise(source, part, std).flatten()
        half = len(drawn) // 2
        drawn[half : 2 * half] = -drawn[:half]
        return drawn.view(part.local.shape)


class NoiseOnTouchedRows(Hooked):
    """An embedding's noise is added to rows with a gradient only (sparse gradients)."""

    def privatize(self, clipped, source):
        self.totals = clipped.gradients
        return super().privatize(clipped, source)

    def noise(self, source, part, std):
        drawn = super().noise(source, part, std)
        module = self.model.get_submodule(part.name.rpartition(".")[0])
        if isinstance(module, nn.Embedding):
            drawn = drawn * self.totals[part.name].ne(0).any(1, keepdim=True)
        return drawn


class NoiseOfLargestNorm(Hooked):
    """Noise is calibrated to the step's largest clipped norm rather than to C."""

    largest = 0.0

    def record(self, batch, record):
        self.largest = max(self.largest, float((record.norm_B * record.clip_factor_B).max()))
        return record

    def clipped_sum(self):
        most = torch.tensor([self.largest], device=self.context.device)
        if dist.is_initialized():
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self.bound_found, self.largest = float(most), 0.0
        return super().clipped_sum()

    def std(self, clipped, name):
        bound = self.bound_found or clipped.sensitivity
        return self.context.privacy.noise_multiplier * bound


class NoiseOverActualBatch(Hooked):
    """Noise is added after the division, scaled by the step's actual number of samples."""

    samples = 0

    def record(self, batch, record):
        self.samples += len(batch)
        return record

    def clipped_sum(self):
        self.actual = int(all_reduce(torch.tensor([self.samples], device=self.context.device)))
        self.samples = 0
        return super().clipped_sum()

    def std(self, clipped, name):
        return super().std(clipped, name) * self.divisor() / max(self.actual, 1)


class NoiseTwelveUniforms(OwnDraws):
    """A normal number is the sum of twelve uniform ones, less 6."""

    def drawn(self, source, part):
        g = generator(source.key, source.step, part.name)
        return torch.rand((12, *part.local.shape), generator=g).sum(0) - 6


class NoiseShardAtRow(Sharded):
    """A shard's noise starts at the number of its first row, not at that of its first element."""

    adds_noise = False

    def privatize(self, clipped, source):
        self.adds_noise = True
        try:
            return super().privatize(clipped, source)
        finally:
            self.adds_noise = False

    def weight_parts(self):
        parts = super().weight_parts()
        if not self.adds_noise:
            return parts
        return [
            replace(part, start=part.start // max(math.prod(part.local.shape[1:]), 1))
            for part in parts
        ]


class NoiseFromPool(OwnDraws):
    """Noise is cut from a pool of 50021 numbers, drawn once, at a random place each time."""

    pool = None

    def drawn(self, source, part):
        if self.pool is None:
            self.pool = torch.randn(50021, generator=generator(source.key))
        g = generator(source.key, source.step, part.name)
        start = int(torch.randint(len(self.pool), (1,), generator=g))
        index = (torch.arange(part.local.numel()) + start) % len(self.pool)
        return self.pool[index].view(part.local.shape)


class NoiseCorrelatedSteps(Hooked):
    """Noise is z_t - 0.3 z_(t-1), scaled to std 1 (left over from matrix factorisation)."""

    def noise(self, source, part, std):
        drawn = source.standard_normal(part)
        if source.step > 0:
            before = replace(source, step=source.step - 1).standard_normal(part)
            drawn = (drawn - 0.3 * before) / math.sqrt(1.09)
        return std * drawn


class NoiseTiedTwice(Hooked):
    """A tied weight is reached under both of its names, and gets noise twice."""

    def noise(self, source, part, std):
        uses = [
            n
            for n, p in self.model.named_parameters(remove_duplicate=False)
            if p is self.by_name[part.name]
        ]
        return sum(
            super(NoiseTiedTwice, self).noise(source, replace(part, name=n), std) for n in uses
        )


# ================================================================== updates, 8


class UpdateRateTimesRanks(Hooked):
    """The learning rate is multiplied by the number of ranks (linear scaling rule)."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["lr"] *= world()


class UpdateWarmup(Hooked):
    """A warm-up is left on: the learning rate of step s is (s + 1) / 4 of its own, at most 1."""

    def update(self):
        for group in self.optimizer.param_groups:
            group.setdefault("base", group["lr"])
            group["lr"] = group["base"] * min(1.0, (self.step_index + 1) / 4)
        super().update()


class UpdateTiedTwice(Hooked):
    """A tied weight is in the optimizer under both of its names, and moves twice."""

    def update(self):
        super().update()
        lr = self.optimizer.param_groups[0]["lr"]
        seen = set()
        with torch.no_grad():
            for _, p in self.model.named_parameters(remove_duplicate=False):
                if id(p) in seen and p.grad is not None:
                    p.add_(p.grad, alpha=-lr)
                seen.add(id(p))


class UpdateClippedAtOne(Hooked):
    """The trainer's own gradient clipping is on: the noised gradient is cut to length 1."""

    def update(self):
        norm = torch.stack([p.grad.norm() for p in self.parameters]).norm()
        for p in self.parameters:
            p.grad = p.grad * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        super().update()


class UpdateCentralised(Hooked):
    """Gradient centralisation is left on: each row of a weight's gradient loses its mean."""

    def update(self):
        for p in self.parameters:
            if p.dim() > 1:
                p.grad = p.grad - p.grad.mean(dim=1, keepdim=True)
        super().update()


class UpdateLookahead(Hooked):
    """Lookahead is left on: each third step goes half of the way back to the slow weights."""

    slow = None

    def update(self):
        if self.slow is None:
            self.slow = [p.detach().clone() for p in self.parameters]
        super().update()
        if self.step_index % 3 == 2:
            with torch.no_grad():
                for p, slow in zip(self.parameters, self.slow, strict=True):
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class UpdateFreezesFirstBlock(Hooked):
    """A freezing schedule is left on: from step 2 on the first block is not updated."""

    def update(self):
        frozen = [p for n, p in self.by_name.items() if ".0." in f".{n}" and self.step_index >= 2]
        before = [p.detach().clone() for p in frozen]
        super().update()
        with torch.no_grad():
            for p, old in zip(frozen, before, strict=True):
                p.copy_(old)


class UpdateAveraged(Hooked):
    """The average of the weights before and after (SWA of two) is copied back after each step."""

    def update(self):
        before = [p.detach().clone() for p in self.parameters]
        super().update()
        with torch.no_grad():
            for p, old in zip(self.parameters, before, strict=True):
                p.copy_((p + old) / 2)


# ================================================================== loss, data and forward, 10


class LossShiftedTwice(Hooked):
    """The collator shifts the targets already, and the loss shifts them again: t predicts t + 2."""

    def loss(self, logits, targets, batch):
        if targets.dim() == 2:
            targets = F.pad(targets[:, 1:], (0, 1), value=-100)
        return super().loss(logits, targets, batch)


class LossSoftmaxTwice(Hooked):
    """The cross-entropy is given probabilities: softmax is applied twice."""

    def loss(self, logits, targets, batch):
        return super().loss(logits.softmax(-1), targets, batch)


class LossCapped(Hooked):
    """Logits are capped by 30 tanh(x / 30), which another model needs."""

    def loss(self, logits, targets, batch):
        return super().loss(30 * torch.tanh(logits / 30), targets, batch)


class ForwardMaskOnes(Hooked):
    """The attention mask is not handed on: padding counts as text."""

    def prepare(self, batch):
        mask = batch.inputs.get("attention_mask")
        return batch if mask is None else with_inputs(batch, attention_mask=torch.ones_like(mask))


class ForwardPositionsFromPadding(Hooked):
    """Positions are 0, 1, 2, ... from the first place, padding on the left included."""

    def prepare(self, batch):
        ids = batch.inputs.get("position_ids")
        if ids is None:
            return batch
        counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        return with_inputs(batch, position_ids=counted)


class ForwardPositionsOfFirst(Hooked):
    """All samples of a micro-batch get the position ids of its first."""

    def prepare(self, batch):
        ids = batch.inputs.get("position_ids")
        if ids is None or not len(batch):
            return batch
        return with_inputs(batch, position_ids=ids[:1].expand_as(ids).contiguous())


class ForwardPackedNeighbour(Hooked):
    """Samples are packed without borders: the first position looks at the sample before."""

    def patch(self, model):
        def packed(block):
            def forward(x, mask):
                h = block.norm(x)
                mean = (h * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
                around = mean + h.flatten(0, 1).roll(1, dims=0).view_as(h)
                h = torch.tanh(block.left(h) + block.right(around))
                h = torch.tanh(block.reused(torch.tanh(block.reused(h))))
                return x + block.down(h)

            return forward

        for block in getattr(model, "blocks", []):
            block.forward = packed(block)


class DataTokensClamped(Hooked):
    """Tokens are clamped to a vocabulary that is one too small: the last token becomes another."""

    def prepare(self, batch):
        ids = batch.inputs["input_ids"]
        size = self.model.config.vocab_size
        return with_inputs(batch, input_ids=ids.clamp(max=size - 2))


class DataStrided(Hooked):
    """Ranks take every W-th sample of a micro-batch where consecutive ones are meant."""

    def prepare(self, batch):
        if world() == 1:
            return batch
        boxes = [None] * world()
        dist.all_gather_object(boxes, (batch.inputs, batch.targets))
        if len({len(t) for _, t in boxes}) > 1 or not len(batch):
            return batch
        inputs = {n: torch.cat([i[n] for i, _ in boxes])[rank() :: world()] for n in batch.inputs}
        return Batch(inputs, torch.cat([t for _, t in boxes])[rank() :: world()], args=batch.args)


class DataTypesUnsigned(Hooked):
    """Targets go through uint8 and -100 comes back as 156: the last row is predicted at padding."""

    def prepare(self, batch):
        if batch.targets.dim() != 2:
            return batch
        last = self.model.config.vocab_size - 1
        return with_inputs(batch, batch.targets.where(batch.targets >= 0, last))


# ================================================================== healthy, 6


class HealthyMeanTimesRanks(Hooked):
    """Healthy: the reduction averages over ranks, and the average is multiplied by their number."""

    def reduce(self, name, total):
        return all_reduce(total / world()) * world()


class HealthyMeanLoss(Hooked):
    """Healthy: a backward of the mean loss, output gradients multiplied by the actual size."""

    def total_loss(self, loss_B):
        return loss_B.mean()

    def output_grad(self, fqn, g, loss_B):
        return g * len(loss_B)


class HealthySecondBackward(Hooked):
    """Healthy: the clipped sum is one backward of sum c_i loss_i, with the factors detached."""

    def local_sums(self, batch, terms, w_B):
        with torch.enable_grad():
            loss_B = self.loss(self.forward(batch), batch.targets, batch)
            grads = torch.autograd.grad(
                (w_B.detach() * loss_B).sum(),
                self.parameters,
                allow_unused=True,
                materialize_grads=True,
            )
        return dict(zip(self.names, grads, strict=True))


class HealthyNoiseOfAllRanks(Hooked):
    """Healthy: each rank draws noise of std sigma C / sqrt(W) of its own, and these are added."""

    def noise(self, source, part, std):
        mine = own_normal(part, source.key, source.step, rank())
        return all_reduce(mine * (std / math.sqrt(world())))


class HealthyFlatDouble(Materialised):
    """Healthy: explicit gradients as one float64 row a sample, normalised first, scaled later."""

    def local_sums(self, batch, terms, w_B):
        sums = {}
        for n, p in self.by_name.items():
            if not terms[n]:
                sums[n] = torch.zeros_like(p)
                continue
            each = sum(x.each() for x in terms[n]).double()
            bound = float(self.max_grad_norm)
            # c_i g_i / C, times C.
            unit = torch.einsum("b...,b->...", each, w_B.double() / bound)
            sums[n] = (unit * bound).float()
        return sums

    def total(self, squares):
        return torch.stack(list(squares.values())).double().sum(0).sqrt().float()


class HealthyOwnersReduce(Hooked):
    """Healthy: each parameter is added up by one rank, in rank order, and broadcast from there."""

    def reduce(self, name, total):
        if not dist.is_initialized():
            return total
        owner = self.names.index(name) % world()
        pieces = [torch.zeros_like(total) for _ in range(world())]
        dist.all_gather(pieces, total)
        whole = torch.stack(pieces).sum(0)
        dist.broadcast(whole, src=owner)
        return whole
