"""The action and its example workflow: each step of a shell is run as GitHub would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpsgd_track.report.drift_json import drift_json
from tests.support.synthetic_group import Store, healthy_runs, mode_run, scaled, trajectory
from tests.support.synthetic_report import GUILTY, broken

ROOT = Path(__file__).resolve().parent.parent
ACTION, EXAMPLE = ROOT / "action.yml", ROOT / "examples" / "github-actions.yml"
GITLAB = ROOT / "examples" / "gitlab-ci.yml"
STEPS: list[dict[str, Any]] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"]
SHELL_STEPS = {step["name"]: step for step in STEPS if "run" in step}
RUN, COMPARE, END, COMMENT = (
    "Run the modes",
    "Compare",
    "End as the comparison did",
    "Post the comment, or update the one that is there",
)

pytestmark = pytest.mark.skipif(shutil.which("jq") is None, reason="no jq, which runners have")

# Launches nothing, and compares in earnest.
_DPSGD_TRACK = """#!/bin/sh
printf '%s\\n' "$@" > "$CALLED"
[ "$1" = compare ] || exit "$LAUNCH_CODE"
exec "$PYTHON" -m dpsgd_track "$@"
"""
# A pull request's comments in a file.
_GH = """#!/usr/bin/env python3
import json, os, pathlib, sys
kept = pathlib.Path(os.environ["COMMENTS_FILE"])
comments = json.loads(kept.read_text())
if "--method" in sys.argv:
    method, place = sys.argv[sys.argv.index("--method") + 1 :][:2]
    body = json.loads(pathlib.Path(sys.argv[-1]).read_text())["body"]
    if method == "POST":
        assert place == "repos/o/r/issues/7/comments"
        comments.append({"id": len(comments), "user": {"type": "Bot"}, "body": body})
    else:
        at = place.removeprefix("repos/o/r/issues/comments/")
        comments[int(at)]["body"] = body
    kept.write_text(json.dumps(comments))
else:
    assert "repos/o/r/issues/7/comments" in sys.argv
    # Pages follow each other, as with --paginate.
    for comment in comments:
        print(json.dumps([comment]))
"""


@dataclass
class Runner:
    """A runner of GitHub's, with stand-ins for the commands that reach out."""

    folder: Path
    inputs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        defaults = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["inputs"]
        self.inputs = {name: each.get("default", "") for name, each in defaults.items()}
        for name, text in (("dpsgd-track", _DPSGD_TRACK), ("gh", _GH)):
            program = self.folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text, encoding="utf-8")
            program.chmod(0o755)
        (self.folder / "temp").mkdir()
        (self.folder / "comments").write_text("[]", encoding="utf-8")

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run a step, and take its outputs."""
        step = SHELL_STEPS[name]
        output, summary = self.folder / "output", self.folder / "summary"
        output.write_text("", encoding="utf-8")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "PYTHON": sys.executable,
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(summary),
                "CALLED": str(self.folder / "called"),
                "COMMENTS_FILE": str(self.folder / "comments"),
                "LAUNCH_CODE": "0",
                **self.variables,
                **{key: self._value(text) for key, text in step["env"].items()},
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        lines = output.read_text(encoding="utf-8").splitlines()
        self.outputs |= dict(line.split("=", 1) for line in lines)
        return done

    def _value(self, expression: str) -> str:
        known = {
            **{f"inputs.{name}": value for name, value in self.inputs.items()},
            **{f"steps.compare.outputs.{name}": value for name, value in self.outputs.items()},
            "runner.temp": str(self.folder / "temp"),
            "github.token": "a token",
            "github.repository": "o/r",
            "github.event.pull_request.number": "7",
        }
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda match: known[match[1]], expression)

    def called(self) -> list[str]:
        """Arguments of the last call of dpsgd-track."""
        return (self.folder / "called").read_text(encoding="utf-8").splitlines()

    def comments(self) -> list[str]:
        """Bodies of the pull request's comments."""
        kept = json.loads((self.folder / "comments").read_text(encoding="utf-8"))
        return [comment["body"] for comment in kept]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        ({}, ["quick", "--group", "pull-request", "--device", "cpu"]),
        (
            {"suite": "full", "options": "", "variant": "a=my code\nb=$(touch x)\n"},
            [
                *("full", "--group", "pull-request"),
                *("--variant", "a=my code", "--variant", "b=$(touch x)"),
            ],
        ),
        (
            {"options": "--num-iter 8\n --seed *"},
            [*["quick", "--group", "pull-request"], *["--num-iter", "8", "--seed", "*"]],
        ),
    ],
    ids=["defaults", "variants", "options"],
)
def test_modes_are_run_with_the_inputs_word_by_word(
    runner: Runner, inputs: dict[str, str], arguments: Sequence[str]
) -> None:
    runner.inputs |= inputs
    assert runner.run(RUN).returncode == 0
    assert runner.called() == arguments
    assert not (runner.folder / "x").exists()


@pytest.mark.parametrize(("launched", "code"), [("0", 0), ("1", 0), ("2", 1), ("70", 1)])
def test_a_failed_mode_is_left_to_the_comparison_and_wrong_usage_is_not(
    runner: Runner, launched: str, code: int
) -> None:
    runner.variables["LAUNCH_CODE"] = launched
    assert runner.run(RUN).returncode == code


