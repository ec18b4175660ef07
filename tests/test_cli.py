"""The command line: verbs, options, pages of help, errors, plans without a run, and the wheel."""

from __future__ import annotations

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dpsgd_track import __version__
from dpsgd_track.cli import dry_run, launch
from dpsgd_track.cli.main import main
from dpsgd_track.cli.options import parser_of
from dpsgd_track.cli.verbs import VERBS
from dpsgd_track.launcher import EXIT_INTERNAL, choices
from dpsgd_track.program import CHECKOUT, INSTALLED, MODULE, Program
from dpsgd_track.record.plan import GroupPlan
from tests.support.planned import parsed, plan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


NOT_CHOSEN = (None, "", ())

_WHAT = {"mode": None, "variant": None, "accuracy-test": False}
_MODEL = {
    **{"model-name": None, "vocab-size": None, "data": None, "token": None},
    **{"task": "sequence-classification", "dropout": False, "gradient-checkpointing": False},
    **{"padding": "right", "ragged": False, "sampling": "sequential", "dataset-size": None},
}
_TRAINING = {
    **{"num-iter": None, "warmup-iter": None, "micro-batches": None, "sigma": 0.01},
    **{"max-grad-norm": 10000.0, "clipping": "flat", "learning-rate": 1e-5, "optimizer": "sgd"},
    **{"random-seed": 42, "delta": 1e-5, "noise-from": "seed"},
}
_MACHINE = {
    **{"nproc-per-node": None, "replicas": 1, "device": None, "param-dtype": None},
    **{"plan": "auto", "memory-budget": None, "reference-dtype": "float64"},
}
_NODES = {"nnodes": 1, "node-rank": None, "rdzv-endpoint": None, "rdzv-timeout": 600.0}
_STORE = {"tracking-uri": None, "config": None}
_PLACES = {**_STORE, "spool": None, "offline": False}
_KEPT = {
    **_PLACES,
    **{"group": None, "layer-norms": "all", "log-ranks": None, "output": None},
    "system-metrics": False,
}
_SUITE = {
    **{**_WHAT, "regime": None, "seq-length": None, "batch-size": 2},
    **{**_MODEL, **_TRAINING, **_MACHINE, **_NODES, **_KEPT},
}
PUBLIC = {
    "quick": _SUITE,
    "full": _SUITE,
    "single": {name: default for name, default in _SUITE.items() if name != "regime"},
    "profile": {
        **{**_WHAT, "seq-length": ("64", "256"), "batch-size": ("2",), "rounds": 1},
        **{**_MODEL, **_TRAINING, **_MACHINE, **_NODES, **_KEPT},
    },
    "faults": {
        **{"fault": None, "mode": None, "list": False, "random-seed": 42},
        **{**_MACHINE, **_KEPT},
    },
    "resume": {**_NODES, **_PLACES},
    "sync": {**_STORE, "spool": None},
    "modes": {},
    "check": {},
    "ui": {**_STORE, "port": 5000},
    "history": {**_STORE},
    "compare": {
        **{**_STORE, "spool": None, "results-dir": None, "fail-on": "drift", "waivers": None},
        **{"loss-threshold": None, "grad-norm-threshold": None, "bug-threshold": None},
        **{"export": None, "force": False, "no-png": False, "no-log": False},
    },
}
"""Every option that users have had since the first release, with its default."""
_QUIET = {"quiet": False}
_PLAN = {"dry-run": False, **_QUIET}
_SHAPES = {"num-labels": 2, "image-size": None}
ADDED: dict[str, dict[str, object]] = {
    verb: {**_PLAN, **_SHAPES} for verb in ("quick", "full", "single")
}
ADDED["faults"] = _PLAN
ADDED["sync"] = _QUIET
ADDED["compare"] = {"bitwise": False, "quiet": False, "verbose": False}
ADDED["profile"] = {**_PLAN, **_SHAPES, "max-slowdown": None, "max-memory": None}
ADDED["resume"] = {**_PLAN, "output": None}
ADDED["ui"] = {"spool": None}
ADDED["history"] = {"last": 30}
ADDED["modes"] = {"variant": None, "why": None, "task": "sequence-classification"}
ADDED["modes"] |= {"seq-length": 16, "vocab-size": None, **_SHAPES}
ADDED["check"] = {"input": None, "mode": None, "random-seed": 42, **_QUIET}
LOUDNESS = {
    **dict.fromkeys(("quick", "full", "single", "profile", "faults", "resume"), ("-q",)),
    **dict.fromkeys(("check", "sync"), ("-q",)),
    # Only what it tells of a PASS is shortened.
    "compare": ("-v", "-q"),
    # They print what was asked for, and nothing else.
    **dict.fromkeys(("modes", "ui", "history"), ()),
}
"""Short options of each verb."""


