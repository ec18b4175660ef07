"""Parameters that a module with layers inside applies itself, as a vision transformer its token.

The module runs on each of them expanded to one row per sample, [B, ..., *parameter]; the modules
inside are captured as always. The gradient that autograd forms of the expanded view is the
per-sample gradient. Nothing is copied.

Which form of a view the module takes, if any, is found by trial (`choose_forms`). Of each
candidate, a run on rows that differ is compared with runs on the parameter itself, moved to one
sample's row: not only in the model's outputs, as a new head gives zeros, but also in what every
layer reads.
"""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, filled
from dpsgd_track.privacy.dropout import of_any_samples
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.layers.inventory import Layer, holds_units
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.shared_rows import Course, SharedRows
from dpsgd_track.privacy.trial import (
    KeptBuffers,
    Reader,
    is_same_run,
    kept_random_state,
    random_move,
)

_logger = logging.getLogger(__name__)

IN_PLACE = -1
"""Form of a parameter [1, ...]: [B, ...]."""
LATE = -2
"""Form of a parameter that meets the samples late: a row for each (`privacy.shared_rows`)."""
_MOST_BROADCAST = 3
"""Dimensions of size 1 that are tried between the samples' and the parameter's own."""

Form = int | Course
"""IN_PLACE, the number of dimensions of size 1 after the samples', LATE in a trial, or the course
to where it meets the samples."""
_Key = tuple[str, str]
"""A layer's fully qualified name, and the parameter's name in it."""


