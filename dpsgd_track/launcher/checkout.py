"""A revision of a git repository, checked out aside, so that the working tree stays as it is."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

_TIMEOUT_S = 300
_DAY_S = 86400.0
UNUSED_S = 7 * _DAY_S
"""Seconds after its last use until a checkout is removed."""
MOST_KEPT = 8
"""Checkouts that are kept; what was used within a day may still be running."""


def commit_of(repository: Path, revision: str) -> str:
    """The full name of the commit that `revision` stands for; empty if there is none."""
    if not revision or revision.startswith("-"):
        return ""
    try:
        done = _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode().strip()


def checkouts() -> Path:
    """Folder of all checkouts, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "dpsgd-track" / "checkouts"


def check_out(repository: Path, commit: str) -> Path:
    """A folder with the files of `commit`, made unless it is there already.

    It is kept in the user's cache, as a commit never changes, until it has not been used for long.

    Raises:
        ValueError: git cannot give the files.
    """
    # Help does without.
    import tempfile

    folder = checkouts() / commit
    if folder.is_dir():
        # Its time is that of its last use.
        os.utime(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_unused(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        files = Path(partial) / "files"
        files.mkdir()
        try:
            archive = _git(repository, "archive", "--format=tar", commit).stdout
            unpack = ["tar", "-x", "-C", str(files)]
            subprocess.run(unpack, input=archive, check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            why = " ".join(said.decode(errors="replace").split())
            raise ValueError(
                f"variant={commit!r}: expected a commit whose files git can give. {why}"
            ) from None
        try:
            files.rename(folder)
        except OSError:
            # Another launch was quicker.
            if not folder.is_dir():
                raise
    return folder


def _remove_unused(folder: Path) -> None:
    """Remove checkouts that nobody uses, and what a launch that was killed left of one."""
    # Help does without.
    import shutil

    def last_use(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:
            # Another launch was quicker.
            return 0.0

    newest_first = sorted(folder.iterdir(), key=last_use, reverse=True)
    for place, path in enumerate(newest_first):
        unused_s = time.time() - last_use(path)
        if unused_s > (UNUSED_S if place < MOST_KEPT else _DAY_S):
            shutil.rmtree(path, ignore_errors=True)


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
