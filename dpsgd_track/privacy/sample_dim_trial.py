"""Trial runs in which each layer's inputs show the dimension of the samples.

What all samples share is a tensor that has no dimension of their number. In some runs the outputs
that are formed from it are given a copy for each sample, moved at random (`Moving`), or a row for
each where they meet the samples (`MovingLate`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.bare_parameters import SpreadParameters
from dpsgd_track.privacy.batch import Rows, tensors_in
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, WatchedLayer, spread
from dpsgd_track.privacy.dropout import of_any_samples
from dpsgd_track.privacy.expanded import ExpandedLayer, Kind, MixedSamplesError, SampleDims
from dpsgd_track.privacy.layers import embedding, layer_norm, linear, rms_norm, transposed_linear
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.shared_rows import Course, SharedRows, rows_of
from dpsgd_track.privacy.trial import Reader, kept_random_state, random_move

_logger = logging.getLogger(__name__)

Run = Callable[[Any], Tensor]
"""The model's outputs of a batch, [B, ...], without gradients."""

POSITION_WISE = (embedding, layer_norm, linear, rms_norm, transposed_linear)
"""Rules of layers that treat all dimensions but the last ones as positions."""

SHARED, ROWS, UNKNOWN = "shared", "rows", "unknown"
SampleDim = int | str | Course
"""The samples' dimension in a layer's input; SHARED if all samples share it, ROWS if it also holds
a row for each (`privacy.shared_rows`), or the course of its output to where it meets the samples;
or UNKNOWN."""


@dataclass(frozen=True)
class Observed:
    """A run of the model, by layer."""

    outputs: Tensor
    """The model's."""
    dims: dict[str, list[SampleDim]]
    """The samples' dimension in each call."""
    num_dims: dict[str, list[int]]
    """Number of dimensions of the first tensor of each call."""
    expanded: dict[str, dict[Kind, SampleDims]]
    """Dimensions that layers without a rule learned, by the kind of a call."""

    def use(self, capture: Capture) -> None:
        """Have layers without a rule go by what they learned in this run."""
        for fqn, dims in self.expanded.items():
            captured = capture.captured[fqn]
            assert isinstance(captured, ExpandedLayer)
            captured.dims = dims


@torch.no_grad()
def observe(
    capture: Capture,
    run: Run,
    batch: Rows,
    observer: Callable[[CapturedLayer, int], Observer],
    before: Observed | None = None,
) -> Observed:
    """Run the model.

    Args:
        before: a run whose knowledge of layers without a rule this one adds to.
    """
    layers = list(capture.captured.values())
    for layer in layers:
        if isinstance(layer, ExpandedLayer):
            layer.dims = {} if before is None else before.expanded.get(layer.layer.fqn, {})
    views = [layer.stand_in(len(batch)) for layer in layers if isinstance(layer, SpreadParameters)]
    observers = [observer(layer, len(batch)) for layer in layers if not layer.layer.is_bare]
    with kept_random_state(batch), of_any_samples(), capture.attached([*views, *observers]):
        outputs = run(batch)
    called = {o.captured.layer.fqn: o for o in observers if o.dims}
    return Observed(
        outputs,
        {fqn: o.dims for fqn, o in called.items()},
        {fqn: o.num_dims for fqn, o in called.items()},
        {f: o.captured.dims for f, o in called.items() if isinstance(o.captured, ExpandedLayer)},
    )


@torch.no_grad()
def sizes_read(capture: Capture, run: Run, batch: Rows) -> set[int]:
    """Sizes of all tensors that layers read in a run."""
    sizes: set[int] = set()

    def note(_: str, arguments: Any) -> None:
        sizes.update(size for x in tensors_in(arguments) for size in x.shape)

    readers = [Reader(layer, note) for layer in capture.captured.values()]
    with kept_random_state(batch), of_any_samples(), capture.attached(readers):
        run(batch)
    return sizes


class Observer(ReplacedForward):
    """Runs a layer as it is, and notes the samples' dimension in its inputs."""

    def __init__(self, captured: CapturedLayer, num_samples: int) -> None:
        super().__init__(captured.module)
        self.captured, self.num_samples = captured, num_samples
        self.dims: list[SampleDim] = []
        self.num_dims: list[int] = []
        """Number of dimensions of the first tensor of each call; -1 without one."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""
        dim = self._sample_dim(args, kwargs)
        self.dims.append(dim)
        tensors = tensors_in((args, kwargs))
        self.num_dims.append(tensors[0].dim() if tensors else -1)
        with self.captured.on_own_parameters():
            output = self.original(*args, **kwargs)
        return self.replace_shared(output) if dim in (SHARED, ROWS) else output

    def replace_shared(self, output: Any) -> Any:
        """Replacement of an output that all samples share; here the output itself."""
        return output

    def _sample_dim(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SampleDim:
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


class Moving(Observer):
    """Moves outputs that all samples share at random, after giving each sample a copy of its own.

    With `sample`, the shared tensor itself is moved, as that sample's copy would be.
    """

    def __init__(
        self,
        captured: CapturedLayer,
        num_samples: int,
        sample: int | None = None,
        kept: Container[str] = (),
    ) -> None:
        """
        Args:
            kept: layers whose outputs stay as they are.
        """
        super().__init__(captured, num_samples)
        self.sample, self.kept = sample, kept

    def replace_shared(self, output: Any) -> Any:
        """[1, ...] or [...] as [B, ...], or in its own shape for one sample."""

        if self.captured.layer.fqn in self.kept:
            return output

        def moved(x: Tensor) -> Tensor:
            copies = spread(x, self.num_samples)
            moves = random_move(copies, len(self.dims))
            return copies + moves if self.sample is None else x + moves[self.sample].view(x.shape)

        return pytree.tree_map_only(Tensor, moved, output)


class MovingLate(Moving):
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


def _sample_dim_of(x: Tensor, captured: CapturedLayer, num_samples: int) -> SampleDim:
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
    return dim if layer.rule in POSITION_WISE and dim < num_positions else UNKNOWN
