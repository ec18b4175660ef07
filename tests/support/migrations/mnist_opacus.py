"""MNIST with Opacus: one batch a step."""

from opacus import PrivacyEngine
from torch import nn
from torch.optim import SGD
from torch.utils import data


def train(
    model: nn.Module, dataset: data.Dataset, batch_size: int, sigma: float, c: float, delta: float
) -> float:
    optimizer = SGD(model.parameters(), lr=0.5)
    criterion = nn.CrossEntropyLoss()
    loader = data.DataLoader(dataset, batch_size=batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=sigma,
        max_grad_norm=c,
    )
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return engine.get_epsilon(delta)
