"""What has to be set before any test module is imported."""

from __future__ import annotations

import os

from dpsgd_track.launcher.machine import count_gpus

if not count_gpus():
    # Triton reads it as its own modules are imported, which transformers may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")
