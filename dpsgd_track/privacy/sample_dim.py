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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.backward_per_sample import BackwardPerSample
from dpsgd_track.privacy.bare_parameters import Form, SpreadParameters, choose_forms
from dpsgd_track.privacy.batch import RepeatableBatch, Rows
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, WatchedLayer, spread
from dpsgd_track.privacy.dropout import of_any_samples
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.expanded import ExpandedLayer, Kind, MixedSamplesError, SampleDims
from dpsgd_track.privacy.grouped_rows import find_grouped
from dpsgd_track.privacy.layers import embedding, layer_norm, linear, rms_norm, transposed_linear
from dpsgd_track.privacy.layers.inventory import (
    Layer,
    holds_units,
    is_recurrent,
    with_modules_inside,
)
from dpsgd_track.privacy.recurrent import RecurrentLayer
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.shared_rows import Course, SharedRows, rows_of
from dpsgd_track.privacy.stray_parameters import add_strays, find_strays
from dpsgd_track.privacy.trial import is_same_run, random_move

_logger = logging.getLogger(__name__)

Run = Callable[[Any], Tensor]
"""The model's outputs of a batch, [B, ...], without gradients."""

_POSITION_WISE = (embedding, layer_norm, linear, rms_norm, transposed_linear)
"""Rules of layers that treat all dimensions but the last ones as positions."""

SHARED, ROWS, UNKNOWN = "shared", "rows", "unknown"
_SampleDim = int | str | Course
"""The samples' dimension in a layer's input; SHARED if all samples share it, ROWS if it also holds
a row for each (`privacy.shared_rows`), or the course of its output to where it meets the samples;
or UNKNOWN."""


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
    num_samples = _unlike_any_size(capture.model, batch)
    other = batch.rows(torch.arange(num_samples) % len(batch))
    try:
        _place_bare(capture, run, other)
        _place_grouped(capture, run, batch, num_samples)
        dims, _ = _observe(capture, run, other, _Observer)
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
    if any(dim in (SHARED, ROWS) for dims_of_layer in dims.values() for dim in dims_of_layer):
        dims = _spread_where_faithful(capture, run, other, dims)
    for fqn, dims_of_layer in dims.items():
        _register(capture, capture.captured[fqn], set(dims_of_layer))


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
    """Give parameters of other modules that take no form back to these.

    Args:
        before: layers that had such parameters as their own.
    """
    given_back: set[str] = set()
    for captured in list(_bare(capture)):
        layer = captured.layer
        if not layer.strays:
            continue
        kept = {n: name for n, name in layer.names.items() if n not in layer.strays}
        kept |= {n: layer.names[n] for n in forms.get(layer.fqn, {})}
        given_back |= set(layer.names.values()) - set(kept.values())
        del capture.captured[layer.fqn]
        if kept:
            left = replace(layer, names=kept, strays=layer.strays & kept.keys())
            capture.register(SpreadParameters(capture, left))
    for fqn, captured in before.items():
        if not given_back.isdisjoint(captured.layer.names.values()):
            capture.register(captured)
            forms.pop(fqn, None)


def _place_grouped(capture: Capture, run: Run, batch: Rows, num_samples: int) -> None:
    """Have layers that read several rows of each sample, one sample after the other, know it."""
    steps = torch.arange(num_samples)
    samples, reordered = (batch.rows(i % len(batch)) for i in (steps, steps.roll(1)))
    with kept_random_state(batch), of_any_samples():
        grouped = find_grouped(capture, run, samples, reordered)
    for fqn in grouped:
        captured = capture.captured[fqn]
        if isinstance(captured, ExpandedLayer):
            captured.is_grouped = True
        elif captured.layer.rule is not None:
            capture.register(WatchedLayer(capture, captured.layer, is_grouped=True))


def _bare(capture: Capture) -> Iterator[CapturedLayer]:
    return (captured for captured in capture.captured.values() if captured.layer.is_bare)


