"""A clipping bound C that follows a quantile of the samples' gradient norms, privately.

In each step the samples whose norm is at most C are counted, with noise, and C moves toward the
bound that a fraction gamma of the norms do not exceed:

    b = (sum_i (1[n_i <= C] - 1/2) + N(0, sigma_b^2)) / expected batch size + 1/2
    C <- C exp(-eta (b - gamma))

One sample changes the count by at most 1/2, so the count is a Gaussian mechanism with the noise
multiplier 2 sigma_b. A step releases the count and the sum. Both together are as private as a sum
alone with the noise multiplier sigma, if the sum's own is

    sigma_sum = (sigma^-2 - (2 sigma_b)^-2)^(-1/2)

so `epsilon` counts the step at sigma.

Source: Andrew et al., 2021, "Differentially Private Learning with Adaptive Clipping".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dpsgd_track.config import MAX_GRAD_NORMS, PrivacyConfig, require
from dpsgd_track.distributed.ranks import sum_over_ranks
from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.noise import NoiseSource

# No parameter has a name with a space.
_COUNT = "samples within the bound"


@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping:
    """Settings of a clipping bound that follows a quantile of the norms."""

    quantile: float = 0.5
    """gamma: fraction of the samples that are not to be clipped, between 0 and 1."""
    learning_rate: float = 0.2
    """eta: C changes by at most a factor of about exp(eta) a step."""
    count_noise: float | None = None
    """sigma_b: standard deviation of the noise on the count, in samples. None is a twentieth of the
    expected batch size, and at least sigma."""

    def __post_init__(self) -> None:
        require(0 < self.quantile < 1, "quantile", self.quantile, "a number between 0 and 1")
        is_rate = 0 < self.learning_rate <= 1
        require(is_rate, "learning_rate", self.learning_rate, "a number above 0, at most 1")
        is_noise = self.count_noise is None or 0 < self.count_noise < math.inf
        require(is_noise, "count_noise", self.count_noise, "a number > 0, or None")

    def count_noise_of(self, privacy: PrivacyConfig) -> float:
        """sigma_b of a step; 0 where the step has no noise."""
        if privacy.noise_multiplier == 0:
            return 0.0
        if self.count_noise is not None:
            return self.count_noise
        return max(privacy.expected_batch_size / 20, privacy.noise_multiplier)

    def sum_multiplier(self, privacy: PrivacyConfig) -> float:
        """Noise multiplier of the sum, sigma_sum, with which the step counts as sigma.

        Raises:
            ValueError: the count alone tells more than a step may.
        """
        sigma = privacy.noise_multiplier
        if sigma == 0:
            return 0.0
        count_multiplier = 2 * self.count_noise_of(privacy)
        allowed = f"more than {sigma / 2:g}, half of the noise multiplier"
        advice = "With less noise the count would spend the whole step. Give count_noise."
        is_enough = count_multiplier > sigma
        require(is_enough, "count_noise", count_multiplier / 2, allowed, advice)
        return float((sigma**-2 - count_multiplier**-2) ** -0.5)


@dataclass
class AdaptiveBound:
    """The bound of a training, from step to step."""

    settings: AdaptiveClipping
    device: torch.device
    _count: Tensor = field(init=False)
    """sum_i (1[n_i <= C] - 1/2) of the step's samples on this rank so far, on the device."""

    def __post_init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget the samples of the step."""
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)

    def note(self, record: SampleRecord, max_grad_norm: float) -> None:
        """Count the samples of a batch that was clipped at C. Waits for no device."""
        assert record.norm_B is not None
        # A norm that is not a number is not within the bound.
        within_B = (record.norm_B <= max_grad_norm).double()
        self._count = self._count + (within_B - 0.5).sum()

    def next_bound(self, privacy: PrivacyConfig, source: NoiseSource) -> float:
        """C of the next step, equal on all ranks; all call it together."""
        total = self._count.clone()
        sum_over_ranks(total)
        part = LocalPart(_COUNT, torch.zeros(1), 0, 1)
        noise = float(source.standard_normal(part)) * self.settings.count_noise_of(privacy)
        fraction = (float(total) + noise) / privacy.expected_batch_size + 0.5
        settings = self.settings
        exponent = settings.learning_rate * (settings.quantile - fraction)
        smallest, largest = MAX_GRAD_NORMS
        # Noise on the count of a small batch may be far out.
        return min(
            max(privacy.max_grad_norm * math.exp(max(min(exponent, 3), -3)), smallest), largest
        )

    def of_sum(self, privacy: PrivacyConfig) -> PrivacyConfig:
        """Settings of the mode that forms the noisy sum."""
        return replace(privacy, noise_multiplier=self.settings.sum_multiplier(privacy))
