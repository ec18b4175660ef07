"""What the reference records of each sample: wrong norms by their definitions, moved gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, norm_and_sketch
from dpsgd_track.modes.protocol import SampleRun
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import (
    causal_lm_loss,
    classification_loss,
    one_loss_a_sample,
    regression_loss,
)
from dpsgd_track.record.alternatives import LossFormula, NormFormula, SumFormula
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.training.moved_gradient import MOVES, moved
from dpsgd_track.training.other_losses import other_losses
from dpsgd_track.training.sample_observer import SampleObserver
from tests.support.synthetic_group import trajectory

pytestmark = pytest.mark.usefixtures("one_rank")

T, D, V = 7, 4, 5


class Small(nn.Module):
    """An embedding with padding, a norm, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=0)
        self.norm = nn.LayerNorm(D)
        self.reused = nn.Linear(D, D)
        self.out = nn.Linear(D, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.embedding(tokens))
        out: Tensor = self.out(torch.tanh(self.reused(torch.tanh(self.reused(h)))))
        return out


def observed(tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[NormFormula, float]]]:
    """Gradients by parameter, and the values of formulas by parameter."""
    torch.manual_seed(1)
    model = Small().double()
    with torch.no_grad():
        model.norm.weight.add_(0.3 * torch.randn(D))
    observer = SampleObserver()
    observer.watch(model)
    loss = model(tokens).square().mul(torch.arange(3.0)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    outputs = observer.outputs()
    found = torch.autograd.grad(loss, [*parameters, *outputs])
    gradients = dict(zip(names, found, strict=False))
    observer.see(gradients, found[len(parameters) :])
    seen = observer.take()
    sketch, norms = seen.sketch, seen.other_norm
    assert sketch.shape == (1, len(names), 2 * NUM_PROJECTIONS)
    whole = norm_and_sketch("out.weight", gradients["out.weight"], 0, 12)[1:].numpy()
    place = names.index("out.weight")
    assert np.array_equal(sketch[0, place, :NUM_PROJECTIONS], whole)
    assert np.array_equal(sketch[0, place, NUM_PROJECTIONS:], whole)
    assert len(observer.take().sketch) == 0
    values = dict(zip(names, norms[0].tolist(), strict=True))
    return gradients, {n: dict(zip(NormFormula, v, strict=True)) for n, v in values.items()}


def test_a_layer_that_runs_again_in_the_backward_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    observer = SampleObserver()
    observer.watch(model)
    x = torch.ones(1, 4, 3, dtype=torch.float64, requires_grad=True)
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    outputs = observer.outputs()
    found = torch.autograd.grad(loss, [*parameters, *outputs])
    observer.see(dict(zip(names, found, strict=False)), found[len(parameters) :])
    assert len(observer.take().sketch) == 1


class BiasAlone(nn.Module):
    """Adds a bias, as the head of BERT does beside its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(D, V)
        self.bias = nn.Parameter(torch.ones(V))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(x) + self.bias
        return out


class Widened(nn.Module):
    """Has a weight of its input's width, and another output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x * self.weight, x], dim=-1)


@pytest.mark.parametrize(("layer", "known"), [(BiasAlone(), ["bias"]), (Widened(), [])])
def test_layers_of_unknown_kinds_are_seen_without_formulas(
    layer: nn.Module, known: list[str]
) -> None:
    layer = layer.double()
    observer = SampleObserver()
    observer.watch(layer)
    loss = layer(torch.randn(1, T, D, dtype=torch.float64)).square().sum()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, [*parameters, *observer.outputs()])
    observer.see(dict(zip(names, found, strict=False)), found[len(parameters) :])
    lost = list(NormFormula).index(NormFormula.FIRST_POSITION_LOST)
    values = dict(zip(names, observer.take().other_norm[0, :, lost].tolist(), strict=True))
    own = {name: value for name, value in values.items() if not name.startswith("decoder")}
    assert [name for name, value in own.items() if np.isfinite(value)] == known


TOKENS = torch.tensor([[1, 2, 1, 0, 3, 1, 0]])


