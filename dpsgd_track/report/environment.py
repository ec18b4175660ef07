"""Settings and versions of a group for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dpsgd_track.config import VariantConfig
from dpsgd_track.record import names
from dpsgd_track.record.run import Group

_OWN_TAGS = ("mlflow.", "dpsgd.")


def command(group: Group) -> str:
    """Command that runs the same again, below the versions; empty if a program launched it."""
    plan = group.plan
    if not plan.command:
        return ""
    e = plan.environment
    ran = [f"dpsgd-track {e.dpsgd_track}", f"torch {e.torch}", f"transformers {e.transformers}"]
    ran += [f"Opacus {e.opacus}", f"Python {e.python}"]
    ran += [f"commit {e.git_revision}"] * bool(e.git_revision)
    ran += ["uncommitted changes"] * e.git_dirty
    return f"# {', '.join(ran)}\n{plan.command}"


def environment(group: Group) -> list[tuple[str, str]]:
    """(name, value) of the settings common to all jobs of the group, and of its environment."""
    plan = group.plan
    jobs = [dict(_lines(asdict(job))) for job in plan.jobs]
    shared = {
        name: value
        for name, value in jobs[0].items()
        if not name.startswith("regimes") and all(job.get(name) == value for job in jobs)
    }
    settings = {
        "suite": str(plan.suite),
        **shared,
        **{f"environment.{name}": value for name, value in plan.environment.items()},
    }
    device = next((run.facts.device for run in _runs(group) if run.facts), None)
    if device is not None:
        settings |= {f"device.{name}": str(value) for name, value in vars(device).items() if value}
    settings |= {f"variant.{variant.name}": _told(variant, group) for variant in variants(group)}
    settings |= {tag: value for tag, value in group.tags.items() if not tag.startswith(_OWN_TAGS)}
    ranks = ", ".join(f"{count} {status}" for status, count in group.rank_statuses.items())
    if ranks:
        settings["rank runs"] = ranks
    if group.superseded:
        settings["earlier attempts left out"] = str(group.superseded)
    settings.pop(names.NOTE, None)
    return list(settings.items())


def variants(group: Group) -> list[VariantConfig]:
    """The variants of the group, in the order of the plan."""
    return list(dict.fromkeys(job.variant for job in group.plan.jobs if job.variant))


def _told(variant: VariantConfig, group: Group) -> str:
    """The settings, or the packages that ran, with their versions, and where they came from."""
    if not variant.root:
        return f"with {variant.path}"
    imported: dict[str, str] = {}
    for run in _runs(group):
        if run.variant == variant.name and run.facts:
            imported |= run.facts.imported
    packages = [f"{name} {version}" for name, version in sorted(imported.items())]
    parts = [", ".join(packages) or "nothing was imported", f"from {variant.path}"]
    parts += [f"commit {variant.git_revision}"] * bool(variant.git_revision)
    return ", ".join([*parts, *["uncommitted changes"] * variant.git_dirty])


def _runs(group: Group) -> Iterator[Any]:
    yield from (*group.runs, *group.timed_runs)


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
