"""`--variant NAME=PATH`: modes run once more with a source checkout, beside the installed code.

Its packages come first on the workers' import path. A mode need not use them, but if none
did, every result of the variant would be one of the installed code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpsgd_track.config import SILENT, JobConfig, VariantConfig, require
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record.environment import git_facts

_NAME = re.compile(r"[A-Za-z0-9._-]{1,60}")


def read_variants(given: Sequence[str]) -> tuple[VariantConfig, ...]:
    """The variants that `NAME=PATH` arguments ask for.

    Raises:
        ValueError: a name is not acceptable or used twice, or a folder holds no package.
    """
    variants: dict[str, VariantConfig] = {}
    for text in given:
        name, equals, path = text.partition("=")
        advice = "For example --variant fork=../opacus."
        require(bool(equals and path), "variant", text, "NAME=PATH", advice)
        allowed = "a NAME of up to 60 letters, digits, '.', '_' and '-'"
        require(bool(_NAME.fullmatch(name)), "variant", text, allowed)
        require(name not in variants, "variant", text, "a NAME not used before")
        root = _root_of(Path(path).expanduser(), text)
        revision, is_dirty = git_facts(root)
        variants[name] = VariantConfig(
            name=name, path=path, root=str(root), git_revision=revision, git_dirty=is_dirty
        )
    return tuple(variants.values())


def _root_of(folder: Path, given: str) -> Path:
    """The folder for the import path: `src` if it holds the packages."""
    require(folder.is_dir(), "variant", given, "an existing folder")
    allowed = f"a folder without {os.pathsep!r} in its path, as it goes on the import path"
    require(os.pathsep not in str(folder.resolve()), "variant", given, allowed)
    for root in (folder / "src", folder):
        if any(root.glob("*/__init__.py")):
            return root.resolve()
    advice = "Give the folder of a source checkout."
    require(False, "variant", given, "a folder with a package in it or in its src/", advice)
    raise AssertionError("unreachable")


def variant_jobs(
    jobs: Sequence[JobConfig], variants: Sequence[VariantConfig]
) -> tuple[JobConfig, ...]:
    """Each job but the reference's once more for each variant, without replays.

    The twin without noise is run again: a run's noise is its difference from its twin.
    """
    return tuple(
        replace(
            job,
            variant=variant,
            regimes=tuple(r for r in job.regimes if r.replay in ("", SILENT)),
        )
        for variant in variants
        for job in jobs
        if job.mode != REFERENCE
    )
