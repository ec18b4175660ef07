"""`junit.xml`: a test case for each mode, regime and stage, for CI that reads the JUnit format.

A suite is one regime. Each mode has a case `verdict`, which fails for BUG and DRIFT and is an
error for INCONCLUSIVE, and a case for each stage: the stage that introduced an error fails, one
that inherits it or was not compared is skipped. Some suite has a failure or an
error if and only if the group does not pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from dpsgd_track.comparison.diagnose.culprit import Culprit
from dpsgd_track.comparison.diagnose.ladder import StageStatus
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict
from dpsgd_track.comparison.verdict import FAILURES, worst
from dpsgd_track.report.stages import Cell, stage_tables
from dpsgd_track.visible_text import visible

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(comparison: GroupComparison) -> str:
    """The comparison as JUnit XML."""
    root = ET.Element("testsuites", name=_text(f"dpsgd-track {comparison.group.name}"))
    regimes = [regime.name for regime in comparison.regimes]
    for name in regimes:
        suite = ET.SubElement(root, "testsuite", name=_text(name))
        titles = {run.title for run in comparison.group.runs if run.regime == name}
        modes = [mode for mode in comparison.modes if mode.label in titles]
        for mode in modes:
            _verdict_case(suite, mode, name)
        _stage_cases(suite, comparison, name, modes)
        _count(suite)
    if not regimes:
        suite = ET.SubElement(root, "testsuite", name="group")
        _outcome(_case(suite, "group", "verdict"), "error", comparison.sentence)
        _count(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _text(text: str) -> str:
    return _NOT_IN_XML.sub("\ufffd", visible(text))


def _case(suite: ET.Element, mode: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=_text(mode), name=_text(name))


def _outcome(case: ET.Element, kind: str, message: str, details: Sequence[str] = ()) -> None:
    outcome = ET.SubElement(case, kind, message=_text(message))
    outcome.text = _text("\n".join(details)) or None


def _count(suite: ET.Element) -> None:
    for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{kind}"))))
    suite.set("tests", str(len(suite)))


def _verdict_case(suite: ET.Element, mode: ModeVerdict, regime: str) -> None:
    case = _case(suite, mode.label, "verdict")
    findings = mode.counted(regime)
    if not findings:
        return
    verdict = worst(f.verdict for f in findings)
    sentences = [f"{f.verdict}: {f.sentence}" for f in findings]
    kind = "failure" if verdict in FAILURES else "error"
    _outcome(case, kind, f"{verdict}: {mode.reason(regime)}", sentences)


def _stage_cases(
    suite: ET.Element, comparison: GroupComparison, regime: str, modes: Sequence[ModeVerdict]
) -> None:
    by_label = {mode.label: mode for mode in modes}
    for table in stage_tables(comparison):
        if table.regime != regime:
            continue
        for line in table.lines:
            mode = by_label[line.label]
            fails = any(f.fails and f.against == table.against for f in mode.counted(regime))
            culprit = mode.culprits.get((regime, table.against))
            for cell in line.cells:
                case = _case(suite, line.label, f"{cell.stage}, against {table.against}")
                _tell(case, cell, culprit, fails)


def _tell(case: ET.Element, cell: Cell, culprit: Culprit | None, fails: bool) -> None:
    details = [", ".join(part for part in (cell.value, cell.multiple, cell.about) if part)]
    match cell.status:
        case StageStatus.NOT_COMPARED | StageStatus.NOT_TESTED:
            _outcome(case, "skipped", cell.status)
        case StageStatus.INHERITED:
            _outcome(case, "skipped", "inherits the error of an earlier stage", details)
        case StageStatus.INTRODUCED if fails:
            is_first = culprit is not None and culprit.stage is cell.stage
            sentence = culprit.sentence if culprit and is_first else f"{cell.stage} went wrong"
            _outcome(case, "failure", sentence, details)
        case StageStatus.INTRODUCED:
            _outcome(case, "skipped", "over its limit, but accepted", details)