class SpreadParameters(CapturedLayer):
    """Runs a module on its own parameters expanded over samples."""

    def __init__(
        self,
        capture: Capture,
        layer: Layer,
        forms: Mapping[str, Form] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            forms: that of each trainable parameter, by its name in the module; none before a
                trial.
        """
        super().__init__(capture, layer)
        self.forms = dict(forms)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""
        capture = self.capture
        assert capture.num_samples is not None
        views = {
            name: expanded(leaf, capture.num_samples, self.forms[name])
            for name, leaf in self.leaves().items()
        }
        if capture.open_call(self.layer):
            for name, view in views.items():
                capture.note_view(self.layer, name, view)
        placed = {name: self._placed(view, name) for name, view in views.items()}
        try:
            with filled(self.slots, placed):
                return self.original(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, TypeError) as error:
            names = ", ".join(sorted(self.layer.names.values()))
            raise ValueError(
                f"{names}: expected the operations of the first batch, which take a row for each "
                f"sample, got others ({' '.join(str(error).split())}). Use the parameter as in the "
                "first batch, make the model private again before that changes, or freeze it."
            ) from error

    def stand_in(self, num_samples: int) -> ReplacedForward:
        """Runs the module the same way where nothing is captured."""

        def place(key: _Key, parameter: Tensor) -> Tensor:
            name = key[1]
            return self._placed(expanded(parameter, num_samples, self.forms[name]), name)

        return _Placing(self, place)

    def _placed(self, view: Tensor, name: str) -> Tensor:
        form = self.forms[name]
        if not isinstance(form, Course):
            return view
        # The row of a single sample is what all samples share.
        return view[0] if len(view) == 1 else SharedRows(view, form)


def expanded(parameter: Tensor, num_samples: int, form: Form) -> Tensor:
    """[B, ..., *parameter] in a form, without copies; [B, *parameter] for one that meets the
    samples late."""
    if isinstance(form, Course) or form == LATE:
        return parameter.expand(num_samples, *parameter.shape)
    if form == IN_PLACE:
        return parameter.expand(num_samples, *parameter.shape[1:])
    return parameter.expand(num_samples, *[1] * form, *parameter.shape)


def choose_forms(
    capture: Capture, run: Callable[[Any], Tensor], batch: Any
) -> dict[str, dict[str, Form]]:
    """Form of each bare parameter, by layer; strays that take no form are left out, and layers with
    a parameter of their own that takes none.

    Args:
        run: the model's outputs.
        batch: one whose number of samples is the size of no other dimension.
    """
    trial = _Trial(capture, run, batch)
    forms = _choose_forms(trial)
    num_parameters = sum(len(captured.layer.names) for captured in trial.bare)
    if _num_forms(forms) < num_parameters and trial.is_random():
        # Where rows draw other masks than one parameter for all does, or none are known.
        with in_eval_mode(capture.model):
            without_masks = _choose_forms(trial)
        if _num_forms(without_masks) > _num_forms(forms):
            forms = without_masks
    courses = [form for of in forms.values() for form in of.values() if isinstance(form, Course)]
    for course in courses:
        course.is_learning = False
    capture.courses += courses
    return forms


def _num_forms(forms: Mapping[str, Mapping[str, Form]]) -> int:
    return sum(map(len, forms.values()))


def _choose_forms(trial: _Trial) -> dict[str, dict[str, Form]]:
    chosen: dict[_Key, Form] = {}
    for keys in trial.alike().values():
        for form in trial.candidates(keys[0]):
            if trial.is_faithful(dict.fromkeys(keys, form)):
                chosen |= dict.fromkeys(keys, form)
                break
    by_layer: dict[str, dict[str, Form]] = {}
    for captured in trial.bare:
        layer = captured.layer
        forms = {name: chosen.get((layer.fqn, name)) for name in layer.names}
        found = {name: form for name, form in forms.items() if form is not None}
        if found and forms.keys() - found.keys() <= layer.strays:
            by_layer[layer.fqn] = found
    together = {(fqn, name): f for fqn, forms in by_layer.items() for name, f in forms.items()}
    if not together or not trial.agrees(together):
        return {}
    return {
        fqn: {name: trial.courses[fqn, name] if form == LATE else form for name, form in of.items()}
        for fqn, of in by_layer.items()
    }


@dataclass(frozen=True)
class _Seen:
    """Rows of the first and the last sample, in what layers read in a run and in its outputs."""

    rows: list[tuple[str, Tensor]] = field(default_factory=list)

    def note(self, fqn: str, value: Any, num_samples: int) -> None:
        for x in pytree.tree_leaves(value):
            if isinstance(x, Tensor) and x.is_floating_point() and num_samples in x.shape:
                dim = x.shape.index(num_samples)
                self.rows.append((fqn, x.movedim(dim, 0)[[0, -1]].clone()))

    def agrees(self, other: _Seen, row: int) -> bool:
        """True if one sample's rows are the same up to rounding."""
        if [fqn for fqn, _ in self.rows] != [fqn for fqn, _ in other.rows]:
            return False
        return all(
            is_same_run(a[row], b[row])
            for (_, a), (_, b) in zip(self.rows, other.rows, strict=True)
        )


class _Trial:
    """Runs of a model on moved parameters."""

    def __init__(self, capture: Capture, run: Callable[[Any], Tensor], batch: Any) -> None:
        self.capture, self.run, self.batch = capture, run, batch
        self.bare = [c for c in capture.captured.values() if c.layer.is_bare]
        self.courses: dict[_Key, Course] = {}
        """Of parameters in the form LATE."""
        self._buffers = KeptBuffers(capture.model)

    def alike(self) -> dict[object, list[_Key]]:
        """Bare parameters in groups: those of the same name in modules of the same class."""
        groups: dict[object, list[_Key]] = defaultdict(list)
        for captured in self.bare:
            for local, name in captured.layer.names.items():
                shape = self.capture.shapes[name]
                kind = (type(captured.module), local, len(shape), shape[:1] == (1,))
                groups[kind].append((captured.layer.fqn, local))
        return groups

    def candidates(self, key: _Key) -> list[Form]:
        """Forms to try of a parameter."""
        fqn, local = key
        shape = self.capture.shapes[self.capture.captured[fqn].layer.names[local]]
        forms = [*([IN_PLACE] if shape[:1] == (1,) else []), *range(_MOST_BROADCAST + 1)]
        # Smaller modules run on copies as a whole, other uses of the parameters inside them too.
        layer = self.capture.captured[fqn].layer
        holds = holds_units(self.capture.model, layer.module)
        return [*forms, LATE] if holds or local in layer.strays else forms

    def is_random(self) -> bool:
        """True if two runs on the same parameters differ."""
        first, second = (self.seen({}, {}, draws_same=False) for _ in range(2))
        is_same = all(first.agrees(second, row) for row in (0, 1))
        return not self.capture.on_all_ranks(is_same)

    def is_faithful(self, forms: Mapping[_Key, Form]) -> bool:
        """True if the model treats each sample's row as the parameter itself, and it counts."""
        if not self.agrees(forms):
            return False
        if len(forms) == 1:
            return True
        first = self.seen({}, dict.fromkeys(forms, 0))
        others = [self.seen({}, dict.fromkeys(forms, 0) | {key: 1}) for key in forms]
        return self.capture.on_all_ranks(not any(first.agrees(other, 0) for other in others))

    def agrees(self, forms: Mapping[_Key, Form]) -> bool:
        """True if a run on rows that differ gives what runs on each row give, and these differ."""
        # Which of its arguments an operation takes rows of depends on the other forms.
        self.courses.clear()
        together = None
        try:
            together = self.seen(forms, {})
        except Exception as error:
            _logger.debug("The model does not run on a row for each sample: %s", error)
        if not self.capture.on_all_ranks(together is not None) or together is None:
            return False
        apart = [self.seen({}, dict.fromkeys(forms, row)) for row in (0, 1)]
        is_same = all(together.agrees(apart[row], row) for row in (0, 1))
        return self.capture.on_all_ranks(is_same and not apart[0].agrees(apart[1], 0))

    @torch.no_grad()
    def seen(
        self, forms: Mapping[_Key, Form], rows: Mapping[_Key, int], *, draws_same: bool = True
    ) -> _Seen:
        """Run the model with all bare parameters moved.

        Args:
            forms: parameters that have a row for each sample: the first's move in the first row,
                the last's in all others.
            rows: of which of these two moves another parameter has; the first if it is not named.
            draws_same: draw the same random numbers as in other runs.
        """
        seen, num_samples = _Seen(), len(self.batch)

        def place(key: _Key, parameter: Tensor) -> Tensor:
            moved = [
                parameter + random_move(parameter, zlib.crc32(f"{key}{row}".encode()))
                for row in (0, 1)
            ]
            if key not in forms:
                return moved[rows.get(key, 0)]
            views = [expanded(p, num_samples, forms[key]) for p in moved]
            mixed = torch.cat([views[0][:1], views[1][1:]])
            if forms[key] != LATE:
                return mixed
            return SharedRows(mixed, self.courses.setdefault(key, Course(".".join(key))))

        layers: list[ReplacedForward] = [_Placing(c, place) for c in self.bare]
        layers += [
            Reader(c, partial(seen.note, num_samples=num_samples))
            for c in self.capture.captured.values()
            if not c.layer.is_bare
        ]
        draws = kept_random_state(self.batch) if draws_same else nullcontext()
        with draws, of_any_samples(), self.capture.attached(layers):
            try:
                seen.note("", self.run(self.batch), num_samples)
            finally:
                self._buffers.restore()
        return seen


class _Placing(ReplacedForward):
    """Runs a module on other tensors in place of its own parameters."""

    def __init__(self, captured: CapturedLayer, place: Callable[[_Key, Tensor], Tensor]) -> None:
        super().__init__(captured.module)
        self.fqn, self.slots, self.place = captured.layer.fqn, captured.slots, place

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""
        placed = {s.name: self.place((self.fqn, s.name), s.current()) for s in self.slots}
        with filled(self.slots, placed):
            return self.original(*args, **kwargs)
