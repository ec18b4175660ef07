"""RMSNorm: torch's own, and the variants of transformers (w * xhat, Gemma's (1 + w) * xhat).

Either way the weight's gradient is sum_t dy_t * xhat_t with xhat = x / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation, accumulation_dtype
from dpsgd_track.kernels.normalisation import normalised, weight_and_bias_gradients
from dpsgd_track.privacy.layers.positions import flatten_positions
from dpsgd_track.privacy.terms import Dense, Term


def matches(module: nn.Module) -> bool:
    """True where the module is called an RMSNorm and a probe shows that it computes one."""
    if not type(module).__name__.endswith("RMSNorm"):
        return False
    weights = dict(module.named_parameters(recurse=False))
    if list(weights) != ["weight"] or weights["weight"].dim() != 1:
        return False
    weight = weights["weight"]
    # A default epsilon, or a cast, may be another in a low precision.
    return all(_computes_rms_norm(module, weight, d) for d in (weight.dtype, torch.bfloat16))


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [P]."""
    weight, _ = weight_and_bias_gradients(
        flatten_positions(x), flatten_positions(dy), _epsilon(module, x), is_centred=False
    )
    return {"weight": Dense(weight)}


def _epsilon(module: nn.Module, x: Tensor) -> float:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # torch's default is that of the type it computes in: float32's for 16-bit inputs.
    return torch.finfo(accumulation_dtype(x)).eps if eps is None else float(eps)


@torch.no_grad()
def _computes_rms_norm(module: nn.Module, weight: Tensor, dtype: torch.dtype) -> bool:
    """Compare the module with w * xhat and (1 + w) * xhat on fixed input and weights.

    Weights of the probe's own: those of a sharded model are elsewhere, and w = 1 tells little.
    Every row comes again so small that epsilon is most of what it is divided by.
    """
    generator = torch.Generator().manual_seed(0)
    x, (probe, *_) = (
        torch.randn(3, len(weight), generator=generator).to(weight.device, dtype) for _ in range(2)
    )
    eps = _epsilon(module, x)
    x = torch.cat([x, x * (eps or 1.0) ** 0.5])
    xhat = normalised(x, eps, is_centred=False)
    got = accumulation(torch.func.functional_call(module, {"weight": probe}, (x,)))
    return any(
        torch.allclose(got, scale * xhat, rtol=2e-2, atol=2e-2) for scale in (probe, 1 + probe)
    )


@torch.no_grad()
def takes_weight_per_sample(module: nn.Module) -> bool:
    """Whether the module's forward broadcasts a weight [B, 1, D] over inputs [B, T, D].

    Its own arithmetic then gives the per-sample gradients, and autograd forms them.
    """
    weight = next(module.parameters(recurse=False))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, len(weight), generator=generator).to(weight.device, weight.dtype)
    each = torch.randn(2, len(weight), generator=generator).to(weight.device, weight.dtype)

    def run(weight: Tensor, x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(module, {"weight": weight}, (x,))
        return found

    try:
        together = run(each.unsqueeze(1), x)
    except RuntimeError:
        return False
    apart = torch.cat([run(w, x[i : i + 1]) for i, w in enumerate(each)])
    # A mean may be added up in another order for more rows.
    return together.shape == apart.shape and torch.allclose(together, apart, rtol=1e-5, atol=1e-6)
