"""A variant's code is what runs, or the group says that it was not."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from dpsgd_track.cli.launch import check_at_hand
from dpsgd_track.config import Settings
from dpsgd_track.demands import sentences
from dpsgd_track.launcher import choices, group
from dpsgd_track.launcher.checkout import MOST_KEPT, check_out
from dpsgd_track.launcher.group import GroupRun
from dpsgd_track.launcher.process_group import Launch, Outcome
from dpsgd_track.launcher.progress import PlainDisplay
from dpsgd_track.launcher.recording import open_group
from dpsgd_track.launcher.variants import restore
from dpsgd_track.record import names
from dpsgd_track.record.environment import imported_from
from dpsgd_track.record.facts import FACTS, FACTS_FILE, DeviceFacts, RunFacts
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.plan import PLAN, StartedJob
from dpsgd_track.record.run import ModeRun, Status
from dpsgd_track.store.reader import open_client, read_group
from tests.support import fake_worker, warm
from tests.support.planned import place
from tests.support.planned import plan as suite

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    # A package that the modes of this package import.
    checkout(tmp_path / "fork", "transformers")
    return tmp_path


def checkout(folder: Path, package: str) -> Path:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("__version__ = '9.8'\n")
    return folder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("fork", "expected NAME=PATH, NAME=REVISION@PATH, NAME:OPTION=VALUE, or a revision"),
        ("a=v9@fork", "expected a revision of the repository in 'fork'"),
        ("a=--all@fork", "expected a revision of the repository in 'fork'"),
        ("fork=", "expected NAME=PATH"),
        ("=fork", "expected a NAME of up to 60 letters"),
        ("a b=fork", "expected a NAME of up to 60 letters"),
        ("<img>;=fork", "expected a NAME of up to 60 letters"),
        ("../x=fork", "expected a NAME of up to 60 letters"),
        ("fork=absent", "expected an existing folder"),
        ("fork=fork/library/__init__.py", "expected an existing folder"),
        ("fork=a:b", "expected a folder without ':'"),
        ("fork=empty", "expected a folder with a package in it or in its src/"),
    ],
)
def test_a_variant_that_cannot_run_is_refused_before_anything_starts(given, said):
    Path("empty").mkdir()
    Path("a:b").mkdir()
    with pytest.raises(ValueError, match=f"^variant=.*{said}"):
        suite("quick", "--variant", given)
    assert not Path("mlflow.db").exists()


def test_two_variants_of_one_name_are_refused():
    with pytest.raises(ValueError, match="variant='a=fork': expected a NAME not used before"):
        suite("quick", "--variant", "a=fork", "--variant", "a=fork")


def test_a_variant_of_the_reference_alone_is_refused():
    with pytest.raises(ValueError, match="expected a mode besides reference"):
        suite("single", "--mode", "reference", "--variant", "a=fork")


def test_every_mode_but_the_reference_runs_once_more_without_replays():
    made = suite("quick", "--variant", "a=fork", "--variant", "b=fork")
    assert [job.label for job in made.jobs] == [
        "reference", "no_dp", "flash_fsdp", "flash_fsdp_fuse",
        "no_dp@a", "flash_fsdp@a", "flash_fsdp_fuse@a",
        "no_dp@b", "flash_fsdp@b", "flash_fsdp_fuse@b",
    ]  # fmt: skip
    again = [
        (key.mode, key.regime, key.variant, key.replay)
        for key, _, _ in made.runs()
        if key.variant == "a"
    ]
    of_private = [
        ("accuracy", ""), ("clip", ""), ("probe-accuracy", ""), ("probe-clip", ""),
        # Not a replay: without its twin, the noise of a run is not known.
        ("probe-noise", "silent"), ("probe-noise", ""),
    ]  # fmt: skip
    assert again == [
        ("no_dp", "accuracy", "a", ""),
        ("no_dp", "probe-accuracy", "a", ""),
        *(("flash_fsdp", name, "a", replay) for name, replay in of_private),
        *(("flash_fsdp_fuse", name, "a", replay) for name, replay in of_private),
    ]
    assert PLAN.loads(PLAN.dumps(made)) == made


def test_packages_below_src_are_found(workspace):
    checkout(workspace / "layout" / "src", "transformers")
    checkout(workspace / "layout", "tests")
    job = suite("single", "--mode", "no_dp", "--variant", "a=layout").jobs[-1]
    assert job.variant is not None
    assert job.variant.root == str(workspace / "layout" / "src")
    assert job.variant.path == "layout"


def test_only_what_a_folder_itself_holds_counts_as_imported(workspace, monkeypatch):
    checkout(workspace / "fork", "library")
    site = checkout(workspace / "fork" / ".venv" / "site-packages", "other")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(workspace / "fork"))
    for package in ("library", "other"):
        __import__(package)
        monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.setitem(sys.modules, package, __import__(package))
    assert imported_from(str(workspace / "fork")) == {"library": "9.8"}


def runs_of(name: str, workspace: Path) -> dict[str, ModeRun]:
    uri = f"sqlite:///{workspace / 'mlflow.db'}"
    found = read_group(open_client(uri), Settings(tracking_uri=uri), name)
    return {run.title: run for run in found.runs}


def run_faked(
    monkeypatch,
    imported: dict[str, dict[str, str]],
    *argv: str,
    failed: Mapping[str, Failure] = MappingProxyType({}),
    warnings: tuple[str, ...] = (),
) -> tuple[int, str]:
    """Exit code and what was said; each mode's workers leave `imported` of it, and `warnings`."""

    def run_mode(started: StartedJob, *_: object) -> tuple[Outcome, ...]:
        job = started.job
        device = DeviceFacts(torch_num_threads=1, allow_tf32=False, cudnn_allow_tf32=False)
        facts = RunFacts(
            environment=started.environment,
            device=device,
            imported=imported[job.label] if job.variant else {},
            warnings=warnings,
        )
        for number in range(len(job.regimes)):
            folder = Path(started.work_dir) / str(number)
            folder.mkdir()
            record = fake_worker.trajectory(2)
            record.save(folder / names.TRAJECTORY_FILE)
            (folder / FACTS_FILE).write_text(FACTS.dumps(facts))
            (folder / "clip_bounds.json").write_text('{"max_grad_norms": [2, 2, 1, 1]}')
        failure = failed.get(job.label)
        status = Status.FAILED if failure else Status.FINISHED
        return (Outcome(status, failure),) * len(job.regimes)

    monkeypatch.setattr(group, "run_mode", run_mode)
    said = io.StringIO()
    options = (*argv, "--group", "g")
    made = suite(*options)
    recording = open_group(made.suite, place(*options))
    made_of = GroupRun(made, recording, Launch(), PlainDisplay(said), output=place(*options).output)
    return made_of.run(), said.getvalue()


