"""The report's files: complete, inert whatever the names, and readable in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpsgd_track.comparison import GroupComparison, compare_group
from dpsgd_track.config import PROBE_ACCURACY, PROBE_CLIP, Thresholds
from dpsgd_track.record.run import ModeRun
from dpsgd_track.report import png
from dpsgd_track.report.charts import ZERO, figures
from dpsgd_track.report.drift_document import DRIFT
from dpsgd_track.report.drift_json import drift_json
from dpsgd_track.report.html import html
from dpsgd_track.report.markdown import LIMIT, markdown, note
from dpsgd_track.report.table import main_regime, rows, without_replays
from dpsgd_track.report.text import print_table, summary
from dpsgd_track.report.write import folder_name, write_report
from tests.support.synthetic_group import (
    compared,
    failed,
    group_of,
    healthy_runs,
    job,
    mode_run,
    plan_of,
    put,
    scaled,
    setup,
    trajectory,
    with_run,
    without_norms,
)
from tests.support.synthetic_report import hostile

FILES = {
    "report.html",
    "report.md",
    "summary.txt",
    "drift.json",
    "junit.xml",
    "annotations.txt",
    "loss_trajectory.html",
    "gradient_norm_comparison.html",
    "final_loss_comparison.html",
}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def with_probe(*, factor: float = 1.0) -> GroupComparison:
    """A healthy group that was run on the probe as well, where a norm of one mode is off."""
    trained = put(trajectory(), "loss", 99.0)
    on_probe = [
        mode_run("no_dp", PROBE_ACCURACY, without_norms(trained)),
        mode_run("flash_fsdp", PROBE_ACCURACY, trained),
        mode_run("reference", PROBE_ACCURACY, trained),
        mode_run("reference", PROBE_CLIP),
        mode_run("flash_fsdp", PROBE_CLIP),
        mode_run(
            "flash_fsdp_fuse", PROBE_CLIP, scaled(trajectory(noise_std=0.0), "sample_norm", factor)
        ),
    ]
    # First, so that it is no matter of order what is quoted.
    return compared([*on_probe, *healthy_runs()])


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "PASS"), (1.5, "BUG")])
def test_regimes_on_the_probe_are_in_every_form_of_the_report(
    factor: float, verdict: str, tmp_path: Path
) -> None:
    comparison = with_probe(factor=factor)
    assert comparison.verdict.value == verdict
    assert {r.name for r in comparison.regimes} == {
        "accuracy",
        "clip",
        PROBE_ACCURACY,
        PROBE_CLIP,
    }
    write_report(comparison, tmp_path, png=False)
    for name in ("report.html", "report.md", "summary.txt", "drift.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert PROBE_CLIP in text, name
        assert verdict in text, name
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "on a small model that lets known faults show" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    charts = {chart.name for chart in figures(comparison)}
    for name in [name for name in charts if "_clip" in name and PROBE_CLIP not in name]:
        assert name.replace("_clip", f"_{PROBE_CLIP}") in charts
    guilty = next(mode for mode in comparison.modes if mode.label == "flash_fsdp_fuse")
    assert guilty.verdict.value == verdict
    assert PROBE_CLIP in guilty.sentence


def test_losses_and_times_are_quoted_from_the_users_own_model() -> None:
    comparison = with_probe()
    assert comparison.regimes[0].name == PROBE_ACCURACY
    main = main_regime(comparison)
    assert main is not None
    assert main.name == "accuracy"
    assert {row.final_loss for row in rows(comparison)} == {6.5}
    # Where only the probe was run there is nothing else to quote from.
    probe_alone = replace(
        comparison, regimes=tuple(r for r in comparison.regimes if r.name.startswith("probe-"))
    )
    main = main_regime(probe_alone)
    assert main is not None
    assert main.name == PROBE_ACCURACY


def test_the_summary_has_the_known_tests_analysis_over_all_modes_of_its_regime() -> None:
    def moved(mode: str, loss: float, norm: float) -> ModeRun:
        record = put(trajectory(), "grad_norm", norm)
        return mode_run(mode, record=put(record, "loss", loss, -1))

    runs = [
        moved("no_dp", 2.0, 4.0),
        moved("flash_fsdp", 2.5, 4.0),
        moved("reference", 3.0, 7.0),
        # A replay is no mode, and another regime's losses are no accuracy test's.
        replace(moved("no_dp", 9.0, 9.0), replay="permuted"),
        mode_run("ghost_fsdp", "clip", put(trajectory(noise_std=0.0), "loss", 99.0)),
    ]
    text = summary(compared(runs))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    at = lines.index("CONSISTENCY ANALYSIS")
    assert "no_dp 2.000000 4.000000 FINISHED" in lines[:at]
    assert lines[at + 1 : at + 4] == [
        "Final loss: mean 2.500000 std 0.408248 max diff 1.000000",
        "Average gradient norm: mean 5.000000 std 1.414214 max diff 3.000000",
        "",
    ]
    for value, shown in ((np.nan, "mean nan std nan max diff nan"), (np.inf, "mean inf std nan")):
        assert f"Final loss: {shown}" in " ".join(
            summary(compared([moved("no_dp", 2.0, 4.0), moved("flash", value, 4.0)])).split()
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    wrong = scaled(trajectory(noise_std=0.0), "layer_grad_norm", 1.1, (2, 1))
    write_report(
        compared(with_run(healthy_runs(), mode_run("flash_fsdp", "clip", wrong))), folder, png=False
    )
    return folder


def test_all_files_are_written(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == FILES
    assert (written / "report.html").stat().st_size < 6e6


def test_html_asks_for_nothing_from_a_network(written: Path) -> None:
    plotly = re.compile(r"<script>/\*\*.*?</script>", re.DOTALL)
    for path in written.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "default-src 'none'" in text
        assert text.count("plotly.js v") == 1
        own = plotly.sub("", text)
        assert len(own) < 1e6
        assert not re.findall(r"""(?:src|href)=["'](?!#)""", own)


