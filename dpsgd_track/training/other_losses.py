"""Wrong losses of a sample, computed beside the right one by the reference.

Where a mode's loss equals one of them, the comparison can name the mistake.

Shapes: T positions, V classes or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dpsgd_track.modes.protocol import SampleRun
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import (
    IGNORED,
    PerSampleLoss,
    causal_lm_loss,
    masked_lm_loss,
    regression_loss,
    token_classification_loss,
)
from dpsgd_track.record.alternatives import LossFormula

_SHIFTED = frozenset((causal_lm_loss,))
_WITHOUT_CLASSES = frozenset((regression_loss,))
_OF_INPUTS = frozenset((causal_lm_loss, masked_lm_loss, token_classification_loss))
"""Losses whose targets are those of the positions of `input_ids`."""
_OF_TOKENS = frozenset((causal_lm_loss, masked_lm_loss))
"""Losses whose targets are tokens of `input_ids` themselves."""


def other_losses(
    loss: PerSampleLoss,
    batch: Batch,
    index: int,
    run: SampleRun,
    *,
    before: Batch | None = None,
    first: Batch | None = None,
    num_tokens: int = 0,
) -> Tensor:
    """[F] value of each `LossFormula` of a sample, float64 on the CPU; NaN where none applies.

    Args:
        loss: that of the task.
        batch: the micro-batch.
        index: the sample's place in it.
        before: the micro-batch before.
        first: the step's first micro-batch.
        num_tokens: in the vocabulary; 0 if there is none.
    """
    sample = batch.sample(index)
    with torch.no_grad():
        logits = run(sample)
        values = dict(_of_inputs(loss, sample, run, num_tokens))
        values |= _of_first(loss, batch, index, run)
        stale = _at_same_place(sample, before, index)
        values |= _of_others(loss, batch, index, run, stale)
        for formula, source in (
            (LossFormula.TOKENS_OF_BATCH_BEFORE, before if stale is not None else None),
            (LossFormula.TOKENS_OF_FIRST_BATCH, first if first is not batch else None),
        ):
            if (given := _with_tokens_of(sample, source, index)) is not None:
                values[formula] = loss(run(given), sample.targets)
        for formula, other in (
            (LossFormula.TARGETS_OF_NEXT, batch.sample((index + 1) % len(batch))),
            (LossFormula.TARGETS_OF_BEFORE, batch.sample((index - 1) % len(batch))),
            (LossFormula.TARGETS_OF_BATCH_BEFORE, stale),
        ):
            if other is not None:
                values[formula] = loss(logits, other.targets)
        inner = inner_loss(loss)
        if inner not in _WITHOUT_CLASSES:
            probabilities, capped = logits.softmax(-1), 30 * torch.tanh(logits / 30)
            values[LossFormula.PROBABILITIES_AS_LOGITS] = loss(probabilities, sample.targets)
            values[LossFormula.CAPPED] = loss(capped, sample.targets)
            values |= _of_classes(logits, sample.targets, is_shifted=inner in _SHIFTED)
        if sample.targets.ndim == 2 and inner not in _WITHOUT_CLASSES:
            values |= _of_targets(loss, logits, sample, is_shifted=inner in _SHIFTED)
            if inner in _OF_TOKENS:
                values |= _of_padding(loss, logits, sample)
                values |= _of_length(loss, sample, run)
    missing = torch.tensor(torch.nan)
    return torch.stack(
        [values.get(f, missing).detach().double().cpu().reshape(()) for f in LossFormula]
    )


def inner_loss(loss: PerSampleLoss) -> PerSampleLoss:
    """The loss without its check that it is one number a sample."""
    inner: PerSampleLoss = getattr(loss, "__wrapped__", loss)
    return inner


def _of_inputs(
    loss: PerSampleLoss, sample: Batch, run: SampleRun, num_tokens: int
) -> Mapping[LossFormula, Tensor]:
    """Losses of a sample that the model has been given wrongly."""
    values: dict[LossFormula, Tensor] = {}

    def given(targets: Tensor = sample.targets, **inputs: Tensor) -> Tensor:
        changed = replace(sample, inputs={**sample.inputs, **inputs}, targets=targets)
        return loss(run(changed), targets)

    mask, ids = sample.inputs.get("attention_mask"), sample.inputs.get("input_ids")
    if mask is not None and not mask.all():
        values[LossFormula.MASK_IGNORED] = given(attention_mask=torch.ones_like(mask))
    positions = sample.inputs.get("position_ids")
    if positions is not None:
        values[LossFormula.POSITIONS_FROM_ONE] = given(position_ids=positions + 1)
        from_left = torch.arange(positions.shape[1], device=positions.device)[None]
        if not torch.equal(from_left, positions):
            values[LossFormula.POSITIONS_FROM_PADDING] = given(position_ids=from_left)
    if ids is not None:
        values |= _of_tokens(given, ids, mask, num_tokens)
    if mask is not None and ids is not None and mask.sum() > 1:
        last = int(mask[0].nonzero().max())
        shorter, tokens, targets = mask.clone(), ids.clone(), sample.targets.clone()
        shorter[0, last] = 0
        tokens[0, last] = 0
        if inner_loss(loss) in _OF_INPUTS:
            targets[0, last] = IGNORED
        values[LossFormula.LAST_TOKEN_LOST] = given(
            targets, input_ids=tokens, attention_mask=shorter
        )
    return values


def _of_tokens(
    given: Callable[..., Tensor], ids: Tensor, mask: Tensor | None, num_tokens: int
) -> Mapping[LossFormula, Tensor]:
    """Losses of a sample that is read with other tokens.

    Args:
        given: loss of the sample with other inputs, by name.
    """
    first = 0 if mask is None else int(mask[0].argmax())
    cleared = ids.clone()
    cleared[0, first] = 0
    values = {LossFormula.FIRST_TOKEN_LOST: given(input_ids=cleared)}
    if num_tokens > 1:
        values[LossFormula.TOKENS_CLAMPED] = given(input_ids=ids.clamp_max(num_tokens - 2))
    return values


def _of_first(
    loss: PerSampleLoss, batch: Batch, index: int, run: SampleRun
) -> Mapping[LossFormula, Tensor]:
    """Losses of a sample with something of the micro-batch's first sample."""
    sample, first = batch.sample(index), batch.sample(0)
    named = {
        "position_ids": LossFormula.POSITIONS_OF_FIRST,
        "attention_mask": LossFormula.MASK_OF_FIRST,
    }
    values: dict[LossFormula, Tensor] = {}
    for name, formula in named.items():
        if name in sample.inputs and not torch.equal(sample.inputs[name], first.inputs[name]):
            inputs = {**sample.inputs, name: first.inputs[name]}
            values[formula] = loss(run(replace(sample, inputs=inputs)), sample.targets)
    return values


