"""Two groups: every run against its own earlier self."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsgd_track.cli.main import main
from dpsgd_track.comparison import GroupComparison, Verdict, compare_groups
from dpsgd_track.comparison.waivers import Waiver
from dpsgd_track.config import ModelConfig, PerformanceConfig, Thresholds
from dpsgd_track.record.environment import Environment
from dpsgd_track.record.run import ModeRun
from dpsgd_track.report.drift_json import drift_json
from dpsgd_track.report.markdown import markdown
from dpsgd_track.report.table import rows
from dpsgd_track.report.text import summary
from dpsgd_track.report.write import write_report
from tests.support.synthetic_group import (
    ENVIRONMENT,
    FACTS,
    Store,
    failed,
    group_of,
    healthy_runs,
    job,
    mode_run,
    plan_of,
    put,
    scaled,
    setup,
    verdicts,
    with_run,
)

HOSTILE = "<img src=x onerror=alert(1)>|`**[x](http://e.vil)@you;'\""
NEW_TORCH = replace(ENVIRONMENT, torch="2.99")


CLIPPED = mode_run("reference", "clip").trajectory


def held(
    before: Sequence[ModeRun],
    after: Sequence[ModeRun],
    *waivers: Waiver,
    environment: Environment = ENVIRONMENT,
) -> GroupComparison:
    first = group_of(before, "golden", plan=plan_of(before))
    second = group_of(after, "today", plan=plan_of(after, environment=environment))
    return compare_groups(first, second, Thresholds(), waivers, datetime.date(2026, 6, 15))


def off_by(factor: float, mode: str = "flash_fsdp", regime: str = "clip") -> list[ModeRun]:
    """Healthy runs, but for one mode's gradient norm; its replays share the fault."""
    runs = healthy_runs()
    for run in [run for run in runs if (run.mode, run.regime) == (mode, regime)]:
        wrong = scaled(run.trajectory, "grad_norm", factor, 1)
        runs = with_run(runs, replace(run, trajectory=wrong))
    return runs


def sentence_of(comparison: GroupComparison, label: str) -> str:
    return next(mode.sentence for mode in comparison.modes if mode.label == label)


def test_a_group_agrees_with_itself() -> None:
    comparison = held(healthy_runs(), healthy_runs())
    assert set(verdicts(comparison).values()) == {"PASS"}
    assert comparison.verdict is Verdict.PASS
    assert comparison.environment_differences == ()
    said = sentence_of(comparison, "flash_fsdp")
    assert "agrees with group golden in accuracy to the last bit" in said
    assert "agrees with group golden in clip to the last bit" in said


@pytest.mark.parametrize("mode", ["no_dp", "flash_fsdp", "reference"])
def test_every_run_is_held_against_its_own_earlier_self(mode: str) -> None:
    comparison = held(healthy_runs(), off_by(1.1, mode, "accuracy"))
    guilty = [label for label, verdict in verdicts(comparison).items() if verdict != "PASS"]
    assert guilty == [mode]
    assert verdicts(comparison)[mode] == "BUG"
    said = sentence_of(comparison, mode)
    assert "computes a wrong clipped sum: first at step 1 of accuracy" in said
    assert "Gradient norm off by 10 % from group golden" in said


def test_all_modes_may_be_wrong_together_and_are_still_seen() -> None:
    wrong = [replace(run, trajectory=scaled(run.trajectory, "loss", 1.5)) for run in healthy_runs()]
    comparison = held(healthy_runs(), wrong)
    assert {v for label, v in verdicts(comparison).items() if "(" not in label} == {"BUG"}


def test_a_waiver_of_one_layer_of_the_oracle_does_not_hide_another_that_its_replay_moves() -> None:
    moved = scaled(CLIPPED, "layer_grad_norm", 2.0, (1, 1))
    replay = mode_run("reference", "clip", record=moved, replay="plain")
    wrong = scaled(scaled(CLIPPED, "layer_grad_norm", 1.9, (1, 1)), "layer_grad_norm", 2.5, (1, 0))
    before = [*healthy_runs(), replay]
    after = [*with_run(healthy_runs(), mode_run("reference", "clip", wrong))]
    layer = Waiver(
        mode="reference",
        observable="layer_grad_norm",
        where="layer model.layers.0.*",
        reason="known",
        expires=datetime.date(2026, 12, 31),
    )
    assert verdicts(held(before, after, layer))["reference"] == "BUG"
    both = replace(layer, where="layer model.layers.*")
    assert verdicts(held(before, after, both))["reference"] == "PASS"


