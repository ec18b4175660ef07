"""Whole models: what is shared, reused, unused, frozen or unknown is exact, or refused by name."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached, register_parametrization
from torch.utils.checkpoint import checkpoint
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

from dpsgd_track.config import AUTO, GRADIENTS, TILED, PrivacyConfig
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import MODES, takes_norm_plan
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.expanded import ExpandedLayer
from dpsgd_track.privacy.layers.inventory import find_layers
from tests.support.wrapped_layers import FirstOutput, SelfAttention

B, T, D, V = 3, 5, 7, 9
OURS = [
    name if plan == AUTO else f"{name}/{plan}"
    for name, spec in MODES.items()
    if spec.strategy in ("two_pass", "bookkeeping") and spec.runs_on_one_device
    for plan in (AUTO, GRADIENTS, TILED)
    if plan == AUTO or takes_norm_plan(name, plan)
]
"""Modes by name, and with a plan that they would not choose for what is so small: `mode/plan`."""
# float64 throughout.
TOLERANCE = 1e-10

TOKENS = torch.tensor([[0, 1, 2, 1, 3], [2, 3, 2, 3, 3], [1, 1, 0, 0, 1]])
"""Each row repeats a token; the padding index 2 is there once, twice and not at all."""


def sum_loss(output: Tensor, target_B: Tensor) -> Tensor:
    return output.flatten(1).sum(dim=1) * target_B


def mode_of(name: str, model: nn.Module, max_grad_norm: float = 1.0) -> Mode:
    name, _, plan = name.partition("/")
    context = ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=B
        ),
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=sum_loss,
        norm_plan=plan or AUTO,
    )
    return build_mode(name, model, context)


def batch_of(*inputs: Tensor) -> Batch:
    return Batch({}, torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64), args=inputs)


def per_sample(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """Each sample's gradient by plain autograd."""
    found = []
    names, parameters = zip(
        *[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True
    )
    for i in range(len(batch)):
        sample = batch.sample(i)
        loss = sum_loss(model(*sample.args), sample.targets).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(
            {
                n: torch.zeros_like(p) if g is None else g
                for n, p, g in zip(names, parameters, gradients, strict=True)
            }
        )
    return found


def check(name: str, model: nn.Module, *inputs: Tensor) -> Mode:
    """The mode's norms and clipped sum are those of plain autograd, with some samples clipped."""
    torch.manual_seed(0)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = batch_of(*(x.double() if x.is_floating_point() else x for x in inputs))
    expected = per_sample(copy.deepcopy(model), batch)
    norms = torch.stack([torch.stack([g.norm() for g in e.values()]).norm() for e in expected])
    bound = norms.median().item()
    factors = (bound / norms).clamp(max=1)
    assert 0 < (factors < 1).sum() < B
    mode = mode_of(name, model, bound)
    record = mode.accumulate(batch)
    torch.testing.assert_close(record.norm_B, norms, rtol=TOLERANCE, atol=0)
    clipped = mode.clipped_sum().gradients
    assert set(clipped) == set(expected[0])
    for parameter, found in clipped.items():
        grads = torch.stack([e[parameter] for e in expected])
        total = torch.tensordot(factors, grads, dims=1)
        torch.testing.assert_close(found, total, rtol=TOLERANCE, atol=1e-10)
        by_parameter = (record.norm_by_parameter_B or {}).get(parameter)
        want = grads.reshape(B, -1).norm(dim=1)
        if by_parameter is None:
            assert not want.any()
        else:
            torch.testing.assert_close(by_parameter, want, rtol=TOLERANCE, atol=1e-10)
    return mode


def _assert_norms(mode: Mode, batch: Batch) -> None:
    norms = [
        torch.stack([g.norm() for g in sample.values()]).norm()
        for sample in per_sample(mode.model, batch)
    ]
    record = mode.accumulate(batch)
    torch.testing.assert_close(record.norm_B, torch.stack(norms), rtol=TOLERANCE, atol=0)


class _Twice(nn.Module):
    """One linear layer used twice, a shared position index, and layers that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D, padding_idx=2)
        self.positions = nn.Embedding(T, D)
        self.mix = nn.Linear(D, D)
        self.never_called = nn.Linear(D, D)
        self.called_in_vain = nn.Linear(D, D)
        self.head = nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        h = self.tokens(tokens) + self.positions(positions)
        self.called_in_vain(h)
        self.mix(h)  # in vain, this time
        h = torch.tanh(self.mix(torch.tanh(self.mix(h))))
        y: Tensor = self.head(h)
        return y


class _Tied(nn.Module):
    """Input and output embeddings share a table; so do two linear layers, and a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D, padding_idx=2)
        self.left, self.right = nn.Linear(D, D), nn.Linear(D, D)
        self.right.weight = self.left.weight
        self.norm = nn.LayerNorm(D)
        self.right.bias = self.norm.bias
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens)
        h = self.norm(torch.tanh(self.left(h)) + self.right(h))
        y: Tensor = self.head(h).softmax(dim=-1).square()
        return y


