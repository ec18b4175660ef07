"""Right gradients and norms as known mistakes change them: names for records of both halves.

A record holds one value for each member, in order. New members go to the end: a record of an
earlier version has fewer of them.
"""

from __future__ import annotations

import enum


class NormFormula(enum.StrEnum):
    """A wrong formula for the norm of one parameter's per-sample gradient, in words.

    g_t is a position's share of the gradient g, x_t the layer's input and dy_t the gradient of its
    output there. The reference records the value of each formula beside the norm.
    """

    POSITIONS_APART = (
        "sqrt(sum_t |g_t|^2) in place of |sum_t g_t|: the cross terms of positions are missing"
    )
    USES_APART = (
        "sqrt(|g_1|^2 + |g_2|^2) in place of |g_1 + g_2| of a parameter that is used twice: the "
        "cross term of the uses is missing"
    )
    CROSS_TERM_ONCE = (
        "with the cross term of its two uses, 2 <g_1, g_2>, counted once rather than twice"
    )
    FIRST_USE = "of its first use alone, though it is used more than once"
    LAST_USE = "of its last use alone, though it is used more than once"
    SUMMED_FIRST = (
        "|sum_t dy_t| |sum_t x_t| in place of |sum_t dy_t x_t^T|: positions are summed first"
    )
    GRAM = "|G G^T|_F of the positions' gradients G in place of |sum_t g_t|"
    ROOT_OF_GRAM = (
        "sqrt(|G G^T|_F) of the positions' gradients G, the Gram matrix, in place of |sum_t g_t|"
    )
    RAW_INPUT = "computed from the layer's raw input rather than its normalised input"
    TOKENS_APART = (
        "sqrt(sum_t |dy_t|^2) of an embedding's rows: squares are taken before the gradients of "
        "equal tokens are added"
    )
    PADDING_COUNTED = "with the row of the padding index counted"
    OWN_ROWS = "of the rank's own shard (its rows) alone, not added up over ranks"
    LAST_ROW_LOST = "without the last row of the gradient"
    LAST_COLUMN_LOST = "without the last column of the gradient"
    FIRST_POSITION_LOST = "without the first position"
    LAST_POSITION_LOST = "without the last position"
    SUM_OF_ABSOLUTES = "the sum of absolute values (L1) rather than the L2 norm"
    LARGEST_ELEMENT = "the largest absolute value rather than the L2 norm"
    ROOT_MEAN_SQUARE = "the root of the mean square of its elements rather than of their sum"
    SQUARES_IN_FLOAT16 = "with squares taken in float16, where small ones vanish"
    LAST_USE_TWICE = "with the square of its last use counted twice"
    LAST_TWO_POSITIONS_LOST = "without the last two positions"
    BY_FREQUENCY = "with each row divided by how often its token occurs (scale_grad_by_freq)"
    TAIL_OF_4_LOST = "without the positions after the last full tile of 4"
    TILES_OF_4_ONCE = "with cross terms between tiles of 4 positions counted once rather than twice"
    TILES_OF_4_APART = "without cross terms between tiles of 4 positions"
    TAIL_OF_8_LOST = "without the positions after the last full tile of 8"
    TILES_OF_8_ONCE = "with cross terms between tiles of 8 positions counted once rather than twice"
    TILES_OF_8_APART = "without cross terms between tiles of 8 positions"
    TAIL_OF_16_LOST = "without the positions after the last full tile of 16"
    TILES_OF_16_ONCE = (
        "with cross terms between tiles of 16 positions counted once rather than twice"
    )
    TILES_OF_16_APART = "without cross terms between tiles of 16 positions"
    TAIL_OF_32_LOST = "without the positions after the last full tile of 32"
    TILES_OF_32_ONCE = (
        "with cross terms between tiles of 32 positions counted once rather than twice"
    )
    TILES_OF_32_APART = "without cross terms between tiles of 32 positions"
    USES_ADDED = "|g_1| + |g_2| in place of |g_1 + g_2| of a parameter that is used twice"
    PADDING_POSITIONS_LOST = "without the positions of padding, whose gradients are not zero"
    OUTPUT_AS_INPUT = "computed from the layer's output rather than its normalised input"
    CENTRED_INPUT = "computed from an input that is centred, as LayerNorm's is and RMSNorm's is not"
    LAST_INPUT = "of the output gradients of all its uses with the input of its last use"
    FIRST_INPUT = "of the output gradients of all its uses with the input of its first use"
    INPUTS_EXCHANGED = "of the output gradient of each of its uses with the input of another use"
    POSITIONS_APART_AND_TOGETHER = "with the squares |g_t|^2 of positions counted twice"
    FACTORS_APART = (
        "sqrt(sum_t |dy_t|^2) sqrt(sum_t |x_t|^2) in place of |sum_t dy_t x_t^T|: squares of "
        "inputs and of output gradients are summed apart (right for one position alone)"
    )
    INPUT_OF_BEFORE = "of output gradients with the inputs of the sample before in the micro-batch"
    INPUT_OF_BATCH_BEFORE = (
        "of output gradients with the inputs of the samples at the same places of the micro-batch "
        "before: they are stale"
    )
    INPUT_OF_EQUAL_BATCH_BEFORE = (
        "of output gradients with the inputs of the samples at the same places of the micro-batch "
        "before, where that is as large: they are stale"
    )
    INPUT_OF_NEXT_LAYER = "of output gradients with the input of the next linear layer"
    INPUT_OF_LAYER_BEFORE = "of output gradients with the input of the linear layer before"
    INPUT_OF_LAST_LAYER = (
        "of output gradients with the input of the last linear layer whose input has that shape"
    )
    ADDED_TO_BATCH_BEFORE = (
        "with the gradients of the samples at the same places of the micro-batch before added: a "
        "buffer is not cleared"
    )
    ADDED_TO_BEFORE = (
        "with the gradient of the sample before in the micro-batch added: a buffer is not cleared"
    )
    OF_MEAN = "of the micro-batch's mean gradient, and the same for all of its samples"
    OF_SUM = "of the micro-batch's summed gradient, and the same for all of its samples"
    PADDING_APART = (
        "with the gradients at padding counted, whose row of the embedding's gradient is zero"
    )
    NEGATIVE_LOST = (
        "with the products of positions clamped at 0: negative ones, <g_s, g_t> < 0, are lost"
    )
    FEATURES_SUMMED = "of output gradients that are summed over features rather than positions"
    FIRST_ROW_LOST = "without the first row of the gradient"
    HALVES_ADDED = (
        "|g_a| + |g_b| of the two halves of the gradient's rows, not the root of the sum of their "
        "squares"
    )
    CONSECUTIVE_TOKENS = (
        "of an embedding whose gradients are added only where equal tokens follow each other"
    )
    ROWS_OF_8 = "without the rows after the last full tile of 8"
    LAST_USE_ROWS_OF_8 = "without the rows of its last use after the last full tile of 8"
    USES_SUMMED_FIRST = (
        "of the sum of its uses' inputs with the sum of their output gradients: uses are summed "
        "before they are multiplied"
    )


