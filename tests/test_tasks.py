"""Tasks besides text classification and language models: their data, models and layers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn

from dpsgd_track.cli.main import main
from dpsgd_track.config import (
    IMAGES,
    SEQ2SEQ,
    TAGGING,
    DataConfig,
    ModelConfig,
    PrivacyConfig,
)
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import ModeContext
from dpsgd_track.privacy.loss import IGNORED, LOSSES
from dpsgd_track.training.data import build_dataset
from dpsgd_track.training.model import build_model
from dpsgd_track.training.model_source import resolve_model
from dpsgd_track.training.preflight import check_inputs
from dpsgd_track.training.sample import Sample
from dpsgd_track.training.task_fit import build_on_cpu, check_fit, trial_batch
from dpsgd_track.training.task_source import num_labels_of, population_of, read_source

CPU = torch.device("cpu")
NARROW: dict[str, Any] = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1}
NARROW |= {"num_attention_heads": 2, "intermediate_size": 32}
T5: dict[str, Any] = {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
CONFIGS: dict[str, Any] = {
    IMAGES: hf.ViTConfig(**NARROW, image_size=8, patch_size=4),
    TAGGING: hf.BertConfig(**NARROW),
    SEQ2SEQ: hf.T5Config(**T5, num_heads=2, decoder_start_token_id=1, pad_token_id=0),
}
"""Configuration of a tiny model of each task."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with a configuration alone, for each task."""
    made = {}
    for task, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(config.model_type)
        config.save_pretrained(folder)
        made[task] = str(folder)
    return made


def _built(model: ModelConfig, data: DataConfig) -> nn.Module:
    return build_model(model, num_labels=num_labels_of(model, data), seed=0, device=CPU)


def _record(mode: str, model: nn.Module, task: str, batch: Any) -> Any:
    context = ModeContext(
        privacy=PrivacyConfig(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=3),
        device=CPU,
        param_dtype=torch.float32,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=LOSSES[task],
    )
    return build_mode(mode, model, context).accumulate(batch)


