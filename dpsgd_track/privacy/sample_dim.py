"""Which dimension of a layer's inputs holds the samples: found out, not read off a size.

That a tensor has as many rows as the batch has samples proves nothing: positions [T] have when B
equals T, labels [C] when B equals C. So the model runs once, without gradients, on a batch of
another number of samples, which is equal to no other size there is: the dimension of that size
holds the samples, and a tensor without one is shared by all of them.

A shared input, such as position indices [1, T] that are looked up once and broadcast later, has
outputs whose gradient is the samples' sum. They come apart again where each sample is given a copy
of its own (`captured_layer.spread`), if the model treats the copies as it treats the one: that is
tried, with copies that differ. Where it does not (it takes the first, or adds them up), the layer's
gradients take one backward for each sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.backward_per_sample import BackwardPerSample
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, WatchedLayer, spread
from dpsgd_track.privacy.dropout import of_any_samples
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.expanded import ExpandedLayer, MixedSamplesError
from dpsgd_track.privacy.layers import embedding, layer_norm, linear, rms_norm, transposed_linear
from dpsgd_track.privacy.replaced_forward import ReplacedForward

_logger = logging.getLogger(__name__)

Run = Callable[[Batch], Tensor]
"""The model's outputs of a batch, [B, ...], without gradients."""

_POSITION_WISE = (embedding, layer_norm, linear, rms_norm, transposed_linear)
"""Rules of layers that treat every dimension but the last ones alike."""

SHARED, UNKNOWN = "shared", "unknown"
_Where = int | str
"""The samples' dimension in what a layer read; or that all samples share it; or neither."""


def find_sample_dims(capture: Capture, run: Run, batch: Batch) -> None:
    """Settle how each layer of a capture is captured; the default is samples in dimension 0.

    A model that cannot be run on another number of samples is left as it is: then a layer is
    refused in a batch where its input has another size.

    Args:
        capture: whose layers are to be captured.
        run: runs the model.
        batch: a batch as it comes, of one sample at least.
    Raises:
        ValueError: the samples of a layer cannot be told apart.
    """
    num_samples = _unlike_any_size(capture.model, batch)
    other = batch.resized(num_samples)
    try:
        places, _ = _observe(capture, run, other, _Observer)
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
        return
    if any(SHARED in found for found in places.values()):
        places = _spread_where_faithful(capture, run, other, places)
    for fqn, found in places.items():
        _settle(capture, capture.captured[fqn], set(found))


def _settle(capture: Capture, captured: CapturedLayer, places: set[_Where]) -> None:
    layer = captured.layer
    if places == {0} or (isinstance(captured, ExpandedLayer) and UNKNOWN not in places):
        return
    only = next(iter(places)) if len(places) == 1 else UNKNOWN
    if isinstance(only, int):
        capture.take(WatchedLayer(capture, layer, sample_dim=only))
    elif only == SHARED:
        capture.take(WatchedLayer(capture, layer, is_spread=True))
    else:
        capture.take(BackwardPerSample(capture, layer))


def _spread_where_faithful(
    capture: Capture, run: Run, batch: Batch, places: dict[str, list[_Where]]
) -> dict[str, list[_Where]]:
    """Places of the samples where shared inputs are spread, if outputs stay as they are.

    Copies are moved apart at random. The first and the last sample are held against a run in
    which what all share is moved as theirs.
    """
    try:
        # Without dropout, whose masks would depend on the shape of what all share.
        with in_eval_mode(capture.model):
            spread_places, together = _observe(capture, run, batch, _Spreading)
            is_faithful = len(together) == len(batch)
            for sample in (0, len(batch) - 1):
                _, alone = _observe(capture, run, batch, partial(_Moving, sample=sample))
                is_faithful &= _is_same(together[sample], alone[sample])
    except Exception as error:
        _logger.debug("copies for each sample do not fit the model: %s", error)
        is_faithful = False
    if is_faithful:
        return spread_places
    return {
        fqn: [UNKNOWN if place == SHARED else place for place in found]
        for fqn, found in places.items()
    }


@torch.no_grad()
def _observe(
    capture: Capture,
    run: Run,
    batch: Batch,
    observer: Callable[[CapturedLayer, int], _Observer],
) -> tuple[dict[str, list[_Where]], Tensor]:
    """Where each layer's calls had the samples, and the model's outputs."""
    observers = [observer(captured, len(batch)) for captured in capture.captured.values()]
    with kept_random_state(batch), of_any_samples(), capture.attached(observers):
        outputs = run(batch)
    return {o.captured.layer.fqn: o.places for o in observers if o.places}, outputs


