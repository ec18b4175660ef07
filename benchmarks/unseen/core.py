"""A correct per-sample mode (`Correct`) and a correct sharded one (`Sharded`), cut into small
methods so that a deviation of one line can be made in each stage of a DP-SGD step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.dropout import only
from dpsgd_track.privacy.loss import logits_of


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


class StepCounter:
    """Counts steps, and the micro-batches of each, from 0."""

    step_index = 0
    micro_index = 0

    def zero_grad(self):
        super().zero_grad()
        if self.stepped:
            self.step_index += 1
        self.stepped = False
        self.micro_index = 0

    stepped = False

    def step(self):
        super().step()
        self.stepped = True


class Correct(StepCounter, Mode):
    """One sample at a time in float32 on a replicated model. Correct."""

    replicated = True

    def __init__(self, model, context):
        super().__init__(context)
        self.model = model
        self.before_optimizer(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.by_name = dict(named)
        self.optimizer = context.make_optimizer(self.parameters)
        self.kinds = kinds_of(model)

    # --- initial weights
    def before_optimizer(self, model):
        pass

    # --- data and loss
    def prepare(self, batch):
        return batch

    def sample(self, batch, index):
        return batch.sample(index)

    def loss(self, logits, targets, sample):
        return self.context.loss(logits, targets)

    def gradient(self, sample, index):
        with only(index):
            loss = self.loss(
                logits_of(self.model(*sample.args, **sample.inputs)), sample.targets, sample
            )
            gradients = torch.autograd.grad(
                loss.sum(), self.parameters, allow_unused=True, materialize_grads=True
            )
        return loss.detach().sum(), dict(zip(self.names, gradients, strict=True))

    # --- norms
    def squares(self, gradients, index):
        return {n: self.square(n, g) for n, g in gradients.items()}

    def square(self, name, gradient):
        return gradient.square().sum()

    def total(self, squares):
        return torch.stack(list(squares.values())).sum().sqrt()

    # --- factors
    def bound(self):
        return self.max_grad_norm

    def factor(self, norm, index):
        return torch.clamp(self.bound() / norm, max=1.0)

    # --- sums
    def new_sum(self, name, parameter):
        return torch.zeros_like(parameter)

    def contribution(self, name, gradient, factor, index):
        return factor * torch.where(factor > 0, gradient, 0.0)

    def add(self, name, total, contribution):
        total += contribution

    def reduce(self, name, total):
        if dist.is_initialized():
            dist.all_reduce(total)
        return total

    def put(self, name, parameter, total):
        parameter.grad = total if parameter.grad is None else parameter.grad + total

    def order(self, batch):
        return range(len(batch))

    # --- hooks that see a whole micro-batch
    def all_squares(self, squares):
        return squares

    def all_norms(self, norms):
        return norms

    def all_factors(self, factors, norms, gradients):
        return factors

    def all_gradients(self, gradients):
        return gradients

    def accumulate(self, batch):
        batch = self.prepare(batch)
        self.batch = batch
        losses, norms, factors = torch.zeros(3, len(batch), device=self.context.device)
        by_parameter = {n: torch.zeros(len(batch), device=self.context.device) for n in self.names}
        sums = {n: self.new_sum(n, p) for n, p in self.by_name.items()}
        gradients, squares = [None] * len(batch), [None] * len(batch)
        for index in range(len(batch)):
            losses[index], gradients[index] = self.gradient(self.sample(batch, index), index)
        gradients = self.all_gradients(gradients)
        for index in range(len(batch)):
            squares[index] = self.squares(gradients[index], index)
        squares = self.all_squares(squares)
        for index in range(len(batch)):
            norms[index] = self.total(squares[index])
            for n, s in squares[index].items():
                by_parameter[n][index] = s.sqrt()
        norms = self.all_norms(norms)
        for index in range(len(batch)):
            factor = self.factor(norms[index], index)
            finite = losses[index].isfinite() & norms[index].isfinite()
            factors[index] = torch.where(finite, factor, 0.0) if self.leaves_out else factor
        factors = self.all_factors(factors, norms, gradients)
        for index in self.order(batch):
            for n, g in gradients[index].items():
                self.add(n, sums[n], self.contribution(n, g, factors[index], index))
        self.finish(sums, gradients, factors)
        for n, p in self.by_name.items():
            self.put(n, p, self.reduce(n, sums[n]))
        self.note_bound()
        self.micro_index += 1
        return SampleRecord(losses, norms, factors, by_parameter)

    def finish(self, sums, gradients, factors):
        pass

    def at(self, *names):
        """The first of `names` that the model has."""
        return next((n for n in names if n in self.by_name), None)

    leaves_out = True

    # --- noise and update
    def std_factor(self, name):
        return 1.0

    def draw(self, source, part):
        return source.standard_normal(part)

    def divisor(self):
        return self.context.privacy.expected_batch_size

    def privatize(self, clipped, source):
        sigma = self.context.privacy.noise_multiplier
        out = {}
        for part in self.weight_parts():
            total = clipped.gradients[part.name]
            if sigma > 0:
                std = sigma * clipped.sensitivity * self.std_factor(part.name)
                total = total + std * self.draw(source, part).to(total.dtype)
            out[part.name] = self.divide(part.name, total)
        self._write_gradients(out)
        return out

    def divide(self, name, total):
        return total / self.divisor()


class Sharded(StepCounter, ComposedMode):
    """flash_fsdp as it ships, with a count of steps."""

    base = "flash_fsdp"

    def __init__(self, model, context):
        super().__init__(MODES[self.base], model, context)
        self.plant()

    def plant(self):
        pass

    def accumulate(self, batch):
        record = super().accumulate(batch)
        self.micro_index += 1
        return record


def kinds_of(model):
    """Name of each parameter -> class name of the module that owns it."""
    kinds = {}
    for fqn, module in model.named_modules():
        for local, _ in module.named_parameters(recurse=False):
            kinds.setdefault(f"{fqn}.{local}" if fqn else local, type(module).__name__)
    return kinds
