"""The report in a browser: every control does what it says, by mouse and by keyboard, offline."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from dpsgd_track import StepMetrics, write_training_page
from dpsgd_track.comparison.measure.floor import limits_of
from dpsgd_track.record.judged import JudgedGroup
from dpsgd_track.report.charts import figures
from dpsgd_track.report.html import history_html, html
from dpsgd_track.report.markdown import markdown
from dpsgd_track.report.write import write_report
from tests.support.synthetic_group import compared, healthy_runs, mode_run
from tests.support.synthetic_report import (
    COMMAND,
    GUILTY,
    HOSTILE,
    QUICK,
    broken,
    healthy,
    hostile,
    large,
)

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
]
PHONE = {"width": 390, "height": 800}
# With an inspector attached V8 parses Plotly again for each source position that it would tell:
# half a second of a second and a half, which nobody who reads a report waits for.
FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--js-flags=--no-enable-lazy-source-positions",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", *FLAGS]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {"healthy": healthy(), "broken": broken()}
    for name, comparison in made.items():
        text = html(comparison, figures(comparison))
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def shared(browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    page = opened(browser, reports["broken"], color_scheme="light", reduced_motion="reduce")
    yield page
    page.context.close()


@pytest.fixture
def page(shared: Any) -> Iterator[Any]:
    """The report of a faulty group; a test leaves it as it found it."""
    yield shared
    assert shared.complaints == []


def opened(browser: Any, path: Path, **more: Any) -> Any:
    """A page that is offline and writes down every error and every request."""
    page = browser.new_context(offline=True, **more).new_page()
    page.complaints = []
    page.on("console", lambda m: m.type == "error" and page.complaints.append(m.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (page.complaints.append("dialog"), dialog.dismiss()))
    page.on(
        "request",
        lambda r: r.url.startswith(("file:", "data:", "blob:")) or page.complaints.append(r.url),
    )
    page.goto(path.as_uri())
    return page


def show(page: Any, name: str) -> Any:
    """The chart with that name, with its section unfolded, scrolled to and drawn."""
    chart = page.locator(f".chart[data-name='{name}']")
    chart.evaluate("e => { const part = e.closest('details'); if (part) part.open = true; }")
    # In the middle, where the bar at the top covers nothing of it.
    chart.evaluate("e => e.scrollIntoView({ block: 'center', behavior: 'instant' })")
    page.wait_for_function(
        "name => document.querySelector(`.chart[data-name='${name}']:not([data-stale]) .main-svg`)",
        arg=name,
    )
    return chart


def show_all(page: Any) -> None:
    for name in page.eval_on_selector_all(".chart", "all => all.map(e => e.dataset.name)"):
        show(page, name)


def visible_modes(page: Any, name: str) -> set[str]:
    """Names of the traces of modes that the chart shows."""
    found = page.eval_on_selector(
        f".chart[data-name='{name}']",
        "e => e.data.filter(t => t.meta && t.meta.mode !== undefined && t.visible !== false)"
        ".map(t => t.name)",
    )
    return set(found)


def test_every_chart_is_drawn_offline_in_the_colours_of_the_system(
    browser: Any, reports: dict[str, Path]
) -> None:
    page = opened(browser, reports["broken"], color_scheme="dark", reduced_motion="reduce")
    assert page.locator(".chart").count() > 15
    show_all(page)
    drawn = page.eval_on_selector_all(
        ".chart",
        "all => all.map(e => e.querySelectorAll("
        "'.scatterlayer .trace, .heatmaplayer image, .barlayer .trace').length)",
    )
    assert all(drawn)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(20, 23, 27)"
    inks = page.eval_on_selector_all(
        ".chart .xtick text", "all => all.map(e => getComputedStyle(e).fill)"
    )
    assert set(inks) == {"rgb(230, 233, 237)"}
    assert page.complaints == []
    page.context.close()


def test_a_pass_fits_two_screens_and_its_charts_wait_until_they_are_unfolded(
    browser: Any, reports: dict[str, Path]
) -> None:
    page = opened(browser, reports["healthy"])
    page.wait_for_timeout(300)
    # A PASS is told in words alone, on two screens.
    assert page.locator(".main-svg").count() == 0
    assert page.evaluate("document.documentElement.scrollHeight") < 2 * 900
    page.locator("details#trajectories > summary").click()
    page.wait_for_selector(".chart[data-name='trajectory_accuracy_loss'] .main-svg")
    assert page.locator(".chart[data-name='noise_accuracy'] .main-svg").count() == 0
    page.context.close()


def test_the_first_screen_of_a_bug_has_the_chart_of_the_stage_that_failed(
    browser: Any, reports: dict[str, Path]
) -> None:
    page = opened(browser, reports["broken"], viewport={"width": 1400, "height": 900})
    page.wait_for_selector(".first .main-svg")
    assert page.locator(".main-svg:visible").count() > 0
    assert page.locator(".first .chart").bounding_box()["y"] < 900
    assert page.locator("details.section[open] .chart").count() == 0
    page.context.close()


def test_nothing_on_the_page_offers_to_upload_it(page: Any) -> None:
    show(page, "drift_clip_grad_norm")
    assert page.locator("[role=img] :is(a, button, [tabindex])").count() == 0, "they are not read"
    buttons = page.locator(".modebar-btn").evaluate_all("all => all.map(e => e.dataset.title)")
    assert buttons
    assert not [title for title in buttons if "hare" in (title or "") or "loud" in (title or "")]


def test_a_link_to_a_folded_section_unfolds_it(browser: Any, reports: dict[str, Path]) -> None:
    page = opened(browser, reports["healthy"])
    page.locator("nav a", has_text="Noise audit").click()
    page.wait_for_selector("details#noise[open]")
    assert page.locator("details#drift[open]").count() == 0
    page.goto(f"{reports['healthy'].as_uri()}#drift")
    page.reload()
    assert page.locator("details#drift[open]").count() == 1
    page.context.close()


def test_all_charts_are_drawn_and_all_details_open_on_paper(
    browser: Any, reports: dict[str, Path]
) -> None:
    page = opened(browser, reports["healthy"], color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".chart:not(:has(.main-svg))").count() == 0
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.context.close()


def test_hover_tells_value_threshold_floor_and_place(page: Any) -> None:
    chart = show(page, "drift_clip_sample_norm")
    box = chart.locator(".nsewdrag").first.bounding_box()
    where = chart.evaluate(
        "(e, name) => { const { xaxis, yaxis } = e._fullLayout; "
        "const curve = e._fullData.find(t => t.name === name); "
        "return [xaxis.c2p(curve.x[5]), yaxis.c2p(curve.y[5])]; }",
        GUILTY,
    )
    page.mouse.move(box["x"] + where[0], box["y"] + where[1])
    label = chart.locator(".hovertext").first
    label.wait_for()
    said = label.text_content()
    regime = broken().regimes[1]
    pair, floor = regime.pair(GUILTY), regime.floor()
    assert pair is not None
    assert floor is not None
    drift = pair.drifts["sample_norm"]
    value, place = float(drift.per_step[5]), drift.where_per_step[5]
    of_threshold = f"{value / broken().thresholds.grad_norm:.3g} × the threshold"
    of_floor = f"{value / floor.values['sample_norm']:.1e} × the floor".replace("e+0", "e+")
    limits = limits_of(drift, floor)
    assert limits is not None
    # The label shows two digits, as the guide does of all small numbers.
    of_limit = f"× its limit of {float(limits[5, 0]):.1e}".replace("e-0", "e-")
    for part in (GUILTY, "step 5", f"{value:.3g}", of_limit, of_threshold, of_floor, place):
        assert part in said


def test_zoom_narrows_the_axis_and_double_click_resets_it(page: Any) -> None:
    chart = show(page, "drift_clip_grad_norm")
    box = chart.locator(".nsewdrag").first.bounding_box()

    def reach() -> list[float]:
        return [float(v) for v in chart.evaluate("e => e._fullLayout.xaxis.range")]

    before = reach()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    page.wait_for_function(
        "([name, width]) => { const r = document.querySelector(`.chart[data-name='${name}']`)"
        "._fullLayout.xaxis.range; return r[1] - r[0] < width; }",
        arg=["drift_clip_grad_norm", 0.5 * (before[1] - before[0])],
    )
    page.wait_for_timeout(400)  # or the end of the drag would count as the first of the clicks
    page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function(
        "([name, low]) => Math.abs(document.querySelector(`.chart[data-name='${name}']`)"
        "._fullLayout.xaxis.range[0] - low) < 1e-6",
        arg=["drift_clip_grad_norm", before[0]],
    )
    assert reach() == pytest.approx(before)


def test_a_click_on_the_legend_hides_one_curve(page: Any) -> None:
    chart = show(page, "drift_clip_grad_norm")
    assert chart.locator(".scatterlayer .trace").count() == 3, "two modes and the limit"
    chart.locator(".legendtoggle").first.click()
    page.wait_for_function(
        "document.querySelectorAll(\".chart[data-name='drift_clip_grad_norm'] "
        '.scatterlayer .trace").length === 2'
    )
    chart.locator(".legendtoggle").first.click()


def test_the_mode_filter_hides_a_mode_everywhere_and_brings_it_back(page: Any) -> None:
    show(page, "trajectory_clip_loss")  # one that is drawn before, the others after
    box = page.get_by_role("checkbox", name=GUILTY, exact=True)
    box.uncheck()
    show_all(page)
    names = page.eval_on_selector_all(
        ".chart",
        "all => all.filter(e => !e.dataset.name.startsWith('heatmap')).map(e => e.dataset.name)",
    )
    for name in names:
        shown = visible_modes(page, name)
        assert shown
        assert GUILTY not in shown, name
    heat = page.locator("figure:has(.chart[data-name='heatmap_clip']) [data-control=mode]")
    assert heat.locator("option:checked").inner_text() != GUILTY
    rows = page.locator("[data-mode-row]:visible")
    assert not any(text.startswith(GUILTY) for text in rows.all_inner_texts())
    box.check()
    show(page, "trajectory_clip_loss")
    assert GUILTY in visible_modes(page, "trajectory_clip_loss")
    assert any(text.startswith(GUILTY) for text in rows.all_inner_texts())


def test_a_regime_is_shown_alone(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    page.get_by_role("radio", name="clip", exact=True).check()
    titles = page.locator("figure:visible h3").all_inner_texts()
    assert any(title.endswith("in clip") for title in titles)
    assert not any(title.endswith("in accuracy") for title in titles)
    show(page, "drift_clip_loss")
    page.get_by_role("radio", name="all", exact=True).check()


def test_the_heatmap_turns_to_the_ranks_at_one_step_by_keyboard(page: Any) -> None:
    chart = show(page, "heatmap_clip")
    figure = page.locator("figure:has(.chart[data-name='heatmap_clip'])")
    assert figure.locator("[data-control=mode] option:checked").inner_text() == GUILTY
    assert chart.evaluate("e => e.data[0].z[0].length") == 12 + 1 + 12
    figure.locator("[data-control=view]").select_option("step")
    assert chart.evaluate("e => e.data[0].z[0].length") == 2
    slider = figure.locator("[data-control=step]")
    slider.focus()

    def hottest() -> list[float]:
        found: list[float] = chart.evaluate(
            "e => [0, 1].map(r => Math.max(...e.data[0].z.map(line => line[r])))"
        )
        return found

    page.keyboard.press("ArrowRight")
    assert figure.locator("output").inner_text() == "step 1"
    assert max(hottest()) < 0, "below the limit"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert figure.locator("output").inner_text() == "step 3"
    cool, hot = hottest()
    assert cool < 0 < hot
    figure.locator("[data-control=view]").select_option("steps")
    figure.locator("[data-control=rank]").select_option("1")
    assert chart.evaluate("e => e.data[0].z[0].length") == 12
    figure.locator("[data-control=rank]").select_option("all")


def test_the_theme_button_changes_page_and_charts(page: Any) -> None:
    show(page, "trajectory_accuracy_loss")
    button = page.locator("#theme")
    for theme in ("light", "dark", "system"):
        button.click()
        assert button.inner_text() == f"Theme: {theme}"
        expected = "rgb(20, 23, 27)" if theme == "dark" else "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == expected
        # Charts that are still being drawn above may have moved it out of sight, where it waits.
        show(page, "trajectory_accuracy_loss")
        page.wait_for_function(
            "c => getComputedStyle(document.querySelector("
            "\".chart[data-name='trajectory_accuracy_loss'] .main-svg\")).backgroundColor === c",
            arg=expected,
        )


def test_a_phone_scrolls_in_one_direction_only(browser: Any, reports: dict[str, Path]) -> None:
    page = opened(browser, reports["broken"], viewport=PHONE, reduced_motion="reduce")
    show_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.context.close()


def test_tab_reaches_every_control_and_shows_where_it_is(
    browser: Any, reports: dict[str, Path]
) -> None:
    page = opened(browser, reports["broken"], viewport={"width": 1280, "height": 900})
    show_all(page)
    page.evaluate("scrollTo(0, 0)")
    controls = (
        "a[href], button, input, select, summary, pre, .scroll",
        "all => all.filter(e => e.checkVisibility()).length",
    )
    # Radio buttons of one name are one stop of Tab; arrows move within.
    expected = page.eval_on_selector_all(*controls) - 2
    page.evaluate("window.seen = new Set(); window.unmarked = []")
    for _ in range(expected + 5):
        page.keyboard.press("Tab")
        page.evaluate(
            "(() => { const e = document.activeElement; if (e === document.body) return; "
            "const shown = e.closest('.chip') || e; seen.add(e); "
            "if (getComputedStyle(shown).outlineStyle === 'none') unmarked.push(e.outerHTML); })()"
        )
    assert page.evaluate("unmarked") == []
    assert page.evaluate("seen.size") == expected
    page.context.close()


@pytest.mark.parametrize("name", ["healthy", "broken"])
def test_controls_have_names_headings_descend_and_stops_are_few(
    browser: Any, reports: dict[str, Path], name: str
) -> None:
    page = opened(browser, reports[name], viewport={"width": 1400, "height": 900})
    controls = "a[href], button, input, select, summary, pre, .scroll"
    stops = page.eval_on_selector_all(
        controls, "all => all.filter(e => e.checkVisibility()).length"
    )
    assert stops <= 60
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    nameless = page.eval_on_selector_all(
        f"{controls}, [role=group], [role=region]",
        """all => all.filter(e => {
          const by = e.getAttribute("aria-labelledby");
          const named = by ? document.getElementById(by) : e.labels?.[0] ?? e;
          return !(e.getAttribute("aria-label") || named.textContent).trim();
        }).map(e => e.outerHTML)""",
    )
    assert nameless == []
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(e => +e.tagName[1])")
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    page.context.close()


@pytest.mark.parametrize("width", [1400, 768, 390])
def test_no_table_cuts_a_column(browser: Any, reports: dict[str, Path], width: int) -> None:
    page = opened(browser, reports["broken"], viewport={"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    page.wait_for_timeout(100)
    cut = "all => all.filter(({parentElement: e}) => e.scrollWidth > e.clientWidth + 1)"
    assert page.locator("table").count() > 8
    assert page.eval_on_selector_all("table", f"{cut}.map(e => e.innerText)") == []
    cell = page.locator("#modes ~ .scroll tr[data-mode-row]").first.locator("td").nth(1)
    shown = cell.evaluate("e => getComputedStyle(e, '::before').content")
    assert shown == ('"final loss: "' if width == 390 else "none")
    page.context.close()


def test_the_command_is_copied_by_keyboard(browser: Any, reports: dict[str, Path]) -> None:
    page = opened(browser, reports["healthy"], permissions=["clipboard-read", "clipboard-write"])
    page.locator("button.copy").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('copied').textContent === 'Copied.'")
    what, command = page.evaluate("navigator.clipboard.readText()").split("\n")
    assert command == COMMAND
    assert what.startswith("# dpsgd-track ")
    page.context.close()


def test_hostile_names_are_inert_in_the_browser(browser: Any, tmp_path: Path) -> None:
    write_report(hostile(), tmp_path, png=False)
    for path in (tmp_path / "report.html", tmp_path / "loss_trajectory.html"):
        page = opened(browser, path, reduced_motion="reduce")
        show_all(page)
        assert page.locator("img").count() == 0
        assert page.locator(".chart a").count() == 0
        assert HOSTILE in page.locator("h1").first.inner_text()
        for box in page.locator("input[name=mode]").all():
            box.uncheck()
        assert page.complaints == []
        page.context.close()


def test_marks_for_writing_direction_turn_nothing_around(browser: Any, tmp_path: Path) -> None:
    runs = [*healthy_runs(), mode_run("m:\u202eSSAP\u2066\n$(rm)", "clip")]
    write_report(compared(runs), tmp_path, png=False)
    page = opened(browser, tmp_path / "report.html")
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.content())
    assert "m:\ufffdSSAP" in page.locator("main").inner_text()
    page.context.close()


def test_the_largest_report_is_interactive_within_two_seconds(browser: Any, tmp_path: Path) -> None:
    comparison = large(steps=800)
    path = tmp_path / "large.html"
    path.write_text(html(comparison, figures(comparison)), encoding="utf-8")
    assert path.stat().st_size < 6e6
    taken: list[float] = []
    # Other work on the machine only ever adds: of three times the least is the page's own.
    while len(taken) < 3 and min(taken, default=9) > 2:
        taken.append(_seconds_until_a_click_is_answered(browser, path))
    assert min(taken) < 2


def _seconds_until_a_click_is_answered(browser: Any, path: Path) -> float:
    """Seconds of the page's own thread, with the first chart drawn before the click."""
    page = browser.new_context(offline=True).new_page()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_function("document.documentElement.dataset.firstChart")
    page.get_by_role("checkbox", name=QUICK[1], exact=True).uncheck()
    row = page.locator(f"tr[data-mode-row]:has(th:text-is('{QUICK[1]}'))").first
    assert not row.is_visible()
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    page.context.close()
    return float(metrics["ThreadTime"])


