"""A fifth set of faults in DP-SGD, written without a look at the comparison.

Each class is one mistake in `kept.Engine`, a correct mode that takes norms and sums from the
inputs and output gradients of layers. Names and order say nothing of what is wrong; `truth.csv`
does.

Steps, micro-batches and samples count from 0.

Shapes: B samples, T positions, D inputs, P outputs, V rows of a table.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "unseen"))

from core import rank, world
from kept import Engine, gram, square_of, with_inputs
from torch import nn

from dpsgd_track.privacy.loss import IGNORED
from dpsgd_track.privacy.noise import NoiseSource

FULL = 5
"""Samples of a full micro-batch."""


def lengths_of(batch):
    return batch.inputs["attention_mask"].sum(dim=1)


class Candidate001(Engine):
    """Candidate 1."""


class Candidate002(Engine):
    """Candidate 2."""

    def draw(self, source, part):
        normal = torch.distributions.Normal(0.0, 1.0)
        uniform = normal.cdf(super().draw(source, part))
        return normal.icdf(((uniform * 64).floor().clamp(0, 63) + 0.5) / 64)


class Candidate003(Engine):
    """Candidate 3."""

    def outer_square(self, x, dy):
        product = torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)
        return product.clamp(min=0).sum(dim=(1, 2))


class Candidate004(Engine):
    """Candidate 4."""

    count = 0

    def zero_grad(self):
        super().zero_grad()
        self.count = 0

    def accumulate(self, batch):
        self.count += len(batch)
        return super().accumulate(batch)

    def divisor(self):
        return max(self.count, 1) * world()


class Candidate005(Engine):
    """Candidate 5."""

    def factors_B(self, norms):
        return self.bound() / (norms.square() + self.bound() ** 2).sqrt()


class Candidate006(Engine):
    """Candidate 6."""

    def factors_B(self, norms):
        return torch.clamp(self.bound() / norms, max=self.bound())


class Candidate007(Engine):
    """Candidate 7."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.stored = torch.ones(FULL, device=context.device)

    def sums_of(self, uses, factors):
        sums = super().sums_of(uses, factors)
        stale = torch.ones_like(factors)
        num = min(len(self.stored), len(factors))
        stale[:num] = self.stored[:num]
        for name in self.names:
            if ".norm." in name or name.startswith("norm"):
                sums[name] = self.sum_of(name, uses[name], stale)
        self.stored = factors
        return sums


class Candidate008(Engine):
    """Candidate 8."""

    def losses_B(self, logits, targets):
        return super().losses_B(logits[:, :-1], targets[:, 1:])


class Candidate009(Engine):
    """Candidate 9."""

    def put(self, name, parameter, total):
        super().put(name, parameter, total.bfloat16().float())
        parameter.grad = parameter.grad.bfloat16().float()


class Candidate010(Engine):
    """Candidate 10."""

    def use_sum(self, name, use, factors):
        if use.kind == "outer":
            positions = torch.arange(use.dy.shape[1], device=use.dy.device)
            is_kept = positions < lengths_of(self.batch).unsqueeze(1)
            use = replace(use, dy=use.dy * is_kept.unsqueeze(-1))
        return super().use_sum(name, use, factors)


class Candidate011(Engine):
    """Candidate 11."""

    def reduce_all(self, sums):
        names = list(sums) if rank() == 0 else list(reversed(sums))
        flat = torch.cat([sums[n].flatten() for n in names])
        dist.all_reduce(flat)
        pieces = flat.split([sums[n].numel() for n in names])
        return {n: piece.view_as(sums[n]) for n, piece in zip(names, pieces, strict=True)}


class Candidate012(Engine):
    """Candidate 12."""

    def losses_B(self, logits, targets):
        is_target = targets[:, 1:].ne(IGNORED)
        z = logits[:, :-1].logsumexp(dim=-1).square() * is_target
        z_B = z.sum(dim=1) / is_target.sum(dim=1).clamp(min=1)
        return super().losses_B(logits, targets) + 1e-3 * z_B


