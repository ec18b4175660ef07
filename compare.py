#!/usr/bin/env python
"""`dpsgd-track compare` for people who work in this checkout: `python compare.py GROUP`."""

import sys

from dpsgd_track.cli.main import main
from dpsgd_track.program import CHECKOUT

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]], program=CHECKOUT))
