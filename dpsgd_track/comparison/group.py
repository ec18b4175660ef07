"""Compares all runs of one or two groups, regime by regime, with one algorithm for both.

The pairing chooses the pairs: `baselines` within a group, `earlier` between two.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from dpsgd_track.comparison.baselines import Baselines
from dpsgd_track.comparison.earlier import Earlier
from dpsgd_track.comparison.judge import Measure, judge
from dpsgd_track.comparison.pairing import Matched, Pairing
from dpsgd_track.comparison.result import GroupComparison, Judged, group_sentence, mode_verdict
from dpsgd_track.comparison.seen import seen_in
from dpsgd_track.comparison.verdict import Verdict, worst
from dpsgd_track.comparison.waivers import Waiver, waiver_notes
from dpsgd_track.config import SILENT, Thresholds
from dpsgd_track.record.run import Group, Status


def compare_group(
    group: Group,
    thresholds: Thresholds,
    waivers: Sequence[Waiver] = (),
    today: datetime.date | None = None,
    *,
    all_pairs: bool = True,
) -> GroupComparison:
    """Compare and judge all runs of `group`.

    Args:
        waivers: drifts that are accepted until they expire.
        today: date at which waivers are evaluated (default: the current one).
        all_pairs: compare every two modes, including pairs without a baseline. No verdict depends
            on it.
    """
    today = today or datetime.date.today()
    measure = Measure(thresholds=thresholds, waivers=waivers, today=today)
    return _compare(Baselines(group=group, all_pairs=all_pairs), measure)


def compare_groups(
    before: Group,
    after: Group,
    thresholds: Thresholds,
    waivers: Sequence[Waiver] = (),
    today: datetime.date | None = None,
) -> GroupComparison:
    """Compare each run of `after` with the run of `before` of the same mode, regime and variant.

    A run that is missing from `after` never passes; one that is new in it has no counterpart, and
    its sentence says so. A drift below the bug threshold is INCONCLUSIVE if the two runs'
    environments differ.

    Args:
        waivers: drifts that are accepted until they expire.
        today: date at which waivers are evaluated (default: the current one).
    """
    today = today or datetime.date.today()
    measure = Measure(thresholds=thresholds, waivers=waivers, today=today)
    return _compare(Earlier(before=before, after=after), measure)


def _compare(pairing: Pairing, measure: Measure) -> GroupComparison:
    every: list[Matched] = []
    judged: dict[str, list[Judged]] = {}
    for name in pairing.regimes:
        matched = pairing.match(name)
        every.append(matched)
        for candidate in matched.candidates:
            run = candidate.run
            if run.replay != SILENT or run.status is not Status.FINISHED:
                judged.setdefault(run.title, []).append(judge(candidate, matched, measure))
    modes = tuple(mode_verdict(label, results) for label, results in judged.items())
    regimes = tuple(matched.comparison for matched in every)
    verdict = worst(mode.verdict for mode in modes)
    lacking = pairing.unmatched(every) if verdict is Verdict.PASS else ""
    if lacking or not modes:
        verdict = Verdict.INCONCLUSIVE
    sentence = (
        f"{verdict}: {lacking}."
        if lacking
        else group_sentence(verdict, modes, pairing.agreement(every))
    )
    used = {f.waiver for mode in modes for f in mode.findings if f.waiver}
    return GroupComparison(
        group=pairing.shown(every),
        thresholds=measure.thresholds,
        regimes=regimes,
        modes=modes,
        verdict=verdict,
        sentence=sentence,
        waiver_notes=waiver_notes(measure.waivers, used, measure.today),
        environment_differences=pairing.differences,
        seen=seen_in(
            [mode.resolutions for mode in modes],
            [audit for regime in regimes for audit in regime.audits.values()],
            [run for regime in regimes for run in regime.runs],
        ),
    )
