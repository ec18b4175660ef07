"""Verifies the clipped sum and the noise of a mode that is not of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dpsgd_track.config import PrivacyConfig, require
from dpsgd_track.privacy.clipping import ClippedSum

_AUDITED_ELEMENTS = 4096
"""Elements of each parameter in which another library's noise is verified."""
_AUDIT_ROUNDING = 0.02
"""Error of the mean square that low precision may cause."""


def check_sum(name: str, clipped: ClippedSum, max_grad_norm: float) -> None:
    """Check the sum of a mode that is not of this package.

    Args:
        name: of the mode's class.

    Raises:
        ValueError: it has a sensitivity below C.
        RuntimeError: it is not finite.
    """
    advice = "Noise is calibrated to it."
    is_bounded = clipped.sensitivity >= max_grad_norm
    require(is_bounded, "sensitivity", clipped.sensitivity, f"{max_grad_norm} of {name}", advice)
    for parameter, total in clipped.gradients.items():
        if not bool(total.isfinite().all()):
            raise RuntimeError(
                f"{parameter}: expected a finite clipped sum of {name}, got another."
            )


class NoiseAudit:
    """Verifies that another library's step adds noise of the size that it was asked for."""

    def __init__(self, clipped: ClippedSum, privacy: PrivacyConfig) -> None:
        self.privacy = privacy
        self.before = {
            name: total.flatten()[:_AUDITED_ELEMENTS].double().clone()
            for name, total in clipped.gradients.items()
        }

    def check(self, noised: Mapping[str, Tensor]) -> None:
        """Compare the noise's standard deviation with sigma C.

        Raises:
            RuntimeError: the noise is missing, or has another standard deviation.
        """
        sigma = self.privacy.noise_multiplier
        if sigma == 0:
            return
        noise = torch.cat(
            [
                noised[name].flatten()[: len(before)].double() * self.privacy.expected_batch_size
                - before
                for name, before in self.before.items()
            ]
        )
        z = noise / (sigma * self.privacy.max_grad_norm)
        # The mean square of n standard normal numbers is within six standard errors of 1.
        error = abs(float(z.square().mean()) - 1)
        if error > 6 * math.sqrt(2 / max(len(z), 1)) + _AUDIT_ROUNDING:
            raise RuntimeError(
                f"noise: expected a standard deviation of {sigma * self.privacy.max_grad_norm:.4g} "
                f"on the sum, got {float(noise.std()):.4g}. Nothing was updated."
            )