class _Bare(nn.Module):
    """Bare parameters, of every shape in which models hold them."""

    def __init__(self, *, is_leaf: bool = True) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, D))
        self.positions = nn.Parameter(torch.zeros(1, T + 1, D))
        self.gain = nn.Parameter(torch.ones(D))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.project = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.project(x)], dim=1)
        return torch.tanh((x + self.positions) * self.gain) / self.temperature


class _Branching(nn.Module):
    """Looks at values, which cannot be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        rows = [row * (self.scale if row.sum() > 0 else self.scale.square()) for row in x]
        return torch.stack(rows)


class _Adapted(nn.Module):
    """LoRA: only the adapters are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        self.base = nn.Linear(D, D)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.head = nn.Linear(D, 1)
        for module in (self.tokens, self.base, self.head):
            module.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.base(self.tokens(tokens)))
        h = torch.tanh(self.base(h) + self.up(self.down(h)))
        y: Tensor = self.head(torch.tanh(self.base(h) + self.up(self.down(h))))
        return y


class _AdaptedAfterLeaf(_Adapted):
    """The same where the frozen embedding's output asks for gradients, as checkpoints need."""

    def forward(self, tokens: Tensor) -> Tensor:
        handle = self.tokens.register_forward_hook(lambda m, a, y: y.requires_grad_())
        try:
            return super().forward(tokens)
        finally:
            handle.remove()


def _then_head(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.Linear(D, 2))


PICTURE = torch.randn(B, 2, 6, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "reused-unused": (_Twice, TOKENS),
    "tied": (_Tied, TOKENS),
    "bare-parameters": (lambda: _then_head(_Bare()), ROWS),
    "cannot-be-vectorised": (lambda: _then_head(nn.Linear(D, D), _Branching()), ROWS),
    "adapters": (_Adapted, TOKENS),
    "adapters-after-leaf": (_AdaptedAfterLeaf, TOKENS),
    "recurrent": (
        lambda: nn.Sequential(nn.Linear(D, D), FirstOutput(nn.GRU(D, 4, batch_first=True))),
        ROWS,
    ),
    "recurrent-deep-bidirectional": (
        lambda: FirstOutput(
            nn.LSTM(D, 3, num_layers=2, bidirectional=True, bias=False, batch_first=True)
        ),
        ROWS,
    ),
    "recurrent-time-first": (lambda: _TimeFirstRecurrent(), ROWS),
    "attention": (lambda: _then_head(SelfAttention(D, num_heads=1)), ROWS),
    "pictures": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.ReLU(inplace=True),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.Flatten(),
            nn.Linear(16, 2),
        ),
        PICTURE,
    ),
    "transposed-convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 1, 7)),
        PICTURE,
    ),
    "parametrised": (
        lambda: _then_head(
            weight_norm(nn.Linear(D, D, bias=False)), nn.Tanh(), _with_positive_bias()
        ),
        ROWS,
    ),
    "named-twice": (lambda: _then_head(_NamedTwice()), ROWS),
    "flattened": (lambda: _Flattened(), TOKENS),
    "flattened-time-first": (lambda: _FlattenedTimeFirst(), TOKENS),
    "functional-use": (lambda: _Functional(), TOKENS),
    "bare-among-blocks": (lambda: _Blocks(), ROWS),
    "bare-in-containers": (lambda: _Kept(), ROWS),
    "bare-in-first-row": (lambda: _FirstRow(), ROWS),
    "bare-prompt": (lambda: _Prompted(), ROWS),
    "biases-alone": (lambda: _only_biases(_then_head(nn.Linear(D, D), nn.Tanh())), ROWS),
}


