"""Known faults are found, through the command itself.

By default that is a sample of the matrix, with a fault of every class, stage and choice of modes.
Marked `soak` are a larger sample, with a fault at every seam, and the whole, which takes
`launch.py faults`, the command that makes docs/detection.md, 8 minutes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpsgd_track.cli.main import main
from dpsgd_track.comparison.diagnose.culprit import Culprit
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.modes.table import MODES
from dpsgd_track.mutants.catalogue import KINDS, MUTANTS
from dpsgd_track.mutants.choice import chosen_mutants, planted_in, planted_in_turn
from dpsgd_track.mutants.coverage import coverage
from dpsgd_track.mutants.matrix import Matrix, Row
from dpsgd_track.mutants.matrix_text import markdown, summary
from dpsgd_track.mutants.mutant import FSDP_MODES
from dpsgd_track.record.stages import Stage
from tests.support import ROOT
from tests.support.workspace import Workspace

# One launch of many modes, beside which another worker may start process groups of its own.
pytestmark = pytest.mark.timeout(600)
SOAK = (pytest.mark.soak, pytest.mark.timeout(1800))


def _kinds(name: str) -> set[tuple[str, str]]:
    """What of the comparison a fault puts to the test."""
    fault = MUTANTS[name]
    return {("kind", fault.kind), ("stage", fault.stage), ("modes", str(fault.modes))}


def _seams(name: str) -> set[tuple[str, str]]:
    """What of the comparison and of the modes a fault puts to the test."""
    fault = MUTANTS[name]
    seams = {("seam", seam) for seam in fault.seams}
    return {*_kinds(name), (fault.kind, fault.stage), *seams}


def _sample(tries: Callable[[str], set[tuple[str, str]]]) -> list[str]:
    """Few faults that try all that the catalogue tries."""
    left, chosen = set().union(*map(tries, MUTANTS)), []
    while left:
        best = max(MUTANTS, key=lambda name: len(tries(name) & left))
        chosen.append(best)
        left -= tries(best)
    return chosen


CHOICES = {"kinds": _sample(_kinds), "seams": _sample(_seams), "whole": list(MUTANTS)}


@pytest.fixture(
    scope="module",
    params=["kinds", *(pytest.param(name, marks=SOAK) for name in ("seams", "whole"))],
)
def chosen(request: pytest.FixtureRequest) -> list[str]:
    return CHOICES[request.param]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, chosen: list[str]) -> tuple[Workspace, str]:
    workspace = Workspace(tmp_path_factory.mktemp("planted"))
    argv = ("faults", "--group", "g", "--fault", ",".join(chosen), "--output", "matrix.md")
    done = workspace.run("launch.py", *argv, timeout_s=1700)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    return workspace, done.stdout


@pytest.fixture(scope="module")
def told(planted: tuple[Workspace, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((planted[0].folder / "results/g/faults.json").read_text())
    return found


@pytest.mark.parametrize(("choice", "most"), [("kinds", 12), ("seams", 37)])
def test_the_samples_hold_faults_of_every_class_and_stage(choice: str, most: int) -> None:
    sample = [MUTANTS[name] for name in CHOICES[choice]]
    assert {fault.kind for fault in sample} == set(KINDS)
    for each in ("stage", "modes"):
        assert {getattr(f, each) for f in sample} == {getattr(f, each) for f in MUTANTS.values()}
    if choice == "seams":
        tried = {seam for fault in sample for seam in fault.seams}
        assert tried == {seam for fault in MUTANTS.values() for seam in fault.seams}
    assert len(sample) <= most


def test_every_fault_is_found(told: Any, chosen: list[str]) -> None:
    assert [row["fault"] for row in told["rows"]] == [f.name for f in chosen_mutants(chosen)]
    assert [row["label"] for row in told["rows"] if not row["is_detected"]] == []


def test_at_least_nine_tenths_are_blamed_on_the_right_stage_and_layer(told: Any) -> None:
    assert sum(row["has_right_place"] for row in told["rows"]) >= 0.9 * len(told["rows"])


def test_all_are_found_by_the_fourth_step(told: Any) -> None:
    late = [
        row["label"]
        for row in told["rows"]
        if row["step"] is None or row["step"] > max(3, MUTANTS[row["fault"]].since)
    ]
    assert late == []


@pytest.mark.parametrize(
    ("kind", "regime"),
    [("updates", "probe-accuracy"), ("clipping", "probe-clip"), ("noise", "probe-noise")],
)
def test_each_regime_finds_the_faults_it_is_for_by_itself(
    told: Any, kind: str, regime: str
) -> None:
    found_in = [row["found_in"] for row in told["rows"] if row["kind"] == kind]
    assert sum(regime in each for each in found_in) >= 0.9 * len(found_in)


def test_no_healthy_mode_raises_an_alarm(told: Any) -> None:
    assert {mode["mode"] for mode in told["healthy"]} == {"no_dp", *FSDP_MODES}
    assert {mode["verdict"] for mode in told["healthy"]} == {"PASS"}


def test_the_naive_test_misses_many(told: Any) -> None:
    seen = [row["naive_saw"] for row in told["rows"]]
    assert 0 < sum(seen) < 0.7 * len(seen)


def test_the_matrix_is_printed_written_and_logged(
    planted: tuple[Workspace, str], told: Any, chosen: list[str]
) -> None:
    workspace, out = planted
    page = (workspace.folder / "matrix.md").read_text()
    assert page == (workspace.folder / "results/g/faults.md").read_text()
    for name in chosen:
        assert name in out
        assert f"`{name}`" in page
    assert all(row["sentence"] for row in told["rows"])
    logged = {path.name for path in workspace.folder.rglob("mlartifacts/**/faults.*")}
    assert logged == {"faults.md", "faults.json"}


# The mode that docs/write.md shows, and the same by someone who reports nothing.
FOREIGN = """

