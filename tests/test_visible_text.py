"""Text of others is inert wherever it is shown."""

from __future__ import annotations

import io

import pytest

from dpsgd_track.cli.context import Context, say
from dpsgd_track.launcher.progress import PlainDisplay
from dpsgd_track.report.junit import junit
from dpsgd_track.report.text import summary
from dpsgd_track.visible_text import visible
from tests.support.synthetic_group import failed, mode_run
from tests.support.synthetic_report import comparison, hostile

EVIL = (
    "boom\n::error title=pwn::by reason\n  ::stop-commands::x\n##[error]old\n"
    "\x1b[2J\x1b]0;title\x07\u202egnp\u2066 \x9b31m"
)


def is_inert(text: str) -> bool:
    commands = any(line.lstrip().startswith("::") or "##[" in line for line in text.splitlines())
    return not commands and all(c in "\n\t" or c.isprintable() for c in text)


def test_what_is_visible_stays() -> None:
    text = "a::b, é — 漢字: x\n\tf(x) # [1]"
    assert visible(text) == text
    assert not is_inert(EVIL)
    assert is_inert(visible(EVIL))


def test_what_a_launch_and_its_errors_say_is_inert(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    display.say(EVIL)
    display.start_mode(EVIL, ())
    display.end_mode("FAILED", EVIL)
    assert is_inert(stream.getvalue())
    say(EVIL)
    Context(verb="quick").complain(EVIL, 2)
    out, err = capsys.readouterr()
    assert is_inert(out)
    assert is_inert(err)
    assert err.count("\n") == 1


def test_reports_as_text_are_inert() -> None:
    evil = comparison([mode_run("flash_fsdp", "clip", status="FAILED", failure=failed(EVIL))])
    for made in (hostile(), evil):
        assert is_inert(summary(made))
        assert is_inert(junit(made))
