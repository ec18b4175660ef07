"""What a run was made with: interpreter, platform, versions, git revision, imported code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from dpsgd_track import __version__

PACKAGES = ("torch", "triton", "transformers", "opacus", "mlflow")


def environment() -> dict[str, str]:
    """Facts about this process's machine and software; reads metadata, imports no package."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "dpsgd_track": __version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts | git_facts(Path.cwd())


def imported_from(root: str) -> dict[str, str]:
    """Packages that this process imported from directly below `root`, and their versions.

    Only what the folder itself holds counts: a virtual environment inside it does not.
    """
    root = os.path.realpath(root)
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        package = name.partition(".")[0]
        if file is None or package in found:
            continue
        place = os.path.realpath(file)
        if place == f"{root}/{package}.py" or place.startswith(f"{root}/{package}/"):
            found[package] = str(getattr(sys.modules.get(package), "__version__", "unknown"))
    return found


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def git_facts(folder: Path) -> dict[str, str]:
    """Revision of the repository that `folder` is in, and whether it has changes; else empty."""
    revision = _git(folder, "rev-parse", "HEAD")
    if not revision:
        return {}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git_revision": revision, "git_dirty": str(bool(changes)).lower()}


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty when git or a repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
