"""A revision of a git repository, checked out aside, so that the working tree stays as it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_TIMEOUT_S = 300


def commit_of(repository: Path, revision: str) -> str:
    """The full name of the commit that `revision` stands for; empty if there is none."""
    if not revision or revision.startswith("-"):
        return ""
    try:
        done = _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode().strip()


def check_out(repository: Path, commit: str) -> Path:
    """A folder with the files of `commit`, made unless it is there already.

    It is kept in the user's cache: a commit never changes.

    Raises:
        ValueError: git cannot give the files.
    """
    # Help does without.
    import tempfile

    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(cache).expanduser() / "dpsgd-track" / "checkouts" / commit
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
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


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
