"""Random models under random training loops: private engines against plain autograd.

`Case` says everything about one loop, `run` judges it. The truth is a twin of the model, trained
beside it by plain autograd with one sample at a time. Whether a model has a truth is measured, not
believed: a batch's losses and their gradients must be those of its samples alone, and nothing may
be written into the model. As a script, it runs many cases and prints what came of them by
ingredient, with the smallest case of every kind of failure:

    PYTHONPATH=. python -m tests.support.engine_fuzz --cases 2000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import dpsgd_track
from tests.support.engine_fuzz_parts import (
    EITHER,
    HEADS,
    LEGAL,
    LOSSES,
    NONE,
    PIECES,
    RANDOM,
    SOURCES,
    Failing,
    Model,
    Sizes,
    V,
    build,
)

MODES = ("flash", "flash_bk", "flash_fuse", "flash_fuse_bk", "ghost_bk", "reference")
EXACT, REFUSED, CRASH, WRONG, VOID = "exact", "refused", "crash", "wrong", "void"
OUTCOMES = (EXACT, REFUSED, CRASH, WRONG, VOID)
"""`void`: plain torch itself fails, or there is nothing to train."""
LEARNING_RATE = 0.05
# Everything is float64, of sizes up to 5 and a few steps: what is right agrees to 1e-12.
TOLERANCE = 1e-8
# A norm is the root of a sum in which Gram matrices may cancel: 1e-16 there is 1e-8 here.
NORM_TOLERANCE = 1e-6

LARGEST_NORM = 1e5
"""Of a sample's gradient. Beyond it a model is so steep that rounding shows at `TOLERANCE`."""

EVENTS: dict[str, str] = {
    "none": LEGAL,
    "zero-grad-before": LEGAL,
    "zero-grad-after": EITHER,
    "failure": LEGAL,
    "eval": LEGAL,
    "train": LEGAL,
    "freeze": EITHER,
    "unfreeze": EITHER,
    "add-group": EITHER,
    "replace-layer": EITHER,
    "plain-backward": NONE,
    "plain-backward-cleared": LEGAL,
    "evaluate": LEGAL,
    "saliency": LEGAL,
    "copy": LEGAL,
    "resume": LEGAL,
    "not-finite": EITHER,
    "other-weights": LEGAL,
    "other-bound": EITHER,
    "failing-step": EITHER,
}
"""What happens at a step, beside its micro-batches, and what may be expected of it."""


@dataclass(frozen=True)
class Step:
    """A training step."""

    sizes: tuple[tuple[int, int], ...]
    """Samples and positions of each micro-batch."""
    event: str = "none"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a loop; equal cases do equal things."""

    mode: str = "flash_bk"
    source: str = "floats"
    pieces: tuple[str, ...] = ("linear",)
    head: str = "pooled"
    loss: str = "weighted"
    steps: tuple[Step, ...] = (Step(((2, 2),)),)
    num_features: int = 2
    num_classes: int = 2
    bound: str = "some"
    """Whose gradients are clipped: none, some or all."""
    optimizer: str = "sgd"
    inputs: str = "one"
    """How the model is called: with one tensor, a pair, or keyword arguments."""
    sigma: float = 0.0
    frozen: int | None = None
    """Piece that is frozen at first."""
    seed: int = 0

    def ingredients(self) -> Iterator[tuple[str, str]]:
        """Kind and name of everything in it that results are counted by."""
        yield "mode", self.mode
        yield "source", self.source
        yield from (("piece", name) for name in sorted(set(self.pieces)))
        yield "head", self.head
        yield "loss", self.loss
        yield from (("event", name) for name in sorted({s.event for s in self.steps}))
        for name in ("inputs", "optimizer", "bound"):
            yield name, getattr(self, name)
        yield "noise", "yes" if self.sigma else "no"

    def contracts(self) -> set[str]:
        """The contracts of its ingredients."""
        return {
            SOURCES[self.source].contract,
            HEADS[self.head].contract,
            LOSSES[self.loss][1],
            *(PIECES[name].contract for name in self.pieces),
            *(EVENTS[step.event] for step in self.steps),
        }

    def build(self) -> Model:
        """Its model, the same at every call."""
        sizes = Sizes(num_features=self.num_features, num_classes=self.num_classes)
        can_fail = any(step.event == "failure" for step in self.steps)
        return build(sizes, self.source, self.pieces, self.head, can_fail=can_fail, seed=self.seed)

    def __repr__(self) -> str:
        """As code, without what is as by default."""
        said = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        # In double quotes, as shells need them.
        said = [part.replace("'", '"') for part in said]
        return f"Case({', '.join(said)})"


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    kind: str
    detail: str = ""
    is_legal: bool = False
    """Whether an engine has no reason to refuse."""
    saw_none: bool = False
    """Whether a batch came up that has no truth."""


class _Stop(Exception):
    """Ends a case with an outcome."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def run(case: Case) -> Outcome:
    """Train by the engine and by plain autograd, and compare after each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = _Loop(case)
        try:
            loop.run()
            kind, detail = EXACT, ""
        except _Stop as stop:
            kind, detail = stop.kind, stop.detail
            if kind == REFUSED and loop.is_comparable:
                kind, detail = loop.step_after_refusal(detail)
    is_legal = case.contracts() <= {LEGAL, RANDOM} and not loop.saw_none
    return Outcome(kind, detail, is_legal, loop.saw_none)


@dataclass
class _Data:
    """A micro-batch."""

    x: Tensor
    gate: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, which: slice) -> _Data:
        return _Data(self.x[which], self.gate[which], self.targets[which])

    def inputs(self, how: str) -> Any:
        if how == "one":
            return self.x
        return (self.x, self.gate) if how == "pair" else {"gate": self.gate, "x": self.x}

    def output(self, model: nn.Module, how: str) -> Tensor:
        y: Tensor = model(self.x) if how == "one" else model(self.x, self.gate)
        return y


@dataclass
class _Truth:
    """What plain autograd says of each sample alone."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    exists: bool = True
    """Whether samples do without each other, and leave nothing in the model."""
    can_be_isolated: bool = True
    """Whether each sample alone has a gradient, and leaves nothing in the model."""


