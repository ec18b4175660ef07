"""A plan is read back whole, and a field that was renamed is refused rather than ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from dpsgd_track.config import SILENT, VariantConfig
from dpsgd_track.launcher.several_machines.meeting import first_difference
from dpsgd_track.program import CHECKOUT, called_as
from dpsgd_track.record.failure import FAILURE, WORDS, Failure, FailureKind
from dpsgd_track.record.plan import PLAN, GroupPlan, RunKey, Suite
from tests.support.synthetic_group import job, mode_run, plan_of, setup

FORK = VariantConfig(name="fork", path="../fork", root="/fork", git_revision="abc")
WHOLE: GroupPlan = replace(
    plan_of([mode_run("no_dp"), mode_run("flash", "clip")]),
    suite=Suite.QUICK,
    num_nodes=2,
    command="dpsgd-track quick",
    jobs=(
        job("no_dp", setup("accuracy"), setup("noise", replay=SILENT)),
        replace(job("flash", setup("clip", max_grad_norms=(0.1, 1 / 3, 1.0, 2.0))), variant=FORK),
    ),
)
DOCUMENT = json.loads(PLAN.dumps(WHOLE))


def keys_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every key in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(key, str):
            yield (*path, key)
        if isinstance(inner, dict | list):
            yield from keys_of(inner, (*path, key))


PATHS = sorted(set(keys_of(DOCUMENT)), key=str)


def test_a_plan_is_read_back_whole_and_fits_its_schema() -> None:
    assert PLAN.loads(PLAN.dumps(WHOLE)) == WHOLE
    jsonschema.validate(DOCUMENT, PLAN.json_schema())
    assert len(PATHS) > 70


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_no_field_is_ignored_under_another_name(path: tuple[str | int, ...]) -> None:
    changed = json.loads(json.dumps(DOCUMENT))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[f"{path[-1]}_renamed"] = place.pop(path[-1])
    with pytest.raises(ValueError, match=str(path[-1])):
        PLAN.loads(json.dumps(changed))


def test_runs_of_a_plan_have_keys_of_their_own() -> None:
    assert [key for key, _, _ in WHOLE.runs()] == [
        RunKey(mode="no_dp", regime="accuracy"),
        RunKey(mode="no_dp", regime="noise", replay=SILENT),
        RunKey(mode="flash", regime="clip", variant="fork"),
    ]


def test_machines_name_the_first_setting_that_differs() -> None:
    def other(**changes: Any) -> GroupPlan:
        first, *rest = WHOLE.jobs
        return replace(WHOLE, jobs=(replace(first, **changes), *rest))

    assert first_difference(WHOLE, replace(WHOLE, command="another")) is None
    assert first_difference(WHOLE, other(seed=7)) == ("seed", "42", "7")
    longer = replace(WHOLE.jobs[0].data, seq_length=65)
    assert first_difference(WHOLE, other(data=longer)) == ("data.seq_length", "64", "65")
    assert first_difference(WHOLE, other(mode="flash")) == (
        "mode",
        "no_dp, flash@fork",
        "flash, flash@fork",
    )
    fewer = replace(WHOLE, jobs=WHOLE.jobs[:1])
    assert first_difference(WHOLE, fewer) == ("mode", "no_dp, flash@fork", "no_dp")


@pytest.mark.parametrize("kind", FailureKind)
def test_every_kind_of_failure_has_words_and_survives_its_file(kind: FailureKind) -> None:
    assert set(WORDS) == set(FailureKind)
    failure = Failure(kind=kind, message="m", place="in x.py:3 of mode m", regime=1, step=2, rank=3)
    assert FAILURE.loads(FAILURE.dumps(failure)) == failure
    assert "at step 2, rank 3 in x.py:3 of mode m: m" in failure.reason
    assert failure.advice().endswith(".")
    assert not re.search(r"[{}]", failure.advice())
    assert not re.search(r"GROUP|MODE", failure.advice("g", job("no_dp", setup("clip"))))


def test_advice_names_the_mode_that_failed_and_the_program_that_was_called() -> None:
    made = replace(job("my:Mode", setup("clip")), variant=FORK)
    failure = Failure(kind=FailureKind.MODE)
    assert "`dpsgd-track single --mode my:Mode --variant fork=../fork`" in failure.advice("g", made)
    with called_as(CHECKOUT):
        assert "`python launch.py single --mode MODE` runs" in failure.advice()
        interrupted = Failure(kind=FailureKind.INTERRUPTED)
        assert interrupted.advice("g") == "`python launch.py resume g` runs what is missing."
    assert "`dpsgd-track resume GROUP`" in interrupted.advice()