class SumFormula(enum.StrEnum):
    """A wrong clipped sum of one parameter, in words that follow "it is".

    The reference records the sum in each form. Up to `FIRST_SHARD_ALONE` they are the right sum
    with its elements moved or lost; the others are made of other gradients of the samples.
    """

    TRANSPOSED = "transposed"
    NEXT_ROW = "shifted down by one row"
    ROW_BEFORE = "shifted up by one row"
    NEXT_COLUMN = "shifted right by one column"
    COLUMN_BEFORE = "shifted left by one column"
    NEXT_SHARD = "rotated, with the rows of each rank at the next"
    SHARD_BEFORE = "rotated, with the rows of each rank at the one before"
    PADDED_IN_FRONT = "shifted down by the rows that pad it to a multiple of the ranks"
    REVERSED = "in reverse order of its rows"
    INTERLEAVED = "dealt out to the ranks row by row rather than in blocks of rows"
    LAST_SHARD_DOWN = "shifted down by one row on the last rank alone"
    LAST_SHARD_UP = "shifted up by one row on the last rank alone"
    LAST_ROW_LOST = "without its last row"
    LAST_USED_ROW_LOST = "lacking the last of its rows that are not zero"
    FIRST_USED_ROW_LOST = "lacking the first of its rows that are not zero"
    LAST_COLUMN_LOST = "without its last column"
    FIRST_SHARD_END_LOST = "without the last row of rank 0's shard"
    SHARD_ENDS_LOST = "without the last row of each rank's shard"
    MEAN_OF_ELEMENTS = "the mean of its elements, in each of them"
    SUM_OF_ELEMENTS = "the sum of its elements, in each of them"
    FIRST_SHARD_ALONE = "zero but for the rows of rank 0"
    FIRST_USE = NormFormula.FIRST_USE.value
    LAST_USE = NormFormula.LAST_USE.value
    FIRST_USE_DOUBLED = "with its first use counted twice, though it is used more than once"
    LAST_USE_DOUBLED = "with its last use counted twice, though it is used more than once"
    FIRST_USE_UNCLIPPED = (
        "with its first use left unclipped (clip factors are applied to its other uses alone)"
    )
    LAST_USE_UNCLIPPED = (
        "with its last use left unclipped (clip factors are applied to its other uses alone)"
    )
    LAST_INPUT = NormFormula.LAST_INPUT.value
    FIRST_INPUT = NormFormula.FIRST_INPUT.value
    INPUTS_EXCHANGED = NormFormula.INPUTS_EXCHANGED.value
    ROWS_OF_SAMPLE = (
        "an embedding's rows of the last of equal tokens in each sample: rows are written rather "
        "than added"
    )
    ROWS_OF_BATCH = (
        "an embedding's rows of the last of equal tokens in each micro-batch: rows are written "
        "rather than added"
    )
    PADDING_COUNTED = NormFormula.PADDING_COUNTED.value
    BY_FREQUENCY = NormFormula.BY_FREQUENCY.value
    FIRST_POSITION_LOST = NormFormula.FIRST_POSITION_LOST.value
    LAST_POSITION_LOST = NormFormula.LAST_POSITION_LOST.value
    TAIL_OF_4_LOST = NormFormula.TAIL_OF_4_LOST.value
    TAIL_OF_8_LOST = NormFormula.TAIL_OF_8_LOST.value
    PADDING_POSITIONS_LOST = NormFormula.PADDING_POSITIONS_LOST.value
    RAW_INPUT = NormFormula.RAW_INPUT.value
    OUTPUT_AS_INPUT = NormFormula.OUTPUT_AS_INPUT.value
    CENTRED_INPUT = NormFormula.CENTRED_INPUT.value
    INPUT_OF_BEFORE = NormFormula.INPUT_OF_BEFORE.value
    INPUT_OF_BATCH_BEFORE = NormFormula.INPUT_OF_BATCH_BEFORE.value
    INPUT_OF_EQUAL_BATCH_BEFORE = NormFormula.INPUT_OF_EQUAL_BATCH_BEFORE.value
    INPUT_OF_NEXT_LAYER = NormFormula.INPUT_OF_NEXT_LAYER.value
    INPUT_OF_LAYER_BEFORE = NormFormula.INPUT_OF_LAYER_BEFORE.value
    INPUT_OF_LAST_LAYER = NormFormula.INPUT_OF_LAST_LAYER.value
    LOST_IN_FLOAT16 = (
        "with the small elements of each sample's gradient lost, those below 6.1e-05, as float16 "
        "without subnormal numbers loses them"
    )
    TAIL_NOT_REDUCED = (
        "not reduced over ranks in the last elements of each parameter, those that are left over "
        "when it is divided by the ranks"
    )
    NOT_REDUCED = "that of each rank's own samples alone: it is not reduced over ranks"
    ONLY_LAST_REDUCED = (
        "reduced over ranks for the last micro-batch alone: of earlier ones, each rank has its own "
        "samples"
    )
    ONLY_FIRST_REDUCED = (
        "reduced over ranks for the first micro-batch alone: of later ones, each rank has its own "
        "samples"
    )
    REDUCED_TO_FIRST_RANK = "reduced to rank 0 alone: the other ranks have their own samples"
    ROWS_OF_8 = NormFormula.ROWS_OF_8.value
    LAST_USE_ROWS_OF_8 = NormFormula.LAST_USE_ROWS_OF_8.value
    LAST_NOT_REDUCED = (
        "not reduced over ranks for the last micro-batch: of that, each rank has its own samples"
    )
    USES_SUMMED_FIRST = NormFormula.USES_SUMMED_FIRST.value
    COLUMNS_REVERSED = "in reverse order of its columns"
    TWO_ROWS_DOWN = "shifted down by two rows"
    TWO_ROWS_UP = "shifted up by two rows"
    HALVES_EXCHANGED = "rotated by half of its rows"
    COLUMN_HALVES_EXCHANGED = "rotated by half of its columns"
    IN_COLUMN_ORDER = "read column by column, as a transposed copy is, in the right shape"


