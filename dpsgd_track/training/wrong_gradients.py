"""Wrong gradients of one sample with respect to one parameter, computed by the reference.

Their norms are values of `NormFormula`, and their clipped sums those of `SumFormula`: where a
mode's equal one of them, the comparison can name the mistake.

Shapes: T positions of one sample, D inputs, P outputs, G a parameter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dpsgd_track.record.alternatives import NormFormula, SumFormula
from dpsgd_track.training.layer_calls import Share, padding_of, rows_of

_TAILS = {4: SumFormula.TAIL_OF_4_LOST, 8: SumFormula.TAIL_OF_8_LOST}
"""Positions of a tile, and the loss of what is left after the last full one."""
_ROWS = 8
"""Rows of a tile."""
_CLOSE = 1e-3
"""Relative error up to which the calls of layers make up the gradient."""
Shares = Mapping[str, Sequence[Share]]
"""Calls by parameter, in the order of the forward."""


OtherInputs = Mapping[SumFormula, Shares]
"""Calls whose inputs may be taken for a sample's own, by the mistake that it is."""


def other_inputs(
    shares: Shares,
    *,
    before: Shares | None = None,
    batch_before: Shares | None = None,
    is_as_large: bool = False,
) -> OtherInputs:
    """The calls that a sample's own may be confused with.

    Args:
        shares: the sample's own calls.
        before: those of the sample before in the micro-batch.
        batch_before: those of the sample at its place in the micro-batch before.
        is_as_large: True if that micro-batch has as many samples.
    """
    found = dict(_of_layers(shares))
    if before:
        found[SumFormula.INPUT_OF_BEFORE] = before
    if batch_before:
        found[SumFormula.INPUT_OF_BATCH_BEFORE] = batch_before
    if batch_before and is_as_large:
        found[SumFormula.INPUT_OF_EQUAL_BATCH_BEFORE] = batch_before
    return found


def _of_layers(shares: Shares) -> Iterator[tuple[SumFormula, Shares]]:
    """The calls of other linear layers of the sample in place of each of its own."""
    linear = sorted(
        ((name, s) for name, own in shares.items() for s in own if s.right_TD is not None),
        key=lambda call: call[1].order,
    )
    last = {_input(s).shape: place for place, (_, s) in enumerate(linear)}

    def taken(source: Callable[[int], int]) -> Shares:
        found: dict[str, list[Share]] = {}
        for place, (name, own) in enumerate(linear):
            other = source(place)
            fits = 0 <= other < len(linear) and _fits(own, linear[other][1].right_TD)
            found.setdefault(name, []).append(linear[other][1] if fits else own)
        return {name: calls for name, calls in found.items() if _differ(calls, shares[name])}

    yield SumFormula.INPUT_OF_NEXT_LAYER, taken(lambda place: place + 1)
    yield SumFormula.INPUT_OF_LAYER_BEFORE, taken(lambda place: place - 1)
    yield SumFormula.INPUT_OF_LAST_LAYER, taken(lambda place: last[_input(linear[place][1]).shape])


def _differ(calls: Sequence[Share], own: Sequence[Share]) -> bool:
    return any(call is not mine for call, mine in zip(calls, own, strict=True))


def _input(share: Share) -> Tensor:
    assert share.right_TD is not None, "only linear layers have inputs"
    return share.right_TD


def wrong_gradients(
    name: str, right_G: Tensor, shares: Sequence[Share], others: OtherInputs
) -> dict[SumFormula, Tensor]:
    """Wrong gradients of a parameter, each in the shape of the right one, by the mistake.

    Args:
        name: the parameter's.
        right_G: the right gradient.
        shares: of the calls that it is made of; nothing is returned unless they make it up.
    """
    uses = [_shaped(share.gradient(), right_G) for share in shares]
    if not uses or (sum(uses[1:], uses[0]) - right_G).norm() > _CLOSE * right_G.norm():
        return {}
    found = dict(_of_positions(shares, right_G))
    rest = len(right_G) % _ROWS
    if len(right_G) > _ROWS and rest:
        found[SumFormula.ROWS_OF_8] = _without_last(right_G, right_G, rest)
    if len(uses) > 1:
        found |= {
            SumFormula.FIRST_USE: uses[0],
            SumFormula.LAST_USE: uses[-1],
            SumFormula.FIRST_USE_DOUBLED: right_G + uses[0],
            SumFormula.LAST_USE_DOUBLED: right_G + uses[-1],
        }
        if all(_fits(share, shares[0].right_TD) for share in shares):
            found[SumFormula.USES_SUMMED_FIRST] = _summed_first(shares)
        if len(right_G) > _ROWS and rest:
            found[SumFormula.LAST_USE_ROWS_OF_8] = _without_last(right_G, uses[-1], rest)
    found |= {
        formula: _summed(shares, partial(_with_other_input, formula=formula), right_G)
        for formula in (
            SumFormula.RAW_INPUT,
            SumFormula.OUTPUT_AS_INPUT,
            SumFormula.CENTRED_INPUT,
        )
        if all(formula in share.other_inputs for share in shares)
    }
    for formula, inputs in (*_inputs_of_uses(shares), *_inputs_of_others(name, others)):
        if len(inputs) == len(shares) and all(map(_fits, shares, inputs)):
            totals = [s.total(s.left_TP, x) for s, x in zip(shares, inputs, strict=True)]
            found[formula] = sum(totals[1:], totals[0])
    if rows := rows_of(shares):
        found |= _of_rows(rows, right_G)
    return found


