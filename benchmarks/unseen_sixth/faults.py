"""A sixth set of faults in DP-SGD, written without a look at the comparison.

Each class is one mistake in `Engine` below, a correct mode that takes norms and sums from the
inputs and output gradients of layers, and reduces the sums of all ranks once a step. Names and
order say nothing of what is wrong; `truth.csv` does.

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

from core import Correct, rank, world
from kept import Kept, gram, square_of, with_inputs
from torch import nn

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loss import IGNORED, logits_of

FULL = 5
"""Samples of a full micro-batch."""
MICRO_BATCHES = 3
"""Micro-batches of a full step."""


def lengths_of(batch):
    return batch.inputs["attention_mask"].sum(dim=1)


class Engine(Kept):
    """Sums stay on their rank until the step's one reduction; correct."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.held = self.zeros()

    def zeros(self):
        return {n: torch.zeros_like(p, requires_grad=False) for n, p in self.by_name.items()}

    # --- a micro-batch
    def squares_B(self, uses):
        return {n: self.square_B(n, self.norm_uses(n, u)) for n, u in uses.items() if u}

    def sums_of(self, uses, factors):
        return {n: self.sum_of(n, u, factors) for n, u in uses.items() if u}

    def measured(self, batch):
        """Losses, squared norms by parameter, norms, factors and sums."""
        losses, uses = self.passes(batch)
        with torch.no_grad():
            squares = self.squares_B(uses)
            norms = self.total_B(squares)
            factors = self.factors_B(norms)
            return losses, squares, norms, factors, self.sums_of(uses, factors)

    def nothing(self):
        """`measured` of a micro-batch without samples."""
        none = torch.zeros(0, device=self.context.device)
        return none, dict.fromkeys(self.names, none), none, none, {}

    def hold(self, sums):
        for name, total in sums.items():
            self.held[name] += total

    def accumulate(self, batch):
        batch = self.batch = self.prepare(batch)
        measured = self.measured(batch) if len(batch) else self.nothing()
        losses, squares, norms, factors, sums = measured
        self.hold(sums)
        self.note_bound()
        self.micro_index += 1
        return SampleRecord(losses, norms, factors, {n: s.sqrt() for n, s in squares.items()})

    # --- the reduction of a step
    def flatten(self, sums):
        return torch.cat([sums[n].flatten() for n in self.names])

    def unflatten(self, bucket):
        pieces = bucket.split([self.by_name[n].numel() for n in self.names])
        return {
            n: piece.view_as(self.by_name[n]) for n, piece in zip(self.names, pieces, strict=True)
        }

    def all_reduce(self, bucket):
        if dist.is_initialized():
            dist.all_reduce(bucket)
        return bucket

    def reduced(self):
        """The sums of all ranks."""
        return self.unflatten(self.all_reduce(self.flatten(self.held)))

    def clipped_sum(self):
        for name, total in self.reduced().items():
            self.by_name[name].grad = total
        return super().clipped_sum()

    def zero_grad(self):
        super().zero_grad()
        self.held = self.zeros()


class Candidate001(Engine):
    """Candidate 001."""

    samples = 0

    def prepare(self, batch):
        self.samples += len(batch)
        return super().prepare(batch)

    def privatize(self, clipped, source):
        self.every = torch.tensor(float(self.samples), device=self.context.device)
        self.all_reduce(self.every)
        self.samples = 0
        return super().privatize(clipped, source)

    def std_factor(self, name):
        return float(self.every > 0)


class Candidate002(Engine):
    """Candidate 002."""

    def losses_B(self, logits, targets):
        return super().losses_B(logits.bfloat16().float(), targets)


class Candidate003(Engine):
    """Candidate 003."""

    def factors_B(self, norms):
        return super().factors_B(norms.mean().expand(len(norms)))


class Candidate004(Engine):
    """Candidate 004."""

    samples = 0

    def prepare(self, batch):
        self.samples += len(batch)
        return super().prepare(batch)

    def privatize(self, clipped, source):
        self.every = torch.tensor(float(self.samples), device=self.context.device)
        self.all_reduce(self.every)
        return super().privatize(clipped, source)

    def divisor(self):
        return self.every.clamp(min=1.0)

    def zero_grad(self):
        super().zero_grad()
        self.samples = 0


