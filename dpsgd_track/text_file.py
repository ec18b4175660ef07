"""Text files that users write: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# UTF-32's begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@contextlib.contextmanager
def open_text(setting: str, path: Path) -> Iterator[TextIO]:
    """The text of `path` without its byte order mark, and with its line ends as they are.

    Args:
        setting: what names the file, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or what was read while entered is not UTF-8.
    """
    try:
        with path.open("rb") as head:
            start = head.read(4)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{setting}={str(path)!r}: expected a file that can be read. {error.strerror}."
        ) from None
    if other := _other_encoding(start):
        raise _not_utf8(setting, path, other)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield file
        except UnicodeDecodeError:
            raise _not_utf8(setting, path, _first_wrong_byte(path)) from None


def _not_utf8(setting: str, path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{setting}={str(path)!r}: expected UTF-8 text. {reason} Save the file as UTF-8."
    )


def _other_encoding(start: bytes) -> str:
    for mark, encoding in _OTHER_MARKS.items():
        if start.startswith(mark):
            return f"It is {encoding}, by its byte order mark."
    # UTF-16 without a mark, where every second byte of English text is zero.
    return "It looks like UTF-16, or is no text." if b"\0" in start else ""


def _first_wrong_byte(path: Path) -> str:
    # A decoder tells the place in the block that it was given.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"Line {number} holds the byte {line[error.start]:#04x} where it cannot be."
    return "It was changed while it was read."
