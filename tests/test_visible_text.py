"""Text of others is inert wherever it is shown."""

from __future__ import annotations

import html as markup
import io
import re
from collections.abc import Callable

import pytest

from dpsgd_track.cli.context import Context, say
from dpsgd_track.comparison import GroupComparison
from dpsgd_track.launcher.progress import PlainDisplay
from dpsgd_track.report.charts import figures
from dpsgd_track.report.html import html
from dpsgd_track.report.junit import junit
from dpsgd_track.report.text import summary
from dpsgd_track.visible_text import visible
from tests.support.synthetic_group import failed, mode_run
from tests.support.synthetic_report import broken, comparison, healthy, hostile, undefined

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


def sentences_of(page: str, elements: str) -> list[str]:
    """Texts of the page's elements, as a reader sees them."""
    shown = re.sub(r"<(script|style|svg)\b.*?</\1>", "", page, flags=re.DOTALL)
    inner = re.findall(rf"<({elements})\b[^>]*>(.*?)</\1>", shown, re.DOTALL)
    texts = (markup.unescape(re.sub(r"<[^>]+>", "", text)) for _, text in inner)
    return [" ".join(text.split()) for text in texts]


@pytest.mark.parametrize(
    "made", [healthy, broken, undefined], ids=lambda made: getattr(made, "__name__", "")
)
def test_sentences_begin_with_a_capital_or_a_name_and_end_once(
    made: Callable[[], GroupComparison],
) -> None:
    shown = made()
    page = html(shown, figures(shown))
    labels = tuple(mode.label for mode in shown.modes)
    texts = sentences_of(page, "p|figcaption")
    told = re.findall(
        r'<li><span class="verdict.*?<span class="name">(.*?)</span>', page, re.DOTALL
    )
    texts += sentences_of("".join(f"<p>{each}</p>" for each in told), "p")
    texts = [text for text in texts if text]
    assert len(texts) > 20
    for text in texts:
        assert text[0].isupper() or text.startswith(labels), text
        assert re.search(r"[^.\s]\.$", text), text
        assert " ." not in text, text
    first_screen = " ".join(sentences_of(page.split("</header>")[0], "p"))
    sentences = re.split(r"(?<=\.) (?=\S)", first_screen)
    assert len(sentences) == len(set(sentences))