def _register(capture: Capture, captured: CapturedLayer, dims: set[_SampleDim]) -> None:
    layer = captured.layer
    if isinstance(captured, ExpandedLayer) and len(dims) == 1:
        (only,) = dims
        if isinstance(only, Course):
            captured.course = only
            return
    if dims == {0} and _runs_recurrence(captured):
        capture.register(RecurrentLayer(capture, layer))
        return
    if dims == {0} or (isinstance(captured, ExpandedLayer) and UNKNOWN not in dims):
        return
    courses = [dim for dim in dims if isinstance(dim, Course)]
    if courses and dims == {0, *courses}:
        (course,) = courses
        mixed = WatchedLayer(capture, layer, is_spread=True, is_mixed=True, course=course)
        capture.register(mixed)
        return
    dim = dims.pop() if len(dims) == 1 else UNKNOWN
    if isinstance(dim, int):
        capture.register(WatchedLayer(capture, layer, sample_dim=dim))
    elif dim in (SHARED, ROWS):
        capture.register(WatchedLayer(capture, layer, is_spread=True))
    elif isinstance(dim, Course):
        capture.register(WatchedLayer(capture, layer, is_spread=True, course=dim))
    else:
        capture.register(BackwardPerSample(capture, layer))


def _runs_recurrence(captured: CapturedLayer) -> bool:
    """True if all samples of the layer can run at once by the formulas of `privacy.recurrent`."""
    is_expanded = isinstance(captured, ExpandedLayer) and not captured.is_grouped
    return is_expanded and is_recurrent(captured.layer.module)


def _spread_where_faithful(
    capture: Capture, run: Run, batch: Rows, dims: dict[str, list[_SampleDim]]
) -> dict[str, list[_SampleDim]]:
    """Dimensions of the samples with shared outputs spread, if that changes no model output.

    At once or, if the model does not take that, where they meet the samples, of as many layers as
    possible.
    """
    shared = [fqn for fqn, of in dims.items() if _may_meet_late(capture.captured[fqn].layer, of)]
    at_once = _faithful_dims(capture, run, batch, _Moving)
    if at_once is not None and not any(0 in dims[fqn] for fqn in shared):
        return at_once
    late = _late_where_faithful(capture, run, batch, shared) if shared else None
    if late is None and len(shared) > 1:
        alone = [f for f in shared if _late_where_faithful(capture, run, batch, [f]) is not None]
        shared = alone
        late = _late_where_faithful(capture, run, batch, shared) if shared else None
    late = late or {}
    if at_once is not None and len(late) < len(shared):
        return at_once
    return {
        fqn: late.get(fqn) or [UNKNOWN if dim in (SHARED, ROWS) else dim for dim in of_layer]
        for fqn, of_layer in dims.items()
    }


def _may_meet_late(layer: Layer, dims: list[_SampleDim]) -> bool:
    """True if a layer reads what all samples share; of layers that read their own rows as well,
    those whose rule takes both."""
    kinds = set(dims)
    if kinds <= {SHARED, ROWS}:
        return True
    is_mixed = {0} < kinds <= {0, SHARED, ROWS}
    return is_mixed and layer.rule in _POSITION_WISE


