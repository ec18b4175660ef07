"""transformers' Trainer with private steps: against a loop of one's own, killed and resumed."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset
from transformers import TrainerCallback, TrainingArguments

import dpsgd_track
from dpsgd_track.privacy.accounting import epsilon_rdp
from dpsgd_track.privacy.loss import classification_loss
from dpsgd_track.trainer import PRIVACY_FILE, PrivacyArguments, PrivateTrainer
from tests.support import ROOT
from tests.support.forked_ranks import ForkedRanks
from tests.support.torchrun_trainer import (
    ACCUMULATED,
    DELTA,
    MICRO,
    NUM_SAMPLES,
    SIGMA,
    C,
    Sentences,
    T,
    fresh,
    of_ranks,
    trainer_of,
)

RATE = MICRO * ACCUMULATED / NUM_SAMPLES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    # Its new name is not in every release that is supported.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated"),
]


@pytest.fixture(autouse=True, scope="module")
def own_state() -> Iterator[None]:
    """Accelerate's state, such as mixed precision, is the process's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PrivateTrainer:
    """Trained with dropout to its end, with a checkpoint half way."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(fresh(0.1), folder, save_strategy="steps", save_steps=3)
    trainer.train()
    return trainer


def test_steps_are_those_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    trainer = trainer_of(
        fresh(), tmp_path, lr_scheduler_type="constant", optim="sgd", logging_steps=1
    )
    trainer.train()
    model = fresh()
    private = dpsgd_track.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
        expected_batch_size=MICRO * ACCUMULATED,
        loss=classification_loss,
        seed=5,
    )
    sizes, history = [], []
    for _ in range(2):
        for batches in private.loader(Sentences(), physical_batch_size=MICRO):
            for batch in batches:
                private.backward(batch, batch.pop("labels"))
            sizes.append(private._num_added)
            private.mode.optimizer.step()
            history.append(private.step_metrics(DELTA))
            if len(sizes) == 6:
                break
    assert len(set(sizes)) > 1, "batches are drawn"
    torch.testing.assert_close(weights(trainer.model), weights(model), rtol=1e-5, atol=1e-6)
    for logged, measured in zip(trainer.history, history, strict=True):
        assert asdict(logged) == pytest.approx(asdict(measured), rel=1e-4)


def test_a_resumed_training_is_an_uninterrupted_one(whole: PrivateTrainer, tmp_path: Path) -> None:
    checkpoint = Path(whole.args.output_dir) / "checkpoint-3"
    torch.manual_seed(99)
    resumed = trainer_of(fresh(0.1), tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.private is not None
    assert whole.private is not None
    assert resumed.private.num_steps == whole.private.num_steps == 6
    assert resumed.private.epsilon(DELTA) == whole.private.epsilon(DELTA)
    # The log at step 4 is of the steps since the checkpoint alone.
    assert [each.step for each in whole.history] == [2, 4, 6]
    assert resumed.history[::2] == whole.history[::2]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_several_ranks_train_as_one(tmp_path: Path, rank_host: ForkedRanks, num_ranks: int) -> None:
    ended = rank_host.run("tests.support.torchrun_trainer", str(tmp_path), num_ranks=num_ranks)
    assert ended.code == 0, ended.log
    found, *others = [
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_ranks)
    ]
    assert {*found["classes"]} == {"DTensor"}, "the model is sharded"
    assert found["is_resumed_as_whole"]
    assert all(other["eval_loss"] == found["eval_loss"] for other in others)

    assert found["steps_of_two"] == 12
    assert found["steps_on_one_model"] == 2
    assert "'Adafactor': expected one that updates sharded parameters" in found["refusal"]
    assert found["chosen"].endswith("checkpoint-3"), "the one with the larger loss"
    of_best = load_file(tmp_path / "kept" / "model.safetensors")
    chosen = load_file(tmp_path / "chosen" / "model.safetensors")
    assert all(torch.equal(value, of_best[name]) for name, value in chosen.items())

    one = of_ranks(tmp_path / "one", 1)
    one.train()
    saved = load_file(tmp_path / "end" / "model.safetensors")
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-5)
    assert one.evaluate()["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-4)
    for line, wanted in zip(found["log"], one.state.log_history, strict=True):
        assert line.keys() == wanted.keys()
        compared = {"loss", "train_loss", "epsilon", "clip_fraction", "learning_rate"}
        for name in compared & line.keys():
            assert line[name] == pytest.approx(wanted[name], rel=1e-4)
    # A checkpoint of several ranks is that of one.
    resumed = of_ranks(tmp_path / "resumed on one", 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    torch.testing.assert_close(weights(resumed.model), weights(one.model), rtol=1e-4, atol=1e-5)
    assert resumed.private is not None
    assert one.private is not None
    assert resumed.private.epsilon(DELTA) == one.private.epsilon(DELTA)


def test_epsilon_is_in_the_logs(whole: PrivateTrainer) -> None:
    logged = [line["epsilon"] for line in whole.state.log_history if "epsilon" in line]
    wanted = [epsilon_rdp(((SIGMA, RATE, steps),), DELTA) for steps in (2, 4, 6, 6)]
    assert logged == pytest.approx(wanted)
    metrics = whole.evaluate()
    assert "eval_loss" in metrics
    assert not {"epsilon", "clip_fraction"} & set(metrics)


@pytest.mark.parametrize("lost", [PRIVACY_FILE, "optimizer.pt"])
def test_a_checkpoint_that_lacks_a_file_is_refused(
    whole: PrivateTrainer, tmp_path: Path, lost: str
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-3", checkpoint)
    spent = json.loads((checkpoint / PRIVACY_FILE).read_text())
    assert spent
    (checkpoint / lost).unlink()
    with pytest.raises(ValueError, match=f"expected an? {lost}"):
        trainer_of(fresh(0.1), tmp_path).train(resume_from_checkpoint=str(checkpoint))


# Of the compiler itself, where a graph begins at an activation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
# The arguments set it for good.
@patch.dict(os.environ)
def test_a_compiled_model_is_trained_as_without(tmp_path: Path) -> None:
    plain = trainer_of(fresh(), tmp_path / "plain", max_steps=2)
    plain.train()
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    compiled = trainer_of(fresh(), tmp_path / "compiled", **settings)
    compiled.train()
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    torch.testing.assert_close(weights(compiled.model), weights(plain.model), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_a_step_without_samples_has_no_loss(tmp_path: Path) -> None:
    trainer = trainer_of(fresh(), tmp_path, max_steps=1)
    trainer.train()
    empty = {name: torch.as_tensor(x)[None][:0] for name, x in Sentences()[0].items()}
    # The Trainer leaves it out of the mean that it logs.
    assert trainer.args.logging_nan_inf_filter
    assert trainer.training_step(trainer.model, [empty]).isnan()


def test_a_target_epsilon_is_kept_to(tmp_path: Path) -> None:
    target = {"noise_multiplier": None, "target_epsilon": 3.0}
    trainer = trainer_of(fresh(), tmp_path, target, num_train_epochs=1, max_steps=-1)
    trainer.train()
    assert trainer.private is not None
    assert trainer.private.num_steps == round(1 / RATE)
    assert 2.9 < trainer.private.epsilon(DELTA) <= 3.0


def test_the_arguments_given_are_left_as_they_are(whole: PrivateTrainer, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    before = copy.deepcopy(arguments.to_dict())
    PrivateTrainer(
        fresh(),
        arguments,
        train_dataset=Sentences(),
        privacy=PrivacyArguments(delta=DELTA, noise_multiplier=SIGMA),
    )
    assert arguments.to_dict() == before


def test_one_process_trains_on_one_gpu(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_grad_norm=C)
    arguments._n_gpu = 2
    privacy = PrivacyArguments(delta=DELTA, noise_multiplier=SIGMA)
    trainer = PrivateTrainer(fresh(), arguments, train_dataset=Sentences(), privacy=privacy)
    # Otherwise the model would run as copies, in which nothing is captured.
    assert trainer.args.n_gpu == 1
    assert trainer.get_total_train_batch_size(trainer.args) == arguments.per_device_train_batch_size


class NoLoss(nn.Module):
    """Of a class that says nothing of its task."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.layer(input_ids)
        return y


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (None, {"max_grad_norm": 0.0}, "max_grad_norm=0.0: expected a number > 0"),
        (None, {"fp16": True}, "fp16=True: expected False. Take bf16"),
        (None, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: expected 0"),
        (None, {"auto_find_batch_size": True}, "auto_find_batch_size=True: expected False"),
        (NoLoss(), {}, "or a function, for NoLoss"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    model: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of(model or fresh(), tmp_path, **changes)


class Endless(IterableDataset[dict[str, Tensor]]):
    """A stream that tells a length."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(Sentences())  # type: ignore[call-overload, no-any-return]


class OfSeveralLabels(Sentences):
    """Each sample has a number for each class."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {"labels": torch.ones(3)}


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (Endless(), "train_dataset='Endless': expected a data set with a length and a sample"),
        (Subset(Sentences(), range(7)), "train_dataset=7: expected at least the 8 samples"),
        (OfSeveralLabels(), "labels='torch.float32': expected numbers of classes. Give `loss`"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples: Any, words: str, tmp_path: Path) -> None:
    trainer = trainer_of(fresh(), tmp_path, train_dataset=samples)
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_the_loss_is_that_of_the_models_kind_of_problem(tmp_path: Path) -> None:
    model: Any = fresh()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type='multi_label_classification': expected"):
        trainer_of(model, tmp_path)
    model.config.problem_type = "regression"
    samples = OfSeveralLabels()
    trainer = trainer_of(model, tmp_path, train_dataset=samples, max_steps=1, logging_steps=1)
    wanted = trainer.evaluate(samples)["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(wanted, rel=0.2)


def test_a_training_resumed_from_its_end_takes_no_step(
    whole: PrivateTrainer, tmp_path: Path
) -> None:
    resumed = trainer_of(fresh(0.1), tmp_path)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-6"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.private is not None
    assert resumed.private.num_steps == 6


def test_a_search_whose_best_trial_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The best of several spends more"):
        trainer_of(fresh(), tmp_path).hyperparameter_search()


def test_tokens_are_counted_in_every_micro_batch(tmp_path: Path) -> None:
    trainer = trainer_of(fresh(), tmp_path, max_steps=2, include_num_input_tokens_seen="all")
    sizes = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        return classification_loss(logits, labels)

    trainer._loss = loss
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(sizes) * T > 0


def test_an_epoch_has_the_steps_that_are_planned(tmp_path: Path) -> None:
    # 99 / 2 is rounded up, and 1 / (2 / 99) down.
    samples = Subset(Sentences(), [*range(33)] * 3)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    settings = {"num_train_epochs": 1, "max_steps": -1, "logging_steps": 50, **sizes}
    trainer = trainer_of(fresh(), tmp_path, train_dataset=samples, **settings)
    assert trainer.train().global_step == trainer.state.max_steps == 50


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("trainer_state.json", None, "expected a whole checkpoint, which has a trainer_state.json"),
        (PRIVACY_FILE, '{"kind": "dp', "privacy.json: expected what was spent, as JSON"),
    ],
)
def test_an_interrupted_checkpoint_is_refused(
    whole: PrivateTrainer, tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-3", checkpoint)
    (checkpoint / name).unlink()
    if text is not None:
        (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        trainer_of(fresh(0.1), tmp_path).train(resume_from_checkpoint=True)


def test_a_loss_of_the_trainers_own_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_loss_func='a function': expected None"):
        PrivateTrainer(
            fresh(),
            TrainingArguments(output_dir=str(tmp_path), max_grad_norm=C, use_cpu=True),
            privacy=PrivacyArguments(delta=DELTA, noise_multiplier=SIGMA),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(),
        )


class Stops(TrainerCallback):
    """A callback as users have them: it stops the training early."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= 2
        return control


def test_callbacks_work_as_before(tmp_path: Path) -> None:
    trainer = trainer_of(fresh(), tmp_path, {"clipping": "per_layer", "passes": 2}, bf16=True)
    trainer.add_callback(Stops())
    trainer.train()
    assert trainer.private is not None
    assert trainer.private.num_steps == 2
    assert trainer.private.spot_checks.num_checks > 0


def test_the_trainer_that_the_page_shows_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*PrivateTrainer[^`]*)```", page)
    names: dict[str, Any] = {"model": fresh(), "train": Sentences()}
    exec(code, names)
    spent = json.loads(next(tmp_path.glob("out/*/" + PRIVACY_FILE)).read_text())
    assert spent
    assert 7.0 < names["trainer"].state.log_history[-1]["epsilon"] <= 8.0
