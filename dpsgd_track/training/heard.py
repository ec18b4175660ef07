"""Warnings of the code under test, which would otherwise be lost in a log."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TextIO

from dpsgd_track.config import JobConfig
from dpsgd_track.modes.code_owner import OURS, owner_of

_OF_NOBODY = frozenset({OURS, "torch", "transformers", "numpy", "mlflow", ""})
"""Owners of code that every mode runs on, whose warnings are no mode's."""
_OF_WARNINGS = ("warnings.py", "_py_warnings.py")
"""Files of the standard library's `warnings`, before and from Python 3.14 on."""


class HeardWarnings:
    """The warnings of code under test since `listen`: each sentence once, in order."""

    def __init__(self, job: JobConfig) -> None:
        self._job = job
        self._heard: dict[str, None] = {}

    @property
    def sentences(self) -> tuple[str, ...]:
        """The warnings, each on one line without a full stop."""
        return tuple(self._heard)

    def listen(self) -> None:
        """Take every warning of this process from now on; it is shown as before, too."""
        show = warnings.showwarning

        def hear(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if owner_of(_raised_in() or Path(filename), self._job) not in _OF_NOBODY:
                self._heard[" ".join(str(message).split()).rstrip(". ")] = None
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = hear


def _raised_in() -> Path | None:
    """The file that called `warnings.warn`; its `stacklevel` may name another."""
    frame = sys._getframe(2)
    while frame and Path(frame.f_code.co_filename).name in _OF_WARNINGS:
        frame = frame.f_back  # type: ignore[assignment]
    return Path(frame.f_code.co_filename) if frame else None
