"""torch.nn.EmbeddingBag of sums and means: every row of a bag receives the bag's gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsgd_track.privacy.terms import Rows, Term


def matches(module: nn.Module) -> bool:
    """True for bags [B, n] of rows that are added up or averaged."""
    return (
        isinstance(module, nn.EmbeddingBag)
        and type(module).forward is nn.EmbeddingBag.forward
        and module.mode in ("sum", "mean")
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [V, D]."""
    assert isinstance(module, nn.EmbeddingBag)
    counts_BT = torch.ones_like(x, dtype=dy.dtype)
    if module.padding_idx is not None:
        counts_BT = counts_BT * x.ne(module.padding_idx)
    if module.mode == "mean":
        counts_BT = counts_BT / counts_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return {"weight": Rows(x, dy.unsqueeze(1) * counts_BT.unsqueeze(2), module.num_embeddings)}