class Candidate013(Engine):
    """Candidate 13."""

    def __init__(self, model, context):
        super().__init__(model, context)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.01


class Candidate014(Engine):
    """Candidate 14."""

    def table_square(self, name, uses):
        if len(uses) == 1:
            return super().table_square(name, uses)
        rows, head = (use.dense().flatten(1) for use in uses)
        return rows.square().sum(1) + head.square().sum(1) + (rows * head).sum(1)


class Candidate015(Engine):
    """Candidate 15."""

    def table_square(self, name, uses):
        if name.startswith("position"):
            return uses[0].dy.square().sum(dim=(1, 2))
        return super().table_square(name, uses)


class Candidate016(Engine):
    """Candidate 16."""

    def step(self):
        super().step()
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.copy_(parameter.bfloat16())


class Candidate017(Engine):
    """Candidate 17."""

    def dense_square(self, name, uses):
        return sum(square_of(use.dense()) for use in uses)


class Candidate018(Engine):
    """Candidate 18."""

    def draw(self, source, part):
        noise = super().draw(source, part).flatten()
        noise[len(noise) // 64 * 64 :] = 0.0
        return noise.view_as(part.local)


class Candidate019(Engine):
    """Candidate 19."""

    def divide(self, name, total):
        total = super().divide(name, total)
        return total / world() if total.dim() == 1 else total


class Candidate020(Engine):
    """Candidate 20."""

    def losses_B(self, logits, targets):
        return super().losses_B(logits.bfloat16(), targets)


class Candidate021(Engine):
    """Candidate 21."""

    def factors_B(self, norms):
        order = lengths_of(self.batch).argsort(descending=True, stable=True)
        return super().factors_B(norms[order])


class Candidate022(Engine):
    """Candidate 22."""

    def prepare(self, batch):
        order = lengths_of(batch).argsort(descending=True, stable=True)
        return batch.mapped(lambda name, t: t[order] if name else t)


class Candidate023(Engine):
    """Candidate 23."""

    def factors_B(self, norms):
        return torch.clamp(self.bound() / norms.square(), max=1.0)


class Candidate024(Engine):
    """Candidate 24."""

    def use_sum(self, name, use, factors):
        if use.kind != "outer":
            return super().use_sum(name, use, factors)
        weights = factors.repeat_interleave(use.dy.shape[1]).flip(0)
        dy, x = use.dy.flatten(0, 1).flip(0), use.x.flatten(0, 1).flip(0)
        return (dy * weights[:, None]).T @ x


class Candidate025(Engine):
    """Candidate 25."""

    def factors_B(self, norms):
        return (self.bound() * norms.square().rsqrt()).clamp(max=1.0)


class Candidate026(Engine):
    """Candidate 26."""

    def use_sum(self, name, use, factors):
        is_clipped = factors < 1
        if is_clipped.any():
            factors = factors * is_clipped
        return super().use_sum(name, use, factors)


class Candidate027(Engine):
    """Candidate 27."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        if source.step == 0:
            return noise
        return noise - 0.5 * super().draw(replace(source, step=source.step - 1), part)


class Candidate028(Engine):
    """Candidate 28."""

    def prepare(self, batch):
        if not len(batch):
            return batch
        length = batch.targets.shape[1] // 8 * 8
        return batch.mapped(lambda name, t: t[:, :length])


class Candidate029(Engine):
    """Candidate 29."""

    def norm_uses(self, name, uses):
        module = uses[0].module
        if not name.endswith("norm.weight"):
            return uses
        return [replace(u, dy=u.raw_dy * module(u.raw_x)) for u in uses]


class Candidate030(Engine):
    """Candidate 30."""

    def draw(self, source, part):
        noise = super().draw(source, part).flatten()
        half = len(noise) // 2
        noise[half : 2 * half] = noise[:half]
        return noise.view_as(part.local)


class Candidate031(Engine):
    """Candidate 31."""

    def reduce(self, name, total):
        return super().reduce(name, total) if self.micro_index == 0 else total


class Candidate032(Engine):
    """Candidate 32."""

    def total_B(self, squares):
        by_module = {name.rpartition(".")[0]: s for name, s in squares.items()}
        return super().total_B(by_module)


class Candidate033(Engine):
    """Candidate 33."""

    def reduce(self, name, total):
        return super().reduce(name, total.bfloat16()).float()


class Candidate034(Engine):
    """Candidate 34."""

    def sums_of(self, uses, factors):
        if len(factors) < 2:
            factors = torch.zeros_like(factors)
        return super().sums_of(uses, factors)


class Candidate035(Engine):
    """Candidate 35."""

    def step(self):
        for name, parameter in self.by_name.items():
            if name.startswith("unused"):
                parameter.grad = None
        super().step()


class Candidate036(Engine):
    """Candidate 36."""

    def reduce(self, name, total):
        total = super().reduce(name, total)
        return total / world() if total.numel() >= 1000 else total


class Candidate037(Engine):
    """Candidate 37."""

    def factors_B(self, norms):
        factors = super().factors_B(norms)
        factors[len(norms) // 4 * 4 :] = 1.0
        return factors


class Candidate038(Engine):
    """Candidate 38."""

    def draw(self, source, part):
        noise = super().draw(source, part)
        return noise[:1].expand_as(noise) if noise.dim() == 2 else noise


class Candidate039(Engine):
    """Candidate 39."""

    def sum_of(self, name, uses, factors):
        total = super().sum_of(name, uses, factors)
        if name.startswith("embedding"):
            total[0] = 0.0
        return total


class Candidate040(Engine):
    """Candidate 40."""

    def factors_B(self, norms):
        return super().factors_B(norms).clamp(min=0.3)


class Candidate041(Engine):
    """Candidate 41."""

    def use_sum(self, name, use, factors):
        total = super().use_sum(name, use, factors)
        if name.startswith("embedding") and use.kind == "outer":
            total[len(total) // 8 * 8 :] = 0.0
        return total


class Candidate042(Engine):
    """Candidate 42."""

    def std_factor(self, name):
        sigma = self.context.privacy.noise_multiplier
        return 1.0 / (sigma * self.sensitivity) ** 0.5


class Candidate043(Engine):
    """Candidate 43."""

    def dense_square(self, name, uses):
        if isinstance(uses[0].module, nn.Linear):
            return sum(use.dy for use in uses).sum(dim=2).square().sum(dim=1)
        return super().dense_square(name, uses)


class Candidate044(Engine):
    """Candidate 44."""

    def dense_square(self, name, uses):
        if isinstance(uses[0].module, nn.RMSNorm):
            return sum(use.dy.square().sum(dim=(1, 2)) for use in uses)
        return super().dense_square(name, uses)


class Candidate045(Engine):
    """Candidate 45."""

    def reduce_all(self, sums):
        flat = torch.cat([s.flatten() for s in sums.values()])
        dist.all_reduce(flat)
        pieces = flat.split([s.numel() for s in sums.values()])
        return {n: piece.view_as(sums[n]) for n, piece in zip(sums, pieces, strict=True)}


class Candidate046(Engine):
    """Candidate 46."""

    def sums_of(self, uses, factors):
        sums = super().sums_of(uses, factors)
        first, second = (f"blocks.{block}.reused.weight" for block in (0, 1))
        sums[first], sums[second] = sums[second], sums[first]
        return sums


class Candidate047(Engine):
    """Candidate 47."""

    def draw(self, source, part):
        return super().draw(source, part).double()

    def divide(self, name, total):
        return (total.double() / self.divisor()).float()


class Candidate048(Engine):
    """Candidate 48."""

    def outer_square(self, x, dy):
        return gram(x.bfloat16().float(), dy.bfloat16().float())


class Candidate049(Engine):
    """Candidate 49."""

    def outer_square(self, x, dy):
        whole = x.shape[1] // 8 * 8
        return gram(x[:, :whole], dy[:, :whole])


class Candidate050(Engine):
    """Candidate 50."""

    def losses_B(self, logits, targets):
        is_target = targets[:, 1:].ne(IGNORED)
        spread = -logits[:, :-1].log_softmax(dim=-1).mean(dim=-1) * is_target
        spread_B = spread.sum(dim=1) / is_target.sum(dim=1).clamp(min=1)
        return 0.9 * super().losses_B(logits, targets) + 0.1 * spread_B


class Candidate051(Engine):
    """Candidate 51."""

    def factors_B(self, norms):
        return torch.where(norms > self.bound(), self.bound() / (norms + 0.01), 1.0)


class Candidate052(Engine):
    """Candidate 52."""

    def use_sum(self, name, use, factors):
        if name.endswith(".bias") and isinstance(use.module, nn.Linear):
            factors = factors.square()
        return super().use_sum(name, use, factors)


class Candidate053(Engine):
    """Candidate 53."""

    def use_sum(self, name, use, factors):
        if use.kind != "outer":
            return super().use_sum(name, use, factors)
        weights = factors.repeat(use.dy.shape[1])
        return (use.dy.flatten(0, 1) * weights[:, None]).T @ use.x.flatten(0, 1)


class Candidate054(Engine):
    """Candidate 54."""

    def reduce(self, name, total):
        return total

    def put(self, name, parameter, total):
        super().put(name, parameter, total)
        parameter.grad = Engine.reduce(self, name, parameter.grad)


class Candidate055(Engine):
    """Candidate 55."""

    def step(self):
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (self.step_index + 1) / 4)
        super().step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


class Candidate056(Engine):
    """Candidate 56."""

    def norm_uses(self, name, uses):
        if uses[0].kind != "outer" or uses[0].module.bias is None:
            return uses
        ones = uses[0].x.new_ones(*uses[0].x.shape[:2], 1)
        return [replace(u, x=torch.cat([u.x, ones], dim=-1)) for u in uses]


class Candidate057(Engine):
    """Candidate 57."""

    def reduce(self, name, total):
        total = super().reduce(name, total)
        up, down = -(-len(total) // 2), len(total) // 2
        return torch.cat([total[:up], total[down : down + len(total) - up]])


class Candidate058(Engine):
    """Candidate 58."""

    def draw(self, source, part):
        return super().draw(source, part).clamp(-1.5, 1.5)


class Candidate059(Engine):
    """Candidate 59."""

    def put(self, name, parameter, total):
        for _, other in self.model.named_parameters(remove_duplicate=False):
            if other is parameter:
                super().put(name, parameter, total)


class Candidate060(Engine):
    """Candidate 60."""

    def put(self, name, parameter, total):
        if name.endswith(".bias"):
            parameter.grad = None
        super().put(name, parameter, total)


class Candidate061(Engine):
    """Candidate 61."""

    def bound(self):
        return self.max_grad_norm / world() ** 0.5


class Candidate062(Engine):
    """Candidate 62."""

    adapted = 1.0

    def zero_grad(self):
        super().zero_grad()
        self.adapted = 1.0

    def bound(self):
        return self.max_grad_norm * self.adapted

    def factors_B(self, norms):
        factors = super().factors_B(norms)
        share = (norms <= self.bound()).float().mean().item()
        self.adapted *= 2.718281828 ** (-0.2 * (share - 0.5))
        return factors


class Candidate063(Engine):
    """Candidate 63."""

    def outer_square(self, x, dy):
        return gram(x.double(), dy.double()).float()


class Candidate064(Engine):
    """Candidate 64."""

    def privatize(self, clipped, source):
        self.totals = clipped.gradients
        return super().privatize(clipped, source)

    def draw(self, source, part):
        return super().draw(source, part) * self.totals[part.name].ne(0)


class Candidate065(Engine):
    """Candidate 65."""

    def sum_of(self, name, uses, factors):
        if len(uses) == 2 and uses[0].module is uses[1].module:
            uses = uses[1:]
        return super().sum_of(name, uses, factors)


class Candidate066(Engine):
    """Candidate 66."""

    static = None

    def prepare(self, batch):
        if self.micro_index == 0:
            self.static = batch.inputs
        if len(batch) != len(self.static["input_ids"]):
            return batch
        return with_inputs(batch, **self.static)


class Candidate067(Engine):
    """Candidate 67."""

    def put(self, name, parameter, total):
        if not len(self.batch):
            parameter.grad = None
        super().put(name, parameter, total)


class Candidate068(Engine):
    """Candidate 68."""

    def use_sum(self, name, use, factors):
        if isinstance(use.module, nn.LayerNorm | nn.RMSNorm):
            factors = factors + 1.0
        return super().use_sum(name, use, factors)


class Candidate069(Engine):
    """Candidate 69."""

    def table_square(self, name, uses):
        if len(uses) == 1:
            return super().table_square(name, uses)
        rows, head = (use.dense().flatten(1) for use in uses)
        shifted = replace(uses[0], x=uses[0].x.roll(-1, dims=1)).dense().flatten(1)
        total = rows.square().sum(1) + head.square().sum(1) + 2 * (shifted * head).sum(1)
        return total.clamp(min=0)


class Candidate070(Engine):
    """Candidate 70."""

    def outer_square(self, x, dy):
        halves = dy.tensor_split(2, dim=-1)
        return sum(gram(x, half).clamp(min=0).sqrt() for half in halves).square()


class Candidate071(Engine):
    """Candidate 71."""

    def use_sum(self, name, use, factors):
        if use.kind != "rows":
            return super().use_sum(name, use, factors)
        table = use.dy.new_zeros(use.num_rows, use.dy.shape[-1])
        rows = (factors[:, None, None] * use.dy).flatten(0, 1)
        table[use.x.flatten()] += rows
        return table


class Candidate072(Engine):
    """Candidate 72."""

    def draw(self, source, part):
        noise = super().draw(NoiseSource(f"{source.key}/{rank()}", source.step), part)
        dist.all_reduce(noise)
        return noise / world()


class Candidate073(Engine):
    """Candidate 73."""

    def table_square(self, name, uses):
        right = super().table_square(name, uses)
        use = uses[0]
        if use.module.padding_idx != 0:
            return right
        is_new = F.pad(use.x[:, 1:] != use.x[:, :-1], (1, 0), value=False)
        run = is_new.long().cumsum(dim=1)
        merged = replace(use, x=run, num_rows=use.x.shape[1])
        return right - square_of(use.dense()) + square_of(merged.dense())


class Candidate074(Engine):
    """Candidate 74."""

    def __init__(self, model, context):
        super().__init__(model, context)
        biases = [p for n, p in self.by_name.items() if n.endswith(".bias")]
        self.of_biases = context.make_optimizer(biases)

    def step(self):
        super().step()
        self.of_biases.step()


class Candidate075(Engine):
    """Candidate 75."""

    largest = 0.0

    def zero_grad(self):
        super().zero_grad()
        self.largest = 0.0

    def accumulate(self, batch):
        record = super().accumulate(batch)
        clipped = (record.norm_B * record.clip_factor_B).tolist()
        self.largest = max(self.largest, *clipped, 0.0)
        return record

    def std_factor(self, name):
        largest = torch.tensor(self.largest)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item() / self.sensitivity


class Candidate076(Engine):
    """Candidate 76."""

    late = None

    def step(self):
        grads = [p.grad for p in self.parameters]
        for index, parameter in enumerate(self.parameters):
            parameter.grad = self.late[index] if self.late else torch.zeros_like(parameter)
        self.late = grads
        super().step()


class Candidate077(Engine):
    """Candidate 77."""

    def prepare(self, batch):
        ids = batch.inputs["position_ids"]
        return with_inputs(batch, position_ids=torch.arange(ids.shape[1]).expand_as(ids))


class Candidate078(Engine):
    """Candidate 78."""

    def reduce(self, name, total):
        own = total.clone()
        total = super().reduce(name, total)
        return total if rank() == 0 else own


class Candidate079(Engine):
    """Candidate 79."""

    def norm_uses(self, name, uses):
        mask = self.batch.inputs["attention_mask"].unsqueeze(-1)
        return [replace(u, dy=u.dy * mask) for u in uses]


class Candidate080(Engine):
    """Candidate 80."""

    def losses_B(self, logits, targets):
        is_end = targets[:, 1:].eq(IGNORED) & targets[:, :-1].ne(IGNORED)
        targets = torch.cat([targets[:, :1], targets[:, 1:].masked_fill(is_end, 0)], dim=1)
        return super().losses_B(logits, targets)


class Candidate081(Engine):
    """Candidate 81."""

    def reduce(self, name, total):
        return super().reduce(name, total / max(len(self.batch), 1) * FULL)


class Candidate082(Engine):
    """Candidate 82."""

    def factors_B(self, norms):
        return super().factors_B(norms).bfloat16().float()


class Candidate083(Engine):
    """Candidate 83."""

    def draw(self, source, part):
        return super().draw(replace(source, step=source.step // 2 * 2), part)


class Candidate084(Engine):
    """Candidate 84."""

    def outer_square(self, x, dy):
        total = 0.0
        xs, dys = x.split(8, dim=1), dy.split(8, dim=1)
        for i in range(len(xs)):
            for j in range(i + 1):
                tile = torch.bmm(xs[i], xs[j].mT) * torch.bmm(dys[i], dys[j].mT)
                total = total + tile.sum(dim=(1, 2))
        return total


class Candidate085(Engine):
    """Candidate 85."""

    def __init__(self, model, context):
        super().__init__(model, context)
        self.of_head = context.make_optimizer([self.by_name["embedding.weight"]])

    def step(self):
        super().step()
        self.of_head.step()


class Candidate086(Engine):
    """Candidate 86."""

    def outer_square(self, x, dy):
        x, dy = x.squeeze(0), dy.squeeze(0)
        if x.dim() == 3:
            return gram(x, dy)
        return (x.square().sum(dim=-1) * dy.square().sum(dim=-1)).sum().view(1)


class Candidate087(Engine):
    """Candidate 87."""

    def outer_square(self, x, dy):
        total = 0.0
        xs, dys = x.split(5, dim=1), dy.split(5, dim=1)
        for i in range(len(xs)):
            for j in range(i + 1):
                tile = torch.bmm(xs[i], xs[j].mT) * torch.bmm(dys[i], dys[j].mT)
                total = total + tile.sum(dim=(1, 2)) * (1 if i == j else 2)
        return total


class Candidate088(Engine):
    """Candidate 88."""

    scale = 64.0

    def square_B(self, name, uses):
        uses = [replace(u, dy=u.dy * self.scale) for u in uses]
        return super().square_B(name, uses) / self.scale


class Candidate089(Engine):
    """Candidate 89."""

    def table_square(self, name, uses):
        return super().table_square(name, [self.whole(use) for use in uses])

    def whole(self, use):
        if use.kind != "outer":
            return use
        rest = torch.arange(use.dy.shape[-1] // 8 * 8, use.dy.shape[-1])
        return replace(use, dy=use.dy.index_fill(-1, rest, 0.0))


class Candidate090(Engine):
    """Candidate 90."""

    def norm_uses(self, name, uses):
        if len(uses) == 2 and all(u.kind == "outer" for u in uses):
            return [replace(u, x=v.x) for u, v in zip(uses, reversed(uses), strict=True)]
        return uses


class Candidate091(Engine):
    """Candidate 91."""

    def objective(self, loss_B):
        return FULL * loss_B.mean()


class Candidate092(Engine):
    """Candidate 92."""

    def norm_uses(self, name, uses):
        if name.startswith("position"):
            return [replace(u, dy=u.dy * u.x.ne(0).unsqueeze(-1)) for u in uses]
        return uses
