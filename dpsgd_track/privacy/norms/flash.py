"""The flash norm in hooks: tiled, without materialising a T x T or a d x p matrix.

In a mode with one backward the planner may choose, layer by layer, to keep the gradients instead: a
second product for their clipped sum would cost a third of the step.
"""

from dpsgd_track.kernels.flash_norm import flash_norm_sq
from dpsgd_track.privacy.norms.rule import NormRule

FLASH = NormRule(name="flash", outer_norm=flash_norm_sq, is_planned=True)
