"""Data and models: what a sample is made of, and which inputs are refused."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertPreTrainedModel,
    PreTrainedModel,
)

from dpsgd_track.config import (
    CAUSAL_LM,
    CLASSIFICATION,
    MASKED_LM,
    REGRESSION,
    TASKS,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
)
from dpsgd_track.privacy.loss import IGNORED, LOSSES
from dpsgd_track.record.plan import STARTED_JOB
from dpsgd_track.training.data import (
    Dataset,
    RankSampler,
    SyntheticText,
    TokenizedText,
    build_dataset,
    extra_inputs_of,
)
from dpsgd_track.training.model import build_model, check_length
from dpsgd_track.training.model_source import presets, resolve_model
from dpsgd_track.training.observe import linear_layer_names, weights_digest
from dpsgd_track.training.preflight import check_inputs
from dpsgd_track.training.task_source import num_labels_of, population_of
from dpsgd_track.training.text_source import read_text
from tests.support.synthetic_group import started

CPU = torch.device("cpu")


def _dataset(*, task: str = CLASSIFICATION, padding: str = "right", **text: Any) -> Dataset:
    text = {"vocab_size": 97, "seq_length": 5, "num_labels": 3} | text
    return Dataset(
        texts=SyntheticText(seed=42, **text),
        task=task,
        seq_length=text["seq_length"],
        padding=padding,
        pad_token=0,
        seed=42,
        mask_token=96,
    )


def _sampler(world_size: int, rank: int, micro_batches: int, batch_size: int) -> RankSampler:
    return RankSampler(
        dataset=_dataset(),
        batch_size=batch_size,
        micro_batches=micro_batches,
        rank=rank,
        world_size=world_size,
        device=CPU,
        extra_inputs=frozenset({"position_ids"}),
    )


def _global_batch(world_size: int, micro_batches: int, batch_size: int, step: int) -> torch.Tensor:
    slices = [
        _sampler(world_size, rank, micro_batches, batch_size).rank_batch(step)
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
    plain = _sampler(2, 1, 2, 3)
    permuted = replace(plain, is_permuted=True)
    a, b = plain.rank_batch(0), permuted.rank_batch(0)
    assert a.indices == tuple(reversed(b.indices))
    assert a.digests == tuple(reversed(b.digests))


def test_each_row_of_a_text_comes_once_an_epoch() -> None:
    text = read_text("public-domain")

    n = len(text.texts)
    data = TokenizedText([[i] for i in range(n)], text.labels, seed=1)
    epochs = [[int(data.text(e * n + i)[0][0]) for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(n))
    assert epochs[0] != epochs[1]
    assert data.num_samples == n
    assert text.label_names == ("law", "verse")


def _poisson(world_size: int, rank: int, batch_size: int, population: int) -> RankSampler:
    sampler = _sampler(world_size, rank, 1, batch_size)
    return replace(sampler, population=population)


def test_poisson_sampling_takes_each_sample_at_the_expected_rate_and_on_its_own() -> None:
    steps, population = 2000, 10
    taken = np.zeros((steps, population))
    for step in range(steps):
        taken[step, list(_poisson(1, 0, 3, population).rank_batch(step).indices)] = 1
    # Of 2000 draws at 0.3: a standard deviation of 0.010, and of 0.022 for a correlation.
    assert np.abs(taken.mean(axis=0) - 0.3).max() < 0.05
    assert np.abs(np.corrcoef(taken.T) - np.eye(population)).max() < 0.1
    assert np.abs(np.corrcoef(taken[1:].ravel(), taken[:-1].ravel())[0, 1]) < 0.05


def test_every_rank_cuts_as_many_micro_batches_with_the_same_inputs_and_types() -> None:
    seen = set()
    for step in range(60):
        slices = [_poisson(3, rank, 2, 12).rank_batch(step) for rank in range(3)]
        whole = _poisson(1, 0, 6, 12).rank_batch(step)
        assert tuple(i for s in slices for i in s.indices) == whole.indices
        assert len({len(s.batches) for s in slices}) == 1
        for batch in (b for s in slices for b in s.batches):
            assert len(batch) <= 2
            layout = {name: (t.dtype, t.shape[1:]) for name, t in batch.inputs.items()}
            seen.add(str((layout, batch.targets.dtype, batch.targets.shape[1:])))
            assert {len(t) for t in batch.inputs.values()} == {len(batch)}
    assert len(seen) == 1
    assert {len(_poisson(3, 2, 2, 12).rank_batch(step).batches) for step in range(60)} == {1, 2}


def test_poisson_sampling_draws_from_all_rows_of_a_text() -> None:
    assert (
        population_of(DataConfig(source="public-domain", sampling="poisson"), CLASSIFICATION) == 64
    )
    assert population_of(DataConfig(sampling="poisson", dataset_size=7), CLASSIFICATION) == 7
    assert population_of(DataConfig(), CLASSIFICATION) is None


def test_ragged_samples_have_every_length_from_a_quarter_to_the_whole() -> None:
    data = _dataset(seq_length=16, is_ragged=True)
    lengths = {int(data.sample(i).inputs["attention_mask"].sum()) for i in range(400)}
    assert lengths == set(range(4, 17))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_is_on_its_side_and_positions_begin_at_the_first_token(padding: str) -> None:
    plain = _dataset(seq_length=16, is_ragged=True)
    padded = _dataset(seq_length=16, is_ragged=True, padding=padding)
    sampler = replace(_sampler(1, 0, 1, 8), dataset=padded)
    (batch,) = sampler.rank_batch(0).batches
    for index in range(8):
        tokens, _ = plain.texts.text(index)
        where = slice(16 - len(tokens), 16) if padding == "left" else slice(0, len(tokens))
        inputs = {name: values[index].numpy() for name, values in batch.inputs.items()}
        assert inputs["input_ids"][where].tolist() == tokens.tolist()
        assert inputs["position_ids"][where].tolist() == list(range(len(tokens)))
        assert inputs["attention_mask"].sum() == inputs["attention_mask"][where].sum()
        assert np.count_nonzero(inputs["input_ids"]) == len(tokens)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_a_sample_is_worth_the_same_on_either_side_of_its_padding(name: str) -> None:
    model = build_model(ModelConfig(name=name), num_labels=2, seed=0, device=CPU)
    losses = []
    for padding in ("right", "left"):
        data = _dataset(seq_length=16, num_labels=2, is_ragged=True, padding=padding)
        sampler = replace(_sampler(1, 0, 1, 8), dataset=data, extra_inputs=extra_inputs_of(model))
        (batch,) = sampler.rank_batch(0).batches
        losses.append(LOSSES[CLASSIFICATION](model(**batch.inputs).logits, batch.targets))
    torch.testing.assert_close(losses[0], losses[1])


def test_a_causal_model_is_asked_for_every_token_but_the_padding() -> None:
    data = _dataset(task=CAUSAL_LM, seq_length=16, is_ragged=True)
    for index in range(20):
        sample = data.sample(index)
        wanted = np.where(sample.inputs["attention_mask"] == 1, sample.inputs["input_ids"], IGNORED)
        assert sample.target.tolist() == wanted.tolist()


def test_a_masked_model_is_asked_for_what_was_masked_and_for_nothing_else() -> None:
    plain, masked = (
        _dataset(task=task, seq_length=40, is_ragged=True) for task in (CLASSIFICATION, MASKED_LM)
    )
    shares = []
    for index in range(50):
        whole, sample = plain.sample(index), masked.sample(index)
        asked = sample.target != IGNORED
        assert 1 <= asked.sum() == max(1, round(0.15 * whole.inputs["attention_mask"].sum()))
        assert sample.target[asked].tolist() == whole.inputs["input_ids"][asked].tolist()
        assert set(sample.inputs["input_ids"][asked]) == {96}
        assert (
            sample.inputs["input_ids"][~asked].tolist()
            == whole.inputs["input_ids"][~asked].tolist()
        )
        shares.append(np.flatnonzero(asked).tolist())
        assert masked.sample(index).digest() == sample.digest() != whole.digest()
    assert len(set(map(str, shares))) > 45, "each sample has its own places"


def test_synthetic_numbers_lie_between_minus_one_and_one() -> None:
    data = _dataset(task=REGRESSION, num_labels=1)
    numbers = np.array([data.sample(index).target for index in range(200)])
    assert numbers.dtype == np.float32
    assert -1 <= numbers.min() < -0.9
    assert 0.9 < numbers.max() <= 1


def _csv(tmp_path: Path, labels: list[str]) -> str:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"x,{name}\n" for name in labels))
    return str(path)


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [(["2.5", "-1", "2.5"], (2.5, -1.0, 2.5)), (["b", "a", "b"], (1.0, 0.0, 1.0))],
)
def test_labels_that_are_numbers_are_what_a_regression_predicts(
    tmp_path: Path, labels: list[str], numbers: tuple[float, ...]
) -> None:
    assert read_text(_csv(tmp_path, labels)).numbers == numbers


@pytest.mark.parametrize("label", ["b", "1e39"])
def test_a_label_that_a_regression_cannot_predict_is_named(tmp_path: Path, label: str) -> None:
    source = _csv(tmp_path, ["2.5", "-1", label, "7"])
    message = f"a.csv', line 4, label='{label}': expected a number that float32 holds"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_inputs(*_config(name="minilm", task=REGRESSION, source=source))
    # Any text is the name of a class.
    check_inputs(*_config(name="minilm", source=source))


def test_every_part_of_a_sample_is_in_its_digest() -> None:
    sample = _dataset().sample(0)
    changed = [
        replace(sample, inputs={**sample.inputs, name: values + 1})
        for name, values in sample.inputs.items()
    ]
    changed.append(replace(sample, target=sample.target + 1))
    assert len({s.digest() for s in (sample, *changed)}) == 4


def test_a_text_of_one_token_is_refused_where_each_token_predicts_the_next() -> None:
    with pytest.raises(ValueError, match=r"data='row 2': expected 2 tokens or more"):
        TokenizedText([[1, 2], [3]], [0, 1], seed=0, fewest=2)


@pytest.mark.parametrize("task", [CLASSIFICATION, CAUSAL_LM, MASKED_LM, REGRESSION])
def test_text_is_made_fit_for_each_task(task: str) -> None:
    config = ModelConfig(name="minilm", task=task)
    data = DataConfig(source="public-domain", seq_length=24)
    model = build_model(config, num_labels=num_labels_of(config, data), seed=0, device=CPU)
    dataset = build_dataset(config, data, model, seed=3)
    sampler = replace(_sampler(1, 0, 1, 4), dataset=dataset, extra_inputs=extra_inputs_of(model))
    (batch,) = sampler.rank_batch(0).batches
    loss_B = LOSSES[task](model(**batch.inputs).logits, batch.targets)
    assert loss_B.shape == (4,)
    assert bool(loss_B.isfinite().all())
    mask_token = 103  # of BERT's vocabulary
    assert (batch.inputs["input_ids"] == mask_token).any().item() == (task == MASKED_LM)


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


def test_positions_that_roberta_reserves_for_padding_are_not_counted() -> None:
    config = AutoConfig.for_model(
        "roberta",
        vocab_size=9,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    check_length(model, 18)
    assert model(torch.full((1, 18), 5)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="seq_length=19: expected at most 18"):
        check_length(model, 19)


def _config(**change: object) -> tuple[ModelConfig, DataConfig]:
    model = {"name": "llama-tiny", "vocab_size": None} | {
        k: v for k, v in change.items() if k in ("name", "vocab_size", "task")
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
        (
            {"task": "masked-lm"},
            "task='masked-lm': expected one of sequence-classification",
        ),
        ({"task": "causal-lm", "seq_length": 1}, "seq_length=1: expected at least 2"),
        ({"task": "summary"}, "task='summary': expected one of sequence-classification"),
    ],
    ids=str,
)
def test_inputs_that_cannot_work_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(*_config(**change))


def test_a_folder_without_the_head_of_a_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="a llama model"):
        check_inputs(ModelConfig(name=str(tmp_path), task=MASKED_LM), DataConfig())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{not json\n", "Line 1"),
        ("a.jsonl", "[1]\n", "a JSON object in line 1"),
        ("a.jsonl", '{"text": "x"}\n', "line 1, label=None: expected a text that is not empty"),
        ("a.jsonl", '{"text": " ", "label": 1}\n', "line 1, text=' ': expected a text"),
        (
            "a.jsonl",
            '{"text": "\\ud83d", "label": 1}\n',
            r"line 1, text='\\ud83d': expected a text",
        ),
        ("a.jsonl", "[" * 100_000, "Line 1"),
        ("a.jsonl", '{"text": "x", "label": 1' + "0" * 5_000 + "}", "Line 1"),
        ("a.jsonl", "", "at least one row"),
        ("a.jsonl", '{"text": "x", "label": 1}\n', "two classes or more"),
        ("a.csv", "words,label\nx,1\n", "Name the columns text and label"),
        ("a.csv", "text,label\nx,1\n\ny\n", "line 4, label=None: expected"),
        ("a.csv", 'label,text\n1,x\n2,"y\n1,z\n', "line 3 opens a quote that is never closed"),
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


ROWS = [{"text": "one, zwölf", "label": "b"}, {"text": "three", "label": "a"}]
CONTENTS = {
    "a.csv": "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS),
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(CONTENTS[name], encoding="utf-8")
    plain = read_text(str(path))
    path.write_text(CONTENTS[name], encoding="utf-8-sig")
    assert read_text(str(path)) == plain
    assert plain.texts == ("one, zwölf", "three")


OTHER_ENCODINGS = {
    "utf-16": "It is UTF-16, by its byte order mark.",
    "utf-16-le": "It looks like UTF-16, or is no text.",
    "utf-16-be": "It looks like UTF-16, or is no text.",
    "utf-32": "It is UTF-32, by its byte order mark.",
    "latin-1": "holds the byte 0xf6 where it cannot be.",
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_a_file_that_is_not_utf8_is_called_so(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_text(CONTENTS[name], encoding=encoding)
    line = {"a.csv": "Line 2 ", "a.jsonl": "Line 1 "}[name] * (encoding == "latin-1")
    with pytest.raises(ValueError, match=r"expected UTF-8 text\.") as caught:
        read_text(str(path))
    assert str(caught.value) == (
        f"data={str(path)!r}: expected UTF-8 text. {line}{OTHER_ENCODINGS[encoding]} "
        "Save the file as UTF-8."
    )


def test_a_wrong_byte_far_into_a_file_is_found_in_its_line(tmp_path: Path) -> None:
    content = CONTENTS["a.jsonl"].encode() * 20_000
    (tmp_path / "a.jsonl").write_bytes(content + b"\xff")
    with pytest.raises(ValueError, match="Line 40001 holds the byte 0xff"):
        read_text(str(tmp_path / "a.jsonl"))


def test_a_text_of_any_length_is_read_and_csv_keeps_its_limit(tmp_path: Path) -> None:
    path, before = tmp_path / "a.csv", csv.field_size_limit()
    long = "word " * before
    path.write_text(f"text,label\n{long},a\nx,b\n")
    assert [len(text) for text in read_text(str(path)).texts] == [len(long), 1]
    path.write_text(f"text,label\n{long},\n")
    with pytest.raises(ValueError, match="line 2, label=''"):
        read_text(str(path))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("NaN", "label=nan: expected a text that is not empty, a finite number, or true or false"),
        ("-Infinity", "label=-inf: expected"),
        ("1e999", "label=inf: expected"),
        pytest.param("1" + "0" * 400, "label=1000", id="10 ** 400"),
        ("null", "label=None: expected"),
        ('""', "label='': expected"),
        ('" "', "label=' ': expected"),
        ('"nan"', "label='nan': expected"),
        ("[1]", r"label=[1]: expected"),
        ('"b"', "label='b': expected a number, as in line 2"),
        ("true", "label=True: expected a number, as in line 2"),
    ],
)
def test_a_label_that_is_none_is_named_with_its_line(
    tmp_path: Path, label: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    row = '{"text": "x", "label": %s}\n'
    path.write_text("\n" + row % 0 + row % 1.5 + row % label)
    message = f"data={str(path)!r}, line 4, {message}"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_text(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("label", ["nan", "-inf", "1e999", " "])
def test_a_label_of_csv_that_is_none_is_named_with_the_line_its_row_begins_in(
    tmp_path: Path, label: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"two\nlines",1\n\n"more\nlines",{label}\n')
    with pytest.raises(ValueError, match=re.escape(f"line 5, label={label!r}: expected a text")):
        read_text(str(path))


def test_one_number_is_one_class_however_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "x", "label": {y}}}\n' for y in ("1", "1.0", "2.5")))
    text = read_text(str(path))
    assert text.label_names == ("1", "2.5")
    assert text.labels == (0, 0, 1)
    assert text.numbers == (1.0, 1.0, 2.5)


@pytest.mark.parametrize("content", ["\ufeff{}", "[]", "{"])
def test_a_model_configuration_that_transformers_would_not_read_is_refused(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_name='.*': expected a folder whose config.json"):
        check_inputs(ModelConfig(name=str(tmp_path)), DataConfig())


def test_a_job_survives_its_file() -> None:
    job = JobConfig(
        mode="no_dp",
        model=ModelConfig(
            name="llama-tiny", task=CAUSAL_LM, dropout=True, gradient_checkpointing=True
        ),
        data=DataConfig(padding="left", ragged=True, sampling="poisson", dataset_size=9),
        performance=PerformanceConfig(),
        regimes=(RegimeConfig(name="clip", num_iter=2, max_grad_norms=(0.1, 1 / 3)),),
    )
    places = {"spool": "s", "mode_runs": ("a",), "rank_runs": (("b", "c"),)}
    read = STARTED_JOB.loads(started(job, **places))
    assert (read.job, read.spool) == (job, "s")
    assert (read.mode_runs, read.rank_runs) == (("a",), (("b", "c"),))


def test_the_tasks_are_those_that_have_a_loss() -> None:
    assert tuple(LOSSES) == TASKS


HEADS = {
    CAUSAL_LM: ("llama-tiny", 512),
    MASKED_LM: ("bert-tiny", 512),
    REGRESSION: ("gpt2-tiny", 1),
}


@pytest.mark.parametrize("task", HEADS)
def test_a_model_has_the_head_of_its_task(task: str) -> None:
    name, outputs = HEADS[task]
    model = build_model(ModelConfig(name=name, task=task), num_labels=1, seed=0, device=CPU)
    ids = torch.ones(2, 5, dtype=torch.long)
    assert model(input_ids=ids).logits.shape == ((2, 1) if outputs == 1 else (2, 5, outputs))


@pytest.mark.parametrize("name", ["bert-tiny", "llama-tiny", "gpt2-tiny", "qwen2-tiny"])
def test_a_causal_model_sees_no_later_token(name: str) -> None:
    model = build_model(ModelConfig(name=name, task=CAUSAL_LM), num_labels=2, seed=0, device=CPU)
    ids = torch.arange(1, 7)[None]
    changed = ids.clone()
    changed[0, 4] = 99
    difference = (model(ids).logits - model(changed).logits).abs().amax(dim=(0, 2))
    assert difference[:4].max() == 0
    assert difference[4] > 0


def test_gradient_checkpointing_recomputes_the_blocks_and_changes_no_gradient() -> None:
    found = []
    for is_on in (False, True):
        config = ModelConfig(name="gpt2-tiny", gradient_checkpointing=is_on)
        model = build_model(config, num_labels=2, seed=0, device=CPU)
        calls: list[int] = []
        # Inside a block: a hook on the block itself stays outside of what is recomputed.
        model.transformer.h[1].ln_2.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.sum().backward()
        found.append((len(calls), model.transformer.wte.weight.grad))
    assert [calls for calls, _ in found] == [1, 2]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_model_that_cannot_recompute_its_blocks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(BertPreTrainedModel, "supports_gradient_checkpointing", False)
    config = ModelConfig(name="bert-tiny", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=True: expected a model that can"):
        build_model(config, num_labels=2, seed=0, device=CPU)


def test_dropout_is_off_unless_asked_for() -> None:
    def rates(is_on: bool) -> set[float]:
        config = ModelConfig(name="bert-tiny", dropout=is_on)
        model = build_model(config, num_labels=2, seed=0, device=CPU)
        return {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}

    assert rates(False) == {0.0}
    assert rates(True) == {0.1}


@pytest.mark.parametrize("token", [None, -1])
def test_a_model_without_a_padding_token_pads_with_zero(tmp_path: Path, token: int | None) -> None:
    model: Any = build_model(ModelConfig(name="gpt2-tiny"), num_labels=2, seed=0, device=CPU)
    model.config.pad_token_id = token
    model.save_pretrained(tmp_path)
    saved = ModelConfig(name=str(tmp_path))
    loaded: Any = build_model(saved, num_labels=2, seed=0, device=CPU)
    assert loaded.config.pad_token_id == 0


def test_a_tied_head_is_not_listed_as_a_layer_of_its_own() -> None:
    for name, layers in (("gpt2-tiny", 4 * 4), ("qwen2-tiny", 4 * 7), ("llama-tiny", 4 * 7 + 1)):
        model = build_model(
            ModelConfig(name=name, task=CAUSAL_LM), num_labels=2, seed=0, device=CPU
        )
        assert len(linear_layer_names(model)) == layers


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"padding": "both"}, "padding='both': expected one of right, left"),
        ({"source": "a.csv", "ragged": True}, "Text has lengths of its own"),
        ({"sampling": "random"}, "sampling='random': expected one of sequential, poisson"),
        ({"sampling": "poisson"}, "dataset_size=None: expected an integer >= 1"),
        ({"dataset_size": 5}, "dataset_size=5: expected no value but with synthetic data"),
        ({"source": "a.csv", "sampling": "poisson", "dataset_size": 5}, "dataset_size=5"),
    ],
    ids=str,
)
def test_data_that_cannot_be_is_refused(argument: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**argument)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gpt2-tiny", {"position_ids"}),
        ("bert-tiny", {"position_ids", "token_type_ids"}),
        ("llama-tiny", {"position_ids"}),
    ],
)
def test_types_are_given_to_models_with_a_table_of_them(name: str, wanted: set[str]) -> None:
    model = build_model(ModelConfig(name=name), num_labels=2, seed=0, device=CPU)
    assert extra_inputs_of(model) == wanted
