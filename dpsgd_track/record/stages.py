"""Names of the stages of a step and of the observables of each, for the whole package."""

from __future__ import annotations

import enum


class Stage(enum.StrEnum):
    """Stages of a step, in order; the values are shown to users."""

    DATA = "data"
    INITIAL_WEIGHTS = "initial weights"
    LOSS = "loss"
    NORMS = "per-sample norms"
    FACTORS = "clip factors"
    SUM = "clipped sum"
    NOISE = "noise"
    UPDATE = "updated weights"


class ObservableName(enum.StrEnum):
    """Observables compared between two runs, in the order in which a step computes them."""

    LOSS = "loss"
    FINAL_LOSS = "final_loss"
    SAMPLE_LOSS = "sample_loss"
    SAMPLE_NORM = "sample_norm"
    SAMPLE_NORM_BY_PARAMETER = "sample_norm_by_parameter"
    CLIP_FACTOR = "clip_factor"
    GRADIENT = "gradient"
    GRAD_NORM = "grad_norm"
    LAYER_GRAD_NORM = "layer_grad_norm"
    NOISE = "noise"
    NOISED_GRADIENT = "noised_gradient"
    GRAD_NORM_NOISED = "grad_norm_noised"
    UPDATE = "update"
    WEIGHTS = "weights"
    LAYER_WEIGHT_NORM = "layer_weight_norm"
