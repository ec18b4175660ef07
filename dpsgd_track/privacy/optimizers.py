"""The optimizers of a private training, hooked so that none steps without noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpsgd_track.config import require
from dpsgd_track.distributed.sharding import (
    fsdp_units,
    placed_whole,
    reshard,
    trainable_parameters,
)
from dpsgd_track.privacy.guards import version_of

_OWNER = "_dpsgd_track_private"
"""Attribute of an optimizer that holds the training that uses it."""
_TAKES_SCALER = "_step_supports_amp_scaling"
"""Attribute by which an optimizer asks a GradScaler to call its step whatever the gradients are."""
_SCALING = ("grad_scale", "found_inf")
"""Attributes that such an optimizer is given by a GradScaler for the time of a step."""

_NEEDS_WHOLE_PARAMETERS = ("Adafactor", "Rprop")
"""Classes, torch's and transformers', whose step fails on a DTensor."""


@dataclass(frozen=True, kw_only=True)
class StepCalls:
    """Calls that make one step of the gradients for all optimizers."""

    begin: Callable[[], None]
    """Writes the noisy gradients into every `.grad`; raises where no batch was added."""
    drop: Callable[[], None]
    """Drops the step's batches and gradients."""
    end: Callable[[], None]
    """Prepares the next step, once every optimizer has stepped or skipped."""
    refuse_clearing: Callable[[], None]
    """Raises where the batches cannot be dropped now."""


class Closeable(Protocol):
    """A training that uses an optimizer."""

    def close(self) -> None:
        """Give the optimizer back."""


