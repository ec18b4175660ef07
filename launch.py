#!/usr/bin/env python
"""Run DP-SGD modes and track them in MLflow: `python launch.py --help`."""

import sys

from dpsgd_track.detection.command import detect
from dpsgd_track.launcher.run import main
from dpsgd_track.report.launched import summarise

if __name__ == "__main__":
    sys.exit(main(detect=detect, summarise=summarise))
