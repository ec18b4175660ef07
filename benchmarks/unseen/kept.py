"""A correct mode that takes norms and sums from the inputs and output gradients of layers.

It is cut into small methods, so that a deviation of one line can be made in each stage.

Shapes: B samples, T positions, D inputs, P outputs, V rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from core import Correct
from torch import nn

from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loss import logits_of


def with_inputs(batch, targets=None, **changed):
    inputs = {n: changed.get(n, t) for n, t in batch.inputs.items()}
    return Batch(inputs, batch.targets if targets is None else targets, args=batch.args)


@dataclass
class Use:
    """Per-sample gradient of one use of a parameter in a forward."""

    kind: str
    """outer, rows, or dense."""
    x: torch.Tensor | None
    """Inputs [B, T, D], or tokens [B, T]."""
    dy: torch.Tensor
    """Output gradients [B, T, P]; of a dense use, gradients of each position [B, T, ...]."""
    num_rows: int = 0
    module: nn.Module | None = None
    raw_x: torch.Tensor | None = None
    """Inputs of the module."""
    raw_dy: torch.Tensor | None = None
    """Output gradients of the module."""

    def dense(self):
        """[B, *parameter]."""
        if self.kind == "outer":
            return torch.einsum("btp,btd->bpd", self.dy, self.x)
        if self.kind == "rows":
            table = self.dy.new_zeros(len(self.dy), self.num_rows, self.dy.shape[-1])
            index = self.x.unsqueeze(-1).expand_as(self.dy)
            return table.scatter_add_(1, index, self.dy)
        return self.dy.sum(dim=1)


def gram(x, dy):
    """Squared norm of sum_t dy_t x_t^T, [B]."""
    return (torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)).sum(dim=(1, 2))


def square_of(dense):
    """[B, ...] -> [B]."""
    return dense.flatten(1).square().sum(dim=1)


class Kept(Correct):
    """A micro-batch in one forward and one backward: ghost norms, and sums of what was kept."""

    masks_padding = True

    def __init__(self, model, context):
        super().__init__(model, context)
        self.calls = None
        self.name_of = {id(p): n for n, p in self.by_name.items()}
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        if self.calls is not None:
            self.calls.append((module, args[0].detach(), output))

    # --- loss and backward
    def losses_B(self, logits, targets):
        return self.context.loss(logits, targets)

    def objective(self, loss_B):
        return loss_B.sum()

    def passes(self, batch):
        """Losses [B], and the uses of each parameter, by name."""
        self.calls = []
        logits = logits_of(self.model(*batch.args, **batch.inputs))
        calls, self.calls = self.calls, None
        loss_B = self.losses_B(logits, batch.targets)
        gradients = torch.autograd.grad(
            self.objective(loss_B),
            [c[2] for c in calls],
            allow_unused=True,
            materialize_grads=True,
        )
        uses = {n: [] for n in self.names}
        for (module, x, _), dy in zip(calls, gradients, strict=True):
            for local, use in self.uses_of(module, x, dy).items():
                use.module, use.raw_x, use.raw_dy = module, x, dy
                uses[self.name_of[id(getattr(module, local))]].append(use)
        return loss_B.detach(), uses

    def uses_of(self, module, x, dy):
        if isinstance(module, nn.Embedding):
            if module.padding_idx is not None and self.masks_padding:
                dy = dy.masked_fill(x.eq(module.padding_idx).unsqueeze(-1), 0.0)
            return {"weight": Use("rows", x, dy, module.num_embeddings)}
        if isinstance(module, nn.Linear):
            uses = {"weight": Use("outer", x, dy)}
        else:
            uses = {"weight": Use("dense", None, dy * self.normalised(module, x))}
        if getattr(module, "bias", None) is not None:
            uses["bias"] = Use("dense", None, dy)
        return uses

    def normalised(self, module, x):
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)

    # --- norms

    def norm_uses(self, name, uses):
        return uses

    def square_B(self, name, uses):
        if all(use.kind == "outer" for use in uses):
            return self.outer_square(
                torch.cat([u.x for u in uses], dim=1), torch.cat([u.dy for u in uses], dim=1)
            )
        if any(use.kind == "rows" for use in uses):
            return self.table_square(name, uses)
        return self.dense_square(name, uses)

    def outer_square(self, x, dy):
        return gram(x, dy)

    def table_square(self, name, uses):
        return square_of(sum(use.dense() for use in uses))

    def dense_square(self, name, uses):
        return square_of(sum(use.dense() for use in uses))

    def total_B(self, squares):
        return torch.stack(list(squares.values())).sum(dim=0).sqrt()

    # --- factors
    def factors_B(self, norms):
        return torch.clamp(self.bound() / norms, max=1.0)

    # --- sums
    def sum_of(self, name, uses, factors):
        return sum(self.use_sum(name, use, factors) for use in uses)

    def use_sum(self, name, use, factors):
        return torch.einsum("b,b...->...", factors, use.dense())


class Engine(Kept):
    """Sums of a micro-batch reduced together; correct."""

    def sums_of(self, uses, factors):
        return {
            n: self.sum_of(n, uses[n], factors) if uses[n] else torch.zeros_like(p)
            for n, p in self.by_name.items()
        }

    def reduce_all(self, sums):
        return {n: self.reduce(n, s) for n, s in sums.items()}

    def accumulate(self, batch):
        batch = self.batch = self.prepare(batch)
        device = self.context.device
        if len(batch):
            losses, uses = self.passes(batch)
            with torch.no_grad():
                squares = {n: self.square_B(n, self.norm_uses(n, u)) for n, u in uses.items() if u}
                norms = self.total_B(squares)
                factors = self.factors_B(norms)
                sums = self.sums_of(uses, factors)
        else:
            losses, norms, factors = torch.zeros(3, 0, device=device)
            squares = {n: torch.zeros(0, device=device) for n in self.names}
            sums = {n: torch.zeros_like(p) for n, p in self.by_name.items()}
        sums = self.reduce_all(sums)
        for n, p in self.by_name.items():
            self.put(n, p, sums[n])
        self.note_bound()
        self.micro_index += 1
        roots = {n: s.sqrt() for n, s in squares.items()}
        return SampleRecord(losses, norms, factors, roots)
