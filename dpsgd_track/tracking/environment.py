"""What a run was made with: interpreter, platform, package versions, git revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from dpsgd_track import __version__

PACKAGES = ("torch", "transformers", "opacus", "mlflow")


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
    return facts | _git_facts(Path.cwd())


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


def _git_facts(folder: Path) -> dict[str, str]:
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
