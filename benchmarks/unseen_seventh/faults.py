"""A seventh set of faults in DP-SGD, written without a look at the comparison.

Each class is one mistake in `kept.Engine`, a correct mode that takes norms and sums from the
inputs and output gradients of layers, or in `Sharded`. Names and order say nothing of what is
wrong; `truth.csv` does.

Steps, micro-batches and samples count from 0.

Shapes: B samples, T positions, D inputs, P outputs, V rows of a table.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "unseen"))

from core import Correct, Sharded, world
from kept import Engine, gram, square_of, with_inputs
from torch import nn

from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loss import IGNORED, logits_of
from dpsgd_track.privacy.noise import NoiseSource

FULL = 5
"""Samples of a full micro-batch."""
ACCUMULATION = 3
"""Micro-batches of a full step."""
TABLE = "embedding.weight"
"""The tied weight."""


def mask_of(batch):
    """[B, T, 1], 0 at padding."""
    return batch.inputs["attention_mask"].unsqueeze(-1).float()


def over_ranks(value, device, op=dist.ReduceOp.SUM):
    """A number reduced over all ranks."""
    number = torch.tensor(float(value), device=device)
    if dist.is_initialized():
        dist.all_reduce(number, op=op)
    return number


def generator_of(*seeds):
    digest = hashlib.sha256("/".join(map(str, seeds)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class FromZero(NoiseSource):
    """Noise of a shard counted from the shard's own first element."""

    def add_to(self, totals, *, std):
        super().add_to([(total, replace(part, start=0)) for total, part in totals], std=std)


class Candidate001(Engine):
    """Candidate 001."""

    def prepare(self, batch):
        ids = batch.inputs["position_ids"]
        count = torch.arange(ids.shape[1], device=ids.device)
        return with_inputs(batch, position_ids=count.expand_as(ids).contiguous())


class Candidate002(Sharded):
    """Candidate 002."""


class Candidate003(Engine):
    """Candidate 003."""

    def use_sum(self, name, use, factors):
        if use.kind == "outer":
            scale = use.x.abs().max() / 127
            use = replace(use, x=(use.x / scale).round() * scale)
        return super().use_sum(name, use, factors)


class Candidate004(Engine):
    """Candidate 004."""

    def passes(self, batch):
        losses, uses = super().passes(batch)
        for of_parameter in uses.values():
            for use in of_parameter:
                if (
                    use.kind == "outer"
                    and isinstance(use.module, nn.Linear)
                    and len({id(u.module) for u in of_parameter}) == 1
                ):
                    use.x = of_parameter[-1].x
        return losses, uses


class Candidate005(Engine):
    """Candidate 005."""

    def sum_of(self, name, uses, factors):
        bound = self.bound()
        return sum(use.dense() for use in uses).clamp(-bound, bound).sum(dim=0)


class Candidate006(Engine):
    """Candidate 006."""

    def use_sum(self, name, use, factors):
        if use.kind != "rows":
            return super().use_sum(name, use, factors)
        total = torch.zeros_like(self.by_name[name])
        for tokens, dy in zip(use.x, factors.view(-1, 1, 1) * use.dy, strict=True):
            for token, row in zip(tokens.tolist(), dy, strict=True):
                total[token] = row
        return total


class Candidate007(Engine):
    """Candidate 007."""

    def draw(self, source, part):
        if "noise" not in self.context.regime:
            return super().draw(source, part)
        own = generator_of("own", source.key, source.step, part.name)
        return torch.randn(part.local.shape, generator=own).to(part.local.device)


class Candidate008(Engine):
    """Candidate 008."""

    def sums_of(self, uses, factors):
        return super().sums_of(uses, factors * FULL / len(factors))


class Candidate009(Engine):
    """Candidate 009."""

    def prepare(self, batch):
        if not 0 < len(batch) < FULL:
            return batch
        return batch.rows(torch.arange(FULL) % len(batch))

    def accumulate(self, batch):
        record, n = super().accumulate(batch), len(batch)
        by_parameter = {name: norms[:n] for name, norms in record.norm_by_parameter_B.items()}
        return SampleRecord(
            record.loss_B[:n], record.norm_B[:n], record.clip_factor_B[:n], by_parameter
        )


class Candidate010(Engine):
    """Candidate 010."""

    def sum_of(self, name, uses, factors):
        total = super().sum_of(name, uses, factors)
        if name == TABLE:
            total[0] = 0.0
        return total


class Candidate011(Engine):
    """Candidate 011."""

    def step(self):
        super().step()
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.copy_(parameter.bfloat16())