def test_formulas_are_what_their_words_say() -> None:
    gradients, values = observed(TOKENS)
    torch.manual_seed(1)
    model = Small().double()
    with torch.no_grad():
        model.norm.weight.add_(0.3 * torch.randn(D))
    # The gradients of outputs, by hand.
    e = model.embedding(TOKENS)
    n = model.norm(e)
    r1 = model.reused(n)
    r2 = model.reused(torch.tanh(r1))
    out = model.out(torch.tanh(r2))
    loss = out.square().mul(torch.arange(3.0)).sum()
    de, dn, dr1, dr2, dout = (g[0] for g in torch.autograd.grad(loss, [e, n, r1, r2, out]))
    x_out, e, n, out = torch.tanh(r2)[0].detach(), e.detach(), n.detach(), out.detach()
    of = values["out.bias"]
    assert of[NormFormula.POSITIONS_APART] == pytest.approx(float(dout.norm()))
    gram = float((dout @ dout.T).norm())
    assert of[NormFormula.GRAM] == pytest.approx(gram)
    assert of[NormFormula.ROOT_OF_GRAM] == pytest.approx(gram**0.5)
    assert of[NormFormula.LAST_POSITION_LOST] == pytest.approx(float(dout[:-1].sum(0).norm()))
    assert of[NormFormula.FIRST_POSITION_LOST] == pytest.approx(float(dout[1:].sum(0).norm()))
    assert np.isnan(of[NormFormula.USES_APART])
    of = values["out.weight"]
    apart = (dout.square().sum(1) * x_out.square().sum(1)).sum().sqrt()
    assert of[NormFormula.POSITIONS_APART] == pytest.approx(float(apart))
    summed = float(dout.sum(0).norm() * x_out.sum(0).norm())
    assert of[NormFormula.SUMMED_FIRST] == pytest.approx(summed)
    gram = (dout @ dout.T) * (x_out @ x_out.T)
    within = gram[:4, :4].sum() + gram[4:, 4:].sum()
    assert of[NormFormula.TAIL_OF_4_LOST] == pytest.approx(float(gram[:4, :4].sum().sqrt()))
    assert of[NormFormula.TILES_OF_4_APART] == pytest.approx(float(within.sqrt()))
    once = within / 2 + gram.sum() / 2
    assert of[NormFormula.TILES_OF_4_ONCE] == pytest.approx(float(once.sqrt()))
    assert np.isnan(of[NormFormula.TAIL_OF_8_LOST])
    both = ((dout.T @ x_out).square().sum() + apart.square()).sqrt()
    assert of[NormFormula.POSITIONS_APART_AND_TOGETHER] == pytest.approx(float(both))
    assert of[NormFormula.FACTORS_APART] == pytest.approx(float(dout.norm() * x_out.norm()))
    text = (TOKENS[0] != 0).to(dout)[:, None]
    without_padding = float(((dout * text).mT @ x_out).norm())
    assert of[NormFormula.PADDING_POSITIONS_LOST] == pytest.approx(without_padding)
    assert NormFormula.OUTPUT_AS_INPUT in of
    assert np.isnan(of[NormFormula.OUTPUT_AS_INPUT])
    of_bias = values["out.bias"]
    assert of_bias[NormFormula.PADDING_POSITIONS_LOST] == pytest.approx(
        float((dout * text).sum(0).norm())
    )
    assert np.isnan(values["embedding.weight"][NormFormula.PADDING_POSITIONS_LOST])
    of_norm = values["norm.weight"]
    scale = float((dn * n[0]).sum(0).norm())
    assert of_norm[NormFormula.RAW_INPUT] == pytest.approx(float((dn * e[0]).sum(0).norm()))
    assert of_norm[NormFormula.OUTPUT_AS_INPUT] == pytest.approx(scale)
    # Of LayerNorm, centring is right.
    right = float(gradients["norm.weight"].norm())
    assert of_norm[NormFormula.CENTRED_INPUT] == pytest.approx(right, rel=1e-4)
    lost = float((dout[:-2].T @ x_out[:-2]).norm())
    assert of[NormFormula.LAST_TWO_POSITIONS_LOST] == pytest.approx(lost)
    gradient = gradients["out.weight"]
    root = float(gradient.square().mean().sqrt())
    assert of[NormFormula.ROOT_MEAN_SQUARE] == pytest.approx(root)
    half = float(gradient.half().square().double().sum().sqrt())
    assert of[NormFormula.SQUARES_IN_FLOAT16] == pytest.approx(half)
    positive = float(((dout @ dout.T) * (x_out @ x_out.T)).clamp_min(0).sum().sqrt())
    assert of[NormFormula.NEGATIVE_LOST] == pytest.approx(positive)
    assert of[NormFormula.FIRST_ROW_LOST] == pytest.approx(float(gradient[1:].norm()))
    halves = float(gradient[:2].norm() + gradient[2:].norm())
    assert of[NormFormula.HALVES_ADDED] == pytest.approx(halves)
    assert of_bias[NormFormula.FEATURES_SUMMED] == pytest.approx(float(dout.sum(1).norm()))
    assert of[NormFormula.OWN_ROWS] == pytest.approx(float(gradient.norm()))
    assert of[NormFormula.LAST_ROW_LOST] == pytest.approx(float(gradient[:-1].norm()))
    assert of[NormFormula.LAST_COLUMN_LOST] == pytest.approx(float(gradient[:, :-1].norm()))
    assert of[NormFormula.SUM_OF_ABSOLUTES] == pytest.approx(float(gradient.abs().sum()))
    assert of[NormFormula.LARGEST_ELEMENT] == pytest.approx(float(gradient.abs().max()))
    first, last = dr1.sum(0), dr2.sum(0)
    of = values["reused.bias"]
    assert of[NormFormula.FIRST_USE] == pytest.approx(float(first.norm()))
    assert of[NormFormula.LAST_USE] == pytest.approx(float(last.norm()))
    twice = ((first + last).square().sum() + last.square().sum()).sqrt()
    assert of[NormFormula.LAST_USE_TWICE] == pytest.approx(float(twice))
    added = float(first.norm() + last.norm())
    assert of[NormFormula.USES_ADDED] == pytest.approx(added)
    uses = first.square().sum() + last.square().sum()
    assert of[NormFormula.USES_APART] == pytest.approx(float(uses.sqrt()))
    once = (uses + first @ last).sqrt()
    assert of[NormFormula.CROSS_TERM_ONCE] == pytest.approx(float(once))
    of = values["reused.weight"]
    x1, x2 = n[0], torch.tanh(r1)[0].detach()
    exchanged = float((dr1.T @ x2 + dr2.T @ x1).norm())
    assert of[NormFormula.LAST_INPUT] == pytest.approx(float(((dr1 + dr2).T @ x2).norm()))
    assert of[NormFormula.FIRST_INPUT] == pytest.approx(float(((dr1 + dr2).T @ x1).norm()))
    assert of[NormFormula.INPUTS_EXCHANGED] == pytest.approx(exchanged)
    assert np.isnan(values["out.weight"][NormFormula.LAST_INPUT])
    raw = (dn * e[0]).sum(0).norm()
    assert values["norm.weight"][NormFormula.RAW_INPUT] == pytest.approx(float(raw))
    of = values["embedding.weight"]
    is_token = (TOKENS[0] != 0)[:, None]
    assert of[NormFormula.TOKENS_APART] == pytest.approx(float((de * is_token).norm()))
    counts = torch.bincount(TOKENS[0], minlength=len(gradients["embedding.weight"]))
    by_frequency = gradients["embedding.weight"] / counts.clamp(min=1)[:, None]
    assert of[NormFormula.BY_FREQUENCY] == pytest.approx(float(by_frequency.norm()))
    runs = [de[0], de[1], de[2], de[4], de[5]]  # No equal tokens follow each other.
    in_runs = float(torch.stack(runs).square().sum().sqrt())
    assert of[NormFormula.CONSECUTIVE_TOKENS] == pytest.approx(in_runs)
    apart = gradients["embedding.weight"].square().sum() + de[TOKENS[0] == 0].sum(0).square().sum()
    assert of[NormFormula.PADDING_APART] == pytest.approx(float(apart.sqrt()))
    padded = gradients["embedding.weight"].clone()
    padded[0] += de[TOKENS[0] == 0].sum(0)
    assert of[NormFormula.PADDING_COUNTED] == pytest.approx(float(padded.norm()))


