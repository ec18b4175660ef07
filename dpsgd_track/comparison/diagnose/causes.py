"""The cause of a wrong stage: the hypotheses about it that agree with the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from dpsgd_track.comparison.diagnose.clipping_rules import clipping_rule
from dpsgd_track.comparison.diagnose.hypotheses.factors import FACTORS
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import (
    Explanation,
    Subject,
    explanations,
)
from dpsgd_track.comparison.diagnose.hypotheses.losses import LOSS
from dpsgd_track.comparison.diagnose.hypotheses.noise import DIVISION, NOISE
from dpsgd_track.comparison.diagnose.hypotheses.norms import BY_PARAMETER, TOTAL
from dpsgd_track.comparison.diagnose.hypotheses.sums import SUM
from dpsgd_track.comparison.diagnose.hypotheses.updates import UPDATE, rounding_of
from dpsgd_track.comparison.diagnose.ladder import Rung
from dpsgd_track.comparison.measure.clip_factors import factors_by
from dpsgd_track.comparison.measure.drift import Pair
from dpsgd_track.config import CLIP, FLAT, kind_of
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.stages import ObservableName, Stage

_COMMON = 3
"""Words at the beginning of alternatives from which on they are said once."""
_MOST_ALONE = 12
"""Parameters that are tried by themselves."""
_FEWEST_ELEMENTS = 16
"""Least elements of a parameter that is tried by itself."""
_MOST_CAUSES = 2
"""Causes that are told where parameters have several."""
_MOST_STEPS = 16
"""Steps that a hypothesis is tried on: records of long runs are larger than memory."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Explanations of a wrong stage."""

    explanations: tuple[Explanation, ...] = ()
    """All that agree equally well; empty if none is known."""
    audited: str = ""
    """Finding of the audit of the mode's own noise; empty for none."""
    is_division: bool = False
    """True if the noise is right, and what follows it is not."""

    @property
    def sentence(self) -> str:
        """The explanations as alternatives in one clause; empty if there are none."""
        known = either([each.sentence for each in self.explanations])
        return "; ".join(filter(None, [known, self.audited]))

    def confirmed_by(self, audited: str) -> Cause:
        """The same with what an audit of the mode's own noise found."""
        return replace(self, audited=audited)


def either(sentences: Sequence[str]) -> str:
    """`it is the right one multiplied by 2 or W`: alternatives, without repeating what is equal."""
    if len(sentences) < 2:
        return "".join(sentences)
    words = [each.split() for each in sentences]
    num_common = len(list(takewhile(lambda at: len(set(at)) == 1, zip(*words, strict=False))))
    num_common *= num_common >= _COMMON
    first, *rest = (" ".join(each[num_common * (n > 0) :]) for n, each in enumerate(words))
    said = first
    for each in rest:
        # A clause that ends with its reason is closed by a comma.
        said += f"{',' * (', as where ' in said)} or {each}"
    return said


def agreed(causes: Iterable[Cause]) -> Cause:
    """The explanations that all of `causes` share, leaving out those that have none.

    Constants that are equal in one regime differ in another.
    """
    known = [cause for cause in causes if cause.explanations]
    if not known:
        return Cause()
    names = set.intersection(*({e.name for e in cause.explanations} for cause in known))
    first = known[0]
    kept = tuple(e for e in first.explanations if e.name in names)
    return Cause(explanations=kept or first.explanations, is_division=first.is_division)


def cause_of(pair: Pair, rung: Rung, run: ModeRun) -> Cause:
    """The cause of an error that `rung` shows; empty if no hypothesis explains it."""
    facts = _facts(pair, rung, run)
    if facts is None or rung.limit is None or not np.isfinite(rung.limit):
        return Cause()
    if rung.stage is Stage.FACTORS and run.setup and run.setup.clipping != FLAT:
        # The hypotheses are about the flat rule.
        return _flat_instead(pair)
    for subject in _subjects(rung, facts):
        limit = max(rung.limit, rounding_of(facts)) if subject is UPDATE else rung.limit
        if found := explanations(facts, subject, limit):
            return Cause(explanations=found, is_division=subject is DIVISION)
    rule = clipping_rule(pair.aligned) if rung.stage in (Stage.FACTORS, Stage.SUM) else ""
    if rule:
        return Cause(explanations=(Explanation(sentence=rule, name=rule),))
    if len(rung.items) > 1 and rung.stage in (Stage.NORMS, Stage.SUM):
        return _of_one(pair, rung, run)
    return Cause()


