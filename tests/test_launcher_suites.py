from dataclasses import replace

import pytest

from dpsgd_track.config import (
    ACCURACY,
    AGAIN,
    CAUSAL_LM,
    CLIP,
    NOISE,
    PERMUTED,
    PLAIN,
    PROBE,
    PROBE_ACCURACY,
    PROBE_CLIP,
    PROBE_DATA,
    PROBE_MODEL,
    PROBE_NOISE,
    SILENT,
    TRAIN,
    ULP,
    RegimeConfig,
)
from dpsgd_track.launcher import choices
from dpsgd_track.launcher import hardware as machine
from dpsgd_track.modes import table
from dpsgd_track.program import repeatable, without_secrets
from dpsgd_track.record.plan import PLAN
from tests.support.fake_launch import run
from tests.support.planned import asked, place
from tests.support.planned import plan as suite


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    monkeypatch.setenv("HF_TOKEN", "")
    return tmp_path


def modes(*argv: str) -> tuple[str, ...]:
    return tuple(job.mode for job in suite(*argv).jobs)


def regimes(*argv: str) -> dict[str, list[tuple[str, str]]]:
    """(name, replay) of each run, by mode."""
    return {job.mode: [(r.name, r.replay) for r in job.regimes] for job in suite(*argv).jobs}