@dataclass
class Sample:
    """One sample of `Small` by hand: what goes into its layers, and the gradients of outputs."""

    tokens: Tensor
    factor: float
    gradients: dict[str, Tensor]
    inputs: dict[str, Tensor]
    """[T, D] by layer; `first` and `last` for the uses of the reused one."""
    outputs: dict[str, Tensor]
    """[T, D] gradients of outputs, likewise."""


def weighed() -> tuple[list[list[Sample]], dict[SumFormula, dict[str, Tensor]]]:
    """Two micro-batches by hand, and the wrong sums that an observer makes of them."""
    torch.manual_seed(3)
    model = Small().double()
    observer = SampleObserver()
    observer.watch(model)
    rows = [
        [1, 2, 1, 0, 3, 1, 0],
        [2, 2, 4, 4, 1, 0, 0],
        [3, 1, 3, 2, 2, 2, 0],
        [4, 0, 1, 1, 2, 3, 3],
    ]
    samples = list[list[Sample]]()
    for number in range(2):
        samples.append([])
        for place in range(2):
            tokens = torch.tensor(rows[2 * number + place])
            factor = (0.5, 1.0, 0.3, 0.7)[2 * number + place]
            e = model.embedding(tokens[None])
            n = model.norm(e)
            r1 = model.reused(n)
            t1 = torch.tanh(r1)
            r2 = model.reused(t1)
            t2 = torch.tanh(r2)
            out = model.out(t2)
            names, parameters = zip(*model.named_parameters(), strict=True)
            hidden = [e, n, r1, r2, out]
            loss = out.square().mul(torch.arange(3.0)).sum()
            noted = observer.outputs()
            found = torch.autograd.grad(loss, [*parameters, *hidden, *noted])
            gradients = dict(zip(names, found, strict=False))
            observer.see(gradients, found[len(parameters) + len(hidden) :])
            observer.weigh([torch.tensor(factor)] * len(names))
            de, _, dr1, dr2, dout = (g[0] for g in found[len(parameters) :][: len(hidden)])
            inputs = {"first": n[0].detach(), "last": t1[0].detach(), "out": t2[0].detach()}
            outputs = {"embedding": de, "first": dr1, "last": dr2, "out": dout}
            samples[-1].append(Sample(tokens, factor, gradients, inputs, outputs))
        observer.end_batch()
    right = {n: sum(s.factor * s.gradients[n] for b in samples for s in b) for n in names}
    sums = observer.sums()
    own = sums.own()
    assert all(torch.allclose(torch.as_tensor(t), own[n]) for n, t in right.items())
    assert len(sums.batches) == 2
    wrong = dict[SumFormula, dict[str, Tensor]]()
    for (formula, name), added in sums.added.items():
        wrong.setdefault(formula, {})[name] = right[name] + added
    return samples, wrong


