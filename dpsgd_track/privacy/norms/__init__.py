"""One file per norm rule, each a way to the norms of a linear layer's per-sample gradients."""

from dpsgd_track.privacy.norms.flash import FLASH
from dpsgd_track.privacy.norms.fused import FUSED
from dpsgd_track.privacy.norms.ghost import GHOST
from dpsgd_track.privacy.norms.rule import NormRule

NORM_RULES: dict[str, NormRule] = {rule.name: rule for rule in (GHOST, FLASH, FUSED)}
"""Every norm rule by the name the table of modes uses."""

__all__ = ["NORM_RULES", "NormRule"]
