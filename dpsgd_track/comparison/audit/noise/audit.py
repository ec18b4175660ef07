"""All checks that a run has records for, and the findings from failed ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from dpsgd_track.comparison.audit.noise import draws
from dpsgd_track.comparison.audit.noise.check import NoiseAudit, NoiseCheck, Place
from dpsgd_track.comparison.audit.noise.correlation import (
    CORRELATION,
    REUSE,
    SAME,
    check_correlations,
)
from dpsgd_track.comparison.audit.noise.draws import check_draws
from dpsgd_track.comparison.audit.noise.equality import (
    EQUAL_VALUES,
    ZEROS,
    check_equal_values,
    check_zeros,
)
from dpsgd_track.comparison.audit.noise.samples import TOO_COARSE, Samples, samples_of
from dpsgd_track.comparison.audit.noise.sensitivity import SENSITIVITY, sensitivity
from dpsgd_track.comparison.audit.noise.shape import MEAN, REPETITION, SHAPE, check_shape
from dpsgd_track.comparison.audit.noise.sketches import check_sketches
from dpsgd_track.comparison.audit.noise.std import (
    BY_SHARD,
    EMPTY_STEP,
    GROUPED,
    STD,
    Cells,
    check_std,
)
from dpsgd_track.comparison.audit.noise.structure import STRUCTURE, explanation
from dpsgd_track.comparison.audit.noise.tails import TAILS, check_tails
from dpsgd_track.comparison.diagnose.culprit import Culprit, alone
from dpsgd_track.comparison.verdict import Finding, Verdict
from dpsgd_track.config import NOISE, PLAIN, kind_of
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.stages import ObservableName, Stage

SAMPLES, SKETCHES = "samples", "sketches"


def audit(
    run: ModeRun, reference: ModeRun | None = None, plain: ModeRun | None = None
) -> NoiseAudit | None:
    """All checks of the noise of `run` on its own, and of its sensitivity.

    Args:
        reference: the regime's run of the reference, whose norms determine the sensitivity.
        plain: replay of the reference in the type that modes compute in.
    Returns:
        None for a run that neither adds noise nor clips, or left no record of it.
    """
    trajectory = run.trajectory
    if trajectory is None or not trajectory.num_steps:
        return None
    checks: list[NoiseCheck] = []
    source, cells, untested = "", None, ""
    samples, drawn = samples_of(trajectory), trajectory.noise_draws
    if samples is not None and samples.resolution > TOO_COARSE:
        untested = _said_too_coarse(samples)
    elif samples is not None and samples.held.any():
        source = SAMPLES
        checks, cells = check_std(run, trajectory, samples)
        if np.isfinite(samples.noise).all():
            checks += [*check_shape(samples), *check_correlations(samples)]
            if samples.noise.any():
                checks += [check_tails(samples), check_zeros(samples), check_equal_values(samples)]
            if any(not check.is_ok for check in checks) and (form := explanation(samples)):
                checks.append(form)
        if drawn:
            checks += check_draws(drawn, samples.parameters)
    elif sketched := check_sketches(trajectory):
        source = SKETCHES
        checks, cells = sketched
    contribution = sensitivity(run, reference, plain)
    checks += [contribution] if contribution else []
    if not checks and not untested:
        return None
    return NoiseAudit(
        regime=run.regime,
        mode=run.label,
        checks=tuple(checks),
        by_parameter=_rows(cells),
        source=source,
        num_draws=int(drawn.moments[..., 0].sum()) if drawn else 0,
        untested=untested,
    )


def _said_too_coarse(samples: Samples) -> str:
    return (
        f"its updates are rounded to {samples.resolution:.2g} sigma C, as differences of weights "
        "in bfloat16 are at a small learning rate"
    )


def audits_of(runs: Iterable[ModeRun], reference: ModeRun | None) -> dict[str, NoiseAudit]:
    """Audit of each of a regime's `runs`, by label.

    Args:
        reference: as in `audit`.
    """
    runs = tuple(runs)
    plain = next((r for r in runs if r.label == REFERENCE and r.replay == PLAIN), None)
    found = {run.label: audit(run, reference, plain) for run in runs if not run.replay}
    return {label: each for label, each in found.items() if each}


def _rows(cells: Cells | None) -> tuple[tuple[str, float, float, float], ...]:
    if cells is None:
        return ()
    columns = cells.value.tolist(), cells.low.tolist(), cells.high.tolist()
    return tuple(zip((place.text for place in cells.places), *columns, strict=True))


def passed_noise(audit: NoiseAudit) -> str:
    """Description of noise that passed all checks: `its noise has std 1.001 sigma C (...)`."""
    found = {check.name: check for check in audit.checks}
    std = found.get(draws.STD, found.get(STD))
    if std is None:
        return ""
    by = f" by {audit.num_draws:,} draws" if draws.STD in found else ""
    said = (
        f"its noise in {audit.regime} has std {std.value:.3f} sigma C ({std.low:.3f} to "
        f"{std.high:.3f}{by}), is normal and repeats nowhere as far as this shows: "
        f"{_resolution(found)} would have failed"
    )
    untested = [check.sentence for check in audit.checks if not check.was_tested]
    return "; ".join([said, *untested])


def _resolution(found: Mapping[str, NoiseCheck]) -> str:
    """The smallest faults that the checks find with a probability of 95 %."""
    if draws.STD not in found:
        return f"a std off by {found[STD].resolution:.1%}"
    correlations = [
        check.resolution
        for name, check in found.items()
        if name.startswith(draws.CORRELATION) and check.was_tested
    ]
    parts = [
        f"a std off by {found[draws.STD].resolution:.1%}",
        f"a mean of {found[draws.MEAN].resolution:.2g} sigma C",
        *(
            f"a {title} off by {found[name].resolution:.2g}"
            for name, title in ((draws.SKEWNESS, "skewness"), (draws.KURTOSIS, "kurtosis"))
            if name in found
        ),
    ]
    if not math.isnan(cut := found[draws.TAILS].resolution):
        parts.append(f"a cut at {cut:.2g} sigma C")
    if correlations:
        parts.append(f"a correlation of {max(correlations):.2g}")
    return f"{', '.join(parts[:-1])} or {parts[-1]}"


def judge_noise(run: ModeRun, audit: NoiseAudit | None) -> Iterator[Finding]:
    """Findings from a run's audit, or from its absence in the noise regime."""
    if run.failure and run.failure.kind is FailureKind.UNEQUAL_NOISE:
        yield _finding(run, run.reason)
    if kind_of(run.regime) == NOISE and not (audit and audit.source == SAMPLES):
        why = audit.untested if audit else ""
        why = why or f"it left no elements of its noise in {run.regime}"
        yield Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=run.regime,
            sentence=f"{why}, so that its noise was not tested",
            observable=ObservableName.NOISE,
        )
    for check in _telling(audit.failed) if audit else ():
        yield _finding(run, check.sentence, check)