def _faithful_dims(
    capture: Capture, run: Run, batch: Rows, moving: Callable[..., _Moving]
) -> dict[str, list[_SampleDim]] | None:
    """Dimensions of the samples with the outputs spread of layers that `moving` moves; None if that
    changes a model output.

    Each sample's copy is moved at random. The outputs of the first and the last sample are compared
    with a run in which the shared tensor itself is moved as that sample's copy.
    """
    expanded = [c for c in capture.captured.values() if isinstance(c, ExpandedLayer)]
    before, learned = [captured.dims for captured in expanded], []
    try:
        # Without dropout, whose masks would depend on the shared tensor's shape.
        with in_eval_mode(capture.model):
            _set_dims(expanded, [{} for _ in expanded])
            spread_dims, together = _observe(capture, run, batch, moving)
            learned = [captured.dims for captured in expanded]
            _set_dims(expanded, [{} for _ in expanded])
            is_faithful = len(together) == len(batch)
            for sample in (0, len(batch) - 1):
                _, alone = _observe(capture, run, batch, partial(moving, sample=sample))
                is_faithful &= is_same_run(together[sample], alone[sample])
    except Exception as error:
        _logger.debug("The model does not run on a copy for each sample: %s", error)
        is_faithful = False
    # Of what they read once the outputs are spread.
    _set_dims(expanded, learned if is_faithful else before)
    return spread_dims if is_faithful else None


def _set_dims(expanded: list[ExpandedLayer], dims: list[dict[Kind, SampleDims]]) -> None:
    for captured, learned in zip(expanded, dims, strict=True):
        captured.dims = learned


def _late_where_faithful(
    capture: Capture, run: Run, batch: Rows, fqns: list[str]
) -> dict[str, list[_SampleDim]] | None:
    """Course of the outputs of layers `fqns` to where they meet the samples; None if the model does
    not take rows of them."""
    courses = {fqn: Course(fqn) for fqn in fqns}
    dims = _faithful_dims(capture, run, batch, partial(_MovingLate, courses=courses))
    if dims is None or any({0, SHARED} <= set(dims[fqn]) for fqn in fqns):
        return None
    try:
        with in_eval_mode(capture.model):
            for other in batch.with_other_masks():
                _observe(capture, run, other, partial(_MovingLate, courses=courses))
    except Exception as error:
        _logger.debug("The model does not run on other masks: %s", error)
    for course in courses.values():
        course.is_learning = False
    capture.courses += courses.values()
    return {f: [course, 0] if 0 in dims[f] else [course] for f, course in courses.items()}


@torch.no_grad()
def _observe(
    capture: Capture,
    run: Run,
    batch: Rows,
    observer: Callable[[CapturedLayer, int], _Observer],
) -> tuple[dict[str, list[_SampleDim]], Tensor]:
    """The samples' dimension in each call of each layer, and the model's outputs."""
    layers = list(capture.captured.values())
    views = [layer.stand_in(len(batch)) for layer in layers if isinstance(layer, SpreadParameters)]
    observers = [observer(layer, len(batch)) for layer in layers if not layer.layer.is_bare]
    with kept_random_state(batch), of_any_samples(), capture.attached([*views, *observers]):
        outputs = run(batch)
    return {o.captured.layer.fqn: o.dims for o in observers if o.dims}, outputs