class Candidate012(Engine):
    """Candidate 012."""

    def use_sum(self, name, use, factors):
        if use.kind != "outer":
            return super().use_sum(name, use, factors)
        of_row = factors.repeat(use.x.shape[1]).unsqueeze(-1)
        return (of_row * use.dy.flatten(0, 1)).mT @ use.x.flatten(0, 1)


class Candidate013(Engine):
    """Candidate 013."""

    def divisor(self):
        return max(self.micro_index, 1) * FULL * world()


class Candidate014(Engine):
    """Candidate 014."""

    def bound(self):
        return super().bound() * 0.9**self.step_index


class Candidate015(Sharded):
    """Candidate 015."""

    def step(self):
        shards = [p.grad.to_local() for p in self.model.parameters()]
        norm = torch.stack([s.square().sum() for s in shards]).sum().sqrt()
        with torch.no_grad():
            for shard in shards:
                shard *= torch.clamp(1.0 / norm, max=1.0)
        super().step()


class Candidate016(Engine):
    """Candidate 016."""

    def prepare(self, batch):
        self.smallest = int(over_ranks(len(batch), self.context.device, dist.ReduceOp.MIN))
        return batch

    def sums_of(self, uses, factors):
        is_kept = torch.arange(len(factors), device=factors.device) < self.smallest
        return super().sums_of(uses, factors * is_kept)


class Candidate017(Engine):
    """Candidate 017."""

    def draw(self, source, part):
        return super().draw(replace(source, step=source.step % 4), part)


class Candidate018(Engine):
    """Candidate 018."""

    def std_factor(self, name):
        return max(self.micro_index, 1) ** 0.5


class Candidate019(Correct):
    """Candidate 019."""

    def order(self, batch):
        return reversed(range(len(batch)))

    def total(self, squares):
        return torch.linalg.vector_norm(torch.stack(list(squares.values())).sqrt())


class Candidate020(Engine):
    """Candidate 020."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        return noise[:, :1].expand_as(noise) if noise.dim() > 1 else noise


class Candidate021(Engine):
    """Candidate 021."""

    def table_square(self, name, uses):
        square = super().table_square(name, uses)
        if len(uses) > 1:
            first, second = (use.dense().flatten(1) for use in uses)
            square = square - (first * second).sum(dim=1)
        return square


class Candidate022(Engine):
    """Candidate 022."""

    def reduce(self, name, total):
        total = super().reduce(name, total)
        if total.dim() < 2 or len(total) <= 8 or not total.any():
            return total
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        return (left[:, :8] * values[:8]) @ right[:8]


class Candidate023(Engine):
    """Candidate 023."""

    def factors_B(self, norms):
        return super().factors_B(norms.max().expand_as(norms).contiguous())


class Candidate024(Engine):
    """Candidate 024."""

    def factors_B(self, norms):
        return torch.ones_like(norms) if norms.mean() <= self.bound() else super().factors_B(norms)


class Candidate025(Engine):
    """Candidate 025."""

    def losses_B(self, logits, targets):
        each = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=0.1,
        )
        return each.view(targets.shape).sum(dim=1) / targets.ne(IGNORED).sum(dim=1).clamp(min=1)


class Candidate026(Engine):
    """Candidate 026."""

    def reduce(self, name, total):
        total = super().reduce(name, total)
        total[len(total) // world() * world() :] = 0.0
        return total


class Candidate027(Engine):
    """Candidate 027."""

    def draw(self, source, part):
        if "noise" not in self.context.regime:
            return super().draw(source, part)
        own = generator_of("uniform", source.key, source.step, part.name)
        radius, angle = 1 - torch.rand(2, part.local.numel(), generator=own)
        noise = (-radius.log()).sqrt() * (2 * torch.pi * angle).cos()
        return noise.view(part.local.shape).to(part.local.device)


class Candidate028(Engine):
    """Candidate 028."""

    def factors_B(self, norms):
        return torch.clamp(self.bound() / norms, max=self.bound())


class Candidate029(Engine):
    """Candidate 029."""

    def step(self):
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9
        super().step()


class Candidate030(Engine):
    """Candidate 030."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        if source.step > 0:
            noise = noise - 0.5 * super().draw(replace(source, step=source.step - 1), part)
        return noise


class Candidate031(Engine):
    """Candidate 031."""

    def reduce(self, name, total):
        return super().reduce(name, total.bfloat16()).float()