class _TimeFirstRecurrent(nn.Module):
    """Two recurrent layers, time first; the second is called twice, and starts at a given state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(D, 3, num_layers=2, bidirectional=True)
        self.second = nn.RNN(6, 6, num_layers=2, nonlinearity="relu")
        self.second.bias_hh_l0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h, (last, _) = self.first(x.transpose(0, 1))
        start = last.transpose(0, 1).reshape(-1, 2, 6).transpose(0, 1).contiguous()
        h, state = self.second(h, start)
        y: Tensor = self.second(h, hx=state)[0].transpose(0, 1)
        return y


class _NamedTwice(nn.Module):
    """Holds a bias of its own, and under another name that of the layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.same = self.inner.bias
        self.shift = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.inner(x)) + self.shift
        return y


class _Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def _with_positive_bias() -> nn.Module:
    layer = nn.Linear(D, D)
    register_parametrization(layer, "bias", _Exponential())
    return layer


def _only_biases(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("model", MODELS)
def test_norms_and_clipped_sums_equal_autograd(model: str, mode: str) -> None:
    make, inputs = MODELS[model]
    check(mode, make(), inputs)


@pytest.mark.parametrize("mode", OURS)
def test_a_mode_leaves_no_gradient_behind(mode: str) -> None:
    trained = check(mode, _Twice(), TOKENS)
    assert all(p.grad is None for p in trained.model.parameters())
    trained.zero_grad()
    assert not any(g.any() for g in trained.clipped_sum().gradients.values())


@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_are_exact_or_refused(mode: str, use_reentrant: bool) -> None:
    class Checkpointed(_Twice):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.tokens(tokens)
            for _ in range(2):
                h = checkpoint(self._block, h, use_reentrant=use_reentrant)
            y: Tensor = self.head(h)
            return y

        def _block(self, h: Tensor) -> Tensor:
            return torch.tanh(self.mix(torch.tanh(self.mix(h))))

    if not use_reentrant:
        check(mode, Checkpointed(), TOKENS)
        return
    with pytest.raises(RuntimeError, match="use_reentrant"):
        check(mode, Checkpointed(), TOKENS)


def test_a_checkpoint_still_frees_the_inputs_of_its_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(D, 1000), nn.Linear(1000, D)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.tanh(self.first(x)))
            return y

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.wide: list[Any] = []
            self.block.second.register_forward_pre_hook(self._note)

        def _note(self, module: nn.Module, args: tuple[Tensor]) -> None:
            self.wide.append(weakref.ref(args[0]))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.block, x, use_reentrant=False)
            self.is_freed = self.wide[-1]() is None
            return y

    model = Model()
    mode_of("flash", model).accumulate(Batch({}, torch.ones(B), args=(ROWS,)))
    assert model.is_freed


@pytest.mark.parametrize("mode", OURS)
def test_nothing_of_a_batch_outlives_it(mode: str) -> None:
    model = _Twice().double()
    seen: list[weakref.ref[Tensor]] = []
    for layer in (model.mix, model.head):
        layer.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    trained = mode_of(mode, model)
    gc.disable()  # cycles through autograd's graph are none that it would find
    try:
        for _ in range(2):
            trained.accumulate(batch_of(TOKENS))
            # The first batch is preceded by runs that find out where its samples are.
            assert len(seen) >= 4
            assert not any(x() is not None for x in seen)
            seen.clear()
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", OURS)
def test_dropout_is_drawn_once_for_all_backwards(mode: str) -> None:
    model = _then_head(nn.Linear(D, 50), nn.Dropout(0.5), _Bare50(), nn.Linear(50, D)).double()
    trained = mode_of(mode, model, 1e9)
    for sample in range(B):
        # With one sample and nothing clipped, the sum is what the norm is of.
        record = trained.accumulate(batch_of(ROWS.double()).sample(sample))
        summed = torch.stack([g.norm() for g in trained.clipped_sum().gradients.values()]).norm()
        torch.testing.assert_close(summed, record.norm_B[0])
        trained.zero_grad()


def test_dropout_in_an_unknown_module_differs_between_samples() -> None:
    model = nn.Sequential(_Bare50())
    context_mode = mode_of("flash_bk", model, 1e9)
    ones = torch.ones(B, 50)
    record = context_mode.accumulate(Batch({}, torch.ones(B), args=(ones,)))
    # The loss is the number of places kept, over 0.7.
    assert len(set(record.loss_B.tolist())) > 1