def _summed_first(shares: Sequence[Share]) -> Tensor:
    """Product of the summed inputs and the summed output gradients of a linear weight."""
    inputs = torch.stack([s.right_TD for s in shares if s.right_TD is not None])
    outputs = torch.stack([s.left_TP for s in shares])
    return shares[0].total(outputs.sum(dim=0), inputs.sum(dim=0))


def _without_last(right_G: Tensor, part_G: Tensor, num_rows: int) -> Tensor:
    """The right gradient without the last rows of a part of it."""
    lost = torch.zeros_like(right_G)
    lost[-num_rows:] = part_G[-num_rows:]
    return right_G - lost


def _with_other_input(share: Share, formula: SumFormula) -> Tensor:
    return share.total(share.other_inputs[formula])


def _fits(share: Share, right_TD: Tensor | None) -> bool:
    if share.right_TD is None or right_TD is None:
        return False
    return share.right_TD.shape == right_TD.shape


def _inputs_of_uses(shares: Sequence[Share]) -> Iterator[tuple[SumFormula, list[Tensor]]]:
    """Inputs of a linear weight's uses, at other uses."""
    inputs = [share.right_TD for share in shares if share.right_TD is not None]
    if len(inputs) == len(shares) > 1:
        yield SumFormula.LAST_INPUT, inputs[-1:] * len(inputs)
        yield SumFormula.FIRST_INPUT, inputs[:1] * len(inputs)
        yield SumFormula.INPUTS_EXCHANGED, inputs[::-1]


def _inputs_of_others(name: str, others: OtherInputs) -> Iterator[tuple[SumFormula, list[Tensor]]]:
    """Inputs of other samples or layers."""
    for formula, shares in others.items():
        inputs = [s.right_TD for s in shares.get(name, ()) if s.right_TD is not None]
        if inputs:
            yield formula, inputs


def _of_positions(shares: Sequence[Share], right_G: Tensor) -> Iterator[tuple[SumFormula, Tensor]]:
    """Gradients that lack some positions."""

    def without(positions: slice) -> Tensor:
        return right_G - _summed(shares, lambda share: share.gradient(positions), right_G)

    yield SumFormula.FIRST_POSITION_LOST, without(slice(0, 1))
    yield SumFormula.LAST_POSITION_LOST, without(slice(-1, None))
    shortest = min(len(share.left_TP) for share in shares)
    for size, formula in _TAILS.items():
        if shortest > size and shortest % size:
            yield formula, without(slice(shortest // size * size, None))
    if all(s.row_T is None and s.is_padding_T is not None for s in shares):
        yield SumFormula.PADDING_POSITIONS_LOST, right_G - _summed(shares, _of_padding, right_G)


def _of_padding(share: Share) -> Tensor:
    assert share.is_padding_T is not None, "padding is known"
    return share.gradient(share.is_padding_T)


def _of_rows(rows: Sequence[Share], right_G: Tensor) -> dict[SumFormula, Tensor]:
    """Gradients of an embedding, whose weight other layers may use as well."""
    looked_up = _summed(rows, Share.gradient, right_G)
    frequent = _summed(rows, lambda share: share.by_frequency().gradient(), right_G)
    padding = padding_of(rows)
    written = torch.zeros_like(right_G)
    for share in rows:
        write_rows(written, share)
    return {
        SumFormula.BY_FREQUENCY: right_G - looked_up + frequent,
        SumFormula.PADDING_COUNTED: right_G + _summed(padding, Share.gradient, right_G),
        SumFormula.ROWS_OF_SAMPLE: right_G - looked_up + written,
    }


def write_rows(table: Tensor, share: Share, factor: float | Tensor = 1.0) -> None:
    """Write each position's output gradient to its row, over what is there.

    Args:
        table: the embedding's shape.
        factor: that the output gradients are multiplied by.
    """
    assert share.row_T is not None, "only an embedding has rows"
    # Of equal rows the last stays, which indexed assignment leaves open.
    last = {row: place for place, row in enumerate(share.row_T.tolist())}
    table[list(last)] = factor * share.left_TP[list(last.values())]


def _summed(
    shares: Sequence[Share], gradient_of: Callable[[Share], Tensor], like_G: Tensor
) -> Tensor:
    if not shares:
        return torch.zeros_like(like_G)
    parts = [_shaped(gradient_of(share), like_G) for share in shares]
    return sum(parts[1:], parts[0])


def _shaped(gradient: Tensor, like_G: Tensor) -> Tensor:
    """A gradient whose last rows may be missing, in the parameter's shape."""
    missing = len(like_G) - len(gradient)
    return nn.functional.pad(gradient, (0, 0, 0, missing)) if missing else gradient


NORMS = {
    formula: NormFormula[formula.name]
    for formula in SumFormula
    if formula.name in NormFormula.__members__
}
"""Formulas of sums whose gradients' norms are recorded as well."""