def test_a_variant_is_held_against_the_variant_of_its_name() -> None:
    record = scaled(mode_run("flash_fsdp").trajectory, "grad_norm", 1.1, 1)
    variant = mode_run("flash_fsdp", record=record, variant="fork")
    runs = [*healthy_runs(), variant]
    assert held(runs, runs).verdict is Verdict.PASS
    healed = [*healthy_runs(), mode_run("flash_fsdp", variant="fork")]
    assert verdicts(held(runs, healed))["flash_fsdp@fork"] == "BUG"
    assert verdicts(held(runs, healed))["flash_fsdp"] == "PASS"


def test_a_run_that_is_missing_later_never_passes() -> None:
    without = [run for run in healthy_runs() if (run.mode, run.regime) != ("flash_fsdp", "clip")]
    comparison = held(healthy_runs(), without)
    assert comparison.verdict is Verdict.INCONCLUSIVE
    assert "MISSING: group golden has it and group today has not" in sentence_of(
        comparison, "flash_fsdp"
    )


def test_a_new_run_has_nothing_to_be_held_against_and_says_so() -> None:
    new = [*healthy_runs(), mode_run("flash_fsdp_bk")]
    comparison = held(healthy_runs(), new)
    assert comparison.verdict is Verdict.PASS
    assert sentence_of(comparison, "flash_fsdp_bk") == (
        "flash_fsdp_bk: new in accuracy: group golden has no such run."
    )
    broken = [*healthy_runs(), mode_run("flash_fsdp_bk", status="FAILED")]
    assert held(healthy_runs(), broken).verdict is Verdict.INCONCLUSIVE


def test_two_groups_with_nothing_in_common_are_inconclusive() -> None:
    comparison = held([mode_run("flash_fsdp")], [mode_run("flash_fsdp", "clip")])
    assert comparison.verdict is Verdict.INCONCLUSIVE
    comparison = held([], [mode_run("flash_fsdp")])
    assert comparison.verdict is Verdict.INCONCLUSIVE
    assert "no run has its like in group golden" in comparison.sentence
    assert held([], []).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"initial_weights_hash": "other"}, "other initial weights"),
        ({"data_hash": np.array(["x"] * 4)}, "other"),
        ({"noise_std": 7.0}, "noise of 7, not 100"),
        ({"expected_batch_size": 8}, "an expected batch size of 8, not 6"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_unlike_runs_are_inconclusive_and_not_a_bug(change: dict[str, Any], said: str) -> None:
    record = replace(scaled(mode_run("flash_fsdp").trajectory, "loss", 1.5), **change)
    comparison = held(
        healthy_runs(), with_run(healthy_runs(), mode_run("flash_fsdp", record=record))
    )
    assert verdicts(comparison)["flash_fsdp"] == "INCONCLUSIVE"
    assert said in sentence_of(comparison, "flash_fsdp")
    assert "group golden" in sentence_of(comparison, "flash_fsdp")


@pytest.mark.parametrize(
    ("name", "values"),
    [("learning_rate", (1e-05, 0.1)), ("param_dtype", ("float32", "bfloat16"))],
)
def test_other_settings_are_inconclusive_where_they_are_recorded(
    name: str, values: tuple[Any, Any]
) -> None:
    def runs(value: Any, factor: float) -> list[ModeRun]:
        record = scaled(mode_run("flash_fsdp").trajectory, "loss", factor)
        if value is None:
            planned: dict[str, Any] = {}
        elif name == "param_dtype":
            regime = setup("accuracy")
            made = job("flash_fsdp", regime, performance=PerformanceConfig(param_dtype=value))
            planned = {"setup": regime, "job": made}
        else:
            regime = setup("accuracy", learning_rate=value)
            planned = {"setup": regime, "job": job("flash_fsdp", regime)}
        return with_run(healthy_runs(), mode_run("flash_fsdp", record=record, **planned))

    comparison = held(runs(values[0], 1.0), runs(values[1], 1.5))
    assert verdicts(comparison)["flash_fsdp"] == "INCONCLUSIVE"
    assert f"{name} {values[1]}, not {values[0]}" in sentence_of(comparison, "flash_fsdp")
    assert verdicts(held(runs(None, 1.0), runs(values[1], 1.5)))["flash_fsdp"] == "BUG"


@dataclass(frozen=True, kw_only=True)
class ModelWithANewOption(ModelConfig):
    logit_scale: float = 1.0


def test_a_new_option_of_the_model_has_to_be_equal() -> None:
    def runs(scale: float) -> list[ModeRun]:
        regime = setup("accuracy")
        model = ModelWithANewOption(name="llama-tiny", logit_scale=scale)
        record = scaled(mode_run("flash_fsdp").trajectory, "loss", scale)
        planned: dict[str, Any] = {"setup": regime, "job": job("flash_fsdp", regime, model=model)}
        return with_run(healthy_runs(), mode_run("flash_fsdp", record=record, **planned))

    comparison = held(runs(1.0), runs(1.5))
    assert verdicts(comparison)["flash_fsdp"] == "INCONCLUSIVE"
    assert "logit_scale 1.5, not 1.0" in sentence_of(comparison, "flash_fsdp")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (mode_run("flash_fsdp", "clip", status="FAILED", failure=failed("oom")), "exception: oom"),
        (
            mode_run("flash_fsdp", "clip", put(CLIPPED, "loss", np.nan, 1)),
            "loss is nan",
        ),
    ],
    ids=["failed", "NaN"],
)  # fmt: skip
def test_an_earlier_run_at_fault_proves_nothing(run: ModeRun, said: str) -> None:
    comparison = held(with_run(healthy_runs(), run), healthy_runs())
    assert verdicts(comparison)["flash_fsdp"] == "INCONCLUSIVE"
    assert "cannot be held against group golden: there, " in sentence_of(comparison, "flash_fsdp")
    assert said in sentence_of(comparison, "flash_fsdp")


