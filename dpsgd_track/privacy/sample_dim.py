"""Finds the dimension of each layer's inputs that holds the samples, by a trial run.

A tensor with as many rows as the batch has samples need not hold one row per sample: positions [T]
have as many if B equals T, labels [C] if B equals C. So the model runs once, without gradients, on
a batch whose number of samples equals no other size. The dimension of that size holds the samples;
a tensor without one is shared by all of them.

The output of a layer with a shared input, such as position indices [1, T] that are looked up once
and broadcast later, receives the sum of the samples' gradients. Giving each sample a copy of the
output (`captured_layer.spread`) separates them, if the model treats the copies as it treats the
shared tensor. That is tested with copies that differ. If it does not (it takes the first copy, or
adds them up), the layer's gradients take one backward per sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from functools import partial
from itertools import count

import torch

from dpsgd_track.privacy.attention import AttentionLayer
from dpsgd_track.privacy.backward_per_sample import BackwardPerSample, PartlyBackwardPerSample
from dpsgd_track.privacy.bare_parameters import Form, SpreadParameters, choose_forms
from dpsgd_track.privacy.batch import Rows
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, WatchedLayer
from dpsgd_track.privacy.dropout import of_any_samples
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.expanded import ExpandedLayer, MixedSamplesError
from dpsgd_track.privacy.grouped_rows import find_grouped
from dpsgd_track.privacy.layers.inventory import (
    Layer,
    holds_units,
    is_attention,
    is_recurrent,
    with_modules_inside,
)
from dpsgd_track.privacy.recurrent import RecurrentLayer
from dpsgd_track.privacy.sample_dim_trial import (
    POSITION_WISE,
    ROWS,
    SHARED,
    UNKNOWN,
    Moving,
    MovingLate,
    Observed,
    Observer,
    Run,
    SampleDim,
    observe,
    sizes_read,
)
from dpsgd_track.privacy.shared_rows import Course, SharedRows
from dpsgd_track.privacy.stray_parameters import add_strays, find_strays
from dpsgd_track.privacy.trial import is_same_run, kept_random_state

_logger = logging.getLogger(__name__)


def find_sample_dims(capture: Capture, run: Run, batch: Rows) -> None:
    """Choose how each layer is captured; the default is for samples in dimension 0.

    If the model cannot run on another number of samples, the default stays, and a layer is refused
    in a batch in which dimension 0 of its input has another size.

    Args:
        capture: the capture of the model.
        run: runs the model.
        batch: an ordinary batch, of at least one sample.
    Raises:
        ValueError: the samples of a layer cannot be separated.
    """
    num_samples = max(len(batch), 2) + 1
    try:
        num_samples = _unlike_any_size(capture, run, batch)
        other = _of(batch, num_samples)
        _place_bare(capture, run, other)
        _place_grouped(capture, run, batch, num_samples)
        chosen = observe(capture, run, other, Observer)
    except MixedSamplesError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        _logger.warning(
            "The model does not run on %d samples (%s: %s): samples are taken to be in dimension "
            "0 of what each layer reads.",
            num_samples,
            type(error).__name__,
            reason,
        )
        for captured in list(_bare(capture)):
            capture.register(BackwardPerSample(capture, captured.layer))
        return
    if capture.named_on_ranks({f for f, dims in chosen.dims.items() if {SHARED, ROWS} & {*dims}}):
        chosen = _spread_where_faithful(capture, run, other, chosen)
    chosen.use(capture)
    for fqn, of_layer in chosen.dims.items():
        _register(capture, capture.captured[fqn], of_layer, chosen.num_dims[fqn])


def _place_bare(capture: Capture, run: Run, batch: Rows) -> None:
    """Choose how parameters that a module applies beside the layers inside it are captured.

    Where it takes no view of them for each sample, a small module runs on copies of all its
    parameters. One that holds the model's blocks has the gradients of its own formed one sample
    at a time.
    """
    with kept_random_state(batch), of_any_samples():
        before = add_strays(capture, find_strays(capture, run, batch))
        forms = choose_forms(capture, run, batch) if any(_bare(capture)) else {}
    _drop_strays_without_form(capture, forms, before)
    # From the outermost on, as a module that is merged includes those inside.
    order = [fqn for fqn, _ in capture.model.named_modules()]
    for captured in sorted(_bare(capture), key=lambda c: order.index(c.layer.fqn)):
        layer = captured.layer
        if capture.captured.get(layer.fqn) is not captured:
            continue
        if layer.fqn in forms:
            capture.register(SpreadParameters(capture, layer, forms[layer.fqn]))
        elif holds_units(capture.model, layer.module):
            capture.register(BackwardPerSample(capture, layer))
        else:
            capture.merge(ExpandedLayer(capture, with_modules_inside(capture.model, layer)))


def _drop_strays_without_form(
    capture: Capture, forms: dict[str, dict[str, Form]], before: dict[str, CapturedLayer]
) -> None:
    """Give parameters of other modules that take no form back to these, but run a small module
    that is made of them for the most part on copies of all its parameters.

    Args:
        before: layers that had such parameters as their own.
    """
    given_back: set[str] = set()
    for captured in list(_bare(capture)):
        layer = captured.layer
        if not layer.strays or capture.captured.get(layer.fqn) is not captured:
            continue
        kept = {n: name for n, name in layer.names.items() if n not in layer.strays}
        kept |= {n: layer.names[n] for n in forms.get(layer.fqn, {})}
        if _is_mostly(capture, layer, layer.names.keys() - kept.keys()):
            capture.merge(ExpandedLayer(capture, with_modules_inside(capture.model, layer)))
            forms.pop(layer.fqn, None)
            continue
        given_back |= set(layer.names.values()) - set(kept.values())
        del capture.captured[layer.fqn]
        if kept:
            left = replace(layer, names=kept, strays=layer.strays & kept.keys())
            capture.register(SpreadParameters(capture, left))
    for fqn, captured in before.items():
        if not given_back.isdisjoint(captured.layer.names.values()):
            capture.register(captured)
            forms.pop(fqn, None)


def _is_mostly(capture: Capture, layer: Layer, names: Set[str]) -> bool:
    """True for a part of the model without blocks, half of which or more are parameters `names`."""
    if not names or not layer.fqn or holds_units(capture.model, layer.module):
        return False
    sizes = {n: p.numel() for n, p in layer.module.named_parameters() if p.requires_grad}
    return 2 * sum(sizes[name] for name in names) >= sum(sizes.values())


def _place_grouped(capture: Capture, run: Run, batch: Rows, num_samples: int) -> None:
    """Have layers that read several rows of each sample know it."""
    steps = torch.arange(num_samples)
    samples, reordered = (batch.rows(i % len(batch)) for i in (steps, steps.roll(1)))
    with kept_random_state(batch), of_any_samples():
        grouped = find_grouped(capture, run, samples, reordered)
    for fqn, is_interleaved in grouped.items():
        captured = capture.captured[fqn]
        if isinstance(captured, ExpandedLayer):
            captured.is_grouped = not is_interleaved
        elif captured.layer.rule is not None:
            capture.register(
                WatchedLayer(
                    capture, captured.layer, is_grouped=True, is_interleaved=is_interleaved
                )
            )


def _bare(capture: Capture) -> Iterator[CapturedLayer]:
    return (captured for captured in capture.captured.values() if captured.layer.is_bare)


def _register(
    capture: Capture, captured: CapturedLayer, of_calls: list[SampleDim], num_dims: list[int]
) -> None:
    layer, dims = captured.layer, set(of_calls)
    if isinstance(captured, ExpandedLayer):
        _register_without_rule(capture, captured, dims)
    elif len(dims) == 1:
        _register_alike(capture, captured, *dims)
    elif len(dims) == 2 and 0 in dims and any(isinstance(dim, Course) for dim in dims):
        (course,) = (dim for dim in dims if isinstance(dim, Course))
        mixed = WatchedLayer(capture, layer, is_spread=True, is_mixed=True, course=course)
        capture.register(mixed)
    elif shared := _num_dims_of_shared(layer, of_calls, num_dims):
        capture.register(PartlyBackwardPerSample(capture, layer, shared))
    else:
        capture.register(BackwardPerSample(capture, layer))


def _register_without_rule(capture: Capture, captured: ExpandedLayer, dims: set[SampleDim]) -> None:
    courses = [dim for dim in dims if isinstance(dim, Course)]
    if courses and len(dims) == 1:
        (captured.course,) = courses
    elif dims == {0} and _runs_recurrence(captured):
        capture.register(RecurrentLayer(capture, captured.layer))
    elif dims == {0} and _runs_attention(captured):
        capture.register(AttentionLayer(capture, captured.layer))
    elif UNKNOWN in dims or courses:
        capture.register(BackwardPerSample(capture, captured.layer))


def _register_alike(capture: Capture, captured: CapturedLayer, dim: SampleDim) -> None:
    """Register a layer all of whose calls have the samples alike."""
    layer = captured.layer
    if isinstance(dim, Course):
        capture.register(WatchedLayer(capture, layer, is_spread=True, course=dim))
    elif dim in (SHARED, ROWS):
        capture.register(WatchedLayer(capture, layer, is_spread=True))
    elif dim == UNKNOWN:
        capture.register(BackwardPerSample(capture, layer))
    elif isinstance(dim, int) and dim != 0:
        capture.register(WatchedLayer(capture, layer, sample_dim=dim))


def _num_dims_of_shared(
    layer: Layer, of_calls: list[SampleDim], num_dims: list[int]
) -> frozenset[int]:
    """Numbers of dimensions of inputs that all samples share; none if others have them too."""
    of_samples = {n for dim, n in zip(of_calls, num_dims, strict=True) if dim == 0}
    others = {n for dim, n in zip(of_calls, num_dims, strict=True) if dim != 0}
    is_known = {0} < set(of_calls) <= {0, SHARED, UNKNOWN} and layer.rule in POSITION_WISE
    return frozenset(others if is_known and of_samples.isdisjoint(others) else ())


def _runs_recurrence(captured: ExpandedLayer) -> bool:
    """True if all samples of the layer can run at once by the formulas of `privacy.recurrent`."""
    return not captured.is_grouped and is_recurrent(captured.layer.module)


def _runs_attention(captured: ExpandedLayer) -> bool:
    """True if all samples of the layer can run at once by the formulas of `privacy.attention`:
    what it reads has them where the module itself expects them."""
    if captured.is_grouped or not is_attention(captured.layer.module):
        return False
    dim = 0 if captured.layer.module.batch_first else 1
    return all(of_call.inputs[:3] == (dim,) * 3 for of_call in captured.dims.values())


def _spread_where_faithful(capture: Capture, run: Run, batch: Rows, plain: Observed) -> Observed:
    """Spread shared outputs, if that changes no model output.

    At once or, if the model does not take that, where they meet the samples, of as many layers as
    possible. Layers that read their own rows as well can do the latter only.

    Args:
        plain: a run in which nothing was spread.
    """
    others = {fqn for fqn in plain.dims if fqn not in _may_meet_late(capture, plain)}
    shared = capture.named_on_ranks(plain.dims.keys() - others, others)
    mixed = capture.named_on_ranks({fqn for fqn in shared if 0 in plain.dims.get(fqn, ())})
    at_once = _faithful_run(capture, run, batch, partial(Moving, kept=mixed))
    if at_once is not None and not mixed:
        return at_once
    late = _late_run(capture, run, batch, shared) if shared else None
    if late is None and at_once is not None:
        return at_once
    if late is None and len(shared) > 1:
        alone = [f for f in shared if _late_run(capture, run, batch, [f]) is not None]
        late = _late_run(capture, run, batch, alone) if alone else None
    late = plain if late is None else late
    dims = {
        fqn: [UNKNOWN if dim in (SHARED, ROWS) else dim for dim in of_layer]
        for fqn, of_layer in late.dims.items()
    }
    return replace(late, dims=dims)


def _may_meet_late(capture: Capture, plain: Observed) -> list[str]:
    """Layers that read what all samples share; of those that read their own rows as well, layers
    whose rule takes both."""
    names = []
    for fqn, dims in plain.dims.items():
        kinds = set(dims)
        is_mixed = {0} < kinds <= {0, SHARED, ROWS}
        is_ruled = capture.captured[fqn].layer.rule in POSITION_WISE
        if kinds <= {SHARED, ROWS} or (is_mixed and is_ruled):
            names.append(fqn)
    return names


def _faithful_run(
    capture: Capture, run: Run, batch: Rows, moving: Callable[..., Moving]
) -> Observed | None:
    """A run with the outputs spread of layers that `moving` moves; None if that changes a model
    output.

    Each sample's copy is moved at random. The outputs of the first and the last sample are compared
    with a run in which the shared tensor itself is moved as that sample's copy.
    """
    together = _attempt(capture, run, batch, moving)
    ran = together is not None and len(together.outputs) == len(batch)
    if not capture.on_all_ranks(ran) or together is None:
        return None
    is_faithful = True
    for sample in (0, len(batch) - 1):
        alone = _attempt(capture, run, batch, partial(moving, sample=sample))
        is_faithful &= alone is not None and is_same_run(
            together.outputs[sample], alone.outputs[sample]
        )
    return together if capture.on_all_ranks(is_faithful) else None


def _attempt(
    capture: Capture, run: Run, batch: Rows, moving: Callable[..., Moving]
) -> Observed | None:
    try:
        # Without dropout, whose masks would depend on the shared tensor's shape.
        with in_eval_mode(capture.model):
            observed = observe(capture, run, batch, moving)
        # Rows that have not met the samples are no outputs of theirs.
        return None if isinstance(observed.outputs, SharedRows) else observed
    except Exception as error:
        _logger.debug("The model does not run on a copy for each sample: %s", error)
        return None


def _late_run(capture: Capture, run: Run, batch: Rows, fqns: list[str]) -> Observed | None:
    """A run in which the outputs of layers `fqns` have a course to where they meet the samples, in
    place of a dimension; None if the model does not take rows of them."""
    courses = {fqn: Course(fqn) for fqn in fqns}
    late = _faithful_run(capture, run, batch, partial(MovingLate, courses=courses))
    # What has no row for each sample could not be told from the samples' own.
    is_told = late is not None and not any({0, SHARED} <= set(late.dims.get(f, ())) for f in fqns)
    if not capture.on_all_ranks(is_told) or late is None:
        return None
    try:
        with in_eval_mode(capture.model):
            for other in batch.with_other_masks():
                observe(capture, run, other, partial(MovingLate, courses=courses), late)
    except Exception as error:
        _logger.debug("The model does not run on other masks: %s", error)
    for course in courses.values():
        course.is_learning = False
    capture.courses += courses.values()
    dims = {
        fqn: [courses[fqn] if fqn in courses and dim in (SHARED, ROWS) else dim for dim in of_layer]
        for fqn, of_layer in late.dims.items()
    }
    return replace(late, dims=dims)


def _unlike_any_size(capture: Capture, run: Run, batch: Rows) -> int:
    """The next number of samples above the batch's that divides no size of a tensor: of the
    parameters, of the batch, and of what layers read, whatever the number of samples is."""
    sizes = {size for parameter in capture.model.parameters() for size in parameter.shape}
    sizes |= {size for tensor in batch.tensors() for size in tensor.shape}
    first = _dividing_none(sizes, max(len(batch), 2) + 1)
    second = _dividing_none(sizes, first + 1)
    sizes |= sizes_read(capture, run, _of(batch, first)) & sizes_read(
        capture, run, _of(batch, second)
    )
    return _dividing_none(sizes, first)


def _dividing_none(sizes: Set[int], least: int) -> int:
    return next(n for n in count(least) if all(size % n for size in sizes if size))


def _of(batch: Rows, num_samples: int) -> Rows:
    """The batch's samples as often as there shall be samples."""
    return batch.rows(torch.arange(num_samples) % len(batch))