MODES = ("quick", "--regime", "accuracy", "--mode", "no_dp,flash_fsdp", "--variant", "a=fork")


def test_a_run_that_imported_nothing_from_its_variant_fails(workspace, monkeypatch):
    found = {"no_dp@a": {}, "flash_fsdp@a": {"transformers": "9.8"}}
    code, said = run_faked(monkeypatch, found, *MODES)
    assert code == 1
    assert "what ran is the installed code: --variant a=fork" in said
    assert "Check the path, or leave out the mode" in said
    runs = runs_of("g", workspace)
    assert (runs["no_dp@a"].status, runs["flash_fsdp@a"].status) == ("FAILED", "FINISHED")
    assert "nothing was imported from the variant" in runs["no_dp@a"].reason
    assert runs["no_dp"].status == "FINISHED"
    assert Path("results/g/logs/flash_fsdp@a").is_dir()


def test_a_mode_that_was_imported_and_failed_is_told_by_its_own_failure(workspace, monkeypatch):
    failure = Failure(
        kind=FailureKind.MODE, message="KeyError: 'x'", place="in a.py:3 of variant a"
    )
    failed = {"flash_fsdp@a": failure}
    found = {"no_dp@a": {}, "flash_fsdp@a": {"transformers": "9.8"}}
    code, said = run_faked(monkeypatch, found, *MODES, failed=failed)
    assert code == 1
    assert "in a.py:3 of variant a: KeyError" in said
    assert "KeyError" in runs_of("g", workspace)["flash_fsdp@a"].reason


