"""Names the culprit: the stage that went wrong first, the place, the error, and a likely cause."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.consistency import TOLERANCE, Inconsistency
from dpsgd_track.comparison.diagnose.causes import Cause, cause_of
from dpsgd_track.comparison.diagnose.ladder import Rung, StageStatus, first_introduced
from dpsgd_track.comparison.diagnose.sample_groups import group_of
from dpsgd_track.comparison.measure.alignment import Aligned
from dpsgd_track.comparison.measure.amount import number, share
from dpsgd_track.comparison.measure.drift import Pair
from dpsgd_track.comparison.measure.observables import (
    OBSERVABLES,
    SMALL_SAMPLE,
    STAGES,
    Observable,
    relative,
)
from dpsgd_track.config import CLIP, kind_of
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import UNUSED, Trajectory, sketch_distance, sketch_length

_SHOWN = 3
_FEW_RIGHT = 2
_FROM_HERE_ON = 0.9
"""Share of wrong parameters before a wrong one from which on they count as inheriting its error."""

_FEWEST_BEFORE = 3
"""Least number of parameters before it that can show this; fewer may be wrong independently."""

_WRONG = {
    Stage.DATA: "was given other data",
    Stage.INITIAL_WEIGHTS: "starts from other weights",
    Stage.LOSS: "computes wrong losses",
    Stage.NORMS: "computes wrong per-sample norms",
    Stage.FACTORS: "computes wrong clip factors",
    Stage.SUM: "computes a wrong clipped sum",
    Stage.NOISE: "adds wrong noise",
    Stage.UPDATE: "updates the weights wrongly",
}
"""Predicate of the sentence about a mode, by the stage at fault."""

_RIGHT = {
    Stage.LOSS: "the loss",
    Stage.NORMS: "norms",
    Stage.FACTORS: "clip factors",
    Stage.SUM: "the clipped sum",
    Stage.NOISE: "the noise",
}
"""Names of stages that are reported as right before the one at fault; inputs are not computed."""


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """The first fault of a run: in one comparison, in its own numbers, or over all comparisons."""

    regime: str
    stage: Stage
    step: int | None = None
    """None before the first step, or if it is not known."""
    places: tuple[str, ...] = ()
    """Layers or parameters in which the error arose, worst first; empty for none in particular."""
    inherited: tuple[str, ...] = ()
    """Layers or parameters that inherited it."""
    samples: tuple[int, ...] = ()
    """Global indices of the affected samples; empty for all, or if it is not per sample."""
    sample_group: str = ""
    """`samples` as a group, such as "the last sample of each micro-batch"; empty for none."""
    ranks: tuple[int, ...] = ()
    """Affected ranks; empty for all."""
    observable: ObservableName | None = None
    """Observable that shows the error."""
    value: float | None = None
    """Largest error of that step."""
    limit: float | None = None
    """Limit of `value`."""
    floor: float | None = None
    """Floor of the observable; None if it was not measured."""
    against: str = ""
    """Label of the baseline; empty if the run's own numbers show the error."""
    claim: str = ""
    """Verb phrase on the mode's error, to follow its name."""
    cause: Cause = field(default_factory=Cause)
    """Explanation of the error."""
    where: str = ""
    """First place of the error, as a clause."""
    evidence: str = ""
    """Size of the error, or the evidence of it."""
    also: str = ""
    """Another error that this one does not explain, as a sentence of its own."""
    breaks_bound: bool = False
    """True if the clipped sum is longer than privacy allows."""

    @property
    def _predicate(self) -> str:
        return "divides the sum wrongly" if self.cause.is_division else self.claim

    @property
    def claimed(self) -> str:
        """`sentence` without place and evidence."""
        besides = f"Besides, it {self.also}" if self.also else ""
        said = ": ".join(filter(None, [self._predicate, self.cause.sentence]))
        return ". ".join(filter(None, [said, besides]))

    @property
    def sentence(self) -> str:
        """All of it, to follow the mode's name, without the last full stop."""
        claim, cause = self._predicate, self.cause.sentence
        if not cause:
            parts = [f"{claim}: {self.where}" if self.where else claim, self.evidence]
        else:
            where = f"{self.where[:1].upper()}{self.where[1:]}"
            detail = [where, f"{self.evidence[:1].lower()}{self.evidence[1:]}"]
            parts = [f"{claim}: {cause}", "; ".join(filter(None, detail))]
        if self.also:
            parts.append(f"Besides, it {self.also}")
        return ". ".join(filter(None, parts))