class _Observer(ReplacedForward):
    """A layer that runs as it is, and notes where its inputs have the samples."""

    def __init__(self, captured: CapturedLayer, num_samples: int) -> None:
        super().__init__(captured.module)
        self.captured, self.num_samples = captured, num_samples
        self.places: list[_Where] = []

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns."""
        place = self._place(args, kwargs)
        self.places.append(place)
        output = self.plain(*args, **kwargs)
        return self.of_shared(output) if place == SHARED else output

    def of_shared(self, output: Any) -> Any:
        """What is made of an output that all samples share."""
        return output

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Where:
        captured = self.captured
        captured.plain = self.plain
        rule = captured.layer.rule
        given = [x for x in (*args, *kwargs.values()) if x is not None]
        if rule is not None and len(given) == 1 and isinstance(given[0], Tensor):
            return _place_in(given[0], captured, self.num_samples)
        if not isinstance(captured, ExpandedLayer):
            # A layer with a rule that is called in another way than the rule knows.
            captured = ExpandedLayer(captured.capture, captured.layer)
            captured.plain = self.plain
        copies = {
            name: parameter.detach().expand(self.num_samples, *parameter.shape)
            for name, parameter in self.module.named_parameters()
            if name in captured.layer.names
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
            captured.capture.take(captured)
            self.captured = captured
        return SHARED if dims.is_shared else 0


class _Spreading(_Observer):
    """Gives each sample a copy of its own of what all share, moved at random."""

    def of_shared(self, output: Any) -> Any:
        """[1, ...] or [...] as [B, ...]."""

        def spread_out(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            copies = spread(x, self.num_samples)
            return copies + _moves(copies, len(self.places))

        return pytree.tree_map(spread_out, output)


class _Moving(_Observer):
    """Moves what all samples share as `_Spreading` moves the copy of one sample."""

    def __init__(self, captured: CapturedLayer, num_samples: int, sample: int) -> None:
        super().__init__(captured, num_samples)
        self.sample = sample

    def of_shared(self, output: Any) -> Any:
        """In its own shape."""

        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            moves = _moves(spread(x, self.num_samples), len(self.places))
            return x + moves[self.sample].view(x.shape)

        return pytree.tree_map(move, output)


def _moves(copies: Tensor, call: int) -> Tensor:
    """As large as what is moved, the same at every run."""
    generator = torch.Generator().manual_seed(call)
    scale = copies.float().square().mean().sqrt().clamp(min=0.1)
    moves = torch.randn(copies.shape, generator=generator).to(copies.device) * scale
    return moves.to(copies.dtype)


def _place_in(x: Tensor, captured: CapturedLayer, num_samples: int) -> _Where:
    if num_samples not in x.shape:
        return SHARED
    dim = x.shape.index(num_samples)
    layer = captured.layer
    if dim == 0 or isinstance(captured, ExpandedLayer):
        return dim
    num_features = len(getattr(layer.module, "normalized_shape", (1,)))
    num_positions = x.dim() - (0 if layer.rule is embedding else num_features)
    return dim if layer.rule in _POSITION_WISE and dim < num_positions else UNKNOWN


def _unlike_any_size(model: nn.Module, batch: Batch) -> int:
    """A number of samples, a little above the batch's, that no tensor has as a size."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    sizes |= {size for tensor in batch.tensors() for size in tensor.shape}
    num_samples = max(len(batch), 2) + 1
    while num_samples in sizes:
        num_samples += 1
    return num_samples


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two runs of the same arithmetic gave the same."""
    # Far above rounding, and far below what the moves change.
    tolerance = 0.3 * torch.finfo(a.dtype).eps ** 0.5 if a.is_floating_point() else 0.0
    scale = max(float(b.float().abs().max()), 1e-30) if b.numel() else 1.0
    return torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance * scale, equal_nan=True)


@contextmanager
def kept_random_state(batch: Batch) -> Iterator[None]:
    """Within it random numbers are those that would come next, and afterwards they still are."""
    devices = sorted({t.device.index or 0 for t in batch.tensors() if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield
