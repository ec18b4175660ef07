"""YAML files that users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpsgd_track.text_file import open_text

MOST_NESTED = 100
"""Collections within each other: PyYAML's time grows with the square of their number."""


def read_yaml(setting: str, path: Path) -> Any:
    """The document in a YAML file; None if it is empty.

    Args:
        setting: what names the file, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is no YAML in UTF-8.
    """
    with open_text(setting, path) as file:
        text = file.read()
    try:
        if not _is_too_deep(text):
            return yaml.safe_load(text)
        reason = "It is nested too deeply."
    # PyYAML lets the ValueError of an impossible date through.
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"{setting}={str(path)!r}: expected valid YAML. {reason}")


def _is_too_deep(text: str) -> bool:
    depth = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        depth += isinstance(token, _BEGIN) - isinstance(token, _END)
        if depth > MOST_NESTED:
            return True
    return False


_BEGIN = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_END = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
