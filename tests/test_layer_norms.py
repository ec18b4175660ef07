"""Norms that are observed cheaply are those of whole tensors. Ranks are simulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpsgd_track.distributed.sharding import LocalPart, row_range
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.training.layer_norms import LayerNorms, StepNorms, reference
from dpsgd_track.training.observe import linear_layer_names
from dpsgd_track.training.probe import Probe

WORLD_SIZE, BATCH = 3, 7


def part(name: str, whole: Tensor, rank: int, *, is_counted: bool = True) -> LocalPart:
    start, stop = row_range(whole.shape[0], rank, WORLD_SIZE)
    width = whole[0].numel() if whole.ndim > 1 else 1
    return LocalPart(name, whole[start:stop], start * width, whole.numel(), is_counted)


class Ranks:
    """Rank 0's observer among several, whose sums meet."""

    def __init__(self, layers: list[str], parameters: list[str], num_replicas: int = 1) -> None:
        self.layers, self.parameters = layers, parameters
        self.num_replicas = num_replicas
        self.observer = LayerNorms(
            layers, parameters, BATCH, lambda packed: packed.copy_(self.total)
        )

    def observe(
        self,
        step: int,
        gradients: dict[str, Tensor],
        weights: dict[str, Tensor],
        losses: list[Tensor],
    ) -> tuple[int, StepNorms] | None:
        """Result of rank 0 when all ranks observe `step`."""
        packed: list[Tensor] = []
        seen = []
        for number in range(WORLD_SIZE * self.num_replicas):
            replica, rank = divmod(number, WORLD_SIZE)
            parts = [
                [part(name, t, rank, is_counted=replica == 0) for name, t in whole.items()]
                for whole in (gradients, weights)
            ]
            # A replica takes samples of its own.
            own = SampleRecord(losses[rank] if replica == 0 else losses[rank][:0])
            seen.append((step, *parts, [own]))
            LayerNorms(self.layers, self.parameters, BATCH, packed.append).observe(*seen[-1])
        self.total = torch.stack(packed).sum(0)
        return self.observer.observe(*seen[0])


@pytest.fixture
def probe() -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Layers, gradients and weights: a tied head, a row that one rank alone holds."""
    torch.manual_seed(0)
    model = Probe()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {name: 1e4 * torch.randn_like(w) for name, w in weights.items()}
    return linear_layer_names(model), gradients, weights


def assert_close(found: StepNorms, wanted: StepNorms) -> None:
    # float32 sums of at most a few thousand squares.
    assert found.metrics() == pytest.approx(wanted.metrics(), rel=1e-5)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_norms_are_those_of_the_whole_whatever_each_rank_holds(probe, num_replicas) -> None:
    layers, gradients, weights = probe
    assert any(w.shape[0] < WORLD_SIZE for w in weights.values())
    assert any(w.shape[0] % WORLD_SIZE for w in weights.values())
    losses = [torch.rand(count) for count in (2, 0, 1)]
    ranks = Ranks(layers, list(gradients), num_replicas)
    assert ranks.observe(1, gradients, weights, losses) is None
    found = ranks.observer.read()
    assert found is not None
    assert found[0] == 1
    assert_close(found[1], reference(layers, BATCH, gradients, weights, torch.cat(losses)))


def test_a_tied_weight_is_one_layer_at_most_and_counts_once(probe) -> None:
    layers, gradients, weights = probe
    assert "head" not in layers
    assert "embedding.weight" in weights
    assert "head.weight" not in weights
    whole = torch.cat([g.flatten() for g in gradients.values()]).double().norm() / BATCH
    wanted = reference(layers, BATCH, gradients, weights, torch.zeros(1))
    assert wanted.grad_norm == pytest.approx(float(whole))


def test_a_step_is_handed_out_when_the_next_is_observed_and_only_once(probe) -> None:
    layers, gradients, weights = probe
    ranks = Ranks(layers, list(gradients))
    losses = [torch.ones(1)] * WORLD_SIZE
    handed = [ranks.observe(step, gradients, weights, losses) for step in (1, 3, 5)]
    handed += [ranks.observer.read(), ranks.observer.read()]
    assert [found and found[0] for found in handed] == [None, 1, 3, 5, None]


def test_a_step_without_samples_has_loss_0() -> None:
    layer = nn.Linear(3, 2, bias=False)
    weights = {"layer.weight": layer.weight.detach()}
    ranks = Ranks(["layer"], ["layer.weight"])
    ranks.observe(1, weights, weights, [torch.empty(0)] * WORLD_SIZE)
    found = ranks.observer.read()
    assert found is not None
    assert found[1].loss == 0.0
