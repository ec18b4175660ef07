"""The resolution that the verdict on real runs states is true: larger errors are found in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison import GroupComparison, compare_group
from dpsgd_track.config import Thresholds
from dpsgd_track.record.run import Group
from dpsgd_track.record.trajectory import Floats, Trajectory
from tests.support.workspace import Workspace

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
MODE = "flash_fsdp_bk"
PROBE = "the probe"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def group(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Group:
    workspace = Workspace(tmp_path_factory.mktemp("launched"))
    argv = ("--mode", MODE, "--regime", "probe-clip", "--param-dtype", request.param)
    done = workspace.run("launch.py", "quick", "--group", "g", *argv, timeout_s=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return workspace.group("g")


def with_wrong_norms(t: Trajectory, factors: Floats) -> Trajectory:
    """Norms of each parameter times its factor, and the clip factors that follow from them."""
    norms = t.sample_norm_by_parameter * factors
    total = np.sqrt(np.square(norms).sum(axis=2))
    clipped = np.minimum(1, t.max_grad_norm[:, None] / total)
    return replace(t, sample_norm_by_parameter=norms, sample_norm=total, clip_factor=clipped)


def with_wrong_sums(t: Trajectory, factors: Floats) -> Trajectory:
    """The sum of each parameter times its factor."""
    changed: dict[str, Any] = {
        name: getattr(t, name) * factors[:, None] for name in ("gradient_sketch", "noised_sketch")
    }
    return replace(t, **changed)


def compared(group: Group, change: Callable[[Trajectory], Trajectory]) -> GroupComparison:
    runs = tuple(
        replace(run, trajectory=change(run.trajectory))
        if run.label == MODE and run.trajectory
        else run
        for run in group.runs
    )
    return compare_group(replace(group, runs=runs), Thresholds())


@pytest.mark.parametrize(
    ("what", "wrong"),
    [("norms", with_wrong_norms), ("sums", with_wrong_sums)],
    ids=lambda x: str(x),
)
def test_errors_of_one_and_a_half_times_the_resolution_are_found(
    group: Group, what: str, wrong: Callable[[Trajectory, Floats], Trajectory]
) -> None:
    healthy = compared(group, lambda record: record)
    assert healthy.verdict == "PASS"
    sight = getattr(healthy.seen.resolutions[PROBE], what)
    seen = [i for i, name in enumerate(sight.parameters) if np.isfinite(sight.one[i])]
    errors = [np.zeros(len(sight.parameters)) for _ in seen]
    for error, parameter in zip(errors, seen, strict=True):
        error[parameter] = 1.5 * sight.one[parameter]
    for error in (*errors, np.full(len(sight.parameters), 1.5 * sight.all)):
        for sign in (1, -1):
            found = compared(group, lambda t, e=sign * error: wrong(t, 1 + e))  # type: ignore[misc]
            assert found.verdict in ("DRIFT", "BUG"), (what, sign * error)