def test_warnings_of_the_code_under_test_are_told_once(workspace, monkeypatch):
    found = {"no_dp@a": {"transformers": "1"}, "flash_fsdp@a": {"transformers": "1"}}
    _, said = run_faked(monkeypatch, found, *MODES, warnings=("Falling back to hooks",))
    assert said.count("flash_fsdp@a warned: Falling back to hooks.") == 1


def test_results_of_a_single_run_are_the_installed_codes(workspace, monkeypatch):
    order = []
    monkeypatch.setattr(group, "write_output", lambda _, path: order.append(path.name))
    argv = ("single", "--mode", "no_dp", "--output", "o.json", "--variant", "a=fork")
    assert run_faked(monkeypatch, {"no_dp@a": {"transformers": "1"}}, *argv)[0] == 0
    assert order == ["o.json"]


GSM = """\
def get_gsm_class(grad_sample_mode):
    if grad_sample_mode in ["hooks", "functorch"]:
        return "hooks"
    elif grad_sample_mode == "ew" or grad_sample_mode == "flash_fsdp":
        return grad_sample_mode
    elif grad_sample_mode == "no_op":
        return None
    raise ValueError(f"Unexpected {grad_sample_mode}. Allowed: hooks, not_compared")
"""


def opacus_with(folder: Path, text: str = GSM) -> Path:
    checkout(folder, "opacus")
    (folder / "opacus" / "grad_sample").mkdir()
    (folder / "opacus" / "grad_sample" / "utils.py").write_text(text)
    return folder


def labels(*argv: str) -> list[str]:
    return [job.label for job in suite(*argv).jobs if job.variant]


def test_a_variant_of_opacus_runs_the_modes_that_it_has_itself(workspace):
    opacus_with(workspace / "op")
    # flash_fsdp is a mode of ours, too: what runs under the variant's name is its own.
    own = ["opacus:flash_fsdp@a", "grad_materialize@a"]
    assert labels("full", "--variant", "a=op") == own
    assert (
        labels("full", "--mode", "no_dp,flash_fsdp,flash_fsdp_bk", "--variant", "a=op") == own[:1]
    )
    assert labels("full", "--mode", "ghost,grad_materialize", "--variant", "a=op") == own[1:]
    assert labels("full", "--mode", "opacus:ew", "--variant", "a=op") == ["opacus:ew@a"]
    assert labels("profile", "--mode", "grad_materialize", "--variant", "a=op") == own[1:] * 2


def test_modes_that_a_variant_alone_has_run_there_alone(workspace):
    opacus_with(workspace / "op")
    jobs = suite("full", "--mode", "opacus:flash_fsdp", "--variant", "a=op").jobs
    assert [job.label for job in jobs] == ["reference", "opacus:flash_fsdp@a"]


def test_what_an_opacus_lacks_is_told_with_its_version(workspace):
    package = opacus_with(workspace / "op") / "opacus"
    (package / "version.py").write_text('# Ours.\n__version__ = "1.4.1"\n')
    made = suite("full", "--mode", "ghost,grad_materialize", "--variant", "old=op")
    (told,) = sentences(each for each in made.left_out if "@" in each.label)
    assert told.startswith(
        "not compared: ghost@old, as Opacus 1.4.1, the code of old, has no grad_sample_mode 'ghost'"
    )
    with pytest.raises(ValueError, match=r"runs code of variant old.*lists them. Opacus 1"):
        suite("full", "--mode", "ghost", "--variant", "old=op")