# What GitHub gives a comment, and how it lays out its text and tables.
COLUMN = """
<!doctype html><style>
main { width: 760px; font: 14px/1.5 Helvetica, Arial, sans-serif; overflow-wrap: break-word; }
table { display: block; width: max-content; max-width: 100%; border-collapse: collapse; }
td, th { padding: 6px 13px; border: 1px solid; }
</style><main>"""


@pytest.mark.parametrize("made", [broken, hostile], ids=lambda made: made.__name__)
def test_no_table_of_a_comment_is_wider_than_githubs_column(browser: Any, made: Any) -> None:
    render = MarkdownIt("commonmark", {"html": True}).enable("table").render
    page = browser.new_page()
    page.set_content(f"{COLUMN}{render(markdown(made()))}")
    page.eval_on_selector_all("details", "all => all.forEach(e => { e.open = true; })")
    wide = "all => all.filter(e => e.scrollWidth > 760).map(e => e.rows[0].innerText)"
    assert page.locator("table").count() > 4
    assert page.eval_on_selector_all("table", wide) == []
    page.close()


def test_the_history_is_a_page_like_the_report(browser: Any, tmp_path: Path) -> None:
    groups = [
        JudgedGroup(
            name=f"quick-{number}",
            start_time_ms=number,
            revision=f"{number}abcdef0",
            verdict="PASS" if number < 11 else "BUG",
            drifts={"loss": 0.1, "clipped sum": 10.0 ** (number - 10)},
            costs={"flash_fsdp": 1.2 + number / 100},
        )
        for number in range(12)
    ]
    path = tmp_path / "history.html"
    path.write_text(history_html("an experiment", groups), encoding="utf-8")
    page = opened(browser, path, viewport=PHONE, reduced_motion="reduce")
    show_all(page)
    assert page.locator(".chart").count() == 2
    limit = page.eval_on_selector(
        ".chart[data-name=history_drifts]",
        "e => Array.from(e._fullData.find(t => t.name === 'limit').y)",
    )
    assert limit == [1] * 12
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.locator(".banner.BUG").is_visible()
    assert page.complaints == []
    page.context.close()


