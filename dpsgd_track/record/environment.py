"""The environment of a run: interpreter, platform, versions, git revision, imported code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dpsgd_track import __version__

NOT_INSTALLED = "not installed"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A machine and its software."""

    python: str
    platform: str
    cpu: str
    """Model name of the processor."""
    dpsgd_track: str
    torch: str
    triton: str
    transformers: str
    opacus: str
    mlflow: str
    """Versions; `not installed` for a missing package."""
    git_revision: str = ""
    """Commit of the working directory's repository; empty outside of one."""
    git_dirty: bool = False
    """True if that repository has uncommitted changes."""

    def with_versions(self, versions: Mapping[str, str]) -> Environment:
        """This environment with other `versions` of its packages, by name; others are ignored."""
        known = {field.name for field in fields(self)}
        changed: dict[str, Any] = {name: v for name, v in versions.items() if name in known}
        return replace(self, **changed)

    def items(self) -> Iterator[tuple[str, str]]:
        """(name, value) of each fact, for display."""
        for name, value in vars(self).items():
            yield name, str(value).lower() if isinstance(value, bool) else value


def environment() -> Environment:
    """The environment of this process; reads package metadata, imports no package."""
    revision, is_dirty = git_facts(Path.cwd())
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu_model(),
        dpsgd_track=__version__,
        torch=_version_of("torch"),
        triton=_version_of("triton"),
        transformers=_version_of("transformers"),
        opacus=_version_of("opacus"),
        mlflow=_version_of("mlflow"),
        git_revision=revision,
        git_dirty=is_dirty,
    )


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def imported_from(root: str) -> dict[str, str]:
    """Packages that this process imported from directly below `root`, and their versions.

    Only packages of the folder itself count, not those of a virtual environment inside it.
    """
    root = os.path.realpath(root)
    versions: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        package = name.partition(".")[0]
        if file is None or package in versions:
            continue
        path = os.path.realpath(file)
        if path == f"{root}/{package}.py" or path.startswith(f"{root}/{package}/"):
            versions[package] = str(getattr(sys.modules.get(package), "__version__", "unknown"))
    return versions


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


def git_facts(folder: Path) -> tuple[str, bool]:
    """Commit of the repository that holds `folder`, and whether it has uncommitted changes."""
    revision = _git(folder, "rev-parse", "HEAD")
    if not revision:
        return "", False
    return revision, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))


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
