#!/usr/bin/env python
"""The command `dpsgd-track` for people who work in this checkout: `python launch.py --help`."""

import sys

from dpsgd_track.cli.main import main
from dpsgd_track.program import CHECKOUT

if __name__ == "__main__":
    sys.exit(main(program=CHECKOUT))