@pytest.mark.parametrize("task", CONFIGS)
def test_a_mode_computes_what_the_oracle_does(task: str, folders: dict[str, str]) -> None:
    model = ModelConfig(name=folders[task], task=task)
    data = DataConfig(seq_length=9, ragged=True)
    records = []
    for mode in ("reference", "flash_bk"):
        built = _built(model, data)
        batch = trial_batch(model, data, built)
        records.append(_record(mode, built, task, batch))
    torch.testing.assert_close(
        records[1].norm_B.double(), records[0].norm_B.double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        records[1].loss_B.double(), records[0].loss_B.double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("task", CONFIGS)
def test_a_model_that_does_not_fit_its_task_is_refused_at_once(
    task: str, folders: dict[str, str]
) -> None:
    other = SEQ2SEQ if task == IMAGES else IMAGES
    with pytest.raises(ValueError, match=rf"task='{other}': expected one of .*{task}"):
        check_inputs(ModelConfig(name=folders[task], task=other), DataConfig())


def _samples(task: str, folder: str, source: str = "synthetic", **data: Any) -> list[Sample]:
    model = ModelConfig(name=folder, task=task)
    config = DataConfig(source=source, **{"seq_length": 12} | data)
    samples = build_dataset(model, config, _built(model, config), seed=7)
    return [samples.sample(index) for index in range(20)]


def test_a_decoder_reads_the_targets_one_step_late(folders: dict[str, str]) -> None:
    for sample in _samples(SEQ2SEQ, folders[SEQ2SEQ], ragged=True):
        read, target = sample.inputs["decoder_input_ids"], sample.target
        (num_targets,) = np.flatnonzero(target == IGNORED)[:1].tolist() or [12]
        assert read[0] == 1
        assert read[1:num_targets].tolist() == target[: num_targets - 1].tolist()
        assert set(target[num_targets:]) <= {IGNORED}
        assert not read[num_targets:].any()


def test_sources_targets_and_pixels_are_functions_of_the_index(folders: dict[str, str]) -> None:
    for task in CONFIGS:
        first, again = (_samples(task, folders[task]) for _ in range(2))
        digests = [sample.digest() for sample in first]
        assert digests == [sample.digest() for sample in again]
        assert len(set(digests)) == len(digests)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes, with three images each, of several forms."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(3):
            colour = (80 * number, 255 * label, 7)
            image = Image.new("RGB", (20 + number, 10), colour)
            (image.convert("L") if number else image).save(tmp_path / name / f"{number}.png")
    (tmp_path / ".hidden").write_text("no image")
    return tmp_path


def test_images_are_decoded_from_a_folder_for_each_class(
    pictures: Path, folders: dict[str, str]
) -> None:
    samples = _samples(IMAGES, folders[IMAGES], str(pictures))
    assert {sample.inputs["pixel_values"].shape for sample in samples} == {(3, 8, 8)}
    assert len({sample.digest() for sample in samples[:6]}) == 6
    assert sorted(int(sample.target) for sample in samples[:6]) == [0, 0, 0, 1, 1, 1]
    # Of the image of black and of the one with 255 in its second channel.
    seen = {float(s.inputs["pixel_values"][1, 0, 0]) for s in samples}
    assert min(seen) == -1
    assert max(seen) == 1
    data = DataConfig(source=str(pictures), sampling="poisson")
    assert population_of(data, IMAGES) == 6


def test_what_is_no_image_is_named(pictures: Path, folders: dict[str, str]) -> None:
    (pictures / "cat" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png': expected an image that Pillow decodes"):
        _samples(IMAGES, folders[IMAGES], str(pictures))
    (pictures / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"notes.txt': expected image files, whose names end"):
        read_source(str(pictures), IMAGES)


def _jsonl(path: Path, *rows: object) -> str:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_first_token_of_a_word_has_its_label(tmp_path: Path) -> None:
    rows = (
        {"tokens": ["Wolfgangs", "sings"], "labels": ["PER", "O"]},
        {"text": "in Unterammergau", "labels": ["O", "LOC"]},
    )
    samples = _samples(TAGGING, "minilm", _jsonl(tmp_path, *rows))
    tokenizer = hf.AutoTokenizer.from_pretrained(resolve_model(ModelConfig(name="minilm")).path)
    seen = set()
    for sample in samples:
        tokens = tokenizer.convert_ids_to_tokens(sample.inputs["input_ids"])
        asked = [(t, int(c)) for t, c in zip(tokens, sample.target, strict=True) if c != IGNORED]
        assert not any(token.startswith(("##", "[")) for token, _ in asked)
        assert len(tokens) == 12
        seen.add(tuple(asked))
    assert seen == {(("wolfgang", 2), ("sings", 1)), (("in", 1), ("un", 0))}


def test_pairs_are_read_through_the_tokenizer(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"source": "a cat", "target": "one dog"})
    read = read_source(source, SEQ2SEQ)
    assert len(read) == 1
    assert num_labels_of(ModelConfig(name="x", task=SEQ2SEQ), DataConfig(source=source)) == 2


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (TAGGING, {"tokens": ["a", " "], "labels": [0, 1]}, "line 1, tokens=.*none empty"),
        (TAGGING, {"tokens": ["a", "b"], "labels": [0]}, "line 1, labels=.*expected 2 labels"),
        (TAGGING, {"tokens": ["a", "b"], "labels": [0, None]}, "line 1, labels=.*for each word"),
        (TAGGING, {"tokens": ["a", "b"], "labels": [1, 1]}, "two classes or more"),
        (SEQ2SEQ, {"source": "a", "target": ""}, "line 1, target='': expected a text"),
        (SEQ2SEQ, {"text": "a"}, "line 1, source=None: .*Name the columns source and target"),
        (IMAGES, {}, "expected synthetic, or a folder with a folder of images"),
    ],
    ids=str,
)
def test_rows_that_cannot_work_are_refused(
    tmp_path: Path, task: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_source(_jsonl(tmp_path, row), task)


OWN = """
import torch
from torch import nn
class Classifier(nn.Module):
    def __init__(self, num_labels=2, body=()):
        super().__init__()
        self.table, self.body = nn.Embedding(50, 6), nn.Sequential(*body)
        self.head, self.dropout = nn.Linear(6, num_labels), nn.Dropout(0.5)
    def forward(self, tokens):
        return self.head(self.dropout(self.body(self.table(tokens))).mean(dim=1))
def build_model():
    return Classifier()
def of_three():
    return Classifier(3)
def with_batch_norm():
    return Classifier(body=[nn.BatchNorm1d(9)])
def broken():
    raise KeyError("weights")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's own in the working directory."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_models", None)


def _own(name: str = "build_model", **change: Any) -> ModelConfig:
    return ModelConfig(**{"name": f"own_models:{name}", "vocab_size": 50} | change)


def test_a_model_of_ones_own_is_a_function_of_the_seed(own: Path) -> None:
    first, again, other = (
        build_model(_own(), num_labels=2, seed=seed, device=CPU) for seed in (0, 0, 1)
    )
    assert torch.equal(first.table.weight, again.table.weight)
    assert not torch.equal(first.table.weight, other.table.weight)
    assert first.dropout.p == 0
    kept = build_model(_own(dropout=True), num_labels=2, seed=0, device=CPU)
    assert kept.dropout.p == 0.5
    assert set(trial_batch(_own(), DataConfig(seq_length=9), first).inputs) == {"tokens"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_own("broken"), "It raises KeyError: 'weights'"),
        (_own("absent"), "has no attribute 'absent'"),
        (_own(vocab_size=None), "vocab_size=None: .* Give --vocab-size"),
        (_own("of_three"), r"logits of shape \[3, 2\]. own_models:of_three returned .*\[3, 3\]"),
        (_own(task=TAGGING), r"logits of shape \[3, 9, 2\]"),
        (_own(task=IMAGES), "task='image-classification'.*it is called with tokens .* It raises"),
        (_own(task=SEQ2SEQ), "a forward that takes decoder_input_ids"),
    ],
    ids=lambda value: value.name + value.task if isinstance(value, ModelConfig) else "",
)
def test_a_model_of_ones_own_that_does_not_fit_says_so(
    own: Path, model: ModelConfig, message: str
) -> None:
    def check() -> None:
        data = DataConfig(seq_length=9)
        check_fit(model, data, build_on_cpu(model, data))

    with pytest.raises(ValueError, match=message):
        check()


def test_a_launch_is_refused_before_its_first_process(own: Path) -> None:
    with pytest.raises(ValueError, match="It raises KeyError: 'weights'"):
        check_inputs(_own("broken"), DataConfig())
    with pytest.raises(ValueError, match="since the model own_models:build_model has no tokenizer"):
        check_inputs(_own(), DataConfig(source="public-domain"))


def test_layers_of_a_model_are_told_of(
    own: Path, capsys: pytest.CaptureFixture[str], folders: dict[str, str]
) -> None:
    assert main(["modes", "--why", folders[IMAGES], "--task", IMAGES]) == 0
    told = capsys.readouterr().out
    assert "vit.embeddings  " in told
    assert told.endswith("exact, 0 refused.\n")
    asked = ["modes", "--why", "own_models:with_batch_norm", "--vocab-size", "50"]
    assert main([*asked, "--seq-length", "9"]) == 1
    told = capsys.readouterr().out
    (refused,) = [line for line in told.splitlines() if "  refused" in line]
    assert refused.split() == ["body.0", "1", "BatchNorm1d", "refused"]
    assert "body.0: BatchNorm1d mixes the samples of a batch" in told
    assert told.endswith("2 exact, 1 refused.\n")


@pytest.mark.soak
@pytest.mark.parametrize("task", CONFIGS)
def test_a_launch_passes(task: str, folders: dict[str, str], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "dpsgd_track", *arguments]
        return subprocess.run(
            program, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280
        )

    launched = run("quick", "--model-name", folders[task], "--task", task, "--group", "g")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    compared = run("compare", "g")
    assert compared.returncode == 0, compared.stdout
    assert "PASS" in compared.stdout