class _Observer(ReplacedForward):
    """Runs a layer as it is, and notes the samples' dimension in its inputs."""

    def __init__(self, captured: CapturedLayer, num_samples: int) -> None:
        super().__init__(captured.module)
        self.captured, self.num_samples = captured, num_samples
        self.dims: list[_SampleDim] = []

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""
        dim = self._sample_dim(args, kwargs)
        self.dims.append(dim)
        with self.captured.on_own_parameters():
            output = self.original(*args, **kwargs)
        return self.replace_shared(output) if dim in (SHARED, ROWS) else output

    def replace_shared(self, output: Any) -> Any:
        """Replacement of an output that all samples share; here the output itself."""
        return output

    def _sample_dim(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _SampleDim:
        captured = self.captured
        if isinstance(captured, WatchedLayer) and captured.is_grouped:
            return 0
        captured.original = self.original
        rule = captured.layer.rule
        given = [x for x in (*args, *kwargs.values()) if x is not None]
        if rule is not None and len(given) == 1 and isinstance(given[0], Tensor):
            return _sample_dim_of(given[0], captured, self.num_samples)
        if not isinstance(captured, ExpandedLayer):
            # A layer whose rule does not cover such a call.
            captured = ExpandedLayer(captured.capture, captured.layer)
            captured.original = self.original
        copies = {
            slot.name: slot.current().detach().expand(self.num_samples, *slot.current().shape)
            for slot in captured.slots
        }
        try:
            dims = captured.learn(copies, args, kwargs)
        except MixedSamplesError:
            raise
        except Exception as error:
            _logger.debug("%s cannot be run sample by sample: %s", captured.layer.fqn, error)
            return UNKNOWN
        if dims is None:
            return UNKNOWN
        if captured is not self.captured:
            captured.capture.register(captured)
            self.captured = captured
        return SHARED if dims.is_shared else 0


class _Moving(_Observer):
    """Moves outputs that all samples share at random, after giving each sample a copy of its own.

    With `sample`, the shared tensor itself is moved, as that sample's copy would be.
    """

    def __init__(
        self, captured: CapturedLayer, num_samples: int, sample: int | None = None
    ) -> None:
        super().__init__(captured, num_samples)
        self.sample = sample

    def replace_shared(self, output: Any) -> Any:
        """[1, ...] or [...] as [B, ...], or in its own shape for one sample."""

        def moved(x: Tensor) -> Tensor:
            copies = spread(x, self.num_samples)
            moves = random_move(copies, len(self.dims))
            return copies + moves if self.sample is None else x + moves[self.sample].view(x.shape)

        return pytree.tree_map_only(Tensor, moved, output)


class _MovingLate(_Moving):
    """Moves what all samples share at random, where it meets the samples (`privacy.shared_rows`).

    With `sample`, the shared tensor itself is moved, as that sample's row would be.
    """

    def __init__(
        self,
        captured: CapturedLayer,
        num_samples: int,
        courses: dict[str, Course],
        sample: int | None = None,
    ) -> None:
        super().__init__(captured, num_samples, sample)
        self.course = courses.get(captured.layer.fqn)

    def replace_shared(self, output: Any) -> Any:
        """A row for each sample of a layer's output, if it has a course."""
        course = self.course
        if course is None:
            return output

        def moved(x: Tensor) -> Tensor:
            rows: Tensor = rows_of(x)
            if rows is x:
                rows = x.expand(self.num_samples, *x.shape)
            # Not on the scale of the rows, which an earlier layer may have moved.
            moves = torch.zeros_like(rows)
            if rows.is_floating_point():
                moves = random_move(torch.ones_like(rows), len(self.dims))
            if self.sample is not None:
                return x + moves[self.sample]
            return SharedRows(rows + moves, course)

        return pytree.tree_map_only(Tensor, moved, output)


def _sample_dim_of(x: Tensor, captured: CapturedLayer, num_samples: int) -> _SampleDim:
    if isinstance(x, SharedRows):
        return ROWS
    if num_samples not in x.shape:
        return SHARED
    dim = x.shape.index(num_samples)
    layer = captured.layer
    if dim == 0 or isinstance(captured, ExpandedLayer):
        return dim
    num_features = len(getattr(layer.module, "normalized_shape", (1,)))
    num_positions = x.dim() - (0 if layer.rule is embedding else num_features)
    return dim if layer.rule in _POSITION_WISE and dim < num_positions else UNKNOWN


def _unlike_any_size(model: nn.Module, batch: Rows) -> int:
    """The next number of samples above the batch's that divides no tensor's size."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    sizes |= {size for tensor in batch.tensors() for size in tensor.shape}
    num_samples = max(len(batch), 2) + 1
    while any(size and size % num_samples == 0 for size in sizes):
        num_samples += 1
    return num_samples


@contextmanager
def kept_random_state(batch: Rows) -> Iterator[None]:
    """Draw the random numbers that come next, or that the batch has drawn before; restore the
    generators afterwards."""
    devices = sorted({t.device.index or 0 for t in batch.tensors() if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        if isinstance(batch, RepeatableBatch):
            batch.restore_random_state()
        yield
