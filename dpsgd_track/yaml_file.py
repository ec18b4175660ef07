"""YAML files that users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpsgd_track.text_file import open_text


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
        return yaml.safe_load(text)
    except RecursionError:
        reason = "It is nested too deeply."
    # PyYAML lets the ValueError of an impossible date through.
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"{setting}={str(path)!r}: expected valid YAML. {reason}")