def test_a_drift_under_another_environment_cannot_be_attributed() -> None:
    assert held(healthy_runs(), off_by(1.004)).verdict is Verdict.DRIFT
    comparison = held(healthy_runs(), off_by(1.004), environment=NEW_TORCH)
    assert verdicts(comparison)["flash_fsdp"] == "INCONCLUSIVE"
    said = "it cannot be attributed, since the groups also differ in torch"
    assert said in sentence_of(comparison, "flash_fsdp")
    assert comparison.environment_differences == (("torch", "2.13.0", "2.99"),)
    assert held(healthy_runs(), off_by(1.1), environment=NEW_TORCH).verdict is Verdict.BUG
    assert held(healthy_runs(), healthy_runs(), environment=NEW_TORCH).verdict is Verdict.PASS


def test_a_drift_is_attributed_to_code_where_only_code_differs() -> None:
    newer = replace(ENVIRONMENT, git_revision="b" * 40)
    comparison = held(healthy_runs(), off_by(1.004), environment=newer)
    assert comparison.verdict is Verdict.DRIFT
    assert [key for key, *_ in comparison.environment_differences] == ["git_revision"]


def test_devices_are_read_from_the_runs() -> None:
    facts = replace(FACTS, device=replace(FACTS.device, name="H100"))
    ours = [replace(run, facts=facts) for run in healthy_runs()]
    comparison = held(ours, healthy_runs())
    assert ("device name", "H100", "not recorded") in comparison.environment_differences


def test_the_floor_is_the_larger_of_both_groups() -> None:
    moved = scaled(healthy_runs()[1].trajectory, "loss", 1 + 1e-5, 1)
    noisy = with_run(healthy_runs(), mode_run("no_dp", record=moved, replay="permuted"))
    for before, after in ((noisy, healthy_runs()), (healthy_runs(), noisy)):
        regime = held(before, after).regimes[0]
        floor = regime.floor()
        assert floor is not None
        assert floor.of("loss") == pytest.approx(7e-5, rel=0.1)


def test_rounding_of_the_modes_type_does_not_excuse_the_oracle() -> None:
    coarse = scaled(CLIPPED, "grad_norm", 1.2, 1)
    plain = [*healthy_runs(), mode_run("reference", "clip", coarse, replay="plain")]
    for mode, verdict in (("reference", "BUG"), ("flash_fsdp", "INCONCLUSIVE")):
        wrong = mode_run(mode, "clip", scaled(CLIPPED, "grad_norm", 1.1, 1))
        # The replay shares the fault of the run that it repeats.
        again = mode_run("reference", "clip", scaled(coarse, "grad_norm", 1.1, 1), replay="plain")
        after = with_run(plain, wrong)
        after = with_run(after, again) if mode == "reference" else after
        assert verdicts(held(plain, after))[mode] == verdict


