"""The top of BERT with this package: a target epsilon, and several micro-batches a step."""

from torch import nn
from torch.optim import AdamW
from torch.utils import data

from dpsgd_track import make_private


def train(
    model: nn.Module, dataset: data.Dataset, batch_size: int, epsilon: float, c: float, delta: float
) -> float:
    num_epochs = 3
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    private = make_private(
        model,
        optimizer,
        expected_batch_size=batch_size,
        target_epsilon=epsilon,
        target_delta=delta,
        num_steps=num_epochs * round(len(dataset) / batch_size),
        sample_rate=batch_size / len(dataset),
        max_grad_norm=c,
    )
    losses = []
    for _ in range(num_epochs):
        for micro_batches in private.loader(dataset, physical_batch_size=4):
            for batch in micro_batches:
                labels = batch.pop("labels")
                loss = private.backward(batch, labels).mean()
                losses.append(loss.item())
            optimizer.step()
    return private.epsilon(delta)