def test_report_names_the_verdict_first(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert text.startswith("## ❌ BUG: do not merge\n\n- **What:** flash\\_fsdp computes a wrong")
    summary_text = (written / "summary.txt").read_text(encoding="utf-8")
    assert re.search(r"^mode +final loss +average gradient norm", summary_text, re.MULTILINE)
    assert re.search(r"^regime +modes +observable +mean +std +max", summary_text, re.MULTILINE)


@pytest.mark.parametrize(
    ("regime", "epsilon", "noise_from", "said"),
    [
        ("accuracy", 5449.455, "seed", "epsilon = 5449 at delta = 1e-05: no privacy. It is there"),
        ("accuracy", 1.5, "seed", "epsilon = 1.5 at delta = 1e-05. It is there to be compared"),
        ("train", 1.5, "seed", "epsilon = 1.5 at delta = 1e-05. It comes from the seed"),
        ("train", 1.5, "os", "The noise of train gives epsilon = 1.5 at delta = 1e-05."),
    ],
)
def test_every_form_of_the_report_says_what_the_noise_promises(
    regime: str, epsilon: float, noise_from: str, said: str
) -> None:
    metrics = {"epsilon_rdp": 2 * epsilon, "epsilon_prv": epsilon}
    planned = job("flash", setup(regime), noise_from=noise_from)
    runs = [mode_run("no_dp", regime), mode_run("flash", regime, metrics=metrics, job=planned)]
    comparison = compared(runs)
    console = Console(width=200, file=io.StringIO())
    print_table(comparison, console)
    for text in (
        summary(comparison),
        markdown(comparison),
        html(comparison, []),
        console.file.getvalue(),
    ):
        assert text.count("The noise of") == 1
        assert said in text
    silent = compared([mode_run("no_dp", regime), mode_run("flash", regime)])
    assert "The noise of" not in summary(silent)


def test_drift_json_is_strict_and_versioned() -> None:
    record = put(trajectory(noise_std=0.0), "loss", np.nan, 1)
    record = put(record, "grad_norm", np.inf, 1)
    comparison = compared(with_run(healthy_runs(), mode_run("flash_fsdp", "clip", record)))

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    document = json.loads(drift_json(comparison), parse_constant=refuse)
    assert (document["schema"], document["schema_version"]) == (
        "dpsgd-track/drift",
        DRIFT.version,
    )
    pair = next(p for p in document["regimes"][1]["pairs"] if p["mode"] == "flash_fsdp")
    assert pair["drifts"]["loss"]["per_step"] == [0, None, 0, 0]
    assert pair["drifts"]["grad_norm"]["max"] == "Infinity"
    assert document["verdict"] == "BUG"
    assert document["regimes"][0]["floors"]["no_dp"]["values"]["loss"] == 0


def test_names_are_inert_in_html() -> None:
    comparison = hostile()
    text = html(comparison, figures(comparison))
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert "<img" not in own
    assert "<script>alert" not in own
    # Within Plotly's JSON, `<` is escaped twice: once for JSON in HTML, once for Plotly.
    assert "\\u003cimg" not in own
    assert "&lt;img" in own


def test_names_are_inert_in_markdown() -> None:
    for text in (markdown(hostile()), note(hostile())):
        outside_code = re.sub(r"^(`{3,})sh$.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert "<img" not in outside_code
        assert "<script" not in outside_code
        assert not re.search(r"(?<!\\)\]\(", outside_code)
        assert "@you" not in outside_code
        assert not re.search(r"(?<!\\)`", outside_code)
        table = [line for line in outside_code.splitlines() if line.startswith("| ")]
        heading = len(re.findall(r"(?<!\\)\|", table[0]))
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]} == {heading}


