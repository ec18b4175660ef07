"""torch.nn.Embedding: one gradient row per distinct token; the padding row has none.

Covers the embeddings of transformers that multiply what they look up by a constant (Gemma), and
those with sparse gradients: the sum over samples is dense, as the noise that follows is.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpsgd_track.privacy.terms import Rows, Term


def matches(module: nn.Module) -> bool:
    """True for embeddings whose gradient is the plain sum of its rows' gradients, or a multiple."""
    return (
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and _scale_of(module, torch.float32) is not None
    )


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [V, D]."""
    assert isinstance(module, nn.Embedding)
    scale = _scale_of(module, dy.dtype)
    assert scale is not None
    tokens_BT = x.reshape(len(x), -1)
    dy_BTD = dy.reshape(*tokens_BT.shape, dy.shape[-1])
    if module.padding_idx is not None:
        is_padding = tokens_BT.eq(module.padding_idx).unsqueeze(-1)
        dy_BTD = torch.where(is_padding, torch.zeros_like(dy_BTD), dy_BTD)
    if scale != 1:
        dy_BTD = dy_BTD * scale
    return {"weight": Rows(tokens_BT, dy_BTD, module.num_embeddings)}


_scales: WeakKeyDictionary[nn.Module, dict[torch.dtype, float | None]] = WeakKeyDictionary()


def _scale_of(module: nn.Embedding, dtype: torch.dtype) -> float | None:
    """`_probed_scale`, which waits for the device, once for each module and type."""
    known = _scales.setdefault(module, {})
    if dtype not in known:
        known[dtype] = _probed_scale(module, dtype)
    return known[dtype]


@torch.no_grad()
def _probed_scale(module: nn.Embedding, dtype: torch.dtype) -> float | None:
    """What a subclass multiplies the looked-up rows by in `dtype`; None if it does anything else.

    Found on a small table of the probe's own, since the real one may be large, or elsewhere.
    """
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    device = module.weight.device
    num_rows = 3 + (module.padding_idx or 0)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(num_rows, module.embedding_dim, generator=generator).add_(0.5)
    table[-1] = 1.0
    table = table.to(device, dtype)
    tokens = torch.tensor([[num_rows - 1, num_rows - 2]], device=device)
    rows = table[tokens]
    try:
        found = torch.func.functional_call(module, {"weight": table}, (tokens,))
    except Exception:
        # It looks up other rows than it is asked for, or takes other arguments.
        return None
    if not isinstance(found, Tensor) or found.shape != rows.shape or found.dtype != dtype:
        return None
    scale = float(found[0, 0, 0])
    # A constant factor leaves nothing but the rounding of one product.
    tolerance = 2 * torch.finfo(dtype).eps
    is_constant = torch.allclose(found.float(), scale * rows.float(), rtol=tolerance, atol=0)
    return scale if is_constant else None
