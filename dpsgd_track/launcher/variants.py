"""`--variant`: modes run once more with other code than the installed packages, or other settings.

The variant's packages come first on the workers' import path. Only modes that can import something
from it are run there: for a variant of Opacus those are the `grad_sample_mode`s that it has itself,
whatever modes of this package have the same names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dpsgd_track.config import (
    AUTO,
    SILENT,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
    VariantConfig,
    require,
    require_one_of,
)
from dpsgd_track.demands import LeftOut
from dpsgd_track.launcher.checkout import check_out, checkouts, commit_of
from dpsgd_track.modes import opacus_source, table
from dpsgd_track.record.environment import git_facts

_NAME = re.compile(r"[A-Za-z0-9._-]{1,60}")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")
PLAN, REPLICAS, CHECKPOINTING = "plan", "replicas", "gradient-checkpointing"
MEMORY_BUDGET = "memory-budget"
SETTINGS = (PLAN, REPLICAS, CHECKPOINTING, MEMORY_BUDGET)
"""Options of settings that may change speed and memory, and no result beyond rounding."""
OF_HERE = "@."
"""End of the path of a revision of the repository one is in."""
_OURS = "dpsgd_track"
_USED_BY_OURS = frozenset({_OURS, "torch", "transformers", "triton"})
"""Packages that modes of this package import. Of Opacus they take the accountants at most."""


def read_variants(given: Sequence[str]) -> tuple[VariantConfig, ...]:
    """The variants that arguments such as `NAME=PATH`, `NAME:OPTION=VALUE` and `REVISION` ask for.

    A revision is checked out aside.

    Raises:
        ValueError: a name is not acceptable or used twice, a folder holds no package, or a
            repository has no such revision.
    """
    variants: dict[str, VariantConfig] = {}
    for text in given:
        variant = _read(text)
        require(variant.name not in variants, "variant", text, "a NAME not used before")
        variants[variant.name] = variant
    return tuple(variants.values())


def _read(text: str) -> VariantConfig:
    name, colon, settings = text.partition(":")
    if colon and "=" not in name and not commit_of(Path.cwd(), text):
        return _of_settings(name, settings, text)
    name, equals, path = text.partition("=")
    if not equals and (commit := commit_of(Path.cwd(), text)):
        name, path = _NOT_IN_A_NAME.sub("-", text)[:60], f"{text}{OF_HERE}"
        return _of_revision(name, path, commit, Path.cwd(), text)
    advice = "For example --variant fork=../opacus, or --variant old=v1.5.3@../opacus."
    allowed = "NAME=PATH, NAME=REVISION@PATH, NAME:OPTION=VALUE, or a revision of the repository "
    allowed += "you are in"
    require(bool(equals and path), "variant", text, allowed, advice)
    _check_name(name, text)
    folder = Path(path).expanduser()
    revision, at, repository = path.partition("@")
    if at and not folder.exists():
        home = Path(repository or ".").expanduser()
        commit = commit_of(home, revision)
        allowed = f"a revision of the repository in {str(home)!r}"
        require(bool(commit), "variant", text, allowed, "Check the revision and the path.")
        return _of_revision(name, path, commit, home, text)
    root = _root_of(folder, text)
    commit, is_dirty = git_facts(root)
    return VariantConfig(
        name=name, path=path, root=str(root), git_revision=commit, git_dirty=is_dirty
    )


def _check_name(name: str, given: str) -> None:
    allowed = "a NAME of up to 60 letters, digits, '.', '_' and '-'"
    require(bool(_NAME.fullmatch(name)), "variant", given, allowed)


def _of_settings(name: str, settings: str, given: str) -> VariantConfig:
    """A variant that is the same code with other settings."""
    _check_name(name, given)
    for part in settings.split(","):
        option, _, value = part.partition("=")
        advice = "Only settings that may change no result make a variant."
        require_one_of("variant", option, SETTINGS, advice)
        has_value = option != CHECKPOINTING
        allowed = f"{option}{'=VALUE' * has_value}"
        require(bool(value) is has_value, "variant", given, allowed)
    return VariantConfig(name=name, path=settings, root="")


def with_settings(
    variant: VariantConfig | None, model: ModelConfig, performance: PerformanceConfig
) -> tuple[ModelConfig, PerformanceConfig]:
    """Settings of a job of `variant`.

    Raises:
        ValueError: a setting has no such value.
    """
    for option, value in _settings_of(variant).items():
        if option == CHECKPOINTING:
            model = replace(model, gradient_checkpointing=True)
        elif option == PLAN:
            performance = replace(performance, plan=value)
        elif option == MEMORY_BUDGET:
            performance = replace(performance, memory_budget=value)
        else:
            require(value.isdecimal(), REPLICAS, value, "an integer >= 1")
            performance = replace(performance, num_replicas=int(value))
    return model, performance


def _settings_of(variant: VariantConfig | None) -> dict[str, str]:
    """The settings of a variant, by option; none for one of code."""
    if variant is None or variant.root:
        return {}
    parts = (part.partition("=") for part in variant.path.split(","))
    return {option: value for option, _, value in parts}


def _takes_settings(mode: str, variant: VariantConfig) -> str:
    """Reason that `mode` does not run with the settings of `variant`; empty if it does."""
    settings = _settings_of(variant)
    plan = settings.get(PLAN, AUTO)
    if plan != AUTO and not table.takes_norm_plan(mode, plan):
        return f"it cannot compute its norms by {PLAN}={plan}"
    if MEMORY_BUDGET in settings and not table.takes_memory_budget(mode):
        return f"it keeps nothing that {MEMORY_BUDGET} could bound"
    if REPLICAS in settings and (table.runs_on_one_device(mode) or table.is_of_opacus(mode)):
        return f"it has no {REPLICAS}"
    return ""


def restore(variant: VariantConfig) -> None:
    """Check a revision out again if its folder has been removed.

    Raises:
        ValueError: git no longer has it.
    """
    root = Path(variant.root)
    if not root.is_relative_to(checkouts().resolve()):
        return
    # One that is there counts as used.
    is_here = variant.path.endswith(OF_HERE)
    repository = "" if is_here else variant.path.partition("@")[2]
    check_out(Path(repository or ".").expanduser(), variant.git_revision)


def _of_revision(name: str, path: str, commit: str, repository: Path, given: str) -> VariantConfig:
    root = _root_of(check_out(repository, commit), given)
    return VariantConfig(name=name, path=path, root=str(root), git_revision=commit)


def _root_of(folder: Path, given: str) -> Path:
    """The folder for the import path: `src` if it holds the packages."""
    require(folder.is_dir(), "variant", given, "an existing folder")
    allowed = f"a folder without {os.pathsep!r} in its path, as it goes on the import path"
    require(os.pathsep not in str(folder.resolve()), "variant", given, allowed)
    for root in (folder / "src", folder):
        if any(root.glob("*/__init__.py")):
            return root.resolve()
    advice = "Give the folder of a source checkout, or one that `pip install --target` filled."
    require(False, "variant", given, "a folder with a package in it or in its src/", advice)
    raise AssertionError("unreachable")


def modes_in(variant: VariantConfig, modes: Sequence[str], *, is_chosen: bool) -> tuple[str, ...]:
    """The modes that run code of `variant`, by the names that they have there.

    Args:
        modes: those of the launch.
        is_chosen: True if the user named them. Else those that the variant alone has join them.

    Raises:
        ValueError: the variant is an Opacus without modes.
    """
    asked = [mode for mode in modes if mode != table.REFERENCE]
    if not variant.root:
        return tuple(mode for mode in asked if not _takes_settings(mode, variant))
    packages = {file.parent.name for file in Path(variant.root).glob("*/__init__.py")}
    if _OURS in packages:
        return tuple(asked)
    if opacus_source.PACKAGE in packages:
        own = own_modes(variant)
        asked += [] if is_chosen else [table.name_of_opacus(name) for name in _by_default(own)]
        named = [_name_in_opacus(mode, own) for mode in asked]
        return tuple(dict.fromkeys(name for name in named if name))
    if packages & _USED_BY_OURS:
        return tuple(asked)
    return tuple(mode for mode in asked if table.spec_of(mode) is None)


def lacking_modes(variant: VariantConfig, modes: Sequence[str]) -> Iterator[LeftOut]:
    """Modes among `modes` that do not run as `variant`, with the reason.

    They are modes that an Opacus lacks, or that do not have its settings.
    """
    for mode in modes if not variant.root else ():
        if mode != table.REFERENCE and (reason := _takes_settings(mode, variant)):
            yield LeftOut(label=f"{mode}@{variant.name}", reason=reason)
    own = own_modes(variant)
    for mode in modes if own else ():
        spec = table.spec_of(mode)
        if spec and spec.grad_sample_mode and spec.grad_sample_mode not in own:
            version = opacus_source.version_of(Path(variant.root) / opacus_source.PACKAGE)
            yield LeftOut(
                label=f"{mode}@{variant.name}",
                reason=f"Opacus {version}, the code of {variant.name}, has no grad_sample_mode "
                f"{spec.grad_sample_mode!r}, only {', '.join(own)}",
            )


def own_modes(variant: VariantConfig) -> tuple[str, ...]:
    """All `grad_sample_mode`s of a variant; none if it is not one of Opacus."""
    package = Path(variant.root) / opacus_source.PACKAGE
    if not variant.root or not (package / "__init__.py").is_file():
        return ()
    return opacus_source.grad_sample_modes(package)


def _by_default(own: Iterable[str]) -> list[str]:
    left_out = opacus_source.NEVER_ALONE | opacus_source.SAME_AS_HOOKS
    return [name for name in own if name not in left_out]


def _name_in_opacus(mode: str, own: Sequence[str]) -> str:
    """The name of `mode` in an Opacus with the modes `own`; empty if it has none like it."""
    spec = table.spec_of(mode)
    if spec is None:
        # A mode of the user's, which may well drive this Opacus.
        return mode
    if spec.grad_sample_mode:
        return mode if spec.grad_sample_mode in own else ""
    return table.name_of_opacus(mode) if mode in own else ""


def check_of_opacus(modes: Sequence[str], variants: Sequence[VariantConfig]) -> tuple[str, ...]:
    """`modes` without those of Opacus that a variant alone has.

    Raises:
        ValueError: neither the installed Opacus nor a variant has one of them.
    """
    specs = {mode: spec for mode in modes if (spec := table.spec_of(mode))}
    wanted = {mode: s.grad_sample_mode for mode, s in specs.items() if s.grad_sample_mode}
    if not wanted:
        return tuple(modes)
    installed = opacus_source.installed_modes()
    of_variants = {name for variant in variants for name in own_modes(variant)}
    known = sorted({*installed, *of_variants})
    for name in wanted.values():
        advice = "Those are the modes of the installed Opacus" + (
            " and of the variants." if of_variants else "."
        )
        require(name in known, "grad_sample_mode", name, f"one of {', '.join(known)}", advice)
    return tuple(mode for mode in modes if wanted.get(mode, "") in ("", *installed))


def judged_alone(regimes: Sequence[RegimeConfig]) -> tuple[RegimeConfig, ...]:
    """`regimes` without replays, which measure the floor of the installed code.

    The twin without noise is run again: a run's noise is its difference from its twin.
    """
    return tuple(regime for regime in regimes if regime.replay in ("", SILENT))
