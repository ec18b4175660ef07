"""What a mode declines is left out before anything starts, and told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpsgd_track.comparison import GroupComparison
from dpsgd_track.config import (
    ACCURACY,
    CLIP,
    NOISE,
    PROBE_ACCURACY,
    PROBE_CLIP,
    PROBE_NOISE,
    PROBES,
    PrivacyConfig,
)
from dpsgd_track.demands import Demand, LeftOut, declined_by, left_out_of, sentences
from dpsgd_track.launcher.declarations import declined_demands
from dpsgd_track.modes import build
from dpsgd_track.modes.opacus import OpacusMode
from dpsgd_track.modes.protocol import Mode, ModeContext, ProtocolError
from dpsgd_track.modes.table import MODES, OPACUS_DECLINES
from dpsgd_track.record.plan import PLAN, GroupPlan
from dpsgd_track.report.text import summary
from dpsgd_track.training.prepare import require_taken
from tests.support import planned
from tests.support.synthetic_group import compared, group_of, healthy_runs, job, plan_of, setup

MODULE = """
from types import SimpleNamespace

print("a library that talks")


class Modest:
    takes_tied_weights = False
    takes_empty_batches = False
    takes_several_ranks = False


def quiet(model, context): ...


quiet.takes_given_noise = False
"""


class Untied(Mode):
    takes_tied_weights = False

    def __init__(self, model: nn.Module, context: ModeContext) -> None:
        super().__init__(context)
        self.model = model
        self.optimizer = context.make_optimizer(model.parameters())

    def accumulate(self, batch):
        raise NotImplementedError


@pytest.fixture
def modest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module with a class and a function, by its name."""
    (tmp_path / "modest.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "modest"


def regimes(made: GroupPlan, label: str) -> list[str]:
    return [r.name for j in made.jobs if j.label == label for r in j.regimes if not r.replay]


def test_a_demand_is_declined_by_an_attribute_of_its_name():
    assert declined_by(Untied) == (Demand.TIED_WEIGHTS,)
    assert declined_by(SimpleNamespace(takes_empty_batches=False)) == (Demand.EMPTY_BATCHES,)
    assert declined_by(Mode) == ()
    for demand in Demand:
        assert getattr(Mode, demand.attribute) is True


def test_an_attribute_that_declines_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'takes_tied_weight': .* Did you mean 'takes_tied_wei"):
        type("Typo", (Untied,), {"takes_tied_weight": False})


def test_the_table_says_of_opacus_what_its_adapter_says():
    assert declined_by(OpacusMode) == OPACUS_DECLINES
    assert declined_demands(["ghost", "flash", "opacus:ew"]) == {
        "ghost": OPACUS_DECLINES,
        "flash": (),
        "opacus:ew": OPACUS_DECLINES,
    }


def test_a_users_module_is_asked_in_a_process_of_its_own(modest, capfd):
    modes = [f"{modest}:Modest", f"{modest}:quiet", "nowhere:Mine"]
    assert declined_demands(modes) == {
        modes[0]: (Demand.TIED_WEIGHTS, Demand.EMPTY_BATCHES, Demand.SEVERAL_RANKS),
        modes[1]: (Demand.GIVEN_NOISE,),
        # Its worker says that it cannot be had.
        modes[2]: (),
    }
    assert "talks" not in "".join(capfd.readouterr())


def test_a_mode_that_its_module_does_not_have_is_refused_before_anything_starts(modest):
    for absent, near in (("Modesty", " Did you mean 'Modest'?"), ("__name__", "")):
        said = f"mode='{modest}:{absent}': expected package.module:factory. "
        said += f"{modest} has no callable '{absent}'.{near}"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            planned.plan("quick", "--mode", f"no_dp,{modest}:{absent}")


def test_what_a_mode_declines_is_left_out_of_the_plan_and_told(modest):
    argv = ("quick", "--mode", f"no_dp,{modest}:Modest,{modest}:quiet", "--nproc-per-node", "2")
    made = planned.plan(*argv)
    assert regimes(made, f"{modest}:Modest") == [ACCURACY, CLIP]
    assert set(PROBES) <= set(regimes(made, f"{modest}:quiet"))
    ranks = {each.label: each.num_ranks for each in made.jobs}
    assert (ranks[f"{modest}:Modest"], ranks[f"{modest}:quiet"]) == (1, 2)
    assert [*sentences(made.left_out)] == [
        f"not compared: {modest}:Modest in probe-accuracy, probe-clip and probe-noise, as it takes "
        "no tied weights",
        f"not compared: noise and all that follows from it of {modest}:quiet in accuracy and "
        "probe-accuracy, as it takes no noise that it is given",
    ]
    assert PLAN.loads(PLAN.dumps(made)) == made


def test_one_reason_is_told_once():
    why = {"regimes": ("clip",), "reason": "it takes no tied weights"}
    parts = [LeftOut(label=label, **why) for label in ("a", "b", "c")]
    parts.insert(1, LeftOut(label="a", part="steps with an empty batch", **why))
    assert sentences(parts) == (
        "not compared: each of a, b and c in clip, as it takes no tied weights",
        "not compared: steps with an empty batch of a in clip, as it takes no tied weights",
    )


def test_the_reference_has_no_regime_to_itself(modest):
    made = planned.plan("quick", "--mode", f"{modest}:Modest")
    assert regimes(made, "reference") == regimes(made, f"{modest}:Modest") == [ACCURACY, CLIP]
    assert made.left_out
    made = planned.plan("quick", "--mode", f"{modest}:Modest,flash")
    assert set(regimes(made, "reference")) == {ACCURACY, CLIP, PROBE_ACCURACY, PROBE_CLIP}


@pytest.mark.parametrize("verb", ["single", "full"])
def test_the_reference_alone_declines_nothing(verb):
    (only,) = planned.plan(verb, "--mode", "reference").jobs
    assert only.mode == "reference"


def test_the_micro_batches_of_all_ranks_are_those_of_the_one(modest):
    made = planned.plan("full", "--mode", f"flash,{modest}:Modest", "--nproc-per-node", "2")
    ours, theirs = made.jobs[-2:]
    assert [r.micro_batches for r in ours.regimes] == [r.micro_batches for r in theirs.regimes]


def test_a_mode_on_one_rank_is_not_timed_beside_several(modest):
    with pytest.raises(ValueError, match="nproc_per_node=2: expected 1, as modest:Modest takes no"):
        planned.plan("profile", "--mode", f"{modest}:Modest", "--nproc-per-node", "2")


def test_a_launch_of_nothing_but_what_is_declined_is_refused(modest):
    said = "expected a mode with a run in probe-clip. Not compared: modest:Modest in probe-clip, as"
    with pytest.raises(ValueError, match=said):
        planned.plan("quick", "--mode", f"{modest}:Modest", "--regime", PROBE_CLIP)


def test_parts_of_a_run_are_left_out_of_regimes_that_have_them():
    names = [ACCURACY, CLIP, NOISE, PROBE_ACCURACY, PROBE_CLIP, PROBE_NOISE]
    (steps,) = left_out_of("mine", names, (Demand.EMPTY_BATCHES,))
    assert (steps.part, steps.regimes) == (
        "steps with an empty batch",
        (NOISE, PROBE_CLIP, PROBE_NOISE),
    )
    whole, steps = left_out_of("mine", names, (Demand.OTHER_MODELS, Demand.EMPTY_BATCHES))
    assert whole.regimes == (PROBE_ACCURACY, PROBE_CLIP, PROBE_NOISE)
    assert steps.regimes == (NOISE,)
    assert not list(left_out_of("mine", names, ()))


def context() -> ModeContext:
    return ModeContext(
        privacy=PrivacyConfig(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1),
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )


def test_a_model_with_tied_weights_is_refused_by_the_names_of_both():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    name = f"{__name__}:Untied"
    assert isinstance(build.build_mode(name, tied, context()), Untied)
    tied[1].weight = tied[0].weight
    said = "does not take. 1.weight is 0.weight. Choose another --model-name."
    with pytest.raises(ValueError, match=said):
        build.build_mode(name, tied, context())


def test_a_factory_that_keeps_silent_fails_with_advice():
    mode = Untied(nn.Linear(2, 2), context())
    require_taken(mode, job("my:factory", setup(CLIP)), CLIP)
    with pytest.raises(
        ProtocolError, match=r"my:factory takes no tied weights, .* Say takes_tied_w"
    ):
        require_taken(mode, job("my:factory", setup(CLIP)), PROBE_CLIP)


def test_every_comparison_says_what_was_not_compared():
    left_out = LeftOut(label="mine", regimes=(PROBE_CLIP,), reason="it takes no tied weights")
    runs = healthy_runs()
    plan = replace(plan_of(runs), left_out=(left_out,))
    comparison: GroupComparison = compared(runs)
    comparison = replace(comparison, group=group_of(runs, plan=plan))
    (told,) = comparison.not_compared
    assert told == "Not compared: mine in probe-clip, as it takes no tied weights."
    assert told in summary(comparison)


def test_no_mode_of_ours_declines_anything():
    ours = [name for name, spec in MODES.items() if spec.strategy != "opacus"]
    assert not any(declined_demands(ours).values())
