"""`report.html` and single charts as HTML, each one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from dpsgd_track.comparison.audit.noise.check import NoiseAudit
from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.observables import STAGES
from dpsgd_track.comparison.profile import Profile, profile_of
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.config import NOISE, PROBE, is_probe, kind_of
from dpsgd_track.record.judged import JudgedGroup
from dpsgd_track.record.run import Group
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.report import history, profile_table
from dpsgd_track.report.charts import Chart, Style
from dpsgd_track.report.charts.history import history_charts
from dpsgd_track.report.charts.profile import SECTION as PROFILE_SECTION
from dpsgd_track.report.environment import command, environment
from dpsgd_track.report.guarantee import guarantees
from dpsgd_track.report.stages import (
    SYMBOLS,
    VERDICT_SYMBOLS,
    accepted,
    advice,
    capitalised,
    more,
    stage_tables,
)
from dpsgd_track.report.table import (
    HEADINGS,
    consistency,
    floors,
    not_computed,
    rows,
    without_replays,
)
from dpsgd_track.visible_text import visible

SECTIONS = (
    ("trajectories", "Trajectories", "Trajectories", "No run recorded a step."),
    ("drift", "Drift by observable", "Drift", "No two runs could be compared."),
    (
        "heatmap",
        "Where: parameter, rank and step",
        "Where",
        "Left out: no two runs recorded per-sample norms by parameter.",
    ),
    ("samples", "Sample by sample", "Samples", "Left out: no two runs recorded per-sample norms."),
    ("noise", "Noise audit", "Noise audit", "Left out: no mode's own noise was audited."),
)
"""(identifier, heading, short heading, text shown when there is no chart)."""


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("dpsgd_track.report"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["as_sentence"] = _as_sentence
    return templates


def _as_sentence(text: str) -> str:
    """`text` with a capital, unless it begins with a name, and with one full stop."""
    first = text.split(" ", 1)[0]
    begun = text[:1].upper() + text[1:] if first.replace("-", "").isalpha() else text
    return f"{begun.rstrip('.')}."


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # the library's own code, not a name from a run


def chart_data(chart: Chart) -> str:
    """Data of `chart` for the page, as JSON in which equal arrays are stored once.

    An array is kept under `arrays`, and `{"$": i}` stands in its place.
    """
    places: dict[str, int] = {}

    def place(value: Any) -> dict[str, int]:
        return {"$": places.setdefault(json.dumps(value, separators=(",", ":")), len(places))}

    def shared(value: Any) -> Any:
        if isinstance(value, Mapping):
            if value.keys() >= {"dtype", "bdata"}:
                return place(value)
            return {key: shared(item) for key, item in value.items()}
        if not isinstance(value, list):
            return value
        if len(value) > 2 and all(isinstance(item, str) for item in value):
            return place(value)
        return [shared(item) for item in value]

    document = shared(json.loads(chart.figure.to_json()))
    document["arrays"] = [json.loads(text) for text in places]
    if chart.cube:
        document["cube"] = chart.cube
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _data(chart: Chart) -> Markup:
    # Inside a script element only `<` can end it or open a comment.
    return Markup(chart_data(chart).replace("<", "\\u003c"))


def html(comparison: GroupComparison, charts: Sequence[Chart]) -> str:
    """The whole report, with `charts` in their order."""
    group = comparison.group
    sections = (*(section for section, *_ in SECTIONS), PROFILE_SECTION)
    every = rows(comparison)
    modes, replays = without_replays(every)
    audits = [audit for regime in comparison.regimes for audit in regime.audits.values()]
    first = _first_chart(comparison, charts)
    rest = [chart for chart in charts if chart is not first]
    # Failing regimes first.
    failing = {mode.culprit.regime for mode in comparison.modes if mode.culprit}
    rest.sort(key=lambda chart: bool(failing) and chart.regime not in failing)
    return _report(
        "report.html",
        group,
        Style.of(comparison),
        profile_of(group),
        comparison=comparison,
        advice=advice(comparison),
        facts=_facts(comparison, num_replays=len(every) - len(modes)),
        symbols=VERDICT_SYMBOLS,
        headings=HEADINGS,
        rows=modes,
        replays=replays,
        first_chart=first,
        sentence=capitalised(comparison),
        summary_of=_summary_of,
        more=more,
        stages=tuple(Stage),
        stage_tables=stage_tables(comparison),
        stage_symbols=SYMBOLS,
        sections=SECTIONS,
        charts_of={name: [c for c in rest if c.section == name] for name in sections},
        audits=audits,
        audited=_audited(audits),
        number=number,
        waived=accepted(comparison),
        not_computed=not_computed(comparison),
        floors=floors(comparison),
        consistency=consistency(comparison),
        guarantees=guarantees(group),
    )


def _first_chart(comparison: GroupComparison, charts: Sequence[Chart]) -> Chart | None:
    """The chart of the stage that went wrong in the leading mode; None where nothing did."""
    culprit = comparison.leading.culprit if comparison.leading else None
    if culprit is None:
        return None
    told = [culprit.observable, *STAGES.get(culprit.stage, ())]
    names = [f"drift_{culprit.regime}_{observable}" for observable in told]
    names += [f"samples_{culprit.regime}"]
    if culprit.stage is Stage.NOISE:
        regimes = [regime.name for regime in comparison.regimes if kind_of(regime.name) == NOISE]
        names = [*(f"noise_{regime}" for regime in (*regimes, culprit.regime)), *names]
    if culprit.observable is ObservableName.SAMPLE_NORM_BY_PARAMETER:
        names = [f"heatmap_{culprit.regime}", *names]
    known = {chart.name: chart for chart in charts}
    return next((known[name] for name in names if name in known), None)


def profile_html(profile: Profile, group: Group, charts: Sequence[Chart]) -> str:
    """The whole report of a group that holds only a profile."""
    facts = profile_table.facts(profile, group)
    style = Style.of_group(group)
    return _report("profile.html", group, style, profile, facts=facts, charts=charts)


def history_html(experiment: str, groups: Sequence[JudgedGroup]) -> str:
    """The history of an experiment as a page; `groups` come oldest first."""
    return _page(
        "history.html",
        experiment,
        groups=groups,
        charts=history_charts(groups, history.STAGES),
        last=history.verdict_of(groups[-1]),
        since=history.since(*groups[-2:]) if len(groups) > 1 else "",
        headings=history.HEADINGS,
        cells=history.cells,
        verdict_of=history.verdict_of,
        legend=history.LEGEND,
        symbols=VERDICT_SYMBOLS,
    )


def chart_html(chart: Chart, group: str) -> str:
    """One chart as a page of its own."""
    return _page("chart.html", group, chart=chart)


def training_html(chart: Chart, title: str, facts: Sequence[str]) -> str:
    """The curves of a training as a page."""
    return _page("training.html", title, chart=chart, facts=facts)


def _report(
    template: str, group: Group, style: Style, profile: Profile | None, **more: object
) -> str:
    return _page(
        template,
        group.name,
        group=group,
        started=f"{datetime.fromtimestamp(group.start_time_ms / 1000, tz=UTC):%Y-%m-%d %H:%M} UTC",
        style=style,
        mode_of={run.title: style.index(run.label) for run in (*group.runs, *group.timed_runs)},
        profile=profile,
        profile_table=profile_table,
        environment=environment(group),
        command=command(group),
        **more,
    )


def _page(template: str, group_name: str, **more: object) -> str:
    page = _templates().get_template(template)
    return page.render(plotly=_plotly(), data=_data, group_name=group_name, **more)


def _summary_of(charts: Sequence[Chart]) -> str:
    """`3 charts, of accuracy and clip`; empty for none."""
    regimes = list(dict.fromkeys(chart.regime for chart in charts if chart.regime))
    many = f"{len(charts)} chart{'s' * (len(charts) != 1)}" if charts else ""
    return f"{many}, of {', '.join(regimes)}" if regimes else many


def _audited(audits: Sequence[NoiseAudit]) -> str:
    """`all 3 audits passed`; empty for none."""
    bad = sum(bool(audit.failed) for audit in audits)
    if bad:
        return f"wrong noise in {bad} of {len(audits)} audits"
    if len(audits) > 1:
        return f"all {len(audits)} audits passed"
    return "the audit passed" if audits else ""


def _facts(comparison: GroupComparison, *, num_replays: int) -> list[str]:
    """The evidence behind the verdict, in a few words each."""
    group = comparison.group
    # The runs of an earlier group are shown too, and are not judged.
    titles = {mode.label for mode in comparison.modes}
    judged = len({run.label for run in group.runs if run.title in titles})
    steps = {run.trajectory.num_steps for run in group.runs if run.trajectory}
    names = ", ".join(regime.name for regime in comparison.regimes)
    facts = [f"{judged} mode{'s' * (judged != 1)}"]
    if names:
        facts.append(f"regime{'s' * (len(comparison.regimes) != 1)} {names}")
    if any(is_probe(regime.name) for regime in comparison.regimes):
        facts.append(f"{PROBE}…: on a small model that lets known faults show")
    if steps:
        facts.append(
            f"{'up to ' * (len(steps) > 1)}{max(steps):,} step{'s' * (max(steps) != 1)} each"
        )
    floor = f"rounding measured by {num_replays} replay{'s' * (num_replays != 1)}"
    facts.append(floor if num_replays else "rounding was not measured")
    return facts
