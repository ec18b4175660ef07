"""The probe holds every ingredient that it is for, and its regimes show them to every rank.

Shapes: B samples, T positions, D values of a position, H values inside a block, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpsgd_track.comparison import Verdict, compare_group
from dpsgd_track.comparison.verdict import judge_coverage
from dpsgd_track.config import (
    PROBE_ACCURACY,
    PROBE_CLIP,
    PROBE_DATA,
    PROBE_MODEL,
    PROBE_NOISE,
    JobConfig,
    Thresholds,
)
from dpsgd_track.launcher.choices import CPU_RANKS
from dpsgd_track.launcher.regimes import PROBE_MICRO_BATCHES
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import IGNORED, LOSSES
from dpsgd_track.record.run import ModeRun, Status
from dpsgd_track.training.clip_bounds import AT_BOUND, bounds_of
from dpsgd_track.training.loop import RegimeRun
from dpsgd_track.training.model import build_model
from dpsgd_track.training.observe import GatheredSamples
from dpsgd_track.training.probe import MAX_LENGTH, NUM_TOKENS, D, H, Probe
from tests.support.planned import plan
from tests.support.workspace import Workspace

CPU = torch.device("cpu")
SEED = 42
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 10))]
NUM_RANKS = (2, 3, 4)
SOUND = ("no_dp", "flash_fsdp_fuse", "flash")
PLANTED = "flash_fsdp+bias_norm_by_gram"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _probe(seed: int = SEED) -> Probe:
    model = build_model(PROBE_MODEL, num_labels=2, seed=seed, device=CPU)
    assert isinstance(model, Probe)
    return model


def _jobs(num_ranks: int, seed: int = SEED) -> dict[str, JobConfig]:
    """Jobs of the quick suite by mode, `flash` among them, which runs on one device."""
    argv = ["quick", "--device", "cpu", "--nproc-per-node", str(num_ranks)]
    argv += ["--random-seed", str(seed), "--mode", "no_dp,flash_fsdp,flash"]
    return {job.mode: job for job in plan(*argv).jobs}


def _shares(
    job: JobConfig, regime_name: str, monkeypatch: pytest.MonkeyPatch
) -> list[list[tuple[Batch, ...]]]:
    """Micro-batches of each rank in each step of a regime, as its run would cut them."""
    regime = next(r for r in job.regimes if r.name == regime_name)
    run = RegimeRun.__new__(RegimeRun)
    run.job, run.regime, run.device = job.run_in(regime), regime, CPU
    samplers = []
    for rank in range(job.num_ranks):
        with monkeypatch.context() as patch:
            patch.setattr(dist, "get_rank", lambda rank=rank: rank)
            patch.setattr(dist, "get_world_size", lambda: job.num_ranks)
            samplers.append(run._sampler(_probe(job.seed)))
    steps = range(regime.num_iter)
    return [[sampler.rank_batch(step).batches for sampler in samplers] for step in steps]


@pytest.fixture
def full_batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every micro-batch of the clip regime that holds as many samples as it can."""
    shares = _shares(_jobs(CPU_RANKS)["flash_fsdp"], PROBE_CLIP, monkeypatch)
    every = [batch for step in shares for rank in step for batch in rank]
    full = [batch for batch in every if len(batch) == PROBE_DATA.batch_size]
    assert len(full) >= 4
    return full


def _backward(model: Probe, batch: Batch) -> Tensor:
    """Losses of a micro-batch [B], whose sum's gradient is left at the parameters."""
    losses = LOSSES[PROBE_MODEL.task](batch.run(model), batch.targets)
    losses.sum().backward()
    return losses.detach()


