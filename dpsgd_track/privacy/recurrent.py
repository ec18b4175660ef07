"""Recurrent layers, with all samples in one run.

torch's own kernels return no gradients of the gates, which per-sample gradients are formed from. So
the recurrence runs by the formulas of `torch.nn.LSTM`, `GRU` and `RNN`. Each bias is expanded to
all samples and steps; the gradient that autograd forms of the view is that of the product beside
it. With what the weight has read, that is the term of a linear layer.

Shapes: B samples, T steps, D inputs, H hidden units, G gates' units (4 H, 3 H or H).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.layers.inventory import Layer
from dpsgd_track.privacy.terms import Dense, Outer

_State = tuple[Tensor, ...]
"""h, and of an LSTM c; [B, H] each."""


class RecurrentLayer(CapturedLayer):
    """Captures an LSTM, GRU or RNN from what its weights read and the gradients of its gates."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(capture, layer)
        module: Any = layer.module
        self.sample_dim = 0 if module.batch_first else 1

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's outputs and last states.

        Raises:
            ValueError: the input is no batch of sequences of equal length.
        """
        x, states = _arguments(*args, **kwargs)
        module: Any = self.module
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(
                f"{self.layer.fqn}: expected {type(module).__name__} to be called with a tensor "
                f"of three dimensions, got {type(x).__name__}. Give it "
                "padded sequences, and read each at its own last step; of two directions, run a "
                "second layer on each sequence reversed, as padding would come first. Or freeze "
                "the layer."
            )
        is_open = self.capture.open_call(self.layer, x, self.sample_dim)
        x_BTD = x.transpose(0, 1) if self.sample_dim else x
        num_directions = 2 if module.bidirectional else 1
        last: list[_State] = []
        for depth in range(module.num_layers):
            if depth:
                x_BTD = F.dropout(x_BTD, module.dropout, module.training)
            outputs = []
            for reverse in range(num_directions):
                first = _first_state(module, x_BTD, states, len(last))
                suffix = f"_l{depth}{'_reverse' * reverse}"
                y_BTH, state = self._run_cell(suffix, x_BTD, first, bool(reverse), is_open)
                outputs.append(y_BTH)
                last.append(state)
            x_BTD = torch.cat(outputs, dim=2)
        y = x_BTD.transpose(0, 1) if self.sample_dim else x_BTD
        stacked = tuple(torch.stack(each) for each in zip(*last, strict=True))
        return y, stacked if len(stacked) > 1 else stacked[0]

    def _run_cell(
        self, suffix: str, x_BTD: Tensor, state: _State, is_reversed: bool, is_open: bool
    ) -> tuple[Tensor, _State]:
        """Outputs [B, T, H] and last state of one direction of one layer."""
        if is_reversed:
            x_BTD = x_BTD.flip(1)
        weight = self._parameter(f"weight_hh{suffix}")
        step = _STEPS[str(self.module.mode)]
        shift_BTG = self._shifts(f"ih{suffix}", x_BTD)
        from_x = (F.linear(x_BTD, self._parameter(f"weight_ih{suffix}")) + shift_BTG).unbind(1)
        hidden_BTG = self._shifts(f"hh{suffix}", x_BTD)
        read, written = [], []
        for gates, shift in zip(from_x, hidden_BTG.unbind(1), strict=True):
            read.append(state[0])
            state = step(gates, F.linear(state[0], weight) + shift, state)
            written.append(state[0])
        if is_open:
            self._note(f"ih{suffix}", x_BTD, shift_BTG)
            self._note(f"hh{suffix}", torch.stack(read, dim=1), hidden_BTG)
        y_BTH = torch.stack(written, dim=1)
        return y_BTH.flip(1) if is_reversed else y_BTH, state

    def _parameter(self, name: str) -> Tensor:
        """Leaf of a parameter, or the parameter if it is frozen."""
        parameter: Tensor = getattr(self.module, name)
        return self.leaves().get(name, parameter)

    def _shifts(self, name: str, x_BTD: Tensor) -> Tensor:
        """Bias expanded to [B, T, G]; zeros without one."""
        weight = self._parameter(f"weight_{name}")
        # Zeros that autograd takes for computed from the weight.
        shift = weight[:, :0].sum(dim=1)
        if self.module.bias:
            shift = shift + self._parameter(f"bias_{name}")
        return shift.expand(*x_BTD.shape[:2], -1)

    def _note(self, name: str, read_BTD: Tensor, shift_BTG: Tensor) -> None:
        """Have a backward deliver the terms of a weight and its bias."""
        capture, names = self.capture, self.layer.names
        weight, bias = names.get(f"weight_{name}"), names.get(f"bias_{name}")
        if weight is None and bias is None:
            return
        handle = capture.hold(read_BTD)

        def receive(dy_BTG: Tensor) -> None:
            capture.dtypes.add(dy_BTG.dtype)
            read_BTD = handle().detach()
            if weight is not None:
                capture.add_term(weight, Outer(read_BTD, dy_BTG))
            if bias is not None:
                capture.add_term(bias, Dense(dy_BTG.sum(dim=1)))

        capture.note_received([weight, bias], shift_BTG, receive)


def _arguments(input: Any, hx: Any = None) -> tuple[Any, _State | None]:
    """Input and first states of a call, by the names that torch gives them."""
    return input, (hx,) if isinstance(hx, Tensor) else hx


def _first_state(module: Any, x_BTD: Tensor, states: _State | None, number: int) -> _State:
    """State before the first step, of one direction of one layer."""
    if states is not None:
        return tuple(state[number] for state in states)
    zeros = x_BTD.new_zeros(len(x_BTD), module.hidden_size)
    return (zeros, zeros) if isinstance(module, nn.LSTM) else (zeros,)


def _lstm_step(from_x: Tensor, from_h: Tensor, state: _State) -> _State:
    i, f, g, o = (from_x + from_h).chunk(4, dim=1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(from_x: Tensor, from_h: Tensor, state: _State) -> _State:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, dim=1), from_h.chunk(3, dim=1)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return ((1 - z) * n + z * state[0],)


def _tanh_step(from_x: Tensor, from_h: Tensor, state: _State) -> _State:
    return (torch.tanh(from_x + from_h),)


def _relu_step(from_x: Tensor, from_h: Tensor, state: _State) -> _State:
    return (torch.relu(from_x + from_h),)


_STEPS = {"LSTM": _lstm_step, "GRU": _gru_step, "RNN_TANH": _tanh_step, "RNN_RELU": _relu_step}