def test_wrong_sums_are_what_their_words_say() -> None:
    batches, wrong = weighed()
    samples = [sample for batch in batches for sample in batch]

    def total(of: Callable[[Sample], Tensor]) -> Tensor:
        return torch.stack([of(sample) for sample in samples]).sum(0)

    def check(formula: SumFormula, name: str, of: Callable[[Sample], Tensor]) -> None:
        assert torch.allclose(wrong[formula][name], total(of), atol=1e-12), formula

    def use(sample: Sample, which: str) -> Tensor:
        return sample.outputs[which].T @ sample.inputs[which]

    name, c = "reused.weight", attrgetter("factor")
    check(SumFormula.FIRST_USE, name, lambda s: c(s) * use(s, "first"))
    check(SumFormula.LAST_USE, name, lambda s: c(s) * use(s, "last"))
    check(
        SumFormula.USES_SUMMED_FIRST,
        name,
        lambda s: (
            c(s)
            * (s.outputs["first"] + s.outputs["last"]).T
            @ (s.inputs["first"] + s.inputs["last"])
        ),
    )

    def both(sample: Sample) -> Tensor:
        return use(sample, "first") + use(sample, "last")

    check(SumFormula.FIRST_USE_DOUBLED, name, lambda s: c(s) * (both(s) + use(s, "first")))
    check(SumFormula.LAST_USE_DOUBLED, name, lambda s: c(s) * (both(s) + use(s, "last")))
    check(SumFormula.FIRST_USE_UNCLIPPED, name, lambda s: use(s, "first") + c(s) * use(s, "last"))
    check(SumFormula.LAST_USE_UNCLIPPED, name, lambda s: c(s) * use(s, "first") + use(s, "last"))
    out = "out.weight"
    check(
        SumFormula.FIRST_POSITION_LOST,
        out,
        lambda s: c(s) * s.outputs["out"][1:].T @ s.inputs["out"][1:],
    )
    check(
        SumFormula.TAIL_OF_4_LOST,
        out,
        lambda s: c(s) * s.outputs["out"][:4].T @ s.inputs["out"][:4],
    )
    check(
        SumFormula.LOST_IN_FLOAT16,
        out,
        lambda s: torch.where(
            (c(s) * s.gradients[out]).abs() < 2**-14, 0.0, c(s) * s.gradients[out]
        ),
    )
    # The linear layer before the last one is the second use of `reused`.
    check(
        SumFormula.INPUT_OF_LAYER_BEFORE,
        out,
        lambda s: c(s) * s.outputs["out"].T @ s.inputs["last"],
    )
    neighbours = [samples[0], samples[0], samples[2], samples[2]]
    stale = [samples[0], samples[1], samples[0], samples[1]]
    for formula, sources in (
        (SumFormula.INPUT_OF_BEFORE, neighbours),
        (SumFormula.INPUT_OF_BATCH_BEFORE, stale),
    ):
        source = dict(zip(map(id, samples), sources, strict=True))
        check(
            formula, out, lambda s, of=source: c(s) * s.outputs["out"].T @ of[id(s)].inputs["out"]
        )


