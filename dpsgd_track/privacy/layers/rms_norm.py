"""RMSNorm: torch's own, and the variants of transformers (w * xhat, Gemma's (1 + w) * xhat).

T5's goes by the name of a LayerNorm. Either way the weight's gradient is sum_t dy_t * xhat_t with
xhat = x / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation, accumulation_dtype
from dpsgd_track.kernels.normalisation import normalised, weight_and_bias_parts
from dpsgd_track.privacy.layers.positions import flatten_positions
from dpsgd_track.privacy.terms import Positions, Term


def matches(module: nn.Module) -> bool:
    """True for classes named `...RMSNorm` or `...LayerNorm` that compute one on a trial input."""
    if not type(module).__name__.lower().endswith(("rmsnorm", "layernorm")):
        return False
    weights = dict(module.named_parameters(recurse=False))
    if list(weights) != ["weight"] or weights["weight"].dim() != 1:
        return False
    weight = weights["weight"]
    # In a low precision, a default epsilon or a cast may differ.
    return all(_computes_rms_norm(module, weight, d) for d in (weight.dtype, torch.bfloat16))


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [P]."""
    weight, _ = weight_and_bias_parts(
        flatten_positions(x), flatten_positions(dy), epsilon(module, x), is_centred=False
    )
    return {"weight": Positions(weight)}


def epsilon(module: nn.Module, x: Tensor) -> float:
    """Constant that is added to the mean square of inputs like `x`."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # torch's default is that of the type it computes in: float32's for 16-bit inputs.
    return torch.finfo(accumulation_dtype(x)).eps if eps is None else float(eps)


@torch.no_grad()
def offset(module: nn.Module) -> float:
    """1 of Gemma's (1 + w) * xhat, 0 of w * xhat."""
    weight = next(module.parameters(recurse=False))
    zeros, x = (torch.full(weight.shape, n, device=weight.device) for n in (0.0, 1.0))
    y: Tensor = torch.func.functional_call(module, {"weight": zeros}, (x,))
    return float(y.any())


@torch.no_grad()
def _computes_rms_norm(module: nn.Module, weight: Tensor, dtype: torch.dtype) -> bool:
    """Compare the module with w * xhat and (1 + w) * xhat on a fixed input and weights.

    The weights are random: those of a sharded model are elsewhere, and w = 1 says little. Each row
    is repeated at a scale at which epsilon dominates the mean square.
    """
    generator = torch.Generator().manual_seed(0)
    x, (trial, *_) = (
        torch.randn(3, len(weight), generator=generator).to(weight.device, dtype) for _ in range(2)
    )
    eps = epsilon(module, x)
    x = torch.cat([x, x * (eps or 1.0) ** 0.5])
    xhat = normalised(x, eps, is_centred=False)
    try:
        got = accumulation(torch.func.functional_call(module, {"weight": trial}, (x,)))
    except Exception:
        # It takes other arguments.
        return False
    return any(
        torch.allclose(got, scale * xhat, rtol=2e-2, atol=2e-2) for scale in (trial, 1 + trial)
    )


@torch.no_grad()
def takes_weight_per_sample(module: nn.Module) -> bool:
    """True if the module's forward broadcasts a weight [B, 1, D] over inputs [B, T, D].

    Its own arithmetic then gives the per-sample gradients, and autograd forms them.
    """
    weight = next(module.parameters(recurse=False))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, len(weight), generator=generator).to(weight.device, weight.dtype)
    weights = torch.randn(2, len(weight), generator=generator).to(weight.device, weight.dtype)

    def run(weight: Tensor, x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, {"weight": weight}, (x,))
        return output

    try:
        together = run(weights.unsqueeze(1), x)
    except RuntimeError:
        return False
    apart = torch.cat([run(w, x[i : i + 1]) for i, w in enumerate(weights)])
    # For more rows a mean may be summed in another order.
    return together.shape == apart.shape and torch.allclose(together, apart, rtol=1e-5, atol=1e-6)