def test_a_checkpoint_opens_no_call_again() -> None:
    class Checkpointed(_Twice):
        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = checkpoint(super().forward, tokens, use_reentrant=False)
            return y

    opened = []
    for model in (_Twice(), Checkpointed()):
        trained = mode_of("flash", model.double())
        capture = trained.engine.capture  # type: ignore[attr-defined]
        uses: list[int] = []
        run_sums = capture.run_sums

        def noting(*args: Any, uses: Any = uses, run: Any = run_sums, of: Any = capture) -> None:
            run(*args)
            uses.append(of._num_uses.total())

        capture.run_sums = noting
        torch.manual_seed(0)
        trained.accumulate(batch_of(TOKENS))
        opened.append(uses)
    assert opened[0] == opened[1]


class _Bare50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(50))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(x) * self.gain
        return y


class _Failing(torch.autograd.Function):
    is_failing = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        if _Failing.is_failing:
            raise ArithmeticError("half way")
        return dy


@pytest.mark.parametrize("mode", OURS)
def test_a_backward_that_failed_leaves_nothing_for_the_next(mode: str) -> None:
    class Model(_Twice):
        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.tanh(self.mix(self.tokens(tokens)))
            y: Tensor = self.head(self.mix(_Failing.apply(h)))
            return y

    def clipped_sum(trained: Mode) -> list[Tensor]:
        trained.accumulate(batch_of(TOKENS))
        return list(trained.clipped_sum().gradients.values())

    model = Model().double()
    trained = mode_of(mode, copy.deepcopy(model))
    _Failing.is_failing = True
    with pytest.raises(ArithmeticError):
        trained.accumulate(batch_of(TOKENS))
    _Failing.is_failing = False
    wanted = clipped_sum(mode_of(mode, model))
    for found, want in zip(clipped_sum(trained), wanted, strict=True):
        assert torch.equal(found, want)


def test_modules_without_a_rule_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(weight_norm(nn.Linear(D, D)), nn.Linear(D, 2)).double()
    mode = mode_of("flash_bk", model)
    for _ in range(2):
        mode.accumulate(batch_of(ROWS.double()))
    (said,) = caplog.messages
    assert said.startswith("0 (ParametrizedLinear) has no rule of its own")


class _Transposing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class _Flattened(nn.Module):
    """Layers of every kind on the positions of all samples as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.start = nn.Embedding(V, D), nn.Embedding(1, D)
        self.mix, self.norm, self.gain = nn.Linear(D, D), nn.LayerNorm(D), _Gain()
        self.filter, self.head = nn.Conv1d(1, 2, 3), nn.Linear(2 * (D - 2), 1)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.tokens(tokens.flatten()))
        h = self.gain(self.norm(torch.tanh(self.mix(h))))
        # Looked up as often as there could be rows of samples, whatever their number is.
        start = self.start(torch.zeros(840, dtype=torch.long)).mean(dim=0)
        y: Tensor = self.head(torch.tanh(self.filter((h + start).unsqueeze(1))).flatten(1))
        return y.view(*tokens.shape, 1)


class _FlattenedTimeFirst(nn.Module):
    """The rows of a sample are not together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, D), nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.tokens(tokens.T.flatten())))
        return y.view(tokens.shape[1], tokens.shape[0]).T


class _Gain(nn.Module):
    """Has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain).sin()


class _Routed(nn.Module):
    """Sends a position to one of two experts, which see rows of any samples."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])
        with torch.no_grad():
            self.tokens.weight[:, 0] = torch.tensor([5.0, -5.0] * V)[:V]

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens).flatten(0, 1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where((h[:, 0] > 0) == bool(number))
            y = y.index_add(0, rows, torch.tanh(expert(h[rows])))
        return y.view(*tokens.shape, D)


class _AlikeRouted(nn.Module):
    """Sends as many positions of each sample to each expert, and hands it their numbers too."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(2, D, D))

        def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:
            return torch.einsum("nd,nde->ne", rows, self.weights[chosen])

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.experts = nn.Embedding(V, D), self.Experts()

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.tokens(tokens).flatten(0, 1)
        chosen = (torch.arange(tokens.shape[1], device=tokens.device) % 2).repeat(len(tokens))
        return torch.tanh(self.experts(rows, chosen)).view(*tokens.shape, D)


class _ChannelsFirst(nn.Module):
    """A norm over channels, which returns a view in another order, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(D, 4, 1)
        self.norm = ConvNextLayerNorm(4, data_format="channels_first")
        self.leave = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.enter(x.mT.unsqueeze(-1)))
        y: Tensor = self.leave(torch.tanh(h.mul_(2.0))).flatten(2).mT
        return y