def culprit_of(
    pair: Pair, rungs: Sequence[Rung], run: ModeRun, broken: Sequence[Inconsistency]
) -> Culprit | None:
    """Diagnose a pair by its ladder; None if no stage introduced an error.

    Args:
        run: the mode's.
        broken: relations that the mode's own numbers violate.
    """
    rung = first_introduced(rungs)
    if rung is None:
        return None
    first = _culprit_at(rung, pair, rungs, run, broken)
    if first is None:
        return None
    others = (each for each in rungs if _may_be_independent(each, rung, pair))
    later = ((each, _culprit_at(each, pair, rungs, run, broken)) for each in others)
    also = next((c for each, c in later if c is not None and _is_independent(c, first, each)), None)
    # Its size is in the report's table of stages.
    return first if also is None else replace(first, also=replace(also, evidence="").sentence)


def _may_be_independent(rung: Rung, first: Rung, pair: Pair) -> bool:
    """True if `rung` may show another error than `first` does.

    A sum after wrong norms is predicted from the mode's own factors, so that a mistake which
    explains it is one of its own. Where weights move, later steps start from wrong ones.
    """
    if rung.step is None or first.step is None:
        return False
    if kind_of(pair.regime) != CLIP and rung.step > first.step:
        return False
    ours, theirs = pair.aligned.baseline, pair.aligned.other
    is_predicted = (
        bool(ours.shape_of("sample_sketch")[-1]) and not np.isnan(theirs.clip_factor).all()
    )
    follows = rung.stage is Stage.SUM and rung.status is StageStatus.INHERITED and is_predicted
    return rung.stage is not first.stage and (rung.is_by_itself or follows)


def _is_independent(second: Culprit, first: Culprit, rung: Rung) -> bool:
    """True if `first` does not explain `second`, which `rung` of a later stage shows.

    A wrong loss has a wrong gradient, and wrong norms and a wrong sum of the same parameters come
    from one, unless the sum is explained by another mistake.
    """
    if second.stage is not Stage.SUM or first.stage not in (Stage.LOSS, Stage.NORMS):
        return rung.is_by_itself
    is_elsewhere = first.stage is Stage.NORMS and rung.is_by_itself
    if is_elsewhere and set(second.places) - {*first.places, *first.inherited}:
        return True
    names = {each.subject_free for each in first.cause.explanations}
    return any(
        each.is_named and each.subject_free not in names for each in second.cause.explanations
    )