def test_control_characters_do_not_reach_the_terminal() -> None:
    runs = [mode_run("reference", "clip"), mode_run("m:\x1b[2J\r", "clip")]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", summary(compared(runs)))


@pytest.mark.parametrize("width", [60, 80, 110, 160])
def test_terminal_table_keeps_names_and_numbers_whole(width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    lost = mode_run("flash_fsdp_fuse_bk", "clip", status="KILLED")
    comparison = compared([*healthy_runs(), lost])
    print_table(comparison, console)
    table = console.export_text().split("└")[0]
    modes, replays = without_replays(rows(comparison))
    for row in modes:
        assert f" {row.label} " in table
    assert "replay" in replays
    assert "(again)" not in table
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= width
    assert ("mean grad norm" in table) == (width > 110)


def long_group(num_modes: int) -> GroupComparison:
    """Modes with long names full of what Markdown escapes, all with a BUG."""
    wrong = scaled(trajectory(noise_std=0.0), "grad_norm", 1.1)
    runs = [mode_run("reference", "clip")]
    runs += [mode_run(f"mode{i}:{'<|x' * 300}", "clip", wrong) for i in range(num_modes)]
    plan = plan_of(runs, command="[x](y)" * 1_000)
    return compare_group(group_of(runs, plan=plan), Thresholds())


@pytest.mark.parametrize("num_modes", [2, 20, 70])
def test_comment_leaves_whole_sections_out_where_it_is_too_long(num_modes: int) -> None:
    text = markdown(long_group(num_modes))
    assert len(text) < LIMIT
    assert text.count("<details>") == text.count("</details>")
    assert text.startswith("## ❌ BUG: do not merge\n\n- **What:** mode0")
    tables = re.findall(r"(?:^\| .* \|$\n?)+", text, re.MULTILINE)
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1
    left_out = re.search(r"^_Left out for length: (.*)\. report", text, re.MULTILINE)
    assert bool(left_out) == (num_modes > 2)
    if left_out:
        for title in left_out.group(1).split(", "):
            assert f"<summary>{title}</summary>" not in text


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("quick-20260101", "quick-20260101"),
        ("../../etc", r"etc-[0-9a-f]{8}"),
        ("..", r"group-[0-9a-f]{8}"),
        ("a/b", r"a-b-[0-9a-f]{8}"),
        ("x" * 300, r"x{80}-[0-9a-f]{8}"),
    ],
)
def test_group_name_is_one_safe_folder(name: str, folder: str) -> None:
    assert re.fullmatch(folder, folder_name(name))