USERS = ("--regime", "accuracy,clip")
"""The regimes on the user's own model, without the probe's."""


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["quick"], (table.REFERENCE, *table.QUICK)),
        (["full"], (table.REFERENCE, *table.FULL)),
        (["quick", "--regime", "accuracy"], (table.REFERENCE, *table.QUICK)),
        (["quick", "--regime", "clip"], (table.REFERENCE, *table.QUICK[1:])),
        (["quick", "--regime", "probe-accuracy"], (table.REFERENCE, *table.QUICK)),
        (["quick", "--regime", "probe-clip"], (table.REFERENCE, *table.QUICK[1:])),
        (["quick", "--regime", "probe-noise"], table.QUICK[1:]),
        (["quick", "--regime", "probe-clip", "--mode", "flash"], (table.REFERENCE, "flash")),
        (["quick", "--regime", "probe-accuracy", "--mode", "flash"], ("flash",)),
        (["full", "--regime", "clip,probe-clip"], (table.REFERENCE, *table.FULL[1:])),
        (["quick", "--mode", "flash_fsdp,no_dp"], (table.REFERENCE, "flash_fsdp", "no_dp")),
        (["quick", "--mode", "flash_fsdp", "--mode", "reference"], ("reference", "flash_fsdp")),
        (["full", "--mode", "flash_fsdp", "--regime", "accuracy"], ("flash_fsdp",)),
        (["full", "--mode", "flash_fsdp", "--accuracy-test"], ("flash_fsdp",)),
        (["single", "--mode", "no_dp"], ("no_dp",)),
        # Where C clips, the reference takes no_dp's place as the baseline.
        (
            ["full", "--mode", "no_dp", "--accuracy-test", "--max-grad-norm", "1"],
            ("reference", "no_dp"),
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_modes_of_a_suite(argv, wanted):
    assert modes(*argv) == wanted


def test_a_profile_whose_bound_clips_is_judged_by_the_reference():
    timed = ["profile", "--mode", "flash_fsdp", "--accuracy-test"]
    assert "reference" not in modes(*timed)
    assert modes(*timed, "--max-grad-norm", "1")[0] == "reference"


def test_the_baseline_is_replayed_in_three_ways_and_never_clipped():
    kinds = ("", "again", "permuted", "ulp")
    of_user = [(ACCURACY, kind) for kind in kinds]
    assert regimes("quick", *USERS)[table.BASELINE] == of_user
    on_probe = [(PROBE_ACCURACY, kind) for kind in kinds]
    assert regimes("quick")[table.BASELINE] == of_user + on_probe


def test_the_accuracy_regime_is_the_test_users_know():
    job = suite("quick", "--micro-batches", "3").jobs[-1]
    accuracy, clip, *_ = job.regimes
    assert suite("quick", "--micro-batches", "3", *USERS).jobs[-1].regimes == (accuracy, clip)
    assert (accuracy.noise_multiplier, accuracy.max_grad_norms) == (0.01, (10000.0,) * 5)
    assert accuracy.noise_matched
    assert accuracy.micro_batches == 1
    assert job.seed == 42
    assert (clip.name, clip.learning_rate, clip.noise_multiplier) == (CLIP, 0.0, 0.0)
    assert (clip.num_iter, clip.micro_batches, clip.max_grad_norms) == (4, 3, ())


def test_single_trains_unless_it_is_an_accuracy_test():
    (train,) = suite("single", "--mode", "no_dp", "--micro-batches", "4").jobs[0].regimes
    assert (train.name, train.noise_matched, train.micro_batches) == (TRAIN, False, 4)
    (accuracy,) = suite("single", "--mode", "no_dp", "--accuracy-test").jobs[0].regimes
    assert (accuracy.name, accuracy.noise_matched) == (ACCURACY, True)


def test_model_and_data_by_default():
    def inputs(*argv: str) -> tuple[str, str]:
        job = suite(*argv).jobs[0]
        return job.model.name, job.data.source

    assert inputs("quick") == ("minilm", "public-domain")
    assert inputs("full") == ("llama-tiny", "synthetic")
    assert inputs("quick", "--model-name", "llama-tiny") == ("llama-tiny", "synthetic")
    assert inputs("quick", "--data", "synthetic") == ("minilm", "synthetic")


def test_a_mode_on_one_device_takes_the_micro_batches_of_all_ranks():
    argv = ("--mode", "no_dp,flash", "--nproc-per-node", "4", "--micro-batches", "3")
    shared, single = suite("quick", *argv, "--replicas", "2").jobs[1:]
    assert (shared.num_ranks, shared.performance.num_replicas) == (4, 2)
    assert (single.num_ranks, single.performance.num_replicas) == (1, 1)
    of_user = [(r.name, r.micro_batches) for r in single.regimes[:2]]
    assert of_user == [(ACCURACY, 4), (CLIP, 12)]
    assert {r.micro_batches for r in single.regimes[2:]} == {12}
    assert [(r.name, r.micro_batches) for r in shared.regimes if not r.replay] == [
        (ACCURACY, 1),
        (PROBE_ACCURACY, 3),
    ]


def test_the_baseline_on_one_device_is_not_clipped_either():
    assert modes("quick", "--mode", "no_dp_single,flash", "--regime", "clip") == (
        "reference",
        "flash",
    )
    assert regimes("quick", *USERS, "--mode", "no_dp_single")["no_dp_single"] == [(ACCURACY, "")]
    on_probe = [(ACCURACY, ""), (PROBE_ACCURACY, "")]
    assert regimes("quick", "--mode", "no_dp_single")["no_dp_single"] == on_probe


def test_task_and_batches_reach_every_job():
    argv = ["--task", "causal-lm", "--dropout", "--gradient-checkpointing", "--padding", "left"]
    argv += ["--ragged", "--sampling", "poisson", "--dataset-size", "9"]
    for job in suite("full", *argv).jobs:
        model, data = job.model, job.data
        assert (model.task, model.dropout, model.gradient_checkpointing) == (CAUSAL_LM, True, True)
        assert (data.padding, data.ragged) == ("left", True)
        assert (data.sampling, data.dataset_size) == ("poisson", 9)


def test_one_device_draws_no_more_samples_than_all_ranks():
    argv = ("--sampling", "poisson", "--dataset-size", "8", "--mode", "no_dp,flash")
    # 2 ranks x 2 micro-batches x 2 samples, and 1 x 4 x 2.
    assert [job.num_ranks for job in suite("full", *argv).jobs] == [2, 2, 1]


def test_ranks_follow_the_visible_gpus(monkeypatch):
    assert (suite("quick").num_ranks, suite("quick").jobs[0].performance.device) == (2, "cpu")
    monkeypatch.setattr(choices, "count_gpus", lambda: 4)
    assert (suite("quick").num_ranks, suite("quick").jobs[0].performance.device) == (4, "cuda")
    assert suite("quick").jobs[0].regimes[0].warmup_iter == 1
    assert suite("quick", "--device", "cpu").num_ranks == 2
    with pytest.raises(ValueError, match="nproc_per_node=5: expected at most 4"):
        suite("quick", "--nproc-per-node", "5")


def test_full_on_gpus_is_the_published_accuracy_test_unless_something_else_is_chosen(monkeypatch):
    def settings(*argv):
        job = suite("full", *argv).jobs[1]
        accuracy, data = job.regimes[0], job.data
        assert (accuracy.name, job.seed, data.batch_size) == ("accuracy", 42, 2)
        assert (accuracy.noise_multiplier, accuracy.max_grad_norms[0]) == (0.01, 10000)
        dtype = job.performance.param_dtype
        return job.model.name, data.seq_length, accuracy.num_iter, dtype

    assert settings() == ("llama-tiny", 64, 10, "float32")
    monkeypatch.setattr(choices, "count_gpus", lambda: 2)
    assert settings() == ("llama-3.2-1b", 1024, 5, "bfloat16")
    assert settings("--device", "cpu") == ("llama-tiny", 64, 10, "float32")
    # A model of 512 positions has the longest samples that it takes.
    assert settings("--model-name", "llama-tiny") == ("llama-tiny", 512, 5, "bfloat16")
    chosen = ("--seq-length", "64", "--num-iter", "10", "--param-dtype", "float32")
    assert settings(*chosen) == ("llama-3.2-1b", 64, 10, "float32")
    assert suite("quick").jobs[0].performance.param_dtype == "float32"


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("", 0), ("1", 1), ("0,1,2", 2), ("-1", 0), ("GPU-ab", 1)]
)
def test_cuda_visible_devices_is_honoured(visible, count, monkeypatch):
    monkeypatch.setattr(machine, "present_gpus", lambda: 2)
    monkeypatch.setattr(machine, "torch_is_cpu_only", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.count_gpus() == count


BAD = {
    "unknown mode": ["quick", "--mode", "flush_fsdp"],
    "module that is not there": ["quick", "--mode", "no.such.module:make"],
    "batch 0": ["quick", "--batch-size", "0"],
    "sequence 0": ["quick", "--seq-length", "0"],
    "negative sigma": ["quick", "--sigma", "-1"],
    "sigma nan": ["quick", "--sigma", "nan"],
    "negative sigma, clip only": ["quick", "--regime", "clip", "--sigma", "-1"],
    "bound 0": ["quick", "--max-grad-norm", "0"],
    "no step": ["quick", "--num-iter", "0"],
    "negative warmup": ["quick", "--warmup-iter", "-1"],
    "no micro-batch": ["quick", "--micro-batches", "0"],
    "no replica": ["quick", "--replicas", "0"],
    "replicas that do not divide the ranks": ["quick", "--nproc-per-node", "4", "--replicas", "3"],
    "opacus mode without a name": ["quick", "--mode", "opacus:"],
    "own noise in a comparison": ["full", "--noise-from", "os"],
    "own noise without a noise regime": ["quick", *USERS, "--noise-from", "os"],
    "delta 1": ["quick", "--delta", "1"],
    "no rank": ["quick", "--nproc-per-node", "0"],
    "unknown regime": ["quick", "--regime", "train"],
    "regime of single": ["single", "--mode", "no_dp", "--regime", "clip"],
    "two answers": ["quick", "--accuracy-test", "--regime", "clip"],
    "baseline clipped": ["quick", "--mode", "no_dp", "--regime", "clip"],
    "baseline clipped on the probe": ["quick", "--mode", "no_dp", "--regime", "probe-clip"],
    "opacus on the probe": ["quick", "--mode", "ghost_fsdp", "--regime", "probe-clip"],
    "noiseless on the probe": ["quick", "--mode", "reference", "--regime", "probe-noise"],
    "no such probe": ["quick", "--regime", "probe-train"],
    "probe in single": ["single", "--mode", "no_dp", "--regime", "probe-clip"],
    "probe in an accuracy test": ["quick", "--accuracy-test", "--regime", "probe-accuracy"],
    "no mode": ["single"],
    "two modes": ["single", "--mode", "no_dp,reference"],
    "empty mode": ["quick", "--mode", ""],
    "odd group": ["quick", "--group", "../up"],
    "group with a quote": ["quick", "--group", "a'b"],
    "reserved group": ["quick", "--group", "latest"],
    "group like a golden file": ["quick", "--group", "x.dpsgd"],
    "taken group": ["quick", "--group", "taken"],
    "output of a suite": ["quick", "--output", "results.json"],
    "output folder missing": ["single", "--mode", "no_dp", "--output", "none/results.json"],
    "output is a folder": ["single", "--mode", "no_dp", "--output", "results"],
    "gpu missing": ["quick", "--device", "cuda"],
    "unknown task": ["quick", "--task", "summary"],
    "poisson of nothing": ["full", "--sampling", "poisson"],
    "size of a sequence": ["full", "--dataset-size", "9"],
    "ragged text": ["quick", "--ragged"],
    "more than there is": ["full", "--sampling", "poisson", "--dataset-size", "7"],
    "not a number": ["quick", "--num-iter", "ten"],
    "abbreviation": ["quick", "--batch", "3"],
    "unknown option": ["quick", "--bogus"],
    "config missing": ["quick", "--config", "none.yaml"],
    "config malformed": ["quick", "--config", "bad.yaml"],
    "unknown setting": ["quick", "--config", "unknown.yaml"],
    "file store": ["quick", "--tracking-uri", "./mlruns"],
    "store folder missing": ["quick", "--tracking-uri", "sqlite:///none/mlflow.db"],
    "no such layer norms": ["quick", "--layer-norms", "some"],
    "layer norms of no step": ["quick", "--layer-norms", "0"],
    "no such ranks": ["quick", "--log-ranks", "first"],
    "fewer ranks than none": ["quick", "--log-ranks=-1"],
    "odd ranks in the settings": ["quick", "--config", "ranks.yaml"],
    "empty token": ["quick", "--token", ""],
    "ui without a store": ["ui"],
    "ui on a port there is not": ["ui", "--port", "70000", "--tracking-uri", "sqlite:///is.db"],
}


@pytest.mark.parametrize("argv", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_touches_nothing(argv, empty_folder, capsys):
    (empty_folder / "results" / "taken").mkdir(parents=True)
    (empty_folder / "bad.yaml").write_text("a: [1\nb: }")
    (empty_folder / "unknown.yaml").write_text("tracking_url: sqlite:///mlflow.db")
    (empty_folder / "ranks.yaml").write_text("log_ranks: 1.5")
    (empty_folder / "is.db").touch()
    before = sorted(empty_folder.rglob("*"))
    try:
        code = run(argv)
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    assert code == 2
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(empty_folder.rglob("*")) == before


def test_model_and_data_that_do_not_fit_stop_the_launch(empty_folder):
    def refuse(model, data):
        raise ValueError(f"model_name={model.name!r}: expected a preset.")

    with pytest.raises(ValueError, match="model_name='nope'"):
        suite("quick", "--model-name", "nope", check_inputs=refuse)


def test_the_recorded_command_holds_no_secret():
    again = ["--group", "g", "--mode", "no_dp", "--group=h", "--token", "hf_a"]
    assert repeatable(again) == ["--mode", "no_dp"]
    assert without_secrets(["--token", "hf_a", "--token=hf_b", "--mode", "no_dp"]) == [
        "--mode",
        "no_dp",
    ]
    for uri in (["--tracking-uri", "http://u:pw@h"], ["--tracking-uri=http://u:pw@h"]):
        command = " ".join(without_secrets(uri))
        assert "pw" not in command
        assert "h" in command


def test_a_plan_has_a_serialised_form_that_gives_the_plan_back():
    for argv in (["quick"], ["profile", "--accuracy-test"], ["single", "--mode", "flash"]):
        plan = suite(*argv)
        assert PLAN.loads(PLAN.dumps(plan)) == plan


def test_where_a_group_is_kept_is_no_part_of_its_plan(empty_folder):
    there = ("--tracking-uri", "http://h", "--spool", "s", "--offline", "--group", "g")
    assert suite("quick", *there).jobs == suite("quick").jobs
    kept = place("quick", *there)
    assert (kept.settings.tracking_uri, kept.settings.spool_dir) == ("http://h", "s")
    assert (kept.group, kept.is_offline, kept.output) == ("g", True, None)
    with pytest.raises(ValueError, match=r"tracking_uri=.*expected a server, as --nnodes is not 1"):
        place("quick", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "h:1")
    assert asked("single", "--mode", "no_dp").kept.output is None


def test_modes_lists_the_table(capsys):
    assert run(["modes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in table.MODES)


def test_modes_lists_what_installed_packages_bring(monkeypatch, capsys):
    monkeypatch.setattr("dpsgd_track.cli.modes.plugged_in_modes", lambda: {"mine": "pkg:make"})
    assert run(["modes"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mine", "pkg:make"]


def test_the_reference_is_replayed_in_the_modes_type():
    wanted = [(ACCURACY, ""), (ACCURACY, "plain"), (CLIP, ""), (CLIP, "plain")]
    for command in (("full",), ("quick", *USERS)):
        made = suite(*command, "--param-dtype", "bfloat16")
        assert made.jobs[0].mode == table.REFERENCE
        assert [(r.name, r.replay) for r in made.jobs[0].regimes] == wanted


def test_quick_runs_the_users_model_and_then_the_probe():
    private = [
        (ACCURACY, ""),
        (CLIP, ""),
        (PROBE_ACCURACY, ""),
        (PROBE_CLIP, ""),
        (PROBE_NOISE, SILENT),
        (PROBE_NOISE, ""),
    ]
    with_plain = (ACCURACY, CLIP, PROBE_ACCURACY, PROBE_CLIP)
    assert regimes("quick") == {
        table.REFERENCE: [(name, replay) for name in with_plain for replay in ("", PLAIN)],
        table.BASELINE: [
            (name, replay)
            for name in (ACCURACY, PROBE_ACCURACY)
            for replay in ("", AGAIN, PERMUTED, ULP)
        ],
        "flash_fsdp": private,
        "flash_fsdp_fuse": private,
    }


def test_no_other_command_runs_the_probe_unasked():
    commands = (["full"], ["quick", "--accuracy-test"], ["single", "--mode", "flash_fsdp"])
    for command in commands:
        names = {name for runs in regimes(*command).values() for name, _ in runs}
        assert not [name for name in names if name.startswith(PROBE)], command
    full = {name for runs in regimes("full").values() for name, _ in runs}
    assert full == {ACCURACY, CLIP}
    assert regimes("full", "--regime", "probe-clip")["flash_fsdp_bk"] == [(PROBE_CLIP, "")]


@pytest.mark.parametrize("mode", [m for m in table.MODES if table.is_of_opacus(m)])
def test_modes_of_opacus_have_no_run_on_the_probe(mode):
    named = f"opacus:{table.MODES[mode].grad_sample_mode}"
    for own in (mode, named, f"{mode}+bias_norm_by_gram"):
        assert regimes("quick", "--mode", own)[own] == [(ACCURACY, ""), (CLIP, "")]
        for regime in (PROBE_ACCURACY, PROBE_CLIP, PROBE_NOISE):
            with pytest.raises(ValueError, match=f"expected a mode with a run in {regime}. Not c"):
                suite("quick", "--mode", own, "--regime", regime)
            # Beside others it is left out, and they run.
            assert own not in modes("quick", "--mode", f"{own},flash_fsdp", "--regime", regime)


def test_a_fault_changes_no_regime_of_its_mode():
    found = regimes("quick", "--mode", "flash_fsdp,flash_fsdp+bias_norm_by_gram")
    assert found["flash_fsdp+bias_norm_by_gram"] == found["flash_fsdp"]


def on_probe(*argv: str) -> dict[str, list[RegimeConfig]]:
    """Each mode's regimes on the probe, whose model and data are the probe's own."""
    made: dict[str, list[RegimeConfig]] = {}
    for job in suite(*argv).jobs:
        made[job.mode] = [r for r in job.regimes if r.name.startswith(PROBE)]
        for regime in job.regimes:
            run = job.run_in(regime)
            padding = "left" if regime.name == PROBE_CLIP else "right"
            data = replace(PROBE_DATA, padding=padding)
            is_probe = (run.model, run.data) == (PROBE_MODEL, data)
            assert is_probe == regime.name.startswith(PROBE)
            assert is_probe or (run.model, run.data) == (job.model, job.data)
    return made


CHOSEN = {
    "steps": ["--num-iter", "9"],
    "warm-up": ["--warmup-iter", "2"],
    "batch size": ["--batch-size", "7"],
    "micro-batches": ["--micro-batches", "4"],
    "length": ["--seq-length", "8"],
    "sigma": ["--sigma", "2"],
    "bound": ["--max-grad-norm", "3"],
    "learning rate": ["--learning-rate", "0.5"],
    "optimizer": ["--optimizer", "adamw"],
    "model": ["--model-name", "llama-tiny", "--vocab-size", "50", "--dropout"],
    "task": ["--task", "masked-lm", "--gradient-checkpointing"],
    "text": ["--data", "synthetic", "--ragged", "--padding", "left"],
    "poisson": ["--data", "synthetic", "--sampling", "poisson", "--dataset-size", "8"],
}


@pytest.mark.parametrize("argv", CHOSEN.values(), ids=CHOSEN.keys())
def test_what_the_user_chose_changes_nothing_on_the_probe(argv):
    changed = suite("quick", *argv).jobs
    assert changed != suite("quick").jobs
    assert on_probe("quick", *argv) == on_probe("quick")
    assert len(on_probe("quick")["flash_fsdp"]) == 4


def test_the_probes_regimes_are_accuracy_clip_and_noise_with_constants_of_their_own():
    accuracy, clip, twin, noisy = on_probe("quick")["flash_fsdp"]
    assert [r.kind for r in (accuracy, clip, twin, noisy)] == [ACCURACY, CLIP, NOISE, NOISE]
    assert (accuracy.noise_matched, accuracy.optimizer, accuracy.num_iter) == (True, "sgd", 8)
    assert accuracy.noise_multiplier > 0
    assert accuracy.learning_rate > 0
    # The reference measures the bounds, the weights stay, and nothing is added.
    assert (clip.max_grad_norms, clip.learning_rate, clip.noise_multiplier) == ((), 0.0, 0.0)
    assert (twin.replay, twin.noise_multiplier) == (SILENT, 0.0)
    assert (noisy.replay, noisy.noise_multiplier, noisy.noise_matched) == ("", 0.7, False)
    assert noisy.max_grad_norms == twin.max_grad_norms
    assert {r.micro_batches for r in (accuracy, clip, twin, noisy)} == {3}


def test_the_probe_draws_no_samples_from_the_users_data():
    argv = ("--data", "synthetic", "--sampling", "poisson", "--dataset-size", "8")
    # More than 8 samples a step would be refused in the user's own regimes.
    probes = "probe-accuracy,probe-clip,probe-noise"
    assert suite("quick", *argv, "--batch-size", "3", "--regime", probes).jobs
    with pytest.raises(ValueError, match="sampling='poisson': expected at most 8 samples"):
        suite("quick", *argv, "--batch-size", "3")


def test_a_regime_of_the_probe_can_run_alone():
    assert regimes("quick", "--regime", "probe-clip") == {
        table.REFERENCE: [(PROBE_CLIP, ""), (PROBE_CLIP, PLAIN)],
        "flash_fsdp": [(PROBE_CLIP, "")],
        "flash_fsdp_fuse": [(PROBE_CLIP, "")],
    }
    both = regimes("quick", "--regime", "probe-noise,accuracy", "--mode", "no_dp,flash_fsdp")
    assert both["flash_fsdp"] == [(ACCURACY, ""), (PROBE_NOISE, SILENT), (PROBE_NOISE, "")]
    assert {name for name, _ in both["no_dp"]} == {ACCURACY}


def test_the_noise_regime_is_a_twin_and_a_run_with_awkward_constants():
    jobs = suite("full", "--regime", "noise", "--micro-batches", "5").jobs
    assert [job.mode for job in jobs] == [m for m in table.FULL if m != table.BASELINE]
    for job in jobs:
        twin, noisy = job.regimes
        assert (twin.name, twin.replay, twin.noise_multiplier) == (NOISE, SILENT, 0.0)
        assert (noisy.name, noisy.replay, noisy.noise_multiplier) == (NOISE, "", 0.7)
        assert not noisy.noise_matched
        assert noisy.learning_rate == 0
        assert noisy.max_grad_norms == twin.max_grad_norms
        assert 1 not in noisy.max_grad_norms
        assert noisy.micro_batches == 5


def test_the_noise_regime_comes_beside_the_others_and_only_when_asked_for():
    argv = ("quick", "--regime", "accuracy", "--regime", "noise")
    names = {job.mode: [(r.name, r.replay) for r in job.regimes] for job in suite(*argv).jobs}
    noise = [(NOISE, SILENT), (NOISE, "")]
    assert names["flash_fsdp"] == [(ACCURACY, ""), *noise]
    assert NOISE not in {name for name, _ in names[table.BASELINE] + names[table.REFERENCE]}
    assert NOISE not in {r.name for job in suite("quick").jobs for r in job.regimes}


@pytest.mark.parametrize("regime", ["noise", "probe-noise"])
@pytest.mark.parametrize("mode", ["no_dp", "reference", "no_dp,reference"])
def test_a_mode_without_noise_of_its_own_has_no_noise_regime(mode, regime):
    with pytest.raises(ValueError, match=f"mode={mode!r}: expected a private mode, the reference"):
        suite("full", "--regime", regime, "--mode", mode)


def test_noise_of_the_operating_system_is_for_regimes_with_noise_of_their_own():
    assert suite("quick", "--regime", "noise", "--noise-from", "os").jobs[0].noise_from == "os"
    assert suite("quick", "--noise-from", "os").jobs[0].noise_from == "os"
    for argv in (["full"], ["quick", *USERS], ["quick", "--accuracy-test"]):
        with pytest.raises(ValueError, match="noise_from='os': expected seed"):
            suite(*argv, "--noise-from", "os")


def test_the_noise_regime_draws_no_samples():
    argv = ("--sampling", "poisson", "--dataset-size", "8", "--batch-size", "2")
    assert suite("full", "--regime", "noise", *argv).jobs


@pytest.mark.parametrize(("asked", "done"), [(None, 4), (2, 4), (9, 9)])
def test_more_steps_are_more_steps_of_clip_as_well(asked, done):
    argv = [] if asked is None else ["--num-iter", str(asked)]
    (clip,) = (r for r in regimes_by_name("quick", *argv) if r.name == "clip")
    assert clip.num_iter == done


def regimes_by_name(*argv):
    return next(job.regimes for job in suite(*argv).jobs if job.mode == "flash_fsdp")