def options(verb: str) -> dict[str, object]:
    arguments = parser_of(VERBS[verb].run).assemble_argument_collection()
    return {
        each.name.removeprefix("--"): each.field_info.default
        for each in arguments
        if each.show and not each.is_positional_only()
    }


@pytest.mark.parametrize("verb", PUBLIC)
def test_every_public_option_is_there_with_its_default(verb: str) -> None:
    wanted = {**PUBLIC[verb], **ADDED.get(verb, {})}
    found = options(verb)
    assert set(found) == set(wanted)
    for name, default in wanted.items():
        assert found[name] == default or (default is None and found[name] in NOT_CHOSEN), name
        assert type(found[name]) is type(default) or default is None, name


def test_the_working_directory_is_on_the_import_path_while_a_verb_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "modes_of_mine.py").write_text("Mine = dict\n")
    before = list(sys.path)
    argv = ["single", "--mode", "modes_of_mine:Other", "--dry-run"]
    assert main(argv) == 2
    assert "No module" not in capsys.readouterr().err
    assert sys.path == before


def test_the_list_of_verbs_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line for line in said(capsys, "--help").splitlines() if len(line) > 80] == []


def test_every_verb_that_has_an_outcome_can_print_it_alone() -> None:
    assert set(LOUDNESS) == set(VERBS)
    found = {}
    for verb in VERBS:
        arguments = parser_of(VERBS[verb].run).assemble_argument_collection()
        names = [tuple(each.names) for each in arguments if each.show]
        short = [pair for pair in names if any(re.fullmatch("-[a-z]", name) for name in pair)]
        assert set(short) <= {("--quiet", "-q"), ("--verbose", "-v")}
        found[verb] = {pair[1] for pair in short}
    assert found == {verb: set(options) for verb, options in LOUDNESS.items()}


@pytest.mark.parametrize("verb", PUBLIC)
def test_a_default_is_what_the_verb_is_called_with(verb: str) -> None:
    operands = ["g"] if verb in ("resume", "compare", "check") else []
    assert parsed(verb, *operands).get("options") == (
        parser_of(VERBS[verb].run).parse_args(operands)[1].signature.parameters["options"].default
    )


def test_values_of_every_type_arrive() -> None:
    argv = ("--mode", "a,b", "--mode", "c", "--seq-length", "8", "--sigma=0.5", "--ragged")
    chosen = parsed("quick", *argv, "--spool", "there", "--random-seed", "7", "--replicas", "2")
    options = chosen["options"]
    assert options.what.mode == ("a,b", "c")
    assert (options.data.seq_length, options.data.ragged) == (8, True)
    assert (options.training.noise_multiplier, options.draws.seed) == (0.5, 7)
    assert (options.kept.spool, options.machine.num_replicas) == (Path("there"), 2)
    # As ever, the last of several values counts.
    again = parsed("quick", "--num-iter", "3", "--num-iter", "4", "--ragged", "--ragged")["options"]
    assert again.training.num_iter == 4
    assert parsed("compare", "a", "b", "--no-png")["group_b"] == "b"
    assert parsed("sync")["group"] is None


