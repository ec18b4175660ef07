"""Clip factors that follow from a record's own norms, by clipping rule.

The rules are those of `dpsgd_track.privacy.clipping`, written once more: a mistake there is not
repeated here.

Legend: S steps, N samples, P parameters.
"""

from __future__ import annotations

import numpy as np

from dpsgd_track.config import AUTOMATIC, FLAT, PER_LAYER
from dpsgd_track.record.trajectory import Floats, Trajectory

_GAMMA = 0.01

FORMULAS = {
    FLAT: "min(1, C / norm) of the norm",
    AUTOMATIC: "C / (norm + 0.01) of the norm",
    PER_LAYER: "what min(1, C / (sqrt(L) norm)) in each of L layers makes of the norms",
}
"""Each rule, as the beginning of `that the mode itself reports`."""


def factors_by(rule: str, t: Trajectory) -> Floats:
    """[S, N] length of each sample's contribution over its norm; NaN where a norm is unknown."""
    bound = t.max_grad_norm[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if rule == AUTOMATIC:
            return np.asarray(bound / (t.sample_norm + _GAMMA))
        if rule == FLAT:
            return np.asarray(np.minimum(1.0, bound / t.sample_norm))
        of_layers, share = _by_layer(t)
        added = np.sqrt(np.minimum(of_layers, share).sum(axis=2))
        is_whole = (of_layers <= share).all(axis=2)
        return np.where(is_whole, 1.0, added / np.sqrt(of_layers.sum(axis=2)))


def clipped_share(rule: str, t: Trajectory) -> Floats:
    """[S] share of the samples that are clipped; of their layers' parts, if each has a bound."""
    if rule != PER_LAYER:
        return t.clip_fraction
    of_layers, share = _by_layer(t)
    return np.asarray((of_layers > share).mean(axis=(1, 2)))


def _by_layer(t: Trajectory) -> tuple[Floats, Floats]:
    """[S, N, L] squared norms, and [S, 1, 1] squared bound of each layer."""
    names = [str(name).rpartition(".")[0] for name in t.parameter_names]
    layers, squares = sorted(set(names)), np.square(t.sample_norm_by_parameter)
    of_layers = [squares[:, :, [own == layer for own in names]].sum(axis=2) for layer in layers]
    return np.stack(of_layers, axis=2), np.square(t.max_grad_norm)[:, None, None] / len(layers)