def test_a_mode_of_no_opacus_at_hand_is_refused_with_those_there_are(workspace):
    opacus_with(workspace / "op")
    wanted = "'flash': expected one of ew, flash_fsdp, functorch, ghost, ghost_fsdp, hooks, no_op"
    with pytest.raises(ValueError, match=wanted):
        suite("full", "--mode", "opacus:flash", "--variant", "a=op")
    with pytest.raises(ValueError, match="'flash': expected one of ew, functorch, ghost, gh"):
        suite("full", "--mode", "opacus:flash")


@pytest.mark.parametrize("text", ["def get_gsm_class(name): ...\n", "def get_gsm_class(:\n", None])
def test_an_opacus_whose_modes_cannot_be_read_is_refused(workspace, text):
    opacus_with(workspace / "op", text or "")
    if text is None:
        (workspace / "op" / "opacus" / "grad_sample" / "utils.py").unlink()
    with pytest.raises(ValueError, match="get_gsm_class"):
        suite("full", "--variant", "a=op")


def test_a_mode_that_uses_nothing_of_a_variant_does_not_run_there(workspace, monkeypatch):
    checkout(workspace / "lib", "library")
    (workspace / "mine.py").write_text("class Mode: pass\n")
    monkeypatch.syspath_prepend(str(workspace))
    assert labels("full", "--mode", "no_dp,mine:Mode", "--variant", "a=lib") == ["mine:Mode@a"]
    with pytest.raises(ValueError, match="expected a mode besides reference that runs code of var"):
        suite("full", "--mode", "no_dp,ghost", "--variant", "a=lib")


