#!/usr/bin/env python
"""Run DP-SGD modes and track them in MLflow: `python launch.py --help`."""

import sys

from dpsgd_track.cli.faults import detect
from dpsgd_track.cli.launch import main
from dpsgd_track.cli.profile import summarise

if __name__ == "__main__":
    sys.exit(main(detect=detect, summarise=summarise))
