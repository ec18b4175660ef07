"""Batches that are replayed as CUDA graphs, against the same batches without."""

from __future__ import annotations

import copy
import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpsgd_track
from dpsgd_track.kernels import tensor_table
from dpsgd_track.library import PrivateTraining
from dpsgd_track.privacy import replay
from dpsgd_track.privacy.replay import ReplayError
from tests.support.model_zoo import small_bert

GPU = torch.device("cuda")
B, D, CLASSES = 6, 16, 3


def on_gpu(test: Any) -> Any:
    needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs_gpu(test))


class Small(nn.Module):
    """An embedding, two linear layers, a norm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(11, D), nn.Linear(D, 24)
        self.norm, self.dropout = nn.LayerNorm(24), nn.Dropout(dropout)
        self.last = nn.Linear(24, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.dropout(torch.tanh(self.norm(self.first(self.embedding(tokens)))))
        y: Tensor = self.last(h.mean(dim=1))
        return y


class Scaled(Small):
    """Multiplies by an attribute that Python changes or draws."""

    def __init__(self, *, is_random: bool = False, reads: bool = False) -> None:
        super().__init__()
        self.scale, self.is_random, self.reads = 1.0, is_random, reads

    def forward(self, tokens: Tensor) -> Tensor:
        y = super().forward(tokens)
        if self.reads and float(y.detach().sum()) > 1e9:
            y = y * 2
        return y * random.Random().uniform(0.5, 2.0) if self.is_random else y * self.scale


def batch(seed: int, num_samples: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (num_samples, 5), generator=generator)
    return tokens.to(GPU), torch.randint(0, CLASSES, (num_samples,), generator=generator).to(GPU)


def private_of(model: nn.Module, **changes: Any) -> PrivateTraining:
    settings: dict[str, Any] = {
        "noise_multiplier": 0.5,
        "max_grad_norm": 0.2,
        "expected_batch_size": B,
        "seed": 3,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return dpsgd_track.make_private(model, optimizer, **(settings | changes))


def step(private: PrivateTraining, *seeds: int, num_samples: int = B) -> None:
    for seed in seeds:
        private.backward(*batch(seed, num_samples))
    private.mode.optimizer.step()


def num_replays(private: PrivateTraining) -> int:
    return private.mode.replays.num_replays  # type: ignore[attr-defined]


def weights(private: PrivateTraining) -> Tensor:
    return torch.cat([p.detach().flatten() for p in private.model.parameters()])


@on_gpu
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("mode", ["ghost_bk", "flash", "flash_bk", "flash_fuse_bk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_training_is_that_without_graphs(
    mode: str, dtype: torch.dtype, clipping: str
) -> None:
    torch.manual_seed(0)
    model = Small().to(GPU)
    ends, records = [], []
    for capture in (False, True):
        private = private_of(
            copy.deepcopy(model), mode=mode, param_dtype=dtype, clipping=clipping, capture=capture
        )
        for seed in range(6):
            step(private, seed)
        # Two micro-batches a step, both replayed.
        step(private, 10, 11)
        step(private, 12, 13)
        ends.append(weights(private))
        records.append(private.last)
        if capture:
            assert num_replays(private) == 8
    plain, replayed = records
    assert plain is not None
    assert replayed is not None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ends[1], ends[0], rtol=tolerance, atol=tolerance * 0.1)
    torch.testing.assert_close(replayed.norm_B, plain.norm_B, rtol=tolerance, atol=1e-6)
    assert plain.norm_by_parameter_B is not None
    assert replayed.norm_by_parameter_B is not None
    for name, norms in plain.norm_by_parameter_B.items():
        torch.testing.assert_close(
            replayed.norm_by_parameter_B[name], norms, rtol=tolerance, atol=tolerance * 0.1
        )


@on_gpu
def test_a_transformer_of_several_kinds_of_batches() -> None:
    model = small_bert(50, dropout=0.0).to(GPU)
    vocabulary = model.config.vocab_size
    ends = []
    for capture in (False, True):
        private = private_of(copy.deepcopy(model), capture=capture)
        generator = torch.Generator().manual_seed(0)
        for number in range(24):
            shape = (4, 8) if number % 3 else (2, 6)
            tokens = torch.randint(1, vocabulary, shape, generator=generator).to(GPU)
            targets = torch.randint(0, 2, shape[:1], generator=generator).to(GPU)
            private.backward({"input_ids": tokens, "attention_mask": tokens * 0 + 1}, targets)
            private.mode.optimizer.step()
        ends.append(weights(private))
        if capture:
            assert num_replays(private) == 24 - 2 * replay.NUM_EAGER
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


@on_gpu
def test_batches_of_other_sizes_and_empty_ones_run_without_graphs() -> None:
    ends = []
    for capture in (False, True):
        torch.manual_seed(0)
        private = private_of(Small().to(GPU), capture=capture)
        for seed in range(5):
            step(private, seed)
        step(private, 6, num_samples=4)
        private.backward(*batch(7))
        private.backward(*batch(8, 0))
        private.backward(*batch(9, 2))
        private.mode.optimizer.step()
        step(private, 10)
        ends.append(weights(private))
        if capture:
            assert num_replays(private) == 5
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


@on_gpu
def test_a_replayed_sample_that_is_not_finite_adds_nothing() -> None:
    class Divided(Small):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) / (tokens[:, :1] != 10)

    ends = []
    for capture in (False, True):
        torch.manual_seed(0)
        private = private_of(Divided().to(GPU), capture=capture)
        for seed in range(6):
            tokens, targets = batch(seed)
            tokens[:, 0] = 1
            if seed == 5:
                tokens[2, 0] = 10
            warned: AbstractContextManager[Any] = (
                pytest.warns(UserWarning, match="not finite") if seed == 5 else nullcontext()
            )
            with warned:
                private.backward(tokens, targets)
                private.mode.optimizer.step()
                assert private.num_left_out == (seed == 5)
        ends.append(weights(private))
        if capture:
            assert num_replays(private) == 4
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


@on_gpu
def test_no_two_steps_have_the_same_noise() -> None:
    torch.manual_seed(0)
    private = private_of(
        nn.Linear(300, CLASSES).to(GPU), noise_multiplier=2.0, max_grad_norm=1e-3, capture=True
    )
    x, y = torch.randn(B, 300, device=GPU), torch.zeros(B, dtype=torch.long, device=GPU)
    moves = []
    for _ in range(8):
        before = weights(private)
        private.backward(x, y)
        private.mode.optimizer.step()
        moves.append(weights(private) - before)
    assert num_replays(private) == 6
    noise = torch.stack(moves) * B / (0.5 * 2.0 * 1e-3)
    covariance = noise @ noise.T / noise.shape[1]
    assert float((covariance - torch.eye(8, device=GPU)).abs().max()) < 0.2


@on_gpu
def test_dropout_draws_new_masks_in_replays() -> None:
    torch.manual_seed(0)
    private = private_of(Small(dropout=0.5).to(GPU), noise_multiplier=0.0, capture=True)
    optimizer = private.mode.optimizer
    losses = []
    for _ in range(10):
        losses.append(private.backward(*batch(0)))
        optimizer.zero_grad()
    assert num_replays(private) == 8
    assert len({tuple(loss.tolist()) for loss in losses}) == 10


@on_gpu
def test_what_the_model_reads_makes_another_kind() -> None:
    torch.manual_seed(0)
    model = Scaled().to(GPU)
    private = private_of(model, noise_multiplier=0.0, capture=True)
    optimizer = private.mode.optimizer

    def loss() -> Tensor:
        found = private.backward(*batch(0))
        optimizer.zero_grad()
        return found

    first = [loss() for _ in range(4)][-1]
    for change in (lambda: setattr(model, "scale", 2.0), model.eval):
        change()
        assert num_replays(private) == 2
        for _ in range(replay.NUM_EAGER):
            changed = loss()
        assert num_replays(private) == 2
    assert not torch.equal(first, changed)
    private.change(max_grad_norm=0.1)
    loss()
    assert num_replays(private) == 2
    assert float(private.last.factors_B.max()) < 1  # type: ignore[union-attr]


@on_gpu
def test_a_model_that_draws_in_python_is_refused() -> None:
    private = private_of(Scaled(is_random=True).to(GPU), capture=True, spot_check=False)
    for seed in range(replay.NUM_EAGER):
        step(private, seed)
    with pytest.raises(ReplayError, match="from batch to batch"):
        step(private, 9)
    # The batch was not added.
    assert not private.mode.engine.sharder.sums  # type: ignore[attr-defined]


@on_gpu
def test_a_model_that_asks_the_gpu_is_refused() -> None:
    private = private_of(Scaled(reads=True).to(GPU), capture=True)
    for seed in range(replay.NUM_EAGER):
        step(private, seed)
    torch.cuda.manual_seed(5)
    wanted = torch.rand(3, device=GPU)
    torch.cuda.manual_seed(5)
    with pytest.raises(ReplayError, match="cannot be recorded"):
        step(private, 9)
    # The GPU is as it was, and its generator draws, and can be recorded by others.
    assert float(torch.ones(3, device=GPU).sum()) == 3.0
    torch.testing.assert_close(torch.rand(3, device=GPU), wanted, rtol=0, atol=0)
    other = private_of(Scaled().to(GPU), capture=True)
    for seed in range(replay.NUM_EAGER + 1):
        step(other, seed)
    assert num_replays(other) == 1


@pytest.mark.parametrize(
    ("mode", "match"), [("flash_bk", "expected a model on a GPU"), ("reference", "engine")]
)
def test_capture_is_refused_where_there_are_no_graphs(mode: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        private_of(nn.Linear(D, CLASSES), mode=mode, capture=True)


def test_tables_of_a_graph_are_written_once_it_was_recorded() -> None:
    device = torch.device("cpu")
    with tensor_table.recording_tables(device) as tables:
        first = tensor_table.address_table([(1, 2), (3, 4)], device)
        second = tensor_table.address_table([(5, 6, 7)], device)
        programs = tensor_table.programs_of((2, 1), device)
    tables.write()
    assert (second.data_ptr() - first.data_ptr()) % 512 == 0
    assert first.tolist() == [[1, 2], [3, 4]]
    assert second.tolist() == [[5, 6, 7]]
    assert [t.tolist() for t in programs] == [[0, 0, 1], [0, 2]]
    # A cache that is cleared does not free what a graph reads.
    assert any(kept is programs for kept in tables.kept)


def test_more_tables_than_there_is_space_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_table, "RECORDED_NUMBERS", 64)
    device = torch.device("cpu")
    with (
        tensor_table.recording_tables(device),
        pytest.raises(RuntimeError, match="larger than the space"),
    ):
        tensor_table.address_table([range(65)], device)
