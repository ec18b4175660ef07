"""Hooks of the site's build: links out of `docs/`, and the page of the command line's help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

COMMANDS = "commands.md"
WIDE = {"coverage.md", "detection.md", "detection-bf16.md", "findings.md", "tracking_faults.md"}
"""Pages of wide tables, which have the room of the list of contents as well."""


def on_files(files: Files, config: Any) -> Files:
    """Add the page of all verbs, each with what its `--help-all` says."""
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the repository that the site does not have become their names."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)", r"\1 (`\2`)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Options in sentences and tables are marked, so that they are not broken after a hyphen."""

    def marked(code: re.Match[str]) -> str:
        options = re.sub(r"(?<![\w-])(--?[a-z][\w-]*)", r'<span class="option">\1</span>', code[1])
        return f"<code>{options}</code>"

    # Blocks have a span in front of their code.
    return re.sub(r"(?<!</span>)<code>([^<]*)</code>", marked, html)


def commands_page() -> str:
    """The help of the program and of every verb, as a page."""
    overview = _help("--help")
    verbs = re.findall(r"(?m)^  ([a-z]+)  ", overview)
    parts = ["# Command line", "", "```text", overview, "```", ""]
    for verb in verbs:
        parts += [f"## {verb}", "", "```text", _help(verb, "--help-all"), "```", ""]
    return "\n".join(parts)


def _help(*arguments: str) -> str:
    program = Path(sys.executable).with_name("dpsgd-track")
    done = subprocess.run(
        [str(program), *arguments],
        env={**os.environ, "COLUMNS": "78", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rstrip()