def test_wrong_sums_of_an_embedding_are_what_their_words_say() -> None:
    batches, wrong = weighed()
    name = "embedding.weight"
    by_batch, by_sample, counted = (torch.zeros(V, D, dtype=torch.float64) for _ in range(3))
    for batch in batches:
        of_batch = torch.zeros_like(by_batch)
        for sample in batch:
            of_sample = torch.zeros_like(by_batch)
            for row, dy in zip(sample.tokens.tolist(), sample.outputs["embedding"], strict=True):
                counted[row] += sample.factor * dy
                if row:
                    of_sample[row] = of_batch[row] = sample.factor * dy
            by_sample += of_sample
        by_batch += of_batch
    assert torch.allclose(wrong[SumFormula.ROWS_OF_SAMPLE][name], by_sample)
    assert torch.allclose(wrong[SumFormula.ROWS_OF_BATCH][name], by_batch)
    assert torch.allclose(wrong[SumFormula.PADDING_COUNTED][name], counted)


def test_norms_of_gradients_that_are_added_up_or_averaged() -> None:
    torch.manual_seed(4)
    observer = SampleObserver()
    model = nn.Linear(3, 2)
    observer.watch(model)
    gradients = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(4)]
    for batch in (gradients[:2], gradients[2:]):
        for each in batch:
            observer.see(each, [])
        observer.end_batch()
    norms = observer.take().other_norm
    places = {formula: place for place, formula in enumerate(NormFormula)}
    one, two, three, four = (g["weight"] for g in gradients)
    wanted = {
        NormFormula.OF_SUM: [one + two, one + two, three + four, three + four],
        NormFormula.OF_MEAN: [(one + two) / 2] * 2 + [(three + four) / 2] * 2,
        NormFormula.ADDED_TO_BEFORE: [None, one + two, None, three + four],
        NormFormula.ADDED_TO_BATCH_BEFORE: [None, None, one + three, two + four],
    }
    for formula, tensors in wanted.items():
        for sample, tensor in enumerate(tensors):
            found = norms[sample, 0, places[formula]]
            assert (
                np.isnan(found) if tensor is None else found == pytest.approx(float(tensor.norm()))
            )


def test_what_a_dry_run_sees_is_forgotten_and_the_batch_before_is_not() -> None:
    observer, model = SampleObserver(), nn.Linear(3, 2)
    observer.watch(model)
    first, dry, second = (
        {n: float(k) * torch.ones_like(p) for n, p in model.named_parameters()} for k in (1, 5, 2)
    )

    def run(gradients: dict[str, Tensor]) -> None:
        observer.see(gradients, [])
        observer.end_batch()

    run(first)
    observer.take()
    run(dry)
    observer.discard()
    run(second)
    seen = observer.take()
    place = list(NormFormula).index(NormFormula.ADDED_TO_BATCH_BEFORE)
    assert seen.other_norm.shape[0] == 1
    assert seen.other_norm[0, 0, place] == pytest.approx(3 * 6**0.5)