class _Functional(nn.Module):
    """Uses its table a second time behind the back of the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.tokens(tokens), self.tokens.weight)


class _Centred(nn.Module):
    """A bare parameter, and outputs that depend on the other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=0)) * self.gain


class _Blocks(nn.Module):
    """A vision transformer's class token, positions and scales, beside its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, D))
        self.positions = nn.Parameter(torch.zeros(1, T + 1, D))
        self.scale = nn.Parameter(torch.ones(D))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.blocks = nn.ModuleList([_Scaled() for _ in range(2)])
        self.head = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = x + torch.tanh(block(x) * self.scale)
        y: Tensor = self.head(x[:, 0]) / self.temperature
        return y


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.inner(x)
        return y


class _Kept(nn.Module):
    """Parameters in containers, which nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterDict({"a": torch.ones(D), "b": torch.ones(1, D)})
        self.shifts = nn.ParameterList([torch.zeros(D)])
        self.blocks = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        h = torch.tanh(first(x) * self.gains["a"] + self.shifts[0])
        y: Tensor = second(h) * self.gains["b"]
        return y


class _FirstRow(nn.Module):
    """Takes a parameter [1, T, D] by its first row, which is that of one sample in no other form
    than the one that all samples seem to share."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, T, D))
        self.blocks = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions[0]
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class _InEquation(nn.Module):
    """Multiplies by a parameter in an equation, which names no dimension for its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(D))
        self.blocks = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("btd,de->bte", x, self.weight)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class _Prompted(nn.Module):
    """A prompt [P, D], which gets its dimension for the samples from the model."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(2, D))
        self.blocks = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.prompt.unsqueeze(0).repeat(len(x), 1, 1), x], dim=1)
        for block in self.blocks:
            x = torch.tanh(block(x.cumsum(dim=1)))
        return x


def _beside_repeated(x: Tensor, p: Tensor) -> Tensor:
    return torch.cat([p.repeat(len(x), 1, 1), x], dim=1)


class _FirstCopy(nn.Module):
    """Looks positions up as [1, T], and takes them out of that one row."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
        self.use, self.head = use, nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions(torch.arange(tokens.shape[1])[None])
        y: Tensor = self.head(torch.tanh(self.use(self.tokens(tokens), positions)))
        return y


class _RelativePositions(nn.Module):
    """A table [T, T] of rows that all samples share, through layers of its own (T5, DeBERTa)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(V, D), nn.Embedding(2 * T, D)
        self.norm, self.bias, self.head = nn.LayerNorm(D), nn.Linear(D, 1), nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1])
        rows = self.bias(self.norm(self.table(steps[:, None] - steps[None] + T)))
        scores = rows.permute(2, 0, 1).softmax(dim=-1)
        y: Tensor = self.head(torch.tanh(scores @ self.tokens(tokens)))
        return y


class _LabelTable(nn.Module):
    """Scores each sample against embeddings of all labels; there are as many as samples."""

    def __init__(self, num_labels: int = B) -> None:
        super().__init__()
        self.tokens, self.labels = nn.Embedding(V, D), nn.Embedding(num_labels, D)
        self.norm = nn.LayerNorm(D)
        self.register_buffer("index", torch.arange(num_labels))

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.tokens(tokens)).mean(dim=1)
        return torch.tanh(h @ self.norm(self.labels(self.index)).T)


class _TimeFirst(nn.Module):
    """Layers of every kind on [T, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(V, 8), nn.Linear(8, 8)
        self.attention, self.rnn = nn.MultiheadAttention(8, 2), nn.GRU(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(self.tokens(tokens.T))
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        h = h + self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0]
        y: Tensor = self.head(torch.tanh(self.norm(self.rnn(h)[0]))).transpose(0, 1)
        return y


class _Gated(nn.Module):
    """An RMSNorm that some calls give a second argument."""

    class GatedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            x = x if gate is None else x * F.silu(gate)
            root = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * (x * root)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.head = nn.Linear(D, D), self.GatedRMSNorm(), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        y: Tensor = self.head(self.norm(h, h.cos()))
        return y


class _ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, D), nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(input=torch.tanh(self.tokens(input=tokens)))
        return y


class _Offset(nn.Embedding):
    """OPT's and BART's positions: rows from the third on."""

    def __init__(self) -> None:
        super().__init__(T + 2, D)

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions + 2)


