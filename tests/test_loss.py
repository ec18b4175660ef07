"""Losses are those of transformers, sample by sample, in float32."""

from __future__ import annotations

import pytest
import torch

from dpsgd_track.config import TASKS
from dpsgd_track.privacy.loss import (
    IGNORED,
    LOSSES,
    causal_lm_loss,
    masked_lm_loss,
    regression_loss,
)
from tests.support.model_zoo import batch, build

# transformers compares labels[t + 1] with logits[t] in a causal model, and skips -100.
MODELS = {
    "llama": "sequence-classification",
    "qwen2": "causal-lm",
    "tied-gpt2": "causal-lm",
    "distilbert": "masked-lm",
}


@pytest.mark.parametrize("model", MODELS)
def test_a_samples_loss_is_that_of_transformers_for_the_sample_alone(model: str) -> None:
    built, whole = build(model), batch(model, 5, seed=3)
    losses = LOSSES[MODELS[model]](built(**whole.inputs).logits, whole.targets)
    for index in range(5):
        sample = whole.sample(index)
        if not (sample.targets != IGNORED).any():
            assert losses[index] == 0
            continue
        wanted = built(**sample.inputs, labels=sample.targets).loss
        torch.testing.assert_close(losses[index], wanted, rtol=1e-5, atol=1e-6)


def test_every_task_has_a_loss() -> None:
    assert set(LOSSES) == set(TASKS)


def test_ignored_targets_do_not_dilute_the_mean() -> None:
    logits = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[3, IGNORED, IGNORED, IGNORED]])
    alone = masked_lm_loss(logits[:, :1], target[:, :1])
    torch.testing.assert_close(masked_lm_loss(logits, target), alone)


def test_a_sample_without_targets_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(2, 4, 7, requires_grad=True)
    target = torch.tensor([[IGNORED] * 4, [1, 2, 3, 4]])
    losses = causal_lm_loss(logits, target)
    losses.sum().backward()
    assert losses[0] == 0
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1].any()


def test_regression_averages_over_a_samples_own_outputs() -> None:
    logits, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert regression_loss(logits, target).tolist() == [5.0, 2.0]
    assert regression_loss(logits[:, :1], target[:, 0]).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("task", LOSSES)
def test_losses_are_float32_whatever_the_logits(task: str) -> None:
    # A class of each position, as the targets of a masked language model are.
    of_positions = ("token-classification", "seq2seq")
    alike = "masked-lm" if task in of_positions else task
    model = next((m for m, t in MODELS.items() if t == alike), "reused-mlp")
    whole = batch(model, 3, seed=3)
    logits = build(model)(*whole.args, **whole.inputs)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    rounded = logits.bfloat16()
    losses = LOSSES[task](rounded, whole.targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, LOSSES[task](rounded.float(), whole.targets))
    assert LOSSES[task](logits.double(), whole.targets).dtype == torch.float64