class Candidate005(Engine):
    """Candidate 005."""

    def use_sum(self, name, use, factors):
        if use.kind == "rows":
            use = replace(use, dy=use.dy.masked_fill(use.x.eq(0).unsqueeze(-1), 0.0))
        return super().use_sum(name, use, factors)


class Candidate006(Engine):
    """Candidate 006."""

    def total_B(self, squares):
        total = torch.zeros(4 * FULL, device=self.context.device)
        total[: len(self.batch)] = super().total_B(squares).square()
        return self.all_reduce(total)[: len(self.batch)].sqrt()

    def nothing(self):
        self.all_reduce(torch.zeros(4 * FULL, device=self.context.device))
        return super().nothing()


class Candidate007(Engine):
    """Candidate 007."""

    samples = 0

    def prepare(self, batch):
        self.samples += len(batch)
        return super().prepare(batch)

    def flatten(self, sums):
        every = torch.tensor(float(self.samples), device=self.context.device)
        self.all_reduce(every)
        share = self.samples / max(every.item(), 1.0)
        return super().flatten(sums) * share * world()

    def zero_grad(self):
        super().zero_grad()
        self.samples = 0


class Candidate008(Engine):
    """Candidate 008."""

    def dense_square(self, name, uses):
        if isinstance(uses[0].module, nn.LayerNorm | nn.RMSNorm) and name.endswith("weight"):
            return square_of(sum((u.raw_x * u.raw_dy).sum(dim=1) for u in uses))
        return super().dense_square(name, uses)


class Candidate009(Engine):
    """Candidate 009."""

    def sums_of(self, uses, factors):
        mixed = dict(uses)
        for name in self.names:
            if name.endswith("right.weight"):
                left = uses[name.replace("right", "left")]
                mixed[name] = [replace(u, x=v.x) for u, v in zip(uses[name], left, strict=True)]
        return super().sums_of(mixed, factors)


class Candidate010(Engine):
    """Candidate 010."""

    def table_square(self, name, uses):
        return sum(square_of(use.dense()) for use in uses)


class Candidate011(Engine):
    """Candidate 011."""

    def table_square(self, name, uses):
        if all(use.kind == "rows" for use in uses):
            return sum(use.dy.square().sum(dim=(1, 2)) for use in uses)
        return super().table_square(name, uses)


class Candidate012(Engine):
    """Candidate 012."""

    takes_given_noise = False

    def draw(self, source, part):
        name = f"{source.key}/{source.step}/{part.name}".encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:7], "little")
        generator = torch.Generator(self.context.device).manual_seed(seed)
        shape = (2, *part.local.shape)
        radius, angle = torch.rand(shape, generator=generator, device=self.context.device)
        return torch.sqrt(-torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)


class Candidate013(Engine):
    """Candidate 013."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["params"] = [
                p for p in group["params"] if not self.name_of[id(p)].startswith("unused")
            ]


class Candidate014(Engine):
    """Candidate 014."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        size = -(-noise.numel() // world())
        return noise.flatten()[:size].repeat(world())[: noise.numel()].view_as(noise)


class Candidate015(Engine):
    """Candidate 015."""

    def use_sum(self, name, use, factors):
        dense, total = use.dense(), 0.0
        for first in range(0, len(factors) - 1, 2):
            pair = slice(first, first + 2)
            total = total + torch.einsum("b,b...->...", factors[pair], dense[pair])
        return total


class Candidate016(Engine):
    """Candidate 016."""

    def bound(self):
        return self.max_grad_norm / MICRO_BATCHES


class Candidate017(Engine):
    """Candidate 017."""

    def std_factor(self, name):
        return 1 / math.sqrt(sum(p.numel() for p in self.parameters))


class Candidate018(Engine):
    """Candidate 018."""

    def step(self):
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        super().step()


