"""Clipping rules, clip factors, and the clipped sum together with its sensitivity.

Under each rule a sample's contribution is at most C long:

| rule | contribution of sample i |
|---|---|
| flat | min(1, C / n_i) g_i |
| automatic | C / (n_i + gamma) g_i, with gamma = 0.01 |
| per_layer | min(1, C_l / n_il) g_il in each of L layers, with C_l = C / sqrt(L) |

n_i is the norm of the whole gradient g_i, and n_il that of its part in layer l: the parameters that
one module owns. A parameter that several modules share is in the layer of the first.

Sources: Abadi et al., 2016, "Deep Learning with Differential Privacy" (flat); Bu et al., 2023,
"Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger"; McMahan et al.,
2018, "Learning Differentially Private Recurrent Language Models" (per layer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = 0.01
"""gamma of the automatic rule."""


def layer_of(parameter: str) -> str:
    """Layer of a parameter, by its fully qualified name: the module that owns it."""
    return parameter.rpartition(".")[0]


def automatic_factors(norm_B: Tensor, max_grad_norm: float) -> Tensor:
    """c_i = C / (||g_i|| + gamma), [B]; 0 where the norm is not finite, or C / norm denormal."""
    factor_B = max_grad_norm / (norm_B + GAMMA)
    return torch.where(factor_B >= torch.finfo(norm_B.dtype).tiny, factor_B, 0.0)


def clip_factors(norm_B: Tensor, max_grad_norm: float) -> Tensor:
    """c_i = min(1, C / ||g_i||), [B], in the norms' type. Never NaN, nor beyond 0 to 1.

    Factor 0 means that the sample is left out: clipped sums do not read its gradient, not even to
    multiply it by 0. Waits for no device.

    | norm | factor |
    |---|---|
    | 0 | 1 |
    | denormal | 1, or C / norm where C is smaller |
    | up to C | 1 |
    | beyond C | C / norm, correctly rounded |
    | so far beyond C that C / norm is denormal or 0 | 0: with too few bits it could exceed C |
    | finite, with C beyond the largest number of the norms' type | 1 |
    | infinite, as a norm that overflows its type is | 0 |
    | NaN | 0 |
    | none, of an empty batch | none |

    With C within `config.MAX_GRAD_NORMS`, norms from `total_norm` never meet the fifth or the sixth
    row: a norm whose square is finite is too small for the former, and C for the latter.

    Args:
        norm_B: ||g_i|| >= 0, float32 or float64.
        max_grad_norm: C, a number > 0 in the norms' type.
    Source: Abadi et al., 2016, "Deep Learning with Differential Privacy", algorithm 1.
    """
    # A tensor: a float would be multiplied by 1 / norm, which rounds once more, or is infinite.
    bound = torch.tensor(max_grad_norm, dtype=norm_B.dtype, device="cpu")
    factor_B = (bound / norm_B).clamp(max=1.0)
    # A comparison with NaN is false.
    return torch.where(factor_B >= torch.finfo(norm_B.dtype).tiny, factor_B, 0.0)


@dataclass(frozen=True)
class ClippedSum:
    """This rank's shards of the sum of clipped gradients over all ranks and micro-batches.

    Guarantee: adding or removing one sample changes the whole sum by at most `sensitivity` in
    L2 norm. Noise is calibrated to that number alone.
    """

    gradients: dict[str, Tensor]
    """This rank's shard of each trainable parameter's gradient, by name, float32 or float64."""
    sensitivity: float
    """C; infinite if gradients were not clipped."""


@dataclass
class SampleRecord:
    """Loss, norms and clip factor of each sample of one micro-batch; None if not computed."""

    loss_B: Tensor
    """Loss of each sample, float32 or float64, detached."""
    norm_B: Tensor | None = None
    """L2 norm of each sample's gradient over all trainable parameters, before clipping."""
    clip_factor_B: Tensor | None = None
    """Factor each sample's gradient was multiplied by; 0 where the sample was left out. Under
    per-layer clipping, the length of what it added over its norm."""
    norm_by_parameter_B: dict[str, Tensor] | None = None
    """L2 norm of each sample's gradient of each parameter; a missing name means 0."""

    @property
    def is_left_out_B(self) -> Tensor | None:
        """True for samples that add nothing as their loss or norm is not finite, bool [B]."""
        if self.norm_B is None:
            return None
        return ~(self.loss_B.isfinite() & self.norm_B.isfinite())

    @property
    def is_clipped_B(self) -> Tensor:
        """True for samples with a clip factor below 1, bool [B]."""
        factor_B = self.clip_factor_B
        return torch.zeros_like(self.loss_B).bool() if factor_B is None else factor_B < 1

    @property
    def num_left_out(self) -> int:
        """Number of samples left out; on a GPU this waits for the device."""
        left_out = self.is_left_out_B
        return 0 if left_out is None else int(left_out.sum())

    @property
    def factors_B(self) -> Tensor:
        """Clip factors of a record that has them."""
        assert self.clip_factor_B is not None
        return self.clip_factor_B

    def emptied(self) -> SampleRecord:
        """Copy of the record without samples, for an empty batch whose stand-in ran."""

        def emptied(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:0]

        by_parameter = self.norm_by_parameter_B
        return SampleRecord(
            self.loss_B[:0],
            emptied(self.norm_B),
            emptied(self.clip_factor_B),
            by_parameter and {name: values[:0] for name, values in by_parameter.items()},
        )


def mean_loss(records: Sequence[SampleRecord]) -> float:
    """Mean loss of the samples of several micro-batches; NaN without any."""
    return _mean([record.loss_B for record in records])


def clip_fraction(records: Sequence[SampleRecord]) -> float:
    """Share of the samples of several micro-batches with a clip factor below 1; NaN without any.

    Samples that were left out have factor 0. Where nothing is clipped it is 0.
    """
    return _mean([record.is_clipped_B for record in records])


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.cat([*values]).double().mean()) if values else math.nan


def total_norm(norm_sq_by_parameter: dict[str, Tensor]) -> Tensor:
    """Norm over all parameters from squared norms by parameter, [B].

    NaN or infinite if a square is, and infinite if their sum overflows, in float32 for norms from
    1.8e19. A square that underflows counts as 0: N gradient elements may hide a norm of
    sqrt(N) 1.1e-19, which `config.MAX_GRAD_NORMS` keeps far below C.
    """
    return torch.stack(list(norm_sq_by_parameter.values())).sum(dim=0).sqrt()
