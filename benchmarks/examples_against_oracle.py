#!/usr/bin/env python
"""Train the model of each example once more by an oracle, and compare the final metrics.

    python benchmarks/examples_against_oracle.py OUT.csv [--seeds 3] [--only private_lora]

The oracle is DP-SGD by its definition: for each sample of a step one forward and one call of
`torch.autograd.grad`, the gradient clipped and added, then the noise. It is given the draws and the
noise of the example's own training, by its seed, and shares nothing else with the engine. One CSV
row for each example and seed; exits with 1 where the final metrics differ by more than one point.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "examples"):
    sys.path.insert(0, str(folder))

from dpsgd_track.distributed.sharding import LocalPart  # noqa: E402
from dpsgd_track.privacy.calibration import Budget  # noqa: E402
from dpsgd_track.privacy.noise import NoiseSource  # noqa: E402
from dpsgd_track.privacy.sampling import PoissonSampler  # noqa: E402

POINT = 1.0
"""Most by which final metrics may differ, in percent or in units of perplexity."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training of an example's, as an oracle needs it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    num_samples: int
    batch_size: int
    """Samples that a step is expected to hold."""
    num_steps: int
    epsilon: float
    delta: float
    max_grad_norm: float
    loss_of: Callable[[int], Tensor]
    """Loss of the sample with an index, of a forward of its own."""
    metric: Callable[[], float]
    """On samples that the model was not trained on."""
    share_of_rate: Callable[[int], float] = lambda step: 1.0
    """Learning rate of a step, as a share of the first."""

    @property
    def sample_rate(self) -> float:
        return self.batch_size / self.num_samples


def train_by_oracle(training: Training, seed: int) -> None:
    """DP-SGD, one sample at a time, with the draws and the noise of `seed`."""
    budget = Budget(
        target_epsilon=training.epsilon,
        target_delta=training.delta,
        num_steps=training.num_steps,
        accountant="rdp",
    )
    sigma = budget.noise_multiplier((), training.sample_rate)
    sampler = PoissonSampler(
        key=str(seed),
        num_samples=training.num_samples,
        sample_rate=training.sample_rate,
        rank=0,
        num_ranks=1,
    )
    scheduler = LambdaLR(training.optimizer, training.share_of_rate)
    trained = {name: p for name, p in training.model.named_parameters() if p.requires_grad}
    for step in range(training.num_steps):
        sums = clipped_sums(training, trained, sampler.global_draw(step).tolist())
        noise = NoiseSource(str(seed), step)
        for name, parameter in trained.items():
            drawn = noise.standard_normal(LocalPart(name, parameter, 0, parameter.numel()))
            noisy = sums[name] + sigma * training.max_grad_norm * drawn
            parameter.grad = noisy / training.batch_size
        training.optimizer.step()
        scheduler.step()


def clipped_sums(
    training: Training, trained: dict[str, nn.Parameter], indices: list[int]
) -> dict[str, Tensor]:
    """Sum over samples of min(1, C / norm) times the gradient."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for index in indices:
        gradients = torch.autograd.grad(training.loss_of(index), list(trained.values()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        factor = min(1.0, training.max_grad_norm / norm) if norm > 0 else 1.0
        for name, gradient in zip(trained, gradients, strict=True):
            sums[name].add_(gradient, alpha=factor)
    return sums


def _settings(example: ModuleType) -> dict[str, Any]:
    """Settings of an example's training, by the names of `Training`."""
    return {
        "batch_size": example.BATCH_SIZE,
        "num_steps": example.NUM_STEPS,
        "epsilon": example.TARGET_EPSILON,
        "delta": example.DELTA,
        "max_grad_norm": example.C,
    }


def of_images(example: ModuleType) -> Training:
    trained, tested = example.digits()
    model = example.network()
    x, y = trained.tensors
    return Training(
        model=model,
        optimizer=example.optimizer_of(model),
        num_samples=len(trained),
        **_settings(example),
        loss_of=lambda i: example.losses(model(x[i : i + 1]), y[i : i + 1])[0],
        metric=lambda: 100 * example.accuracy_of(model, tested),
    )


def of_lora(example: ModuleType) -> Training:
    trained, tested = example.private_text()
    model = example.with_adapters(example.trained_publicly())
    return Training(
        model=model,
        optimizer=example.optimizer_of(model),
        num_samples=len(trained),
        **_settings(example),
        loss_of=lambda i: example.losses(model, trained[i : i + 1])[0],
        metric=lambda: example.perplexity(model, tested),
    )


