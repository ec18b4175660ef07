"""Dropout whose masks are a function of (seed, step, call, sample), so that modes share them.

Within `KeyedDropout`, `torch.nn.functional.dropout` and the dropout inside
`scaled_dot_product_attention` draw the mask of each sample from its own generator, keyed by the
sample's global index and the number of the call in the forward pass. A mask is therefore the same
however samples are batched and distributed over ranks, and whatever type a mode computes in.

The key of a call is one draw of the default CPU generator, which is seeded alike before each
forward. A forward that `torch.utils.checkpoint` recomputes in the backward gets the same masks, as
the checkpoint restores that generator. The functions are replaced in their module rather than
intercepted by a `TorchFunctionMode`, which is not active inside a backward.

Shapes: B samples, H heads, T queries, S keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WITHOUT_KEY = (
    "alpha_dropout",
    "feature_alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
)
"""Kinds of dropout that have no keyed form."""

_active: list[KeyedDropout] = []


class KeyedDropout:
    """Context in which dropout masks are functions of a sample's key, for one micro-batch."""

    def __init__(self, *, seed: int, step: int, samples: Sequence[int]) -> None:
        """
        Args:
            samples: global index of each sample of the micro-batch. If it is empty, a mode may run
                any stand-in.
        """
        self.samples = tuple(samples)
        self._start = _digest(seed, step)
        self._originals: dict[str, Callable[..., Tensor]] = {}

    def __enter__(self) -> None:
        self._random_state = torch.get_rng_state()
        replaced: dict[str, Callable[..., Tensor]] = {
            "dropout": self._dropout,
            "scaled_dot_product_attention": self._attention,
        }
        for name in (*replaced, *_WITHOUT_KEY):
            self._originals[name] = getattr(F, name)
            setattr(F, name, replaced.get(name) or partial(self._refuse, name))
        _active.append(self)
        self.restart()

    def __exit__(self, *exception: object) -> None:
        _active.remove(self)
        for name, original in self._originals.items():
            setattr(F, name, original)
        torch.set_rng_state(self._random_state)

    def restart(self) -> None:
        """Start a forward: the next call of dropout is its first."""
        torch.default_generator.manual_seed(self._start)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return self._originals["dropout"](input, p, training, inplace)
        dropped = self._dropped(input, p)
        return input.copy_(dropped) if inplace else dropped

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p == 0:
            return self._originals["scaled_dot_product_attention"](
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            num_shared = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(num_shared, dim=-3)
            value = value.repeat_interleave(num_shared, dim=-3)
        weights = _attention_weights(query, key, attn_mask, is_causal, scale)
        return self._dropped(weights, dropout_p) @ value

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        # An empty micro-batch's stand-in may be of any size, and its masks do not matter.
        samples = self.samples or (-1,) * len(x)
        if x.dim() == 0 or len(x) != len(samples):
            raise ValueError(
                f"dropout={tuple(x.shape)!r}: expected {len(samples)} samples in dimension 0. "
                "Switch --dropout off, or say which sample is run with privacy.dropout.only."
            )
        call = int(torch.randint(1 << 62, (), device="cpu"))
        keep = torch.stack([_uniform(x[0], _digest(call, sample)) >= p for sample in samples])
        return x * keep * (1 / (1 - p) if p < 1 else 0.0)

    def _refuse(
        self,
        name: str,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if training and p > 0:
            raise ValueError(
                f"dropout={name!r}: expected a model that uses dropout or "
                "scaled_dot_product_attention. Switch --dropout off."
            )
        return self._originals[name](input, p, training, inplace)


def only(index: int) -> AbstractContextManager[None]:
    """Context in which forwards run sample `index` of the micro-batch alone.

    Does nothing without `KeyedDropout`. A backward that recomputes activations belongs inside too.
    """
    return _of_samples(slice(index, index + 1))


def of_any_samples() -> AbstractContextManager[None]:
    """Context in which forwards may run any number of samples, with arbitrary masks."""
    return _of_samples(slice(0))


@contextmanager
def _of_samples(chosen: slice) -> Iterator[None]:
    if not _active:
        yield
        return
    dropout = _active[-1]
    samples, dropout.samples = dropout.samples, dropout.samples[chosen]
    dropout.restart()
    try:
        yield
    finally:
        dropout.samples = samples
        dropout.restart()


def _attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Softmax over the keys, [B, H, T, S], in the query's type.

    A query that is masked from all keys attends to all of them equally, where torch's own function
    gives zeros: neither reaches a loss.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-2, -1)).to(exact) * scale
    lowest = torch.finfo(exact).min
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, lowest)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = (scores + mask).clamp(min=lowest)
    return scores.softmax(dim=-1).to(query.dtype)


def _uniform(like: Tensor, seed: int) -> Tensor:
    """Uniform random numbers in [0, 1), float32, in the shape of `like`."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)


def _digest(*parts: Any) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