class _Loop:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.loss = LOSSES[case.loss][0]
        self.is_random = RANDOM in case.contracts()
        self.model, self.twin = case.build(), case.build()
        self.saw_none = False
        """No truth was there for a batch."""
        self.copies: list[tuple[nn.Module, nn.Module]] = []
        self.regrouped = False
        self.num_steps = 0
        self.bounds: list[float] = []
        """C of each micro-batch of the step at hand."""
        self.max_norm = 1.0
        for model in (self.model, self.twin):
            if (piece := self._piece_of(model)) is not None:
                piece.requires_grad_(False)

    @property
    def is_comparable(self) -> bool:
        """Whether what was taken before a refusal has a truth."""
        return bool(self.bounds) and not self.is_random and not self.saw_none

    def step_after_refusal(self, refusal: str) -> tuple[str, str]:
        """A step after a refused micro-batch counts those before, or is refused as well."""
        try:
            self._optimizer_step()
        except _Stop as stop:
            if stop.kind in (CRASH, WRONG):
                return stop.kind, f"after the refusal {refusal!r}: {stop.detail}"
        return REFUSED, refusal

    # The course of a case.

    def run(self) -> None:
        case = self.case
        torch.manual_seed(case.seed)
        first = next((s for s in case.steps if any(b for b, _ in s.sizes)), None)
        if first is None or not any(p.requires_grad for p in self.twin.parameters()):
            raise _Stop(VOID, "nothing to train on")
        self.max_norm = self._chosen_bound(case.steps.index(first))
        self.expected = max(1, sum(b for b, _ in first.sizes))
        self.noise = _Noise(self.twin, str(case.seed)) if case.sigma else None
        try:
            self.optimizer, self.twin_optimizer = map(self._optimizer, (self.model, self.twin))
        except ValueError as error:
            raise _Stop(VOID, str(error)) from error
        self._guarded(self._make_private)
        for number, step in enumerate(case.steps):
            self._step(number, step)
        for ours, theirs in self.copies:
            self._same_outputs(ours, theirs, self._data(0, 0), "a copy made earlier")

    def _step(self, number: int, step: Step) -> None:
        self.bounds = []
        self._reset_truth()
        event = getattr(self, "_on_" + step.event.replace("-", "_"), None)
        batches = [self._data(number, k) for k in range(len(step.sizes))]
        if event is not None:
            event(batches)
        for k, data in enumerate(batches):
            if step.event == "other-bound" and k == 1:
                self.max_norm /= 3
                self.private.mode.set_max_grad_norm(self.max_norm)
            if step.event == "failure" and k == 0:
                self._fail_and_retry(data, number)
            else:
                self._backward(data)
        if step.event == "zero-grad-after":
            self._guarded(self.optimizer.zero_grad)
            self._reset_truth()
            for data in batches:
                self._backward(data)
        if step.event == "plain-backward":
            self._plain_backward(batches[0])
        if step.event == "failing-step":
            self._fail_in_step()
        self._optimizer_step()

    def _make_private(self) -> None:
        case = self.case
        self.private = dpsgd_track.make_private(
            self.model,
            self.optimizer,
            noise_multiplier=case.sigma,
            max_grad_norm=self.max_norm,
            expected_batch_size=self.expected,
            mode=case.mode,
            loss=self.loss,
            seed=case.seed,
            sample_rate=0.01,
        )

    def _backward(self, data: _Data) -> None:
        """A micro-batch, on both sides."""
        truth = self._truth(data)
        self.saw_none |= not truth.exists
        told = self._guarded(
            lambda: self.private.backward(data.inputs(self.case.inputs), data.targets)
        )
        self.bounds.append(self.max_norm)
        if not truth.can_be_isolated:
            raise _Stop(WRONG, "taken, though no truth exists")
        self._check_record(told, truth, data)
        for loss, norm, gradients in zip(truth.losses, truth.norms, truth.gradients, strict=True):
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            factor = min(1.0, self.max_norm / norm) if norm else 1.0
            self._add(gradients, factor if is_finite else 0.0)

    def _check_record(self, told: Tensor, truth: _Truth, data: _Data) -> None:
        why = "" if truth.exists else " (samples see each other)"
        norms = self.private.last.norm_B
        if self.is_random:
            if not torch.isfinite(norms).all() and not any(
                step.event == "not-finite" for step in self.case.steps
            ):
                raise _Stop(WRONG, "norms are not finite")
            return
        if told.shape != (len(data),):
            raise _Stop(WRONG, f"losses of shape {tuple(told.shape)} for {len(data)} samples")
        wanted = torch.tensor(truth.norms, dtype=torch.float64)
        finite = torch.isfinite(wanted)
        if not _is_close(norms[finite], wanted[finite], NORM_TOLERANCE):
            raise _Stop(WRONG, f"norms{why} {_short(norms)} right {_short(wanted)}")
        losses = torch.tensor(truth.losses, dtype=torch.float64)
        if truth.exists and not _is_close(told[finite], losses[finite], TOLERANCE):
            raise _Stop(WRONG, f"losses{why} {_short(told)} right {_short(losses)}")

    def _optimizer_step(self) -> None:
        before = _weights(self.model)
        self._guarded(self.optimizer.step)
        if not self.is_random:
            self._step_twin()
            self._compare_weights()
        elif self.case.sigma == 0 and self.case.optimizer == "sgd":
            self._check_length(before)
        self.num_steps += 1

    def _step_twin(self) -> None:
        in_groups = {id(p) for g in self.twin_optimizer.param_groups for p in g["params"]}
        for name, parameter in self.twin.named_parameters():
            parameter.grad = None
            if parameter.requires_grad and id(parameter) in in_groups:
                total = self.sums.get(name, torch.zeros_like(parameter))
                if self.noise is not None:
                    total = total + self.noise.of(name) * self.case.sigma * max(self.bounds)
                parameter.grad = total / self.expected
        self.twin_optimizer.step()
        self.twin_optimizer.zero_grad()
        if self.noise is not None:
            self.noise.advance()

    def _compare_weights(self) -> None:
        ours = dict(self.model.named_parameters())
        for name, wanted in self.twin.named_parameters():
            if not _is_close(ours[name].detach(), wanted.detach(), TOLERANCE):
                off = float((ours[name] - wanted).detach().norm())
                why = " (samples see each other)" if self.saw_none else ""
                raise _Stop(WRONG, f"weights{why}: {name} is off by {off:.2g}")

    def _check_length(self, before: dict[str, Tensor]) -> None:
        """A step moves the weights by at most what its samples may add."""
        squares = [(p.detach() - before[n]).square().sum() for n, p in _named(self.model)]
        moved = float(torch.stack(squares).sum().sqrt()) * self.expected / LEARNING_RATE
        if moved > self.max_norm * self.num_added * (1 + TOLERANCE):
            raise _Stop(WRONG, f"{self.num_added} samples added {moved / self.max_norm:.4f} C")

    # The truth.

    def _reset_truth(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_added = 0

    def _add(self, gradients: dict[str, Tensor], factor: float) -> None:
        self.num_added += 1
        for name, gradient in gradients.items():
            # A sample without a finite loss or gradient adds nothing.
            if factor > 0:
                self.sums[name] = self.sums.get(name, 0) + factor * gradient

    def _truth(self, data: _Data) -> _Truth:
        """Each sample alone, and whether that is what the batch says too."""
        truth = _Truth()
        if self.is_random:
            self.num_added += len(data)
            return truth
        state = {n: t.detach().clone() for n, t in _state(self.twin)}
        try:
            for i in range(len(data)):
                self._add_truth(truth, data[i : i + 1])
        except (RuntimeError, ValueError) as error:
            if self.case.contracts() <= {LEGAL, EITHER}:
                raise _Stop(VOID, str(error)) from error
            truth.exists = truth.can_be_isolated = False
        if self._has_changed(state):
            truth.exists = truth.can_be_isolated = False
        if truth.exists and len(data):
            try:
                truth.exists = self._are_samples_apart(truth, data)
            except (RuntimeError, ValueError, IndexError) as error:
                # The model takes single samples only, or a loss that is no list of samples.
                if self.case.contracts() <= {LEGAL}:
                    raise _Stop(VOID, str(error)) from error
                truth.exists = False
            if self._has_changed(state):
                truth.exists = truth.can_be_isolated = False
        for name, value in _state(self.twin):
            value.detach().copy_(state[name])
        if max(filter(math.isfinite, truth.norms), default=0.0) > LARGEST_NORM:
            raise _Stop(VOID, "diverged: rounding decides what is computed")
        if not truth.exists and NONE not in self.case.contracts():
            if self._is_finite(truth):
                raise _Stop(WRONG, "of the fuzz itself: autograd finds no truth for legal parts")
            truth.exists = True
        return truth

    @staticmethod
    def _is_finite(truth: _Truth) -> bool:
        return all(map(math.isfinite, truth.norms))

    def _add_truth(self, truth: _Truth, sample: _Data) -> None:
        loss = self.loss(sample.output(self.twin, self.case.inputs), sample.targets).sum()
        gradients = _gradients(loss, self.twin)
        squares = [g.square().sum() for g in gradients.values()]
        truth.losses.append(loss.item())
        truth.norms.append(float(torch.stack(squares).sum().sqrt()) if squares else 0.0)
        truth.gradients.append(gradients)

    def _are_samples_apart(self, truth: _Truth, data: _Data) -> bool:
        losses = self.loss(data.output(self.twin, self.case.inputs), data.targets)
        if losses.dim() == 0 and len(data) == 1:
            losses = losses[None]
        if losses.dim() == 0 or len(losses) != len(data):
            return False
        for i, loss in enumerate(losses.flatten(1).sum(1) if losses.dim() > 1 else losses):
            if not _is_close(
                loss.detach(), torch.tensor(truth.losses[i], dtype=torch.float64), TOLERANCE
            ):
                return False
            gradients = _gradients(loss, self.twin)
            if not all(
                _is_close(g, truth.gradients[i][n], TOLERANCE) for n, g in gradients.items()
            ):
                return False
        return True

    def _has_changed(self, state: dict[str, Tensor]) -> bool:
        return any(
            not torch.equal(value.detach(), state[name]) for name, value in _state(self.twin)
        )

    def _chosen_bound(self, number: int) -> float:
        self._reset_truth()
        sizes = self.case.steps[number].sizes
        norms: list[float] = []
        for k in range(len(sizes)):
            norms += self._truth(self._data(number, k)).norms
        norms = sorted(n for n in norms if math.isfinite(n) and n > 1e-6) or [1.0]
        middle = norms[len(norms) // 2]
        # Noise goes with the bound: a larger one would throw the weights far off.
        return {"none": 10 * norms[-1], "some": 0.999 * middle, "all": 0.1 * norms[0]}[
            self.case.bound
        ]

    # What happens beside the steps.

    def _on_zero_grad_before(self, batches: list[_Data]) -> None:
        self._guarded(self.optimizer.zero_grad)

    def _on_eval(self, batches: list[_Data]) -> None:
        self.model.eval()
        self.twin.eval()

    def _on_train(self, batches: list[_Data]) -> None:
        self.model.train()
        self.twin.train()

    def _on_freeze(self, batches: list[_Data]) -> None:
        for model in (self.model, self.twin):
            model.head.requires_grad_(False)

    def _on_unfreeze(self, batches: list[_Data]) -> None:
        for model in (self.model, self.twin):
            if (piece := self._piece_of(model)) is not None:
                piece.requires_grad_(True)

    def _on_add_group(self, batches: list[_Data]) -> None:
        self._on_unfreeze(batches)
        for model, optimizer in self._sides():
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if new := [p for p in model.parameters() if id(p) not in known]:
                self._guarded(lambda o=optimizer, n=new: o.add_param_group({"params": n}))
        self.regrouped = True

    def _on_replace_layer(self, batches: list[_Data]) -> None:
        case = replace(self.case, seed=self.case.seed + 1)
        for (model, optimizer), other in zip(
            self._sides(), (case.build(), case.build()), strict=True
        ):
            model.head = other.head
            if new := list(model.head.parameters()):
                known = {id(p) for group in optimizer.param_groups for p in group["params"]}
                new = [p for p in new if id(p) not in known]
                self._guarded(lambda o=optimizer, n=new: o.add_param_group({"params": n}))
        self.regrouped = True

    def _on_plain_backward_cleared(self, batches: list[_Data]) -> None:
        self._plain_backward(batches[0])
        self._guarded(self.optimizer.zero_grad)

    def _plain_backward(self, data: _Data) -> None:
        if not len(data) or self.is_random or not self._truth(data).exists:
            return
        y = self._guarded(lambda: data.output(self.private.model, self.case.inputs))
        loss = self.loss(y, data.targets).sum()
        if loss.requires_grad:
            self._guarded(loss.backward)

    def _on_evaluate(self, batches: list[_Data]) -> None:
        with torch.no_grad():
            self._same_outputs(self.private.model, self.twin, batches[0], "an evaluation")

    def _on_saliency(self, batches: list[_Data]) -> None:
        """Gradients beside training, which are no update's."""
        data = batches[0]
        if not len(data) or self.is_random or not self._truth(data).exists:
            return
        found = []
        for model in (self.private.model, self.twin):
            y = self._guarded(lambda m=model: data.output(m, self.case.inputs))
            found.append(_gradients(y.square().sum(), model))
        for name, wanted in found[1].items():
            if not _is_close(found[0][name], wanted, TOLERANCE):
                raise _Stop(WRONG, f"a gradient beside training is wrong: {name}")

    def _on_copy(self, batches: list[_Data]) -> None:
        try:
            theirs = copy.deepcopy(self.twin)
        except RuntimeError:
            return  # not even plain torch can copy it
        ours = self._guarded(lambda: copy.deepcopy(self.model))
        self._same_outputs(ours, theirs, batches[0], "a copy")
        self.copies.append((ours, theirs))

    def _on_resume(self, batches: list[_Data]) -> None:
        """Leave everything, and go on from what was stored."""
        if self.regrouped:
            return
        stored = self.model.state_dict(), self.optimizer.state_dict(), self.private.state_dict()
        stored = copy.deepcopy(stored)
        trainable = {n: p.requires_grad for n, p in _named(self.model)}
        was_training = self.model.training
        self.model = self.case.build()
        self.model.train(was_training)
        for name, parameter in _named(self.model):
            parameter.requires_grad_(trainable[name])
        self.model.load_state_dict(stored[0])
        self.optimizer = self._optimizer(self.model)
        self._guarded(self._make_private)
        self.optimizer.load_state_dict(stored[1])
        self.private.load_state_dict(stored[2])

    def _on_not_finite(self, batches: list[_Data]) -> None:
        """One sample whose loss is no number."""
        for data in batches:
            if len(data):
                data.targets[-1] = math.nan if self.case.seed % 2 else math.inf
                break

    def _on_other_weights(self, batches: list[_Data]) -> None:
        """The weights are changed by hand, as averaging and clipping of weights do."""
        with torch.no_grad():
            for model in (self.model, self.twin):
                for parameter in model.parameters():
                    parameter.mul_(0.9)

    def _fail_and_retry(self, data: _Data, number: int) -> None:
        """The backward fails on the way, and the samples are given again in halves."""
        failing = next(m for m in self.model.modules() if isinstance(m, Failing))
        failing.countdown = 1 + (self.case.seed + number) % 2
        truth = self._truth(data)
        try:
            self._guarded(
                lambda: self.private.backward(data.inputs(self.case.inputs), data.targets)
            )
        except torch.OutOfMemoryError:
            half = (len(data) + 1) // 2
            for part in (data[:half], data[half:]):
                self._backward(part)
            return
        finally:
            failing.countdown = 0
        # No backward came by.
        self.bounds.append(self.max_norm)
        self.saw_none |= not truth.exists
        for loss, norm, gradients in zip(truth.losses, truth.norms, truth.gradients, strict=True):
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            factor = min(1.0, self.max_norm / norm) if norm else 1.0
            self._add(gradients, factor if is_finite else 0.0)

    def _fail_in_step(self) -> None:
        """Something else stops the step, after the engine was asked."""

        def stop(*args: Any) -> None:
            raise InterruptedError("injected")

        handle = self.optimizer.register_step_pre_hook(stop)
        try:
            self._guarded(self.optimizer.step)
        except InterruptedError:
            pass
        finally:
            handle.remove()

    # Both sides.

    def _sides(self) -> Iterator[tuple[Model, torch.optim.Optimizer]]:
        yield self.model, self.optimizer
        yield self.twin, self.twin_optimizer

    def _piece_of(self, model: Model) -> nn.Module | None:
        """The piece that is frozen at first."""
        if self.case.frozen is None or not len(model.pieces):
            return None
        return model.pieces[self.case.frozen % len(model.pieces)]

    def _optimizer(self, model: Model) -> torch.optim.Optimizer:
        is_added = any(step.event == "add-group" for step in self.case.steps)
        parameters = [p for p in model.parameters() if p.requires_grad or not is_added]
        match self.case.optimizer:
            case "adam":
                return torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=1e-3)
            case "momentum":
                return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=0.1)
        return torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def _data(self, step: int, part: int) -> _Data:
        num_samples, num_positions = self.case.steps[step].sizes[part]
        generator = torch.Generator().manual_seed(1000 * self.case.seed + 10 * step + part)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        if self.case.source.startswith("tokens"):
            x = torch.randint(0, V, (num_samples, num_positions), generator=generator)
        else:
            x = normal(num_samples, num_positions, self.case.num_features)
        return _Data(x, 1 + 0.3 * normal(num_samples), 1 + 0.5 * normal(num_samples))

    def _same_outputs(self, ours: nn.Module, theirs: nn.Module, data: _Data, what: str) -> None:
        if self.is_random or not len(data) or not self._truth(data).exists:
            return
        found = self._guarded(lambda: data.output(ours, self.case.inputs)).detach()
        wanted = data.output(theirs, self.case.inputs).detach()
        if not _is_close(found, wanted, TOLERANCE):
            raise _Stop(WRONG, f"{what} gives {_short(found)} right {_short(wanted)}")

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Call the engine; what it raises ends the case, unless it was injected."""
        before = _weights(self.model)
        try:
            return call()
        except (torch.OutOfMemoryError, InterruptedError):
            raise
        except Exception as error:
            if not self._is_refusal(error):
                raise _Stop(CRASH, _where(error)) from error
            if not all(torch.equal(p.detach(), before[n]) for n, p in _named(self.model)):
                raise _Stop(WRONG, f"refused, yet weights have moved: {error}") from error
            raise _Stop(REFUSED, str(error)) from error

    def _is_refusal(self, error: Exception) -> bool:
        if not isinstance(error, ValueError | RuntimeError):
            return False
        *_, last = traceback.extract_tb(error.__traceback__)
        is_ours = Path(dpsgd_track.__file__).parent in Path(last.filename).parents
        message = str(error)
        names = [n for n, _ in self.model.named_modules() if n]
        names += [n for n, _ in self.model.named_parameters()]
        is_named = any(n in message for n in names) or bool(_SETTING.search(message))
        return is_ours and is_named and len(message.split()) > 4


_SETTING = re.compile(
    r"\b(model|loss|losses|inputs|targets|optimizer|mode|noise_multiplier|max_grad_norm|sample_rate|"
    r"expected_batch_size|step\(|backward\(|zero_grad\()"
)


class _Noise:
    """The engine's noise for a model's parameters, taken from steps of `reference` on no samples.

    That mode then runs no model: weights that stand at 0 become minus the noise.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        self.holder = nn.Module()
        for name, parameter in model.named_parameters():
            *path, last = name.split(".")
            owner = self.holder
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(last, nn.Parameter(torch.zeros_like(parameter)))
        self.optimizer = torch.optim.SGD(self.holder.parameters(), lr=1.0)
        self.private = dpsgd_track.make_private(
            self.holder,
            self.optimizer,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=1,
            mode="reference",
            seed=int(key),
        )
        self.advance()

    def advance(self) -> None:
        """Draw the next step's."""
        with torch.no_grad():
            for parameter in self.holder.parameters():
                parameter.zero_()
        self.private.backward(torch.zeros(0, 1), torch.zeros(0))
        self.optimizer.step()

    def of(self, name: str) -> Tensor:
        """Standard normal, in the parameter's shape."""
        return -self.holder.get_parameter(name).detach()


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in _named(model)}


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradient of a loss by every trainable parameter; the graph is kept."""
    trained = {n: p for n, p in _named(model) if p.requires_grad}
    if not loss.requires_grad:
        return {n: torch.zeros_like(p) for n, p in trained.items()}
    found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(trained.items(), found, strict=True)
    }


def has_truth(case: Case) -> bool:
    """Whether a case's first micro-batch has a truth, which no engine is asked about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = _Loop(case)
        loop._reset_truth()
        return loop._truth(loop._data(0, 0)).exists