class Optimizers:
    """Optimizers that together update every trainable parameter of a model, each parameter once."""

    def __init__(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        """
        Args:
            optimizers: one or several, plain or wrapped by Accelerate.

        Raises:
            ValueError: one is of another kind, needs a closure, has stepped without noise, or has
                others than the model's parameters; or a parameter is in none of them, or in two.
        """
        reshard(model)
        given = [*optimizers] if isinstance(optimizers, Sequence) else [optimizers]
        require(bool(given), "optimizer", optimizers, "an optimizer, or several")
        self.each = [_unwrapped(optimizer) for optimizer in given]
        for optimizer in self.each:
            _refuse_unknown_past(optimizer)
        self._model = model
        self._names = self._names_by_group()

    @property
    def kinds(self) -> str:
        """Names of their classes."""
        return " and ".join(type(optimizer).__name__ for optimizer in self.each)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of all of them, in order."""
        groups = chain.from_iterable(optimizer.param_groups for optimizer in self.each)
        return [parameter for group in groups for parameter in group["params"]]

    def rebound(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Give each optimizer the parameters by which a mode has replaced the model's.

        Returns:
            The optimizer; where there are several, an object that stands for them.

        Raises:
            ValueError: the parameters are shards, and one cannot update such.
        """
        named = dict(self._model.named_parameters())
        if any(isinstance(parameter, DTensor) for parameter in named.values()):
            _refuse_unsharded_kinds(self.each)
        groups = [(optimizer, group) for optimizer in self.each for group in optimizer.param_groups]
        for (optimizer, group), names in zip(groups, self._names, strict=True):
            replaced, group["params"] = group["params"], [named[name] for name in names]
            for old, new in zip(replaced, group["params"], strict=True):
                # Some, such as Adagrad, have a state before their first step.
                if old is not new and old in optimizer.state:
                    state = optimizer.state.pop(old)
                    optimizer.state[new] = {k: placed_whole(v, new) for k, v in state.items()}
        return self.each[0] if len(self.each) == 1 else _AllOf(self.each)

    def _names_by_group(self) -> list[list[str]]:
        """Names of the parameters of each group of each optimizer."""
        name_of = {id(parameter): name for name, parameter in self._model.named_parameters()}
        names = [
            [name_of.get(id(parameter), "") for parameter in group["params"]]
            for optimizer in self.each
            for group in optimizer.param_groups
        ]
        updated = [*chain.from_iterable(names)]
        is_sharded = bool(fsdp_units(self._model))
        advice = "Create it before the model's first forward." if is_sharded else ""
        require("" not in updated, "optimizer", self.kinds, "the model's parameters", advice)
        trained, kind = trainable_parameters(self._model), type(self._model).__name__
        require(bool(trained), "model", kind, "a trainable parameter, got all of them frozen")
        missing = trained.keys() - {*updated}
        allowed = f"all trainable parameters; it lacks {', '.join(sorted(missing))}"
        require(not missing, "optimizer", self.kinds, allowed, "Add them, or freeze them.")
        twice = sorted({name for name in updated if updated.count(name) > 1})
        allowed = f"each parameter once; it has {', '.join(twice)} twice"
        require(not twice, "optimizer", self.kinds, allowed)
        return names


class HookedOptimizers:
    """Optimizers whose steps and clearing go by the calls of a training, until `unhook`.

    The first of them to step begins the step for all. The others then step with the gradients that
    they were given, or skip the step by their `zero_grad`.
    """

    def __init__(self, optimizers: Optimizers, calls: StepCalls, owner: Closeable) -> None:
        self._optimizers, self._calls = optimizers, calls
        self._updated = [*map(id, optimizers.parameters)]
        self._left: dict[int, list[_Written]] = {}
        """Gradients of the optimizers that have yet to take the step that another one began."""
        self._is_clearing = False
        self._hooks = [_Hooks(optimizer, self, owner) for optimizer in optimizers.each]

    def unhook(self) -> None:
        """Give the optimizers back as they were, without the gradients of a step that is left."""
        for hooks in self._hooks:
            if id(hooks.optimizer) in self._left:
                hooks.clear()
            hooks.remove()
        self._left = {}

    def refuse_unless_all_stepped(self) -> None:
        """
        Raises:
            RuntimeError: an optimizer has yet to take the step that another one began.
        """
        names = [type(o).__name__ for o in self._optimizers.each if id(o) in self._left]
        if names:
            raise RuntimeError(
                f"step(): expected one of each optimizer, got none of {' and '.join(names)}. Call "
                "its step(), or its zero_grad() to skip the update."
            )

    def before_step(self, optimizer: Optimizer) -> None:
        """Begin the step, unless another optimizer has."""
        if [*map(id, self._optimizers.parameters)] != self._updated:
            raise ValueError(
                "optimizer: expected the parameters that it had when it was made private, got "
                "others. Call make_private again after a change of parameter groups."
            )
        if self._left:
            written = self._left.get(id(optimizer))
            if written is None:
                self.refuse_unless_all_stepped()
            assert written is not None
            for each in written:
                each.refuse_changed()
        else:
            self._calls.begin()
            if len(self._hooks) > 1:
                self._left = {id(o): _written_of(o) for o in self._optimizers.each}
        self._left.pop(id(optimizer), None)

    def after_step(self, hooks: _Hooks) -> None:
        """Clear the optimizer's gradients, and all else once the last one has stepped."""
        hooks.clear()
        self._end_unless_left()

    def zero_grad(self, hooks: _Hooks, set_to_none: bool) -> None:
        """Drop the step's batches; skip the optimizer's update where another's step has begun."""
        if self._is_clearing:
            hooks.clear(set_to_none)
            return
        self._calls.refuse_clearing()
        hooks.clear(set_to_none)
        if not self._left:
            self._drop()
        elif self._left.pop(id(hooks.optimizer), None) is not None:
            self._end_unless_left()

    def _end_unless_left(self) -> None:
        if not self._left:
            self._drop()
            self._calls.end()

    def _drop(self) -> None:
        """Drop the step, which clears the optimizers' gradients in turn."""
        self._is_clearing = True
        try:
            self._calls.drop()
        finally:
            self._is_clearing = False


class _Hooks:
    """Hooks on one optimizer."""

    def __init__(self, optimizer: Optimizer, group: HookedOptimizers, owner: Closeable) -> None:
        self.optimizer, self._group = optimizer, group
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.clear = optimizer.zero_grad
        """Clears the optimizer's gradients and nothing else."""
        own = vars(optimizer)
        self._replaced = {name: own[name] for name in ("zero_grad", _TAKES_SCALER) if name in own}
        own.update({"zero_grad": self._zero_grad, _OWNER: owner, _TAKES_SCALER: True})

    def remove(self) -> None:
        """Give the optimizer back as it was."""
        for handle in self._handles:
            handle.remove()
        own = vars(self.optimizer)
        for name in ("zero_grad", _OWNER, _TAKES_SCALER):
            own.pop(name, None)
        own.update(self._replaced)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _refuse_scaler(optimizer, kwargs)
        if any(given is not None for given in (*args[1:], kwargs.get("closure"))):
            raise ValueError("closure: expected none. It would compute gradients after the noise.")
        self._group.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._group.after_step(self)

    def _zero_grad(self, set_to_none: bool = True) -> None:
        self._group.zero_grad(self, set_to_none)


class _Written:
    """A gradient as it was when the step began."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._gradient = parameter, parameter.grad
        self._version = version_of(parameter.grad)

    def refuse_changed(self) -> None:
        """
        Raises:
            RuntimeError: other code has changed the gradient since.
        """
        now = self._parameter.grad
        if now is not self._gradient or version_of(now) != self._version:
            raise RuntimeError(
                ".grad: expected the noisy gradient that the step of another optimizer has made, "
                "got another. Step all optimizers one after the other."
            )


class _AllOf(Optimizer):
    """Stands for several optimizers where a mode holds one."""

    def __init__(self, each: Sequence[Optimizer]) -> None:
        # Without the base class's own set-up: parameters and states stay where they are.
        self._each = each

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update by each of them."""
        for optimizer in self._each:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of each of them."""
        for optimizer in self._each:
            optimizer.zero_grad(set_to_none)


def close_earlier(optimizers: Optimizers) -> None:
    """Close the trainings that have used the optimizers before."""
    for optimizer in optimizers.each:
        earlier: Closeable | None = getattr(optimizer, _OWNER, None)
        if earlier is not None:
            earlier.close()


def _written_of(optimizer: Optimizer) -> list[_Written]:
    return [_Written(p) for group in optimizer.param_groups for p in group["params"]]


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of Accelerate's wrapper, which calls its `step` and nothing else."""
    is_accelerated = type(optimizer).__module__ == "accelerate.optimizer"
    return optimizer.optimizer if is_accelerated else optimizer  # type: ignore[attr-defined]


def _refuse_unknown_past(optimizer: Optimizer) -> None:
    """Refuse an optimizer of another kind, or one whose past steps are not known."""
    name = type(optimizer).__name__
    is_own = isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")
    advice = "Make it private before another library wraps it."
    require(is_own, "optimizer", name, "an optimizer of torch's own kind", advice)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    is_needed = closure is not None and closure.default is inspect.Parameter.empty
    advice = "It computes gradients, which get no noise."
    require(not is_needed, "optimizer", name, "one that steps without a closure", advice)
    if hasattr(optimizer, _OWNER):
        return
    has_stepped = any(int(state.get("step", 1)) != 0 for state in optimizer.state.values())
    require(not has_stepped, "optimizer", name, "one without a past step")


def _refuse_unsharded_kinds(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that fail in a step over sharded parameters, after the noise was drawn."""
    for optimizer in optimizers:
        name, advice = type(optimizer).__name__, "Take AdamW or SGD, or train on one rank."
        allowed = "one that updates sharded parameters"
        require(name not in _NEEDS_WHOLE_PARAMETERS, "optimizer", name, allowed, advice)


def _refuse_scaler(optimizer: Optimizer, kwargs: Any) -> None:
    """Refuse a GradScaler, whose scale follows the samples' gradients without noise."""
    own = vars(optimizer)
    if "grad_scaler" not in kwargs and not any(name in own for name in _SCALING):
        return
    for name in _SCALING:
        # The scaler would remove them after the step.
        own.pop(name, None)
    raise ValueError(
        "GradScaler: expected none, or GradScaler(enabled=False). Its scale follows whether a "
        "sample's gradient overflows, which no noise protects. The losses are summed rather than "
        "averaged, so gradients are as many times larger as a batch has samples; a sample whose "
        "gradient overflows is left out and counted in num_left_out. Use bfloat16 if many do."
    )
