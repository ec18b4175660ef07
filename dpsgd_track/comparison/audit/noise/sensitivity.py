"""Checks that no sample contributes more than C, to which the noise is calibrated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.noise.check import NoiseCheck, Place
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import UNUSED, Floats, Trajectory

SENSITIVITY = "sensitivity"
TOLERANCE = 5e-4
"""Excess due to float32 and to a formula such as C / (norm + 1e-6)."""

_SAME_WEIGHTS = 1e-5
"""Largest relative distance of weights that are the same but for rounding. A mode that draws noise
of its own soon has others, and other norms."""


def sensitivity(
    run: ModeRun, reference: ModeRun | None = None, plain: ModeRun | None = None
) -> NoiseCheck | None:
    """The largest clip factor x norm / C of a run, over all its steps and samples.

    Args:
        reference: run whose norms are used if it has computed the same samples, in each step that
            it took from the same weights.
        plain: the reference in the type that modes compute in. The mode may have twice the error of
            these norms.
    Returns:
        None for a run that has no clip factors.
    """
    trajectory = run.trajectory
    if trajectory is None or not np.isfinite(trajectory.clip_factor).any():
        return None
    own = trajectory.sample_norm
    norms = _norms_of(reference, trajectory)
    is_known = np.zeros(trajectory.num_steps, dtype=bool)
    rounding = _norms_of(plain, trajectory)
    tolerance = TOLERANCE
    if norms is not None and rounding is not None:
        error = np.divide(rounding - norms, norms, out=np.zeros_like(norms), where=norms > 0)
        tolerance += 2 * float(np.nanmax(np.abs(error), initial=0.0))
    if norms is not None and reference is not None and reference.trajectory is not None:
        is_known = _have_equal_weights(trajectory, reference.trajectory)
        norms = np.where(is_known[:, None], norms, own)
    norms = own if norms is None else norms
    ratio = trajectory.clip_factor * norms / trajectory.max_grad_norm[:, None]
    real = trajectory.sample_index != UNUSED
    if not np.isfinite(ratio[real]).any():
        return None
    row, column = np.unravel_index(
        int(np.where(real, np.nan_to_num(ratio, nan=-1.0), -1.0).argmax()), ratio.shape
    )
    largest = float(ratio[row, column])
    sample, step = trajectory.sample_index[row, column], int(trajectory.step[row])
    place = Place.of_step(step, f"sample {sample} at ")
    by = "by the reference's norms" if is_known[row] else "by its own norms, as there are no others"
    return NoiseCheck(
        name=SENSITIVITY,
        title="largest contribution / C",
        value=largest,
        low=largest - tolerance,
        high=largest + tolerance,
        expected=1.0,
        is_ok=largest <= 1 + tolerance,
        place=place,
        sentence=f"the largest contribution of a sample is {largest:.6f} C ({place.text}; {by}) "
        f"where {1 + tolerance:.6f} C is allowed",
        num_cells=int(real.sum()),
        num_failed=int((ratio[real] > 1 + tolerance).sum()),
    )


def _have_equal_weights(ours: Trajectory, theirs: Trajectory) -> NDArray[np.bool_]:
    """[S] True where both runs took a step from the same weights, but for rounding."""
    rows = {int(step): row for row, step in enumerate(theirs.step)}
    is_equal = np.zeros(ours.num_steps, dtype=bool)
    for row, step in enumerate(ours.step.tolist()):
        there = rows[step]
        if row == 0 or there == 0:
            is_equal[row] = row == there
            continue
        a = ours.read("weight_sketch", row - 1, row)
        b = theirs.read("weight_sketch", there - 1, there)
        if a.shape == b.shape:
            is_equal[row] = np.linalg.norm(a - b) <= _SAME_WEIGHTS * np.linalg.norm(b)
    return is_equal


def _norms_of(run: ModeRun | None, trajectory: Trajectory) -> Floats | None:
    """[S, N] norms that `run` has of the samples of `trajectory`; None if one is missing."""
    theirs = run.trajectory if run else None
    if theirs is None:
        return None
    norms = np.full(trajectory.sample_norm.shape, np.nan)
    rows = {int(step): row for row, step in enumerate(theirs.step)}
    for row, step in enumerate(trajectory.step.tolist()):
        if step not in rows:
            return None
        there = rows[step]
        known = dict(
            zip(
                theirs.sample_index[there].tolist(), theirs.sample_norm[there].tolist(), strict=True
            )
        )
        wanted = trajectory.sample_index[row]
        norms[row] = [known.get(i, np.nan) if i != UNUSED else np.nan for i in wanted.tolist()]
        if np.isnan(norms[row][wanted != UNUSED]).any():
            return None
    return norms
