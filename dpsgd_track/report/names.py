"""Names that come from runs, made fit to be shown."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` with a mark for every character that would act unseen.

    Control characters rewrite what a terminal shows, and the marks for writing direction what
    every reader sees. Lines and tabs stay.
    """
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
