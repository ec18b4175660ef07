"""Faults are documented, are planted where they say, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from dpsgd_track.cli.main import main
from dpsgd_track.config import GRADIENTS, PROBE_MODEL, PrivacyConfig
from dpsgd_track.distributed.sharding import as_local
from dpsgd_track.modes.build import ModeBuilder, build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import MODES, split_planted, with_planted
from dpsgd_track.mutants import worker
from dpsgd_track.mutants.catalogue import KINDS, MUTANTS
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.planting import Planter, check_planted
from dpsgd_track.mutants.redaction import Redaction
from dpsgd_track.mutants.seams import ENGINE, MODE, Seam
from dpsgd_track.mutants.site import Site
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.loss import causal_lm_loss
from dpsgd_track.privacy.noise import NoiseSource
from dpsgd_track.training import worker as training_worker
from dpsgd_track.training.model import build_model
from dpsgd_track.training.worker import Unreached

pytestmark = pytest.mark.usefixtures("one_rank")

CPU = torch.device("cpu")


@pytest.fixture
def planter() -> Iterator[Planter]:
    planter = Planter()
    yield planter
    planter.close()


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


def _places() -> dict[Any, Any]:
    """What lies at each seam that modes share."""
    return {
        seam: attrgetter(seam.path)(import_module(seam.root))
        for seam in Seam
        if seam.root not in (MODE, ENGINE)
    } | {"add_to": NoiseSource.add_to}


def _step(mode: Mode) -> dict[str, torch.Tensor]:
    mode.accumulate(_batch())
    mode.privatize(mode.clipped_sum(), NoiseSource("1/common", 0))
    mode.step()
    mode.zero_grad()
    return {name: as_local(p.detach()).clone() for name, p in mode.model.named_parameters()}


def test_there_are_enough_faults_of_every_class() -> None:
    assert len(MUTANTS) >= 60
    assert {mutant.kind for mutant in MUTANTS.values()} == set(KINDS)
    # Any of these names may be asked for.
    assert not set(KINDS) & set(MUTANTS)
    assert not set(Redaction) & set(MUTANTS)


def test_no_condition_is_left_that_nothing_needs() -> None:
    assert {need for mutant in MUTANTS.values() for need in mutant.needs} == set(Need)
    assert {seam for mutant in MUTANTS.values() for seam in mutant.seams} == set(Seam)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_documented(name: str) -> None:
    mutant = MUTANTS[name]
    assert mutant.title
    assert mutant.formula
    assert mutant.source
    assert set(mutant.modes) <= set(MODES)
    names = {n for n, _ in _probe().named_parameters()}
    for pattern in mutant.where:
        assert any(fnmatchcase(name, pattern) for name in names), pattern


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_says_all_of_its_seams_and_leaves_none_of_them_changed(
    name: str, planter: Planter, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _places()
    wrapped: list[Seam] = []
    wrap = Site.wrap
    monkeypatch.setattr(
        Site, "wrap", lambda site, seam, f: (wrapped.append(seam), wrap(site, seam, f))[1]
    )
    planter.build(with_planted(MUTANTS[name].modes[0], name), _probe(), _context())
    assert set(wrapped) == set(MUTANTS[name].seams)
    monkeypatch.undo()
    planter.close()
    assert _places() == before


def test_a_planted_fault_changes_the_step_and_nothing_after_it(planter: Planter) -> None:
    healthy = _step(planter.build("flash_bk", _probe(), _context()))
    faulty = _step(planter.build("flash_bk+factors_applied_twice", _probe(), _context()))
    again = _step(planter.build("flash_bk", _probe(), _context()))
    assert not all(torch.equal(healthy[name], faulty[name]) for name in healthy)
    assert all(torch.equal(healthy[name], again[name]) for name in healthy)


def test_an_engine_whose_fault_is_taken_out_computes_what_it_did(planter: Planter) -> None:
    def sums() -> dict[str, torch.Tensor]:
        mode.accumulate(_batch())
        own = {part.name: part.local.clone() for part in mode.gradient_parts()}
        mode.zero_grad()
        return own

    mode: Any = planter.build("flash_bk+sign_flipped", _probe(), _context())
    faulty = sums()
    planter.close()
    healthy = sums()
    assert torch.equal(faulty["gate.weight"], -healthy["gate.weight"])
    assert "sums_of" not in vars(mode.engine.capture)
    assert "packs" not in vars(mode.engine.sharder)


def test_a_seam_that_a_step_comes_by_is_not_unreached(planter: Planter) -> None:
    mode = planter.build("flash_bk+noise_every_micro_batch", _probe(), _context())
    assert planter.unreached() == ("accumulate", "add_noise")
    mode.accumulate(_batch())
    assert planter.unreached() == ("add_noise",)
    mode.privatize(mode.clipped_sum(), NoiseSource("1/common", 0))
    assert planter.unreached() == ()


@pytest.mark.parametrize("seam", [Seam.SUM_OF, Seam.PUT, Seam.PADDED_ROWS])
@pytest.mark.parametrize("mode_name", ["flash_fsdp_bk", "flash_fsdp_fuse_bk"])
def test_a_step_goes_no_faster_way_round_a_seam(mode_name: str, seam: Seam) -> None:
    # Gradients of samples that are kept would be summed straight into what other ranks are sent.
    context = replace(_context(), norm_plan=GRADIENTS)
    healthy = _step(build_mode(mode_name, _probe(), context))
    mode = build_mode(mode_name, _probe(), context)
    calls: list[Any] = []
    with closing(Site(mode)) as site:
        site.before(seam, lambda *args: calls.append(args))
        again = _step(mode)
    # Once for each parameter that a gradient reaches.
    names = [name for name, _ in mode.model.named_parameters() if not name.startswith("unused.")]
    assert len(calls) >= len(names)
    assert all(torch.allclose(healthy[name], again[name]) for name in healthy)


def test_noise_is_drawn_part_by_part_where_its_drawing_is_replaced(
    planter: Planter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_gpu(*args: object, **options: object) -> None:
        pytest.fail("what a GPU adds in one go comes by no seam")

    monkeypatch.setattr(NoiseSource, "add_on_gpu", on_gpu)
    _step(planter.build("flash_bk+noise_truncated", _probe(), _context()))
    assert planter.unreached() == ()


def test_what_a_worker_builds_is_planted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job_file: str, build: ModeBuilder, unreached: Unreached) -> int:
        with closing(cast(Any, build).__self__):
            build("flash_bk+no_noise", _probe(), _context())
            assert unreached() == ("add_noise",)
        return 3

    before = _places()
    monkeypatch.setattr(training_worker, "main", run)
    assert worker.main("job.json") == 3
    assert _places() == before


def test_training_builds_no_planted_mode_as_a_healthy_one() -> None:
    with pytest.raises(ValueError, match=r"mode='flash\+no_noise': expected a mode with nothing"):
        build_mode("flash+no_noise", _probe(), _context())


class _Foreign(Mode):
    def __init__(self, model: nn.Module, context: ModeContext) -> None:
        super().__init__(context)
        self.model = model
        self.optimizer = context.make_optimizer(model.parameters())

    def accumulate(self, batch: Batch) -> SampleRecord:
        raise NotImplementedError


def test_a_mode_without_the_seam_is_refused_by_name(planter: Planter) -> None:
    with pytest.raises(ValueError, match="expected a mode with the seam clip_factors"):
        planter.build(f"{__name__}:_Foreign+clamp_missing", _probe(), _context())


@pytest.mark.parametrize("name", [n for n, m in MUTANTS.items() if m.fits_any_mode])
def test_a_fault_that_fits_any_mode_needs_nothing_of_ours(name: str, planter: Planter) -> None:
    planter.build(f"{__name__}:_Foreign+{name}", _probe(), _context())


@pytest.mark.parametrize("redaction", Redaction)
def test_a_redacted_mode_reports_less_and_computes_the_same(
    redaction: Redaction, planter: Planter
) -> None:
    whole = _step(planter.build("flash_bk", _probe(), _context()))
    mode = planter.build(f"flash_bk+{redaction}", _probe(), _context())
    record = mode.accumulate(_batch())
    is_reported = {
        Redaction.NORMS: record.norm_B is not None,
        Redaction.NORMS_BY_PARAMETER: record.norm_by_parameter_B is not None,
        Redaction.CLIP_FACTORS: record.clip_factor_B is not None,
        Redaction.EMPTY_BATCHES: mode.takes_empty_batches,
    }
    assert [each for each in Redaction if not is_reported[each]] == [redaction]
    redacted = _step(planter.build(f"flash_bk+{redaction}", _probe(), _context()))
    assert all(torch.equal(whole[name], redacted[name]) for name in whole)


def test_names_of_planted_modes_come_apart_again() -> None:
    assert split_planted(with_planted("flash", "a", "b")) == ("flash", ("a", "b"))
    assert split_planted("package.module:factory") == ("package.module:factory", ())


def test_an_unknown_fault_is_refused() -> None:
    check_planted("flash+without_norms+clamp_missing")
    with pytest.raises(ValueError, match=r"fault='nonsense': expected a known fault"):
        check_planted("flash+clamp_missing+nonsense")


def test_the_command_line_refuses_an_unknown_fault_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["quick", "--device", "cpu", "--mode", "no_dp,flash_fsdp+nonsense"]
    assert main(argv, check_inputs=lambda model, data: None) == 2
    assert "fault='nonsense': expected a known fault" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