def _culprit_at(
    rung: Rung,
    pair: Pair,
    rungs: Sequence[Rung],
    run: ModeRun,
    broken: Sequence[Inconsistency],
) -> Culprit | None:
    """The culprit that one stage of a ladder shows; None if only its inputs were unlike."""
    if rung.observable is None:
        of_stage = (b for b in broken if (b.stage, b.step) == (rung.stage, rung.step))
        found = next(of_stage, None)
        return contradiction(pair.regime, found) if found else None
    if rung.value is not None and not math.isfinite(rung.value) and rung.limit is None:
        return _not_finite(pair, rung)
    # Large fields of long records are read for this step and the one before it only.
    at = int(np.flatnonzero(pair.aligned.baseline.step == rung.step)[0])
    first = max(0, at - 1)
    row = at - first
    aligned = Aligned(
        baseline=pair.aligned.baseline.rows(first, at + 1),
        other=pair.aligned.other.rows(first, at + 1),
        gaps=(),
    )
    names = tuple(aligned.baseline.parameter_names.tolist())
    arose: tuple[str, ...] = rung.items
    inherited: tuple[str, ...] = ()
    if rung.stage is Stage.NORMS:
        arose, inherited = where_it_arose(rung.items, names)
        if _are_right_in_sum(inherited, rung, aligned, row):
            arose, inherited = rung.items, ()
    samples = _samples(rung, aligned, row)
    culprit = Culprit(
        regime=pair.regime,
        stage=rung.stage,
        step=rung.step,
        places=arose,
        inherited=inherited,
        samples=tuple(aligned.baseline.sample_index[row, samples].tolist()),
        sample_group=group_of(samples, aligned.other, row, baseline=aligned.baseline),
        ranks=_ranks(samples, aligned, row),
        observable=rung.observable,
        value=rung.value,
        limit=rung.limit,
        floor=rung.floor,
        against=pair.baseline,
        claim=_claim(rung.stage, aligned.baseline.noise_std, run),
        cause=cause_of(pair, replace(rung, items=arose), run),
    )
    if OBSERVABLES[rung.observable].items == "layer":
        names = tuple(aligned.baseline.layer_names.tolist())
    direction = _direction(rung, aligned, row)
    return _in_words(culprit, names, _right_before(rungs, rung), direction)


def _claim(stage: Stage, noise_std: float, run: ModeRun) -> str:
    """Predicate of the sentence about a stage, which is not called noise where there is none."""
    if stage is Stage.NOISE and not noise_std > 0:
        return "divides the clipped sum wrongly"
    if stage is Stage.UPDATE and run.setup is not None and run.setup.learning_rate == 0:
        return "moves weights at a learning rate of 0"
    return _WRONG[stage]


def _not_finite(pair: Pair, rung: Rung) -> Culprit:
    """The culprit of a value that is NaN or infinite."""
    assert rung.value is not None
    shown = "NaN" if math.isnan(rung.value) else "infinite"
    culprit = Culprit(
        regime=pair.regime,
        stage=rung.stage,
        step=rung.step,
        places=rung.items,
        observable=rung.observable,
        value=rung.value,
        against=pair.baseline,
        claim=f"{_WRONG[rung.stage]} ({shown})",
    )
    where = _told_where(culprit, culprit.places)
    in_sample = rung.where if rung.where.startswith("sample") and not rung.items else ""
    return replace(
        culprit,
        where=", ".join(filter(None, [where, in_sample])),
        evidence=f"It is finite in {pair.baseline}",
    )


def contradiction(regime: str, broken: Inconsistency) -> Culprit:
    """The culprit that is shown by a contradiction between a run's own numbers."""
    culprit = Culprit(
        regime=regime,
        stage=broken.stage,
        step=broken.step,
        places=broken.parameters,
        samples=() if broken.sample is None else (broken.sample,),
        observable=broken.observable,
        value=broken.value,
        limit=TOLERANCE,
        claim=_WRONG[broken.stage],
        breaks_bound=broken.breaks_bound,
    )
    title = broken.title[0].upper() + broken.title[1:]
    amount = f", {_amount(broken.value, 'by ')} (limit {share(TOLERANCE)})" * broken.has_amount
    return replace(culprit, where=_told_where(culprit, culprit.places), evidence=f"{title}{amount}")


def alone(culprit: Culprit, evidence: str) -> Culprit:
    """`culprit`, with a sentence that gives the evidence where nothing was compared."""
    where = f"{evidence} ({culprit.regime})"
    return replace(culprit, claim=_WRONG[culprit.stage], where=where)


def first_of(culprits: Mapping[tuple[str, str], Culprit]) -> tuple[str, str] | None:
    """Key of the comparison that shows the earliest stage of a step; None if there are none.

    Comparisons with no_dp show no norms, and a wrong clip factor shows only where samples are
    clipped.
    """
    order = list(Stage)

    def place(key: tuple[str, str]) -> tuple[int, int, bool]:
        culprit = culprits[key]
        # A comparison covers every layer, a contradiction is about one number.
        says_where = bool(culprit.against and (culprit.places or culprit.samples))
        step = -1 if culprit.step is None else culprit.step
        return order.index(culprit.stage), step, not says_where

    return min(culprits, key=place, default=None)


