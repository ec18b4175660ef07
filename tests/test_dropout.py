"""Keyed dropout by itself; through whole modes, in `test_training_batches.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpsgd_track.privacy.dropout import KeyedDropout, only

X = torch.rand(4, 6, 50) + 1


def masks(*, seed: int = 1, step: int = 2, samples: tuple[int, ...] = (5, 6, 7, 8)) -> Tensor:
    """Of two calls, [2, B, 6, 50]."""
    with KeyedDropout(seed=seed, step=step, samples=samples):
        return torch.stack([F.dropout(X, 0.3), nn.Dropout(0.3)(X)])


def test_what_is_kept_is_scaled_and_of_the_asked_share() -> None:
    found = masks()
    kept = found != 0
    # 2400 draws: a standard deviation of 0.009.
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.04)
    torch.testing.assert_close(found[kept], (X / 0.7).expand(found.shape)[kept])


def test_masks_differ_between_samples_calls_steps_and_seeds() -> None:
    rows = torch.cat([masks(), masks(step=3), masks(seed=3)]).flatten(0, 1) != 0
    assert len(torch.unique(rows.flatten(1), dim=0)) == len(rows) == 24


def test_a_sample_has_its_mask_in_any_batch_at_any_place_and_alone() -> None:
    whole = masks()
    assert torch.equal(masks(samples=(8, 7, 6, 5)) != 0, whole.flip(1) != 0)
    with KeyedDropout(seed=1, step=2, samples=(5, 6, 7, 8)):
        for index in (2, 0, 3):
            with only(index):
                one = X[index : index + 1]
                alone = torch.stack([F.dropout(one, 0.3), F.dropout(one, 0.3)])
            assert torch.equal(alone, whole[:, index : index + 1])


def test_masks_do_not_depend_on_the_type_that_is_computed_in() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        with KeyedDropout(seed=1, step=2, samples=(5, 6, 7, 8)):
            found = F.dropout(X.to(dtype), 0.3)
        assert torch.equal(found != 0, masks()[0] != 0)


def test_recomputed_activations_get_their_masks_back() -> None:
    def block(x: Tensor) -> Tensor:
        return F.dropout(F.dropout(x, 0.3).sin(), 0.5)

    gradients = []
    for is_recomputed in (False, True):
        x = X.clone().requires_grad_()
        with KeyedDropout(seed=1, step=2, samples=(5, 6, 7, 8)):
            y = checkpoint(block, x, use_reentrant=False) if is_recomputed else block(x)
            F.dropout(y, 0.3).sin().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def _attention(samples: tuple[int, ...], rate: float, dtype: torch.dtype, **more: Any) -> Tensor:
    random = torch.Generator().manual_seed(3)
    sizes = ((len(samples), 4, 7, 8), (len(samples), 2, 9, 8), (len(samples), 2, 9, 8))
    q, k, v = (torch.randn(size, generator=random, dtype=torch.float64) for size in sizes)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    with KeyedDropout(seed=1, step=2, samples=samples):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, enable_gqa=True, **more)


ALLOWED = torch.rand(3, 1, 7, 9, generator=torch.Generator().manual_seed(4)) < 0.7
ALLOWED[..., 0] = True


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"is_causal": True},
        {"attn_mask": ALLOWED},
        {"attn_mask": torch.zeros(3, 1, 7, 9).double().masked_fill(~ALLOWED, -torch.inf)},
        {"attn_mask": torch.randn(7, 9).double(), "scale": 0.2},
    ],
    ids=("plain", "causal", "bool", "infinite", "float-scale"),
)
def test_attention_with_a_vanishing_rate_is_that_without_dropout(more: dict[str, Any]) -> None:
    samples = (1, 2, 3)
    without = _attention(samples, 0.0, torch.float64, **more)
    torch.testing.assert_close(_attention(samples, 1e-12, torch.float64, **more), without)
    assert (_attention(samples, 0.5, torch.float64, **more) - without).abs().max() > 0.1


@pytest.mark.parametrize(
    "nothing",
    [torch.zeros(3, 1, 7, 9, dtype=torch.bool), torch.full((3, 1, 7, 9), -torch.inf)],
    ids=("bool", "float"),
)
def test_a_query_that_may_look_at_no_key_is_finite(nothing: Tensor) -> None:
    assert _attention((1, 2, 3), 0.5, torch.float32, attn_mask=nothing).isfinite().all()


def test_attention_drops_the_weights_of_each_sample_by_its_own_key() -> None:
    first = _attention((1, 2, 3), 0.5, torch.float32)
    second = _attention((1, 9, 3), 0.5, torch.float32)
    is_equal = (first == second).flatten(1).all(dim=1)
    assert is_equal.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "layer", [nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1), nn.Dropout1d(0.1)], ids=str
)
def test_dropout_without_keyed_masks_is_refused_by_name(layer: nn.Module) -> None:
    with KeyedDropout(seed=1, step=2, samples=(5, 6, 7, 8)):
        with pytest.raises(ValueError, match=r"dropout='\w+': expected a model that uses dropout"):
            layer(X)
        assert torch.equal(layer.eval()(X), X), "one that drops nothing is no matter"
    layer.train()


def test_dropout_of_something_else_than_samples_is_refused() -> None:
    with (
        KeyedDropout(seed=1, step=2, samples=(5, 6)),
        pytest.raises(ValueError, match=r"dropout=\(4, 6, 50\): expected 2 samples in dimension 0"),
    ):
        F.dropout(X, 0.1)


def test_nothing_is_left_behind_even_by_a_failure() -> None:
    originals = F.dropout, F.scaled_dot_product_attention, F.dropout1d
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="samples"), KeyedDropout(seed=1, step=2, samples=(5,)):
        F.dropout(X, 0.1)
    assert (F.dropout, F.scaled_dot_product_attention, F.dropout1d) == originals
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_batch_may_be_run_as_any_stand_in() -> None:
    with KeyedDropout(seed=1, step=2, samples=()):
        assert F.dropout(X, 0.3).shape == X.shape
