"""What all samples share and meets them late: exact, and on one backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track import make_private
from dpsgd_track.privacy.shared_rows import Course, SharedRows
from dpsgd_track.privacy.trial import KeptBuffers

T, D, H = 5, 6, 2


class RelativePositions(nn.Module):
    """Attention scores with a table of relative positions, as T5 and Swin add them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.bias = nn.Embedding(2 * T - 1, H)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        steps = torch.arange(T)
        bias = self.bias(steps[:, None] - steps + T - 1).permute([2, 0, 1]).unsqueeze(0)
        if padding is not None and not bool(padding.all()):
            bias = bias + (1 - padding)[:, None, None] * -9
        q, k = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k))
        scores = (q @ k.mT + bias).softmax(-1)
        return self.head((scores @ q).transpose(1, 2).flatten(2).mean(dim=1))


class Prompt(nn.Module):
    """A prompt that a small network makes, expanded over the samples and put in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(2, D), nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.blocks = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.net(self.table(torch.arange(2))).expand(len(x), -1, -1)
        h = torch.cat([prompt, x], dim=1)
        for block in self.blocks:
            h = h + block(h).tanh()
        return self.head(h.mean(dim=1))


class Labels(nn.Module):
    """Scores against embeddings of all labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.labels = nn.Linear(D, D), nn.Embedding(3, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=1) @ self.labels(torch.arange(3)).T


class Disentangled(nn.Module):
    """Scores with positions, as DeBERTa's: a table that is read as it is, normalised, and put
    through the projections of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(2 * T, D), nn.LayerNorm(D)
        self.q, self.k, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, -1)).transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self._by_head(self.q(x)), self._by_head(self.k(x))
        table = self.norm(self.table.weight).unsqueeze(0)
        positions = self._by_head(self.k(table)).repeat(len(x), 1, 1)
        steps = torch.arange(T)
        index = (steps[:, None] - steps + T).expand(len(q), -1, -1)
        scores = q @ k.mT + (q @ positions.mT).gather(2, index)
        read = (scores.softmax(-1) @ q).unflatten(0, (-1, H)).mean(dim=2)
        return self.head(read.flatten(1))


class JoinedWeights(nn.Module):
    """Reads weights of two layers, one of which it also calls, as MobileBERT's head does."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.other = nn.Linear(D, D), nn.Linear(D, 2, bias=False)
        self.head = nn.Linear(D + 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x)).mean(dim=1)
        return self.head(h @ torch.cat([self.enter.weight.t(), self.other.weight.t()], dim=1))


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(D, 3), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=1)