class Quiet(MyMode):
    takes_empty_batches = False

    def accumulate(self, batch):
        assert len(batch)
        return SampleRecord(super().accumulate(batch).loss_B)


class Broken(MyMode):
    def set_max_grad_norm(self, max_grad_norm):
        super().set_max_grad_norm(max_grad_norm / 2)
"""
ASKED = ["clamp_missing", "stand_in_counted", "empty_step_without_noise", "identical_shards"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("foreign"))
    page = (ROOT / "docs" / "write.md").read_text()
    (code,) = re.findall(r'```python\n("""One sample at a time.*?)```', page, re.DOTALL)
    (workspace.folder / "my_mode.py").write_text(code + FOREIGN)
    workspace.search_path = [str(workspace.folder)]
    return workspace


@pytest.mark.soak
def test_a_mode_that_tells_little_is_told_what_that_hides(foreign: Workspace) -> None:
    done = foreign.run("launch.py", "faults", "--mode", "my_mode:Quiet", "--fault", ",".join(ASKED))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    out = " ".join(done.stdout.split())
    assert "not stand_in_counted: the mode tells no norm of any sample" in out
    assert "not empty_step_without_noise: the mode takes no empty batch" in out
    # The copies of a parameter have the same noise by right.
    assert "not identical_shards: the mode holds every parameter whole on every rank" in out
    assert "clipping: 1 of 1 would be found" in out
    # Clamps are of our own engine; the noise source is of every mode.
    assert "2 faults were planted in my_mode:Quiet itself, and 2 in flash_fsdp as a stand-in" in out
    assert "(stand-in)" in out


def test_a_mode_that_is_wrong_by_itself_is_no_place_for_faults(foreign: Workspace) -> None:
    done = foreign.run("launch.py", "faults", "--mode", "my_mode:Broken", "--fault", "no_noise")
    assert done.returncode == 1
    assert "It needs to be sound before faults are planted in it." in done.stdout
    assert "no_noise" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--fault", "nonsense"], "fault='nonsense': expected a fault, or one of the classes"),
        (["--mode", "nonsense"], "mode='nonsense': expected one of"),
        (["--mode", "ghost_fsdp"], "Opacus's modes refuse the probe's tied and reused weights"),
        (["--mode", "no_dp"], "expected one of our private modes, or one of yours"),
        (["--mode", "reference"], "expected one of our private modes, or one of yours"),
        (["--output", "nowhere/matrix.md"], "output='nowhere/matrix.md': expected a file"),
        (["--mode", "flash_fsdp+no_noise"], "expected a mode without faults"),
        (["--mode", "json:loads,json:dumps"], "expected one mode of yours at a time"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["faults", *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_list_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["faults", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in MUTANTS)
    assert not list(tmp_path.iterdir())


def test_faults_are_planted_in_turn_and_each_once() -> None:
    planned = planted_in_turn(chosen_mutants([]))
    assert len(set(planned)) == len(planned) == 1 + len(FSDP_MODES) + len(MUTANTS)
    hosts = Counter(name.partition("+")[0] for name in planned if "+" in name)
    assert set(hosts) == set(FSDP_MODES)
    assert max(hosts.values()) < 2 * min(hosts.values())


@pytest.mark.parametrize("mode", [m for m, s in MODES.items() if s.strategy == "bookkeeping"])
def test_one_of_our_modes_takes_every_fault_that_fits_it(mode: str) -> None:
    planned = planted_in(mode, chosen_mutants([]))
    assert {name.partition("+")[0] for name in planned} == {mode, "no_dp"}
    assert len(planned) - 2 == sum(mutant.fits(mode) for mutant in MUTANTS.values())


def _row(**changes: Any) -> Row:
    culprit = Culprit(stage=Stage.SUM, regime="probe-clip", step=0, places=("gate.weight",))
    row = Row(
        fault=MUTANTS["sign_flipped"],
        mode="flash_fsdp",
        label="flash_fsdp+sign_flipped",
        verdict=Verdict.BUG,
        sentence="it differs",
        culprit=culprit,
        num_places=25,
        naive_saw=False,
        found_in=("probe-clip",),
    )
    return replace(row, **changes)


def _judged(*rows: Row) -> Matrix:
    return Matrix(group="g", rows=rows, healthy=(), naive_alarms=(), settings="2 ranks")


def test_a_row_is_right_only_in_stage_and_place_and_time() -> None:
    right = _row()
    assert right.has_right_place
    assert right.is_in_time
    assert right.culprit is not None
    elsewhere = _row(culprit=replace(right.culprit, places=("gate.weight", "gate.bias")))
    assert elsewhere.has_right_stage
    assert not elsewhere.has_right_place
    assert not _row(culprit=replace(right.culprit, places=())).has_right_place
    assert not _row(culprit=replace(right.culprit, stage=Stage.NOISE)).has_right_place
    assert _row(culprit=replace(right.culprit, places=("gate",))).has_right_place
    assert not _row(culprit=replace(right.culprit, step=4)).is_in_time
    assert not _row(culprit=None).has_right_place
    assert not _row(verdict=Verdict.INCONCLUSIVE).is_detected


def test_of_a_fault_that_is_everywhere_no_few_layers_may_be_blamed() -> None:
    fault = MUTANTS["averaged_over_ranks"]
    culprit = Culprit(stage=Stage.SUM, regime="probe-clip", step=0)
    assert _row(fault=fault, culprit=culprit).has_right_place
    for number, is_right in ((1, False), (8, False), (9, True), (25, True)):
        places = tuple(f"layer{i}" for i in range(number))
        assert (
            _row(fault=fault, culprit=replace(culprit, places=places)).has_right_place is is_right
        )


def test_what_could_not_show_is_not_counted_and_is_said() -> None:
    matrix = _judged(_row(), _row(verdict=Verdict.PASS, culprit=None, excuse="it cannot"))
    assert matrix.missed == ()
    assert len(matrix.counted) == 1
    assert summary(matrix)[0] == "1 of 1 (100%) faults found"
    assert summary(matrix)[-1] == "1 fault could not show"


def test_what_each_regime_finds_by_itself_is_counted() -> None:
    matrix = _judged(_row(), _row(found_in=("probe-accuracy", "probe-clip")), _row(found_in=()))
    said = "regimes by themselves would find 1 by probe-accuracy, 2 by probe-clip, 0 by probe-noise"
    assert said in summary(matrix)


def test_a_miss_is_on_the_page_with_its_sentence() -> None:
    matrix = _judged(_row(verdict=Verdict.PASS, culprit=None, sentence="agrees with <no_dp>"))
    page = markdown(matrix, "python launch.py faults")
    found = page.split("## Not found")[1]
    assert "`flash_fsdp+sign_flipped`: agrees with &lt;no" in found


def test_a_miss_that_is_known_is_no_failure_and_says_why() -> None:
    lost = _row(verdict=Verdict.PASS, culprit=None, known_reason="the type itself rounds so")
    matrix = _judged(lost)
    assert matrix.missed == (lost,)
    assert matrix.unexplained == ()
    assert "the type itself rounds so. it differs" in markdown(matrix, "python launch.py faults")
    assert _judged(_row(verdict=Verdict.PASS, culprit=None)).unexplained


def test_what_was_planted_in_a_stand_in_is_told_apart() -> None:
    theirs = "my.mode:Mine"
    rows = [
        _row(mode=theirs, label=f"{theirs}+no_noise"),
        _row(stand_in_for=theirs),
        _row(stand_in_for=theirs, verdict=Verdict.PASS),
    ]
    assert summary(_judged(*rows))[0].startswith(
        "1 fault was planted in my.mode:Mine itself, and 2 in flash_fsdp as a stand-in"
    )
    page = markdown(_judged(*rows), "python launch.py faults")
    assert page.count("| `flash_fsdp`, a stand-in |") == 2
    assert page.count(f"| `{theirs}` |") == 1
    assert "stand-in" not in markdown(_judged(_row()), "python launch.py faults")


def test_coverage_is_said_of_other_peoples_modes_alone() -> None:
    assert coverage(_judged(_row())) == []
    lines = coverage(_judged(_row(mode="my.mode:Mine", verdict=Verdict.PASS, culprit=None)))
    assert lines == ["sums: 0 of 1 would be found; not sign_flipped: the comparison said PASS"]
