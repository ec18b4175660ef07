"""The reference's records of gradients by position, row and column, and of single targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, norm_and_sketch, signs_of
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import IGNORED, causal_lm_loss, classification_loss
from dpsgd_track.record.parts import (
    COLUMN_SQUARES,
    MOST_POSITIONS,
    MOST_ROWS,
    ROW_SQUARES,
    SumParts,
    products_of,
)
from dpsgd_track.training.gradient_parts import GradientParts
from dpsgd_track.training.layer_calls import Share
from dpsgd_track.training.target_losses import sizes_of, target_losses

pytestmark = pytest.mark.usefixtures("one_rank")

T, P, D, V = 5, 3, 4, 6
CPU = torch.device("cpu")


def sample(seed: int) -> tuple[dict[str, Tensor], dict[str, list[Share]]]:
    """Gradients of a linear weight used twice, its bias, a table, and an unused weight."""
    rng = torch.Generator().manual_seed(seed)
    uses = [
        Share(torch.randn(T, P, generator=rng), torch.randn(T, D, generator=rng)) for _ in range(2)
    ]
    rows = Share(torch.randn(T, D, generator=rng), row_T=torch.tensor([1, 4, 1, 0, 2]))
    shares = {
        "linear.weight": uses,
        "linear.bias": [Share(use.left_TP) for use in uses],
        "table.weight": [rows],
    }
    gradients = {
        "linear.weight": uses[0].gradient() + uses[1].gradient(),
        "linear.bias": uses[0].left_TP.sum(0) + uses[1].left_TP.sum(0),
        "table.weight": torch.zeros(V, D).index_add_(0, rows.row_T, rows.left_TP),
        "unused.weight": torch.zeros(2, D),
    }
    return gradients, shares


def test_squares_by_position_row_and_column_make_up_the_norm() -> None:
    gradients, shares = sample(0)
    squares = GradientParts().see(gradients, shares).numpy()
    for found, gradient in zip(squares, gradients.values(), strict=True):
        wanted = pytest.approx(float(gradient.square().sum()), rel=1e-5)
        assert products_of(found).sum() == wanted
        assert found[ROW_SQUARES].sum() == wanted
        assert found[COLUMN_SQUARES].sum() == wanted
    rows = gradients["linear.weight"].square().sum(dim=1)
    assert squares[0][ROW_SQUARES][:P] == pytest.approx(rows.numpy(), rel=1e-5)
    # Of the table, positions 0 and 2 share a row and no others.
    products = products_of(squares[2])[:T, :T]
    is_shared = np.abs(products) > 1e-6
    assert np.argwhere(is_shared & ~np.eye(T, dtype=bool)).tolist() == [[0, 2], [2, 0]]


def test_sketches_of_parts_make_up_that_of_the_sum() -> None:
    parts, total, raw = GradientParts(), dict[str, Tensor](), dict[str, Tensor]()
    for seed, factor in ((0, 0.5), (1, 0.0), (2, 1.0)):
        gradients, shares = sample(seed)
        parts.see(gradients, shares)
        parts.weigh([factor] * len(gradients))
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + factor * gradient
            raw[name] = raw.get(name, 0) + (factor > 0) * gradient
    sketches = parts.sketches(list(total), CPU)
    assert np.isfinite(sketches).all()
    for column, name in enumerate(total):
        for sums, kinds in (
            (total, (SumParts.POSITIONS, SumParts.ROWS, SumParts.COLUMNS)),
            (raw, (SumParts.UNCLIPPED_POSITIONS, SumParts.UNCLIPPED_ROWS)),
        ):
            wanted = norm_and_sketch(name, sums[name], 0, sums[name].numel())[1:].numpy()
            for kind in kinds:
                found = sketches[kind.value, column].sum(axis=0)
                assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), (name, kind)


def test_a_rank_without_samples_adds_nothing() -> None:
    sketches = GradientParts().sketches(["a", "b"], CPU)
    assert sketches.shape[1:] == (2, NUM_PROJECTIONS)
    assert not sketches.any()


def test_parts_that_are_too_many_are_not_recorded() -> None:
    long = MOST_POSITIONS + 1
    share = Share(torch.randn(long, P), torch.randn(long, D))
    high = torch.randn(MOST_ROWS + 1, 2)
    parts = GradientParts()
    squares = parts.see(
        {"long.weight": share.gradient(), "high.weight": high}, {"long.weight": [share]}
    ).numpy()
    assert np.isnan(products_of(squares)).all()
    assert np.isfinite(squares[0][ROW_SQUARES]).all()
    assert np.isnan(squares[1][ROW_SQUARES]).all()
    assert np.isfinite(squares[1][COLUMN_SQUARES]).all()
    parts.weigh([1.0, 1.0])
    sketches = parts.sketches(["long.weight"], CPU)
    assert np.isnan(sketches[SumParts.POSITIONS.value]).any()
    assert np.isfinite(sketches[SumParts.ROWS.value]).all()


def test_signs_are_those_of_a_sketch() -> None:
    values = torch.randn(5000, dtype=torch.float64)
    sketch = norm_and_sketch("a.weight", values, 0, len(values))[1:]
    assert torch.allclose(signs_of("a.weight", len(values)) @ values, sketch)


def test_losses_of_targets_make_up_the_loss() -> None:
    logits = torch.randn(1, T, V)
    targets = torch.tensor([[2, IGNORED, 3, 1, IGNORED]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    batch = Batch({"attention_mask": mask}, targets)
    found = target_losses(causal_lm_loss, batch, lambda sample: logits)
    assert found.isfinite().tolist() == [False, True, True] + [False] * (MOST_POSITIONS - 3)
    assert float(found.nanmean()) == pytest.approx(float(causal_lm_loss(logits, targets)))
    assert sizes_of(causal_lm_loss, [batch, batch]).tolist() == [[4.0, 2.0]] * 2


def test_a_class_has_no_losses_of_targets() -> None:
    batch = Batch({}, torch.tensor([2]))
    found = target_losses(classification_loss, batch, lambda sample: torch.randn(1, V))
    assert found.isnan().all()
    assert np.isnan(sizes_of(classification_loss, [batch])).all()
