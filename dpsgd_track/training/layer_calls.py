"""The calls of layers that a sample's gradient is made of, noted by the reference.

Shapes: T positions of one sample, D inputs, P outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpsgd_track.record.alternatives import SumFormula


@dataclass(frozen=True)
class Share:
    """One layer call's share of a parameter's gradient."""

    left_TP: Tensor
    """Gradient of the output, times the normalised input if that is multiplied element by element.
    """
    right_TD: Tensor | None = None
    """Input that `left_TP` is multiplied with (an outer product at each position)."""
    row_T: Tensor | None = None
    """Row that each position is added to; the padding's rows have been zeroed."""
    other_inputs: Mapping[SumFormula, Tensor] = field(default_factory=dict)
    """`left_TP` with other inputs in place of the normalised one, by the mistake that it is."""
    padding_TP: Tensor | None = None
    """`left_TP` of padding alone."""
    is_padding_T: Tensor | None = None
    """Positions of padding, where they are known."""
    order: int = 0
    """Place of the call in the forward."""
    is_transposed: bool = False
    """True if the weight is [D, P], as that of a Conv1D."""

    def total(self, left_TP: Tensor, right_TD: Tensor | None = None) -> Tensor:
        """The gradient, summed over positions."""
        if right_TD is not None:
            return right_TD.mT @ left_TP if self.is_transposed else left_TP.mT @ right_TD
        if self.row_T is not None:
            return self._of_rows(left_TP, self.row_T)
        return left_TP.sum(dim=0)

    def gradient(self, positions: slice | Tensor = slice(None)) -> Tensor:
        """Gradient over `positions`, a slice or [T] flags."""
        right_TD = None if self.right_TD is None else self.right_TD[positions]
        left_TP = self.left_TP[positions]
        if self.row_T is not None:
            return self._of_rows(left_TP, self.row_T[positions])
        return self.total(left_TP, right_TD)

    def _of_rows(self, left_TP: Tensor, row_T: Tensor) -> Tensor:
        assert self.row_T is not None, "only an embedding has rows"
        rows = int(self.row_T.max()) + 1
        return left_TP.new_zeros(rows, left_TP.shape[1]).index_add_(0, row_T, left_TP)

    def add_by_position(self, total: Tensor) -> None:
        """Add each position's share of the gradient to `total`, [T, *parameter]."""
        if self.right_TD is not None:
            one, other = self.left_TP, self.right_TD
            if self.is_transposed:
                one, other = other, one
            total.add_(one[:, :, None] * other[:, None, :])
        elif self.row_T is not None:
            total[torch.arange(len(self.row_T)), self.row_T] += self.left_TP
        else:
            total.add_(self.left_TP)

    def products(self) -> Tensor:
        """[T, T] inner products of the positions' shares; their sum is the squared norm."""
        products = self.left_TP @ self.left_TP.mT
        if self.right_TD is not None:
            return products * (self.right_TD @ self.right_TD.mT)
        if self.row_T is not None:
            return products * (self.row_T[:, None] == self.row_T)
        return products

    def by_frequency(self) -> Share:
        """The same with each row divided by how often it is used."""
        assert self.row_T is not None, "only rows have a frequency"
        count_T = (self.row_T[:, None] == self.row_T).sum(dim=1, keepdim=True)
        return replace(self, left_TP=self.left_TP / count_T)

    def position_squares(self) -> Tensor:
        """[T] squared norm of each position's share."""
        squares = self.left_TP.square().sum(dim=1)
        return squares if self.right_TD is None else squares * self.right_TD.square().sum(dim=1)