def _outputs(modules: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """Filled in with the output of each call of `modules`; gradients are kept."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keeping(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            output.retain_grad()
            seen[name].append(output)

        return keep

    for name, module in modules.items():
        module.register_forward_hook(keeping(name))
    return seen


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_tokens_repeat_within_a_sample(full_batches: list[Batch]) -> None:
    for batch in full_batches:
        tokens = [row[row != 0] for row in batch.inputs["input_ids"]]
        assert any(len(row.unique()) < len(row) for row in tokens)


def test_targets_are_ignored_in_unequal_numbers(full_batches: list[Batch]) -> None:
    for batch in full_batches:
        num_ignored = (batch.targets == IGNORED).sum(dim=1)
        assert len(num_ignored.unique()) > 1
        assert num_ignored.max() > 0
        # Nowhere is everything ignored: the loss would be 0 whatever the model computes.
        assert num_ignored.max() < PROBE_DATA.seq_length - 1


def test_a_gradient_reaches_the_embedding_at_padding(full_batches: list[Batch]) -> None:
    model = _probe()
    assert model.embedding.padding_idx == model.config.pad_token_id
    seen = _outputs({"embedding": model.embedding})
    for batch in full_batches:
        _backward(model, batch)
        is_padding = batch.inputs["input_ids"] == model.embedding.padding_idx
        assert (batch.inputs["attention_mask"] == 0).equal(is_padding)
        assert is_padding.any()
        lengths = _gradient(seen["embedding"].pop()).norm(dim=2) * is_padding
        # Not by rounding alone: next to a token, as long as those of tokens, give or take.
        assert lengths.amax(dim=1)[is_padding.any(dim=1)].min() > 1e-4


def test_a_biased_linear_layer_sees_several_positions(full_batches: list[Batch]) -> None:
    model = _probe()
    layers = {str(n): block.get_submodule("right") for n, block in enumerate(model.blocks)}
    seen = _outputs(layers)
    _backward(model, full_batches[0])
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        assert layer.bias is not None
        dy_BTH = _gradient(seen[name][0])
        assert dy_BTH.shape == (PROBE_DATA.batch_size, PROBE_DATA.seq_length, H)
        # One after another, so that a bias's gradient is not that of a single position.
        assert (dy_BTH.norm(dim=2) > 0).sum(dim=1).min() > 1


def test_norms_of_both_kinds_are_trained(full_batches: list[Batch]) -> None:
    model = _probe()
    _backward(model, full_batches[0])
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    assert {type(norm) for norm in norms} == {nn.LayerNorm, nn.RMSNorm}
    for norm in norms:
        for parameter in norm.parameters():
            assert _gradient(parameter).ne(0).all()


def test_the_head_is_tied_and_both_uses_add_to_its_gradient(full_batches: list[Batch]) -> None:
    model = _probe()
    assert model.head.weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters() if "head" in name] == []
    seen = _outputs({"embedding": model.embedding, "head": model.head})
    _backward(model, full_batches[0])
    for outputs in seen.values():
        assert _gradient(outputs[0]).norm() > 0
    # The embedding itself gives the row of padding no gradient: what is there is the head's.
    assert _gradient(model.embedding.weight)[0].norm() > 0


def test_one_module_is_called_twice_and_no_other(full_batches: list[Batch]) -> None:
    model = _probe()
    named = {name: m for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    seen = _outputs(named)
    _backward(model, full_batches[0])
    counts = {name: len(calls) for name, calls in seen.items()}
    twice = {name for name, count in counts.items() if count == 2}
    assert twice == {f"blocks.{n}.reused" for n in range(len(model.blocks))}
    assert {name for name, count in counts.items() if count == 0} == {"unused"}
    assert set(counts.values()) == {0, 1, 2}
    for name in twice:
        first, second = (_gradient(call) for call in seen[name])
        assert first.norm() > 0
        assert second.norm() > 0
        assert not torch.equal(first, second)


def test_outputs_of_two_linear_layers_are_added(full_batches: list[Batch]) -> None:
    model = _probe()
    block = model.blocks[0]
    pair = {name: block.get_submodule(name) for name in ("left", "right")}
    inputs: list[Tensor] = []
    for layer in pair.values():
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    seen = _outputs(pair)
    _backward(model, full_batches[0])
    (left,), (right,) = seen.values()
    # Of equal gradients and unequal inputs and outputs.
    torch.testing.assert_close(_gradient(left), _gradient(right), rtol=0, atol=0)
    assert not torch.equal(left, right)
    assert not torch.equal(*inputs)


def test_every_parameter_but_the_unused_has_a_gradient(full_batches: list[Batch]) -> None:
    model = _probe()
    _backward(model, full_batches[0])
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"unused.weight", "unused.bias"}
    for name, parameter in model.named_parameters():
        if name not in without:
            assert _gradient(parameter).norm() > 0, name


def test_ranks_get_unequal_rows_and_one_gets_none() -> None:
    rows = {name: len(p) for name, p in _probe().named_parameters()}
    assert {name for name, n in rows.items() if n < CPU_RANKS} == {"gate.weight", "gate.bias"}
    # None is divided evenly among an even number of ranks.
    assert all(n % 2 for n in rows.values())


def test_sizes_are_told_apart() -> None:
    shapes = {p.shape for p in _probe().parameters()}
    assert {(NUM_TOKENS, D), (H, D), (D, H), (H, H), (MAX_LENGTH, D)} <= shapes
    b, T, K, V = (
        PROBE_DATA.batch_size,
        PROBE_DATA.seq_length,
        PROBE_MICRO_BATCHES,
        NUM_TOKENS,
    )
    sizes = {"T": T, "b": b, "D": D, "H": H, "V": V, "longest": MAX_LENGTH}
    for (name, size), (other, other_size) in combinations({**sizes, "K": K}.items(), 2):
        assert size != other_size, (name, other)
    assert not set(sizes.values()) & set(NUM_RANKS)
    assert CPU_RANKS != K
    assert T <= MAX_LENGTH


def test_no_parameter_starts_where_an_error_would_not_show() -> None:
    for name, parameter in _probe().named_parameters():
        assert parameter.ne(0).all(), name
        assert parameter.ne(1).all(), name


def test_weights_are_a_function_of_the_seed_alone() -> None:
    first = _probe().state_dict()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second, other = _probe().state_dict(), _probe(SEED + 1).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers change"
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert weight.ne(other[name]).all(), name


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_a_rank_of_the_clip_regime_has_an_empty_micro_batch_beside_full_ones(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = _shares(_jobs(num_ranks)["flash_fsdp"], PROBE_CLIP, monkeypatch)
    sizes = [[[len(batch) for batch in rank] for rank in step] for step in shares]
    b, K = PROBE_DATA.batch_size, PROBE_MICRO_BATCHES
    # One sample fewer than all; one more than a full micro-batch of each rank; all; one. Twice.
    others = num_ranks - 1
    late = num_ranks * K * b // 10
    few = [[size] for size in [2] * (late - num_ranks) + [1] * (2 * num_ranks - late)]
    assert sizes == [
        [[b] * K] * others + [[b] * (K - 1) + [b - 1]],
        [[b, 1], *[[b, 0]] * others],
        [[b] * K] * num_ranks,
        [[1], *[[0]] * others],
        *[few] * 4,
    ]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_the_noise_regime_has_an_empty_step_and_a_single_sample(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = _shares(_jobs(num_ranks)["flash_fsdp"], PROBE_NOISE, monkeypatch)
    by_step = [sum(len(batch) for rank in step for batch in rank) for step in shares]
    full = num_ranks * PROBE_MICRO_BATCHES * PROBE_DATA.batch_size
    assert by_step == [full, full - 1, 0, 1]
    assert all(len(rank) == 1 for rank in shares[2]), "an empty micro-batch is one all the same"


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("regime", [PROBE_ACCURACY, PROBE_CLIP, PROBE_NOISE])
def test_one_device_has_the_samples_of_all_ranks(
    regime: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _jobs(num_ranks)
    assert (jobs["flash_fsdp"].num_ranks, jobs["flash"].num_ranks) == (num_ranks, 1)

    def samples(mode: str) -> list[list[list[int]]]:
        return [
            [row for rank in step for batch in rank for row in batch.inputs["input_ids"].tolist()]
            for step in _shares(jobs[mode], regime, monkeypatch)
        ]

    assert samples("flash") == samples("flash_fsdp")


def _run(
    mode: str, regime_name: str, seed: int = SEED, bounds: tuple[float, ...] = ()
) -> RegimeRun:
    """A regime of a mode, done by one rank with the samples of all of them."""
    job = replace(_jobs(CPU_RANKS, seed)["flash"], mode=mode)
    regime = next(r for r in job.regimes if r.name == regime_name and not r.replay)
    regime = replace(regime, max_grad_norms=bounds or regime.max_grad_norms)
    run = RegimeRun(job, regime, CPU)
    for _ in run.steps():
        pass
    return run


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("seed", SEEDS)
def test_clipping_is_put_to_the_test_whatever_the_seed(seed: int) -> None:
    record = _run("reference", PROBE_CLIP, seed).records[0].trajectory()
    run = ModeRun(mode="reference", regime=PROBE_CLIP, status=Status.FINISHED, trajectory=record)
    assert list(judge_coverage(run)) == []
    is_mixed = np.isin(record.step, (0, 1, 4, 6))
    mixed, all_clipped = record.clip_fraction[is_mixed], record.clip_fraction[~is_mixed]
    assert 0.2 <= np.average(mixed, weights=record.num_samples[is_mixed]) <= 0.8
    # Each of these steps alone has some that are clipped and some that are not.
    assert (mixed > 0).all()
    assert (mixed < 1).all()
    assert all_clipped.tolist() == [1.0] * 4
    # Where all norms were about the same, no wrong norm would change what is clipped.
    norms = record.sample_norm[np.isfinite(record.sample_norm)]
    assert norms.max() > 1.2 * norms.min()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("seed", SEEDS)
def test_no_sample_of_the_accuracy_regime_is_clipped_and_noise_does_not_drown_it(seed: int) -> None:
    record = _run("reference", PROBE_ACCURACY, seed).records[0].trajectory()
    full = CPU_RANKS * 3 * PROBE_DATA.batch_size
    assert record.num_samples.tolist() == [full] * 4 + [full // 10] * 4
    assert (record.clip_fraction == 0).all()
    assert np.nanmax(record.sample_norm) < 0.8 * record.max_grad_norm[0]
    num_elements = sum(p.numel() for p in _probe().parameters())
    noise_norm = record.noise_std * np.sqrt(num_elements) / record.expected_batch_size
    # From 0.9 to 3 times as long with these seeds: neither hides what is wrong with the other.
    assert (noise_norm < 5 * record.grad_norm[:4]).all()
    assert (noise_norm > record.grad_norm[:4] / 5).all()


@pytest.mark.usefixtures("alone")
def test_noise_on_the_probe_protects_nobody_and_spends_no_epsilon() -> None:
    for regime in (PROBE_ACCURACY, PROBE_NOISE):
        run = _run("flash", regime)
        assert run.mode.context.privacy.noise_multiplier > 0
        assert list(run.accounting()) == []


@pytest.mark.usefixtures("alone")
def test_a_mode_that_takes_no_empty_batch_is_given_none_to_audit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _run("flash", PROBE_NOISE).records[0].trajectory().num_samples.tolist() == [30, 29, 0, 1]
    monkeypatch.setattr(ComposedMode, "takes_empty_batches", False)
    assert _run("flash", PROBE_NOISE).records[0].trajectory().step.tolist() == [0, 1, 3]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The probe alone, by modes on all ranks and on one device, one of them with a fault."""
    workspace = Workspace(tmp_path_factory.mktemp("probe"))
    regimes = ",".join((PROBE_ACCURACY, PROBE_CLIP, PROBE_NOISE))
    argv = ("quick", "--group", "g", "--regime", regimes, "--mode", ",".join((*SOUND, PLANTED)))
    done = workspace.run("launch.py", *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


def test_sound_modes_pass_on_the_probe_and_a_planted_fault_does_not(launched: Workspace) -> None:
    compared = compare_group(launched.group("g"), Thresholds())
    verdicts = {mode.label: (mode.verdict, mode.sentence) for mode in compared.modes}
    assert {label: verdicts[label][0] for label in SOUND} == dict.fromkeys(SOUND, Verdict.PASS)
    assert verdicts[PLANTED][0] is Verdict.BUG
    assert "probe-" in verdicts[PLANTED][1]


def test_runs_on_the_probe_say_which_model_and_data_they_had(launched: Workspace) -> None:
    for run in launched.group("g").runs:
        assert run.job is not None
        padding = "left" if run.regime == PROBE_CLIP else "right"
        data = replace(PROBE_DATA, padding=padding)
        assert (run.job.model, run.job.data) == (PROBE_MODEL, data)


# What its clip regime puts to the test.


def _samples(norm: list[float], parts: list[list[float]]) -> GatheredSamples:
    count = len(norm)
    index, floats = np.arange(count), np.array(norm)
    return GatheredSamples(
        index=index,
        rank=np.zeros(count, np.int64),
        loss=floats,
        norm=floats,
        clip_factor=floats,
        norm_by_parameter=np.array(parts),
        micro_batch=np.zeros(count, np.int64),
        sketch=np.empty((count, len(parts[0]), 0)),
        other_norm=np.empty((count, len(parts[0]), 0)),
        other_loss=np.empty((count, 0)),
        part_square=np.empty((count, len(parts[0]), 0)),
        target_loss=np.empty((count, 0)),
        size=np.empty((count, 0)),
        digests=index,
    )


def test_bounds_clip_half_all_below_every_parameter_and_half_again() -> None:
    parts = [[4.0, 0.3, 1e-9], [3.0, 0.2, 1e-9], [5.0, 0.1, 1e-9]]
    samples = [_samples([norm, norm + 1.1, norm + 2], parts) for norm in (4.0, 4.5, 5, 6, 7, 8)]
    bounds = bounds_of(samples)
    assert bounds[0] == pytest.approx(5.35)
    assert bounds[AT_BOUND] in samples[AT_BOUND].norm
    # Half the usual share of the second parameter, of the smallest norm; the third is rounding.
    assert 0.01 * 4 < bounds[2] < 0.5 * 0.2
    assert bounds[3] == bounds[5] == 2.0
    assert bounds[4] == pytest.approx(8.1)


def test_a_mode_that_tells_no_norms_of_parameters_is_clipped_below_its_samples() -> None:
    samples = [_samples([2.0, 4.0], [[np.nan], [np.nan]])] * 4
    assert bounds_of(samples)[2:] == (1.0, 1.0)


def test_one_sample_is_exactly_at_the_bound_and_all_parameters_above_another(
    alone: None,
) -> None:
    reference = _run("reference", PROBE_CLIP)
    calibrated = reference.max_grad_norms
    record = _run("flash", PROBE_CLIP, bounds=calibrated).records[0].trajectory()
    norms, bound = record.sample_norm[AT_BOUND], record.max_grad_norm[AT_BOUND]
    at_bound = np.flatnonzero(norms == bound)
    assert len(at_bound) == 1
    assert record.clip_factor[AT_BOUND, at_bound] == 1
    assert bound == pytest.approx(calibrated[AT_BOUND], rel=1e-6)
    usual = np.nanmedian(record.sample_norm_by_parameter[2], axis=0)
    assert (usual[usual > 0] > record.max_grad_norm[2]).all()


def test_the_mask_and_the_side_of_the_padding_matter(full_batches: list[Batch]) -> None:
    model = _probe()
    batch = next(b for b in full_batches if (b.inputs["attention_mask"] == 0).any())
    assert (batch.inputs["attention_mask"][:, -1] == 1).all(), "padded on the left"
    whole = {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["attention_mask"])}
    is_padded = (batch.inputs["attention_mask"] == 0).any(dim=1)
    moved = (model(**batch.inputs) - model(**whole)).abs().amax(dim=(1, 2))
    assert (moved[is_padded] > 1e-3).all()
    assert (moved[~is_padded] < 1e-5).all()