def test_two_group_names_never_share_a_folder() -> None:
    assert folder_name("a/b") != folder_name("a:b") != folder_name("a-b")


def test_exact_zero_is_visible_on_the_log_axis() -> None:
    chart = next(c for c in figures(compared(healthy_runs())) if c.name == "drift_clip_grad_norm")
    curve = chart.figure.data[0]
    assert set(curve.y.tolist()) == {float(np.float32(ZERO))}
    assert ZERO in chart.figure.layout.yaxis.tickvals


def test_modes_differ_in_colour_dash_marker_and_size() -> None:
    figure = figures(compared(healthy_runs()))[0].figure
    curves = [c for c in figure.data if c.xaxis == "x"]
    for look in ("line.color", "line.dash", "marker.symbol", "marker.size"):
        assert len({str(c[look]) for c in curves}) == len(curves)


def test_group_without_any_record_still_has_a_report(tmp_path: Path) -> None:
    dead = [
        mode_run("no_dp", status="FAILED", failure=failed("no GPU")),
        mode_run("x", status="MISSING"),
    ]
    files = write_report(compared(dead), tmp_path, png=True)
    assert {path.name for path in files} == {name for name in FILES if "_" not in name}
    assert "no GPU" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_run_with_nothing_but_nan_still_has_a_report(tmp_path: Path) -> None:
    record = trajectory(noise_std=0.0)
    for field in record.__dataclass_fields__:
        if getattr(getattr(record, field), "dtype", np.dtype(int)).kind == "f":
            record = put(record, field, np.nan)
    runs = with_run(healthy_runs(), mode_run("flash_fsdp", "clip", record))
    comparison = compared(with_run(runs, mode_run("flash_fsdp", "accuracy", record)))
    write_report(comparison, tmp_path, png=False)
    assert comparison.verdict == "BUG"


def test_missing_browser_is_one_line_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "absent"))
    monkeypatch.setattr("choreographer.browsers.chromium.Chromium.find_browser", lambda **_: None)
    said: list[str] = []
    stale = tmp_path / "loss_trajectory.png"
    stale.write_bytes(b"of an earlier report")
    files = write_report(compared(healthy_runs()), tmp_path, png=True, tell=said.append)
    assert {path.name for path in files} == FILES
    assert not stale.exists()
    assert len(said) == 1
    assert said[0].startswith("PNG charts skipped: ")
    assert "apt-get install chromium and pip install 'kaleido>=1'" in said[0]
    assert "\n" not in said[0]


def test_missing_kaleido_is_one_line_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    charts = figures(compared(healthy_runs()))
    with pytest.raises(png.PngSkipped, match="Kaleido is not installed"):
        png.write_png(charts, Path())


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")


@pytest.mark.browser
@needs_chromium
def test_png_charts_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    files = write_report(compared(healthy_runs()), tmp_path, png=True)
    pictures = [path for path in files if path.suffix == ".png"]
    assert len(pictures) == 3
    for path in pictures:
        with Image.open(path) as image:
            assert image.width >= 1000
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_contrasts_with_every_ground_it_stands_on(theme: str) -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1."""
    css = (files("dpsgd_track.report") / "templates" / "page.css").read_text(encoding="utf-8")
    block = re.search(rf"color-scheme: {theme};(.*?)\n}}", css, re.DOTALL)
    assert block is not None
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block[1]))
    verdicts = ("PASS", "DRIFT", "BUG", "INCONCLUSIVE")
    stands = [(ink, ground) for ink in ("ink", "soft") for ground in ("ground", "raised")]
    stands += [(ink, "ground") for ink in (*verdicts, "link")]
    stands += [(ink, f"{verdict}-tint") for verdict in verdicts for ink in ("ink", "soft", verdict)]
    for ink, ground in stands:
        darker, lighter = sorted(_luminance(colours[name]) for name in (ink, ground))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (ink, ground)
