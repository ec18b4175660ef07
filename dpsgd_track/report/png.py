"""Charts as PNG, if a browser is available to draw them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpsgd_track.report.charts import Chart

_WIDTH = 1000
_ADVICE = "apt-get install chromium and pip install 'kaleido>=1'"


_TITLE = 40


class PngSkipped(RuntimeError):
    """No PNG was written; the message is one line that says why and what to do."""


def write_png(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Draw `charts` into `folder`.

    Kaleido looks for Chrome at BROWSER_PATH, then on the PATH, and starts it without a sandbox
    unless told otherwise, so that it also works as root in a container.

    Raises:
        PngSkipped: Kaleido or a browser is missing, or drawing failed.
    """
    if not charts:
        return []
    try:
        import kaleido  # noqa: F401
        import plotly.io
    except ImportError:
        raise PngSkipped(f"PNG charts skipped: Kaleido is not installed. {_ADVICE}") from None
    files = [folder / f"{chart.name}.png" for chart in charts]
    for noisy in ("kaleido", "choreographer"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    try:
        plotly.io.write_images(
            [_titled(chart) for chart in charts],
            files,
            width=_WIDTH,
            height=[_TITLE + chart.figure.layout.height for chart in charts],
            scale=1.5,
        )
    except Exception as error:  # whatever a browser does, the report is complete without pictures
        for file in files:
            file.unlink(missing_ok=True)
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PngSkipped(f"PNG charts skipped: {why} {_ADVICE}") from error
    return files


def _titled(chart: Chart) -> Any:
    # On a page the heading stands above the figure; a picture has no page around it.
    figure = copy.deepcopy(chart.figure)
    title = {"text": chart.title, "x": 0.02, "y": 1, "yanchor": "top", "pad": {"t": 14}}
    return figure.update_layout(title=title, margin={"t": 36 + _TITLE})