def _flat_instead(pair: Pair) -> Cause:
    """Factors of the flat rule, where another was asked for."""
    other = pair.aligned.other
    wanted, factor = factors_by(FLAT, other), other.clip_factor
    is_known = np.isfinite(wanted) & np.isfinite(factor)
    if not is_known.any() or not np.allclose(factor[is_known], wanted[is_known], rtol=1e-3):
        return Cause()
    sentence = "they are min(1, C / n), which is flat clipping"
    return Cause(explanations=(Explanation(sentence=sentence, name=sentence),))


def _of_one(pair: Pair, rung: Rung, run: ModeRun) -> Cause:
    """Causes in single parameters, where none explains all of them: the worst one of each kind."""
    found: dict[str, Explanation] = {}
    t = pair.aligned.baseline
    sizes = dict(zip(t.parameter_names.tolist(), t.parameter_sizes.tolist(), strict=True))
    # A few numbers agree with what has a constant or two of its own.
    large = [item for item in rung.items if not 0 < sizes.get(item, 0) < _FEWEST_ELEMENTS]
    kinds = {".".join(item.split(".")[-2:]): item for item in reversed(large)}
    for item in list(reversed(kinds.values()))[:_MOST_ALONE]:
        cause = cause_of(pair, replace(rung, items=(item,)), run)
        named = [each for each in cause.explanations if each.is_named]
        if named and not any(each.name in found for each in named):
            said = f"in {item}, {either([each.sentence for each in named])}"
            found[named[0].name] = replace(named[0], sentence=said)
        if len(found) == _MOST_CAUSES:
            break
    if not found:
        return Cause()
    return Cause(
        explanations=(
            Explanation(
                sentence="; ".join(each.sentence for each in found.values()),
                name="; ".join(found),
            ),
        )
    )


def _subjects(rung: Rung, facts: Facts) -> tuple[Subject, ...]:
    match rung.stage:
        case Stage.LOSS:
            return (LOSS,)
        case Stage.NORMS:
            is_by_parameter = rung.observable is ObservableName.SAMPLE_NORM_BY_PARAMETER
            return (BY_PARAMETER,) if is_by_parameter else (TOTAL,)
        case Stage.FACTORS:
            return (FACTORS,)
        case Stage.SUM:
            return (SUM,)
        case Stage.NOISE:
            return (NOISE, DIVISION) if facts.ours.noise_std > 0 else (DIVISION,)
        case Stage.UPDATE:
            is_sgd = facts.run.setup is not None and facts.run.setup.optimizer == "sgd"
            return (UPDATE,) if is_sgd and facts.rate > 0 else ()
    return ()


def _facts(pair: Pair, rung: Rung, run: ModeRun) -> Facts | None:
    aligned = pair.aligned
    steps = aligned.baseline.step
    at = int(np.flatnonzero(steps == rung.step)[0])
    start = 0 if at < _MOST_STEPS // 2 else at - 1
    stop = min(len(steps), start + _MOST_STEPS)
    ours, theirs = (side.rows(start, stop) for side in (aligned.baseline, aligned.other))
    names = ours.parameter_names.tolist()
    columns = [names.index(item) for item in rung.items if item in names]
    layers = {f"{layer}.weight" for layer in rung.items}
    columns = columns or [i for i, name in enumerate(names) if name in layers]
    if rung.stage is Stage.UPDATE:
        rows = range(max(1, at - start), stop - start)
    elif rung.stage is Stage.NOISE or kind_of(pair.regime) == CLIP:
        rows = range(stop - start)
    else:
        # Later steps start from weights that the error has moved.
        rows = range(at - start, at - start + 1)
    if not len(rows):
        return None
    return Facts(
        ours=ours,
        theirs=theirs,
        run=run,
        rows=np.array(rows, dtype=np.int64),
        columns=np.array(columns or range(len(names)), dtype=np.int64),
    )