def test_a_waiver_accepts_a_drift_between_groups() -> None:
    waiver = Waiver(
        mode="flash_fsdp",
        observable="grad_norm",
        reason="known",
        expires=datetime.date(2026, 12, 31),
    )
    comparison = held(healthy_runs(), off_by(1.004), waiver)
    assert comparison.verdict is Verdict.PASS
    assert "1 finding waived until 2026-12-31" in comparison.sentence


def test_the_report_of_two_groups_is_whole_and_inert(tmp_path: Path) -> None:
    hostile = plan_of(healthy_runs(), environment=replace(ENVIRONMENT, torch=HOSTILE))
    first = group_of(off_by(1.004), HOSTILE)
    second = group_of(healthy_runs(), "today", plan=hostile)
    comparison = compare_groups(first, second, Thresholds())
    files = {file.name: file.read_text() for file in write_report(comparison, tmp_path, png=False)}
    assert "<img src=x" not in files["report.html"] + files["report.md"]
    assert "@you" not in files["report.md"]
    assert "What differs between the two groups" in files["report.md"]
    assert "differ in torch" in files["summary.txt"]
    found = json.loads(files["drift.json"])["environment_differences"]
    assert {"setting": "torch", "before": "2.13.0", "after": HOSTILE} in found
    assert [row.label for row in rows(comparison)] == [mode.label for mode in comparison.modes]


def test_every_mode_is_drawn_against_its_earlier_self() -> None:
    comparison = held(healthy_runs(), off_by(1.1))
    clip = next(regime for regime in comparison.regimes if regime.name == "clip")
    assert {pair.baseline for pair in clip.pairs} == {clip.baseline}
    labels = [run.label for run in clip.runs]
    assert "flash_fsdp" in labels
    assert "flash_fsdp [group golden]" in labels
    known = {run.label for run in comparison.group.runs}
    assert set(labels) <= known
    assert "group golden" in summary(comparison)
    assert "group golden" in markdown(comparison)
    assert "group golden" in drift_json(comparison)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path)


def test_two_groups_on_the_command_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.add_group(healthy_runs(), "june")
    run_id = store.add_group(off_by(1.1), "july")
    options = ["--tracking-uri", store.uri, "--no-png"]
    assert main(["compare", "june", "latest", *options]) == 1
    assert "Gradient norm off by 10 % from group june" in capsys.readouterr().out
    assert Path("results/july-vs-june/report.html").is_file()
    logged = {entry.path for entry in store.client.list_artifacts(run_id)}
    assert "comparison-june" in logged
    # The verdict of the group on its own is not this one.
    assert "dpsgd.verdict" not in store.client.get_run(run_id).data.tags
    assert main(["compare", "june", "june", *options, "--no-log"]) == 0
    assert main(["compare", "june", "absent", *options]) == 2


def test_a_pass_of_two_groups_counts_modes_once_and_tells_which_are_new() -> None:
    runs = healthy_runs()
    labels = list(dict.fromkeys(run.label for run in runs))
    new = [run for run in runs if run.label == "flash_fsdp"]
    known = [run for run in runs if run.label != "flash_fsdp"]
    before, after = group_of(known, name="july"), group_of([*runs], name="august")
    assert new
    said = compare_groups(before, after, Thresholds()).sentence
    count = len(labels)
    assert said == (
        f"PASS: {count - 1} of {count} modes agree with group july to the last bit; "
        "flash_fsdp was not run in july."
    )


def test_a_mode_that_differs_by_rounding_does_not_agree_to_the_last_bit() -> None:
    runs = healthy_runs()
    moved = next(r for r in runs if r.label == "flash_fsdp" and r.regime == "clip")
    assert moved.trajectory is not None
    off = replace(moved, trajectory=scaled(moved.trajectory, "grad_norm", 1 + 1e-9))
    after = group_of(with_run(runs, off), name="august")
    comparison = compare_groups(group_of(runs, name="july"), after, Thresholds())
    count = len({run.label for run in runs})
    assert comparison.sentence.startswith(f"PASS: {count - 1} of {count} modes agree with group j")
    assert f"; 1 of {count} modes agree with group july " in comparison.sentence
