"""The flash norm in the backward of replaced linear layers."""

from dpsgd_track.kernels.flash_norm import flash_norm_sq
from dpsgd_track.privacy.norms.rule import NormRule

FUSED = NormRule(name="fused", outer_norm=flash_norm_sq, is_fused=True, is_planned=True)
