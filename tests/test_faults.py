"""Faults are documented, are planted where they say, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dpsgd_track.comparison.diagnose.ladder import STAGES
from dpsgd_track.config import PROBE_MODEL, PrivacyConfig
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import MODES, split_planted, with_planted
from dpsgd_track.mutants import FAULTS, KINDS, MUTES, build, check_planted, unreached_seams
from dpsgd_track.mutants.fault import ENGINE_SEAMS, MODE_SEAMS, PROTOCOL_SEAMS, Site
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loss import causal_lm_loss
from dpsgd_track.privacy.noise import NoiseSource
from dpsgd_track.training.model import build_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_stays_planted() -> Iterator[None]:
    yield
    build("flash", _probe(), _context())


def _probe() -> nn.Module:
    return build_model(PROBE_MODEL, num_labels=2, seed=1, device=CPU)


def _context() -> ModeContext:
    return ModeContext(
        privacy=PrivacyConfig(noise_multiplier=0.7, max_grad_norm=0.37, expected_batch_size=5),
        device=CPU,
        param_dtype=torch.float32,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=causal_lm_loss,
    )


def _batch() -> Batch:
    tokens = torch.randint(1, 29, (5, 17), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(17).expand(5, 17)
    mask = torch.ones_like(tokens)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return Batch(inputs, tokens)


def _places() -> dict[str, Any]:
    """What lies at each seam that modes share."""
    found = {}
    for seam, (place, path) in (PROTOCOL_SEAMS | ENGINE_SEAMS).items():
        if place != "mode":
            found[seam] = attrgetter(path)(import_module(place))
    return found


def _step(mode: Mode) -> dict[str, torch.Tensor]:
    mode.accumulate(_batch())
    mode.privatize(mode.clipped_sum(), NoiseSource("1/common", 0))
    mode.step()
    mode.zero_grad()
    return {name: p.detach().clone() for name, p in mode.model.named_parameters()}


def test_there_are_enough_faults_of_every_class() -> None:
    assert len(FAULTS) >= 60
    assert {fault.kind for fault in FAULTS.values()} == set(KINDS)
    # Any of these names may be asked for.
    assert not set(KINDS) & set(FAULTS)
    assert not set(MUTES) & set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_documented(name: str) -> None:
    fault = FAULTS[name]
    assert fault.title
    assert fault.formula
    assert fault.source
    assert fault.plant.__doc__
    assert fault.stage in dict(STAGES)
    assert set(fault.seams) <= MODE_SEAMS.keys() | PROTOCOL_SEAMS.keys() | ENGINE_SEAMS.keys()
    assert set(fault.modes) <= set(MODES)
    names = {n for n, _ in _probe().named_parameters()}
    for pattern in fault.where:
        assert any(fnmatchcase(name, pattern) for name in names), pattern


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_says_all_of_its_seams_and_leaves_none_of_them_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _places()
    wrapped: list[str] = []
    wrap = Site.wrap
    monkeypatch.setattr(
        Site, "wrap", lambda site, seam, f: (wrapped.append(seam), wrap(site, seam, f))[1]
    )
    build(with_planted(FAULTS[name].modes[0], name), _probe(), _context())
    assert set(wrapped) == set(FAULTS[name].seams)
    monkeypatch.undo()
    build("flash", _probe(), _context())
    assert _places() == before


def test_a_planted_fault_changes_the_step_and_nothing_after_it() -> None:
    healthy = _step(build("flash_bk", _probe(), _context()))
    faulty = _step(build("flash_bk+factors_applied_twice", _probe(), _context()))
    again = _step(build("flash_bk", _probe(), _context()))
    assert not all(torch.equal(healthy[name], faulty[name]) for name in healthy)
    assert all(torch.equal(healthy[name], again[name]) for name in healthy)


def test_a_seam_that_a_step_comes_by_is_not_unreached() -> None:
    mode = build("flash_bk+noise_every_micro_batch", _probe(), _context())
    assert unreached_seams() == ["accumulate", "add_noise"]
    mode.accumulate(_batch())
    assert unreached_seams() == ["add_noise"]
    mode.privatize(mode.clipped_sum(), NoiseSource("1/common", 0))
    assert unreached_seams() == []


class _Foreign(Mode):
    def __init__(self, model: nn.Module, context: ModeContext) -> None:
        super().__init__(context)
        self.model = model
        self.optimizer = context.make_optimizer(model.parameters())

    def accumulate(self, batch: Batch) -> SampleRecord:
        raise NotImplementedError


def test_a_mode_without_the_seam_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected a mode with the seam clip_factors"):
        build("tests.test_faults:_Foreign+clamp_missing", _probe(), _context())


@pytest.mark.parametrize("name", [n for n, f in FAULTS.items() if f.fits_any_mode])
def test_a_fault_that_fits_any_mode_needs_nothing_of_ours(name: str) -> None:
    build(f"tests.test_faults:_Foreign+{name}", _probe(), _context())


@pytest.mark.parametrize("mute", MUTES)
def test_a_muted_mode_tells_less_and_computes_the_same(mute: str) -> None:
    loud = _step(build("flash_bk", _probe(), _context()))
    mode = build(f"flash_bk+{mute}", _probe(), _context())
    record = mode.accumulate(_batch())
    told = {
        "without_norms": record.norm_B is not None,
        "without_norms_by_parameter": record.norm_by_parameter_B is not None,
        "without_clip_factors": record.clip_factor_B is not None,
        "without_empty_batches": mode.takes_empty_batches,
    }
    assert [name for name, is_told in told.items() if not is_told] == [mute]
    quiet = _step(build(f"flash_bk+{mute}", _probe(), _context()))
    assert all(torch.equal(loud[name], quiet[name]) for name in loud)


def test_names_of_planted_modes_come_apart_again() -> None:
    assert split_planted(with_planted("flash", "a", "b")) == ("flash", ("a", "b"))
    assert split_planted("package.module:factory") == ("package.module:factory", ())


def test_an_unknown_fault_is_refused() -> None:
    check_planted("flash+without_norms+clamp_missing")
    with pytest.raises(ValueError, match=r"fault='nonsense': expected a known fault"):
        check_planted("flash+clamp_missing+nonsense")