def test_a_sample_whose_loss_needs_no_gradient_has_zeros() -> None:
    observer = SampleObserver()
    observer.watch(Small())
    observer.see({name: torch.zeros_like(p) for name, p in Small().named_parameters()}, [])
    seen = observer.take()
    sketch, norms = seen.sketch, seen.other_norm
    assert not sketch.any()
    assert not np.nan_to_num(norms).any()


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (6,), (1, 7)])
@pytest.mark.parametrize(
    "move",
    [m for m in MOVES if m not in (SumFormula.MEAN_OF_ELEMENTS, SumFormula.SUM_OF_ELEMENTS)],
)
def test_a_moved_gradient_has_no_new_elements(move: SumFormula, shape: tuple[int, ...]) -> None:
    gradient = torch.arange(1.0, 1 + np.prod(shape)).view(shape)
    result = moved(gradient, move, 2)
    assert result.shape == gradient.shape
    assert set(result.flatten().tolist()) <= {0.0, *gradient.flatten().tolist()}


def test_moves_are_what_their_words_say() -> None:
    gradient = torch.arange(15.0).view(5, 3)
    assert torch.equal(moved(gradient, SumFormula.TRANSPOSED, 2), gradient.T.reshape(5, 3))
    assert torch.equal(moved(gradient, SumFormula.NEXT_ROW, 2)[1:], gradient[:-1])
    assert torch.equal(moved(gradient, SumFormula.ROW_BEFORE, 2)[:-1], gradient[1:])
    assert torch.equal(moved(gradient, SumFormula.NEXT_COLUMN, 2)[:, 1:], gradient[:, :-1])
    assert torch.equal(moved(gradient, SumFormula.COLUMN_BEFORE, 2)[:, :-1], gradient[:, 1:])
    # Two ranks hold three rows and two.
    assert torch.equal(moved(gradient, SumFormula.NEXT_SHARD, 2)[3:], gradient[:2])
    assert torch.equal(moved(gradient, SumFormula.SHARD_BEFORE, 2)[:2], gradient[3:])
    assert torch.equal(moved(gradient, SumFormula.PADDED_IN_FRONT, 2)[1:], gradient[:-1])
    assert torch.equal(moved(gradient, SumFormula.REVERSED, 2), gradient.flip(0))
    assert torch.equal(moved(gradient, SumFormula.INTERLEAVED, 2), gradient[[0, 2, 4, 1, 3]])
    assert torch.equal(moved(gradient, SumFormula.LAST_SHARD_DOWN, 2), gradient[[0, 1, 2, 4, 3]])
    assert torch.equal(moved(gradient, SumFormula.LAST_SHARD_UP, 2), gradient[[0, 1, 2, 4, 3]])
    assert torch.equal(moved(gradient, SumFormula.MEAN_OF_ELEMENTS, 2), torch.full((5, 3), 7.0))
    assert torch.equal(moved(gradient, SumFormula.SUM_OF_ELEMENTS, 2), torch.full((5, 3), 105.0))


@pytest.mark.parametrize(
    ("move", "kept"),
    [
        (SumFormula.LAST_ROW_LOST, [1, 1, 1, 1, 0]),
        (SumFormula.LAST_USED_ROW_LOST, [1, 1, 1, 0, 0]),
        (SumFormula.FIRST_USED_ROW_LOST, [0, 0, 1, 1, 0]),
        (SumFormula.FIRST_SHARD_END_LOST, [1, 1, 0, 1, 1]),
        (SumFormula.SHARD_ENDS_LOST, [1, 1, 0, 1, 0]),
        (SumFormula.FIRST_SHARD_ALONE, [1, 1, 1, 0, 0]),
    ],
)
def test_rows_are_lost_as_the_words_say(move: SumFormula, kept: list[int]) -> None:
    # Of the rows, the first and the last are not used; two ranks hold three rows and two.
    gradient = torch.arange(1.0, 16.0).view(5, 3)
    gradient[[0, 4]] = 0.0
    assert torch.equal(moved(gradient, move, 2), gradient * torch.tensor(kept)[:, None])


def test_a_record_of_the_schema_before_is_read_without_what_it_lacks(tmp_path: Path) -> None:
    t = trajectory(noise_std=0.0)
    path = tmp_path / "trajectory.npz"
    t.save(path)
    with np.load(path) as archive:
        values = dict(archive)
    for name in ("sample_micro_batch", "sample_sketch", "sample_shard_sketch"):
        del values[name]
    for name in ("sample_other_norm", "sample_other_loss", "moved_sketch"):
        del values[name]
    for name in ("sample_part_square", "sample_target_loss", "sample_size", "part_sketch"):
        del values[name]
    np.savez(path, **{**values, "schema": np.int64(2)})
    read = Trajectory.load(path)
    assert np.array_equal(read.gradient_sketch, t.gradient_sketch)
    assert read.sample_sketch.shape == (4, 6, 4, 0)
    assert (read.sample_micro_batch == -1).all()