class _OffsetPositions(nn.Module):
    def __init__(self, *, is_shared: bool) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(V, D), _Offset(), nn.Linear(D, 1)
        self.is_shared = is_shared

    def forward(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1])
        steps = steps[None] if self.is_shared else steps.expand(len(tokens), -1)
        y: Tensor = self.head(torch.tanh(self.tokens(tokens) + self.positions(steps)))
        return y


class _Square(nn.Module):
    """As many positions as samples, which are looked up without a batch dimension (nanoGPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(B, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.norm(self.positions(torch.arange(tokens.shape[1])))
        y: Tensor = self.head(torch.tanh(self.tokens(tokens) + positions))
        return y


class _HookedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(D, D), nn.Linear(D, 1)
        self.enter.register_forward_hook(lambda module, args, y: 2 * torch.tanh(y))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.enter(x))
        return y


class _InPlace(nn.Module):
    """Changes what linear layers return, which is a view where they have a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.leave = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.enter(x))
        return torch.tanh_(self.leave(self.mix(h).add_(h)))


class _Keeping(nn.Module):
    """A module without a rule that keeps a tensor for later."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.scale
            self.penalty = y.square()
            return y

    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.head = self.Scaled(), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.scaled(x)) + self.scaled.penalty.sum(dim=2, keepdim=True)
        return y


class _CachedParametrisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = weight_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        with cached():
            return torch.tanh(self.mix(torch.tanh(self.mix(x))))


class _SampleBySample(nn.Module):
    """Looks each sample up in a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, D), nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(torch.cat([self.tokens(row[None]) for row in tokens])))
        return y


class _InitialState(nn.Module):
    """A recurrent layer with a state [1, B, d], and attention with a mask [T, T] at T = B."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.enter = nn.Linear(D, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        h = self.rnn(x, x.mean(dim=1)[None].contiguous())[0]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y: Tensor = self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return y


SHARED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "p": (lambda: _FirstCopy(lambda x, p: x + p), TOKENS),
    "p[0]": (lambda: _FirstCopy(lambda x, p: x + p[0]), TOKENS),
    "p.sum(0)": (lambda: _FirstCopy(lambda x, p: x + p.sum(0)), TOKENS),
    "p.mean(0)": (lambda: _FirstCopy(lambda x, p: x + p.mean(0)), TOKENS),
    "p.view": (lambda: _FirstCopy(lambda x, p: x + p.view(-1, D)[:T]), TOKENS),
    "p.repeat": (
        lambda: _FirstCopy(lambda x, p: torch.cat([p.repeat(len(x), 1, 1), x], 1)),
        TOKENS,
    ),
    "relative-positions": (_RelativePositions, TOKENS),
    "label-table-of-B": (_LabelTable, TOKENS),
    "label-table": (lambda: _LabelTable(B + 1), TOKENS),
    "time-first": (_TimeFirst, TOKENS),
    "transposed": (lambda: _Transposing(), ROWS),
    "positions-T=B": (_Square, TOKENS[:, :B]),
    "gated-norm": (_Gated, ROWS),
    "keyword": (_ByKeyword, TOKENS),
    "offset-positions": (lambda: _OffsetPositions(is_shared=False), TOKENS),
    "offset-positions-shared": (lambda: _OffsetPositions(is_shared=True), TOKENS),
    "forward-hook": (_HookedOutput, ROWS),
    "in-place": (_InPlace, ROWS),
    "kept-for-later": (_Keeping, ROWS),
    "cached-parametrisation": (_CachedParametrisation, ROWS),
    "sample-by-sample": (_SampleBySample, TOKENS),
    "routed-alike": (_AlikeRouted, TOKENS),
    "channels-first": (_ChannelsFirst, ROWS),
    "initial-state": (_InitialState, ROWS[:, :B]),
}
"""Layers whose inputs all samples share, or have the samples in another dimension than 0."""


@pytest.mark.parametrize("mode", ["flash", "flash_bk/gradients", "flash_fuse/tiled", "ghost_bk"])
@pytest.mark.parametrize("model", SHARED)
def test_samples_are_told_apart_wherever_they_are(model: str, mode: str) -> None:
    make, inputs = SHARED[model]
    check(mode, make(), inputs)


def test_experts_that_all_samples_choose_alike_are_known_to_read_rows_of_each() -> None:
    mode = check("flash_bk", _AlikeRouted(), TOKENS)
    assert isinstance(mode, ComposedMode)
    assert mode.engine.capture is not None
    experts = mode.engine.capture.captured["experts"]
    assert isinstance(experts, ExpandedLayer)
    assert experts.is_grouped


class _MergingAdapter(nn.Linear):
    """As in loralib: `eval()` adds the adapter to the weight, and the forward leaves it out."""

    def __init__(self) -> None:
        super().__init__(D, D)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))
        self.is_merged = False

    def train(self, mode: bool = True) -> _MergingAdapter:
        super().train(mode)
        if self.is_merged == mode:
            self.weight.data += (self.up @ self.down).detach() * (-1 if mode else 1)
            self.is_merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.is_merged else y + x @ self.down.T @ self.up.T


class _OwnBackward(nn.Module):
    """Moves its input along a gradient that its forward computes, optionally differentiable."""

    def __init__(self, *, create_graph: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.create_graph = create_graph

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.inner(x).square().sum()
            (direction,) = torch.autograd.grad(energy, x, create_graph=self.create_graph)
        y: Tensor = self.inner(x + 0.1 * direction)
        return y


class _FixedPoint(nn.Module):
    """z = f(z); a hook solves for its gradient with further backwards (deep equilibrium models)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        def once(z: Tensor) -> Tensor:
            y: Tensor = 0.3 * torch.tanh(self.mix(z) + x)
            return y

        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(20):
                z = once(z)
        z = once(z)
        if torch.is_grad_enabled():
            start = z.detach().requires_grad_()
            again = once(start)

            def solve(gradient: Tensor) -> Tensor:
                solution = gradient
                for _ in range(20):
                    (step,) = torch.autograd.grad(again, start, solution, retain_graph=True)
                    solution = step + gradient
                return solution

            z.register_hook(solve)
        return z