def where_it_arose(
    wrong: Sequence[str], names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the `wrong` parameters into those where the error arose and those that inherited it.

    A backward goes from the last layer to the first. If a layer passes on a wrong gradient, all
    layers before it are wrong as well. So a wrong parameter with right ones in the layers before it
    is wrong by itself.

    Args:
        wrong: worst first.
        names: all parameters, in the order of the forward.
    """
    place = {name: i for i, name in enumerate(names)}
    known = [name for name in wrong if name in place]
    if not known:
        return tuple(wrong), ()
    last = max(known, key=place.__getitem__)
    layer = last.rpartition(".")[0]
    before = [name for name in names[: place[last]] if name.rpartition(".")[0] != layer]
    passed_on = [name for name in known if name in set(before)]
    is_everything = len(known) == len(names)
    is_told = len(before) >= _FEWEST_BEFORE and len(passed_on) >= _FROM_HERE_ON * len(before)
    if is_everything or not is_told:
        return tuple(known), ()
    arose = tuple(name for name in known if name not in set(passed_on))
    return arose, tuple(passed_on)


def _are_right_in_sum(parameters: Sequence[str], rung: Rung, pair: Aligned, row: int) -> bool:
    """True if the sums of gradients are right for `parameters`, whose norms are wrong.

    A wrong gradient inherited from a later layer would make the sum wrong as well. If samples were
    clipped, wrong norms alone make the sum wrong, and the answer is False.
    """
    ours, theirs = pair.baseline, pair.other
    with np.errstate(invalid="ignore"):
        is_clipped = bool((ours.clip_factor[row] < 1).any() or (theirs.clip_factor[row] < 1).any())
    if is_clipped or not parameters:
        return False
    columns = [i for i, name in enumerate(ours.parameter_names.tolist()) if name in parameters]
    sums = [side.gradient_sketch[[row]][:, columns] for side in (ours, theirs)]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = sketch_distance(*sums) / sketch_length(sums[0])
    limit = rung.limit or 0.0
    return bool(np.nanmedian(errors) <= limit)


def describe(wrong: Sequence[str], names: Sequence[str], kind: str = "parameters") -> str:
    """`wrong` parameters in few words: their names, or what they have in common.

    Args:
        names: all parameters of the model.
        kind: noun for the parameters.
    """
    if names and len(wrong) == len(names) > 1:
        return f"all {len(names)} {kind}"
    if len(wrong) <= _SHOWN:
        return ", ".join(wrong)
    are_wrong = set(wrong)
    groups = _whole_groups(are_wrong, names)
    right = [name for name in names if name not in are_wrong]
    if groups and (len(groups) == 1 or len(right) > _FEW_RIGHT):
        return f"every {', '.join(groups)} ({len(wrong)})"
    if said := _by_order(are_wrong, names, kind):
        return said
    if len(right) <= _FEW_RIGHT:
        return f"{len(wrong)} of {len(names)} {kind} (all but {' and '.join(right)})"
    if len(wrong) > 0.5 * len(names):
        return f"{len(wrong)} of {len(names)} {kind} ({wrong[0]} most)"
    return f"{', '.join(wrong[:_SHOWN])} and {len(wrong) - _SHOWN} more"


def _by_order(wrong: Set[str], names: Sequence[str], kind: str) -> str:
    """`wrong` as all from one on in the model's order, up to a few; empty if they are not."""
    first = min((place for place, name in enumerate(names) if name in wrong), default=0)
    others = [name for name in names[first:] if name not in wrong]
    if first < _FEWEST_BEFORE or len(others) > _FEW_RIGHT or len(wrong) < _FEWEST_BEFORE:
        return ""
    but = f", but {' and '.join(others)}" if others else ""
    return f"{len(wrong)} of {len(names)} {kind} (all from {names[first]} on{but})"


def _whole_groups(wrong: Set[str], names: Sequence[str]) -> list[str]:
    """The fewest groups of like names that `wrong` is made of, the largest first.

    A group is all names with a common end, as `*.bias` and `*.norm.weight`, or those that differ in
    the number of a block alone. Empty if it takes too many.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        every = name.split(".")
        _, *parts = every
        for kept in range(1, len(every)):
            groups[f"{'.'.join(every[:kept])}.*"].add(name)
        for kept in (1, 2):
            if len(parts) >= kept:
                groups[f"*.{'.'.join(parts[-kept:])}"].add(name)
        groups[_pattern(name)].add(name)
    whole = sorted((g for g in groups if groups[g] <= wrong), key=lambda g: -len(groups[g]))
    left, chosen = set(wrong), []
    for group in whole:
        if groups[group] & left:
            chosen.append(group)
            left -= groups[group]
    for group in reversed(chosen.copy()):
        others = [groups[other] for other in chosen if other != group]
        if groups[group] <= set().union(*others):
            chosen.remove(group)
    return sorted(chosen) if not left and len(chosen) <= _SHOWN else []


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _samples(rung: Rung, pair: Aligned, row: int) -> NDArray[np.int64]:
    """Places of the samples that are wrong; none if the stage has no samples."""
    none = np.array([], dtype=np.int64)
    limit = rung.limit or 0.0
    ours, theirs = pair.baseline, pair.other
    with np.errstate(invalid="ignore", over="ignore"):
        match rung.observable:
            case ObservableName.LOSS | ObservableName.SAMPLE_LOSS:
                error = np.abs(theirs.sample_loss[row] - ours.sample_loss[row])
            case ObservableName.SAMPLE_NORM:
                a, b = (t.sample_norm[row] for t in (ours, theirs))
                error = relative(a, np.abs(b - a), np.nanmax(a), SMALL_SAMPLE)
            case ObservableName.CLIP_FACTOR:
                a, b = (t.clip_factor[row] for t in (ours, theirs))
                error = relative(a, np.abs(b - a), 1.0, SMALL_SAMPLE)
            case ObservableName.SAMPLE_NORM_BY_PARAMETER if rung.items:
                column = ours.parameter_names.tolist().index(rung.items[0])
                a, b = (t.sample_norm_by_parameter[row, :, column] for t in (ours, theirs))
                error = relative(a, np.abs(b - a), ours.sample_norm[row])
            case _:
                return none
    wrong = np.flatnonzero(error > limit)
    there = np.flatnonzero(ours.sample_index[row] != UNUSED)
    return none if len(wrong) == len(there) else wrong


def _ranks(samples: NDArray[np.int64], pair: Aligned, row: int) -> tuple[int, ...]:
    """Ranks that hold the wrong samples; none if all ranks do."""
    ranks = pair.other.sample_rank[row]
    wrong = set(ranks[samples].tolist()) - {UNUSED}
    everybody = set(ranks.tolist()) - {UNUSED}
    return tuple(sorted(wrong)) if wrong < everybody else ()


def _right_before(rungs: Sequence[Rung], at_fault: Rung) -> list[Stage]:
    """The last two of the stages before the one at fault that were compared and are right."""
    order = list(Stage)
    right = [
        rung.stage
        for rung in rungs
        if rung.stage in _RIGHT
        and order.index(rung.stage) < order.index(at_fault.stage)
        and rung.status is StageStatus.OK
        # Nothing is known where rounding explains anything.
        and rung.limit is not None
        and math.isfinite(rung.limit)
    ]
    return right[-2:]


def _direction(rung: Rung, pair: Aligned, row: int) -> str:
    """`too large` or `too small` where all wrong numbers are; otherwise empty."""
    assert rung.observable is not None
    observable = OBSERVABLES[rung.observable]
    if observable.items not in ("sample", "sample_parameter"):
        return ""
    ours, theirs = (side.read(observable.field, row, row + 1)[0] for side in _sides(pair))
    names = pair.baseline.parameter_names.tolist()
    if observable.items == "sample_parameter":
        columns = [names.index(item) for item in rung.items if item in names]
        # A mean over all parameters names none of them.
        ours, theirs = (side[:, columns or range(len(names))] for side in (ours, theirs))
    with np.errstate(invalid="ignore"):
        difference = theirs - ours
        size = np.abs(difference)
        wrong = difference[size > 1e-2 * np.fmax.reduce(size, axis=None, initial=0.0)]
    if not wrong.size:
        return ""
    if (wrong > 0).all():
        return "too large"
    return "too small" if (wrong < 0).all() else ""


def _sides(pair: Aligned) -> tuple[Trajectory, Trajectory]:
    return pair.baseline, pair.other


def _in_words(
    culprit: Culprit, names: Sequence[str], right: Sequence[Stage], direction: str = ""
) -> Culprit:
    """`culprit` of a comparison, with its place and size in words.

    Args:
        names: all parameters of the model, or all layers if the culprit's places are layers.
        right: earlier stages that were compared and are right.
        direction: `too large`, `too small`, or empty.
    """
    assert culprit.observable is not None
    assert culprit.value is not None
    assert culprit.limit is not None
    observable = OBSERVABLES[culprit.observable]
    where = _told_where(culprit, names, "layers" if observable.items == "layer" else "parameters")
    if right:
        is_one = len(right) == 1 and right[0] not in (Stage.NORMS, Stage.FACTORS)
        where += (
            f", while {' and '.join(_RIGHT[s] for s in right)} {'is' if is_one else 'are'} right"
        )
    is_per_sample = observable.items in ("sample", "sample_parameter")
    is_one = len(culprit.places) <= 1 and (not is_per_sample or len(culprit.samples) == 1)
    shown = share if observable.is_relative else number
    amount = _amount(culprit.value, "by " if is_one else "by up to ", shown)
    explained = (
        f"the threshold is {shown(culprit.limit)}, rounding was not measured"
        if culprit.floor is None
        else f"rounding explains {shown(culprit.limit)}"
    )
    off = _subject(culprit.stage, observable)
    off = off.removesuffix("off").removesuffix("Off") + direction if direction else off
    off = f"{off[:1].upper()}{off[1:]}"
    preposition = "against" if direction else "from"
    evidence = f"{off} {amount} {preposition} {culprit.against} ({explained})"
    return replace(culprit, where=where, evidence=evidence)


def _subject(stage: Stage, observable: Observable) -> str:
    """`Off`, preceded by the observable's name if it is not the stage's result itself."""
    results = (*STAGES.get(stage, (ObservableName.WEIGHTS,))[:1],)
    if observable.name in (*results, ObservableName.SAMPLE_NORM_BY_PARAMETER):
        return "Off"
    title = observable.title.removesuffix(" (distance)")
    return f"{title[0].upper()}{title[1:]} off"


def _amount(value: float, by: str, shown: Callable[[float], str] = share) -> str:
    return "without bound" if math.isinf(value) else f"{by}{shown(value)}"


def _told_where(culprit: Culprit, names: Sequence[str], kind: str = "parameters") -> str:
    when = "" if culprit.step is None else f"at step {culprit.step} of "
    parts = [f"first {when or 'in '}{culprit.regime}"]
    if culprit.places:
        parts.append(f"in {describe(culprit.places, names, kind)}")
    if culprit.inherited:
        parts.append(f"handed on to {len(culprit.inherited)} parameters before it")
    if culprit.sample_group:
        parts.append(f"of {culprit.sample_group}")
    elif culprit.samples:
        shown = ", ".join(map(str, culprit.samples[:_SHOWN]))
        more = f" and {len(culprit.samples) - _SHOWN} more" * (len(culprit.samples) > _SHOWN)
        parts.append(f"of sample{'s' * (len(culprit.samples) > 1)} {shown}{more}")
    if culprit.ranks and not culprit.sample_group:
        which = ", ".join(map(str, culprit.ranks))
        parts.append(f"of rank{'s' * (len(culprit.ranks) > 1)} {which} alone")
    return ", ".join(parts)