def _is_close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Within `tolerance` of the largest element, or of 1."""
    if found.shape != wanted.shape:
        return False
    if not found.numel():
        return True
    scale = 1 + float(wanted.abs().max())
    return bool(((found - wanted).abs() <= tolerance * scale).all())


def _short(values: Tensor) -> list[float]:
    return [round(v, 5) for v in values.flatten()[:6].tolist()]


def _where(error: Exception) -> str:
    """What was raised, and the last line of the package on the way there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "dpsgd_track" in f.filename and "tests" not in f.filename]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
    return f"{type(error).__name__}{place}: {str(error).splitlines()[0] if str(error) else ''}"


# Cases at random.


Choose = Callable[[Sequence[Any]], Any]
"""Takes one of several."""

_TABLES: dict[str, dict[str, str]] = {
    "source": {name: part.contract for name, part in SOURCES.items()},
    "piece": {name: part.contract for name, part in PIECES.items()},
    "head": {name: part.contract for name, part in HEADS.items()},
    "loss": {name: contract for name, (_, contract) in LOSSES.items()},
    "event": EVENTS,
}
"""Contract of every ingredient, by kind and name."""


def case_of(choose: Choose, *, mode: str | None = None) -> Case:
    """A case; half have nothing that could be refused, and sizes are often all the same."""
    common = choose(range(1, 6))

    def size(least: int = 1) -> int:
        return max(least, common) if choose(range(10)) < 6 else choose(range(least, 6))

    def pick(kind: str, *, odd: bool) -> Any:
        return choose([name for name, its in _TABLES[kind].items() if (its != LEGAL) == odd])

    odd = [
        choose(("piece",) * 6 + ("event",) * 3 + ("loss", "head", "source"))
        for _ in range(choose((0, 0, 0, 0, 0, 1, 1, 1, 1, 2)))
    ]
    pieces = [pick("piece", odd=False) for _ in range(choose((0, 1, 1, 2, 3)))]
    for _ in range(odd.count("piece")):
        pieces.insert(choose(range(len(pieces) + 1)), pick("piece", odd=True))
    steps = []
    for _ in range(choose((1, 2, 3, 4))):
        sizes = tuple((size(0), size()) for _ in range(choose((1, 1, 2))))
        steps.append(Step(sizes, choose(("none", pick("event", odd=False)))))
    if "event" in odd:
        event = pick("event", odd=True)
        # Plain gradients in .grad end a loop, so that they are the last step's.
        place = len(steps) - 1 if event == "plain-backward" else choose(range(len(steps)))
        steps[place] = Step(steps[place].sizes, event)
    thaws = any(step.event in ("unfreeze", "add-group") for step in steps)
    return Case(
        mode=mode or choose(MODES),
        source=pick("source", odd="source" in odd),
        pieces=tuple(pieces),
        head=pick("head", odd="head" in odd),
        loss=pick("loss", odd="loss" in odd),
        steps=tuple(steps),
        num_features=size(),
        num_classes=size(),
        bound=choose(("some", "some", "all", "none")),
        optimizer=choose(("sgd", "sgd", "momentum", "adam")),
        inputs=choose(("one", "one", "pair", "keywords")),
        sigma=choose((0.0, 0.0, 0.0, 0.1)),
        frozen=choose(range(4)) if thaws or choose(range(5)) == 0 else None,
        seed=choose(range(1000)),
    )


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    """`case_of`, drawn by hypothesis."""
    return case_of(lambda options: draw(st.sampled_from(options)))