BEYOND_OUTPUTS: dict[str, Callable[[], nn.Module]] = {
    "merging-adapter": _MergingAdapter,
    "own-backward": _OwnBackward,
    "fixed-point": _FixedPoint,
}
"""Modules whose forward or `eval()` does more than compute an output."""


@pytest.mark.parametrize("mode", ["flash", "flash_bk/gradients", "flash_fuse/tiled", "ghost_bk"])
@pytest.mark.parametrize("name", BEYOND_OUTPUTS)
def test_a_module_that_does_more_than_compute_an_output_is_exact(name: str, mode: str) -> None:
    check(mode, _then_head(nn.Linear(D, D), nn.Tanh(), BEYOND_OUTPUTS[name](), nn.Tanh()), ROWS)


@pytest.mark.parametrize("mode", OURS)
def test_a_gradient_that_is_differentiated_again_is_exact_or_refused(mode: str) -> None:
    model = _then_head(nn.Linear(D, D), _OwnBackward(create_graph=True))
    if mode == "flash_fuse_bk/gradients":
        # Autograd itself forms the gradients of the weights' per-sample views.
        check(mode, model, ROWS)
        return
    with pytest.raises(ValueError, match="a backward inside of it that is differentiated again"):
        check(mode, model, ROWS)


class _Reversible(nn.Module):
    """Recomputes its activations in its backward, which runs another backward."""

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, inner: nn.Module) -> Tensor:
            ctx.save_for_backward(x)
            ctx.inner = inner
            y: Tensor = inner(x)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                torch.autograd.backward(ctx.inner(x), dy)
            return x.grad, None

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.Run.apply(x, self.inner)
        return y


def _compiled_by_jit(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: nn.Module = torch.jit.trace(model, ROWS)
    return compiled


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "mixed-samples": (lambda: _then_head(_Centred()), ROWS, r"0: .* treats each sample by itself"),
    "batch-norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)),
        PICTURE,
        r"1 \(BatchNorm2d mixes the samples",
    ),
    "reversible": (
        lambda: _then_head(nn.Linear(D, D), _Reversible()),
        ROWS,
        r"1\.inner: .* a backward inside of the backward",
    ),
    "compiled-by-jit": (
        lambda: _compiled_by_jit(_then_head(nn.Tanh())),
        ROWS,
        r"1 \(compiled by torch\.jit",
    ),
}


