"""Data and models: what a sample is made of, and which inputs are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpsgd_track.config import DataConfig, JobConfig, ModelConfig, PerformanceConfig, RegimeConfig
from dpsgd_track.training.data import Slicer, SyntheticText, TokenizedText
from dpsgd_track.training.model import build_model
from dpsgd_track.training.model_source import presets, resolve_model
from dpsgd_track.training.observe import weights_digest
from dpsgd_track.training.preflight import check_inputs
from dpsgd_track.training.text_source import read_text

CPU = torch.device("cpu")


def _slicer(world_size: int, rank: int, micro_batches: int, batch_size: int) -> Slicer:
    dataset = SyntheticText(seed=42, vocab_size=97, seq_length=5, num_labels=3)
    return Slicer(
        dataset=dataset,
        batch_size=batch_size,
        micro_batches=micro_batches,
        rank=rank,
        world_size=world_size,
        device=CPU,
        extra_inputs=frozenset({"position_ids"}),
    )


def _global_batch(world_size: int, micro_batches: int, batch_size: int, step: int) -> torch.Tensor:
    slices = [
        _slicer(world_size, rank, micro_batches, batch_size).slice(step)
        for rank in range(world_size)
    ]
    assert [i for s in slices for i in s.indices] == list(range(step * 12, step * 12 + 12))
    return torch.cat([b.inputs["input_ids"] for s in slices for b in s.batches])


def test_the_global_batch_does_not_depend_on_how_it_is_cut() -> None:
    expected = _global_batch(1, 1, 12, step=3)
    for world_size, micro_batches, batch_size in ((2, 3, 2), (3, 1, 4), (4, 3, 1)):
        assert torch.equal(_global_batch(world_size, micro_batches, batch_size, 3), expected)


def test_samples_differ_and_nothing_drawn_elsewhere_shifts_them() -> None:
    first = _global_batch(1, 1, 12, step=0)
    torch.manual_seed(7)
    np.random.seed(7)
    assert torch.equal(_global_batch(1, 1, 12, step=0), first)
    assert len(torch.unique(torch.cat([first, _global_batch(1, 1, 12, step=1)]), dim=0)[0]) > 0
    rows = torch.cat([first, _global_batch(1, 1, 12, step=1)])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_a_permuted_replay_holds_the_same_samples_in_another_order() -> None:
    plain = _slicer(2, 1, 2, 3)
    permuted = Slicer(**{**plain.__dict__, "is_permuted": True})
    a, b = plain.slice(0), permuted.slice(0)
    assert a.indices == tuple(reversed(b.indices))
    assert a.digests == tuple(reversed(b.digests))


def test_each_row_of_a_text_comes_once_an_epoch() -> None:
    text = read_text("public-domain")

    class OneToken:
        pad_token = "[PAD]"

        def __call__(self, texts: list[str], **kwargs: object) -> dict[str, list[list[int]]]:
            return {
                "input_ids": [[i] for i in range(len(texts))],
                "attention_mask": [[1]] * len(texts),
            }

    data = TokenizedText(text, OneToken(), seed=1, seq_length=1)
    n = len(text.texts)
    epochs = [[int(data.sample(e * n + i).input_ids[0]) for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(n))
    assert epochs[0] != epochs[1]
    assert data.num_samples == n
    assert text.label_names == ("law", "verse")


def test_weights_are_a_function_of_the_seed_alone() -> None:
    def digest(seed: int) -> str:
        torch.manual_seed(np.random.randint(1 << 30))
        config = ModelConfig(name="llama-tiny")
        return weights_digest(build_model(config, num_labels=2, seed=seed, device=CPU))

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_the_weights_digest_sees_one_flipped_bit_and_a_swap() -> None:
    model = torch.nn.Linear(3, 2)
    seen = {weights_digest(model)}
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(2.0))
        seen.add(weights_digest(model))
        model.weight[:, :2] = model.weight[:, :2].flip(1).clone()
        seen.add(weights_digest(model))
    assert len(seen) == 3


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves(name: str) -> None:
    source = resolve_model(ModelConfig(name=name))
    limit = source.max_seq_length()
    assert limit is not None
    assert limit >= 512


def _config(**change: object) -> tuple[ModelConfig, DataConfig]:
    model = {"name": "llama-tiny", "vocab_size": None} | {
        k: v for k, v in change.items() if k in ("name", "vocab_size")
    }
    data = {"source": "synthetic", "seq_length": 16} | {
        k: v for k, v in change.items() if k in ("source", "seq_length")
    }
    return ModelConfig(**model), DataConfig(**data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "no-such-preset"}, r"model_name='no-such-preset': expected a preset \("),
        ({"name": "./no/such/folder"}, "an existing folder"),
        ({"name": "minilm", "vocab_size": 5}, "no value for a model whose weights are loaded"),
        ({"seq_length": 513}, "expected at most 512, the limit of llama-tiny"),
        ({"source": "missing.jsonl"}, r"data='missing.jsonl': expected synthetic, public-domain"),
        ({"source": "public-domain"}, "the preset llama-tiny has no tokenizer"),
    ],
    ids=str,
)
def test_inputs_that_cannot_work_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(*_config(**change))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{not json\n", "Line 1"),
        ("a.jsonl", "[1]\n", "a JSON object in line 1"),
        ("a.jsonl", '{"text": "x"}\n', "a non-empty text and a label in row 1"),
        ("a.jsonl", "", "at least one row"),
        ("a.jsonl", '{"text": "x", "label": 1}\n', "two classes or more"),
        ("a.csv", "words,label\nx,1\n", "Name the columns text and label"),
        ("a.txt", "x", "an existing .jsonl or .csv file"),
    ],
)
def test_text_files_that_cannot_work_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_text(str(path))


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    rows = [("one, two", "b"), ("three", "a")]
    (tmp_path / "a.csv").write_text('text,label\n"one, two",b\nthree,a\n')
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "label": y}) for t, y in rows)
    )
    a, b = read_text(str(tmp_path / "a.csv")), read_text(str(tmp_path / "a.jsonl"))
    assert a == b
    assert a.labels == (1, 0)


def test_a_job_survives_its_file() -> None:
    job = JobConfig(
        mode="no_dp",
        model=ModelConfig(name="llama-tiny"),
        data=DataConfig(),
        performance=PerformanceConfig(),
        regimes=(RegimeConfig(name="clip", num_iter=2, max_grad_norms=(0.1, 1 / 3)),),
        run_ids=("a",),
        rank_run_ids=(("b", "c"),),
    )
    assert JobConfig.from_json(job.to_json()) == job
