"""Wrong formulas for per-sample norms, computed beside the right one by the reference.

Where a mode's norm equals one of them, the comparison can name the mistake.

Shapes: T positions of one sample, D inputs, P outputs, V formulas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.record.alternatives import NormFormula

_TILES = (
    (4, NormFormula.TAIL_OF_4_LOST, NormFormula.TILES_OF_4_ONCE, NormFormula.TILES_OF_4_APART),
    (8, NormFormula.TAIL_OF_8_LOST, NormFormula.TILES_OF_8_ONCE, NormFormula.TILES_OF_8_APART),
    (16, NormFormula.TAIL_OF_16_LOST, NormFormula.TILES_OF_16_ONCE, NormFormula.TILES_OF_16_APART),
    (32, NormFormula.TAIL_OF_32_LOST, NormFormula.TILES_OF_32_ONCE, NormFormula.TILES_OF_32_APART),
)
"""Positions of a tile, and the mistakes with such tiles."""
_CLOSE = 1e-3
"""Relative error up to which the calls of layers make up the gradient."""


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
    other_inputs: Mapping[NormFormula, Tensor] = field(default_factory=dict)
    """`left_TP` with other inputs in place of the normalised one, by the mistake that it is."""
    padding_TP: Tensor | None = None
    """`left_TP` of padding alone."""
    is_padding_T: Tensor | None = None
    """Positions of padding, where they are known."""

    def total(self, left_TP: Tensor, right_TD: Tensor | None = None) -> Tensor:
        """The gradient, summed over positions."""
        if right_TD is not None:
            return left_TP.mT @ right_TD
        if self.row_T is not None:
            rows = int(self.row_T.max()) + 1
            return left_TP.new_zeros(rows, left_TP.shape[1]).index_add_(0, self.row_T, left_TP)
        return left_TP.sum(dim=0)

    def gradient(self, positions: slice | Tensor = slice(None)) -> Tensor:
        """Gradient over `positions`, a slice or [T] flags."""
        left = torch.zeros_like(self.left_TP)
        left[positions] = self.left_TP[positions]
        return self.total(left, self.right_TD)

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
        """What came out of each call."""
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
        for (module, own, *tensors), dy in zip(calls, output_gradients, strict=True):
            x, output, dy_TP = (t.detach().cpu() for t in (*tensors, dy.flatten(0, -2)))
            for kind, name in own.items():
                is_bias = kind == "bias"
                share = Share(dy_TP) if is_bias else _of_weight(module, x, output, dy_TP)
                if share is None:
                    continue
                if is_padding_T is not None and len(is_padding_T) == len(dy_TP):
                    share = replace(share, is_padding_T=is_padding_T)
                found[name].append(share)
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
        return Share(dy_TP, x.flatten(0, -2).to(dy_TP))
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
                NormFormula.RAW_INPUT: dy_TP * x_TP,
                NormFormula.OUTPUT_AS_INPUT: dy_TP * output.flatten(0, -2).to(dy_TP),
                NormFormula.CENTRED_INPUT: dy_TP * nn.functional.layer_norm(x_TP, x_TP.shape[1:]),
            },
        )
    return None


def formulas(gradient: Tensor, shares: Sequence[Share]) -> Tensor:
    """[V] value of each `NormFormula`, float64; NaN where it does not apply.

    Args:
        gradient: one sample's gradient of one parameter.
        shares: of the calls that it is made of; empty if they are not known.
    """
    norm = gradient.norm()
    values = _of_gradient(gradient)
    if shares and (_joined(shares, Share.gradient) - norm).abs() <= _CLOSE * norm:
        values |= _of_shares(norm, shares)
    found = torch.full((len(NormFormula),), torch.nan, dtype=torch.float64)
    found[[_PLACE[formula] for formula in values]] = torch.stack(list(values.values())).double()
    return found


_PLACE = {formula: place for place, formula in enumerate(NormFormula)}


def _of_gradient(gradient: Tensor) -> dict[NormFormula, Tensor]:
    rows = gradient.reshape(len(gradient), -1)
    first, last = row_range(len(rows), dist.get_rank(), dist.get_world_size())
    return {
        NormFormula.OWN_ROWS: rows[first:last].norm(),
        NormFormula.LAST_ROW_LOST: rows[:-1].norm(),
        NormFormula.LAST_COLUMN_LOST: rows[:, :-1].norm(),
        NormFormula.SUM_OF_ABSOLUTES: rows.abs().sum(),
        NormFormula.LARGEST_ELEMENT: rows.abs().max(),
        NormFormula.ROOT_MEAN_SQUARE: rows.square().mean().sqrt(),
        NormFormula.SQUARES_IN_FLOAT16: rows.half().square().to(rows.dtype).sum().sqrt(),
    }


def _of_shares(norm: Tensor, shares: Sequence[Share]) -> dict[NormFormula, Tensor]:
    squares = torch.stack([share.position_squares().sum() for share in shares]).sum()
    values = {
        NormFormula.POSITIONS_APART: squares.sqrt(),
        NormFormula.POSITIONS_APART_AND_TOGETHER: (norm.square() + squares).sqrt(),
        NormFormula.FIRST_POSITION_LOST: _joined(shares, lambda s: s.gradient(slice(1, None))),
        NormFormula.LAST_POSITION_LOST: _joined(shares, lambda s: s.gradient(slice(0, -1))),
        NormFormula.LAST_TWO_POSITIONS_LOST: _joined(shares, lambda s: s.gradient(slice(0, -2))),
    }
    if len(shares) > 1:
        apart = torch.stack([share.gradient().square().sum() for share in shares]).sum()
        values |= {
            NormFormula.USES_APART: apart.sqrt(),
            NormFormula.USES_ADDED: torch.stack([s.gradient().norm() for s in shares]).sum(),
            NormFormula.CROSS_TERM_ONCE: ((norm.square() + apart) / 2).clamp_min(0).sqrt(),
            NormFormula.FIRST_USE: shares[0].gradient().norm(),
            NormFormula.LAST_USE: shares[-1].gradient().norm(),
            NormFormula.LAST_USE_TWICE: (
                norm.square() + shares[-1].gradient().square().sum()
            ).sqrt(),
        }
        values |= _of_other_inputs(shares)
    (only,) = shares if len(shares) == 1 else (None,)
    if only is None:
        left_TP = torch.cat([s.left_TP for s in shares]) if _are_alike(shares) else None
        right = [s.right_TD for s in shares if s.right_TD is not None]
        right_TD = torch.cat(right) if left_TP is not None and right else None
    else:
        left_TP, right_TD = only.left_TP, only.right_TD
    if left_TP is not None:
        row_T = only.row_T if only is not None else None
        values |= _of_tiles(Share(left_TP, right_TD, row_T))
    if left_TP is not None and right_TD is not None:
        values[NormFormula.SUMMED_FIRST] = left_TP.sum(dim=0).norm() * right_TD.sum(dim=0).norm()
        values[NormFormula.FACTORS_APART] = left_TP.norm() * right_TD.norm()
    elif left_TP is not None:
        gram = (left_TP @ left_TP.mT).norm()
        values |= {NormFormula.GRAM: gram, NormFormula.ROOT_OF_GRAM: gram.sqrt()}
    for formula in shares[0].other_inputs:
        others = [share.total(share.other_inputs[formula]) for share in shares]
        values[formula] = torch.stack(others).sum(dim=0).norm()
    if all(s.row_T is None and s.is_padding_T is not None for s in shares):
        values[NormFormula.PADDING_POSITIONS_LOST] = _joined(shares, _without_padding)
    if any(share.row_T is not None for share in shares):
        values |= _of_rows(norm, shares)
    return values


def _of_other_inputs(shares: Sequence[Share]) -> dict[NormFormula, Tensor]:
    """Formulas that pair the uses of a linear weight with each other's inputs."""
    inputs = [share.right_TD for share in shares if share.right_TD is not None]
    if len(inputs) < len(shares) or len({x.shape for x in inputs}) > 1:
        return {}
    taken = {
        NormFormula.LAST_INPUT: inputs[-1:] * len(inputs),
        NormFormula.FIRST_INPUT: inputs[:1] * len(inputs),
        NormFormula.INPUTS_EXCHANGED: inputs[::-1],
    }
    return {
        formula: torch.stack([s.total(s.left_TP, x) for s, x in zip(shares, xs, strict=True)])
        .sum(dim=0)
        .norm()
        for formula, xs in taken.items()
    }


