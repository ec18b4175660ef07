"""A micro-batch whose forward and losses are the user's own code.

The engine captures the model as that code calls it. The code runs once in each step; so that the
engine can be compared with plain autograd, the functions it calls are recorded (`privacy.tape`).

A rank without samples calls its model on a stand-in, and the code sees no rows of what it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from dpsgd_track.privacy.batch import (
    RepeatableBatch,
    Rows,
    blank_sample,
    cast,
    map_tensors,
    tensors_in,
)
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine
from dpsgd_track.privacy.loss import PerSampleLoss, refuse_unless_one_a_sample
from dpsgd_track.privacy.random_state import RandomState
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.tape import Recording, Tape
from dpsgd_track.privacy.uncompiled import prepare, uncompiled


@dataclass(frozen=True)
class Arguments(Rows):
    """Arguments of a call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_samples: int

    def __len__(self) -> int:
        return self.num_samples

    def tensors(self) -> Iterator[Tensor]:
        """All tensors with a row for each sample."""
        yield from (x for x in tensors_in((self.args, self.kwargs)) if x.dim() > 0)

    def rows(self, indices: Tensor) -> Arguments:
        """The samples with these indices."""
        return self._mapped(lambda name, x: x[indices.to(x.device)], len(indices))

    def stand_in(self) -> Arguments:
        """One sample of zeros in the same shapes, with masks of ones."""
        return self._mapped(blank_sample, 1)

    def run(self, model: Any) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    def cast(self, dtype: torch.dtype | None) -> Arguments:
        """The same with floating tensors in `dtype`."""
        if dtype is None:
            return self
        return self._mapped(lambda name, x: cast(x, dtype), self.num_samples)

    def refuse_others(self) -> None:
        """
        Raises:
            ValueError: a tensor has no row for each sample.
        """
        for path, x in pytree.tree_leaves_with_path((self.args, self.kwargs)):
            is_tensor = isinstance(x, Tensor) and x.dim() > 0
            if is_tensor and x.shape[:1] != (self.num_samples,):
                raise ValueError(
                    f"inputs{pytree.keystr(path[1:])}={tuple(x.shape)}: expected a tensor with "
                    f"the {self.num_samples} samples of the batch in dimension 0. Give the model "
                    "other arguments in a wrapper module of its own, and batch() the number of "
                    "samples."
                )

    def _mapped(self, function: Any, num_samples: int) -> Arguments:
        def mapped(path: Any, x: Any) -> Any:
            is_batched = isinstance(x, Tensor) and x.dim() > 0
            return function(pytree.keystr(path).strip("[]'"), x) if is_batched else x

        args, kwargs = pytree.tree_map_with_path(mapped, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, num_samples=num_samples)