@pytest.fixture
def repository(workspace, monkeypatch) -> Path:
    """A repository with two commits of `transformers`, and a change that is in neither."""
    folder = checkout(workspace / "repository", "transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = folder / "transformers" / "__init__.py"
    for number in ("1", "2"):
        file.write_text(f"__version__ = {number!r}\n")
        begin = [["init", "-q"]] if number == "1" else []
        for command in (*begin, ["add", "."], ["commit", "-qm", "x"], ["tag", f"v{number}"]):
            subprocess.run([*git, *command], check=True)
    file.write_text("__version__ = 'uncommitted'\n")
    return folder


def test_a_revision_is_checked_out_aside(workspace, repository, monkeypatch):
    variant = suite("full", "--mode", "no_dp", "--variant", "old=v1@repository").jobs[-1].variant
    assert variant is not None
    assert (variant.name, variant.path, variant.git_dirty) == ("old", "v1@repository", False)
    assert (Path(variant.root) / "transformers/__init__.py").read_text() == "__version__ = '1'\n"
    assert len(variant.git_revision) == 40
    monkeypatch.chdir(repository)
    here = suite("full", "--mode", "no_dp", "--variant", "v2", "--variant", "v2~1").jobs
    assert [job.label for job in here if job.variant] == ["no_dp@v2", "no_dp@v2-1"]
    assert here[-1].variant is not None
    assert here[-1].variant.root == variant.root
    assert (repository / "transformers/__init__.py").read_text() == "__version__ = 'uncommitted'\n"


def test_a_checkout_is_removed_when_it_has_not_been_used_for_long(workspace, repository):
    def used_last(folder: Path, days: float) -> None:
        then = time.time() - days * 86400
        os.utime(folder, (then, then))

    git = ["git", "-C", str(repository), "rev-parse", "v1^{commit}", "v2^{commit}"]
    first, second = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    kept = check_out(repository, first)
    others = [kept.parent / f"{number:040}" for number in range(MOST_KEPT + 2)]
    for number, folder in enumerate(others):
        (folder / "package").mkdir(parents=True)
        used_last(folder, number / (MOST_KEPT + 1))
    (kept.parent / "tmpkilled").mkdir()
    used_last(kept.parent / "tmpkilled", 9)
    used_last(kept, 6)
    # Used, so that it is now the newest.
    assert check_out(repository, first) == kept
    assert len(list(kept.parent.iterdir())) == MOST_KEPT + 4
    check_out(repository, second)
    # Those of the last day may be running; the one that is a day and more old is past the bound.
    assert [folder.is_dir() for folder in others] == [True] * (MOST_KEPT + 1) + [False]
    assert {kept.name, second} <= {folder.name for folder in kept.parent.iterdir()}
    assert not (kept.parent / "tmpkilled").exists()


@pytest.mark.parametrize("given", ["old=v1@repository", "v1"])
def test_a_checkout_that_was_removed_is_made_again(workspace, repository, monkeypatch, given):
    if given == "v1":
        monkeypatch.chdir(repository)
    variant = suite("full", "--mode", "no_dp", "--variant", given).jobs[-1].variant
    assert variant is not None
    shutil.rmtree(variant.root)
    restore(variant)
    assert (Path(variant.root) / "transformers/__init__.py").read_text() == "__version__ = '1'\n"


def test_the_same_code_runs_once_more_with_other_settings(workspace, monkeypatch):
    modes = "flash_fsdp,flash_fsdp_bk,ghost_fsdp,flash"
    given = ("tiled:plan=tiled", "kept:plan=gradients", "both:replicas=2,gradient-checkpointing")
    options = [word for each in given for word in ("--variant", each)]
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    made = suite("full", "--mode", modes, "--nproc-per-node", "2", *options)
    runs = {job.label: job for job in made.jobs if job.variant}
    assert list(runs) == [
        "flash_fsdp@tiled", "flash_fsdp_bk@tiled", "flash@tiled", "flash_fsdp_bk@kept",
        "flash_fsdp@both", "flash_fsdp_bk@both",
    ]  # fmt: skip
    of = {
        label: (job.performance.plan, job.performance.num_replicas) for label, job in runs.items()
    }
    assert of["flash_fsdp@tiled"] == ("tiled", 1)
    assert of["flash_fsdp@both"] == ("auto", 2)
    assert runs["flash_fsdp@both"].model.gradient_checkpointing
    assert not runs["flash_fsdp@tiled"].model.gradient_checkpointing
    said = sentences(each for each in made.left_out if "@" in each.label)
    assert "not compared: ghost_fsdp@tiled, as it cannot compute its norms by plan=tiled" in said
    assert "not compared: each of ghost_fsdp@both and flash@both, as it has no replicas" in said
    advice = Failure(kind=FailureKind.ERROR).advice("g", runs["flash_fsdp@both"])
    assert "--variant both:replicas=2,gradient-checkpointing" in advice
    assert PLAN.loads(PLAN.dumps(made)) == made
    # Nothing is asked of a folder when it is resumed, and workers have the installed code.
    check_at_hand(made, lambda model, data: None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a:param-dtype=bfloat16", "expected one of plan, replicas, gradient-check.*change no res"),
        ("a:plan", "expected plan=VALUE"),
        ("a:plan=fast", "plan='fast': expected one of auto"),
        ("a:gradient-checkpointing=no", "expected gradient-checkpointing"),
        ("a:replicas=3", "replicas=3: expected a divisor"),
        ("a:replicas=x", "replicas='x': expected an integer"),
        ("a b:plan=tiled", "expected a NAME of up to 60"),
    ],
)
def test_settings_that_are_no_variant_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        suite("full", "--mode", "flash_fsdp", "--nproc-per-node", "2", "--variant", given)