def of_trainer(example: ModuleType) -> Training:
    trained, tested = example.sentences()
    model = example.network().train()
    updated = [p for p in model.parameters() if p.requires_grad]
    num_steps = round(len(trained) / example.BATCH_SIZE)

    def logits(dataset: Any, index: int) -> Tensor:
        tokens = {name: values[index : index + 1] for name, values in dataset.tokens.items()}
        return model(**tokens).logits

    @torch.no_grad()
    def accuracy() -> float:
        right = [logits(tested, i).argmax().item() == y for i, y in enumerate(tested.labels)]
        return 100 * sum(right) / len(right)

    return Training(
        model=model,
        # As the Trainer's: AdamW without decay, and a rate that falls to 0 in a straight line.
        optimizer=torch.optim.AdamW(updated, lr=example.LEARNING_RATE, weight_decay=0.0),
        num_samples=len(trained),
        batch_size=example.BATCH_SIZE,
        num_steps=num_steps,
        epsilon=example.TARGET_EPSILON,
        delta=example.DELTA,
        max_grad_norm=example.C,
        loss_of=lambda i: nn.functional.cross_entropy(
            logits(trained, i), torch.tensor(trained.labels[i : i + 1])
        ),
        metric=accuracy,
        share_of_rate=lambda step: 1 - step / num_steps,
    )


def train_loop(
    example: ModuleType, of: Callable[[ModuleType], Training], output: Path, seed: int
) -> Training:
    """Have an example's own loop train its model."""
    training = of(example)
    data = example.digits if hasattr(example, "digits") else example.private_text
    example.train(training.model, data()[0], output, seed)
    return training


def train_trainer(example: ModuleType, output: Path, seed: int) -> Training:
    """Have an example's `PrivateTrainer` train its model."""
    trainer = example.trainer_of(output, seed)
    trainer.train()
    training = of_trainer(example)
    training.model.load_state_dict(trainer.model.state_dict())
    return training


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The two trainings of an example."""

    metric: str
    for_oracle: Callable[[ModuleType], Training]
    by_itself: Callable[[ModuleType, Path, int], Training]


def _by_loop(of: Callable[[ModuleType], Training]) -> Callable[[ModuleType, Path, int], Training]:
    return lambda example, output, seed: train_loop(example, of, output, seed)


CONTESTS = {
    "private_images": Contest(
        metric="accuracy_percent", for_oracle=of_images, by_itself=_by_loop(of_images)
    ),
    "private_lora": Contest(metric="perplexity", for_oracle=of_lora, by_itself=_by_loop(of_lora)),
    "private_trainer": Contest(
        metric="accuracy_percent", for_oracle=of_trainer, by_itself=train_trainer
    ),
}
"""By the example's name."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Outcome of both trainings of an example with one seed."""

    example: str
    seed: int
    metric: str
    before: float
    by_example: float
    by_oracle: float
    difference: float
    weight_error: float
    """Largest difference of a trained weight, over the largest change of one by the training."""
    num_steps: int
    epsilon: float
    example_s: float
    oracle_s: float
    """CPU times of the trainings."""


def contest(name: str, seed: int, output: Path) -> Row:
    """Train an example's model by the example and by the oracle."""
    example, both = importlib.import_module(name), CONTESTS[name]
    start = time.process_time()
    with mlflow.start_run():
        own = both.by_itself(example, output, seed)
    own_s = time.process_time() - start
    oracle = both.for_oracle(example)
    before, initial = oracle.metric(), weights(oracle.model)
    start = time.process_time()
    train_by_oracle(oracle, seed)
    oracle_s = time.process_time() - start
    moved = (weights(oracle.model) - initial).abs().max()
    error = (weights(own.model) - weights(oracle.model)).abs().max() / moved
    metrics = own.metric(), oracle.metric()
    return Row(
        example=name,
        seed=seed,
        metric=both.metric,
        before=round(before, 3),
        by_example=round(metrics[0], 3),
        by_oracle=round(metrics[1], 3),
        difference=round(abs(metrics[0] - metrics[1]), 4),
        weight_error=float(f"{error:.2g}"),
        num_steps=oracle.num_steps,
        epsilon=oracle.epsilon,
        example_s=round(own_s, 1),
        oracle_s=round(oracle_s, 1),
    )


def weights(model: nn.Module) -> Tensor:
    """Trained weights of a model, in a row."""
    trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(trained).clone()


def rows(names: list[str], num_seeds: int) -> Iterator[dict[str, Any]]:
    """One for each example and seed, with versions and the commit."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    about = {name: version(name) for name in ("torch", "transformers")} | {"commit": commit}
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("tracked").track_in(Path(folder))
        for name in names:
            for seed in range(num_seeds):
                yield asdict(contest(name, seed, Path(folder))) | about


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("out", type=Path)
    made.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each example")
    made.add_argument("--only", choices=CONTESTS, action="append", help="name of an example")
    return made


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    is_wrong = False
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows(options.only or list(CONTESTS), options.seeds):
            writer = writer or csv.DictWriter(file, list(row), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)
            is_wrong |= row["difference"] > POINT
    sys.exit(int(is_wrong))


if __name__ == "__main__":
    main()
