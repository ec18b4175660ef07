"""MNIST with this package: one batch a step."""

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
    losses = []
    for ((x, y),) in private.loader(dataset):
        optimizer.zero_grad()
        loss = private.backward(x, y).mean()
        optimizer.step()
        losses.append(loss.item())
    return private.epsilon(delta, accountant="prv")