def test_known_variables_stand_for_options_that_are_not_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[tuple[GroupPlan, str]] = []
    monkeypatch.setattr(launch, "show_plan", lambda plan: plans.append((plan, plan.command)))
    values = {"SIGMA": "0.5", "MAX_GRAD_NORM": "7", "NUM_ITER": "3", "RANDOM_SEED": "9"}
    values |= {"MODEL_NAME": "gpt2-tiny", "SEQ_LENGTH": "8", "BATCH_SIZE": "5"}
    # What has another meaning elsewhere, or none.
    others = {"DEVICE": "tpu", "MODE": "x", "DATA": "x", "GROUP": "-", "LEARNING_RATE": ""}
    for name, value in {**values, **others}.items():
        monkeypatch.setenv(name, value)
    assert main(["single", "--mode", "flash", "--dry-run", "--sigma=2", "--batch-size", "1"]) == 0
    (plan, command), told = plans[0], capsys.readouterr().out
    job = plan.jobs[0]
    run, data = job.regimes[0], job.data
    assert (run.noise_multiplier, run.max_grad_norms, job.seed) == (2, (7, 7, 7), 9)
    assert (job.model.name, data.seq_length, data.batch_size) == ("gpt2-tiny", 8, 1)
    # The options won, and the command repeats the launch where no variable is set.
    assert told == (
        "From the environment: MODEL_NAME=gpt2-tiny, SEQ_LENGTH=8, NUM_ITER=3, MAX_GRAD_NORM=7, "
        "RANDOM_SEED=9.\n"
    )
    for name in values:
        monkeypatch.delenv(name)
    assert main(command.removeprefix("dpsgd-track ").split()) == 0
    assert replace(plans[1][0], command="") == replace(plan, command="")
    monkeypatch.setenv("SEQ_LENGTH", "8,16")
    assert main(["profile", "--mode", "flash", "--dry-run"]) == 0
    assert {job.data.seq_length for job in plans[2][0].jobs} == {8, 16}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("NUM_ITER", "3.5", "NUM_ITER='3.5': expected an integer."),
        ("SIGMA", "high", "SIGMA='high': expected a number."),
        ("SIGMA", "-1", "sigma=-1.0: expected a number >= 0. From the environment: SIGMA=-1."),
        ("BATCH_SIZE", "0", "expected an integer >= 1. From the environment: BATCH_SIZE=0."),
        ("MODEL_NAME", "nix", "From the environment: MODEL_NAME=nix."),
    ],
)
def test_a_bad_variable_is_refused_by_name_in_one_line(
    variable: str,
    value: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["full", "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert said in shown.err


def said(capsys: pytest.CaptureFixture[str], *argv: str, program: Program = INSTALLED) -> str:
    """Output of a call that ends well."""
    assert main(argv, program=program) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_names_every_option(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, verb, "--help").splitlines()
    assert len(lines) <= (24 if len(PUBLIC[verb]) < 6 else 50)
    as_module = said(capsys, verb, "--help", program=MODULE).splitlines()
    assert max(map(len, [*lines, *as_module])) <= 80
    shown = set(re.findall(r"--([a-z-]+)", "\n".join(lines)))
    assert set(options(verb)) <= shown
    examples = [line for line in lines[:6] if line.startswith(f"  dpsgd-track {verb}")]
    assert len(examples) == len(VERBS[verb].examples)
    assert said(capsys, verb, "-h").splitlines() == lines


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained_with_its_default(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, verb, "--help-all")
    for name, default in options(verb).items():
        found = re.search(rf"^  --{name}\b(?!-)(.*(?:\n {{10,}}.*)*)", text, re.MULTILINE)
        assert found, name
        meaning = " ".join(found[1].split())
        assert len(meaning) > 10, name
        if default is not False:
            assert "(default: " in meaning, f"{name}: {meaning}"
        if default not in (*NOT_CHOSEN, False) and not isinstance(default, tuple):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert f"(default: {shown.replace('e-0', 'e-')})" in meaning


def test_the_examples_that_help_shows_are_command_lines() -> None:
    for name, verb in VERBS.items():
        for example in verb.examples:
            parsed(name, *example.split())


def test_the_overview_has_every_verb_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--help").splitlines()
    assert len(lines) <= 24
    for verb in VERBS:
        assert [line.split()[0] for line in lines if line.startswith("  ")].count(verb) == 1
    assert sum(line.startswith("  dpsgd-track ") for line in lines) == 2
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines() == lines


def test_completion_is_installed_and_completes_verbs_and_options(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(workspace))
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert main(["--install-completion", "bash"]) == 0
    (script,) = workspace.rglob("completions/dpsgd-track")
    assert str(script) in capsys.readouterr().out
    ask = (
        f"source {script}; COMPREPLY=(); COMP_CWORD=$(($#)); COMP_WORDS=(dpsgd-track $@); "
        "_dpsgd_track; echo ${COMPREPLY[@]}"
    )
    for typed, wanted in (("qu", "quick"), ("quick --sig", "--sigma")):
        command = ["bash", "--norc", "-c", ask, "-", *typed.split()]
        assert subprocess.run(command, capture_output=True, text=True).stdout.split() == [wanted]
    assert main(["--install-completion", "tcsh"]) == 2
    assert "shell='tcsh': expected one of bash, zsh, fish" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == f"dpsgd-track {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["qick"], "dpsgd-track: verb='qick': expected one of quick, full, "),
        (["qick"], "Did you mean 'quick'?"),
        (["quick", "--seq-lenth", "8"], "Did you mean '--seq-length'? See `dpsgd-track quick --"),
        (
            ["compare", "g", "--no-pgn"],
            "--no-pgn: compare has no such option. Did you mean '--no-p",
        ),
        (["quick", "--mode", "flsh_fsdp"], "Did you mean 'flash_fsdp'?"),
        (["quick", "--regime", "acuracy"], "Did you mean 'accuracy'?"),
        (["quick", "--param-dtype", "bfloat61"], "Did you mean 'bfloat16'?"),
        (["faults", "--fault", "no_nois"], "Did you mean 'no_noise'?"),
        (["quick", "--mode", "flash_fsdp+no_nois"], "Did you mean 'no_noise'?"),
        (["compare", "g", "--fail-on", "bugs"], "fail_on='bugs': expected one of drift, bug."),
        (["quick", "--num-iter", "1.5"], "--num-iter='1.5': expected an integer."),
        (["quick", "--num-iter", "1_0"], "--num-iter='1_0': expected an integer."),
        (["quick", "--num-iter="], "--num-iter='': expected an integer."),
        (["quick", "--sigma", "much"], "--sigma='much': expected a number."),
        (["quick", "--ragged=maybe"], "--ragged: expected no value, as giving it turns it on."),
        (["quick", "--num-iter"], "--num-iter: expected an integer after it."),
        (["quick", "--spool"], "--spool: expected a path after it."),
        (["quick", "--mode", "--sigma", "1"], "--mode: expected a value after it."),
        (
            ["quick", "stray"],
            "'stray': expected an option, which begins with --. quick takes nothi",
        ),
        (["compare", "a", "b", "c"], "'c': expected nothing after GROUP [GROUP_B] but options"),
        (["quick", "--", "--dry-run"], "--dry-run: expected before `--`, after which there are no"),
        (["quick", "--num-layers", "3"], "--num-layers: quick has no such option."),
        (["profile", "--regime", "clip"], "--regime: an option of quick and full, not of profile."),
        (["single", "--regime", "clip"], "--regime: an option of quick and full, not of single."),
        (["quick", "--rounds", "2"], "--rounds: an option of profile, not of quick. See `dpsgd-"),
        (["quick", "--regime", "probe"], "clip, noise, probe-accuracy, probe-clip, probe-noise. "),
        (["faults", "--delta", "1e-6"], "--delta: an option of quick and full and single and prof"),
        (
            ["quick", "--no-ragged"],
            "--no-ragged: quick has no such option. Did you mean '--ragged'",
        ),
        (
            ["resume"],
            "expected GROUP: Group of quick, full, single or faults. See `dpsgd-track res",
        ),
        (["compare", "g", "--config", "."], "expected a file that can be read"),
        (["compare", "g", "--config", "types.yaml"], "artifact_location=5: expected"),
        (["sync", "absent"], "group='absent': expected a group in the spool"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_with_the_nearest_name(
    argv: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("types.yaml").write_text("artifact_location: 5\n")
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    verb = f" {argv[0]}" if argv[0] in VERBS else ""
    assert output.err.startswith(f"dpsgd-track{verb}: ")
    assert wanted in output.err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("error", [KeyError("weights"), SystemExit(1)], ids=["error", "exit"])
def test_an_error_of_the_program_is_never_a_verdict(
    verb: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setitem(VERBS, verb, replace(VERBS[verb], run=_with_signature(verb, broken)))
    operands = ["g"] if verb in ("compare", "resume", "check") else []
    assert main([verb, *operands]) == EXIT_INTERNAL == 70
    err = capsys.readouterr().err
    assert err.startswith(
        f"dpsgd-track {verb}: an error of dpsgd-track itself, {type(error).__name__}: {error}"
    )
    assert err.count("\n") == 1
    kept = Path(err.split()[-1])
    assert "in broken" in kept.read_text()
    kept.unlink()


def test_an_error_of_parsing_or_of_a_full_disk_is_no_verdict_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("dpsgd_track.cli.main.parser_of", full)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    assert main(["modes"]) == EXIT_INTERNAL
    assert "The traceback is above, as No space left on device" in capsys.readouterr().err


def _with_signature(verb: str, broken: object) -> object:
    """`broken`, with the parameters of the verb's function."""
    import functools

    return functools.wraps(VERBS[verb].run)(broken)  # type: ignore[arg-type]


def test_an_interrupted_verb_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    run = _with_signature("modes", interrupted)
    monkeypatch.setitem(VERBS, "modes", replace(VERBS["modes"], run=run))
    assert main(["modes"]) == 130


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert main(["quick", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'dpsgd-track[quick]'" in err
    assert err.count("\n") == 1


DRY = {
    "quick": ["quick"],
    "full": ["full", "--nproc-per-node", "3"],
    "single": ["single", "--mode", "flash"],
    "profile": ["profile", "--mode", "flash_fsdp"],
    "faults": ["faults", "--fault", "no_noise"],
}


@pytest.mark.parametrize("argv", DRY.values(), ids=DRY.keys())
def test_a_dry_run_prints_the_plan_and_touches_nothing(
    argv: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, *argv, "--dry-run")
    assert list(workspace.iterdir()) == []
    lines = out.splitlines()
    assert lines[0].split() == ["mode", "processes", "regimes"]
    assert re.search(
        r"^expected: about \d+ min on 2 CPU cores, at 5 s to start each process group", out, re.M
    )
    if argv[0] == "faults":
        assert any(line.startswith("flash_fsdp_fuse+no_noise") or "+no_noise" in line
                   for line in lines)  # fmt: skip
        return
    made = plan(*argv)
    assert [line.split("  ")[0].strip() for line in lines[1 : len(made.jobs) + 1]] == [
        job.title for job in made.jobs
    ]
    for job, line in zip(made.jobs, lines[1:], strict=False):
        assert f"{job.num_ranks} on cpu" in line
        assert all(regime.name in line for regime in job.regimes)
    num_runs = sum(1 for _ in made.runs())
    groups = f"{len(made.jobs)} process group{'s' * (len(made.jobs) > 1)}"
    assert f"{groups}, {num_runs} mode run{'s' * (num_runs > 1)}\n" in out


def test_an_estimate_counts_groups_and_steps() -> None:
    minilm = ("--model-name", "minilm")
    made = plan("single", "--mode", "no_dp", "--num-iter", "100", "--warmup-iter", "15", *minilm)
    assert dry_run.estimate(made).startswith("expected: about 2 min")
    assert dry_run.estimate(made).endswith("process group, 1 s for each of 115 steps of minilm")
    both = plan("quick", "--mode", "no_dp", "--regime", "probe-accuracy,accuracy")
    assert "each of 20 steps of minilm, " in dry_run.estimate(both)
    assert dry_run.estimate(both).endswith("each of 32 steps of the probe")


def test_an_estimate_has_the_speed_of_the_models_own_steps() -> None:
    assert dry_run.estimate(plan("full")).endswith(", 0.3 s for each of 138 steps of llama-tiny")
    unknown = dry_run.estimate(plan("single", "--mode", "no_dp", "--model-name", "mine"))
    assert unknown.endswith(
        "1 s for each of 10 steps of mine; the speed of mine is not known, and minilm's is assumed"
    )


GONE = {
    "a GPU": (["full", "--device", "cuda"], {"gpus": 0}, "device='cuda': expected a visible GPU"),
    "GPUs": (["full"], {"gpus": 1}, "nproc_per_node=2: expected at most 1"),
    "a mode": (["single", "--mode", "my_mode:Mine"], {"remove": "my_mode.py"}, "mode='my_mode:"),
    "a variant": (
        ["full", "--variant", "a=checkout"],
        {"remove": "checkout"},
        "variant='a=checkout': expected the folder",
    ),
}


@pytest.mark.parametrize(("argv", "change", "wanted"), GONE.values(), ids=GONE.keys())
def test_a_plan_that_cannot_be_had_here_is_refused_by_name(
    argv: list[str],
    change: dict[str, object],
    wanted: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (workspace / "my_mode.py").write_text("Mine = dict\n")
    (workspace / "checkout" / "transformers").mkdir(parents=True)
    (workspace / "checkout" / "transformers" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(workspace))
    there = 2 if "gpus" in change else 0
    monkeypatch.setattr(choices, "count_gpus", lambda: there)
    monkeypatch.setattr(launch, "count_gpus", lambda: there)
    made = plan(*argv)
    launch.check_at_hand(made, lambda model, data: None)
    monkeypatch.setattr(launch, "count_gpus", lambda: change.get("gpus", 0))
    gone = workspace / str(change.get("remove", "nothing"))
    if gone.is_dir():
        shutil.rmtree(gone)
    gone.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        launch.check_at_hand(made, lambda model, data: None)


def test_a_model_or_data_that_is_gone_is_refused_and_the_probe_is_always_there() -> None:
    def refuse(model: object, data: object) -> None:
        raise ValueError("data='mine.csv': expected an existing file.")

    def check(made: GroupPlan) -> None:
        launch.check_at_hand(made, refuse)

    with pytest.raises(ValueError, match=r"mine\.csv"):
        check(plan("full"))
    check(plan("quick", "--regime", "probe-clip"))


def test_a_plan_for_the_cpu_stays_one_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan("full", "--device", "cpu")
    monkeypatch.setattr(launch, "count_gpus", lambda: 1)
    launch.check_at_hand(made, lambda model, data: None)
    assert {job.performance.device for job in made.jobs} == {"cpu"}


@pytest.mark.parametrize(
    ("program", "verb", "wanted"),
    [
        (INSTALLED, "resume", "dpsgd-track resume g"),
        (INSTALLED, "compare", "dpsgd-track compare g"),
        (MODULE, "ui", "python -m dpsgd_track ui g"),
        (MODULE, "compare", "python -m dpsgd_track compare g"),
        (CHECKOUT, "sync", "python launch.py sync g"),
        (CHECKOUT, "compare", "python compare.py g"),
    ],
)
def test_hints_have_the_form_the_user_called(program: Program, verb: str, wanted: str) -> None:
    assert program.command(verb, ["g"]) == wanted


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "form"),
    [
        (["-m", "dpsgd_track", "full"], "python -m dpsgd_track full"),
        ([str(ROOT / "launch.py"), "full"], "python launch.py full"),
        ([str(ROOT / "compare.py")], "python compare.py"),
    ],
    ids=["module", "launch.py", "compare.py"],
)
def test_the_shims_are_the_same_program(command: list[str], form: str, workspace: Path) -> None:
    done = python(*command, "--help", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {form} ")
    assert f"  {form} " in done.stdout


@pytest.mark.parametrize("name", ["launch.py", "compare.py"])
def test_a_shim_has_no_code_of_its_own(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len((ROOT / name).read_text().splitlines()) < 15


def test_arguments_are_parsed_in_one_room_alone() -> None:
    for path in (ROOT / "dpsgd_track").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import argparse" not in text, path
        if path.parent.name != "cli":
            assert not re.search(r"import cyclopts|from cyclopts|dpsgd_track\.cli\b", text) or (
                path.name == "__main__.py"
            ), path


def processor_s(*argv: str, cwd: Path) -> float:
    """Processor time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python(*argv, cwd=cwd).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("verb", ["quick", "compare"])
def test_help_is_instant_and_loads_nothing_heavy(verb: str, workspace: Path) -> None:
    watched = (
        "import sys\nfrom dpsgd_track.cli.main import main\n"
        f"assert main(['{verb}', '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'mlflow', 'plotly', 'rich', 'pydantic', 'opacus'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python("-c", watched, cwd=workspace).stdout.splitlines()[-1] == "[]"
    # Time of the processor, as other work on the machine makes everything wait, and beside a bare
    # Python's, as processors differ by a factor of four. Of several the least is the command's own.
    helped_s, bare_s = [], []
    while len(helped_s) < 5 and min(helped_s, default=9) >= 20 * min(bare_s, default=0):
        bare_s.append(processor_s("-c", "pass", cwd=workspace))
        helped_s.append(processor_s("-m", "dpsgd_track", verb, "--help", cwd=workspace))
    assert min(helped_s) < 20 * min(bare_s)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what the checkout tracks."""
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("wheel")
    for name in ("dpsgd_track", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    for name in ("launch.py", "compare.py"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    done = python("-W", "ignore", "-c", build, str(out), cwd=source)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = next(name for name in names if name.endswith("entry_points.txt"))
        text = archive.read(points).decode()
    info = f"dpsgd_track-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dpsgd_track", info}
    assert "dpsgd-track = dpsgd_track.cli.main:main" in text


def test_the_wheel_runs_from_any_folder_without_a_settings_file(
    wheel: Path, workspace: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(workspace / "installed")
    (workspace / "elsewhere").mkdir()
    code = (
        "import sys; from dpsgd_track.cli.main import main; import dpsgd_track\n"
        f"assert dpsgd_track.__file__.startswith({str(workspace)!r})\n"
        "sys.exit(main(['quick', '--dry-run', '--device', 'cpu']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workspace / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(workspace / "installed")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "flash_fsdp_fuse" in done.stdout
    assert list((workspace / "elsewhere").iterdir()) == []
