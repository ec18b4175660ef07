"""Fine-tune a small language model with LoRA, privately.

Run it: python examples/private_lora.py [OUTPUT] [--seed SEED]

The model learns sentences in the active voice publicly. Its weights are then frozen, and adapters
on its attention learn the passive voice from private sentences. MLflow's store, and `training.html`
with the curves, are in OUTPUT.
"""

import random
from itertools import chain
from pathlib import Path

import mlflow
import torch
from torch import nn
from torch.utils.data import TensorDataset
from tracked import options, track_in
from transformers import LlamaConfig, LlamaForCausalLM

from dpsgd_track import make_private, write_training_page
from dpsgd_track.privacy.loss import causal_lm_loss

NUM_TRAINED, BATCH_SIZE, NUM_STEPS = 2000, 200, 60
TARGET_EPSILON, DELTA, C = 4.0, 1e-4, 1.0
ACTIVE = "the {old} {dog} has {seen} the {red} {ball} {today} ."
PASSIVE = "{today} the {red} {ball} was {seen} by the {old} {dog} ."
WORDS = {
    "old": ["old", "young", "small", "tall"],
    "dog": ["dog", "cat", "bird", "child", "teacher", "farmer"],
    "seen": ["seen", "found", "taken", "painted", "lost", "sold"],
    "red": ["red", "blue", "heavy", "broken"],
    "ball": ["ball", "book", "lamp", "chair", "bicycle", "picture"],
    "today": ["today", "yesterday", "again"],
}
VOCABULARY = sorted({*["the", "has", "was", "by", "."], *chain(*WORDS.values())})


class LoRA(nn.Module):
    """A frozen linear layer, and beside it a trained one of low rank that begins as zero."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.up(self.down(x))


def sentences(form: str, size: int, seed: int) -> torch.Tensor:
    """Tokens of made-up sentences, all of the same length."""
    chosen = random.Random(seed)
    texts = [form.format(**{k: chosen.choice(v) for k, v in WORDS.items()}) for _ in range(size)]
    return torch.tensor([[VOCABULARY.index(word) for word in text.split()] for text in texts])


def private_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences in the passive voice, to train on and to test on."""
    return sentences(PASSIVE, NUM_TRAINED, seed=1), sentences(PASSIVE, 200, seed=2)


def losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of each sentence; a mean, as the model forms of `labels`, would mix them."""
    return causal_lm_loss(model(input_ids=tokens).logits, tokens)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    return losses(model, tokens).mean().exp().item()


def trained_publicly(num_steps: int = 150) -> nn.Module:
    """A model that knows the active voice."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        optimizer.zero_grad()
        losses(model, sentences(ACTIVE, 32, seed=step)).mean().backward()
        optimizer.step()
    return model


def with_adapters(model: nn.Module, rank: int = 8) -> nn.Module:
    """`model` frozen, with adapters on the queries and values of each layer."""
    torch.manual_seed(1)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj, rank)
        layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj, rank)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def train(model: nn.Module, tokens: torch.Tensor, output: Path, seed: int | None) -> float:
    """Train privately, and track each step; returns the epsilon that was spent."""
    optimizer = optimizer_of(model)
    private = make_private(
        model,
        optimizer,
        target_epsilon=TARGET_EPSILON,
        target_delta=DELTA,
        num_steps=NUM_STEPS,
        sample_rate=BATCH_SIZE / len(tokens),
        max_grad_norm=C,
        expected_batch_size=BATCH_SIZE,
        seed=seed,
    )
    history = []
    for batches in private.loader(TensorDataset(tokens), num_steps=NUM_STEPS):
        for (batch,) in batches:
            with private.batch(len(batch)):
                private.backward(losses(model, batch))
        optimizer.step()
        # All but epsilon is of training samples, and no noise protects it: keep it to yourself.
        history.append(private.step_metrics(DELTA))
        mlflow.log_metrics(history[-1].logged, step=history[-1].step)
    page = write_training_page(history, output / "training.html", title="LoRA on the passive voice")
    mlflow.log_artifact(str(page))
    return history[-1].epsilon


def main() -> None:
    chosen = options()
    track_in(chosen.output)
    model = with_adapters(trained_publicly())
    trained, tested = private_text()
    print(f"perplexity before {perplexity(model, tested):.2f}")
    with mlflow.start_run():
        epsilon = train(model, trained, chosen.output, chosen.seed)
        after = perplexity(model, tested)
        mlflow.log_metric("test_perplexity", after)
    print(f"perplexity {after:.2f}")
    print(f"epsilon {epsilon:.2f} at delta {DELTA}")


if __name__ == "__main__":
    main()
