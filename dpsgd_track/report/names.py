"""Makes names that come from runs safe to display."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` with every invisible control character replaced by a visible mark.

    Control characters rewrite the output of a terminal, and writing-direction marks reorder text
    everywhere. Line breaks and tabs stay.
    """
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
