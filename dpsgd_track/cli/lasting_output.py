"""Output that ends without ending the program.

A pipe may be closed (`| head -1`), a disk full, a terminal gone, a descriptor closed from the
start. What was asked for is done all the same, and its exit code says how it went.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Lasting:
    """A stream whose errors are ignored."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        # ValueError: something closed the stream.
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def end(self) -> None:
        """Write what is left, or drop it: Python would try once more at its end, and fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                number = self._stream.fileno()
                kept = os.dup(number)
                self._discard()
                self._stream.flush()
                os.dup2(kept, number)
                os.close(kept)

    def _give_up(self, error: Exception) -> None:
        """Leave what cannot be written to the null device; a full disk may have room later."""
        if isinstance(error, OSError) and error.errno in _GONE:
            with contextlib.suppress(OSError, ValueError):
                self._discard()

    def _discard(self) -> None:
        """Have what is written from now on go to the null device."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """While entered, standard output and standard error take everything."""
    before = sys.stdout, sys.stderr
    _open_all()
    out, err = (
        stream if stream is not None else os.fdopen(number, "w", encoding="utf-8", closefd=False)
        for number, stream in zip((1, 2), before, strict=True)
    )
    lasting = _Lasting(out), _Lasting(err)
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.end()
        sys.stdout, sys.stderr = before


def _open_all() -> None:
    """Open what is closed: a file of ours would take its number, and get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