def _of_others(
    loss: PerSampleLoss, batch: Batch, index: int, run: SampleRun, stale: Batch | None
) -> Mapping[LossFormula, Tensor]:
    """Losses of a sample with the inputs of another.

    Args:
        stale: the sample at its place in the micro-batch before; None if there is none like it.
    """
    targets = batch.sample(index).targets
    others = {
        LossFormula.INPUTS_OF_NEXT: batch.sample((index + 1) % len(batch)),
        LossFormula.INPUTS_OF_BEFORE: batch.sample((index - 1) % len(batch)),
    }
    if stale is not None:
        others[LossFormula.INPUTS_OF_BATCH_BEFORE] = stale
    return {f: loss(run(replace(other, targets=targets)), targets) for f, other in others.items()}


def _at_same_place(sample: Batch, other: Batch | None, index: int) -> Batch | None:
    """The sample of another micro-batch at a place; None if there is none of those shapes."""
    if other is None or index >= len(other):
        return None
    found = other.sample(index)
    return found if _shapes(found) == _shapes(sample) else None


def _with_tokens_of(sample: Batch, other: Batch | None, index: int) -> Batch | None:
    """A sample with the tokens of another micro-batch; None where it has none of that shape."""
    ids = sample.inputs.get("input_ids")
    if ids is None or other is None or index >= len(other):
        return None
    tokens = other.sample(index).inputs["input_ids"]
    if tokens.shape != ids.shape:
        return None
    return replace(sample, inputs={**sample.inputs, "input_ids": tokens})


