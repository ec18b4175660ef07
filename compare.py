#!/usr/bin/env python
"""Compares the modes of a run group: `python compare.py GROUP`."""

import gc
import sys

from dpsgd_track.cli.compare import main

if __name__ == "__main__":
    # Half of the time goes to importing MLflow, and a fifth of that to looking for garbage in it.
    gc.disable()
    sys.exit(main())
