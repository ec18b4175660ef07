"""Folders for a moment, which do not outlive their process: those of killed ones are swept away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "dpsgd-track-"
_NAME = re.compile(rf"{_PREFIX}\w{{8}}")
_LEAST_AGE_S = 60.0
"""Age in seconds from which on a folder without a lock has no owner: one takes a moment to lock."""


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A folder in the system's temporary one, removed when the context is left."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(lock)


def sweep() -> None:
    """Remove the folders that killed processes of this user left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Somebody else may sweep at the same time.
        with contextlib.suppress(OSError):
            facts = folder.stat()
            is_ours = _NAME.fullmatch(folder.name) and facts.st_uid == os.getuid()
            if is_ours and time.time() - facts.st_mtime > _LEAST_AGE_S:
                _remove_unowned(folder)


def _remove_unowned(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
