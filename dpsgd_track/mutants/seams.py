"""Seams: the named places of a step where mutants are planted."""

from __future__ import annotations

import enum

MODE, ENGINE = "mode", "engine"
_PROTOCOL = "dpsgd_track.modes.protocol"
_NOISE = "dpsgd_track.privacy.noise"
_LAYERS = "dpsgd_track.privacy.layers"
_TERMS = "dpsgd_track.privacy.terms"
_CLIPPING = "dpsgd_track.privacy.engine"
_REDUCTION = "dpsgd_track.distributed.reduction"


class Seam(enum.Enum):
    """A replaceable attribute of the mode, of its engine, or of a module."""

    # Every mode has these: methods of the protocol, and the noise source of `Mode.privatize`.
    ACCUMULATE = MODE, "accumulate"
    SET_MAX_GRAD_NORM = MODE, "set_max_grad_norm"
    CLIPPED_SUM = MODE, "clipped_sum"
    PRIVATIZE = MODE, "privatize"
    STEP = MODE, "step"
    ZERO_GRAD = MODE, "zero_grad"
    ADD_NOISE = _PROTOCOL, "add_noise"
    STANDARD_NORMAL = _NOISE, "NoiseSource.standard_normal"

    # Modes that run on the package's own engine also have these.
    LOSS = ENGINE, "loss"
    RUN_NORMS = ENGINE, "capture.run_norms"
    NORM_SQ_OF = ENGINE, "capture.norms_of"
    CLIP = ENGINE, "clip"
    SUM_OF = ENGINE, "capture.sums_of"
    PUT = ENGINE, "put"
    LINEAR_TERMS = _LAYERS, "linear.terms"
    EMBEDDING_TERMS = _LAYERS, "embedding.terms"
    LAYER_NORM_TERMS = _LAYERS, "layer_norm.terms"
    RMS_NORM_TERMS = _LAYERS, "rms_norm.terms"
    FUSED_BACKWARD = "dpsgd_track.privacy.fused_linear", "_FusedLinear.backward"
    JOIN = "dpsgd_track.privacy.capture", "join"
    ROWS_NORM_SQ = _TERMS, "Rows.norm_sq"
    ROWS_SUM = _TERMS, "Rows.clipped_sum"
    TOTAL_NORM = _CLIPPING, "total_norm"
    CLIP_FACTORS = _CLIPPING, "clip_factors"
    REDUCE_SCATTER = _REDUCTION, "_reduce_scatter"
    PADDED_ROWS = _REDUCTION, "_padded_rows"

    def __init__(self, root: str, path: str) -> None:
        self.root = root
        """Root of `path`: MODE, ENGINE or a module."""
        self.path = path

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def is_of_every_mode(self) -> bool:
        """True if modes that do not run on the package's own engine have it, too."""
        return self.root in (MODE, _PROTOCOL, _NOISE)