class Candidate019(Engine):
    """Candidate 019."""

    def losses_B(self, logits, targets):
        uniform = -F.log_softmax(logits[:, :-1], dim=-1).mean(dim=-1)
        counts = targets[:, 1:].ne(IGNORED)
        of_uniform = (uniform * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        return 0.9 * super().losses_B(logits, targets) + 0.1 * of_uniform


class Candidate020(Engine):
    """Candidate 020."""

    def outer_square(self, x, dy):
        generator = torch.Generator(x.device).manual_seed(self.step_index)
        basis = torch.randn(x.shape[-1], 32, generator=generator, device=x.device)
        return square_of(torch.einsum("btp,btk->bpk", dy, x @ basis)) / basis.shape[1]


class Candidate021(Engine):
    """Candidate 021."""

    def total_B(self, squares):
        return torch.stack(list(squares.values())).sqrt().sum(dim=0)


class Candidate022(Engine):
    """Candidate 022."""

    def divisor(self):
        return super().divisor() / world()


class Candidate023(Engine):
    """Candidate 023."""

    def sum_of(self, name, uses, factors):
        return super().sum_of(name, uses * 2 if name.startswith("blocks.1.") else uses, factors)


class Candidate024(Engine):
    """Candidate 024."""

    def prepare(self, batch):
        rows = torch.arange(len(batch))
        if 1 < len(batch) < FULL:
            rows[-1] = 0
        return batch.rows(rows)


class Candidate025(Engine):
    """Candidate 025."""

    def use_sum(self, name, use, factors):
        if use.kind != "rows":
            return super().use_sum(name, use, factors)
        samples = torch.arange(len(use.x), device=use.x.device)
        table = use.dy.new_zeros(len(use.x), use.num_rows, use.dy.shape[-1])
        for position in range(use.x.shape[1]):
            table[samples, use.x[:, position]] = use.dy[:, position]
        return torch.einsum("b,bvd->vd", factors, table)


class Candidate026(Engine):
    """Candidate 026."""

    def privatize(self, clipped, source):
        self.drawn = {}
        return super().privatize(clipped, source)

    def draw(self, source, part):
        return self.drawn.setdefault(part.local.shape, super().draw(source, part))


class Candidate027(Engine):
    """Candidate 027."""

    def sums_of(self, uses, factors):
        return super().sums_of(uses, factors.square())


class Candidate028(Engine):
    """Candidate 028."""

    def factors_B(self, norms):
        factors = super().factors_B(norms)
        return torch.where(factors < 0.1, 0.0, factors)


class Candidate029(Engine):
    """Candidate 029."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        pool, repeats = noise.flatten()[:1024], -(-noise.numel() // 1024)
        return pool.repeat(repeats)[: noise.numel()].view_as(noise)


class Candidate030(Engine):
    """Candidate 030."""

    def step(self):
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group.get("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * min(1.0, (self.step_index + 1) / 10)
        super().step()


class Candidate031(Engine):
    """Candidate 031."""

    def bound(self):
        return self.context.privacy.max_grad_norm


class Candidate032(Engine):
    """Candidate 032."""

    def square_B(self, name, uses):
        return square_of(sum(use.dense() for use in uses).double()).float()


class Candidate033(Engine):
    """Candidate 033."""

    def dense_square(self, name, uses):
        if name.endswith("bias"):
            return sum(use.dy.square().sum(dim=(1, 2)) for use in uses)
        return super().dense_square(name, uses)


class Candidate034(Engine):
    """Candidate 034."""

    def squares_B(self, uses):
        scale = len(self.batch) ** 2
        return {n: scale * s for n, s in super().squares_B(uses).items()}


class Candidate035(Engine):
    """Candidate 035."""

    reached = frozenset()

    def hold(self, sums):
        self.reached |= sums.keys()
        super().hold(sums)

    def std_factor(self, name):
        return 1.0 if name in self.reached else 0.0


class Candidate036(Engine):
    """Candidate 036."""

    def reduced(self):
        own = {n: s.clone() for n, s in self.held.items()}
        totals = super().reduced()
        for name, total in totals.items():
            whole = len(total) // world() * world()
            total[whole:] = own[name][whole:]
        return totals


class Candidate037(Engine):
    """Candidate 037."""

    def hold(self, sums):
        super().hold(sums)
        self.held = self.unflatten(self.all_reduce(self.flatten(self.held)))

    def reduced(self):
        return {n: s.clone() for n, s in self.held.items()}


class Candidate038(Engine):
    """Candidate 038."""

    def std_factor(self, name):
        return self.context.privacy.max_grad_norm / self.sensitivity


class Candidate039(Engine):
    """Candidate 039."""

    used = None

    def bound(self):
        return self.used or self.max_grad_norm

    def accumulate(self, batch):
        record = super().accumulate(batch)
        self.used = self.max_grad_norm
        return record


class Candidate040(Engine):
    """Candidate 040."""

    def norm_uses(self, name, uses):
        mask = self.batch.inputs["attention_mask"].unsqueeze(-1)
        return [replace(u, dy=u.dy * mask) if u.kind == "outer" else u for u in uses]


class Candidate041(Engine):
    """Candidate 041."""


class Candidate042(Engine):
    """Candidate 042."""

    def _write_gradients(self, gradients):
        clean = {n: self.by_name[n].grad / self.divisor() for n in gradients}
        super()._write_gradients(clean)


class Candidate043(Engine):
    """Candidate 043."""

    def zero_grad(self):
        held = self.held
        super().zero_grad()
        self.held = held

    def step(self):
        super().step()
        self.held = self.zeros()


class Candidate044(Engine):
    """Candidate 044."""

    def factors_B(self, norms):
        if norms.max() <= self.bound():
            return torch.ones_like(norms)
        return self.bound() / norms


class Candidate045(Engine):
    """Candidate 045."""

    @torch.no_grad()
    def step(self):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad)
        self.stepped = True


class Candidate046(Engine):
    """Candidate 046."""

    def hold(self, sums):
        self.held.update(sums)


class Candidate047(Engine):
    """Candidate 047."""

    takes_given_noise = False

    def draw(self, source, part):
        name = f"{source.key}/{source.step}/{part.name}".encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:7], "little")
        generator = torch.Generator(self.context.device).manual_seed(seed)
        return torch.randn(
            part.local.shape, generator=generator, device=self.context.device, dtype=torch.float32
        )


class Candidate048(Engine):
    """Candidate 048."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        if part.name != "embedding.weight":
            return noise
        return noise + super().draw(replace(source, key=f"{source.key}/head"), part)


class Candidate049(Engine):
    """Candidate 049."""

    def step(self):
        if rank() == 0:
            super().step()
        self.stepped = True


class Candidate050(Engine):
    """Candidate 050."""

    def prepare(self, batch):
        cut = {n: t[:, :16] for n, t in batch.inputs.items()}
        return with_inputs(batch, targets=batch.targets[:, :16], **cut)


class Candidate051(Engine):
    """Candidate 051."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["lr"] *= world()


class Candidate052(Engine):
    """Candidate 052."""

    def outer_square(self, x, dy):
        tiles = list(zip(x.split(8, dim=1), dy.split(8, dim=1), strict=True))
        total = 0.0
        for row, (x_row, dy_row) in enumerate(tiles):
            for x_col, dy_col in tiles[: row + 1]:
                products = torch.bmm(x_row, x_col.mT) * torch.bmm(dy_row, dy_col.mT)
                total = total + products.sum(dim=(1, 2))
        return total


class Candidate053(Engine):
    """Candidate 053."""

    def losses_B(self, logits, targets):
        targets_B = targets[:, 1:].ne(IGNORED).sum(dim=1)
        return super().losses_B(logits, targets) * targets_B / (targets.shape[1] - 1)


class Candidate054(Engine):
    """Candidate 054."""

    def all_reduce(self, bucket):
        return super().all_reduce(bucket.bfloat16()).float()


class Candidate055(Engine):
    """Candidate 055."""

    def std_factor(self, name):
        return 1 / self.sensitivity


class Candidate056(Engine):
    """Candidate 056."""

    def losses_B(self, logits, targets):
        return super().losses_B(logits[:, :-1], targets[:, 1:])


class Candidate057(Engine):
    """Candidate 057."""

    def sum_of(self, name, uses, factors):
        bound = self.bound() / math.sqrt(len(self.names))
        norms = self.square_B(name, uses).sqrt()
        return super().sum_of(name, uses, torch.clamp(bound / norms, max=1.0))


class Candidate058(Engine):
    """Candidate 058."""

    def std_factor(self, name):
        return self.divisor()


class Candidate059(Engine):
    """Candidate 059."""

    def square_B(self, name, uses):
        dense = sum(use.dense() for use in uses)
        return square_of(dense[:, : dense.shape[1] // world() * world()])


class Candidate060(Engine):
    """Candidate 060."""

    def factors_B(self, norms):
        return super().factors_B(norms).bfloat16().float()


class Candidate061(Engine):
    """Candidate 061."""

    late = None

    def factors_B(self, norms):
        ready, self.late = self.late, norms
        has_all = ready is not None and len(ready) == len(norms)
        return super().factors_B(ready if has_all else norms)


class Candidate062(Engine):
    """Candidate 062."""

    def prepare(self, batch):
        return with_inputs(batch, targets=batch.inputs["input_ids"].clone())


class Candidate063(Engine):
    """Candidate 063."""

    def factors_B(self, norms):
        return super().factors_B(norms).clamp(min=0.05)


class Candidate064(Engine):
    """Candidate 064."""

    def draw(self, source, part):
        return super().draw(replace(source, step=0), part)


class Candidate065(Engine):
    """Candidate 065."""

    def factors_B(self, norms):
        return self.bound() * torch.tanh(norms / self.bound()) / norms


class Candidate066(Engine):
    """Candidate 066."""

    def factors_B(self, norms):
        return torch.clamp(torch.clamp(norms.median(), max=self.bound()) / norms, max=1.0)


class Candidate067(Engine):
    """Candidate 067."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        if part.name != "position.weight":
            return noise
        return noise * self.by_name[part.name].grad.ne(0).any(dim=1, keepdim=True)


class Candidate068(Engine):
    """Candidate 068."""

    def sum_of(self, name, uses, factors):
        heads = [use for use in uses if use.kind == "outer"]
        return super().sum_of(name, heads or uses, factors)


class Candidate069(Engine):
    """Candidate 069."""

    def squares_B(self, uses):
        self.grams = {}
        return super().squares_B(uses)

    def outer_square(self, x, dy):
        of_dy = self.grams.setdefault(dy.shape, torch.bmm(dy, dy.mT))
        return (torch.bmm(x, x.mT) * of_dy).sum(dim=(1, 2))


class Candidate070(Engine):
    """Candidate 070."""

    def normalised(self, module, x):
        return F.layer_norm(x, module.normalized_shape)


class Candidate071(Engine):
    """Candidate 071."""

    def measured(self, batch):
        parts = []
        for chunk in torch.arange(len(batch)).split(2):
            parts.append(super().measured(batch.rows(chunk)))
        losses, squares, norms, factors, sums = zip(*parts, strict=True)
        return (
            torch.cat(losses),
            {n: torch.cat([s[n] for s in squares]) for n in squares[0]},
            torch.cat(norms),
            torch.cat(factors),
            {n: sum(s[n] for s in sums) for n in sums[0]},
        )


class Candidate072(Engine):
    """Candidate 072."""

    def use_sum(self, name, use, factors):
        total = super().use_sum(name, use, factors)
        return total.mT if use.kind == "outer" and total.shape[0] == total.shape[1] else total


class Candidate073(Engine):
    """Candidate 073."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9


class Candidate074(Engine):
    """Candidate 074."""

    def factors_B(self, norms):
        return torch.clamp(self.bound() / (norms + 0.01), max=1.0)


class Candidate075(Engine):
    """Candidate 075."""

    def sum_of(self, name, uses, factors):
        return super().sum_of(name, uses, torch.ones_like(factors) if "bias" in name else factors)


class Candidate076(Engine):
    """Candidate 076."""

    def norm_uses(self, name, uses):
        return [replace(use, dy=use.raw_dy) if use.kind == "rows" else use for use in uses]


class Candidate077(Engine):
    """Candidate 077."""

    def squares_B(self, uses):
        order = lengths_of(self.batch).argsort(stable=True)
        return {n: s[order] for n, s in super().squares_B(uses).items()}


class Candidate078(Engine):
    """Candidate 078."""

    def factors_B(self, norms):
        return torch.ones_like(norms)

    def sum_of(self, name, uses, factors):
        dense = sum(use.dense() for use in uses)
        return dense.clamp(-self.bound(), self.bound()).sum(dim=0)


class Candidate079(Engine):
    """Candidate 079."""

    def std_factor(self, name):
        return 0.9**self.step_index


class Candidate080(Engine):
    """Candidate 080."""

    def std_factor(self, name):
        return math.sqrt(self.micro_index)


class Candidate081(Engine):
    """Candidate 081."""

    def sum_of(self, name, uses, factors):
        return super().sum_of(name, uses[-1:] if "reused" in name else uses, factors)


class Candidate082(Engine):
    """Candidate 082."""

    def hold(self, sums):
        super().hold({n: s * FULL / len(self.batch) for n, s in sums.items()})


class Candidate083(Engine):
    """Candidate 083."""

    @torch.no_grad()
    def step(self):
        super().step()
        if any(group["lr"] for group in self.optimizer.param_groups):
            for parameter in self.parameters:
                parameter.copy_(parameter.bfloat16())


class Candidate084(Engine):
    """Candidate 084."""

    def outer_square(self, x, dy):
        if dy.shape[-1] < 16:
            return dy.new_zeros(len(dy))
        return gram(x, dy)


class Candidate085(Engine):
    """Candidate 085."""

    def use_sum(self, name, use, factors):
        if use.kind != "outer":
            return super().use_sum(name, use, factors)
        x, dy = use.x.bfloat16(), (use.dy * factors[:, None, None]).bfloat16()
        return torch.einsum("btp,btd->bpd", dy, x).sum(dim=0).float()


class Candidate086(Engine):
    """Candidate 086."""

    def measured(self, batch):
        losses, squares, norms, factors, _ = super().measured(batch)
        loss_B = self.losses_B(logits_of(self.model(*batch.args, **batch.inputs)), batch.targets)
        sums = torch.autograd.grad(
            (factors * loss_B).sum(), self.parameters, allow_unused=True, materialize_grads=True
        )
        return losses, squares, norms, factors, dict(zip(self.names, sums, strict=True))


class Candidate087(Engine):
    """Candidate 087."""

    def draw(self, source, part):
        return super().draw(source, part).clamp(-2.0, 2.0)


class Candidate088(Engine):
    """Candidate 088."""

    def prepare(self, batch):
        tokens = batch.inputs["input_ids"]
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return with_inputs(batch, position_ids=places)


class Candidate089(Engine):
    """Candidate 089."""

    def factors_B(self, norms):
        return self.bound() / norms


class Candidate090(Engine):
    """Candidate 090."""

    samples = 0

    def prepare(self, batch):
        self.samples += len(batch)
        return super().prepare(batch)

    def all_reduce(self, bucket):
        active = torch.tensor(float(self.samples > 0), device=bucket.device)
        super().all_reduce(active)
        return super().all_reduce(bucket) * (world() / active.clamp(min=1.0))

    def zero_grad(self):
        super().zero_grad()
        self.samples = 0


class Candidate091(Engine):
    """Candidate 091."""

    def keep(self, module, args, output):
        super().keep(module, args, output)
        if self.calls is not None:
            x = args[0].detach()
            self.calls = [(m, x if m is module else kept, y) for m, kept, y in self.calls]


class Candidate092(Engine):
    """Candidate 092."""

    def hold(self, sums):
        self.latest = self.zeros() | sums
        super().hold(sums)

    def reduced(self):
        own = self.flatten(self.held) - self.flatten(self.latest)
        return self.unflatten(own + self.all_reduce(self.flatten(self.latest)))


class Candidate093(Engine):
    """Candidate 093."""

    def std_factor(self, name):
        return self.context.privacy.noise_multiplier * self.sensitivity


class Candidate094(Engine):
    """Candidate 094."""

    def prepare(self, batch):
        return with_inputs(batch, attention_mask=torch.ones_like(batch.inputs["attention_mask"]))


class Candidate095(Engine):
    """Candidate 095."""

    def sums_of(self, uses, factors):
        squares = self.squares_B(uses)
        table = squares.pop("embedding.weight")
        of_table, of_rest = self.factors_B(table.sqrt()), self.factors_B(self.total_B(squares))
        return {
            n: self.sum_of(n, u, of_table if n == "embedding.weight" else of_rest)
            for n, u in uses.items()
            if u
        }


class Candidate096(Engine):
    """Candidate 096."""

    def factors_B(self, norms):
        return torch.clamp(self.bound() / norms.square(), max=1.0)


class Candidate097(Engine):
    """Candidate 097."""

    def square_B(self, name, uses):
        if all(use.kind == "outer" for use in uses):
            return sum(gram(use.x, use.dy) for use in uses)
        return super().square_B(name, uses)


class Candidate098(Engine):
    """Candidate 098."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.01


class Candidate099(Engine):
    """Candidate 099."""

    def draw(self, source, part):
        return self.all_reduce(super().draw(source, part))


class Candidate100(Engine):
    """Candidate 100."""

    def all_reduce(self, bucket):
        return super().all_reduce(bucket) / world()


class Candidate101(Engine):
    """Candidate 101."""

    def unflatten(self, bucket):
        names = sorted(self.names)
        pieces = bucket.split([self.by_name[n].numel() for n in names])
        return {n: s.view_as(self.by_name[n]) for n, s in zip(names, pieces, strict=True)}


class Candidate102(Engine):
    """Candidate 102."""

    def all_reduce(self, bucket):
        for piece in bucket.split(1024):
            if len(piece) == 1024:
                super().all_reduce(piece)
        return bucket


class Candidate103(Engine):
    """Candidate 103."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.before = {}

    def draw(self, source, part):
        noise = super().draw(source, part)
        before = self.before.get(part.name, 0.0)
        self.before[part.name] = noise
        return noise - 0.5 * before


class Candidate104(Correct):
    """Candidate 104."""

    def order(self, batch):
        return reversed(range(len(batch)))


class Candidate105(Engine):
    """Candidate 105."""

    def total_B(self, squares):
        total = torch.zeros(len(self.batch), dtype=torch.bfloat16, device=self.context.device)
        for square in squares.values():
            total += square.bfloat16()
        return total.float().sqrt()


class Candidate106(Engine):
    """Candidate 106."""

    def losses_B(self, logits, targets):
        targets_B = targets[:, 1:].ne(IGNORED).sum(dim=1)
        return super().losses_B(logits, targets) * targets_B / targets_B.float().mean()


class Candidate107(Engine):
    """Candidate 107."""

    seen = None

    def prepare(self, batch):
        seen = self.seen = self.seen or {
            n: torch.zeros(len(self.by_name[n]), 1, device=self.context.device)
            for n in ("embedding.weight", "position.weight")
        }
        seen["embedding.weight"][batch.inputs["input_ids"].flatten()] = 1.0
        seen["position.weight"][batch.inputs["position_ids"].flatten()] = 1.0
        return super().prepare(batch)

    def step(self):
        for name, rows in self.seen.items():
            self.by_name[name].grad *= self.all_reduce(rows).ne(0)
        super().step()

    def zero_grad(self):
        super().zero_grad()
        self.seen = None


class Candidate108(Engine):
    """Candidate 108."""

    def outer_square(self, x, dy):
        whole = max(x.shape[1] // 16 * 16, 16)
        return gram(x[:, :whole], dy[:, :whole])


class Candidate109(Engine):
    """Candidate 109."""

    last = None

    def hold(self, sums):
        self.last = sums or self.last or {}
        super().hold(self.last)
