"""Tells how the per-sample gradients of each layer are formed, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dpsgd_track.privacy.backward_per_sample import BackwardPerSample, PartlyBackwardPerSample
from dpsgd_track.privacy.bare_parameters import SpreadParameters
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, WatchedLayer
from dpsgd_track.privacy.expanded import ExpandedLayer
from dpsgd_track.privacy.per_sample_weights import RmsNormPerSample
from dpsgd_track.privacy.recurrent import RecurrentLayer

_RULE = "its rule", "as its ordinary gradients", ""
_VIEW = "on its parameters expanded over samples", "memory of its per-sample gradients", ""
_RECURRENCE = "by its formulas, for all samples at once", "a loop over the steps in Python", ""
_COPIES = (
    "on one copy of its parameters for each sample",
    "batched products with each sample's copy",
    "use a layer that has a rule, if it is large",
)
_ONE_BY_ONE = (
    "run one sample after the other, as it can't be vectorised",
    "one forward and backward of the layer for each sample",
    "use a layer that has a rule, or freeze it",
)
_BACKWARDS = (
    "one backward of the model for each sample",
    "a backward of the model for each sample, for all such layers together",
    "give it one row for each sample, such as position ids [B, T], or freeze it",
)
_UNUSED = "not at all, as no loss has depended on it", "", ""
_USED_OTHERWISE = (*_BACKWARDS[:2], "call the module that owns it, or freeze it")


@dataclass(frozen=True)
class LayerAccount:
    """One layer's way to per-sample gradients, which are exact in any case, and its cost."""

    layer: str
    type: str
    rule: str
    """Name of the rule for its type; empty if there is none."""
    way: str
    cost: str
    advice: str
    """Remedy for the cost; empty if none is needed."""


def accounts_of(capture: Capture) -> Iterator[LayerAccount]:
    """One account for each layer, in the order of the model, then one for each other use.

    Before the first batch, that of layers that the samples' dimension decides on is preliminary.
    """
    for fqn, _ in capture.model.named_modules():
        captured = capture.captured.get(fqn)
        if captured is None:
            continue
        rule = captured.layer.rule
        name = getattr(rule, "__name__", "").rpartition(".")[2]
        kind = type(captured.module).__name__
        yield LayerAccount(fqn or "(model)", kind, name, *_way_of(captured, capture))
    for parameter in sorted(capture.used_otherwise or ()):
        yield LayerAccount(parameter, "used by another module", "", *_USED_OTHERWISE)


def _way_of(captured: CapturedLayer, capture: Capture) -> tuple[str, str, str]:
    takes_backwards = not capture.by_sample.isdisjoint(captured.layer.names.values())
    if isinstance(captured, BackwardPerSample):
        is_known = capture.used_otherwise is not None
        return _BACKWARDS if takes_backwards or not is_known else _UNUSED
    if isinstance(captured, PartlyBackwardPerSample) and takes_backwards:
        return _BACKWARDS
    if isinstance(captured, RecurrentLayer):
        return _RECURRENCE
    if isinstance(captured, ExpandedLayer):
        return _COPIES if captured.is_vectorised else _ONE_BY_ONE
    if isinstance(captured, SpreadParameters | RmsNormPerSample):
        return _VIEW
    if isinstance(captured, WatchedLayer) and captured.is_spread:
        return ("its rule, with what all samples share given to each", *_RULE[1:])
    return _RULE
