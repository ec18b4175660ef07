#!/usr/bin/env python
"""Make the picture of a report that README.md and the site show: a fault, found.

    python benchmarks/report_picture.py docs/report.png

Launches a small group in which one mode applies its clip factors twice, compares it, and takes the
report's first screen. Needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = (
    "quick --device cpu --model-name llama-tiny --num-iter 5 --group july "
    "--mode no_dp,flash_fsdp_bk,flash_fsdp+factors_applied_twice"
)
BROWSERS = ("chromium", "google-chrome", "chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking "
    "--disable-component-update --disable-sync --force-device-scale-factor=2 "
    "--window-size=1200,900"
)


def main() -> int:
    """Launch, compare, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture.resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"expected one of {', '.join(BROWSERS)} on the PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        launched = subprocess.run(
            [sys.executable, str(ROOT / "launch.py"), *LAUNCH.split()], cwd=folder, check=False
        )
        compared = subprocess.run(
            [sys.executable, str(ROOT / "compare.py"), "july"], cwd=folder, check=False
        )
        # The fault is found.
        if launched.returncode or compared.returncode != 1:
            return 1
        page = Path(folder, "results", "july", "report.html").as_uri()
        profile = f"--user-data-dir={folder}/profile"
        subprocess.run(
            [browser, *OPTIONS.split(), profile, f"--screenshot={picture}", page], check=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
