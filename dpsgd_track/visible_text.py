"""Makes text of others safe to display: names, reasons and notes from runs, files and servers."""

from __future__ import annotations

import re

# As GitHub's runner finds its commands: the first also after spaces, the second anywhere.
_COMMAND = re.compile(r"^(\s*):(?=:)|#(?=#\[)", re.MULTILINE)


def visible(text: str) -> str:
    """`text` with every invisible control character replaced by a visible mark.

    Control characters rewrite the output of a terminal, and writing-direction marks reorder text
    everywhere. Line breaks and tabs stay. No line is left that CI would take for a command.
    """
    shown = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
    return _COMMAND.sub(lambda match: f"{match[0]} ", shown)
