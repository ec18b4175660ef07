"""torch.nn.Embedding: one gradient row per distinct token; the padding row has none.

Covers the embeddings of transformers that scale looked-up rows by a constant (Gemma), and those
with sparse gradients: the sum over samples is dense, like the noise that is added to it.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpsgd_track.privacy.terms import Rows, Term


def matches(module: nn.Module) -> bool:
    """True for embeddings whose gradient is the sum of the rows' gradients, or a multiple of it."""
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
    """Cached `_trial_scale`, which waits for the device."""
    scales = _scales.setdefault(module, {})
    if dtype not in scales:
        scales[dtype] = _trial_scale(module, dtype)
    return scales[dtype]


@torch.no_grad()
def _trial_scale(module: nn.Embedding, dtype: torch.dtype) -> float | None:
    """Constant by which a subclass scales looked-up rows in `dtype`; None if it does anything else.

    Measured on a small table, as the real one may be large, or sharded.
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
        output = torch.func.functional_call(module, {"weight": table}, (tokens,))
    except Exception:
        # It looks up rows that it was not asked for, or takes other arguments.
        return None
    if not isinstance(output, Tensor) or output.shape != rows.shape or output.dtype != dtype:
        return None
    scale = float(output[0, 0, 0])
    # A constant factor differs by the rounding of one product only.
    tolerance = 2 * torch.finfo(dtype).eps
    is_constant = torch.allclose(output.float(), scale * rows.float(), rtol=tolerance, atol=0)
    return scale if is_constant else None