class Candidate032(Engine):
    """Candidate 032."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        if self.kinds[part.name] == "Embedding":
            noise = noise * self.by_name[part.name].grad.ne(0).any(dim=1, keepdim=True)
        return noise


class Candidate033(Engine):
    """Candidate 033."""

    def square_B(self, name, uses):
        if self.by_name[name].numel() <= 4096:
            return super().square_B(name, uses)
        gradient = sum(use.dense() for use in uses).flatten(1)
        own = generator_of(name, self.step_index, self.micro_index)
        directions = torch.randn(gradient.shape[1], 64, generator=own).to(gradient)
        return (gradient @ directions).square().mean(dim=1)


class Candidate034(Engine):
    """Candidate 034."""

    def prepare(self, batch):
        return with_inputs(batch, batch.inputs["input_ids"].clone())


class Candidate035(Engine):
    """Candidate 035."""

    def total_B(self, squares):
        total = torch.zeros_like(next(iter(squares.values())), dtype=torch.bfloat16)
        for square in squares.values():
            total += square.bfloat16()
        return total.float().sqrt()


class Candidate036(Engine):
    """Candidate 036."""

    def step(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.01
        super().step()


class Candidate037(Engine):
    """Candidate 037."""

    def losses_B(self, logits, targets):
        num_targets = targets.ne(IGNORED).sum(dim=1).float()
        return super().losses_B(logits, targets) * num_targets / num_targets.mean()


class Candidate038(Engine):
    """Candidate 038."""

    def std_factor(self, name):
        return len(self.names) ** -0.5


class Candidate039(Engine):
    """Candidate 039."""

    def use_sum(self, name, use, factors):
        total = super().use_sum(name, use, factors)
        if use.kind == "outer":
            total[:, total.shape[1] // 32 * 32 :] = 0.0
        return total


class Candidate040(Engine):
    """Candidate 040."""

    def reduce(self, name, total):
        return total

    def clipped_sum(self):
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
        return super().clipped_sum()


class Candidate041(Engine):
    """Candidate 041."""

    def factors_B(self, norms):
        return torch.clamp(norms.median().clamp(max=self.bound()) / norms, max=1.0)


class Candidate042(Engine):
    """Candidate 042."""

    def draw(self, source, part):
        if "noise" not in self.context.regime:
            return super().draw(source, part)
        own = generator_of("stream", source.key, source.step)
        noise = torch.randn(part.local.numel(), generator=own)
        return noise.view(part.local.shape).to(part.local.device)


class Candidate043(Engine):
    """Candidate 043."""

    def outer_square(self, x, dy):
        whole = x.shape[1] // 16 * 16
        return super().outer_square(x[:, :whole], dy[:, :whole])


class Candidate044(Engine):
    """Candidate 044."""

    def reduce_all(self, sums):
        active = over_ranks(len(self.batch) > 0, self.context.device)
        scale = world() / active.clamp(min=1)
        return {n: s * scale for n, s in super().reduce_all(sums).items()}


class Candidate045(Engine):
    """Candidate 045."""

    def bound(self):
        return super().bound() / ACCUMULATION


class Candidate046(Engine):
    """Candidate 046."""

    previous = None

    def privatize(self, clipped, source):
        before, self.previous = self.previous or clipped.sensitivity, clipped.sensitivity
        return super().privatize(replace(clipped, sensitivity=before), source)


class Candidate047(Engine):
    """Candidate 047."""

    def sums_of(self, uses, factors):
        with torch.enable_grad():
            logits = logits_of(self.model(*self.batch.args, **self.batch.inputs))
            loss = (factors * self.losses_B(logits, self.batch.targets)).sum()
            gradients = torch.autograd.grad(
                loss, self.parameters, allow_unused=True, materialize_grads=True
            )
        return dict(zip(self.names, gradients, strict=True))


class Candidate048(Engine):
    """Candidate 048."""

    def norm_uses(self, name, uses):
        return [replace(u, dy=u.dy * mask_of(self.batch)) if u.kind == "outer" else u for u in uses]


class Candidate049(Engine):
    """Candidate 049."""

    def outer_square(self, x, dy):
        if 2 * x.shape[1] ** 2 < x.shape[2] * dy.shape[2]:
            return super().outer_square(x, dy)
        return square_of(torch.einsum("btp,btd->btpd", dy, x))


class Candidate050(Engine):
    """Candidate 050."""

    def draw(self, source, part):
        first = next(n for n in self.names if self.by_name[n].shape == part.local.shape)
        return super().draw(source, replace(part, name=first))


class Candidate051(Engine):
    """Candidate 051."""

    def sums_of(self, uses, factors):
        squares = {True: 0.0, False: 0.0}
        for n, of_parameter in uses.items():
            if of_parameter:
                squares[self.kinds[n] == "Embedding"] += self.square_B(n, of_parameter)
        of_group = {key: self.factors_B(square.sqrt()) for key, square in squares.items()}
        return {
            n: self.sum_of(n, u, of_group[self.kinds[n] == "Embedding"])
            if u
            else torch.zeros_like(self.by_name[n])
            for n, u in uses.items()
        }


class Candidate052(Engine):
    """Candidate 052."""

    def outer_square(self, x, dy):
        block = torch.arange(x.shape[1], device=x.device) // 8
        is_upper = block.unsqueeze(1) <= block.unsqueeze(0)
        return (torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT) * is_upper).sum(dim=(1, 2))


class Candidate053(Engine):
    """Candidate 053."""

    samples = 0.0

    def prepare(self, batch):
        self.samples += float(over_ranks(len(batch), self.context.device))
        return batch

    def step(self):
        if self.samples < self.context.privacy.expected_batch_size / 2:
            self.optimizer.zero_grad(set_to_none=True)
        super().step()

    def zero_grad(self):
        super().zero_grad()
        self.samples = 0.0


class Candidate054(Engine):
    """Candidate 054."""

    def losses_B(self, logits, targets):
        return super().losses_B(logits.bfloat16(), targets)


class Candidate055(Engine):
    """Candidate 055."""

    def use_sum(self, name, use, factors):
        total = super().use_sum(name, use, factors)
        is_square = use.kind == "outer" and total.shape[0] == total.shape[1]
        return total.mT.contiguous() if is_square else total


class Candidate056(Engine):
    """Candidate 056."""

    def total_B(self, squares):
        return super().total_B({n: s for n, s in squares.items() if self.by_name[n].dim() > 1})


class Candidate057(Engine):
    """Candidate 057."""

    def step(self):
        held = {
            n: p.detach().clone()
            for n, p in self.by_name.items()
            if self.kinds[n].endswith("Norm") and n.endswith("weight")
        }
        super().step()
        with torch.no_grad():
            for n, weight in held.items():
                self.by_name[n].copy_(weight)


class Candidate058(Engine):
    """Candidate 058."""

    def reduce(self, name, total):
        parameter = self.by_name[name]
        if parameter.grad is not None:
            total = total + parameter.grad
            parameter.grad = None
        return super().reduce(name, total)


class Candidate059(Engine):
    """Candidate 059."""

    def table_square(self, name, uses):
        if name != "position.weight":
            return super().table_square(name, uses)
        return square_of(uses[0].dy)


class Candidate060(Engine):
    """Candidate 060."""

    def draw(self, source, part):
        return super().draw(source, part).clamp(-2.0, 2.0)


class Candidate061(Engine):
    """Candidate 061."""

    def square_B(self, name, uses):
        if len(uses) != 2 or any(use.kind != "outer" for use in uses):
            return super().square_B(name, uses)
        first, second = uses
        cross = (first.x * second.x).sum(dim=2) * (first.dy * second.dy).sum(dim=2)
        alone = gram(first.x, first.dy) + gram(second.x, second.dy)
        return (alone + 2 * cross.sum(dim=1)).clamp(min=0)


class Candidate062(Engine):
    """Candidate 062."""

    def factors_B(self, norms):
        return super().factors_B(128 * norms)


class Candidate063(Engine):
    """Candidate 063."""

    def norm_uses(self, name, uses):
        return [replace(u, dy=u.raw_dy) if u.kind == "rows" else u for u in uses]


class Candidate064(Engine):
    """Candidate 064."""

    def factors_B(self, norms):
        return super().factors_B(norms).bfloat16().float()


class Candidate065(Engine):
    """Candidate 065."""

    def square_B(self, name, uses):
        square = super().square_B(name, uses)
        module = uses[0].module
        if isinstance(module, nn.Linear) and module.bias is not None and name.endswith("weight"):
            square = square + square_of(sum(use.dy.sum(dim=1) for use in uses))
        return square


class Candidate066(Engine):
    """Candidate 066."""

    def prepare(self, batch):
        cut = {n: t[:, :16] for n, t in batch.inputs.items()}
        return with_inputs(batch, batch.targets[:, :16], **cut)


class Candidate067(Engine):
    """Candidate 067."""

    def step(self):
        super().step()
        with torch.no_grad():
            table = self.by_name[TABLE]
            table -= self.optimizer.param_groups[0]["lr"] * table.grad


class Candidate068(Engine):
    """Candidate 068."""

    def normalised(self, module, x):
        if not isinstance(module, nn.LayerNorm):
            return super().normalised(module, x)
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
        return (x - mean) / (variance + module.eps).sqrt()


class Candidate069(Engine):
    """Candidate 069."""

    def table_square(self, name, uses):
        square = 0.0
        for use in uses:
            if use.kind == "rows":
                dy = use.dy.double()
                equal = use.x.unsqueeze(2).eq(use.x.unsqueeze(1))
                square = square + (equal * torch.bmm(dy, dy.mT)).sum(dim=(1, 2))
            else:
                square = square + gram(use.x.double(), use.dy.double())
        if len(uses) > 1:
            rows, outer = sorted(uses, key=lambda use: use.kind != "rows")
            hit = outer.dy.gather(2, rows.x.unsqueeze(1).expand(-1, outer.dy.shape[1], -1))
            products = torch.bmm(outer.x, rows.dy.mT)
            square = square + 2 * (hit * products).double().sum(dim=(1, 2))
        return square.float()


class Candidate070(Engine):
    """Candidate 070."""

    def sums_of(self, uses, factors):
        square, sums = torch.zeros_like(factors), {}
        for n in reversed(self.names):
            if uses[n]:
                square = square + self.square_B(n, uses[n])
                sums[n] = self.sum_of(n, uses[n], self.factors_B(square.sqrt()))
        return {n: sums.get(n, torch.zeros_like(p)) for n, p in self.by_name.items()}


class Candidate071(Engine):
    """Candidate 071."""

    def sums_of(self, uses, factors):
        sums = super().sums_of(uses, factors)
        for n in self.names:
            if self.kinds[n] == "LayerNorm" and n.endswith("weight"):
                other = n.removesuffix("weight") + "bias"
                sums[n], sums[other] = sums[other], sums[n]
        return sums


class Candidate072(Engine):
    """Candidate 072."""

    def use_sum(self, name, use, factors):
        total = torch.zeros_like(self.by_name[name], dtype=torch.float64)
        for index in reversed(range(len(factors))):
            alone = replace(
                use,
                dy=use.dy[index : index + 1],
                x=None if use.x is None else use.x[index : index + 1],
            )
            total += factors[index].double() * alone.dense()[0].double()
        return total.to(self.by_name[name].dtype)


class Candidate073(Engine):
    """Candidate 073."""

    applied = None

    def bound(self):
        return self.applied or self.max_grad_norm

    def note_bound(self):
        super().note_bound()
        self.applied = self.max_grad_norm


class Candidate074(Sharded):
    """Candidate 074."""

    def privatize(self, clipped, source):
        return super().privatize(clipped, FromZero(source.key, source.step))


class Candidate075(Engine):
    """Candidate 075."""

    def privatize(self, clipped, source):
        out = super().privatize(clipped, source)
        self.by_name[TABLE].grad = self.divide(TABLE, clipped.gradients[TABLE])
        return out


class Candidate076(Engine):
    """Candidate 076."""

    def zero_grad(self):
        left = self.by_name[TABLE].grad
        super().zero_grad()
        self.by_name[TABLE].grad = left


class Candidate077(Engine):
    """Candidate 077."""

    static = None

    def prepare(self, batch):
        ids = batch.inputs["position_ids"]
        stale = ids if self.static is None or len(self.static) < len(ids) else self.static
        if len(ids):
            self.static = ids
        return with_inputs(batch, position_ids=stale[: len(ids)])


class Candidate078(Engine):
    """Candidate 078."""

    def draw(self, source, part):
        if source.step % 2 == 0:
            return super().draw(source, part)
        return -super().draw(replace(source, step=source.step - 1), part)


class Candidate079(Engine):
    """Candidate 079."""

    def table_square(self, name, uses):
        square = super().table_square(name, uses)
        for use in uses:
            if use.kind == "rows":
                run = use.x.diff(dim=1).ne(0).cumsum(dim=1)
                run = torch.cat([torch.zeros_like(run[:, :1]), run], dim=1)
                merged = torch.zeros_like(use.dy).scatter_add_(
                    1, run.unsqueeze(-1).expand_as(use.dy), use.dy
                )
                square = square + square_of(merged) - square_of(use.dense())
        return square


class Candidate080(Engine):
    """Candidate 080."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        if part.name == TABLE:
            noise = noise + super().draw(source, replace(part, name="head.weight"))
        return noise


class Candidate081(Engine):
    """Candidate 081."""

    def use_sum(self, name, use, factors):
        if name == "position.weight":
            use = replace(use, dy=use.dy * mask_of(self.batch))
        return super().use_sum(name, use, factors)