class OpenBatch:
    """Context in which the user's code runs the model and forms the losses of one micro-batch."""

    def __init__(
        self, engine: Engine, num_samples: int, *, records: bool, shared: WeakTensorKeyDictionary
    ) -> None:
        """
        Args:
            engine: takes the losses.
            num_samples: samples of the micro-batch on this rank; may be 0.
            records: record the code, to be repeated in a spot check.
            shared: tensors that belong to no sample, as far as earlier batches have told.
        """
        self.engine, self.num_samples = engine, num_samples
        self.is_done = False
        device_type = next(engine.model.parameters()).device.type
        self._random_state = RandomState(device_type)
        self._tape = Tape(num_samples, device_type, shared)
        self._recording = Recording(self._tape) if records else None
        self._forward = _LateForward(engine.model)
        self._inputs: list[Arguments] = []
        self._is_removed = False
        """True while the recording is suspended, rather than told to record nothing."""
        self._depth = 0
        """Calls of the model that have begun and not ended."""
        self._hooks = ExitStack()
        """Removes what observes the model."""
        self._stack = ExitStack()

    def __enter__(self) -> OpenBatch:
        if isinstance(_get_current_function_mode(), Recording):
            raise ValueError("batch: expected one at a time, got one inside of another model's.")
        self._added = self._stack.enter_context(self.engine.adding(self.num_samples))
        if self.engine.knows_sample_dims:
            self._capture()
        else:
            self._forward.open()
            self._hooks.callback(self._forward.close)
        # Outside of all other hooks, such as those of FSDP2, which gather the root's parameters.
        model = self.engine.model
        prepare()
        before = model.register_forward_pre_hook(self._before_call, with_kwargs=True, prepend=True)
        after = model.register_forward_hook(self._after_call, with_kwargs=True, always_call=True)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        if self._recording is not None:
            self._recording.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_forward()
        if self.is_done:
            return
        if error is None:
            error = self._plain_backward() or RuntimeError(
                "batch(): expected backward(losses) to be called inside of it. Nothing was added."
            )
        self._stack.__exit__(type(error), error, traceback)
        if kind is None:
            raise error

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenBatch:
        """Refuse a copy of the model, whose hooks hold this.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "batch(): expected no copy of the model inside of it, whose layers are captured. Copy "
            "it before or after the batch."
        )

    def finish(self, loss_B: Tensor) -> SampleRecord:
        """Add the clipped sum of the samples with these losses, [B]."""
        self._end_forward()
        with self._stack.pop_all():
            if (error := self._plain_backward()) is not None:
                raise error
            if not self._inputs:
                raise RuntimeError("batch(): expected a call of the model inside of it, got none.")
            refuse_unless_one_a_sample("loss", loss_B, self.num_samples)
            self._tape.end(loss_B)
            loss_B = loss_B if self.num_samples else loss_B.sum().reshape(1)
            self._added.record = self.engine.strategy(self.engine, loss_B)
        self.is_done = True
        return self._added.record

    def _end_forward(self) -> None:
        """Observe the model no more, and record nothing."""
        self._hooks.close()
        if self._recording is not None:
            self._recording.is_paused = True
            # Otherwise a context inside of the batch is still open, and this is called again.
            if _get_current_function_mode() is self._recording:
                self._recording.__exit__(None, None, None)
                self._recording = None

    @property
    def is_scaled_by_size(self) -> bool:
        """True if the recorded code has multiplied or divided by the number of samples."""
        return self._tape.is_scaled_by_size

    def recorded(self) -> RecordedBatch:
        """The micro-batch, to be repeated."""
        return RecordedBatch(self._tape, tuple(self._inputs), self._random_state)

    @uncompiled
    def _before_call(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Arguments of the model in place of what it is called with."""
        self._depth += 1
        if self._depth > 1:
            return args, kwargs
        arguments = Arguments(args, kwargs, self.num_samples)
        self._inputs.append(arguments)
        arguments.refuse_others()
        self._pause()
        fitted = self._fitted(arguments)
        if not self.engine.knows_sample_dims:
            self._forward.close()
            self.engine.find_sample_dims(partial(rows_of_output, model), fitted)
            self._capture()
        return fitted.args, fitted.kwargs

    @uncompiled
    def _after_call(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The model's output, as the code sees it."""
        self._depth -= 1
        if self._depth:
            return output
        output = self._own_rows(output)
        self._resume()
        called = self._inputs[-1]
        if output is None:
            # It has failed, and the code may catch the error.
            self._inputs.pop()
        elif self._recording is not None:
            self._tape.record(self._run_again, called.args, called.kwargs, output, is_of_model=True)
        return output

    def _run_again(self, *args: Any, **kwargs: Any) -> Any:
        fitted = self._fitted(Arguments(args, kwargs, self.num_samples))
        return self._own_rows(fitted.run(self.engine.model))

    def _fitted(self, arguments: Arguments) -> Arguments:
        """Arguments that the model is run on: without samples, those of a stand-in."""
        if self.num_samples == 0:
            arguments = arguments.stand_in()
        return arguments.cast(self.engine.rounded_dtype)

    def _own_rows(self, output: Any) -> Any:
        """The model's output; without samples, no rows of the stand-in's."""
        if self.num_samples:
            return output
        return map_tensors(lambda x: x[:0] if x.shape[:1] == (1,) else x, output)

    def _pause(self) -> None:
        """Record nothing until `_resume`, at no cost if no other mode is active."""
        if self._recording is not None:
            self._recording.is_paused = True
            self._is_removed = _get_current_function_mode() is self._recording
            if self._is_removed:
                self._recording.__exit__(None, None, None)

    def _resume(self) -> None:
        if self._recording is not None:
            if self._is_removed:
                self._recording.__enter__()
            self._is_removed = self._recording.is_paused = False

    def _capture(self) -> None:
        self._stack.enter_context(self.engine.capturing(max(self.num_samples, 1)))

    def _plain_backward(self) -> RuntimeError | None:
        """Error if the code has called a backward of its own, whose gradients are dropped."""
        if self.engine.capture is None or not self.engine.capture.take_plain_gradients():
            return None
        return RuntimeError(
            "batch(): expected backward(losses) of what make_private returned, got a backward "
            "beside it, whose gradients are not clipped. Nothing was added."
        )


def rows_of_output(model: nn.Module, arguments: Arguments) -> Tensor:
    """All outputs with a row for each sample, side by side, [B, elements].

    Raises:
        ValueError: no output has such rows.
    """
    tensors, num_samples = tensors_in(arguments.run(model)), len(arguments)
    rows = [x.reshape(num_samples, -1) for x in tensors if x.shape[:1] == (num_samples,)]
    if not rows:
        raise ValueError(
            f"model: expected an output with a row for each of {num_samples} samples, got "
            f"{[tuple(x.shape) for x in tensors]}. Return what the loss takes."
        )
    return torch.cat(rows, dim=1)


class _LateForward(ReplacedForward):
    """Runs the forward that the model has once the hooks before it have run.

    A module chooses its forward before. In the first batch a hook is what replaces it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._is_open = False

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model."""
        if self._is_open:
            raise RuntimeError(
                "batch(): expected the model to be called, got a call of its forward(). Call the "
                "model itself, as its hooks run then alone."
            )
        return self.module.forward(*args, **kwargs)

    def open(self) -> None:
        """Replace the forward."""
        self.attach()
        self._is_open = True

    def close(self) -> None:
        """Give the model its own forward back."""
        if self._is_open:
            self._is_open = False
            self.detach()


@dataclass(frozen=True)
class RecordedBatch(RepeatableBatch):
    """A micro-batch whose losses are formed by recorded code; as many samples at any time."""

    tape: Tape
    inputs: tuple[Arguments, ...]
    """Arguments of each call of the model."""
    random_state: RandomState
    indices: Tensor | None = None
    """[B] samples in place of the batch's own."""
    is_standing_in: bool = False

    def __len__(self) -> int:
        is_empty = self.indices is not None and len(self.indices) == 0
        return (
            int(self.is_standing_in)
            if is_empty or self.tape.num_samples == 0
            else (self.tape.num_samples)
        )

    def tensors(self) -> Iterator[Tensor]:
        """All tensors with a row for each sample."""
        for arguments in self.inputs:
            yield from arguments.tensors()
        yield from self.tape.given_rows()

    def padded(self, indices: Tensor) -> Tensor:
        """As many indices as the batch has samples, repeated in turn; none if there are none."""
        if len(indices) == 0:
            return indices
        return indices[torch.arange(self.tape.num_samples, device=indices.device) % len(indices)]

    def rows(self, indices: Tensor) -> RecordedBatch:
        """The samples with these indices, as many as before or none."""
        assert len(indices) in (0, self.tape.num_samples)
        own = indices if self.indices is None else self.indices[indices]
        return replace(self, indices=own)

    def stand_in(self) -> RecordedBatch:
        """The batch without samples, or one of the samples' losses times 0."""
        return replace(self, is_standing_in=True)

    def outputs(
        self, model: nn.Module, loss: PerSampleLoss, dtype: torch.dtype | None
    ) -> tuple[None, Tensor]:
        """No logits, and the losses of the recorded code."""
        is_empty = self.indices is not None and len(self.indices) == 0
        loss_B = self.tape.replay(None if is_empty else self.indices)
        return None, loss_B.sum().reshape(1) * 0 if self.is_standing_in else loss_B

    def code(self) -> int:
        """Hash of the functions that the user's code has called, in order."""
        return self.tape.code()

    def outputs_in_halves(
        self, model: nn.Module, dtype: torch.dtype | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each call of the model, its outputs and those of two halves, [B, elements].

        Recorded code runs on whole batches alone; the model may depend on their size.
        """
        for arguments in self.inputs:
            if self.indices is not None:
                arguments = arguments.rows(self.indices)
            whole = (arguments if len(arguments) else arguments.stand_in()).cast(dtype)
            outputs = rows_of_output(model, whole)
            of_halves = torch.empty_like(outputs)
            for first in range(2):
                indices = torch.arange(len(whole))[first::2]
                half = whole.rows(indices) if len(indices) else whole.stand_in()
                of_halves[first::2] = rows_of_output(model, half)[: len(indices)]
            yield outputs, of_halves

    def restore_random_state(self) -> None:
        """Set the generators to what they were when the user's code began."""
        self.random_state.restore()