def test_the_curves_of_a_training_are_drawn_on_a_phone(browser: Any, tmp_path: Path) -> None:
    steps = [
        StepMetrics(step=step, loss=2 / step, clip_fraction=1 / step, epsilon=step**0.5, delta=1e-5)
        for step in range(1, 61)
    ]
    path = write_training_page(steps, tmp_path / "training.html", title="Digits")
    page = opened(browser, path, viewport=PHONE)
    chart = show(page, "training")
    assert chart.locator(".scatterlayer .trace").count() == 5
    for title in ("loss", "samples clipped", "epsilon"):
        assert chart.locator(".annotation-text", has_text=title).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.complaints == []
    page.context.close()


def test_filters_and_open_sections_are_in_the_address(
    browser: Any, reports: dict[str, Path]
) -> None:
    page = opened(browser, reports["broken"], reduced_motion="reduce")
    modes = page.eval_on_selector_all(
        "input[name=mode]", "all => all.map(e => e.closest('label').textContent.trim())"
    )
    page.get_by_label(modes[0], exact=True).uncheck()
    page.locator("input[name=regime][value=clip]").check()
    page.locator("details#noise > summary").click()
    page.wait_for_function("location.hash.includes('open=noise')")
    assert "regime=clip" in page.url
    again = opened(browser, reports["broken"], reduced_motion="reduce")
    again.goto(page.url)
    for shown in (page, again):
        shown.wait_for_function("document.querySelector('#noise').open")
        assert not shown.get_by_label(modes[0], exact=True).is_checked()
        assert shown.get_by_label(modes[1], exact=True).is_checked()
        assert shown.locator("#modes ~ .scroll tr[data-mode-row='0']").first.is_hidden()
        assert shown.locator("[data-regime=accuracy]").first.is_hidden()
    page.locator("#all-modes").click()
    page.locator("input[name=regime][value='']").check()
    page.locator("details#noise > summary").click()
    page.wait_for_function("!location.hash")
    # An address that is no state leads where it always did.
    page.goto(f"{reports['broken'].as_uri()}#compared")
    page.wait_for_function("document.querySelector('#compared').open")
    page.goto(f"{reports['broken'].as_uri()}#modes")
    assert page.url.endswith("#modes")
    assert page.complaints == again.complaints == []
    page.context.close()
    again.context.close()


def test_an_anchor_is_not_hidden_by_the_bar(browser: Any, reports: dict[str, Path]) -> None:
    narrow = {"width": 560, "height": 900}
    page = opened(browser, reports["broken"], viewport=narrow, reduced_motion="reduce")
    page.locator("nav a", has_text="Stages").click()
    page.wait_for_timeout(200)
    bar, heading = (page.locator(at).bounding_box() for at in (".bar", "#ladder"))
    assert heading["y"] >= bar["y"] + bar["height"]
    page.context.close()


def test_charts_are_as_wide_as_the_paper(browser: Any, reports: dict[str, Path]) -> None:
    page = opened(browser, reports["broken"], viewport={"width": 1400, "height": 900})
    page.wait_for_selector(".first .main-svg")  # drawn before, at the width of the screen
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.eval_on_selector_all(
        ".chart .main-svg:first-of-type", "all => all.map(e => e.getBoundingClientRect().width)"
    )
    assert len(widths) > 15
    assert max(widths) <= 186 / 25.4 * 96 + 1, "whole pixels"
    page.context.close()
