"""Draw the pictures of docs/verdict.md, docs/review.md and docs/records.md from a real group.

    python benchmarks/explanation_pictures.py docs

Launches `GROUP` (about two minutes on two CPU cores), in which one mode is right and two have known
faults, and draws from its comparison: floor.svg, ladder.svg, resolution.svg and sketches.svg.
`--golden FILE` draws from such a group that was exported before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.svg import BLUE, GREY, RED, WIDTH, LogScale, Picture
from dpsgd_track.comparison import compare_group
from dpsgd_track.comparison.diagnose.ladder import StageStatus
from dpsgd_track.comparison.measure.drift import Pair
from dpsgd_track.comparison.measure.excess import excess_of
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.config import ACCURACY, CLIP, Thresholds
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.store.golden import read_golden

ROOT = Path(__file__).resolve().parent.parent
PALE = "#7fb3d5"
EVERY = 3
"""One of so many projections is drawn."""
RIGHT = "flash_fsdp"
WRONG_UPDATE, WRONG_SUM = f"{RIGHT}+momentum_added", f"{RIGHT}+mean_clip_factor"
GROUP = (
    "quick --device cpu --model-name llama-tiny --num-iter 10 --group pictures "
    f"--mode no_dp,{RIGHT},{WRONG_SUM},{WRONG_UPDATE}"
)
COLORS = {StageStatus.OK: BLUE, StageStatus.INTRODUCED: RED, StageStatus.INHERITED: "#e59866"}


def regime_of(comparison: GroupComparison, name: str) -> RegimeComparison:
    return next(regime for regime in comparison.regimes if regime.name == name)


def pair_of(regime: RegimeComparison, mode: str) -> Pair:
    """The comparison of `mode` with the reference."""
    return next(p for p in regime.pairs if (p.mode, p.baseline) == (mode, REFERENCE))


def floor(comparison: GroupComparison) -> Picture:
    """Drift of the clipped sum over the steps: a right and a wrong mode, floor and limit."""
    picture = Picture(
        title="Drift of the clipped sum over ten steps of a right mode, within the limit, and of a "
        "wrong one, far above it",
        **{"left": 56, "top": 30, "width": WIDTH - 72, "height": 250},
    )
    regime, name = regime_of(comparison, ACCURACY), ObservableName.GRADIENT
    right, wrong = pair_of(regime, RIGHT), pair_of(regime, WRONG_UPDATE)
    measured = regime.floor_for(RIGHT, REFERENCE)
    assert measured is not None
    excess = excess_of(right.drifts[name], comparison.thresholds, measured)
    steps, rows = excess.drift.steps, np.arange(len(excess.drift.steps))
    curves = (
        ("wrong mode: momentum 0.9", RED, "none", wrong.drifts[name].per_step),
        ("limit = margin x floor", GREY, "6 4", excess.limits[rows, excess.nearest]),
        ("floor: plain autograd in float32", GREY, "none", plain_drift(regime, name)),
        ("right mode", BLUE, "none", excess.drift.per_step),
    )
    picture.frame()
    bottom, right_edge = picture.top + picture.height, picture.left + picture.width
    y_of = LogScale(-8, 0, bottom, picture.top)
    for power in y_of.powers(2):
        picture.text(picture.left - 6, y_of(10.0**power) + 5, f"1e{power}", anchor="end")
    x_of = {int(step): picture.left + picture.width * (i + 0.5) / len(steps)
            for i, step in enumerate(steps)}  # fmt: skip
    for step, x in x_of.items():
        picture.text(x, bottom + 18, str(step), anchor="middle")
    picture.text((picture.left + right_edge) / 2, bottom + 40, "step", anchor="middle")
    picture.text(4, 18, "difference from the reference, relative")
    shifts = (20, -8, -14, 20)
    for (label, color, dashes, values), shift in zip(curves, shifts, strict=True):
        points = [(x, y_of(float(v))) for x, v in zip(x_of.values(), values, strict=True)]
        picture.line(*points, color=color, dashes=dashes)
        late = [y for _, y in points[len(points) // 2 :]]
        y = max(late) if shift > 0 else min(late)
        picture.text(right_edge, y + shift, label, color=color, anchor="end")
    return picture


def plain_drift(regime: RegimeComparison, name: ObservableName) -> np.ndarray:
    """Drift of plain autograd from the float64 reference at each step."""
    plain = next(pair for title, pair in regime.replays.items() if title.startswith(REFERENCE))
    return np.asarray(plain.drifts[name].per_step)


def ladder(comparison: GroupComparison) -> Picture:
    """Stages of a step in their order, each with its drift over its limit."""
    verdict = next(mode for mode in comparison.modes if mode.label == WRONG_SUM)
    rungs = verdict.ladders[CLIP, REFERENCE]
    rungs = [rung for rung in rungs if rung.value is not None and rung.limit]
    picture = Picture(
        title="Ladder of a mode that weighs samples wrongly: loss, norms and clip factors are "
        "right, the clipped sum introduces the error, later stages inherit it",
        **{"left": 150, "top": 34, "width": WIDTH - 166, "height": 34.0 * len(rungs)},
    )
    picture.frame()
    bottom = picture.top + picture.height
    x_of = LogScale(-4, 4, picture.left, picture.left + picture.width)
    for number, rung in enumerate(rungs):
        assert rung.value is not None
        assert rung.limit
        y = picture.top + 34 * (number + 0.5)
        share, color = rung.value / rung.limit, COLORS.get(rung.status, GREY)
        picture.bar(y, x_of(share), color)
        picture.text(picture.left - 8, y + 5, str(rung.stage), anchor="end")
        is_long = x_of(share) > picture.left + 0.6 * picture.width
        beside = (x_of(share) + 6, "start", color) if not is_long else (0.0, "end", "white")
        x = beside[0] or x_of(share) - 6
        picture.text(x, y + 5, str(rung.status), color=beside[2], anchor=beside[1])
    picture.line((x_of(1), picture.top), (x_of(1), bottom), dashes="6 4")
    picture.text(x_of(1), picture.top - 10, "limit", anchor="middle")
    picture.x_axis(x_of, "difference / its limit", step=2)
    return picture


def resolution(comparison: GroupComparison) -> Picture:
    """Smallest errors that the verdict would have found, beside the fixed thresholds."""
    seen = comparison.seen
    rows: list[tuple[str, float, str]] = []
    for model, each in seen.resolutions.items():
        for quantity, sight in (("norms", each.norms), ("sums", each.sums)):
            rows.append((f"{quantity}, all of {model}", sight.all, BLUE))
            rows.append((f"{quantity}, one parameter", float(np.nanmax(sight.one)), PALE))
    if seen.noise_std is not None:
        rows.append(("std of the noise", seen.noise_std, BLUE))
    picture = Picture(
        title="Resolution of a group in float32: relative errors of norms and sums from 2e-6, and "
        "of the noise's standard deviation from half a percent, would have been found",
        **{"left": 168, "top": 12, "width": WIDTH - 204, "height": 28.0 * len(rows)},
    )
    picture.frame()
    x_of = LogScale(-7, -1, picture.left, picture.left + picture.width)
    for number, (label, value, color) in enumerate(rows):
        y = picture.top + 28 * (number + 0.5)
        picture.bar(y, x_of(value), color)
        picture.text(picture.left - 8, y + 5, label, anchor="end")
        picture.text(x_of(value) + 6, y + 5, f"{value:.1g}", color=color)
    picture.x_axis(x_of, "smallest relative error that is found")
    return picture


def sketches(comparison: GroupComparison) -> Picture:
    """Projections of the clipped sum: a right and a wrong mode less the reference."""
    picture = Picture(
        title="Projections of the clipped sum of two modes less the reference's: those of the "
        "right mode are zero, those of the wrong one scatter, though its samples' norms are right",
        **{"left": 64, "top": 30, "width": WIDTH - 80, "height": 220},
    )
    regime = regime_of(comparison, CLIP)
    records = {run.label: run.trajectory for run in regime.runs if not run.replay}
    right, wrong, ours = (
        record.gradient_sketch[0].ravel()[::EVERY]
        for mode in (RIGHT, WRONG_SUM, REFERENCE)
        if (record := records[mode]) is not None
    )
    across = float(np.nanquantile(np.abs(ours), 0.98))
    along = 1.1 * float(np.nanquantile(np.abs(wrong - ours), 0.98))
    middle = picture.left + picture.width / 2, picture.top + picture.height / 2
    picture.frame()
    picture.line((picture.left, middle[1]), (picture.left + picture.width, middle[1]))
    for theirs, color in ((wrong, RED), (right, BLUE)):
        for x, y in zip(ours.tolist(), (theirs - ours).tolist(), strict=True):
            if abs(x) <= across and abs(y) <= along:
                place = x / across * picture.width / 2, y / along * picture.height / 2
                picture.dot(middle[0] + place[0], middle[1] - place[1], color)
    picture.text(4, 18, "difference from it: ")
    picture.text(130, 18, "right mode", color=BLUE)
    picture.text(210, 18, "wrong mode", color=RED)
    picture.text(picture.left - 6, middle[1] + 5, "0", anchor="end")
    bottom = picture.top + picture.height
    under = "projection of the reference's clipped sum"
    picture.text(middle[0], bottom + 24, under, anchor="middle")
    return picture


PICTURES: dict[str, Callable[[GroupComparison], Picture]] = {
    "floor": floor,
    "ladder": ladder,
    "resolution": resolution,
    "sketches": sketches,
}


def launch(file: Path) -> None:
    """Launch the group, and export it to `file`."""
    folder = file.parent
    subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *GROUP.split()], cwd=folder, check=True
    )
    export = ("pictures", "--export", str(file), "--no-png", "--quiet")
    # It ends with 1: the faults are found.
    subprocess.run([sys.executable, str(ROOT / "compare.py"), *export], cwd=folder, check=False)


def main() -> int:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--golden", type=Path, help="group to draw from (default: a new one)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        golden = chosen.golden or Path(folder, "pictures.dpsgd")
        if chosen.golden is None:
            launch(golden)
        comparison = compare_group(read_golden(golden), Thresholds())
        for name, draw in PICTURES.items():
            text = draw(comparison).svg()
            (chosen.folder / f"{name}.svg").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
