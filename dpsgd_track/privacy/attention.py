"""torch.nn.MultiheadAttention, with all samples in one run.

The module multiplies by weights that it reads itself, so no hook sees what meets them. Here it runs
by the formulas of `torch.nn.functional.multi_head_attention_forward`, and each product is captured
as a linear layer's.

Shapes: B samples, T queries, S keys, E features, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.layers.positions import outer, summed_positions

_PACKED, _BIAS = "in_proj_weight", "in_proj_bias"
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_ALL = slice(None)


class _Weight(NamedTuple):
    """A weight or bias, or some rows of it."""

    name: str
    rows: slice = _ALL


@dataclass(frozen=True)
class _Call:
    """Arguments of `torch.nn.MultiheadAttention.forward`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False

    def mask(self, num_heads: int, dtype: torch.dtype) -> Tensor | None:
        """Mask that is added to the scores, [1 or B, 1 or H, 1 or T, S]; None without one."""
        is_causal = self.is_causal and self.key_padding_mask is None and not self.need_weights
        mask = None if self.attn_mask is None or is_causal else _added(self.attn_mask, dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, num_heads))
        if self.key_padding_mask is not None:
            padding_BS = _added(self.key_padding_mask, dtype)
            mask = padding_BS[:, None, None] + (0 if mask is None else mask)
        return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class AttentionLayer(CapturedLayer):
    """Captures a multi-head attention from what its weights read and the gradients of their
    products."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, [B, T, E] or [T, B, E], and its weights or None.

        Raises:
            ValueError: the samples are not in the module's own dimension for them.
        """
        call = _Call(*args, **kwargs)
        q, k, v = map(self._heads, self._projections(call.query, call.key, call.value))
        attended_BHTe, weights = self._attend(call, q, k, v)
        attended = attended_BHTe.transpose(1, 2).flatten(2)
        if self.sample_dim:
            attended = attended.transpose(0, 1).contiguous()
        output = self._product(attended, _Weight("out_proj.weight"), _Weight("out_proj.bias"))
        return output, weights

    @property
    def sample_dim(self) -> int:
        """Dimension of the samples in the module's inputs."""
        return 0 if self.module.batch_first else 1

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, E] or [T, B, E] as [B, H, T, E / H]."""
        num_heads: Any = self.module.num_heads
        by_sample = x.transpose(0, 1) if self.sample_dim else x
        return by_sample.unflatten(2, (num_heads, -1)).transpose(1, 2)

    def _attend(self, call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weighted values [B, H, T, E / H], and the weights if they are asked for."""
        module: Any = self.module
        mask = call.mask(module.num_heads, q.dtype)
        rate = module.dropout if module.training else 0.0
        if not call.need_weights:
            is_causal = call.is_causal and mask is None
            return F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal), None
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        if rate > 0:
            # In the shape in which the module itself draws.
            dropped = F.dropout(weights.flatten(0, 1), rate)
            weights = dropped.unflatten(0, weights.shape[:2])
        returned = weights.mean(dim=1) if call.average_attn_weights else weights
        return weights @ v, returned

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, in the inputs' order of dimensions."""
        E: Any = self.module.embed_dim
        parts = slice(0, E), slice(E, 2 * E), slice(2 * E, 3 * E)
        if self.module._parameters.get(_PACKED) is None:
            read = zip((query, key, value), _SEPARATE, parts, strict=True)
            return [self._product(x, _Weight(name), _Weight(_BIAS, rows)) for x, name, rows in read]
        if key is not value:
            read_by = zip((query, key, value), parts, strict=True)
            return [self._packed(x, rows) for x, rows in read_by]
        if query is not key:
            first, rest = parts[0], slice(E, 3 * E)
            return [self._packed(query, first), *self._packed(key, rest).chunk(2, dim=-1)]
        return self._packed(query, _ALL).chunk(3, dim=-1)

    def _packed(self, x: Tensor, rows: slice) -> Tensor:
        return self._product(x, _Weight(_PACKED, rows), _Weight(_BIAS, rows))

    def _product(self, x: Tensor, weight: _Weight, bias: _Weight) -> Tensor:
        """[..., D] -> [..., rows], captured as one use of the parameters that are trainable."""
        capture, own = self.capture, self.layer.names
        names = {part.name: own[part.name] for part in (weight, bias) if part.name in own}
        used, handle = replace(self.layer, names=names), capture.hold(x)
        rows = self._rows(weight)
        assert rows is not None
        y = F.linear(x, rows, self._rows(bias))
        if not capture.open_call(used, x, self.sample_dim) or not names:
            return y

        def close(dy: Tensor) -> None:
            x = handle().detach()
            if self.sample_dim:
                x, dy = x.transpose(0, 1), dy.transpose(0, 1)
            capture.dtypes.add(dy.dtype)
            if weight.name in names:
                capture.add_term(names[weight.name], outer(x, self._padded(dy, weight)))
            if bias.name in names:
                total = summed_positions(self._padded(dy, bias)).materialised()
                capture.add_term(names[bias.name], total)

        self.when_reached(used, x, y, close)
        return y

    def _tensor(self, name: str) -> Tensor | None:
        """Leaf of a parameter, or the parameter if it is frozen; None if there is none."""
        leaf = self.leaves().get(name)
        tensor: Tensor | None = attrgetter(name)(self.module)
        return tensor if leaf is None else leaf

    def _rows(self, part: _Weight) -> Tensor | None:
        tensor = self._tensor(part.name)
        return tensor if tensor is None or part.rows == _ALL else tensor[part.rows]

    def _padded(self, dy: Tensor, part: _Weight) -> Tensor:
        """Gradients of all rows of a parameter: zeros beside those of the part."""
        tensor = self._tensor(part.name)
        assert tensor is not None
        first, end, _ = part.rows.indices(len(tensor))
        return F.pad(dy, (first, len(tensor) - end)) if end - first < len(tensor) else dy