def test_a_record_with_fewer_alternatives_is_read(tmp_path: Path) -> None:
    t = trajectory(noise_std=0.0)
    S, P = t.gradient_sketch.shape[:2]
    t = replace(t, moved_sketch=np.ones((S, 10, P, 4), dtype=np.float32))
    path = tmp_path / "trajectory.npz"
    t.save(path)
    with np.load(path) as archive:
        values = dict(archive)
    for name in ("sample_other_loss", "sample_part_square", "sample_size", "part_sketch"):
        del values[name]
    np.savez(path, **{**values, "schema": np.int64(3)})
    read = Trajectory.load(path)
    assert read.moved_sketch.shape == (S, 10, P, 4)
    assert read.sample_other_loss.shape == (*t.sample_loss.shape, 0)


def run_of(model: nn.Module) -> SampleRun:
    return lambda batch: batch.run(model)


class Told(nn.Module):
    """A language model whose logits depend on every input, by position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 7), nn.Embedding(9, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        h = self.tokens(input_ids) + self.positions(position_ids)
        out: Tensor = h + (h * attention_mask[..., None]).mean(1, keepdim=True)
        return out


@torch.no_grad()
def test_wrong_losses_are_what_their_words_say() -> None:
    torch.manual_seed(0)
    model = Told().double()
    ids = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    places = torch.arange(5).expand(2, 5)
    targets = ids.masked_fill(mask == 0, -100)
    batch = Batch({"input_ids": ids, "attention_mask": mask, "position_ids": places}, targets)
    values = other_losses(one_loss_a_sample(causal_lm_loss), batch, 0, run_of(model)).tolist()
    of = dict(zip(LossFormula, values, strict=True))
    logits = model(ids, mask, places)[0]
    each = nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")

    def changed(ids_0: Tensor = ids[:1], **inputs: Tensor) -> Tensor:
        given = {"attention_mask": mask[:1], "position_ids": places[:1], **inputs}
        out: Tensor = model(ids_0, **given)[0]
        return nn.functional.cross_entropy(out[:-1], ids[0, 1:], reduction="none")

    wanted = {
        LossFormula.LAST_TARGET_LOST: each[:2].mean(),
        LossFormula.FIRST_TARGET_LOST: each[1:3].mean(),
        LossFormula.FIRST_PADDING_PREDICTED: each.mean(),
        LossFormula.PADDING_PREDICTED: each.mean(),
        LossFormula.NOT_SHIFTED: nn.functional.cross_entropy(logits[1:4], ids[0, 1:4]),
        LossFormula.SHIFTED_TWICE: nn.functional.cross_entropy(logits[:2], ids[0, 2:4]),
        LossFormula.TARGETS_OF_NEXT: nn.functional.cross_entropy(logits[:-1], ids[1, 1:]),
        LossFormula.TARGETS_OF_BEFORE: nn.functional.cross_entropy(logits[:-1], ids[1, 1:]),
        LossFormula.MASK_IGNORED: changed(attention_mask=torch.ones(1, 5))[:3].mean(),
        LossFormula.POSITIONS_FROM_ONE: changed(position_ids=places[:1] + 1)[:3].mean(),
        LossFormula.LAST_TOKEN_LOST: changed(
            torch.tensor([[1, 2, 3, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
        )[:2].mean(),
        LossFormula.PROBABILITIES_AS_LOGITS: nn.functional.cross_entropy(
            logits[:3].softmax(-1), ids[0, 1:4]
        ),
        LossFormula.CAPPED: nn.functional.cross_entropy(30 * (logits[:3] / 30).tanh(), ids[0, 1:4]),
        LossFormula.UNIFORM: -logits[:3].log_softmax(-1).mean(),
        LossFormula.SQUARED_LOG_SUM: logits[:3].logsumexp(-1).square().mean(),
    }
    for formula, value in wanted.items():
        assert of[formula] == pytest.approx(float(value)), formula


@torch.no_grad()
def test_losses_of_other_samples_inputs_are_what_their_words_say() -> None:
    torch.manual_seed(0)
    model = Told().double()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    places = torch.tensor([[1, 2, 3, 4, 0], [0, 1, 2, 3, 4]])

    def batch_of(ids: Tensor, targets: Tensor) -> Batch:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        return Batch(inputs, targets)

    ids, first, before = (torch.randint(1, 7, (2, 5)) for _ in range(3))
    ids[1, 2] = 6
    targets = ids.clone()
    targets[1, 2:4] = -100
    batch = batch_of(ids, targets)
    values = other_losses(
        one_loss_a_sample(causal_lm_loss),
        batch,
        1,
        run_of(model),
        before=batch_of(before, before),
        first=batch_of(first, first),
        num_tokens=7,
    )
    of = dict(zip(LossFormula, values.tolist(), strict=True))

    def loss(row: Tensor, mask_of: int = 1, places_of: int = 1, like: Tensor = targets[1]) -> float:
        given = row[None], mask[mask_of : mask_of + 1], places[places_of : places_of + 1]
        logits = model(*given)[0]
        return float(nn.functional.cross_entropy(logits[:-1], like[1:]))

    cleared, ends = ids[1].clone(), targets[1].clone()
    cleared[0] = ends[2] = 0
    wanted = {
        LossFormula.TOKENS_CLAMPED: loss(ids[1].clamp_max(5)),
        LossFormula.FIRST_TOKEN_LOST: loss(cleared),
        LossFormula.POSITIONS_OF_FIRST: loss(ids[1], places_of=0),
        LossFormula.MASK_OF_FIRST: loss(ids[1], mask_of=0),
        LossFormula.INPUTS_OF_NEXT: loss(ids[0], 0, 0),
        LossFormula.INPUTS_OF_BEFORE: loss(ids[0], 0, 0),
        LossFormula.INPUTS_OF_BATCH_BEFORE: loss(before[1]),
        LossFormula.TOKENS_OF_BATCH_BEFORE: loss(before[1]),
        LossFormula.TOKENS_OF_FIRST_BATCH: loss(first[1]),
        LossFormula.TARGETS_OF_BATCH_BEFORE: loss(ids[1], like=before[1]),
        LossFormula.IGNORED_AS_ZERO: loss(ids[1], like=targets[1].clamp_min(0)),
        LossFormula.ENDS_AS_ZERO: loss(ids[1], like=ends),
    }
    for formula, value in wanted.items():
        assert of[formula] == pytest.approx(value), formula


@torch.no_grad()
def test_the_loss_of_a_sample_that_is_cut() -> None:
    table = nn.Embedding(7, 7).double()
    ids = torch.randint(0, 7, (1, 11))
    batch = Batch({"input": ids}, ids)
    values = other_losses(one_loss_a_sample(causal_lm_loss), batch, 0, run_of(table)).tolist()
    cut = nn.functional.cross_entropy(table(ids[0, :7]), ids[0, 1:8])
    assert values[list(LossFormula).index(LossFormula.CUT_TO_8)] == pytest.approx(float(cut))


def test_wrong_losses_of_a_class_and_of_a_number() -> None:
    batch = Batch({}, torch.tensor([1, 2]), args=(torch.tensor([[0.0, 1, 2], [3, 4, 6]]),))
    model = nn.Identity()
    values = other_losses(one_loss_a_sample(classification_loss), batch, 0, run_of(model))
    of = dict(zip(LossFormula, values.tolist(), strict=True))
    log_sum = float(torch.tensor([0.0, 1, 2]).logsumexp(-1))
    assert of[LossFormula.TARGETS_OF_NEXT] == pytest.approx(log_sum - 2)
    assert of[LossFormula.UNIFORM] == pytest.approx(log_sum - 1)
    assert np.isnan(of[LossFormula.LAST_TARGET_LOST])
    batch = Batch({}, torch.tensor([[1.0], [3.0]]), args=(torch.tensor([[0.0], [1.0]]),))
    values = other_losses(one_loss_a_sample(regression_loss), batch, 0, run_of(model))
    of = dict(zip(LossFormula, values.tolist(), strict=True))
    assert of[LossFormula.TARGETS_OF_BEFORE] == pytest.approx(9.0)
    assert np.isnan(of[LossFormula.UNIFORM])