@pytest.mark.parametrize("mode", ["flash", "flash_fuse", "flash_fuse_bk"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_exact_is_refused_by_name(name: str, mode: str) -> None:
    make, inputs, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        mode_of(mode, make()).accumulate(Batch({}, torch.ones(B), args=(inputs,)))


@pytest.mark.parametrize("mode", ["flash", "flash_fuse_bk"])
def test_a_use_that_begins_later_is_refused_too(mode: str) -> None:
    class Later(_Functional):
        is_functional = False

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) if self.is_functional else self.tokens(tokens)

    trained = mode_of(mode, Later().double())
    for _ in range(4):
        trained.accumulate(batch_of(TOKENS))
    trained.model.is_functional = True  # at a batch like any other
    with pytest.raises(ValueError, match="Used in other ways too"):
        trained.accumulate(batch_of(TOKENS))


def test_frozen_layers_need_no_rule() -> None:
    model = _FirstRow()
    model.positions.requires_grad_(False)
    assert [layer.fqn for layer in find_layers(model)] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("make", "is_spread"),
    [(_Blocks, True), (_Kept, True), (_FirstRow, True), (_Prompted, True), (_InEquation, False)],
)
def test_a_bare_parameter_is_spread_where_that_is_faithful(
    make: Callable[[], nn.Module], is_spread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make().double()
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    # A new head's outputs say nothing.
    nn.init.zeros_(head.weight)
    mode_of("flash_bk", model).accumulate(batch_of(ROWS.double()))
    said = "is used in a way that takes no copy for each sample"
    assert any(said in message for message in caplog.messages) is not is_spread


@pytest.mark.parametrize("mode", ["flash", "flash_bk"])
def test_rows_that_a_router_chooses_are_never_taken_for_one_samples_after_the_others(
    mode: str,
) -> None:
    model = _Routed().double()
    trained = mode_of(mode, model)
    # As many odd tokens in each sample, and then as many on average.
    for counts in ([2, 2, 2], [1, 2, 3]):
        rows = [[1] * n + [0] * (T - n) for n in counts]
        batch = batch_of(torch.tensor(rows) + 2 * torch.arange(B).unsqueeze(1))
        _assert_norms(trained, batch)


@pytest.mark.parametrize("mode", ["flash", "flash_bk"])
def test_a_use_of_a_bare_parameter_that_begins_later_is_exact(mode: str) -> None:
    class Gated(_Prompted):
        is_open = False

        def forward(self, x: Tensor) -> Tensor:
            if self.is_open:
                return super().forward(x)
            y: Tensor = self.blocks[1](torch.tanh(self.blocks[0](x)))
            return y

    model = Gated().double()
    trained, batch = mode_of(mode, model), batch_of(ROWS.double())
    trained.accumulate(batch)
    model.is_open = True
    _assert_norms(trained, batch)


@pytest.mark.parametrize("mode", OURS)
def test_a_backward_of_another_loss_is_refused(mode: str) -> None:
    model = _Twice().double()
    trained = mode_of(mode, model)
    trained.accumulate(batch_of(TOKENS))
    model(TOKENS).sum().backward()
    with pytest.raises(RuntimeError, match="it is not clipped"):
        trained.clipped_sum()


@pytest.mark.parametrize("mode", OURS)
def test_a_change_in_place_of_what_a_layer_read_is_an_error(mode: str) -> None:
    class Spoiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.enter(x)
            y: Tensor = self.leave(h)
            h.mul_(2)
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mode_of(mode, Spoiling()).accumulate(Batch({}, torch.ones(B), args=(ROWS,)))


@pytest.mark.parametrize("mode", OURS)
def test_an_empty_batch_adds_nothing_and_trains_on(mode: str) -> None:
    model = _Twice().double()
    trained = mode_of(mode, model)
    record = trained.accumulate(Batch({}, torch.ones(0), args=(TOKENS[:0],)))
    assert (len(record.loss_B), len(record.norm_B)) == (0, 0)
    assert not any(g.any() for g in trained.clipped_sum().gradients.values())
    trained.accumulate(batch_of(TOKENS))
    assert any(g.any() for g in trained.clipped_sum().gradients.values())


@pytest.mark.parametrize("mode", OURS)
def test_a_change_in_place_of_looked_up_tokens_is_an_error(mode: str) -> None:
    class Spoiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(V, D)

        def forward(self, tokens: Tensor) -> Tensor:
            rows: Tensor = self.tokens(tokens)
            # autograd has no reason to look at them again: their gradient stops at the rows.
            tokens.clamp_(max=1)
            return rows

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mode_of(mode, Spoiling()).accumulate(Batch({}, torch.ones(B), args=(TOKENS.clone(),)))