class LayerCalls:
    """Notes what goes into the layers of a model, and what comes out."""

    def __init__(self, model: nn.Module) -> None:
        self._calls: list[tuple[nn.Module, dict[str, str], Tensor, Tensor]] = []
        names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        for module in model.modules():
            parameters = dict(module.named_parameters(recurse=False))
            own = {kind: names[id(p)] for kind, p in parameters.items() if id(p) in names}
            if own and set(own) <= {"weight", "bias"}:
                module.register_forward_hook(partial(self._note, own))

    def _note(
        self, own: dict[str, str], module: nn.Module, inputs: tuple[object, ...], output: object
    ) -> None:
        is_plain = len(inputs) == 1 and isinstance(inputs[0], Tensor)
        if is_plain and isinstance(output, Tensor) and output.requires_grad and output.ndim > 1:
            assert isinstance(inputs[0], Tensor)
            self._calls.append((module, own, inputs[0].detach(), output))

    def clear(self) -> None:
        """Forget the calls so far."""
        self._calls.clear()

    @property
    def outputs(self) -> list[Tensor]:
        """Output of each call."""
        return [output for *_, output in self._calls]

    def shares(self, output_gradients: Sequence[Tensor]) -> dict[str, list[Share]]:
        """The calls' shares of each parameter's gradient, on the CPU.

        Args:
            output_gradients: of `outputs`.
        """
        found: dict[str, list[Share]] = defaultdict(list)
        # A layer that is checkpointed runs once more in the backward.
        calls = self._calls[: len(output_gradients)]
        is_padding_T = self._padding()
        for order, ((module, own, *tensors), dy) in enumerate(
            zip(calls, output_gradients, strict=True)
        ):
            x, output, dy_TP = (t.detach().cpu() for t in (*tensors, dy.flatten(0, -2)))
            for kind, name in own.items():
                is_bias = kind == "bias"
                share = Share(dy_TP) if is_bias else _of_weight(module, x, output, dy_TP)
                if share is None:
                    continue
                if is_padding_T is not None and len(is_padding_T) == len(dy_TP):
                    share = replace(share, is_padding_T=is_padding_T)
                found[name].append(replace(share, order=order))
        return found

    def _padding(self) -> Tensor | None:
        """[T] positions of padding, by the first embedding that has a row for it."""
        for module, _, x, _ in self._calls:
            if x.is_floating_point() or not isinstance(module, nn.Embedding):
                continue
            if module.padding_idx is not None:
                return (x == module.padding_idx).flatten().cpu()
        return None


def _of_weight(module: nn.Module, x: Tensor, output: Tensor, dy_TP: Tensor) -> Share | None:
    """The share of a layer's weight; None for a layer of another kind."""
    if isinstance(module, nn.Linear | Conv1D):
        is_transposed = isinstance(module, Conv1D)
        return Share(dy_TP, x.flatten(0, -2).to(dy_TP), is_transposed=is_transposed)
    if isinstance(module, nn.Embedding):
        # BART's table of positions is called with what the positions are counted of.
        if x.is_floating_point() or x.numel() != len(dy_TP):
            return None
        row_T = x.flatten()
        is_padding = (row_T == (-1 if module.padding_idx is None else module.padding_idx))[:, None]
        rows, padding = dy_TP.masked_fill(is_padding, 0.0), dy_TP.masked_fill(~is_padding, 0.0)
        return Share(rows, row_T=row_T, padding_TP=padding)
    parameters = dict(module.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    scales = weight.shape == x.shape[-1:] and output.shape == x.shape
    if scales and (bias is None or bias.shape == weight.shape):
        unscaled = output if bias is None else output - bias.detach().cpu()
        unscaled = unscaled / weight.detach().cpu()
        x_TP = x.flatten(0, -2).to(dy_TP)
        return Share(
            dy_TP * unscaled.flatten(0, -2),
            other_inputs={
                SumFormula.RAW_INPUT: dy_TP * x_TP,
                SumFormula.OUTPUT_AS_INPUT: dy_TP * output.flatten(0, -2).to(dy_TP),
                SumFormula.CENTRED_INPUT: dy_TP * nn.functional.layer_norm(x_TP, x_TP.shape[1:]),
            },
        )
    return None


def rows_of(shares: Sequence[Share]) -> list[Share]:
    """The calls that look rows up."""
    return [share for share in shares if share.row_T is not None]


def padding_of(rows: Sequence[Share]) -> list[Share]:
    """The padding that calls look up, where it is known."""
    return [replace(s, left_TP=s.padding_TP) for s in rows if s.padding_TP is not None]