def test_a_bug_is_compared_kept_told_in_one_comment_and_ends_the_job(runner: Runner) -> None:
    wrong = mode_run("flash_fsdp", "clip", scaled(trajectory(noise_std=0.0), "grad_norm", 1.1))
    Store(runner.folder).add_group(
        [*healthy_runs()[:5], mode_run("reference", "clip"), wrong], "pull-request"
    )
    runner.inputs |= {"bug-threshold": "0.05", "fail-on": "bug"}
    done = runner.run(COMPARE)
    assert done.returncode == 0, done.stderr
    assert (runner.outputs["verdict"], runner.outputs["exit-code"]) == ("BUG", "1")
    kept = Path(runner.outputs["report"])
    assert kept.parent.parent == runner.folder / "temp"
    for name in ("report.html", "report.md", "junit.xml", "drift.json"):
        assert (kept / name).stat().st_size > 0
    assert (runner.folder / "summary").read_text(encoding="utf-8").startswith("## ❌ BUG")
    assert "--bug-threshold" in runner.called()
    assert "--loss-threshold" not in runner.called()
    assert runner.run(END).returncode == 1


def test_a_comparison_that_finds_nothing_ends_with_its_own_code(runner: Runner) -> None:
    runner.inputs["golden"] = "missing.dpsgd"
    assert runner.run(COMPARE).returncode == 2
    assert runner.called()[:3] == ["compare", "missing.dpsgd", "pull-request"]


def test_there_is_one_comment_that_is_updated_and_nobody_elses_is_touched(runner: Runner) -> None:
    theirs = "<!-- dpsgd-track --> I copied this."
    kept = [{"id": 0, "user": {"type": "User"}, "body": theirs}]
    (runner.folder / "comments").write_text(json.dumps(kept), encoding="utf-8")
    (runner.folder / "temp" / "dpsgd-track").mkdir()
    report = runner.folder / "temp" / "dpsgd-track" / "report.md"
    for text in ("## ❌ BUG `$(touch x)`", "## ✅ PASS " + "ä" * 70_000):
        report.write_text(text, encoding="utf-8")
        done = runner.run(COMMENT)
        assert done.returncode == 0, done.stderr
        assert runner.comments()[0] == theirs
        (mine,) = runner.comments()[1:]
        assert mine.startswith(f"<!-- dpsgd-track -->\n{text[:500]}")
        assert len(mine) < 65_536
    assert not (runner.folder / "x").exists()


def test_nothing_of_others_is_put_into_a_shell_and_what_may_write_runs_no_code_of_theirs() -> None:
    for step in SHELL_STEPS.values():
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
    runs = {name: step["if"].split(" && ")[0] for name, step in SHELL_STEPS.items()}
    assert runs.pop(COMMENT) == "inputs.part == 'comment'"
    assert set(runs.values()) == {"inputs.part == 'compare'"}
    assert "dpsgd-track " not in SHELL_STEPS[COMMENT]["run"].replace("<!-- dpsgd-track -->", "")
    text = EXAMPLE.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    assert workflow[True] == "pull_request"  # YAML 1.1 reads `on` as true
    jobs = workflow["jobs"]
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "compare": {"contents": "read"},
        "comment": {"pull-requests": "write"},
    }
    assert not any("checkout" in step["uses"] for step in jobs["comment"]["steps"])
    assert [step["with"].get("part", "compare") for step in jobs["compare"]["steps"][1:]] == [
        "compare"
    ]
    assert "secrets." not in text + ACTION.read_text(encoding="utf-8")


def test_the_example_gives_inputs_that_the_action_has() -> None:
    inputs = set(yaml.safe_load(ACTION.read_text(encoding="utf-8"))["inputs"])
    jobs = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))["jobs"].values()
    own = [step for job in jobs for step in job["steps"] if step["uses"].startswith("OWNER/")]
    assert len(own) == 2
    assert {name for step in own for name in step["with"]} <= inputs


@pytest.mark.parametrize(
    "file", [ACTION, EXAMPLE, ROOT / ".github" / "workflows" / "ci.yml"], ids=lambda file: file.name
)
def test_actions_are_pinned_by_commit_and_say_their_version(file: Path) -> None:
    """A tag can be moved to other code, a commit cannot."""
    uses = re.findall(r"uses: (.*)", file.read_text(encoding="utf-8"))
    others = [action for action in uses if action != "OWNER/dpsgd-track@COMMIT"]
    assert others
    for action in others:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def test_gitlab_is_given_a_finding_for_each_mode_that_is_not_right(tmp_path: Path) -> None:
    job = yaml.safe_load(GITLAB.read_text(encoding="utf-8"))["dpsgd-track"]
    place = tmp_path / "results" / "merge-request" / "drift.json"
    place.parent.mkdir(parents=True)
    place.write_text(drift_json(broken()), encoding="utf-8")
    subprocess.run(["bash", "-c", *job["after_script"]], cwd=tmp_path, check=True)
    (finding,) = json.loads((tmp_path / job["artifacts"]["reports"]["codequality"]).read_text())
    assert finding["severity"] == "blocker"
    assert finding["description"].startswith(f"BUG: {GUILTY} computes wrong per-sample norms")
    assert finding["location"]["lines"]["begin"] == 1
    assert finding["fingerprint"]
