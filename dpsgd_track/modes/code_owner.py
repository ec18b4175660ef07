"""Owner of a file's code: the project, a mode, a variant, or an installed package."""

from __future__ import annotations

import importlib.util
import sysconfig
from functools import cache
from pathlib import Path

import dpsgd_track
from dpsgd_track.config import JobConfig
from dpsgd_track.modes.table import factory_of, spec_of

OURS = "dpsgd_track"
_ROOT = Path(dpsgd_track.__file__).parent
_STDLIB = Path(sysconfig.get_paths()["stdlib"])
_INSTALLED = ("site-packages", "dist-packages")


@cache
def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def is_of_torch(path: Path) -> bool:
    """True for a file of torch."""
    return path.is_relative_to(_torch())


def is_of_python(path: Path) -> bool:
    """True for a file of the standard library, and for code without a file."""
    is_installed = any(part in _INSTALLED for part in path.parts)
    return str(path).startswith("<") or (path.is_relative_to(_STDLIB) and not is_installed)


def owner_of(path: Path, job: JobConfig) -> str:
    """Owner of a file, in words: a variant, this package, an installed one, or the user's mode.

    Empty for Python's own files.
    """
    if is_of_python(path):
        return ""
    if job.variant and job.variant.root and path.is_relative_to(job.variant.root):
        return f"variant {job.variant.name}"
    if path.is_relative_to(_ROOT):
        return OURS
    for number, part in enumerate(path.parts):
        if part in _INSTALLED:
            return path.parts[number + 1].removesuffix(".py")
    if spec_of(job.mode) is None:
        return f"mode {factory_of(job.mode)}"
    return path.parent.name
