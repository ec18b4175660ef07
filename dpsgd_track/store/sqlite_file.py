"""The file that an SQLite URI names, and the URI by which SQLAlchemy opens it.

`sqlite:///FILE` names FILE literally: `%20`, `?` and `#` are characters of the name, as in a shell.
This holds for every message, the spool and the working directory. Only `sqlalchemy_uri` translates
it for SQLAlchemy, to open the file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

SQLITE_PREFIX = "sqlite:///"
_OPTIONS = re.compile(r"\?\w+=")


def absolute_uri(tracking_uri: str) -> str:
    """`tracking_uri` with the path of an SQLite file made absolute."""
    path = sqlite_path(tracking_uri)
    return tracking_uri if path is None else f"{SQLITE_PREFIX}{path}"


def sqlite_path(tracking_uri: str) -> Path | None:
    """The file behind an SQLite URI; None for other stores.

    Raises:
        ValueError: the URI names no file, or a file that MLflow cannot open.
    """
    if not tracking_uri.startswith("sqlite:"):
        return None
    name = tracking_uri.removeprefix(SQLITE_PREFIX)
    if name in (tracking_uri, "", ":memory:") or name.endswith("/") or "\0" in name:
        raise ValueError(
            f"tracking_uri={tracking_uri!r}: expected sqlite:///FILE. "
            "Ranks are processes of their own: the store must be a file."
        )
    path = Path(name).absolute()
    if ".." in path.parts:
        # SQLAlchemy removes `..` textually, which is wrong behind a symbolic link.
        path = Path(os.path.realpath(path.parent), path.name)
    if _OPTIONS.search(path.name):
        raise ValueError(
            f"tracking_uri={tracking_uri!r}: expected sqlite:///FILE without options. "
            "Leave out what follows the question mark."
        )
    require_utf8("tracking_uri", path)
    return path


def require_utf8(setting: str, path: Path) -> None:
    """Raise unless MLflow can store `path` in its tables."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{setting}={str(path)!r}: expected a path in UTF-8. Choose another, or rename it."
        ) from None


def sqlalchemy_uri(tracking_uri: str) -> str:
    """`tracking_uri` for SQLAlchemy, which decodes %XX and ends the path at `?`."""
    path = sqlite_path(tracking_uri)
    if path is None:
        return tracking_uri
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    if quoted == str(path):
        return f"{SQLITE_PREFIX}{path}"
    # MLflow creates the folder in the text after sqlite:///, without decoding it. It leaves alone
    # a URI that names the driver.
    return f"sqlite+pysqlite:///{quoted}"