def run_many(num_cases: int, seed: int, *, mode: str | None = None) -> list[tuple[Case, Outcome]]:
    """Cases that have nothing to do with each other.

    Hypothesis draws many that are alike: of 121 pieces its first 150 cases hold 19, these 93.
    """
    choose = random.Random(f"{seed}/{mode}").choice
    drawn = [case_of(choose, mode=mode) for _ in range(num_cases)]
    return [(case, run(case)) for case in drawn]


# What came of them.


def shares(found: Iterable[tuple[Case, Outcome]]) -> dict[str, float]:
    """Share of each outcome among the legal cases, void ones aside."""
    kinds = Counter(o.kind for _, o in found if o.is_legal and o.kind != VOID)
    return {kind: kinds[kind] / max(1, kinds.total()) for kind in OUTCOMES[:-1]}


def summary(found: list[tuple[Case, Outcome]]) -> str:
    """Outcomes in all, of the legal cases, and by ingredient."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for case, outcome in found:
        heads = [("", "all")]
        heads.append(("", "legal" if outcome.is_legal else "not legal"))
        if outcome.saw_none:
            heads.append(("", "without a truth"))
        for key in (*heads, *case.ingredients()):
            rows.setdefault(key, Counter())[outcome.kind] += 1
    lines = [f"{'':38}" + "".join(f"{kind:>9}" for kind in OUTCOMES)]
    order = ["", "mode", "source", "piece", "head", "loss", "event"]
    rank = {kind: place for place, kind in enumerate(order)}
    for key in sorted(rows, key=lambda k: (rank.get(k[0], 99), k)):
        name = " ".join(filter(None, key))
        lines.append(f"{name:38}" + "".join(f"{rows[key][kind] or '.':>9}" for kind in OUTCOMES))
    return "\n".join(lines)


def kind_of(case: Case, outcome: Outcome) -> str:
    """Cases of one kind are taken to have one cause."""
    detail = re.sub(r"\[.*|-?\d[\d.e+-]*", "", outcome.detail)
    odd = [name for _, name in case.ingredients() if name in _TELLING]
    return f"{outcome.kind} | {' + '.join(odd)} | {detail[:60]}"


_TELLING = {
    name
    for table in _TABLES.values()
    for name in table
    if name not in ("floats", "linear", "pooled", "weighted", "none")
}


def smallest(case: Case, outcome: Outcome) -> tuple[Case, Outcome]:
    """A simpler case that ends in the same way: parts are left out while it still does."""
    is_shrinking = True
    while is_shrinking:
        is_shrinking = False
        for simpler in _simpler(case):
            found = run(simpler)
            if found.is_legal == outcome.is_legal and _cause(found) == _cause(outcome):
                case, outcome, is_shrinking = simpler, found, True
                break
    return case, outcome


def _cause(outcome: Outcome) -> tuple[str, str]:
    """The outcome, and where it crashed."""
    return outcome.kind, outcome.detail.partition(": ")[0] if outcome.kind == CRASH else ""


def _simpler(case: Case) -> Iterator[Case]:
    steps, pieces = case.steps, case.pieces
    for k in range(len(steps) if len(steps) > 1 else 0):
        yield replace(case, steps=steps[:k] + steps[k + 1 :])
    for k in range(len(pieces)):
        yield replace(case, pieces=pieces[:k] + pieces[k + 1 :])
    for f in fields(Case):
        is_plain = f.name in ("steps", "pieces", "num_features", "num_classes", "seed")
        if not is_plain and getattr(case, f.name) != f.default:
            yield replace(case, **{f.name: f.default})
    for k, step in enumerate(steps):
        others = [Step(step.sizes)] if step.event != "none" else []
        if len(step.sizes) > 1:
            parts = range(len(step.sizes))
            others += [Step(step.sizes[:j] + step.sizes[j + 1 :], step.event) for j in parts]
        for other in others:
            yield replace(case, steps=(*steps[:k], other, *steps[k + 1 :]))
    for k, piece in enumerate(pieces):
        if piece != "linear":
            yield replace(case, pieces=(*pieces[:k], "linear", *pieces[k + 1 :]))


def reproduction(case: Case) -> str:
    """A command line that runs the case alone."""
    return f"PYTHONPATH=. python -c 'from tests.support.engine_fuzz import *; print(run({case}))'"


def kinds(found: Iterable[tuple[Case, Outcome]], most: int) -> str:
    """The smallest case of each kind of failure and of needless refusal, the commonest first.

    Args:
        most: cases that are made smaller, which takes seconds each.
    """
    telling = [
        (case, outcome)
        for case, outcome in found
        if outcome.kind in (CRASH, WRONG) or (outcome.kind == REFUSED and outcome.is_legal)
    ]
    by_kind: dict[str, list[tuple[Case, Outcome]]] = {}
    for pair in telling[:most]:
        small = smallest(*pair)
        by_kind.setdefault(kind_of(*small), []).append(small)
    lines = [f"{len(telling)} cases that should not be, {len(telling[:most])} of them made small"]
    for kind, pairs in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        case, outcome = min(pairs, key=lambda pair: len(repr(pair[0])))
        lines.append(f"{len(pairs):4}  {kind}\n      {outcome.detail}\n      {reproduction(case)}")
    return "\n".join(lines)


def main() -> int:
    """Run many cases, and print the summary and the smallest case of each kind of failure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file that the summary is written to as well")
    parser.add_argument("--small", type=int, default=100, help="cases to make small")
    options = parser.parse_args()
    logging.getLogger("dpsgd_track").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    found = run_many(options.cases, options.seed)
    speed = len(found) / (time.perf_counter() - begin)
    text = f"{len(found)} cases, {speed:.1f} a second\n{summary(found)}\n{shares(found)}"
    print(text, flush=True)
    text += "\n" + (small := kinds(found, options.small))
    print(small)
    if options.output is not None:
        options.output.write_text(text + "\n")
    return 1 if any(outcome.kind in (CRASH, WRONG) for _, outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