def _finding(run: ModeRun, sentence: str, check: NoiseCheck | None = None) -> Finding:
    stage = Stage.SUM if check and check.name == SENSITIVITY else Stage.NOISE
    place = check.place if check else Place()
    culprit = Culprit(
        regime=run.regime,
        stage=stage,
        step=place.step,
        places=place.parameters,
        observable=ObservableName.NOISE,
        value=check.value if check else None,
    )
    return Finding(
        verdict=Verdict.BUG,
        regime=run.regime,
        sentence=f"{stage} (regime {run.regime}): {sentence}",
        observable=ObservableName.NOISE,
        value=culprit.value,
        step=culprit.step,
        where=place.text,
        culprit=alone(culprit, sentence),
    )


def _telling(failed: tuple[NoiseCheck, ...]) -> list[NoiseCheck]:
    """`failed` without checks that others cover better; those of draws where no other failed."""
    sampled = _telling_samples(tuple(check for check in failed if not check.is_of_draws))
    if any(check.name != SENSITIVITY for check in sampled):
        return sampled
    return [*_telling_draws({c.name: c for c in failed if c.is_of_draws}), *sampled]


def _telling_draws(failed: dict[str, NoiseCheck]) -> list[NoiseCheck]:
    """The check of the draws that explains the others."""
    stds = [check for name, check in failed.items() if name.startswith(draws.STD)]
    best = next((check for check in stds if check.explains_others), stds[0] if stds else None)
    if best:
        return [best]
    related = sorted(name for name in failed if name.startswith(draws.CORRELATION))
    order = (
        draws.FINITE,
        draws.BITS,
        draws.MEAN,
        *related,
        draws.SKEWNESS,
        draws.TAILS,
        draws.KURTOSIS,
    )
    return [failed[name] for name in order if name in failed][:1]


