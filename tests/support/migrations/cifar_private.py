"""CIFAR-10 with this package: several micro-batches a step, and accuracy from the logits."""

import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils import data

from dpsgd_track import make_private


def train(
    model: nn.Module, dataset: data.Dataset, batch_size: int, sigma: float, c: float, delta: float
) -> float:
    optimizer = SGD(model.parameters(), lr=0.5)
    private = make_private(
        model,
        optimizer,
        expected_batch_size=batch_size,
        noise_multiplier=sigma,
        max_grad_norm=c,
    )
    num_right = 0
    for micro_batches in private.loader(dataset, physical_batch_size=4):
        for x, y in micro_batches:
            with private.batch(len(x)):
                logits = model(x)
                private.backward(F.cross_entropy(logits, y, reduction="none"))
            num_right += int((logits.argmax(dim=1) == y).sum())
        optimizer.step()
    return private.epsilon(delta, accountant="prv")