# An import hook that answers first, as some editable installs put into every interpreter.
HOOK = """\
import importlib.machinery, sys
class Editable:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == 'opacus':
            return importlib.machinery.PathFinder.find_spec(name, [{installed!r}], target)
sys.meta_path.insert(0, Editable)
sys.path.insert(0, {installed!r})
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A group in which a checkout of Opacus clips at 0.9 C, under real workers.

    The working directory has an opacus of its own and the interpreter an editable install, as a
    developer's has.
    """
    folder = tmp_path_factory.mktemp("forked")
    found = importlib.util.find_spec("opacus")
    assert found is not None
    assert found.origin is not None
    installed = Path(found.origin).parent
    without = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(installed, folder / "checkout" / "opacus", ignore=without)
    shutil.copytree(installed, folder / "work" / "opacus", ignore=without)
    file = folder / "checkout/opacus/grad_sample/grad_sample_module_fast_gradient_clipping.py"
    text = file.read_text()
    right = "return (self.max_grad_norm / (norm_sample"
    assert right in text
    file.write_text(text.replace(right, "return (0.9 * self.max_grad_norm / (norm_sample"))
    git = ["git", "-C", str(folder / "checkout"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK.format(installed=str(installed.parent)))
    argv = ["full", "--mode", "ghost_fsdp", "--regime", "clip", "--group", "g", "--seq-length", "8"]
    search_path = os.pathsep.join([str(folder / "hook"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *argv, "--variant", "fork=../checkout"],
        cwd=folder / "work",
        env={**os.environ, "PYTHONPATH": search_path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return folder / "work", done


def test_a_checkout_that_clips_wrongly_is_told_from_the_installed_library(forked):
    from dpsgd_track.comparison import compare_group
    from dpsgd_track.config import Thresholds
    from tests.support.synthetic_group import verdicts

    folder, done = forked
    assert done.returncode == 0, done.stdout + done.stderr
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    comparison = compare_group(
        read_group(open_client(uri), Settings(tracking_uri=uri), "g"), Thresholds()
    )
    found = verdicts(comparison)
    assert (found["ghost_fsdp"], found["ghost_fsdp@fork"]) == ("PASS", "BUG")
    wrong = next(mode for mode in comparison.modes if mode.label == "ghost_fsdp@fork")
    assert "clip factor" in wrong.sentence


def test_what_a_variant_brought_is_recorded(forked):
    folder, done = forked
    assert done.returncode == 0, done.stdout + done.stderr
    run = runs_of("g", folder)["ghost_fsdp@fork"]
    assert run.job is not None
    variant = run.job.variant
    assert variant is not None
    assert (variant.name, variant.path) == ("fork", "../checkout")
    assert len(variant.git_revision) == 40
    assert not variant.git_dirty
    assert run.facts is not None
    assert set(run.facts.imported) == {"opacus"}
    assert run.facts.imported["opacus"]


def test_a_checkout_of_this_package_runs_in_its_own_workers(workspace):
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dpsgd_track", workspace / "next" / "dpsgd_track", ignore=left_out)
    (workspace / "work").mkdir()
    # As in the root of a checkout, where `python -m` finds the package first.
    (workspace / "work" / "dpsgd_track").symlink_to(ROOT / "dpsgd_track")
    with (workspace / "next" / "dpsgd_track" / "__init__.py").open("a") as file:
        file.write("\n__version__ = '9.9'\n")
    argv = ["single", "--mode", "no_dp", "--num-iter", "1", "--nproc-per-node", "1"]
    done = warm.run(
        *(str(ROOT / "launch.py"), *argv, "--variant", "a=../next", "--group", "g"),
        cwd=workspace / "work",
        environment={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = runs_of("g", workspace / "work")
    assert runs["no_dp@a"].facts.imported["dpsgd_track"] == "9.9"
    assert not runs["no_dp"].facts.imported


def test_a_mode_alone_is_held_against_itself_as_installed():
    from tests.support.synthetic_group import compared, mode_run, scaled, verdicts

    run = mode_run("flash_fsdp")
    wrong = mode_run("flash_fsdp", record=scaled(run.trajectory, "grad_norm", 1.1), variant="a")
    assert verdicts(compared([run, wrong])) == {"flash_fsdp": "PASS", "flash_fsdp@a": "BUG"}
    same = mode_run("flash_fsdp", variant="a")
    assert verdicts(compared([run, same])) == {"flash_fsdp": "PASS", "flash_fsdp@a": "PASS"}
