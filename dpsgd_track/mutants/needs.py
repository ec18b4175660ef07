"""Conditions that a test must meet for a mutant to show."""

from __future__ import annotations

import enum


class Need(enum.StrEnum):
    """A condition, in the words that are displayed."""

    RANKS = "several ranks"
    UNEQUAL_RANKS = "several ranks that hold unequal numbers of samples"
    MORE_RANKS_THAN_ROWS = "more ranks than a parameter has rows"
    SHARDS = "shards"
    LONG_SHARDS = "shards longer than a block"
    OTHER_DATA = "other data on each"
    UNDIVIDED_ROWS = "rows that they do not divide"
    IDLE_RANK = "a rank without samples"
    EMPTY_STEP = "an empty step"

    STEPS = "several steps"
    MICRO_BATCHES = "several micro-batches"
    UNEQUAL_BATCHES = "batches of unequal size"
    SHORT_MICRO_BATCH = "a micro-batch that is not full"
    LONE_SAMPLE = "a micro-batch of one sample"
    SAMPLES = "several samples"
    IGNORED_TARGETS = "targets that are ignored"
    UNEQUAL_TARGETS = "samples with unequal numbers of targets"
    FULL_SAMPLE = "a sample that fills all positions"
    REPEATED_TOKENS = "tokens that repeat"
    PADDING_TAKES_PART = "padding that takes part"

    POSITIONS = "several positions"
    POSITIONS_PAST_TILE = "more positions than a tile has"
    POSITIONS_UNDIVIDED = "positions that a tile does not divide"
    SIZES_PAST_TILE = "sizes one past a tile"
    POSITION_INPUT = "a model that takes positions"
    BIASED_LINEAR = "a biased linear layer"
    LAYER_NORM = "LayerNorm"
    RMS_NORM = "RMSNorm"
    TRAINED_EMBEDDING = "an embedding that is trained"
    PADDING_INDEX = "a padding index"
    TIED_HEAD = "a tied head"
    REUSED_MODULE = "a module used twice"
    LAYER_BELOW = "a layer below"
    SQUARE_WEIGHT = "a square weight"
    LAYERS_OF_ONE_SHAPE = "two layers of one shape"
    PARAMETERS = "several parameters"
    MANY_PARAMETERS = "many parameters"
    PARAMETERS_OF_ONE_SHAPE = "two parameters of one shape"
    UNUSED_PARAMETER = "a parameter that is not used"

    MASK = "a mask that the model uses"
    LEFT_PADDING = "padding on the left"
    LATE_STEP = "a step after the fifth"

    CLIPPING = "clipping"
    SAMPLE_AT_BOUND = "a sample exactly at C"
    BOUND_BELOW_PARAMETERS = "a C below the norm of a parameter's gradient"
    MIXED = "samples that C clips beside samples that it spares"
    SPARED_SAMPLE = "a sample that C spares"
    CHANGING_BOUND = "a C that changes"
    BOUND_NOT_1 = "C other than 1"
    NOISE = "noise"
    OWN_NOISE = "noise of the mode's own"
    MILLION_DRAWS = "a million elements of noise"
    SHARED_NOISE = "noise that other modes share"
    STD_NOT_1 = "sigma C other than 1"
    TRAINING = "a learning rate above 0"

    NORMS_AFTER_STEP = "norms that are read after the step"
    DIRECTIONS = "a comparison of directions"
    FLOAT32 = "float32"
    FINE_LOSS = "float32, or a loss that is compared to 1e-3"
    FINE_NORMS = "float32, or norms that are compared to 1e-3"
    FINE_GRADIENTS = "float32, or gradients that are compared to 1e-3"


OF_RANKS = frozenset({Need.RANKS, Need.UNEQUAL_RANKS, Need.MORE_RANKS_THAN_ROWS})
"""Conditions that only a run with several ranks meets."""
