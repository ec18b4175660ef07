"""The flash norm in hooks: tiled, with neither a T x T nor a d x p matrix ever whole.

A mode with one backward may keep the gradients instead, layer by layer, as the planner says: a
second product for their clipped sum would cost a third of the step.
"""

from dpsgd_track.kernels.flash_norm import flash_norm_sq
from dpsgd_track.privacy.norms.rule import NormRule

FLASH = NormRule(name="flash", outer_norm=flash_norm_sq, is_planned=True)
