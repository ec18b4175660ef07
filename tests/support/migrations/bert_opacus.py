"""The top of BERT with Opacus: a target epsilon, and several micro-batches a step."""

from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.optim import AdamW
from torch.utils import data


def train(
    model: nn.Module, dataset: data.Dataset, batch_size: int, epsilon: float, c: float, delta: float
) -> float:
    num_epochs = 3
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = data.DataLoader(dataset, batch_size=batch_size)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=epsilon,
        target_delta=delta,
        epochs=num_epochs,
        max_grad_norm=c,
    )
    losses = []
    for _ in range(num_epochs):
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
        ) as micro_batches:
            for batch in micro_batches:
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
    return engine.get_epsilon(delta)
