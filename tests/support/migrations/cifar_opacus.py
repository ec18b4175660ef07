"""CIFAR-10 with Opacus: several micro-batches a step, and accuracy from the logits."""

import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.optim import SGD
from torch.utils import data


def train(
    model: nn.Module, dataset: data.Dataset, batch_size: int, sigma: float, c: float, delta: float
) -> float:
    optimizer = SGD(model.parameters(), lr=0.5)
    loader = data.DataLoader(dataset, batch_size=batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=sigma,
        max_grad_norm=c,
    )
    num_right = 0
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
    ) as micro_batches:
        for x, y in micro_batches:
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            num_right += int((logits.argmax(dim=1) == y).sum())
            optimizer.step()
    return engine.get_epsilon(delta)