def _is_spread(std: NoiseCheck, related: Sequence[NoiseCheck]) -> bool:
    """True if noise that is the same in several places explains a std that is a little off."""
    return any(check.value > SAME for check in related) and abs(std.value - 1) < _LITTLE


_LITTLE = 0.25
"""Error of a std that fewer independent elements than there are values make."""


def _telling_samples(failed: tuple[NoiseCheck, ...]) -> list[NoiseCheck]:
    """`failed` without checks whose message another one covers better, the best first."""
    named = {check.name: check for check in failed}
    if STRUCTURE in named:
        return [named[name] for name in (STRUCTURE, SENSITIVITY) if name in named]
    related = [check for check in failed if check.name.startswith(CORRELATION)]
    is_related = bool(related) or REUSE in named
    kept = _telling_values(named, is_related=is_related)
    if (std := _telling_std(named)) and not _is_spread(std, related):
        kept.append(std)
    if not kept and not related:
        # Noise of several stds, with holes, or with repetitions is not normal either.
        shape = [named[MEAN]] if MEAN in named else [c for c in failed if c.name in SHAPE]
        kept += shape or _telling_signs(named, is_related=is_related)
    # Elements that repeat make every other correlation spread more than chance does.
    least = 0.8 * max((abs(check.value) for check in related), default=0.0)
    kept += [check for check in related if abs(check.value) >= least]
    rest = (REUSE, SENSITIVITY) if not related else (SENSITIVITY,)
    return kept + [named[name] for name in rest if name in named]


def _telling_values(failed: dict[str, NoiseCheck], *, is_related: bool) -> list[NoiseCheck]:
    """The check that best reports repeated or zero values.

    Args:
        is_related: a correlation reports more precisely which part repeats which.
    """
    if REPETITION in failed:
        return [failed[REPETITION]]
    equal = failed.get(EQUAL_VALUES)
    if equal and equal.explains_others and not is_related:
        return [equal]
    return [failed[ZEROS]] if ZEROS in failed else []


def _telling_signs(failed: dict[str, NoiseCheck], *, is_related: bool) -> list[NoiseCheck]:
    """Faults of noise that looks normal: too few far out, or a slight excess of equal values."""
    names = (TAILS,) if is_related else (TAILS, EQUAL_VALUES)
    return [failed[name] for name in names if name in failed][:1]


def _telling_std(failed: dict[str, NoiseCheck]) -> NoiseCheck | None:
    """The std check that explains the others, or else the one of the smallest parts."""
    by_step = failed.get("std_by_step")
    if EMPTY_STEP in failed and by_step and by_step.num_failed == failed[EMPTY_STEP].num_failed:
        return failed[EMPTY_STEP]
    order = (BY_SHARD, *reversed(GROUPED), STD, EMPTY_STEP)
    found = [failed[name] for name in order if name in failed]
    return next((check for check in found if check.explains_others), found[0] if found else None)
