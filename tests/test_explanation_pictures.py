"""The pictures of the pages: drawn from a group, with a text for those who do not see them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.explanation_pictures import GROUP, PICTURES, WRONG_SUM, WRONG_UPDATE
from benchmarks.svg import WIDTH
from dpsgd_track.comparison.result import GroupComparison
from tests.support import ROOT
from tests.support.planned import plan
from tests.support.synthetic_group import compared, healthy_runs, mode_run, scaled, trajectory

_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def comparison() -> GroupComparison:
    wrong = scaled(trajectory(noise_std=0.0), "gradient_sketch", 1.1)
    plain = mode_run("reference", replay="plain")
    updates = [mode_run(WRONG_UPDATE), mode_run(WRONG_UPDATE, "clip")]
    sums = [mode_run(WRONG_SUM), mode_run(WRONG_SUM, "clip", wrong)]
    return compared([*healthy_runs(), plain, *updates, *sums])


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_a_group(name: str, comparison: GroupComparison) -> None:
    drawn = ElementTree.fromstring(PICTURES[name](comparison).svg())
    kept = ElementTree.parse(ROOT / "docs" / f"{name}.svg").getroot()
    for svg in (drawn, kept):
        title = svg.find(f"{_SVG}title")
        assert title is not None
        assert len(title.text or "") > 40
        assert len(svg) > 5
        width = float(svg.attrib["viewBox"].split()[2])
        assert width == WIDTH
        places = [float(text.attrib["x"]) for text in svg.iter(f"{_SVG}text")]
        assert all(0 <= x <= width for x in places)


def test_the_group_has_the_modes_that_are_drawn() -> None:
    modes = {job.mode for job in plan(*GROUP.split()).jobs}
    assert {"reference", "flash_fsdp", WRONG_SUM, WRONG_UPDATE} <= modes
