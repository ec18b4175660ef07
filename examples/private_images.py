"""Train a small convolutional network on scikit-learn's handwritten digits, privately.

Run it: python examples/private_images.py [OUTPUT] [--seed SEED]

The loop calls the model and forms the losses itself, so that it has the logits for its accuracy.
MLflow's store, and `training.html` with the curves, are in OUTPUT.
"""

from pathlib import Path

import mlflow
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from tracked import options, track_in

from dpsgd_track import make_private, write_training_page

NUM_TRAINED, BATCH_SIZE, NUM_STEPS = 1500, 300, 60
TARGET_EPSILON, DELTA, C = 4.0, 1e-4, 1.0


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images to train on, 8 x 8 pixels from 0 to 1, and others to test on."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    trained, tested = order[:NUM_TRAINED], order[NUM_TRAINED:]
    return TensorDataset(x[trained], y[trained]), TensorDataset(x[tested], y[tested])


def network() -> nn.Module:
    """Two convolutions. GroupNorm keeps to one image, where BatchNorm would mix them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Loss of each image; a mean would mix them."""
    return F.cross_entropy(logits, y, reduction="none")


def train(model: nn.Module, images: TensorDataset, output: Path, seed: int | None) -> float:
    """Train privately, and track each step; returns the epsilon that was spent."""
    optimizer = optimizer_of(model)
    private = make_private(
        model,
        optimizer,
        target_epsilon=TARGET_EPSILON,
        target_delta=DELTA,
        num_steps=NUM_STEPS,
        sample_rate=BATCH_SIZE / len(images),
        max_grad_norm=C,
        expected_batch_size=BATCH_SIZE,
        seed=seed,
    )
    history = []
    for batches in private.loader(images, num_steps=NUM_STEPS, physical_batch_size=256):
        num_right = num_seen = 0
        for x, y in batches:
            with private.batch(len(x)):
                logits = model(x)
                private.backward(losses(logits, y))
            num_right += int((logits.argmax(dim=1) == y).sum())
            num_seen += len(y)
        optimizer.step()
        # All but epsilon is of training samples, and no noise protects it: keep it to yourself.
        history.append(private.step_metrics(DELTA))
        accuracy = num_right / max(1, num_seen)
        mlflow.log_metrics(history[-1].logged | {"accuracy": accuracy}, step=history[-1].step)
    page = write_training_page(history, output / "training.html", title="Handwritten digits")
    mlflow.log_artifact(str(page))
    return history[-1].epsilon


@torch.no_grad()
def accuracy_of(model: nn.Module, images: TensorDataset) -> float:
    x, y = images.tensors
    return (model(x).argmax(dim=1) == y).float().mean().item()


def main() -> None:
    chosen = options()
    track_in(chosen.output)
    trained, tested = digits()
    model = network()
    print(f"accuracy before {accuracy_of(model, tested):.1%}")
    with mlflow.start_run():
        epsilon = train(model, trained, chosen.output, chosen.seed)
        accuracy = accuracy_of(model, tested)
        mlflow.log_metric("test_accuracy", accuracy)
    print(f"accuracy {accuracy:.1%}")
    print(f"epsilon {epsilon:.2f} at delta {DELTA}")


if __name__ == "__main__":
    main()