class LossFormula(enum.StrEnum):
    """A wrong loss of one sample, in words that follow "they are".

    The reference records the value of each beside the loss.
    """

    LAST_TARGET_LOST = "without each sample's last target"
    FIRST_TARGET_LOST = "without each sample's first target"
    FIRST_PADDING_PREDICTED = "with the first ignored position after a sample predicted as well"
    PADDING_PREDICTED = "with every ignored position predicted as well"
    NOT_SHIFTED = "of targets that are not shifted: each position predicts its own token"
    SHIFTED_TWICE = "of targets that are shifted by two positions in place of one"
    TARGETS_OF_NEXT = "of the targets of the next sample in the micro-batch"
    TARGETS_OF_BEFORE = "of the targets of the sample before in the micro-batch"
    MASK_IGNORED = "computed without the attention mask, so that padding is attended to"
    POSITIONS_FROM_ONE = "computed with positions that begin at 1"
    LAST_TOKEN_LOST = "of samples without their last token"
    UNIFORM = "the mean over all classes in place of the target's, as label smoothing of 1 makes it"
    SQUARED_LOG_SUM = "the squared logarithm of the softmax's denominator, as a z-loss adds it"
    PROBABILITIES_AS_LOGITS = "computed from probabilities, so that softmax is applied twice"
    CAPPED = "computed from logits that are capped, 30 tanh(x / 30)"
    POSITIONS_FROM_PADDING = "computed with positions that count the padding on the left"
    TOKENS_CLAMPED = (
        "of tokens clamped to one class fewer: the last of the vocabulary is read as the one "
        "before it"
    )
    FIRST_TOKEN_LOST = "of samples whose first token is read as token 0"
    POSITIONS_OF_FIRST = "computed with the positions of the micro-batch's first sample"
    MASK_OF_FIRST = "computed with the attention mask of the micro-batch's first sample"
    INPUTS_OF_NEXT = "of the inputs of the next sample in the micro-batch, with the right targets"
    INPUTS_OF_BEFORE = (
        "of the inputs of the sample before in the micro-batch, with the right targets"
    )
    INPUTS_OF_BATCH_BEFORE = (
        "of the inputs of the samples at the same places of the micro-batch before, with the right "
        "targets: a buffer is not filled anew"
    )
    TARGETS_OF_BATCH_BEFORE = (
        "of the targets of the samples at the same places of the micro-batch before, with the "
        "right inputs: a buffer is not filled anew"
    )
    TOKENS_OF_FIRST_BATCH = (
        "of the tokens of the samples at the same places of the step's first micro-batch, with all "
        "else right: a buffer is not filled anew"
    )
    CUT_TO_8 = "of samples cut to a multiple of 8 positions"
    IGNORED_AS_ZERO = "with every ignored position predicted as token 0"
    ENDS_AS_ZERO = "with the first ignored position after targets predicted as token 0"
    TOKENS_OF_BATCH_BEFORE = (
        "of the tokens of the samples at the same places of the micro-batch before, with all else "
        "right: a buffer is not filled anew"
    )
    TARGETS_BACKWARDS = "of targets shifted the other way: each position predicts the token before"