def _without_padding(share: Share) -> Tensor:
    assert share.is_padding_T is not None, "padding is known"
    return share.gradient(~share.is_padding_T)


def _of_tiles(share: Share) -> dict[NormFormula, Tensor]:
    """Formulas that take the products of positions tile by tile."""
    gram_TT = share.products()
    place_T = torch.arange(len(gram_TT))
    values: dict[NormFormula, Tensor] = {}
    for size, tail_lost, once, apart in _TILES:
        if size >= len(gram_TT):
            break
        whole = len(gram_TT) // size * size
        of_one_tile = (place_T[:, None] // size == place_T // size).to(gram_TT)
        within, total = (gram_TT * of_one_tile).sum(), gram_TT.sum()
        squares = {tail_lost: gram_TT[:whole, :whole].sum(), once: (within + total) / 2}
        squares[apart] = within
        values |= {formula: square.clamp_min(0).sqrt() for formula, square in squares.items()}
    return values


def _of_rows(norm: Tensor, shares: Sequence[Share]) -> dict[NormFormula, Tensor]:
    """Formulas for an embedding, whose weight other layers may use as well."""
    rows = [share for share in shares if share.row_T is not None]
    others = [share for share in shares if share.row_T is None]
    with_padding = [
        replace(s, left_TP=s.left_TP + s.padding_TP) for s in rows if s.padding_TP is not None
    ]
    squares = torch.stack([share.position_squares().sum() for share in rows]).sum()
    added = torch.stack([share.gradient().square().sum() for share in rows]).sum()
    return {
        NormFormula.TOKENS_APART: (norm.square() - added + squares).clamp_min(0).sqrt(),
        NormFormula.BY_FREQUENCY: _joined(
            [*(share.by_frequency() for share in rows), *others], Share.gradient
        ),
        NormFormula.PADDING_COUNTED: _joined([*with_padding, *others], Share.gradient),
    }


def _are_alike(shares: Sequence[Share]) -> bool:
    """True if all shares are of one kind, so that their positions can be concatenated."""
    kinds = {(s.right_TD is None, s.row_T is None, s.left_TP.shape[1]) for s in shares}
    return len(kinds) == 1


def _joined(shares: Sequence[Share], gradient_of: Callable[[Share], Tensor]) -> Tensor:
    """Norm of the sum of the shares' gradients, whose rows may end early."""
    gradients = [gradient_of(share) for share in shares]
    if gradients[0].ndim == 1:
        return torch.stack(gradients).sum(dim=0).norm()
    rows = max(len(g) for g in gradients)
    padded = [nn.functional.pad(g, (0, 0, 0, rows - len(g))) for g in gradients]
    return torch.stack(padded).sum(dim=0).norm()
