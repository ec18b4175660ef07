#!/usr/bin/env python
"""Compares the modes of a run group: `python compare.py GROUP`."""

import sys

from dpsgd_track.report.command import main

if __name__ == "__main__":
    sys.exit(main())