def _shapes(sample: Batch) -> list[torch.Size]:
    return [tensor.shape for tensor in sample.tensors()]


def _of_targets(
    loss: PerSampleLoss, logits: Tensor, sample: Batch, *, is_shifted: bool
) -> Mapping[LossFormula, Tensor]:
    """Losses over other targets of the same sample."""
    targets = sample.targets
    used = targets[0].ne(IGNORED).nonzero().flatten()
    values: dict[LossFormula, Tensor] = {}
    if is_shifted:
        later = targets.roll(-1, 1)
        later[:, -1] = IGNORED
        values[LossFormula.NOT_SHIFTED] = loss(logits.roll(-1, 1), targets)
        values[LossFormula.SHIFTED_TWICE] = loss(logits, later)
        earlier = targets.roll(2, 1)
        earlier[:, :2] = IGNORED
        values[LossFormula.TARGETS_BACKWARDS] = loss(logits, earlier)
    if len(used) > 1:
        lost = [targets.clone(), targets.clone()]
        lost[0][0, used[-1]] = IGNORED
        # A first token is predicted by no position.
        lost[1][0, used[1 if used[0] == 0 else 0]] = IGNORED
        values[LossFormula.LAST_TARGET_LOST] = loss(logits, lost[0])
        values[LossFormula.FIRST_TARGET_LOST] = loss(logits, lost[1])
    return values


def _of_length(loss: PerSampleLoss, sample: Batch, run: SampleRun) -> Mapping[LossFormula, Tensor]:
    """The loss of a sample that is cut to a multiple of 8 positions."""
    length = sample.targets.shape[1]
    kept = length // 8 * 8
    if not kept or kept == length:
        return {}
    inputs = {
        name: tensor[:, :kept] if tensor.shape[1:2] == (length,) else tensor
        for name, tensor in sample.inputs.items()
    }
    targets = sample.targets[:, :kept]
    if not targets[:, 1:].ne(IGNORED).any():
        return {}
    return {
        LossFormula.CUT_TO_8: loss(run(replace(sample, inputs=inputs, targets=targets)), targets)
    }


def _of_padding(loss: PerSampleLoss, logits: Tensor, sample: Batch) -> Mapping[LossFormula, Tensor]:
    """Losses over the tokens that are not predicted as well."""
    targets, ids = sample.targets, sample.inputs.get("input_ids")
    used = targets[0].ne(IGNORED).nonzero().flatten()
    if ids is None or ids.shape != targets.shape or not len(used):
        return {}
    whole = torch.where(targets == IGNORED, ids, targets)
    values = {LossFormula.PADDING_PREDICTED: loss(logits, whole)}
    values[LossFormula.IGNORED_AS_ZERO] = loss(logits, targets.clamp_min(0))
    is_end = targets[:, 1:].eq(IGNORED) & targets[:, :-1].ne(IGNORED)
    ended = torch.cat([targets[:, :1], targets[:, 1:].masked_fill(is_end, 0)], dim=1)
    values[LossFormula.ENDS_AS_ZERO] = loss(logits, ended)
    after = int(used[-1]) + 1
    if after < targets.shape[1]:
        first = targets.clone()
        first[0, after] = ids[0, after]
        values[LossFormula.FIRST_PADDING_PREDICTED] = loss(logits, first)
    return values


def _of_classes(
    logits: Tensor, targets: Tensor, *, is_shifted: bool
) -> Mapping[LossFormula, Tensor]:
    """Parts of losses that are made of the logits alone, over the positions of the targets."""
    if is_shifted:
        logits, targets = logits[:, :-1], targets[:, 1:]
    counts = targets.flatten() != IGNORED
    if not counts.any():
        return {}
    of_target = logits.flatten(0, -2).double()[counts]
    log_sum = of_target.logsumexp(-1)
    return {
        LossFormula.UNIFORM: (log_sum - of_target.mean(dim=-1)).mean(),
        LossFormula.SQUARED_LOG_SUM: log_sum.square().mean(),
    }