class OuterScale(nn.Module):
    """Reads a parameter that an inner module keeps, as a loss of pairs does CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.inner.scale.exp()


class Prompts(nn.Module):
    """Scores against prompts that go through an encoder, samples last, as CLIP has them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.text, self.body = nn.Embedding(4, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        prompts = torch.tanh(self.text(self.table(torch.tensor([[0, 1], [2, 3], [1, 1]])))).mean(1)
        return (prompts @ self.body(x).mean(dim=1).t()).t()


class _Magnitude(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
        norm = (torch.eye(D) + up(down(torch.eye(D, dtype=x.dtype))).T).norm(dim=1).detach()
        return (self.weight / norm).view(1, -1) * (x + up(down(x)))


class Magnitude(nn.Module):
    """An adapter whose norm is taken with an identity matrix, as DoRA's."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.magnitude, self.head = _Magnitude(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.magnitude(x, self.down, self.up).tanh().mean(dim=1))


class MaskFilled(nn.Module):
    """Has a parameter in place of masked positions, as speech models have."""

    def __init__(self) -> None:
        super().__init__()
        self.fill = nn.Parameter(torch.rand(D))
        self.blocks = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.blocks[0](x), x[..., 0] > 0
        h[mask] = self.fill.to(h.dtype)
        return self.head(self.blocks[1](h).tanh().mean(dim=1))


class _FunctionalAttention(nn.Module):
    """Gives torch's attention the weights of its layers, samples second."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, padding: Tensor | None) -> Tensor:
        h, weights = F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            embed_dim_to_check=D,
            num_heads=H,
            in_proj_weight=torch.empty(0),
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            attn_mask=mask,
            key_padding_mask=padding,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )
        assert weights is not None
        return weights @ h.transpose(0, 1)


class FunctionalAttention(nn.Module):
    """Has a mask with a row for each sample and head, as WavLM."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.attention = nn.Linear(D, H), _FunctionalAttention()
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = self.gate(x).mT.unsqueeze(2).expand(-1, -1, T, -1).flatten(0, 1)
        return self.head(self.attention(x, mask, padding).mean(dim=1))


class Grid(nn.Module):
    """Has as many places of its own as there might be samples in a trial."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.body, self.head = nn.Linear(2, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(14.0, dtype=x.dtype).view(7, 2) / 7)
        return self.head((self.body(x)[:, :, None] + places).tanh().mean(dim=(1, 2)))


class Views(nn.Module):
    """Encodes two views of the samples as one batch, [2 B, T, D], and their tokens time first."""

    def __init__(self) -> None:
        super().__init__()
        self.view, self.token, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.view(torch.cat([x, x.flip(1)])).chunk(2)
        h = torch.tanh(self.token((left * right).transpose(0, 1).flatten(0, 1)))
        return self.head(h.unflatten(0, (T, len(x))).mean(dim=0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relative-positions": RelativePositions,
    "prompt": Prompt,
    "labels": Labels,
    "disentangled": Disentangled,
    "joined-weights": JoinedWeights,
    "outer-scale": OuterScale,
    "prompts": Prompts,
    "magnitude": Magnitude,
    "mask-filled": MaskFilled,
    "functional-attention": FunctionalAttention,
    "grid": Grid,
    "views": Views,
}


def _plain_sum(model: nn.Module, x: Tensor, y: Tensor, **inputs: Any) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        given = {name: value[i : i + 1] for name, value in inputs.items()}
        loss = F.cross_entropy(model(x[i : i + 1], **given), y[i : i + 1])
        grads = dict(zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        for name, g in grads.items():
            total[name] += min(1.0, 0.3 / float(norm)) * g
    return total


def _step(private: Any, optimizer: Any, x: Tensor, y: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """The clipped sum of a batch, by how the step moves the weights."""
    before = {name: p.detach().clone() for name, p in private.model.named_parameters()}
    private.backward({"x": x, **inputs}, y)
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in private.model.named_parameters()}


def _private(model: nn.Module, mode: str = "flash_bk") -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = make_private(
        model,
        optimizer,
        mode=mode,
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=1,
        loss="sequence-classification",
        spot_check=False,
    )
    return private, optimizer


@pytest.mark.parametrize("mode", ["flash_bk", "flash"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_each_sample_alone(name: str, mode: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    private, optimizer = _private(model, mode)
    # As many samples as positions, heads, labels, or one.
    for num_samples in (4, T, H, 3, 1):
        x, y = torch.randn(num_samples, T, D, dtype=torch.double), torch.arange(num_samples) % 3
        expected = _plain_sum(model, x, y)
        moved = _step(private, optimizer, x, y)
        for parameter, total in expected.items():
            torch.testing.assert_close(moved[parameter], total, msg=f"{parameter}, {num_samples}")
    assert not [told for told in private.why() if "one backward" in told.way]


class _Moving(MaskFilled):
    """Keeps a mean of what it reads, which a model that learns privately must not."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(D))
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * (x + self.shift).detach().mean((0, 1))
        return super().forward(x + self.shift - self.mean)


def test_a_trial_leaves_buffers_as_they_are() -> None:
    model = _Moving().double()
    trial = KeptBuffers(model)
    before = model.mean
    model(torch.randn(4, T, D, dtype=torch.double))
    before.add_(1)
    trial.restore()
    assert model.mean is before
    assert not before.any()
    # In the batch's own forward such a buffer is found.
    private, _ = _private(model)
    with pytest.raises(ValueError, match="mean"):
        private.backward(torch.randn(4, T, D, dtype=torch.double), torch.arange(4) % 3)


def test_a_batch_without_padding_may_meet_the_samples_elsewhere() -> None:
    torch.manual_seed(0)
    model = RelativePositions().double()
    private, optimizer = _private(model)
    whole = torch.ones(T, T, dtype=torch.double)
    for mask in (whole.tril() + torch.eye(T), whole):
        x, y = torch.randn(T, T, D, dtype=torch.double), torch.arange(T) % 3
        given = {"padding": mask.clamp(max=1)}
        expected = _plain_sum(model, x, y, **given)
        moved = _step(private, optimizer, x, y, **given)
        for parameter, total in expected.items():
            torch.testing.assert_close(moved[parameter], total)


def test_a_mask_may_come_where_sizes_are_equal() -> None:
    torch.manual_seed(0)
    model = FunctionalAttention().double()
    private, optimizer = _private(model)
    for given in ({}, {"padding": torch.eye(T, dtype=torch.double)}, {}):
        x, y = torch.randn(T, T, D, dtype=torch.double), torch.arange(T) % 3
        expected = _plain_sum(model, x, y, **given)
        moved = _step(private, optimizer, x, y, **given)
        for parameter, total in expected.items():
            torch.testing.assert_close(moved[parameter], total)


def _rows(num_samples: int, *shape: int) -> SharedRows:
    return SharedRows(torch.randn(num_samples, *shape), Course("table"))


def test_each_sample_meets_its_own_row() -> None:
    shared, x = _rows(3, 1, 4, 5), torch.randn(3, 2, 4, 5)
    each = [x[i] + shared.rows[i] for i in range(3)]
    assert torch.equal(x + shared, torch.stack(each))
    weight, ids = _rows(3, 7, 5), torch.randint(7, (3, 4))
    looked_up = torch.stack([weight.rows[i][ids[i]] for i in range(3)])
    assert torch.equal(F.embedding(ids, weight), looked_up)
    row, x = _rows(3, 4, 5), torch.randn(3, 4)
    assert torch.allclose(x @ row, torch.stack([x[i] @ row.rows[i] for i in range(3)]))
    shared, grouped = _rows(3, 1, 4, 5), torch.randn(6, 2, 4, 5)
    assert torch.equal(grouped + shared, grouped + shared.rows.repeat_interleave(2, 0))


def test_what_was_not_learned_is_refused_where_sizes_are_equal() -> None:
    shared = _rows(4, 1, 4)
    shared.course.is_learning = False
    with pytest.raises(ValueError, match="table: expected the operations of the first batch"):
        _ = torch.randn(4, 4) + shared
    clear = SharedRows(torch.randn(3, 1, 4), shared.course)
    x = torch.randn(3, 4)
    assert torch.equal(x + clear, x + clear.rows[:, 0])


def test_a_tensor_of_other_samples_is_refused() -> None:
    shared = _rows(3, 1, 4)
    _ = torch.randn(3, 4) + shared
    shared.course.is_learning = False
    with pytest.raises(ValueError, match="expected 3 samples in dimension 0, got 5"):
        _ = torch.randn(5, 4) + shared
