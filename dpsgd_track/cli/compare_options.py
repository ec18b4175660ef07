"""Options of `compare`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dpsgd_track.config import Settings, require, require_one_of
from dpsgd_track.launcher.choices import DEFAULT_CONFIG, SpoolChoices

WAIVERS = "waivers.yaml"
"""Waivers file, read if it is beside the settings file."""


@dataclass(frozen=True, kw_only=True)
class CompareChoices(SpoolChoices):
    """Thresholds of a comparison, and the files that it writes."""

    fail_on: str = "drift"
    """VERDICT: least severe verdict with exit code 1: drift or bug."""
    bitwise: bool = False
    """Also end with 1 unless each run is its counterpart bit by bit. That is the same run of the
    other group, or of the installed code where a variant ran."""
    loss_threshold: float | None = None
    """Largest acceptable absolute difference of a loss (default: that of --config)."""
    grad_norm_threshold: float | None = None
    """Largest acceptable relative difference of a gradient norm (default: that of
    --config)."""
    bug_threshold: float | None = None
    """Relative difference above which drift is called a bug (default: that of --config)."""
    waivers: Path | None = None
    """YAML list of drifts that are accepted until a date (default: waivers.yaml beside the
    configuration file, if it exists)."""
    export: Path | None = None
    """Also write the group to this golden file, which ends in .dpsgd (default: none). If it ends in
    .dpsgd.json it is text that can be diffed."""
    force: bool = False
    """Let --export replace an existing file."""
    results_dir: str | None = None
    """FOLDER: where GROUP/, with the report, is written (default: results_dir of --config)."""
    no_png: bool = False
    """Leave out the PNG charts."""
    no_log: bool = False
    """Do not attach the report and the verdict to the group in the tracking store."""
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"))] = False
    """Print the table of modes of a PASS as well. A PASS is otherwise its verdict and where the
    report is; every other verdict has the table and what is wrong."""
    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"))] = False
    """Print the verdict alone, on one line."""

    def settings(self) -> Settings:
        """Settings of the configuration file, overridden by the options given.

        Raises:
            ValueError: a setting is invalid.
        """
        require_one_of("fail_on", self.fail_on, ("drift", "bug"))
        require(not (self.quiet and self.verbose), "quiet", True, "it without --verbose")
        settings = super().settings()
        chosen = {
            name: value
            for name in ("loss", "grad_norm", "bug")
            if (value := getattr(self, f"{name}_threshold")) is not None
        }
        settings = replace(settings, thresholds=replace(settings.thresholds, **chosen))
        if self.results_dir is not None:
            settings = replace(settings, results_dir=self.results_dir)
        return settings

    def waivers_path(self) -> Path | None:
        """The waivers file to read, if any."""
        if self.waivers is not None:
            return self.waivers
        beside = (self.config or DEFAULT_CONFIG).with_name(WAIVERS)
        return beside if beside.exists() else None
